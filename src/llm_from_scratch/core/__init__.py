"""The model, the tokens and the checkpoints."""
