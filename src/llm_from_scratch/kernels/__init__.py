"""Faster modules with the parameters and names of core/model.py."""
