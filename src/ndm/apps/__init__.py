"""Applications of the likelihood."""
