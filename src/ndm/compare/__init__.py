"""Several configurations trained and measured under one budget, so that a difference between them
means something.
"""
