"""LoRA adapters: PEFT reader, host tier, device slots, manager."""
