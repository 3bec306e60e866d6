r"""The T-step model in whole numbers, so that two computers agree on every distribution to the last
bit.

Latents live on grids, :math:`z_i = n_i \delta_i` with whole :math:`n_i`, whose width follows the
scale of the step that makes them,

.. math::
    \delta_{i-1} = w \sqrt{v_i}, \qquad \delta_T = w \sigma_1 .

In units of that grid the forward posterior and the reverse step are Gaussians, integrated over the
cells of the grid,

.. math::
    q(n_{i-1} | n_i, x) &= N\bigl(\tfrac{1}{32} a_i(x) + g_i n_i,\; 1/w\bigr), \qquad
    p(n_{i-1} | n_i) = N\bigl(\tfrac{1}{32} a_i(\hat x(z_i)) + g_i n_i,\; \sqrt{r_i}/w\bigr), \\
    a_i(x) &= \mathrm{round}\, \tfrac{32}{\delta_{i-1}} \bigl(\alpha_s F(x, s) - k \alpha_t F(x, t)\bigr), \qquad
    g_i = k \delta_i / \delta_{i-1} .

Only a_i comes out of a network. Everything after it is sums and products of doubles by NumPy, which
every machine rounds alike, of numbers that stand in the archive (g_i, r_i, w). And a_i is a whole
number: networks run in double precision, where different machines, thread counts and batch sizes
differ by about 1e-13, so that their roundings differ only where a value lies within 1e-7 of the
boundary between two whole numbers. The encoder writes down which way it went at each such place
(:class:`Rounding`), and the decoder follows.

The decoder p(x|z_0) is a softmax of :math:`-d^2/2`; its exponents are rounded to sixteenths and
looked up in a table of whole numbers.
"""

import copy
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndm.decoder import DiscretizedGaussian
from ndm.errors import UserError
from ndm.forward import posterior_coefficients
from ndm.model import DiffusionModel
from ndm.reverse import require_markov
from ndm.schedule import NoiseLevel
from ndm.transform import Curve

FINE = 32
"""a_i counts in 32nds of a cell."""
MARGIN = 2e-7
"""How near to a boundary, in units of a_i, a value is written down; numerical noise must stay below
half of it.
"""
_TABLE = np.round(np.exp(-np.arange(16 * 21) / 16) * 2**30) / 2**30


@dataclass(frozen=True)
class Plan:
    """All numbers besides the weights on which encoder and decoder must agree; they stand in the
    archive in single precision.
    """

    steps: int
    """T."""
    batch: int
    """Images that are coded side by side: the initial bits are paid for so many."""
    width: float
    """w: width of a cell of the grid, in standard deviations of the step."""
    delta: tuple[float, ...]
    """Width of the cells of z_0, z_1/T, ... z_1; T + 1 numbers."""
    gain: tuple[float, ...]
    """g_i of the T steps."""
    spread: tuple[float, ...]
    """Standard deviation of p in cells, sqrt(r_i)/w, of the T steps."""
    alpha_0: float
    """Signal at t = 0."""
    sharpness: float
    """alpha_0/sigma_0: inverse standard deviation of the decoder."""

    def __post_init__(self) -> None:
        """Check every number: they may come from a damaged file.

        Raises:
            ValueError: a number is out of range.
        """
        whole = all(
            isinstance(value, int) and not isinstance(value, bool)
            for value in (self.steps, self.batch)
        )
        if not whole or not 1 <= self.steps <= 10_000 or not 1 <= self.batch <= 4096:
            raise ValueError("steps or batch out of range")
        if [len(values) for values in (self.delta, self.gain, self.spread)] != [
            self.steps + 1,
            self.steps,
            self.steps,
        ]:
            raise ValueError("a list has the wrong length")
        ranges = {
            "width": ((self.width,), 1 / 64, 4.0),
            "delta": (self.delta, 1e-9, 1e3),
            "gain": (self.gain, 0.0, 1e6),
            "spread": (self.spread, 1e-3, 1e6),
            "alpha_0": ((self.alpha_0,), 1e-6, 1e3),
            "sharpness": ((self.sharpness,), 1e-6, 1e9),
        }
        for name, (values, least, most) in ranges.items():
            if not all(least <= value <= most for value in values):
                raise ValueError(f"{name} is out of range")

    def pack(self) -> bytes:
        """The plan in ``12 T + 24`` bytes, little-endian: T and B as whole numbers, all else as
        single-precision floats.
        """
        numbers = [self.width, self.alpha_0, self.sharpness, *self.delta, *self.gain, *self.spread]
        return struct.pack("<II", self.steps, self.batch) + np.array(numbers, dtype="<f4").tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> "Plan":
        """The plan that :meth:`pack` wrote.

        Raises:
            ValueError: it is not one.
        """
        if len(data) < 8:
            raise ValueError("it holds no plan")
        steps, batch = struct.unpack_from("<II", data)
        if len(data) != 12 * steps + 24:
            raise ValueError("its plan has the wrong size")
        numbers = tuple(np.frombuffer(data, dtype="<f4", offset=8).astype(np.float64).tolist())
        lists = (
            numbers[3 : steps + 4],
            numbers[steps + 4 : 2 * steps + 4],
            numbers[2 * steps + 4 :],
        )
        return cls(steps, batch, numbers[0], *lists, alpha_0=numbers[1], sharpness=numbers[2])


def make_plan(
    model: DiffusionModel,
    steps: int,
    batch: int,
    variance_ratio: Tensor | None = None,
    width: float = 0.5,
) -> Plan:
    """The plan of a model.

    Args:
        model: the model.
        steps: T.
        batch: images that are coded side by side.
        variance_ratio: r of each of n equal parts of [0, 1]
            (:func:`ndm.evaluation.calibrate.best_variance_ratio`); 1 by default.
        width: w.

    Raises:
        UserError: the model is one in continuous time only.
    """
    require_markov(model.reverse_process, "lossless compression")
    schedule = copy.deepcopy(model.schedule).double().cpu()
    with torch.no_grad():
        level = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps)
        s, t = _part(level, slice(None, -1)), _part(level, slice(1, None))
        step = posterior_coefficients(s, t, model.eta)
    delta = width * torch.cat([step.variance.sqrt(), level.sigma[-1:]])
    ratio = torch.ones(1) if variance_ratio is None else variance_ratio.cpu()
    middle = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    chosen = ratio.double()[(middle * len(ratio)).long()]
    try:
        return Plan(
            steps=steps,
            batch=batch,
            width=_single(width),
            delta=tuple(map(_single, delta.tolist())),
            gain=tuple(map(_single, (step.k * delta[1:] / delta[:-1]).tolist())),
            spread=tuple(map(_single, (chosen.sqrt() / width).tolist())),
            alpha_0=_single(float(level.alpha[0])),
            sharpness=_single(float(level.alpha[0] / level.sigma[0])),
        )
    except ValueError as error:
        raise UserError(
            f"the model cannot code with steps={steps} ({error}); take other steps, or a schedule"
            " with a larger gamma_0"
        ) from error


def _single(value: float) -> float:
    """The nearest single-precision number: half the size in the archive, and any agreed number will
    do.
    """
    return float(np.float32(value))


def _part(level: NoiseLevel, part: slice) -> NoiseLevel:
    return NoiseLevel(**{name: value[part] for name, value in vars(level).items()})


class Rounding:
    """Rounds to whole numbers, and writes down or follows the way it went near a boundary.

    Args:
        exceptions: what an encoder wrote down, ``(n, 2)`` of call and place; None to write.
    """

    def __init__(self, exceptions: np.ndarray | None = None):
        self.writing = exceptions is None
        self._written: list[np.ndarray] = []
        self._known: dict[int, np.ndarray] = {}
        if exceptions is not None and len(exceptions):
            ordered = exceptions[np.argsort(exceptions[:, 0], kind="stable")]
            calls, starts = np.unique(ordered[:, 0], return_index=True)
            self._known = dict(
                zip(calls.tolist(), np.split(ordered[:, 1], starts[1:]), strict=True)
            )

    def __call__(self, values: np.ndarray, call: int) -> np.ndarray:
        """Whole numbers, float64, for values ``(n,)`` of the call of this number.

        Raises:
            UserError: a value is not finite.
            ValueError: the exceptions do not fit.
        """
        if not np.isfinite(values).all():
            raise UserError("the model's output is not finite on these data; it cannot code them")
        floor = np.floor(values)
        up = values - floor >= 0.5
        if self.writing:
            near = np.flatnonzero(np.abs(values - floor - 0.5) < MARGIN)
            if len(near):
                self._written.append(
                    np.stack([np.full(len(near), call), 2 * near + up[near]], axis=1)
                )
        elif call in self._known:
            place, way = self._known[call] // 2, self._known[call] % 2
            if place.max() >= len(values):
                raise ValueError("an exception lies outside of its call")
            up[place] = way.astype(bool)
        return floor + up

    def exceptions(self) -> np.ndarray:
        """What was written down, ``(n, 2)``, int64."""
        return (
            np.concatenate(self._written).astype(np.int64)
            if self._written
            else np.zeros((0, 2), dtype=np.int64)
        )


class Chain:
    """A model and a plan: means of all distributions, in cells of the grids.

    Args:
        model: the model, with a discrete decoder; a copy in double precision is made.
        plan: the plan.
        event_shape: shape of an image.
        rows: images that a network sees at once; does not change the result.
        device: where the networks run.
    """

    def __init__(
        self,
        model: DiffusionModel,
        plan: Plan,
        event_shape: tuple[int, ...],
        rows: int = 64,
        device: torch.device | None = None,
    ):
        if not isinstance(model.decoder, DiscretizedGaussian):
            raise UserError(
                "the model is one of continuous data or has a decoder network; lossless compression"
                " needs decoder DiscretizedGaussian"
            )
        self.plan, self.event_shape, self.rows = plan, tuple(event_shape), rows
        self.device = device or torch.device("cpu")
        self.model = (
            copy.deepcopy(model)
            .to(device=self.device, dtype=torch.float64)
            .eval()
            .requires_grad_(False)
        )
        self.reverse = require_markov(self.model.reverse_process, "lossless compression")
        self.values = model.decoder.values.numpy()
        self.dims = math.prod(event_shape)
        self.calls = 2 * plan.steps + 1
        """Rounded outputs of networks in a batch."""

    @torch.no_grad()
    def transformed(self, index: np.ndarray) -> list[Tensor]:
        """F(x, t) at t = 0, 1/T, ... 1 for values ``index`` ``(B D,)``."""
        x = torch.from_numpy(self.values[index]).reshape(-1, *self.event_shape).to(self.device)
        parts = [self._along(self.model.transform.curve(part), part) for part in x.split(self.rows)]
        return [torch.cat(of_time) for of_time in zip(*parts, strict=True)]

    def _along(self, curve: Curve, like: Tensor) -> list[Tensor]:
        return [curve.at(self._level(i, like)) for i in range(self.plan.steps + 1)]

    def first(self, transformed: list[Tensor]) -> np.ndarray:
        """Mean of q(z_1|x) in 32nds of a cell, not rounded yet, ``(B D,)``."""
        level = self._level(self.plan.steps, transformed[-1])
        mean = transformed[-1] * level.alpha[0]
        return self._units(mean, self.plan.steps)

    def pull(self, at_s: Tensor, at_t: Tensor, step: int) -> np.ndarray:
        """a_i from F(x, s) and F(x, t), not rounded yet, ``(B D,)``."""
        s, t = self._level(step - 1, at_s[:1]), self._level(step, at_s[:1])
        weight = posterior_coefficients(s, t, self.model.eta).target_weight[0]
        return self._units(weight * at_t + s.alpha[0] * (at_s - at_t), step - 1)

    @torch.no_grad()
    def predicted(self, latent: np.ndarray, step: int) -> np.ndarray:
        """a_i at the prediction x̂(z_i), not rounded yet, from n_i ``(B D,)``."""
        z = (
            torch.from_numpy(latent * self.plan.delta[step])
            .reshape(-1, *self.event_shape)
            .to(self.device)
        )
        parts = []
        for part in z.split(self.rows):
            s, t = self._level(step - 1, part), self._level(step, part)
            at_s, at_t = self.reverse.curve(part, t, self.model.eta).at_both(s, t)
            parts.append(self.pull(at_s, at_t, step))
        return np.concatenate(parts)

    def mean(self, rounded: np.ndarray, latent: np.ndarray, step: int) -> np.ndarray:
        """Mean of n_{i-1} in cells from the rounded a_i and n_i."""
        return rounded / FINE + self.plan.gain[step - 1] * latent

    def probabilities(self, latent: np.ndarray) -> np.ndarray:
        """p(x|z_0) up to a factor, ``(n, L)``, from n_0 ``(n,)``."""
        distance = (
            (latent * self.plan.delta[0] / self.plan.alpha_0)[:, None] - self.values
        ) * self.plan.sharpness
        exponent = 8 * np.square(distance)  # sixteenths of d²/2
        exponent = exponent - exponent.min(axis=1, keepdims=True)
        return _TABLE[np.minimum(np.rint(exponent), len(_TABLE) - 1).astype(np.int64)]

    def _level(self, index: int, like: Tensor) -> NoiseLevel:
        return self.model.process.level(index / self.plan.steps, like)

    def _units(self, mean: Tensor, of: int) -> np.ndarray:
        return (mean * (FINE / self.plan.delta[of])).flatten().cpu().numpy()
