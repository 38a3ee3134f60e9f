"""Checkpoints: folders that appear whole, their contents, finding and loading them."""
