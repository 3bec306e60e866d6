"""Neural Diffusion Models: diffusion models that learn their forward process (Bartosh, Vetrov,
Naesseth, ICML 2024).
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from ndm import nn
from ndm.condition import ClassCondition, Condition, ImageCondition, MaskCondition, VectorCondition
from ndm.curve import Curve
from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.elbo import Bound, bits_per_dim
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.linear_transform import AffineTransform, Blur, Downsample, FadingMask
from ndm.model import NDM, DiffusionModel
from ndm.ode import OdeSettings
from ndm.predictor import DataPredictor, Predictor
from ndm.reverse import ReverseProcess
from ndm.sample import (
    AdaptiveODE,
    Ancestral,
    Euler,
    GridSampler,
    Heun,
    Sampler,
    TorchSDE,
    make_sampler,
)
from ndm.schedule import (
    CosineSchedule,
    FlowMatchingSchedule,
    LearnedSchedule,
    LinearBetaSchedule,
    LinearLogSNRSchedule,
    NoiseLevel,
    Schedule,
    VariancePreserving,
)
from ndm.time_grid import TimeGrid
from ndm.time_sampling import (
    ImportanceTimeSampler,
    LowDiscrepancyTimeSampler,
    PiecewiseConstant,
    TimeSampler,
    UniformTimeSampler,
)
from ndm.transform import (
    Encoder,
    GatedTransform,
    Identity,
    NetworkTransform,
    SeparableTransform,
    SumTransform,
    Transform,
)
from ndm.value_grid.categorical import CategoricalPredictor
from ndm.value_grid.rounding import RoundingPredictor
from ndm.variants import NFDM, NetworkScale

try:
    __version__ = version("ndm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_SUBMODULES = (
    "apps",
    "compare",
    "data",
    "evaluation",
    "export",
    "quality",
    "reproduce",
    "train",
    "variants",
    "viz",
)


def __getattr__(name: str) -> object:
    """Import a submodule on first use: some need extras or take seconds to import."""
    if name in _SUBMODULES:
        return importlib.import_module(f"ndm.{name}")
    raise AttributeError(f"module 'ndm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})


__all__ = [
    "NDM",
    "NFDM",
    "AdaptiveODE",
    "AffineTransform",
    "Ancestral",
    "Blur",
    "Bound",
    "CategoricalPredictor",
    "ClassCondition",
    "Condition",
    "CosineSchedule",
    "Curve",
    "DataPredictor",
    "Decoder",
    "DiffusionModel",
    "DiscretizedGaussian",
    "Downsample",
    "Encoder",
    "Euler",
    "FadingMask",
    "FlowMatchingSchedule",
    "ForwardProcess",
    "GatedTransform",
    "GaussianDecoder",
    "GridSampler",
    "Heun",
    "Identity",
    "ImageCondition",
    "ImportanceTimeSampler",
    "LearnedSchedule",
    "LinearBetaSchedule",
    "LinearLogSNRSchedule",
    "LowDiscrepancyTimeSampler",
    "MaskCondition",
    "NetworkDecoder",
    "NetworkScale",
    "NetworkTransform",
    "NoiseLevel",
    "OdeSettings",
    "PiecewiseConstant",
    "Predictor",
    "ReverseProcess",
    "RoundingPredictor",
    "Sampler",
    "Schedule",
    "SeparableTransform",
    "SumTransform",
    "TimeGrid",
    "TimeSampler",
    "TorchSDE",
    "Transform",
    "UniformTimeSampler",
    "UserError",
    "VariancePreserving",
    "VectorCondition",
    "__version__",
    "bits_per_dim",
    "make_sampler",
    "nn",
]
