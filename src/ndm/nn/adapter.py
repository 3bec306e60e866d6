"""Adapters for networks of other libraries."""

from torch import Tensor, nn

from ndm.parts import Part


class FromDiffusers(Part):
    """A model of the diffusers library, such as ``UNet2DModel``, as a network ``f(x, t)``.

    Args:
        model: called as ``model(x, timestep)``; returns an object with the tensor ``sample``.
        time_scale: the time step at t = 1; the embeddings of diffusers expect steps up to 1,000.
    """

    def __init__(self, model: nn.Module, time_scale: float = 1000.0):
        super().__init__()
        self.model, self.time_scale = model, time_scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map ``(B, *event)`` and times ``(B,)`` to ``(B, *event)``."""
        return self.model(x, t * self.time_scale).sample
