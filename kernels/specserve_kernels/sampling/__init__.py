"""Drawing tokens and verifying drafts, without a sorted vocabulary."""
