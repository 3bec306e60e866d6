"""Members of the family beyond NDM: Neural Flow Diffusion Models and reverse processes that are
optimal transports.
"""

from ndm.variants.interpolation import InterpolationScale, InterpolationTransform
from ndm.variants.monotone import ConvexMap, MonotoneMap, TransportMap
from ndm.variants.nfdm import NFDM, DiagonalScale, NetworkScale, NoiseScale, SeparableScale
from ndm.variants.transport import TransportNDM

__all__ = [
    "NFDM",
    "ConvexMap",
    "DiagonalScale",
    "InterpolationScale",
    "InterpolationTransform",
    "MonotoneMap",
    "NetworkScale",
    "NoiseScale",
    "SeparableScale",
    "TransportMap",
    "TransportNDM",
]
