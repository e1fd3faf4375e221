"""From raw logits to the distribution a request asked for: parameters on the device and one file a logits processor."""
