"""Select for coverage: tournaments over checkpoints and other candidates."""
