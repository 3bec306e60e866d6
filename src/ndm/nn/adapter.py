"""Adapters for networks of other libraries."""

from typing import Literal

from torch import Tensor, nn

from ndm.errors import check_choice
from ndm.nn.layers import check_given
from ndm.parts import Part


class FromDiffusers(Part):
    """A model of the diffusers library, such as ``UNet2DModel``, as a network ``f(x, t)``.

    Args:
        model: called as ``model(x, timestep)``; returns an object with the tensor ``sample``.
        time_scale: the time step at t = 1; the embeddings of diffusers expect steps up to 1,000.
        condition: how the model takes a condition: ``class_labels``, for an
            :class:`ndm.ClassCondition` (it needs one class more than the data have, for the null),
            or ``encoder_hidden_states``, for an :class:`ndm.VectorCondition` as a sequence of one
            vector. None for no condition.
    """

    def __init__(
        self,
        model: nn.Module,
        time_scale: float = 1000.0,
        condition: Literal["class_labels", "encoder_hidden_states"] | None = None,
    ):
        super().__init__()
        if condition is not None:
            check_choice("condition", condition, ("class_labels", "encoder_hidden_states"))
        self.model, self.time_scale, self.condition = model, time_scale, condition

    @property
    def classes(self) -> int:
        """Number of classes that it takes, without the null."""
        if self.condition != "class_labels":
            return 0
        count = getattr(getattr(self.model, "config", None), "num_class_embeds", None)
        if not isinstance(count, int):
            raise AttributeError("the model does not say how many classes it has")
        return count - 1

    @property
    def condition_dims(self) -> int:
        """Length of the vector that it takes, without the number that is 0 for the null."""
        if self.condition != "encoder_hidden_states":
            return 0
        size = getattr(getattr(self.model, "config", None), "cross_attention_dim", None)
        if not isinstance(size, int):
            raise AttributeError("the model does not say how long its vectors are")
        return size - 1

    @property
    def conditional(self) -> bool:
        """Whether the model takes a condition."""
        return self.condition is not None

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, *event)`` and times ``(B,)`` to ``(B, *event)``, for a condition if it has one.

        See :mod:`ndm.condition`.
        """
        check_given(self, self.conditional, c)
        if self.condition is None or c is None:
            return self.model(x, t * self.time_scale).sample
        known = c if self.condition == "class_labels" else c[:, None]
        return self.model(x, t * self.time_scale, **{self.condition: known}).sample
