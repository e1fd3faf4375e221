"""The command line: serve, adapters."""
