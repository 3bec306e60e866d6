r"""Neural Flow Diffusion Models, the Gaussian ones: the noise of the forward process is learned, too. Continuous time.

.. math::
    q(z_t|x) = N(\mu, \mathrm{diag}\, s^2), \qquad \mu = \alpha_t F(x, t), \qquad s = \sigma_t\, e^{h(x, t)}, \qquad h(x, 0) = 0 ,

with one h for each dimension. S = exp(h) = 1 is a Neural Diffusion Model. For the scalar diffusion coefficient of the schedule,
:math:`g^2 = \eta^2 \sigma^2 \gamma'`, these marginals belong to the reverse-time SDE dz = f dt + g dw with

.. math::
    f(z, t, x) = \dot\mu + \Bigl(\frac{\dot s}{s} + \frac{g^2}{2 s^2}\Bigr)(z - \mu)
    = f_{\mathrm{NDM}}(z, t, x) + \bigl(\dot h + \tfrac12 \eta^2 \gamma'\, (e^{-2h} - 1)\bigr)(z - \mu) ,

and the generative process puts :math:`\hat x(z, t)` in the place of x, in F and in h. Two SDEs with the same g differ by their drifts:

.. math::
    L_{\text{diffusion}} = E_t \frac{1}{2 g^2} \|f(z, t, x) - f(z, t, \hat x)\|^2
    = E_t \frac{e^{-\gamma}\gamma'}{2\eta^2} \Bigl\| \frac{\Delta\dot F - \dot{\hat h} \Delta F}{\gamma'}
    - \tfrac12 (1 + \eta^2 e^{-2\hat h})\, \Delta F
    + e^{\gamma/2} e^{h} \epsilon \Bigl[ \frac{\Delta\dot h}{\gamma'} + \tfrac12 \eta^2 e^{-2\hat h}\, \mathrm{expm1}(-2\Delta h) \Bigr] \Bigr\|^2 ,

where the hat means x̂ for x, Δ the value at x less that at x̂, and z = mu + s eps. Everything large has been taken out of the differences by
hand: :math:`z - \hat\mu = s\epsilon + \alpha\Delta F` and :math:`\alpha' - \alpha\sigma'/\sigma = -\tfrac12\alpha\gamma'`. At h = 0 this is the
formula of :mod:`ndm.elbo`. The prior term is :math:`KL(N(\mu_1, \mathrm{diag}\, s_1^2) \| N(0, I))`, and the reconstruction term is that of NDM.

With F affine in x and h free of x, the exact E[x|z_t] makes the generative marginals those of the forward process. Where h depends on x the
tied reverse is a restriction, as it is where F is not affine.

Source: Neural Flow Diffusion Models (Bartosh, Vetrov, Naesseth 2024), sections 3 and 4; there g is learned as well, here it is
eta sigma sqrt(gamma') of the schedule. There is no discrete-time model: posteriors q(z_s|z_t,x) are not part of it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder
from ndm.errors import UserError
from ndm.forward import ForwardProcess, Gaussian
from ndm.model import NDM
from ndm.ops import expand
from ndm.predictor import Predictor
from ndm.reverse import ReverseProcess
from ndm.sample import Method, Sampler
from ndm.schedule import NoiseLevel, Schedule
from ndm.times import TimeSampler
from ndm.transform import Curve, GatedNetwork, SeparableTransform, SumCurve, Transform


class Stretch(nn.Module, ABC):
    """S(x, t), by which the noise sigma_t eps is multiplied. S(x, 0) must be 1: the decoder counts on sigma_0."""

    @abstractmethod
    def curve(self, transform: Transform, x: Tensor) -> "StretchedCurve":
        """t -> F(x, t) and t -> S(x, t) for ``x`` ``(B, *event)``."""


class Scale(Stretch):
    """S(x, t) = exp(h(x, t)) for each dimension by itself, with h(x, 0) = 0."""

    one_at_end: bool = False
    """Whether S(x, 1) is 1, too."""

    @abstractmethod
    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """h(x, t) for ``x`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)``."""

    @abstractmethod
    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """h(x, t) and its partial derivative in t at fixed x; each ``(B, *event)``."""

    def curve(self, transform: Transform, x: Tensor) -> "ScaledCurve":
        return ScaledCurve(transform, self, x)


class NetworkScale(GatedNetwork, Scale):
    """h = w(t) f(x, t) with a network f, so that training starts at S = 1.

    Networks of this library zero their last layer, any other is multiplied by a learned scalar that starts at zero. The network runs in the
    precision of x, never under autocast, as those of :mod:`ndm.transform`.

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``, differentiable in t by forward mode.
        gate: w(t): ``time`` is t, and the prior term alone holds S(x, 1) near 1; ``bridge`` is t (1 - t), the paper's, where S(x, 1) = 1.
    """

    role = "scale; h(x, t)"

    def __init__(self, network: nn.Module, gate: Literal["time", "bridge"] = "time"):
        if gate not in ("time", "bridge"):
            raise UserError(f"gate={gate!r} is not known: choose time or bridge")
        super().__init__(network)
        self.gate, self.one_at_end = gate, gate == "bridge"

    def window(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        t = level.t
        return (t, torch.ones_like(t)) if self.gate == "time" else (t * (1 - t), 1 - 2 * t)

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.product(x, level)

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self.product_with_derivative(x, level)


class SeparableScale(Scale):
    """The time-separable form h = t sum_k cos(pi k t) c_k(x), as :class:`ndm.SeparableTransform` has it: no forward-mode AD.

    Args:
        network: called as ``network(x, t)`` with t = 0, it returns c ``(B, K, *event)``: a network of this library with ``outputs=K``, or any
            other ``nn.Module``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self._shifted = SeparableTransform(network, "time")  # x + h

    @property
    def network(self) -> nn.Module:
        """Its network."""
        return self._shifted.network

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return self.with_derivative(x, level)[0]

    def with_derivative(self, x: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._shifted.curve(x).added(level)

    def curve(self, transform: Transform, x: Tensor) -> "ScaledCurve":
        return _SeparableScaledCurve(transform, self, x, self._shifted.curve(x))


@dataclass(frozen=True)
class Stretched:
    """What becomes of noise eps at fixed x; each ``(B, *event)``."""

    noise: Tensor
    """S eps"""
    rate: Tensor
    """S' eps, the derivative in t."""
    whitened: Tensor
    """S^-T eps, so that the gradient of log q(z_t|x) in z is -S^-T eps / sigma."""


class StretchedCurve(Curve):
    """t -> F(x, t), as the curve of the transformation has it, and t -> S(x, t), at fixed x.

    Args:
        transform: F.
        x: the data ``(B, *event)``.
    """

    def __init__(self, transform: Transform, x: Tensor):
        super().__init__(transform, x)
        self._inner = transform.curve(x)

    @property
    def like(self) -> Tensor:
        return self._inner.like

    def at(self, level: NoiseLevel) -> Tensor:
        return self._inner.at(level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._inner.with_derivative(level)

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._inner.at_both(s, t)

    @abstractmethod
    def stretched(self, noise: Tensor, level: NoiseLevel) -> Stretched:
        """What S(x, t) makes of noise ``(B, *event)``."""

    @abstractmethod
    def marginal(self, of_ndm: Gaussian, level: NoiseLevel) -> Gaussian:
        """q(z_t|x), given what it would be for S = 1."""

    @abstractmethod
    def extra_drift(self, away: Tensor, level: NoiseLevel, rate: Tensor) -> Tensor:
        """(S' S^-1 + rate ((S S^T)^-1 - 1)) (z - mu), which the drift given x has more than for S = 1; ``away`` is z - mu, ``(B, *event)``."""


class ScaledCurve(StretchedCurve):
    """t -> F(x, t) and t -> h(x, t), at fixed x ``(B, *event)``."""

    def __init__(self, transform: Transform, scale: Scale, x: Tensor):
        super().__init__(transform, x)
        self._scale = scale

    def log_scale(self, level: NoiseLevel) -> Tensor:
        """h(x, t)."""
        return self._scale(self._x, level)

    def log_scale_with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """h(x, t) and its derivative in t."""
        return self._scale.with_derivative(self._x, level)

    def stretched(self, noise: Tensor, level: NoiseLevel) -> Stretched:
        log_scale, rate = self.log_scale_with_derivative(level)
        spread = log_scale.exp() * noise
        return Stretched(spread, rate * spread, torch.exp(-log_scale) * noise)

    def marginal(self, of_ndm: Gaussian, level: NoiseLevel) -> Gaussian:
        return Gaussian(of_ndm.mean, of_ndm.std * self.log_scale(level).exp())

    def extra_drift(self, away: Tensor, level: NoiseLevel, rate: Tensor) -> Tensor:
        log_scale, derivative = self.log_scale_with_derivative(level)
        return (derivative + rate * torch.expm1(-2 * log_scale)) * away


class _SeparableScaledCurve(ScaledCurve):
    """The network of h evaluated once for all times; ``shifted`` is t -> x + h(x, t)."""

    def __init__(self, transform: Transform, scale: Scale, x: Tensor, shifted: SumCurve):
        super().__init__(transform, scale, x)
        self._shifted = shifted

    def log_scale(self, level: NoiseLevel) -> Tensor:
        return self._shifted.added(level)[0]

    def log_scale_with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._shifted.added(level)


class ScaledProcess(ForwardProcess):
    """q(z_t|x) = N(alpha_t F(x, t), sigma_t² S S^T), S = S(x, t), in continuous time alone: every posterior is refused.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
        scale: S(x, t), such as exp(h(x, t)).
    """

    def __init__(self, schedule: Schedule, transform: Transform, scale: Stretch):
        super().__init__(schedule, transform)
        self.scale = scale

    def curve(self, x: Tensor) -> StretchedCurve:
        """t -> F(x, t) and t -> S(x, t)."""
        return self.scale.curve(self.transform, x)

    def marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        curve = curve or self.curve(x)
        if not isinstance(curve, StretchedCurve):
            raise UserError(f"NFDM needs t -> S(x, t) beside t -> F(x, t), not a {type(curve).__name__}: take process.curve(x)")
        return curve.marginal(super().marginal_of(curve.at(level), level), level)

    def first_marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        """q(z_0|x) = N(alpha_0 F(x, 0), sigma_0² I), as S(x, 0) = 1."""
        transformed = x if self.transform.data_at_zero else (curve or self.curve(x)).at(level)
        return super().marginal_of(transformed, level)

    def drift(self, z: Tensor, x: Tensor, level: NoiseLevel, eta: float = 1.0) -> Tensor:
        return self.drift_along(z, self.curve(x), level, eta)

    def drift_along(self, z: Tensor, curve: StretchedCurve, level: NoiseLevel, eta: float = 1.0) -> Tensor:
        """The drift given t -> F(x, t) and t -> S(x, t)."""
        value, derivative = curve.with_derivative(level)
        of_ndm = super().drift_of(z, (value, derivative), level, eta)
        rate = 0.5 * eta**2 * expand(level.dgamma, z) if eta else torch.zeros_like(z)
        return of_ndm + curve.extra_drift(z - expand(level.alpha, z) * value, level, rate)

    def check_discrete(self) -> NoReturn:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            "NFDM is a model in continuous time: leave steps out of its bound, and sample with method='sde' or 'ode'; for discrete time, "
            "ancestral sampling or compression take ndm.NDM"
        )

    def marginal_of(self, transformed: Tensor, level: NoiseLevel) -> NoReturn:
        """Refuse, since F alone does not give the marginal; discrete time asks for it."""
        self.check_discrete()

    @staticmethod
    def drift_of(z: Tensor, transformed: tuple[Tensor, Tensor], level: NoiseLevel, eta: float = 1.0) -> NoReturn:
        """Refuse, since F alone does not give the drift."""
        raise UserError("the drift of NFDM needs S(x, t) beside F(x, t): use drift or drift_along")

    def _posterior(self, *_: object) -> NoReturn:  # type: ignore[override]
        self.check_discrete()


def _scaled(curve: Curve) -> ScaledCurve:
    """The curve, which must be one of a :class:`ScaledProcess`."""
    if not isinstance(curve, ScaledCurve):
        raise UserError(f"NFDM needs t -> h(x, t) beside t -> F(x, t), not a {type(curve).__name__}: take process.curve(x)")
    return curve


class ScaledReverse(ReverseProcess):
    """The tied reverse process: x̂ goes through F and through h."""

    process: ScaledProcess

    def continuous_error(
        self, curve: Curve, noise: Tensor, level: NoiseLevel, eta: float | Tensor, coin: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """The norm's argument in the diffusion term of this module, ``(B, *event)``; arguments as :class:`ndm.reverse.ReverseProcess`."""
        curve, at = _scaled(curve), level.expand(noise)
        value, derivative = curve.with_derivative(level)
        log_scale, rate = curve.log_scale_with_derivative(level)
        spread = log_scale.exp() * noise  # (z - mu)/sigma
        guess = _scaled(self.process.curve(self.predictor(at.alpha * value + at.sigma * spread, level)))
        guess_value, guess_derivative = guess.with_derivative(level)
        guess_log_scale, guess_rate = guess.log_scale_with_derivative(level)
        difference, tightness = value - guess_value, eta**2 * torch.exp(-2 * guess_log_scale)
        of_mean = (derivative - guess_derivative - guess_rate * difference) * at.inverse_dgamma - 0.5 * (1 + tightness) * difference
        of_scale = (rate - guess_rate) * at.inverse_dgamma + 0.5 * tightness * torch.expm1(-2 * (log_scale - guess_log_scale))
        return of_mean + at.sigma / at.alpha * spread * of_scale, None

    def posterior(self, z: Tensor, s: NoiseLevel, t: NoiseLevel, eta: float | Tensor) -> NoReturn:
        """Refuse: there is no discrete-time model."""
        self.process.check_discrete()

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """f(z, t, x̂(z, t)), ``(B, *event)``."""
        return self.process.drift_along(z, self.process.curve(self.predictor(z, level)), level, eta)


class NFDM(NDM):
    """A Neural Flow Diffusion Model with Gaussian marginals (Bartosh, Vetrov, Naesseth, NeurIPS 2024), in continuous time. Any event shape.

    Bound, SDE, ODE and likelihood are used as those of :class:`ndm.NDM`. Discrete time, ancestral sampling and compression are refused.

    Args:
        schedule: noise levels over time.
        transform: F(x, t); latents must have the shape of the data.
        scale: h(x, t), log of the standard deviation over sigma_t.
        predictor: x̂(z, t).
        decoder: p(x|z_0).
        times: how times are drawn in training; low-discrepancy by default.
        steps: None, continuous time.
        eta: stochasticity of the reverse process whose bound is trained, positive: g = eta sigma sqrt(gamma').
        reverse: ``tied``.

    Raises:
        UserError: steps or another reverse process is asked for, or the schedule keeps no signal at t = 1, so that g is infinite there,
            while S(x, 1) depends on x.
    """

    process: ScaledProcess

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        scale: Scale,
        predictor: Predictor,
        decoder: Decoder,
        times: TimeSampler | None = None,
        steps: None = None,
        eta: float = 1.0,
        reverse: Literal["tied"] = "tied",
    ):
        if steps is not None:
            raise UserError(f"steps={steps}: NFDM is a model in continuous time, leave steps out; for discrete time take ndm.NDM")
        if reverse != "tied":
            raise UserError(f"reverse={reverse!r}: x̂ must go through F and S, so NFDM knows reverse='tied' alone; for others take ndm.NDM")
        if not isinstance(scale, Scale):
            raise UserError(
                f"scale is a {type(scale).__name__}: NFDM needs one h(x, t) for each dimension, such as NetworkScale or SeparableScale"
            )
        if not transform.keeps_shape:
            raise UserError("F is an encoder into a space of its own, whose noise NFDM cannot scale by x; take ndm.NDM")
        super().__init__(schedule, transform, predictor, decoder, times, None, eta, reverse)
        self.process = ScaledProcess(schedule, transform, scale)
        with torch.no_grad():
            end = schedule(torch.ones(1, dtype=self.like.dtype, device=self.like.device))
        if not scale.one_at_end and bool((end.alpha == 0).any()):
            raise UserError(
                "the schedule keeps no signal at t = 1, where the bound is infinite unless S(x, 1) = 1: give the scale gate='bridge', or "
                "keep some signal, for example FlowMatching(alpha_1=1e-3)"
            )

    @property
    def scale(self) -> Scale:
        """The scale, h."""
        assert isinstance(self.process.scale, Scale)
        return self.process.scale

    @property
    def reverse_process(self) -> ScaledReverse:
        """The reverse process, with what samplers need."""
        return ScaledReverse(self.process, self.predictor, "tied", self.eta)

    def sample(self, shape: tuple[int, ...], method: Method | Sampler = "sde", **options: Any) -> Tensor:
        """Draw samples, by the SDE unless told otherwise; everything else as :meth:`ndm.NDM.sample`.

        Raises:
            UserError: the method is ``ancestral`` or ``ddim``, which are of discrete time.
        """
        return super().sample(shape, method, **options)
