"""One base language model, many LoRA adapters, speculative decoding, in one exact mixed batch."""
