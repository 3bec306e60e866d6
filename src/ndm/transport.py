r"""A reverse process that is an optimal transport: displacement interpolation from the prior to the data.

The generative trajectories are straight lines of constant speed in r, from a point of the prior to its image under a monotone map T (in
more dimensions the gradient of a convex function):

.. math::
    z(r) = (1 - r)\, T(\zeta) + r\, \zeta, \qquad \zeta \sim N(0, I), \qquad r = \frac{\sigma_t^2 - \sigma_0^2}{\sigma_1^2 - \sigma_0^2} .

Such a T is the optimal map between the prior and what it makes of it (Brenier 1991; McCann 1997), so all restrictions are in the family and
none in the loss. With :math:`J = (1 - r)\, \nabla T + r I`, positive definite, everything follows from the change of variables at
:math:`\zeta = z^{-1}(r)`:

.. math::
    u = \frac{dz}{dt} = r' (\zeta - T(\zeta)), \qquad \log p_t(z) = \log N(\zeta; 0, I) - \log\det J, \qquad
    \nabla_z \log p_t = J^{-1}\, \nabla_\zeta \bigl[\log N(\zeta; 0, I) - \log\det J\bigr] .

The SDE dz = (u - ½ g² ∇ log p_t) dt + g dw, time running backward, has these marginals for every g. It is the generative process of a Neural
Diffusion Model whose forward process q(z_t|x) is learned beside it, by the same bound: two SDEs with one g differ by their drifts,

.. math::
    L_{\text{diffusion}} = E_t \frac{1}{2 g^2} \bigl\| \dot\mu + \dot s\, \epsilon - u
    - \tfrac12 g^2 \bigl(-\epsilon / s - \nabla \log p_t\bigr) \bigr\|^2, \qquad z_t = \mu + s\, \epsilon, \quad \mu = \alpha F(x, t), \quad s = \sigma e^{h},

with h = 0 for NDM and a learned h(x, t) for :mod:`ndm.nfdm`. z_t is drawn at once from q(z_t|x): no trajectory is simulated. g = eta sigma
sqrt(gamma'), eta a learned function of t. The clock r runs with the noise, which keeps the bound finite near t = 0 for an F that starts like
sigma_t². The weights (1 - r, r) of the reverse process need not be the (alpha, sigma) of the forward process: F makes up for the difference.

For x ~ N(m, S²) and an affine T, the forward process with the marginals of the reverse is F = c(t) (x - m) + mean(t)/alpha,
:math:`\alpha^2 c^2 S^2 = ((1 - r) a + r)^2 - \sigma^2`, and with :math:`g^2 = \sigma^2 \tilde\gamma'`, :math:`\tilde\gamma = \log(\sigma^2/(\alpha c)^2)`,
the bound is tight but for its two ends. For other T a Gaussian q(z_t|x) has the marginals of the reverse in the limit of little noise alone, where it
follows the lines themselves: :mod:`ndm.lines` is that forward process.

Source: Neural Diffusion Models (Bartosh et al. 2024), the section on dynamic optimal transport; clock, learned eta and learned noise are ours.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder
from ndm.elbo import Bound, Eta
from ndm.errors import UserError, check_whole
from ndm.forward import ForwardProcess, Gaussian
from ndm.likelihood import Dequantization, LogLikelihood, OdeSettings, latent
from ndm.lines import clock, follow_lines
from ndm.model import NDM
from ndm.nfdm import Scale, ScaledCurve, ScaledProcess
from ndm.noise import ExampleNoise, Noise
from ndm.reverse import ReverseProcess
from ndm.sample import Method, Sampler
from ndm.schedule import NoiseLevel, Schedule
from ndm.times import StepFunction, TimeSampler
from ndm.transform import Curve, Transform

_LATENTS = 3  # stream of noise
_NEWTON_STEPS = 200


@dataclass(frozen=True)
class Displaced:
    """Where latents z lie on the straight lines, and the density there."""

    origin: Tensor
    """ζ, the end of the line in the prior, r = 1; ``(B, D)``."""
    target: Tensor
    """T(ζ), its other end, r = 0; ``(B, D)``."""
    log_p: Tensor
    """Log-density of z, nats, ``(B,)``."""
    score: Tensor
    """Gradient of the log-density in z, ``(B, D)``."""

    @property
    def velocity(self) -> Tensor:
        """dz/dr = ζ - T(ζ), the same along the whole line; ``(B, D)``."""
        return self.origin - self.target


class TransportMap(nn.Module, ABC):
    """T, the gradient of a strictly convex function, from the prior at r = 1 to r = 0."""

    @abstractmethod
    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """T(ζ) ``(B, D)`` and its Jacobian ``(B, D, D)``, symmetric and positive definite, for ζ ``(B, D)``."""

    def forward(self, zeta: Tensor) -> Tensor:
        """T(ζ), ``(B, D)``."""
        return self.with_jacobian(zeta)[0]

    def displace(self, zeta: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """z(r) = (1 - r) T(ζ) + r ζ ``(B, D)`` and its Jacobian ``(B, D, D)``, for ``r`` ``(B,)`` in [0, 1]."""
        value, jacobian = self.with_jacobian(zeta)
        unit = torch.eye(zeta.shape[1], dtype=zeta.dtype, device=zeta.device)
        rate, square = r[:, None], r[:, None, None]
        return (1 - rate) * value + rate * zeta, (1 - square) * jacobian + square * unit

    @torch.no_grad()
    def origin(self, z: Tensor, r: Tensor) -> Tensor:
        """The ζ whose line passes through z at r, ``(B, D)``: Newton's method, each step halved until the residual shrinks.

        The map is the gradient of a strictly convex function, so its Jacobian is nowhere singular and the residual always shrinks.

        Raises:
            ArithmeticError: it does not converge.
        """
        zeta = z.clone()
        value, jacobian = self.displace(zeta, r)
        residual = z - value
        step, length = torch.linalg.solve(jacobian, residual), torch.ones_like(z[:, :1])
        # What rounding leaves: a residual, or a step, of a few units in the last place.
        near = 8 * torch.finfo(z.dtype).eps * (1 + z.norm(dim=1, keepdim=True))
        for _ in range(_NEWTON_STEPS):
            open_ = (residual.norm(dim=1, keepdim=True) > near) & ((length * step).norm(dim=1, keepdim=True) > near)
            if not bool(open_.any()):
                return zeta
            candidate = zeta + length * step
            value, jacobian = self.displace(candidate, r)
            shrunk = z - value
            better = open_ & (shrunk.norm(dim=1, keepdim=True) < residual.norm(dim=1, keepdim=True))
            zeta, residual = torch.where(better, candidate, zeta), torch.where(better, shrunk, residual)
            step = torch.where(better, torch.linalg.solve(jacobian, shrunk), step)
            length = torch.where(better, torch.ones_like(length), torch.where(open_, length / 2, length))
        raise ArithmeticError(
            f"the transport map could not be inverted at {int(open_.sum())} point(s): it is too steep, or z is too far away"
        )

    def origin_with_gradient(self, z: Tensor, r: Tensor) -> Tensor:
        """:meth:`origin`, differentiable, once, in z, r and the parameters."""
        start = self.origin(z, r)
        value, jacobian = self.displace(start, r)
        # One more step of Newton's, whose gradient is that of the inverse function: dζ = J^-1 (dz - dz(r)|ζ).
        return start + torch.linalg.solve(jacobian.detach(), z - value)

    def displaced(self, z: Tensor, r: Tensor) -> Displaced:
        """Both ends of the lines through z ``(B, D)`` at ``r`` ``(B,)``, and the density there; differentiable, once, in z, r and the parameters."""
        learning = torch.is_grad_enabled()
        with torch.enable_grad():
            zeta = self.origin_with_gradient(z, r)
            zeta = zeta if zeta.requires_grad else zeta.requires_grad_()
            target, slope = self.with_jacobian(zeta)
            unit = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            square = r[:, None, None]
            factor = torch.linalg.cholesky((1 - square) * slope + square * unit)
            normal = Gaussian(torch.zeros_like(zeta), torch.ones_like(zeta)).log_prob(zeta)
            log_p = normal - 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
            (pulled,) = torch.autograd.grad(log_p.sum(), zeta, create_graph=learning)
            score = torch.cholesky_solve(pulled[..., None], factor)[..., 0]
        found = (zeta, target, log_p, score)
        return Displaced(*(found if learning else (part.detach() for part in found)))


class MonotoneMap(TransportMap):
    r"""A strictly increasing map of the line, T(ζ) = b + w ζ + sum_j a_j tanh(k_j (ζ - c_j)) with w, a_j, k_j > 0.

    Such sums are dense in the increasing functions. It starts near ``scale`` times ζ.

    Args:
        units: number of tanh's.
        scale: standard deviation of the data, about.
    """

    def __init__(self, units: int = 24, scale: float = 1.0):
        super().__init__()
        check_whole("units", units, 1)
        if not (scale > 0 and math.isfinite(scale)):
            raise UserError(f"scale={scale}: give a positive number, about the standard deviation of the data")
        self.units, self.scale = units, scale
        self.shift, self.log_slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(math.log(0.2 * scale)))
        self.log_height = nn.Parameter(torch.full((units,), math.log(2 * scale / units)))
        self.log_steepness = nn.Parameter(torch.full((units,), math.log(3.0)))
        self.center = nn.Parameter(torch.linspace(-2.5, 2.5, units))

    def with_jacobian(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        if zeta.shape[1] != 1:
            raise UserError(f"a MonotoneMap is for events of one number, got {zeta.shape[1]}; more need the gradient of a convex function")
        slope, height, steepness = self.log_slope.exp(), self.log_height.exp(), self.log_steepness.exp()
        bent = torch.tanh(steepness * (zeta - self.center))
        value = self.shift + slope * zeta + (height * bent).sum(1, keepdim=True)
        return value, (slope + (height * steepness * (1 - bent**2)).sum(1, keepdim=True))[..., None]


@dataclass(frozen=True)
class TransportReverse(ReverseProcess):
    """The reverse process of this module; its ``predictor`` is the transport map."""

    @property
    def transport(self) -> TransportMap:
        """T."""
        assert isinstance(self.predictor, TransportMap)
        return self.predictor

    def clock(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """How far the lines have been followed, r in [0, 1], and dr/dt; each in the shape of ``level``."""
        return clock(self.process.schedule, level)

    def displaced(self, z: Tensor, level: NoiseLevel) -> Displaced:
        """The lines through latents ``z`` ``(B, *event)`` at times ``(B,)``; events flattened."""
        return self.transport.displaced(z.flatten(1), self.clock(level)[0])

    def continuous_error(
        self, curve: Curve, noise: Tensor, level: NoiseLevel, eta: float | Tensor, source: Noise = None
    ) -> tuple[Tensor, None]:
        """Drift of the forward process given x less that of the reverse, over alpha gamma'; arguments as :class:`ndm.reverse.ReverseProcess`."""
        at = level.expand(noise)
        value, derivative = curve.with_derivative(level)
        log_scale, rate = (
            curve.log_scale_with_derivative(level) if isinstance(curve, ScaledCurve) else (torch.zeros_like(noise), torch.zeros_like(noise))
        )
        stretch = log_scale.exp()
        here = self.displaced(at.alpha * value + at.sigma * stretch * noise, level)
        moved = at.dalpha * value + at.alpha * derivative + (at.dsigma + at.sigma * rate) * stretch * noise
        _, speed = self.clock(level)
        velocities = moved - speed.reshape(at.t.shape) * here.velocity.reshape(noise.shape)
        scores = -noise / (at.sigma * stretch) - here.score.reshape(noise.shape)
        # g² / (alpha gamma') = eta² sigma² / alpha
        return velocities * at.inverse_dgamma / at.alpha - 0.5 * eta**2 * at.sigma**2 / at.alpha * scores, None

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """u - ½ g² grad log p_t, ``(B, *event)``; the ODE at eta = 0."""
        at, here = level.expand(z), self.displaced(z, level)
        _, speed = self.clock(level)
        velocity = speed.reshape(at.t.shape) * here.velocity.reshape(z.shape)
        if not eta:
            return velocity
        return velocity - 0.5 * eta**2 * at.sigma**2 * at.dgamma * here.score.reshape(z.shape)

    def curve(self, *_: object) -> NoReturn:
        """Refuse: nothing stands for F(x, .) in this reverse process.

        Raises:
            UserError: always.
        """
        raise UserError(
            "the reverse process by transport is a model in continuous time: sample with method='transport', 'ode' or 'sde', and leave steps "
            "out of the bound; for discrete time take ndm.NDM"
        )

    posterior = learning_curve = curve  # type: ignore[assignment]


class _AlongTheLine(Sampler):
    """z_0 = T(z_1): a straight line needs one step."""

    def __call__(self, reverse: ReverseProcess, z: Tensor, generator: torch.Generator | None = None, progress: bool = False) -> Tensor:
        assert isinstance(reverse, TransportReverse)
        return reverse.transport(z.flatten(1)).reshape(z.shape)


class TransportNDM(NDM):
    """A Neural Diffusion Model whose reverse process is displacement interpolation by an optimal transport map. Continuous time.

    Bound, ODE and SDE are used as those of :class:`ndm.NDM`. A sample takes one evaluation of T, and the density of z_0 is exact.

    Args:
        schedule: noise levels of the forward process over time, alpha_1 > 0; the less of its noise at t = 1, the more F has to do.
        transform: F(x, t); :class:`ndm.lines.LineTransform`, or one of its own that starts like sigma_t² (:class:`ndm.SeparableTransform`,
            :class:`ndm.GatedTransform`).
        transport: T.
        decoder: p(x|z_0).
        scale: h(x, t), for a forward process that learns its noise, too, such as :class:`ndm.lines.LineScale`; None is NDM.
        times: how times are drawn in training; low-discrepancy by default.
        eta_parts: eta is learned on so many equal parts of [0, 1]; the bound is trained with it, and starts at 1.

    Raises:
        UserError: parts do not fit one another.
    """

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        transport: TransportMap,
        decoder: Decoder,
        scale: Scale | None = None,
        times: TimeSampler | None = None,
        eta_parts: int = 32,
    ):
        check_whole("eta_parts", eta_parts, 1)
        if not isinstance(transport, TransportMap):
            raise UserError(f"transport is a {type(transport).__name__}: give a TransportMap, such as MonotoneMap")
        if not transform.keeps_shape:
            raise UserError("F is an encoder into a space of its own, but the transport map leads to the data; take a transformation of x")
        super().__init__(schedule, transform, transport, decoder, times)  # type: ignore[arg-type]
        self.scale, self.eta_parts = scale, eta_parts
        self.process = ForwardProcess(schedule, transform) if scale is None else ScaledProcess(schedule, transform, scale)
        follow_lines((transform, scale), transport, schedule)
        self.log_eta = nn.Parameter(torch.zeros(eta_parts))
        with torch.no_grad():
            start, end = (schedule(torch.full((1,), t, dtype=self.like.dtype, device=self.like.device)) for t in (0.0, 1.0))
        if not bool((end.alpha > 0).all()):
            raise UserError("the schedule keeps no signal at t = 1, where g is infinite: give one that does, for example LinearLogSNR")
        if not bool((end.sigma**2 - start.sigma**2 > 1000 * torch.finfo(end.sigma.dtype).eps * end.sigma**2).all()):
            raise UserError("the schedule's noise hardly grows, and the lines are followed by it: give gamma a wider range, at least 0.001")

    @property
    def transport(self) -> TransportMap:
        """T."""
        return self.reverse_process.transport

    @property
    def reverse_process(self) -> TransportReverse:
        """The reverse process, with what samplers need."""
        return TransportReverse(self.process, self.predictor)

    @property
    def learned_eta(self) -> StepFunction:
        """The eta that the bound is trained with."""
        return StepFunction(self.log_eta.exp())

    def predict(self, z: Tensor, t: Tensor | float) -> Tensor:
        """T(ζ), where the line through z_t ends; ``(B, *event)``."""
        return self.reverse_process.displaced(z, self.process.level(t, z)).target.reshape(z.shape)

    def bound(self, x: Tensor, *, steps: int | Literal["trained"] | None = "trained", eta: Eta | None = None, **options: Any) -> Bound:
        """The variational bound as :meth:`ndm.NDM.bound` has it, in continuous time, by default with the learned eta.

        Raises:
            UserError: steps are given, or another argument is out of range.
        """
        if steps not in (None, "trained"):
            self.reverse_process.curve()
        return super().bound(x, steps=None, eta=self.learned_eta if eta is None else eta, **options)

    def sample(self, shape: tuple[int, ...], method: Method | Literal["transport"] | Sampler = "transport", **options: Any) -> Tensor:
        """Draw samples: ``transport`` is T(z_1) and the decoder, everything else as :meth:`ndm.NDM.sample`.

        Raises:
            UserError: the method is of discrete time.
        """
        return super().sample(shape, _AlongTheLine() if method == "transport" else method, **options)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        *,
        samples: int = 1,
        dequantization: Dequantization = "variational",
        settings: OdeSettings | None = None,
        seed: int = 0,
        examples: Sequence[int] | None = None,
        progress: bool = False,
    ) -> LogLikelihood:
        """Log-likelihood of each example, the density of z_0 exact by the change of variables; arguments as :meth:`ndm.NDM.log_likelihood`.

        Raises:
            UserError: settings of an ODE are given, which is not solved, or an argument does not fit the data.
        """
        check_whole("samples", samples, 1)
        if settings is not None:
            raise UserError("the density of a transport map is exact, no ODE is solved for it: leave settings out")
        reverse, weights = self.reverse_process, []
        for sample in range(samples):
            source = ExampleNoise(seed, range(len(x)) if examples is None else examples, _LATENTS, sample)
            z, log_ratio = latent(self.process, self.decoder, x, dequantization, source)
            weights.append((reverse.displaced(z, self.process.level(0.0, z)).log_p + log_ratio).cpu().double())
        together = torch.stack(weights, 1)
        return LogLikelihood(together, together, 1)
