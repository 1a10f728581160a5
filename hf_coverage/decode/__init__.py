"""Decode with coverage in mind: Best-of-N, test-time training, backtracking and exploration."""
