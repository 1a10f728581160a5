"""Tasks whose data distribution has a known density."""
