r"""Data sets as float32 tensors x, discrete ones on the grid of the decoder and continuous ones
standardized: x = (v - b)/a.

==============================================================  =================================================================
source                                                          data
==============================================================  =================================================================
:class:`Mixture`, :class:`Checkerboard`, :class:`TwoMoons`,     samples of known densities
:class:`Pinwheel`
:class:`Digits`                                                 handwritten digits of scikit-learn, 8 x 8, 17 values
:class:`MNIST`                                                  IDX files of MNIST and its relatives, 256 values
:class:`CIFAR10`                                                binary version of CIFAR-10, 256 values
:class:`ImageNetOord`, :class:`ImageNetChrabaszcz`              ImageNet at 32 x 32 and 64 x 64, its two releases, 256 values
:class:`CelebAHQ`                                               faces in a folder of image files, 256 values
:class:`ImageFolder`                                            image files, with or without subfolders of classes, 256 values
:class:`Table`                                                  ``.npy``, ``.npz``, ``.csv`` and ``.parquet`` files
:class:`HuggingFace`                                            data sets of the hub: images, or columns of numbers
==============================================================  =================================================================

Each is a :class:`DataSource`: ``describe()`` says what the data are, ``split("train")`` gives the
examples.
"""

from ndm.data.celeba import CelebAHQ
from ndm.data.cifar import CIFAR10
from ndm.data.digits import Digits
from ndm.data.folder import ImageFolder
from ndm.data.huggingface import HuggingFace
from ndm.data.imagenet import ImageNetChrabaszcz, ImageNetOord
from ndm.data.mnist import MNIST
from ndm.data.source import DataDescription, DataSource, EventDataset, Loaded, keep_batch, spread
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
    "keep_batch",
    "spread",
]
