"""What runs next: scheduler, KV cache blocks, prefix cache, how many drafts. Never sees a tensor."""
