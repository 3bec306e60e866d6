r"""A residual perceptron for vectors ``(B, D)``; events of other shapes are flattened.

.. math::
    h_0 = W [x, \text{features}(x)], \qquad
    h_{l+1} = h_l + W_2\, \mathrm{SiLU}\bigl(W_1\, [\mathrm{norm}(h_l)(1 + a(t)) + b(t)]\bigr),
    \qquad f(x, t) = W_{\text{out}}\, \mathrm{norm}(h_L)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ndm.errors import UserError
from ndm.nn.embed import FourierFeatures, TimeEmbedding
from ndm.nn.layers import (
    LayerNorm,
    check_conditions,
    check_dropout,
    check_given,
    check_outputs,
    zeroed,
)
from ndm.parts import Part


class _Block(nn.Module):
    def __init__(self, hidden: int, embedding: int, dropout: float):
        super().__init__()
        self.norm = LayerNorm(hidden, elementwise_affine=False)
        self.modulation = nn.Linear(embedding, 2 * hidden)
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.modulation(time).chunk(2, dim=1)
        inner = nnf.silu(self.inner(self.norm(h) * (1 + scale) + shift))
        return h + self.outer(self.dropout(inner))


class MLP(Part):
    """A residual perceptron f(x, t) for vectors; events of other shapes are flattened.

    Args:
        dims: number of dimensions D of an event.
        hidden: width of the hidden layers.
        blocks: number of residual blocks.
        fourier: exponents n of the extra inputs sin(2^n pi x) and cos(2^n pi x).
        max_frequency: fastest frequency of the time embedding, in half-turns per unit of time.
        dropout: dropout probability inside the blocks.
        outputs: K outputs in the shape of x, ``(B, K, *event)``, for
            :class:`ndm.SeparableTransform`; None for one output without that axis.
        classes: number of classes, to take an :class:`ndm.ClassCondition`; 0 for none.
        condition_dims: length of the vector, to take an :class:`ndm.VectorCondition`; 0 for none.
        masked: take an :class:`ndm.MaskCondition`.
    """

    def __init__(
        self,
        dims: int,
        hidden: int = 128,
        blocks: int = 3,
        fourier: Sequence[int] = (),
        max_frequency: float = 32.0,
        dropout: float = 0.0,
        outputs: int | None = None,
        classes: int = 0,
        condition_dims: int = 0,
        masked: bool = False,
    ):
        super().__init__()
        check_outputs(outputs)
        self.conditional = check_conditions(
            classes=classes, condition_dims=condition_dims, masked=int(masked)
        )
        self.masked = masked
        if dims < 1 or hidden < 1 or blocks < 0:
            raise UserError(
                f"dims={dims}, hidden={hidden}, blocks={blocks}: need dims >= 1, hidden >= 1 and"
                " blocks >= 0"
            )
        self.dims, self.hidden, self.blocks, self.outputs = dims, hidden, blocks, outputs
        self.fourier, self.max_frequency = list(fourier), max_frequency
        self.classes, self.condition_dims = classes, condition_dims
        self.dropout = check_dropout(dropout)
        self.features = FourierFeatures(fourier)
        self.time = TimeEmbedding(hidden, max_frequency=max_frequency, classes=classes)
        known = condition_dims + 1 if condition_dims else 2 * dims if masked else 0
        self.first = nn.Linear(dims * self.features.multiple() + known, hidden)
        self.layers = nn.ModuleList(_Block(hidden, hidden, dropout) for _ in range(blocks))
        self.norm = LayerNorm(hidden)
        self.last = nn.Linear(hidden, dims * (outputs or 1))

    def zero_output(self) -> None:
        """Set the last layer to zero, so that the network starts at f = 0."""
        zeroed(self.last)

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
        """Map ``(B, *event)``, with D numbers per event, and times ``(B,)`` to ``(B, *event)``.

        The condition ``c`` is that of :mod:`ndm.condition`; vectors join the inputs.
        """
        check_given(self, self.conditional, c)
        flat = x.flatten(1)
        if flat.shape[1] != self.dims:
            raise UserError(
                f"the MLP takes events of {self.dims} dimensions, got a batch of shape"
                f" {tuple(x.shape)}; set dims to fit the data"
            )
        time = self.time(t, c if self.classes else None)
        inputs = self.features(flat)
        if c is not None and not self.classes:
            inputs = torch.cat([inputs, c.flatten(1)], 1)
        h = self.first(inputs)
        for block in self.layers:
            h = block(h, time)
        out = self.last(self.norm(h))
        if self.outputs is None:
            return out.reshape(x.shape)
        return out.reshape(x.shape[0], self.outputs, *x.shape[1:])
