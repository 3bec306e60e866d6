"""Shared set-up of the tests."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ndm.data import Digits
from ndm.quality import Classifier, train_classifier

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by commands in the background

TINY: dict[str, Any] = {
    "data": {
        "class_path": "ndm.data.Mixture",
        "init_args": {
            "means": [[-1.0, 0.5], [1.0, -0.5]],
            "stds": [0.3, 0.5],
            "weights": [0.4, 0.6],
            "train_size": 200,
            "test_size": 100,
        },
    },
    "model": {
        "schedule": {
            "class_path": "ndm.LinearLogSNRSchedule",
            "init_args": {"gamma_0": -6.0, "gamma_1": 4.0},
        },
        "transform": {
            "class_path": "ndm.NetworkTransform",
            "init_args": {
                "network": {
                    "class_path": "ndm.nn.MLP",
                    "init_args": {"dims": 2, "hidden": 16, "blocks": 1, "max_frequency": 2.0},
                }
            },
        },
        "predictor": {
            "class_path": "ndm.Predictor",
            "init_args": {
                "network": {
                    "class_path": "ndm.nn.MLP",
                    "init_args": {"dims": 2, "hidden": 32, "blocks": 1},
                }
            },
        },
        "decoder": {"class_path": "ndm.GaussianDecoder"},
        "time_sampler": {"class_path": "ndm.ImportanceTimeSampler", "init_args": {"bins": 4}},
    },
    "train": {
        "steps": 24,
        "batch_size": 16,
        "warmup": 4,
        "accelerator": "cpu",
        "devices": 1,
        "checkpoint_every": 8,
        "log_every": 4,
        "evaluation_draws": 2,
        "sample_steps": 4,
    },
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    """The digits of scikit-learn."""
    return Digits()


@pytest.fixture(scope="module")
def classifier(digits: Digits) -> Classifier:
    """A small classifier of the digits."""
    return train_classifier(digits, seed=0, steps=150)


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Write the configuration of a tiny run, with changed sections, and return its path."""

    def write(name: str = "config.yaml", **sections: Any) -> Path:
        config = {key: {**value, **sections.pop(key, {})} for key, value in TINY.items()}
        path = tmp_path / name
        path.write_text(yaml.safe_dump({**config, **sections}))
        return path

    return write
