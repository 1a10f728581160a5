"""The commands of `hf-coverage`, one module each, and what they share."""
