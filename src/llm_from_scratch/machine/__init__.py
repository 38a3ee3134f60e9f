"""The computer and the operating system."""
