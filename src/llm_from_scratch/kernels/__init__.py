"""Faster modules with the same parameters and names as those of core/model.py."""
