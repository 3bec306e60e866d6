r"""Data sets as float32 tensors x.

Discrete values lie on the decoder's grid; continuous values are standardized, x = (v - b)/a.

============================  ===================================================================
source                        data
============================  ===================================================================
:class:`Mixture`              mixture of Gaussians in any dimension, with known density
:class:`Checkerboard`         uniform on eight cells of a board in the plane, with known density
:class:`TwoMoons`             two blurred half circles in the plane, with known density
:class:`Pinwheel`             twisted arms in the plane, with known density
:class:`Digits`               handwritten digits of scikit-learn, 8 x 8, 17 values
:class:`MNIST`                IDX files of MNIST and its relatives, 256 values
:class:`CIFAR10`              binary version of CIFAR-10, 256 values
:class:`ImageNetOord`         ImageNet at 32 x 32 or 64 x 64, release of van den Oord, 256 values
:class:`ImageNetChrabaszcz`   ImageNet at 32 x 32 or 64 x 64, release of Chrabaszcz, 256 values
:class:`CelebAHQ`             faces in a folder of image files, 256 values
:class:`ImageFolder`          image files, with or without subfolders of classes, 256 values
:class:`Table`                ``.npy``, ``.npz``, ``.csv`` and ``.parquet`` files
:class:`HuggingFace`          data sets of the hub: images, or columns of numbers
============================  ===================================================================

Each is a :class:`DataSource`: ``describe()`` returns a description of the data, ``split("train")``
the examples.
"""

from ndm.data.arrays import continuous, discrete
from ndm.data.celeba import CelebAHQ
from ndm.data.cifar import CIFAR10
from ndm.data.conditioned import WithoutConditions
from ndm.data.digits import Digits
from ndm.data.folder import ImageFolder
from ndm.data.huggingface import HuggingFace
from ndm.data.imagenet import ImageNetChrabaszcz, ImageNetOord
from ndm.data.mnist import MNIST
from ndm.data.source import (
    DataDescription,
    DataSource,
    EventDataset,
    Loaded,
    identity_collate,
    spread,
)
from ndm.data.table import Table
from ndm.data.toy import Checkerboard, Mixture, Pinwheel, ToySource, TwoMoons

__all__ = [
    "CIFAR10",
    "MNIST",
    "CelebAHQ",
    "Checkerboard",
    "DataDescription",
    "DataSource",
    "Digits",
    "EventDataset",
    "HuggingFace",
    "ImageFolder",
    "ImageNetChrabaszcz",
    "ImageNetOord",
    "Loaded",
    "Mixture",
    "Pinwheel",
    "Table",
    "ToySource",
    "TwoMoons",
    "WithoutConditions",
    "continuous",
    "discrete",
    "identity_collate",
    "spread",
]
