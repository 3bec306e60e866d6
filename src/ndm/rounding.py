r"""Rounding a prediction to the grid of the data, as softly as the noise asks for.

Data on a grid of L values in [-1, 1] have a finest digit that a network hardly learns to round to: where noise is low, x̂ = z/alpha is a good
answer, and a rounded one is much better. A reading m is rounded at the width s that the noise leaves,

.. math::
    \hat x_i = \sum_k v_k\, \operatorname{softmax}_k\Bigl(-\frac{(m_i - v_k)^2}{2 s^2} + \bigl(1 - \tfrac{s^2}{\Delta^2}\bigr) \log W_{ik}\Bigr), \qquad
    s = \frac{\sigma}{\alpha} < \Delta, \qquad v_k = \frac{2k + 1}{L} - 1, \qquad \Delta = \frac{2}{L},

with weights W of the values; once s reaches the spacing, x̂ is m itself (which the formula tends to, to 1e-7 of the spacing). By default W are
learned weights w of the values alone, at first equal: for m = z/alpha and small s, x̂ is the posterior mean of a number whose values have the
frequencies w. The grid goes on a little beyond [-1, 1]: that no data lie there is learned.

Values repeat within an example more often than by chance: images have flat parts, straight edges and few colours. With ``repeats``,

.. math::
    W_{ik} = w_k + c \sum_{j \ne i} r_{jk} + \sum_{o} c_o\, r_{i + o, k}, \qquad
    r_{jk} = \operatorname{softmax}_k\Bigl(-\frac{(z_j/\alpha - v_k)^2}{2 s^2}\Bigr):

what the rest of the example is likely to hold counts, all channels together, as in a Pólya urn, and in images ``(B, C, H, W)`` what the twelve
nearest pixels of the channel hold counts for itself. r is what the latent alone says, taken for one of x: where noise is low, F(x, t) has to be close
to x, as it is with the log-SNR gated and the time-separable form. All weights c are learned.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ndm.errors import UserError
from ndm.nesting import NOTHING, nesting
from ndm.ops import NEAREST, at_offsets, event_size, expand
from ndm.schedule import NoiseLevel


class Rounding(nn.Module):
    """x̂ from a reading m of it, for data on the grid.

    Args:
        levels: L, at least 2.
        repeats: whether values that the example holds elsewhere count for more.
    """

    def __init__(self, levels: int, repeats: bool = False):
        super().__init__()
        if levels < 2:
            raise UserError(f"levels={levels}: give the number of values of the data, at least 2, or leave it out")
        self.levels, self.repeats = levels, repeats
        self.weights = nn.Parameter(torch.zeros(levels + 2 * _REACH))
        self.copies = nn.Parameter(torch.zeros(1 + len(NEAREST))) if repeats else None

    def forward(self, m: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """Round.

        Args:
            m: the reading, ``(B, *event)``.
            z: the latents, ``(B, *event)``.
            level: their noise.

        Returns:
            x̂, ``(B, *event)``, in the dtype of m; half precision is rounded in float32.
        """
        full = torch.promote_types(m.dtype, torch.float32)
        nothing = level.alpha == 0
        signal = torch.where(nothing, 1, level.alpha).to(full)
        width = torch.where(nothing, torch.inf, level.sigma.to(full) / signal) * (0.5 * self.levels)  # in spacings
        width, narrow = width.clamp(_NARROWEST, 1.0), width < 1
        u = z.to(full) / expand(signal, z)
        if nesting() != NOTHING:  # no picking of rows there
            return torch.where(expand(narrow, m), self._round(m.to(full), u, expand(width, m)).to(m.dtype), m)
        rows = narrow.nonzero()[:, 0]
        if not len(rows):
            every_weight = torch.stack([parameter.sum() for parameter in self.parameters()]).sum()  # takes part in every step
            return m + 0 * every_weight.to(m.dtype)
        parts = rows.split(max(1, _MOST // max(1, event_size(m))))
        rounded = torch.cat([self._part(m[part].to(full), u[part], expand(width[part], m), len(parts) > 1) for part in parts])
        return m.index_copy(0, rows, rounded.to(m.dtype))

    def _part(self, m: Tensor, u: Tensor, width: Tensor, many: bool) -> Tensor:
        """Some rows; where they are many, nothing is kept for the backward pass but these inputs."""
        if many and torch.is_grad_enabled():
            return checkpoint(self._round, m, u, width, use_reentrant=False, preserve_rng_state=False)
        return self._round(m, u, width)

    def _round(self, m: Tensor, u: Tensor, width: Tensor) -> Tensor:
        position, width = self._position(m), width[..., None]
        nearest, values = _around(position)
        log_weights = (_UNIT * self.weights.to(m.dtype))[self._index(values)]
        if self.copies is not None:
            # A value that is all but ruled out keeps more weight than rounding errors of the counts have.
            log_weights = torch.log(log_weights.clamp(*_RANGE).exp() + self._elsewhere(self.copies, self._position(u), width, values))
        logits = _log_density(position, values, width) + (1 - width**2) * log_weights
        mean = nearest + (torch.softmax(logits, dim=-1) * _near(m)).sum(-1)
        return (mean + 0.5) * (2 / self.levels) - 1

    def _elsewhere(self, copies: Tensor, position: Tensor, width: Tensor, values: Tensor) -> Tensor:
        """What the other places of an example add to the weights of ``values`` ``(B, *event, n)``."""
        _, places = _around(position)
        log_total = torch.logsumexp(_log_density(position, places, width), dim=-1)

        def likely(values: Tensor, at: Tensor, log_total: Tensor) -> Tensor:
            """r of ``values`` for what lies at the position ``at``."""
            return torch.exp(_log_density(at, values, width) - log_total[..., None])

        held = likely(places, position, log_total) * self._inside(places)
        counts = torch.zeros(len(position), len(self.weights), dtype=position.dtype, device=position.device)
        counts = counts.scatter_add(1, self._index(places).flatten(1), held.flatten(1))
        c = torch.exp(_UNIT * copies.to(position.dtype))
        counted = counts.gather(1, self._index(values).flatten(1)).view_as(values)
        others = ((counted - likely(values, position, log_total)) * self._inside(values)).clamp(min=0)
        added = _START * c[0] * others
        if position.dim() == 4:
            nearby = (at_offsets(x, NEAREST, beyond) for x, beyond in ((position, _NOWHERE), (log_total, 0.0)))
            for strength, at, total in zip(c[1:], *nearby, strict=True):
                added = added + strength * likely(values, at, total)
        return added

    def _position(self, x: Tensor) -> Tensor:
        """In units of the spacing: values lie at whole numbers k."""
        return (x + 1) * (0.5 * self.levels) - 0.5

    def _index(self, k: Tensor) -> Tensor:
        """Where the weight of a value is; values beyond have that of the last. NaN is somewhere: what comes of it is NaN."""
        return (k + _REACH).nan_to_num(0.0).clamp(0, len(self.weights) - 1).long()

    def _inside(self, k: Tensor) -> Tensor:
        """Whether a value has a weight, and a count, of its own."""
        return (k >= -_REACH) & (k < self.levels + _REACH)


def _near(like: Tensor) -> Tensor:
    return torch.arange(-_REACH, _REACH + 1, dtype=like.dtype, device=like.device)


def _around(position: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest value of each position, and the values around it, along a last axis of their own."""
    nearest = position.detach().round()
    return nearest, nearest[..., None] + _near(position)


def _log_density(position: Tensor, values: Tensor, width: Tensor) -> Tensor:
    """log N(position; values, width²) up to a constant, ``(B, *event, n)``."""
    return -0.5 * ((position[..., None] - values) / width) ** 2


_REACH = 5  # values to either side of the nearest that are looked at
_UNIT = 5.0  # of the learned log-weights, nats: optimisers step alike in all parameters, and weights range over many powers of ten
_START = 0.02  # what one other place that holds a value counts for at first, where the value alone and each nearest pixel count for 1
_RANGE = (-12.0, 60.0)  # of log w where values may repeat
_MOST = 2**18  # places at once: each takes up to two kilobytes
_NARROWEST = 1e-4  # width in spacings, where the noise is 0
_NOWHERE = -1e4  # far from all values, in spacings
