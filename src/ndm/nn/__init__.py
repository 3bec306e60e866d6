"""Networks for x̂(z, t) and for f(x, t); any other ``nn.Module`` called as ``network(x, t)`` serves as well."""

from ndm.nn.adapter import FromDiffusers
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.layers import Attention
from ndm.nn.mlp import MLP
from ndm.nn.unet import UNet

__all__ = ["MLP", "Attention", "FourierFeatures", "FromDiffusers", "TimeEmbedding", "UNet"]
