"""Neural Diffusion Models: diffusion models that learn their forward process (Bartosh, Vetrov, Naesseth, ICML 2024)."""

from importlib.metadata import PackageNotFoundError, version

from ndm import nn
from ndm.categorical import CategoricalPredictor
from ndm.decoder import DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.elbo import Bound, bits_per_dim
from ndm.errors import UserError
from ndm.model import NDM
from ndm.nfdm import NFDM, NetworkScale
from ndm.operators import Blur, Downsample, FadingMask
from ndm.predictor import Predictor
from ndm.schedule import Cosine, DDPMLinear, FlowMatching, LearnedSchedule, LinearLogSNR
from ndm.times import ImportanceTimes, LowDiscrepancyTimes, UniformTimes
from ndm.transform import Encoder, GatedTransform, Identity, NetworkTransform, SeparableTransform

try:
    __version__ = version("ndm")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "NDM",
    "NFDM",
    "Blur",
    "Bound",
    "CategoricalPredictor",
    "Cosine",
    "DDPMLinear",
    "DiscretizedGaussian",
    "Downsample",
    "Encoder",
    "FadingMask",
    "FlowMatching",
    "GatedTransform",
    "GaussianDecoder",
    "Identity",
    "ImportanceTimes",
    "LearnedSchedule",
    "LinearLogSNR",
    "LowDiscrepancyTimes",
    "NetworkDecoder",
    "NetworkScale",
    "NetworkTransform",
    "Predictor",
    "SeparableTransform",
    "UniformTimes",
    "UserError",
    "__version__",
    "bits_per_dim",
    "nn",
]
