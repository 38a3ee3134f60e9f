"""Checkpoints: atomically written folders, their contents, finding and loading them."""
