"""Optimise for coverage: normalised gradients, and the loss that they are normalised for."""
