"""Sizes of the experiment ``steps``: models, bounds, samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ndm.ode import OdeSettings
from ndm.reproduce.plane import LEARNED, PLAIN
from ndm.reproduce.report import Report

MODELS = (PLAIN, LEARNED)


@dataclass(frozen=True)
class Plan:
    """The size of the experiment."""

    config: str = "digits"
    overrides: Mapping[str, object] = field(default_factory=dict)
    horizons: tuple[int | None, ...] = (1, 2, 4, 10, 50, 100, 1000, None)
    fitted: tuple[int, ...] = (1, 2, 4, 10, 50, 100, 1000)
    """Horizons also measured with a fitted reverse variance: on 512 train examples at each of up to
    64 times.
    """
    draws: int = 16
    """Times per example in the NELBO."""
    limit: int | None = None
    """Test examples for the NELBO."""
    nll_limit: int | None = None
    """Test examples for the NLL."""
    ode: OdeSettings = OdeSettings()  # noqa: RUF009 - frozen
    evaluations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 100)
    sets: int = 2
    """Independent sets of samples, for error bars."""
    images: int = 1000
    """Samples per set."""
    real: int | None = None
    """Train images to compare samples with; None for all."""
    classifier_steps: int = 1000
    pictures: tuple[int, ...] = (4, 10, 100)
    rows: int = 3

    @classmethod
    def of(cls, report: Report) -> "Plan":
        """Return the plan for a report's size and data."""
        digits = report.settings.data is None and not report.runs
        plan: dict[str, Any] = {} if digits else {"config": "mnist-small"}
        if report.smoke:
            overrides = {
                "model.predictor.network.channels": 8,
                "train.steps": 4,
                "train.batch_size": 16,
                "train.evaluation_limit": 8,
                "train.evaluation_draws": 1,
                "train.sample_steps": 4,
            }
            return cls(
                **plan,
                overrides=overrides,
                horizons=(1, 4, None),
                fitted=(4,),
                draws=1,
                limit=16,
                nll_limit=4,
                ode=OdeSettings(solver="rk4", nodes=2, probes=1),
                evaluations=(1, 2, 4),
                images=12,
                real=100,
                classifier_steps=10,
                pictures=(1, 2),
                rows=1,
            )
        if digits:
            return cls()
        # Three quarters of the configuration's steps.
        longer = {"train.steps": 3000, "train.ema": 0.998, "train.evaluation_limit": 500}
        return cls(
            **plan,
            overrides=longer,
            fitted=(1, 2, 4, 10),
            draws=8,
            limit=500,
            nll_limit=32,
            images=250,
            real=10_000,
        )
