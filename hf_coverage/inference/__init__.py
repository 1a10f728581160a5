"""Run causal language models exactly, whatever they are and on any number of processes."""
