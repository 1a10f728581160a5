"""Decode with coverage in mind: Best-of-N with any verifier."""
