"""Straight scripts, one per claim, run from the root of the repository: `python -m recipes.<name>.<script>`."""
