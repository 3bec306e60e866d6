r"""The T-step model in integers, so that two computers get bit-identical distributions.

Latents lie on grids, :math:`z_i = n_i \delta_i` with integer :math:`n_i`. The width of a cell
follows the scale of the step that generates the latent,

.. math::
    \delta_{i-1} = w \sqrt{v_i}, \qquad \delta_T = w \sigma_1 .

In cells, the forward posterior and the reverse step are Gaussians, integrated over each cell,

.. math::
    q(n_{i-1} | n_i, x) &= N\bigl(\tfrac{1}{32} a_i(x) + g_i n_i,\; 1/w\bigr), \qquad
    p(n_{i-1} | n_i) = N\bigl(\tfrac{1}{32} a_i(\hat x(z_i)) + g_i n_i,\; \sqrt{r_i}/w\bigr), \\
    a_i(x) &= \mathrm{round}\, \tfrac{32}{\delta_{i-1}}
    \bigl(\alpha_s F(x, s) - k \alpha_t F(x, t)\bigr), \qquad
    g_i = k \delta_i / \delta_{i-1} .

Only a_i depends on a network, and r_i if the model has learned it: then it is the r_i of the
archive times :math:`2^{e_i/32}`, with an integer e_i of each dimension. The rest is sums and
products of doubles in NumPy, which every machine rounds identically, with numbers stored in the
archive (g_i, r_i, w). Networks run in double precision, where machines, thread counts and batch
sizes differ by about 1e-13, so a_i and e_i can only differ if a value lies within 1e-7 of the
boundary between two integers. The encoder records how it rounded each such value
(:class:`Rounding`), and the decoder does the same.

The decoder p(x|z_0) is a softmax of :math:`-d^2/2`; its exponents are rounded to sixteenths and
looked up in a table of integers.
"""

import copy
import itertools
import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ndm.curve import Curve
from ndm.decoder import DiscretizedGaussian
from ndm.discrete_time import learned_excess
from ndm.errors import UserError
from ndm.forward import posterior_coefficients
from ndm.model import DiffusionModel
from ndm.reverse import require_markov
from ndm.schedule import NoiseLevel
from ndm.time_grid import Steps, as_grid
from ndm.time_sampling import PiecewiseConstant

FINE = 32
"""a_i is in units of 1/32 of a cell."""
MARGIN = 2e-7
"""Distance from a boundary, in units of a_i or e_i, within which a rounding is recorded.

Numerical noise must stay below half of it.
"""
_TABLE = np.round(np.exp(-np.arange(16 * 21) / 16) * 2**30) / 2**30
_OCTAVE = 32
"""The learned reverse variance is rounded to powers of 2^(1/32)."""
_ROOTS = np.round(np.exp2(np.arange(2 * _OCTAVE) / (2 * _OCTAVE)) * 2**40) / 2**40
_LARGEST = 20  # largest learned r, as a power of two
_PARTS = 2**16  # times are multiples of 1/65536


@dataclass(frozen=True)
class Plan:
    """All numbers, apart from the weights, on which encoder and decoder must agree.

    The archive stores the times in 65536ths, spreads in half and all other numbers in single
    precision.
    """

    times: tuple[float, ...]
    """The T + 1 times of the steps, from 0 to 1, multiples of 2^-16."""
    batch: int
    """Number of images coded in parallel; the initial bits are proportional to it."""
    width: float
    """w: width of a cell of the grid, in standard deviations of the step."""
    delta: tuple[float, ...]
    """Width of the cells of the latents at the T + 1 times."""
    gain: tuple[float, ...]
    """g_i of the T steps."""
    spread: tuple[float, ...]
    """Standard deviation of p in cells, sqrt(r_i)/w, of the T steps."""
    alpha_0: float
    """Signal at t = 0."""
    sharpness: float
    """alpha_0/sigma_0: inverse standard deviation of the decoder."""

    @property
    def steps(self) -> int:
        """T."""
        return len(self.times) - 1

    def __post_init__(self) -> None:
        """Check every number, because the plan may come from a damaged file.

        Raises:
            ValueError: a number is out of range.
        """
        whole = isinstance(self.batch, int) and not isinstance(self.batch, bool)
        if not whole or not 1 <= self.steps <= 10_000 or not 1 <= self.batch <= 4096:
            raise ValueError("steps or batch out of range")
        ends = self.times[0] == 0 and self.times[-1] == 1
        if not ends or not all(s < t for s, t in itertools.pairwise(self.times)):
            raise ValueError("times do not increase from 0 to 1")
        lengths = [len(values) for values in (self.delta, self.gain, self.spread)]
        if lengths != [self.steps + 1, self.steps, self.steps]:
            raise ValueError("a list has the wrong length")
        ranges = {
            "width": ((self.width,), 1 / 64, 4.0),
            "delta": (self.delta, 1e-9, 1e3),
            "gain": (self.gain, 0.0, 1e6),
            "spread": (self.spread, 1e-3, 6e4),
            "alpha_0": ((self.alpha_0,), 1e-6, 1e3),
            "sharpness": ((self.sharpness,), 1e-6, 1e9),
        }
        for name, (values, least, most) in ranges.items():
            if not all(least <= value <= most for value in values):
                raise ValueError(f"{name} is out of range")

    def pack(self) -> bytes:
        """Return the plan, little-endian: T and B in 4 bytes, the times between 0 and 1 as
        2-byte numerators, floats of 4 bytes, and the spreads as floats of 2 bytes.
        """
        numbers = [self.width, self.alpha_0, self.sharpness, *self.delta, *self.gain]
        return b"".join(
            [
                struct.pack("<II", self.steps, self.batch),
                np.rint(np.array(self.times[1:-1]) * _PARTS).astype("<u2").tobytes(),
                np.array(numbers, dtype="<f4").tobytes(),
                np.array(self.spread, dtype="<f2").tobytes(),
            ]
        )

    @staticmethod
    def size(steps: int) -> int:
        """Return the number of bytes of :meth:`pack` for T steps."""
        return 12 * steps + 22

    @classmethod
    def unpack(cls, data: bytes) -> "Plan":
        """Restore the plan that :meth:`pack` returned.

        Raises:
            ValueError: the bytes are not a plan.
        """
        if len(data) < 8:
            raise ValueError("its plan is missing")
        steps, batch = struct.unpack_from("<II", data)
        if not steps or len(data) != cls.size(steps):
            raise ValueError("its plan has the wrong size")

        def read(kind: str, count: int, offset: int) -> tuple[float, ...]:
            values = np.frombuffer(data, dtype=kind, count=count, offset=offset)
            return tuple(values.astype(np.float64).tolist())

        inner = read("<u2", steps - 1, 8)
        times = (0.0, *(numerator / _PARTS for numerator in inner), 1.0)
        numbers = read("<f4", 2 * steps + 4, 2 * steps + 6)
        width, alpha_0, sharpness = numbers[:3]
        delta, gain = numbers[3 : steps + 4], numbers[steps + 4 :]
        spread = read("<f2", steps, 10 * steps + 22)
        return cls(times, batch, width, delta, gain, spread, alpha_0, sharpness)


def make_plan(
    model: DiffusionModel,
    steps: Steps,
    batch: int,
    variance_ratio: PiecewiseConstant | None = None,
    width: float = 0.5,
) -> Plan:
    """Compute the plan of a model.

    Args:
        model: the model.
        steps: T, or the times of the steps.
        batch: number of images coded in parallel.
        variance_ratio: r of each step (:func:`ndm.evaluation.calibrate.best_variance_ratio`); 1 by
            default.
        width: w.

    Raises:
        UserError: the model is in continuous time only, or a number of the plan is out of range.
    """
    require_markov(model.reverse_process, "lossless compression")
    schedule, grid = copy.deepcopy(model.schedule).double().cpu(), as_grid(steps)
    times = torch.tensor(grid.tolist(), dtype=torch.float64).mul(_PARTS).round() / _PARTS
    with torch.no_grad():
        level = schedule(times)
        s, t = _part(level, slice(None, -1)), _part(level, slice(1, None))
        step = posterior_coefficients(s, t, model.eta)
    delta = width * torch.cat([step.variance.sqrt(), level.sigma[-1:]])
    ratio = torch.ones(grid.steps, dtype=torch.float64)
    if variance_ratio is not None:
        ratio = variance_ratio((times[1:] + times[:-1]) / 2)
    try:
        return Plan(
            times=tuple(times.tolist()),
            batch=batch,
            width=_single(width),
            delta=tuple(map(_single, delta.tolist())),
            gain=tuple(map(_single, (step.k * delta[1:] / delta[:-1]).tolist())),
            spread=tuple(float(np.float16(one)) for one in (ratio.sqrt() / width).tolist()),
            alpha_0=_single(float(level.alpha[0])),
            sharpness=_single(float(level.alpha[0] / level.sigma[0])),
        )
    except ValueError as error:
        raise UserError(
            f"the model cannot code with steps={grid.steps} ({error}); use other steps, or a"
            " schedule with a larger gamma_0"
        ) from error


def _single(value: float) -> float:
    """Round to single precision, which halves the size in the archive."""
    return float(np.float32(value))


def _part(level: NoiseLevel, part: slice) -> NoiseLevel:
    return NoiseLevel(**{name: value[part] for name, value in vars(level).items()})


class Rounding:
    """Rounding to integers that is recorded or reproduced near the boundaries.

    Args:
        exceptions: the roundings that an encoder recorded, ``(n, 2)``: number of the call, and
            twice the position in it, plus 1 if rounded up. None to record.
    """

    def __init__(self, exceptions: np.ndarray | None = None):
        self.writing = exceptions is None
        self._recorded: list[np.ndarray] = []
        self._by_call: dict[int, np.ndarray] = {}
        if exceptions is not None and len(exceptions):
            ordered = exceptions[np.argsort(exceptions[:, 0], kind="stable")]
            calls, starts = np.unique(ordered[:, 0], return_index=True)
            parts = np.split(ordered[:, 1], starts[1:])
            self._by_call = dict(zip(calls.tolist(), parts, strict=True))

    def __call__(self, values: np.ndarray, call: int) -> np.ndarray:
        """Round the values ``(n,)`` of call number ``call``; the result is float64.

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
                calls = np.full(len(near), call)
                self._recorded.append(np.stack([calls, 2 * near + up[near]], axis=1))
        elif call in self._by_call:
            position, is_up = self._by_call[call] // 2, self._by_call[call] % 2
            if position.max() >= len(values):
                raise ValueError("an exception lies outside its call")
            up[position] = is_up.astype(bool)
        return floor + up

    def exceptions(self) -> np.ndarray:
        """Return the recorded roundings, ``(n, 2)``, int64."""
        if not self._recorded:
            return np.zeros((0, 2), dtype=np.int64)
        return np.concatenate(self._recorded).astype(np.int64)


class Chain:
    """The means of all distributions of a model and a plan, in cells of the grids.

    Args:
        model: the model, with a discrete decoder; it is copied to double precision.
        plan: the plan.
        event_shape: shape of an image.
        rows: batch size of the networks; it does not change the result.
        device: device of the networks.
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
                "the model is for continuous data or has a decoder network; lossless compression"
                " requires decoder DiscretizedGaussian"
            )
        self.plan, self.event_shape, self.rows = plan, tuple(event_shape), rows
        self.device = device or torch.device("cpu")
        double = copy.deepcopy(model).to(device=self.device, dtype=torch.float64)
        self.model = double.eval().requires_grad_(False)
        self.reverse = require_markov(self.model.reverse_process, "lossless compression")
        self.values = model.decoder.values.numpy()
        self.dims = math.prod(event_shape)
        self.learned_variance = self.reverse.learned_variance
        """Whether each dimension has a reverse variance of its own."""
        self.calls = (3 if self.learned_variance else 2) * plan.steps + 1
        """Number of calls of :class:`Rounding` per batch."""

    @torch.no_grad()
    def transformed(self, index: np.ndarray) -> list[Tensor]:
        """Return F(x, t) at the T + 1 times for the levels ``index``, ``(B D,)``."""
        x = torch.from_numpy(self.values[index]).reshape(-1, *self.event_shape).to(self.device)
        parts = [self._along(self.model.transform.curve(part), part) for part in x.split(self.rows)]
        return [torch.cat(of_time) for of_time in zip(*parts, strict=True)]

    def _along(self, curve: Curve, like: Tensor) -> list[Tensor]:
        return [curve.at(self._level(i, like)) for i in range(self.plan.steps + 1)]

    def first(self, transformed: list[Tensor]) -> np.ndarray:
        """Return the mean of q(z_1|x) in 32nds of a cell, not rounded, ``(B D,)``."""
        level = self._level(self.plan.steps, transformed[-1])
        mean = transformed[-1] * level.alpha[0]
        return self._units(mean, self.plan.steps)

    def pull(self, at_s: Tensor, at_t: Tensor, step: int) -> np.ndarray:
        """Return a_i for F(x, s) and F(x, t), not rounded, ``(B D,)``."""
        s, t = self._level(step - 1, at_s[:1]), self._level(step, at_s[:1])
        weight = posterior_coefficients(s, t, self.model.eta).target_weight[0]
        return self._units(weight * at_t + s.alpha[0] * (at_s - at_t), step - 1)

    @torch.no_grad()
    def predicted(self, latent: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a_i at the prediction x̂(z_i) and e_i, not rounded, for n_i ``(B D,)``.

        e_i is None unless the model has learned the reverse variance.
        """
        z = torch.from_numpy(latent * self.plan.delta[step])
        z = z.reshape(-1, *self.event_shape).to(self.device)
        parts, exponents = [], []
        for part in z.split(self.rows):
            s, t = self._level(step - 1, part), self._level(step, part)
            guess = self.reverse.guess(part, t, self.model.eta)
            parts.append(self.pull(*guess.curve.at_both(s, t), step))
            if self.learned_variance:
                excess = learned_excess(
                    guess, posterior_coefficients(s.expand(part), t.expand(part), self.model.eta)
                )
                assert excess is not None
                octaves = torch.log2(1 + excess).clamp(max=_LARGEST)
                exponents.append((_OCTAVE * octaves).flatten().cpu().numpy())
        return np.concatenate(parts), np.concatenate(exponents) if exponents else None

    def spread(self, exponents: np.ndarray | None, step: int) -> float | np.ndarray:
        """Return the standard deviation of p(n_{i-1}|n_i) in cells for the rounded e_i."""
        scale = self.plan.spread[step - 1]
        if exponents is None:
            return scale
        power, root = np.divmod(exponents.astype(np.int64), 2 * _OCTAVE)
        return scale * np.ldexp(_ROOTS[root], power)

    def mean(self, rounded: np.ndarray, latent: np.ndarray, step: int) -> np.ndarray:
        """Return the mean of n_{i-1} in cells for the rounded a_i and n_i."""
        return rounded / FINE + self.plan.gain[step - 1] * latent

    def probabilities(self, latent: np.ndarray) -> np.ndarray:
        """Return p(x|z_0) up to a factor, ``(n, L)``, for n_0 ``(n,)``."""
        scaled = latent * self.plan.delta[0] / self.plan.alpha_0
        distance = (scaled[:, None] - self.values) * self.plan.sharpness
        exponent = 8 * np.square(distance)  # d²/2 in sixteenths
        exponent = exponent - exponent.min(axis=1, keepdims=True)
        return _TABLE[np.minimum(np.rint(exponent), len(_TABLE) - 1).astype(np.int64)]

    def _level(self, index: int, like: Tensor) -> NoiseLevel:
        return self.model.process.level(self.plan.times[index], like)

    def _units(self, mean: Tensor, of: int) -> np.ndarray:
        return (mean * (FINE / self.plan.delta[of])).flatten().cpu().numpy()
