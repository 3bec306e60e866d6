"""Soft rounding and a categorical predictor for data on a grid of values."""
