"""The steps of `examples/train_demo.py`: corpus, tokenizer, target, draft, adapters, measurements, model card."""
