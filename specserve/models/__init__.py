"""Model families, one thin file each."""
