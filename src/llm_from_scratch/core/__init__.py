"""The model and the tokens that it reads."""
