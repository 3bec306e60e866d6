"""Variants beyond NDM: Neural Flow Diffusion Models and optimal-transport reverse processes."""

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
