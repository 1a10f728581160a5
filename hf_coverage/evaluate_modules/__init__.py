"""Modules for the `evaluate` library: each folder is what `evaluate.load` takes and what a Space can hold."""
