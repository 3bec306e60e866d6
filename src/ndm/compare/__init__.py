"""Fair comparisons of several configurations, trained and measured under the same budget."""
