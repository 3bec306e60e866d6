r"""A reverse process that is an optimal transport from the prior to the data.

The generative trajectories are displacement interpolations: straight lines of constant speed in r,
from a point of the prior to its image under a monotone map T (in more dimensions the gradient of a
convex function):

.. math::
    z(r) = (1 - r)\, T(\zeta) + r\, \zeta, \qquad \zeta \sim N(0, I), \qquad
    r = \frac{\sigma_t^2 - \sigma_0^2}{\sigma_1^2 - \sigma_0^2} .

Such a T is the optimal map from the prior to its image (Brenier 1991; McCann 1997), so all
restrictions are in the family and none in the loss. With the positive definite
:math:`J = (1 - r)\, \nabla T + r I`, everything follows from the change of variables at
:math:`\zeta = z^{-1}(r)`:

.. math::
    u = \frac{dz}{dt} = r' (\zeta - T(\zeta)), \qquad
    \log p_t(z) = \log N(\zeta; 0, I) - \log\det J, \qquad
    \nabla_z \log p_t = J^{-1}\, \nabla_\zeta \bigl[\log N(\zeta; 0, I) - \log\det J\bigr] .

The SDE dz = (u - ½ g² ∇ log p_t) dt + g dw, with time running backward, has these marginals for
every g. It is the generative process of a Neural Diffusion Model, whose forward process q(z_t|x) is
learned with the same bound. Two SDEs with the same g differ only in their drifts:

.. math::
    L_{\text{diffusion}} = E_t \frac{1}{2 g^2} \bigl\| \dot\mu + \dot s\, \epsilon - u
    - \tfrac12 g^2 \bigl(-s^{-T} \epsilon - \nabla \log p_t\bigr) \bigr\|^2, \qquad
    z_t = \mu + s\, \epsilon, \quad \mu = \alpha F(x, t), \quad s = \sigma S(x, t),

with S = 1 for NDM, a learned S = exp(h(x, t)) for :mod:`ndm.variants.nfdm`, and a matrix for
:mod:`ndm.variants.interpolation`. z_t is drawn directly from q(z_t|x); no trajectory is simulated.
g = eta sigma sqrt(gamma'), where eta is a learned function of t. The clock r follows the noise,
which keeps the bound finite near t = 0 for an F that starts like sigma_t². The weights (1 - r, r)
of the reverse process may differ from the (alpha, sigma) of the forward process: F makes up for the
difference.

For x ~ N(m, S²) and an affine T, the forward process F = c(t) (x - m) + mean(t)/alpha with
:math:`\alpha^2 c^2 S^2 = ((1 - r) a + r)^2 - \sigma^2` has the marginals of the reverse process.
With :math:`g^2 = \sigma^2 \tilde\gamma'` and :math:`\tilde\gamma = \log(\sigma^2/(\alpha c)^2)`,
the bound is then tight except at its two ends. For other T, a Gaussian q(z_t|x) has the marginals
of the reverse process only in the limit of little noise, where it follows the lines; that forward
process is :mod:`ndm.variants.interpolation`.

Source: Neural Diffusion Models (Bartosh et al. 2024), the section on dynamic optimal transport. The
clock, the learned eta and the learned noise are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ndm.curve import Curve
from ndm.decoder import Decoder
from ndm.errors import UserError, check_whole
from ndm.forward import ForwardProcess, NoisingProcess
from ndm.model import DiffusionModel
from ndm.ode import LogDensity, OdeSettings
from ndm.parts import check_part
from ndm.random import RandomSource
from ndm.reverse import Reverse
from ndm.sample import Sampler
from ndm.schedule import NoiseLevel, Schedule
from ndm.time_sampling import Eta, PiecewiseConstant, TimeSampler
from ndm.transform import Transform
from ndm.variants.interpolation import clock, follow
from ndm.variants.monotone import Interpolant, TransportMap
from ndm.variants.nfdm import NoiseScale, ScaledCurve, ScaledNoise, ScaledProcess


@dataclass(frozen=True)
class TransportReverse(Reverse):
    """The optimal-transport reverse process."""

    process: NoisingProcess
    """The forward process."""
    transport: TransportMap
    """T."""
    eta: float = 1.0
    """The eta of training."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.process, self.transport

    @property
    def exact_density(self) -> bool:
        return True

    def clock(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """Return r in [0, 1], the position on the lines, and dr/dt, in the shape of ``level``."""
        return clock(self.process.schedule, level)

    def interpolant(self, z: Tensor, level: NoiseLevel) -> Interpolant:
        """Return the lines through ``z`` ``(B, *event)`` at times ``(B,)``, flattened."""
        return self.transport.interpolant(z.flatten(1), self.clock(level)[0])

    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        at = level.expand(noise)
        value, derivative = curve.with_derivative(level)
        if isinstance(curve, ScaledCurve):
            scaled = curve.scaled(noise, level)
        else:
            scaled = ScaledNoise(noise, torch.zeros_like(noise), noise)
        here = self.interpolant(at.alpha * value + at.sigma * scaled.noise, level)
        mean_rate = at.dalpha * value + at.alpha * derivative
        velocity = mean_rate + at.dsigma * scaled.noise + at.sigma * scaled.rate
        _, speed = self.clock(level)
        velocities = velocity - speed.reshape(at.t.shape) * here.velocity.reshape(noise.shape)
        scores = -scaled.whitened / at.sigma - here.score.reshape(noise.shape)
        of_velocity = velocities * at.inverse_dgamma / at.alpha
        # g² / (alpha gamma') = eta² sigma² / alpha
        return of_velocity - 0.5 * eta**2 * at.sigma**2 / at.alpha * scores, None

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """Return u - ½ g² grad log p_t, ``(B, *event)``."""
        at, here = level.expand(z), self.interpolant(z, level)
        _, speed = self.clock(level)
        velocity = speed.reshape(at.t.shape) * here.velocity.reshape(z.shape)
        if not eta:
            return velocity
        return velocity - 0.5 * eta**2 * at.sigma**2 * at.dgamma * here.score.reshape(z.shape)

    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Return T(ζ), the end of the line through z_t at the data, ``(B, *event)``."""
        return self.interpolant(z, level).target.reshape(z.shape)

    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        """Return log p(z_0), exact by the change of variables; no ODE is solved."""
        here = self.interpolant(z, self.process.level(0.0, z))
        keep = torch.is_grad_enabled() and z.requires_grad
        log_p = (here.log_p if keep else here.log_p.detach()).cpu().double()
        return LogDensity(log_p, log_p, z, here.origin.detach().reshape(z.shape), 1)


class AlongTheLine(Sampler):
    """A sampler that takes one step along the line, z_0 = T(z_1).

    Args:
        transport: T.
    """

    def __init__(self, transport: TransportMap):
        self.transport = transport

    def __call__(
        self,
        reverse: Reverse,
        z: Tensor,
        generator: torch.Generator | None = None,
        progress: bool = False,
        start: float = 1.0,
    ) -> Tensor:
        if start != 1:
            raise UserError("method=transport starts at t = 1: choose another method")
        return self.transport(z.flatten(1)).reshape(z.shape)


class TransportNDM(DiffusionModel):
    """A Neural Diffusion Model whose reverse process is an optimal transport, in continuous time.

    A sample takes one evaluation of T (``method="transport"``, the default), and the density of z_0
    is exact.

    Args:
        schedule: noise levels of the forward process over time, alpha_1 > 0; the less noise at
            t = 1, the more F has to do.
        transform: F(x, t): :class:`ndm.variants.InterpolationTransform`, or one that starts like
            sigma_t² (:class:`ndm.SeparableTransform`, :class:`ndm.GatedTransform`).
        transport: T.
        decoder: p(x|z_0).
        scale: S(x, t), for a forward process that also learns its noise, such as
            :class:`ndm.variants.InterpolationScale`; None is NDM.
        time_sampler: how times are drawn in training; low-discrepancy by default.
        eta_parts: number of equal parts of [0, 1] on which eta is learned, starting at 1, with the
            bound.

    Raises:
        UserError: parts do not fit together.
    """

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        transport: TransportMap,
        decoder: Decoder,
        scale: NoiseScale | None = None,
        time_sampler: TimeSampler | None = None,
        eta_parts: int = 32,
    ):
        check_whole("eta_parts", eta_parts, 1)
        hint = "ndm.variants.MonotoneMap() in one dimension, ndm.variants.ConvexMap(dims) in more"
        check_part("transport", transport, TransportMap, hint)
        check_part("transform", transform, Transform, "ndm.variants.InterpolationTransform()")
        if not transform.keeps_shape:
            raise UserError(
                "F is an encoder into another space, but the transport map ends at the data; use a"
                " transformation that keeps the shape of x"
            )
        process: NoisingProcess
        if scale is None:
            process = ForwardProcess(schedule, transform)
        else:
            process = ScaledProcess(schedule, transform, scale)
        super().__init__(process, decoder, time_sampler)
        self.transport, self.scale, self.eta_parts = transport, scale, eta_parts
        follow((transform, scale), transport, schedule)
        self.log_eta = nn.Parameter(torch.zeros(eta_parts))
        self._check_ends(schedule)

    @torch.no_grad()
    def _check_ends(self, schedule: Schedule) -> None:
        start, end = (
            schedule(torch.full((1,), t, dtype=self.like.dtype, device=self.like.device))
            for t in (0.0, 1.0)
        )
        if not bool((end.alpha > 0).all()):
            raise UserError(
                "the schedule keeps no signal at t = 1, where g is infinite: give one that does,"
                " for example LinearLogSNRSchedule"
            )
        smallest_growth = 1000 * torch.finfo(end.sigma.dtype).eps * end.sigma**2
        if not bool((end.sigma**2 - start.sigma**2 > smallest_growth).all()):
            raise UserError(
                "the schedule's noise hardly grows, but it is the clock of the lines: give gamma a"
                " wider range, at least 0.001"
            )

    @property
    def reverse_process(self) -> TransportReverse:
        return TransportReverse(self.process, self.transport)

    @property
    def bound_eta(self) -> Eta:
        """The learned eta."""
        return PiecewiseConstant(self.log_eta.exp())

    @property
    def samplers(self) -> Mapping[str, Callable[[], Sampler]]:
        return {"transport": lambda: AlongTheLine(self.transport)}
