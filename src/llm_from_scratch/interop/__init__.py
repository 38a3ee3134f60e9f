"""Formats of other projects, read and written: Hugging Face's and nanoGPT's."""

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
