"""Networks for x̂(z, t) and f(x, t), and, without time, for encoders and decoders.

Any other ``nn.Module`` with the same call works as well.
"""

from ndm.nn.adapter import FromDiffusers
from ndm.nn.autoencoder import ConvDecoder, ConvEncoder, Dense
from ndm.nn.dit import DiT
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.layers import Attention
from ndm.nn.mlp import MLP
from ndm.nn.unet import UNet

__all__ = [
    "MLP",
    "Attention",
    "ConvDecoder",
    "ConvEncoder",
    "Dense",
    "DiT",
    "FourierFeatures",
    "FromDiffusers",
    "TimeEmbedding",
    "UNet",
]
