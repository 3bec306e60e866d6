"""Data on a grid of values: soft rounding, a predictor with probabilities of every value, and its
kernels.
"""
