"""One small benchmark a kernel: its time against the memory's and the arithmetic's, its error against its reference."""
