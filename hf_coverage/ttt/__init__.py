"""Test-time training: every sequence takes gradient steps of its own while it is written or read."""
