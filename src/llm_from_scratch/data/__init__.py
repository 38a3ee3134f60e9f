"""Preparation of training data: from texts to token files."""
