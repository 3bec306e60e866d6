"""Bounds and likelihoods of whole data sets: measurement, calibration, baselines and tables."""

from ndm.evaluation.calibrate import best_eta, best_variance_ratio
from ndm.evaluation.evaluate import Evaluation, evaluate_bound
from ndm.evaluation.fit_times import best_grid
from ndm.evaluation.tables import Measurement

__all__ = [
    "Evaluation",
    "Measurement",
    "best_eta",
    "best_grid",
    "best_variance_ratio",
    "evaluate_bound",
]
