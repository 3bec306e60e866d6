r"""A forward process along the lines of a reverse process that is an optimal transport (:mod:`ndm.transport`).

The data follow the line that generates them, and the noise is stretched as the lines part or close up: with :math:`z_0 = \alpha_0 x`,
:math:`\zeta = T^{-1}(z_0)` and the clock r of the lines,

.. math::
    \alpha_t F(x, t) = (1 - r)\, z_0 + r\, \zeta, \qquad e^{h(x, t)} = (1 - r) + r / T'(\zeta), \qquad q(z_t|x) = N(\alpha_t F, \sigma_t^2 e^{2h}) .

F and h have no parameters but those of T, and learn with it. What a small perturbation of z_0 becomes under the flow of the reverse process is just this
Gaussian, to first order in sigma. What the first order leaves out costs about sigma²/gamma', and the noise that comes in on the way, g² = eta² sigma² gamma', about
gamma'. So the bound tends to the exact likelihood as sigma_0² << gamma' << 1: less noise first, then a flatter gamma. A free F and h can do the same in
principle, and do not find it, since the bound multiplies what they are off the lines by 1/g².

h needs the stretching of each dimension by itself, so it is for events of one number. F is for any; without h it wants a wide range of gamma, since noise of
the wrong width has to be made up for on the way.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ndm.errors import UserError
from ndm.nfdm import Scale
from ndm.ops import event_size, expand
from ndm.schedule import NoiseLevel, Schedule
from ndm.transform import Curve, CurveTransform

if TYPE_CHECKING:
    from ndm.transport import TransportMap


def clock(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """How far the lines have been followed, r = (sigma_t² - sigma_0²)/(sigma_1² - sigma_0²), and dr/dt; each in the shape of ``level``."""
    start, end = schedule(level.t.new_tensor([0.0, 1.0])).sigma.square()
    r = ((level.sigma**2 - start) / (end - start)).clamp(0, 1)
    return r, 2 * level.sigma * level.dsigma / (end - start)


class _OnLines:
    """A part of a forward process that follows a transport map; :class:`ndm.transport.TransportNDM` says which."""

    # In a tuple, so that the map is a part of the model once and not once more of this part.
    _followed: "tuple[TransportMap, Schedule] | None" = None

    def follow(self, transport: "TransportMap", schedule: Schedule) -> None:
        """Follow the lines of ``transport`` by the clock of ``schedule``.

        Raises:
            UserError: it follows others already.
        """
        if self._followed is not None and (self._followed[0] is not transport or self._followed[1] is not schedule):
            raise UserError(f"this {type(self).__name__} follows the lines of another model: give each model its own")
        self._followed = (transport, schedule)

    @property
    def lines(self) -> "tuple[TransportMap, Schedule]":
        """The map and the schedule."""
        if self._followed is None:
            raise UserError(f"{type(self).__name__} follows the lines of a transport map: give it to a TransportNDM")
        return self._followed

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 = alpha_0 x and ζ with T(ζ) = z_0, each ``(B, D)``; differentiable, once."""
        transport, schedule = self.lines
        z = (schedule(x.new_zeros(1)).alpha * x.flatten(1)).to(x.dtype)
        return z, transport.origin_with_gradient(z, z.new_zeros(len(z)))

    def clock(self, level: NoiseLevel, like: Tensor) -> tuple[Tensor, Tensor]:
        """r and dr/dt, to broadcast against ``like``."""
        r, rate = clock(self.lines[1], level)
        return expand(r, like), expand(rate, like)


class LineTransform(_OnLines, CurveTransform):
    """F(x, t) = ((1 - r) alpha_0 x + r T⁻¹(alpha_0 x)) / alpha_t: data follow the line that generates them. It takes no argument."""

    data_at_zero = True

    def curve(self, x: Tensor) -> Curve:
        return _LineCurve(self, x)


class _LineCurve(Curve):
    def __init__(self, transform: LineTransform, x: Tensor):
        super().__init__(transform, x)
        self._clock = transform.clock
        z, zeta = transform.ends(x)
        self._start, self._way = z.reshape(x.shape), (zeta - z).reshape(x.shape)

    def at(self, level: NoiseLevel) -> Tensor:
        r, _ = self._clock(level, self._x)
        return (self._start + r * self._way) / expand(level.alpha, self._x)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        at, (_, rate) = level.expand(self._x), self._clock(level, self._x)
        value = self.at(level)
        return value, (rate * self._way - at.dalpha * value) / at.alpha

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.at(s), self.at(t)


class LineScale(_OnLines, Scale):
    """h(x, t) = log((1 - r) + r/T'(ζ)): noise is stretched as the lines are. It takes no argument; events have one number.

    Raises:
        UserError: on use, where events have more numbers.
    """

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.with_derivative(x, level)[0]

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        if event_size(x) != 1:
            raise UserError(f"LineScale is for events of one number, got {event_size(x)}: lines turn what they stretch in more dimensions")
        (r, rate), (_, zeta) = self.clock(level, x), self.ends(x)
        slope = self.lines[0].with_jacobian(zeta)[1]
        inverse = (1 / slope).reshape(x.shape)
        stretch = 1 - r + r * inverse
        return stretch.log(), rate * (inverse - 1) / stretch


def follow_lines(parts: tuple[Any, ...], transport: "TransportMap", schedule: Schedule) -> None:
    """Let those parts that follow lines follow these."""
    for part in parts:
        if isinstance(part, _OnLines):
            part.follow(transport, schedule)
