"""Ways in from and out to other tools."""
