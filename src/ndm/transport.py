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
    - \tfrac12 g^2 \bigl(-s^{-T} \epsilon - \nabla \log p_t\bigr) \bigr\|^2, \qquad z_t = \mu + s\, \epsilon, \quad \mu = \alpha F(x, t), \quad s = \sigma S(x, t),

with S = 1 for NDM, a learned S = exp(h(x, t)) for :mod:`ndm.nfdm`, and a matrix for :mod:`ndm.lines`. z_t is drawn at once from q(z_t|x): no trajectory is simulated. g = eta sigma
sqrt(gamma'), eta a learned function of t. The clock r runs with the noise, which keeps the bound finite near t = 0 for an F that starts like
sigma_t². The weights (1 - r, r) of the reverse process need not be the (alpha, sigma) of the forward process: F makes up for the difference.

For x ~ N(m, S²) and an affine T, the forward process with the marginals of the reverse is F = c(t) (x - m) + mean(t)/alpha,
:math:`\alpha^2 c^2 S^2 = ((1 - r) a + r)^2 - \sigma^2`, and with :math:`g^2 = \sigma^2 \tilde\gamma'`, :math:`\tilde\gamma = \log(\sigma^2/(\alpha c)^2)`,
the bound is tight but for its two ends. For other T a Gaussian q(z_t|x) has the marginals of the reverse in the limit of little noise alone, where it
follows the lines themselves: :mod:`ndm.lines` is that forward process.

Source: Neural Diffusion Models (Bartosh et al. 2024), the section on dynamic optimal transport; clock, learned eta and learned noise are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder
from ndm.elbo import Bound, BoundDraw, Eta
from ndm.errors import UserError, check_whole
from ndm.forward import ForwardProcess
from ndm.likelihood import Dequantization, LogLikelihood, OdeSettings, latent
from ndm.lines import clock, follow_lines
from ndm.model import NDM
from ndm.monotone import Displaced, TransportMap
from ndm.monotone import MonotoneMap as MonotoneMap  # models that were saved name it here
from ndm.nfdm import ScaledProcess, Stretch, Stretched, StretchedCurve
from ndm.noise import ExampleNoise
from ndm.reverse import ReverseProcess
from ndm.sample import Method, Sampler
from ndm.schedule import NoiseLevel, Schedule
from ndm.times import StepFunction, TimeSampler
from ndm.transform import Curve, Transform

_LATENTS = 3  # stream of noise


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
        self, curve: Curve, noise: Tensor, level: NoiseLevel, eta: float | Tensor, coin: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Drift of the forward process given x less that of the reverse, over alpha gamma'; arguments as :class:`ndm.reverse.ReverseProcess`."""
        at = level.expand(noise)
        value, derivative = curve.with_derivative(level)
        spread = curve.stretched(noise, level) if isinstance(curve, StretchedCurve) else Stretched(noise, torch.zeros_like(noise), noise)
        here = self.displaced(at.alpha * value + at.sigma * spread.noise, level)
        moved = at.dalpha * value + at.alpha * derivative + at.dsigma * spread.noise + at.sigma * spread.rate
        _, speed = self.clock(level)
        velocities = moved - speed.reshape(at.t.shape) * here.velocity.reshape(noise.shape)
        scores = -spread.whitened / at.sigma - here.score.reshape(noise.shape)
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
        scale: S(x, t), for a forward process that learns its noise, too, such as :class:`ndm.lines.LineScale`; None is NDM.
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
        scale: Stretch | None = None,
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

    def bound_at(self, x: Tensor, draw: BoundDraw) -> Bound:
        return self._bound_at(x, self.process.curve(x), draw, None, self.learned_eta, None)

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
