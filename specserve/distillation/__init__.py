"""Draft companions: a LoRA for the draft model, trained to guess what the target writes with an adapter.

Above the engine, which it uses to sample and to measure, and never imported while serving: it needs peft and
transformers' own models.
"""
