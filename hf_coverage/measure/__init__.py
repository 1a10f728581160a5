"""Measure coverage: reference corpora, scoring, score tables, profiles and the Trainer callback."""
