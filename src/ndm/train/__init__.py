"""Training runs on Lightning (extra ``train``)."""

from ndm.train.settings import TrainSettings

__all__ = ["TrainSettings"]
