r"""Gaussian Neural Flow Diffusion Models: the noise of the forward process is learned.

.. math::
    q(z_t|x) = N(\mu, \mathrm{diag}\, s^2), \qquad \mu = \alpha_t F(x, t), \qquad
    s = \sigma_t\, e^{h(x, t)}, \qquad h(x, 0) = 0 ,

with one h for each dimension. With S = exp(h) = 1 this is a Neural Diffusion Model. For the scalar
diffusion coefficient of the schedule, :math:`g^2 = \eta^2 \sigma^2 \gamma'`, these marginals belong
to the reverse-time SDE dz = f dt + g dw with

.. math::
    f(z, t, x) = \dot\mu + \Bigl(\frac{\dot s}{s} + \frac{g^2}{2 s^2}\Bigr)(z - \mu)
    = f_{\mathrm{NDM}}(z, t, x)
    + \bigl(\dot h + \tfrac12 \eta^2 \gamma'\, (e^{-2h} - 1)\bigr)(z - \mu) ,

and the generative process replaces x by :math:`\hat x(z, t)` in F and in h. Two SDEs with the same
g differ only in their drifts:

.. math::
    L_{\text{diffusion}} = E_t \frac{1}{2 g^2} \|f(z, t, x) - f(z, t, \hat x)\|^2
    = E_t \frac{e^{-\gamma}\gamma'}{2\eta^2} \Bigl\|
    \frac{\Delta\dot F - \dot{\hat h} \Delta F}{\gamma'}
    - \tfrac12 (1 + \eta^2 e^{-2\hat h})\, \Delta F
    + e^{\gamma/2} e^{h} \epsilon \Bigl[ \frac{\Delta\dot h}{\gamma'}
    + \tfrac12 \eta^2 e^{-2\hat h}\, \mathrm{expm1}(-2\Delta h) \Bigr] \Bigr\|^2 ,

where the hat means x̂ for x, Δ is the value at x minus that at x̂, and z = mu + s eps. All large
terms have been canceled by hand: :math:`z - \hat\mu = s\epsilon + \alpha\Delta F` and
:math:`\alpha' - \alpha\sigma'/\sigma = -\tfrac12\alpha\gamma'`. At h = 0 this is the formula of
:mod:`ndm.elbo`. The prior term is :math:`KL(N(\mu_1, \mathrm{diag}\, s_1^2) \| N(0, I))`, and the
reconstruction term is that of NDM.

If F is affine in x and h does not depend on x, the exact E[x|z_t] gives the generative process the
marginals of the forward process. Otherwise the tied reverse process is a restriction.

Source: Neural Flow Diffusion Models (Bartosh, Vetrov, Naesseth 2024), sections 3 and 4. There g is
learned too; here it is eta sigma sqrt(gamma') of the schedule. The model has no posteriors
q(z_s|z_t,x), so it runs in continuous time only.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ndm.curve import Curve
from ndm.decoder import Decoder
from ndm.errors import UserError, check_choice
from ndm.forward import Gaussian, NoisingProcess, drift_of, gaussian
from ndm.model import DiffusionModel
from ndm.ode import LogDensity, OdeSettings, ode_log_prob
from ndm.parts import Part, check_part
from ndm.predictor import DataPredictor
from ndm.random import RandomSource
from ndm.reverse import Reverse
from ndm.schedule import NoiseLevel, Schedule
from ndm.shapes import expand
from ndm.time_sampling import TimeSampler
from ndm.transform import Displacement, NetworkDisplacement, SeparableDisplacement, Transform


class NoiseScale(Part, ABC):
    """A factor S(x, t) of the noise sigma_t eps.

    S(x, 0) must be 1, since the decoder uses sigma_0.
    """

    @abstractmethod
    def curve(self, transform: Transform, x: Tensor) -> "ScaledCurve":
        """Return t -> F(x, t) and t -> S(x, t) for ``x`` ``(B, *event)``."""


class DiagonalScale(NoiseScale, ABC):
    """A factor S(x, t) = exp(h(x, t)) for each dimension, with h(x, 0) = 0."""

    one_at_end: bool = False
    """Whether S(x, 1) is 1 too."""

    @abstractmethod
    def log_scale(self, x: Tensor) -> Curve:
        """Return t -> h(x, t) for ``x`` ``(B, *event)``."""

    def forward(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """Return h(x, t) for ``x`` ``(B, *event)`` at times ``(B,)``; ``(B, *event)``."""
        return self.log_scale(x).at(level)

    def curve(self, transform: Transform, x: Tensor) -> "DiagonalCurve":
        return DiagonalCurve(transform.curve(x), self.log_scale(x))


class _LearnedScale(DiagonalScale):
    """h is a displacement, so training starts at S = 1."""

    def __init__(self, displacement: Displacement):
        super().__init__()
        self.displacement = displacement
        self.one_at_end = displacement.gate == "bridge"

    @property
    def network(self) -> nn.Module:
        """The network of h."""
        return self.displacement.network

    @property
    def gate(self) -> str:
        """The gate of h."""
        return self.displacement.gate

    def log_scale(self, x: Tensor) -> Curve:
        return self.displacement.curve(x)


class NetworkScale(_LearnedScale):
    """The scale h = w(t) f(x, t) with a network f; see :class:`ndm.transform.NetworkDisplacement`.

    Args:
        network: f, any ``nn.Module`` called as ``network(x, t)`` with ``(B, *event)`` and ``(B,)``,
            differentiable in t by forward mode.
        gate: w(t): ``time`` is t, where only the prior term keeps S(x, 1) near 1; ``bridge`` is
            t (1 - t), as in the paper, where S(x, 1) = 1.
    """

    def __init__(self, network: nn.Module, gate: Literal["time", "bridge"] = "time"):
        check_choice("gate", gate, ("time", "bridge"))
        super().__init__(NetworkDisplacement(network, gate))


class SeparableScale(_LearnedScale):
    """The time-separable scale h = w(t) sum_k cos(pi k t) c_k(x).

    See :class:`ndm.transform.SeparableDisplacement`.

    Args:
        network: called as ``network(x, t)`` with t = 0; it returns c ``(B, K, *event)``: a network
            of this library with ``outputs=K``, or any other ``nn.Module``.
        gate: w(t): ``time`` is t, ``bridge`` is t (1 - t).
    """

    def __init__(self, network: nn.Module, gate: Literal["time", "bridge"] = "time"):
        check_choice("gate", gate, ("time", "bridge"))
        super().__init__(SeparableDisplacement(network, gate))


@dataclass(frozen=True)
class ScaledNoise:
    """Noise eps transformed by S at fixed x; each ``(B, *event)``."""

    noise: Tensor
    """S eps"""
    rate: Tensor
    """S' eps, the derivative in t."""
    whitened: Tensor
    """S^-T eps; the gradient of log q(z_t|x) in z is -S^-T eps / sigma."""


class ScaledCurve(Curve, ABC):
    """The curves t -> F(x, t) and t -> S(x, t) at fixed x.

    Args:
        transformed: t -> F(x, t).
    """

    def __init__(self, transformed: Curve):
        self._transformed = transformed

    @property
    def like(self) -> Tensor:
        return self._transformed.like

    def at(self, level: NoiseLevel) -> Tensor:
        return self._transformed.at(level)

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        return self._transformed.with_derivative(level)

    @abstractmethod
    def scaled(self, noise: Tensor, level: NoiseLevel) -> ScaledNoise:
        """Return noise ``(B, *event)`` transformed by S(x, t)."""

    @abstractmethod
    def marginal(self, plain: Gaussian, level: NoiseLevel) -> Gaussian:
        """Return q(z_t|x), from the q(z_t|x) that S = 1 would give."""

    @abstractmethod
    def extra_drift(self, away: Tensor, level: NoiseLevel, rate: Tensor) -> Tensor:
        """Return the part of the drift that S adds, (S' S^-1 + rate ((S S^T)^-1 - 1)) (z - mu).

        ``away`` is z - mu, ``(B, *event)``.
        """


class DiagonalCurve(ScaledCurve):
    """The curves t -> F(x, t) and t -> h(x, t) at fixed x.

    Args:
        transformed: t -> F(x, t).
        log_scale: t -> h(x, t).
    """

    def __init__(self, transformed: Curve, log_scale: Curve):
        super().__init__(transformed)
        self.log_scale = log_scale

    def scaled(self, noise: Tensor, level: NoiseLevel) -> ScaledNoise:
        log_scale, rate = self.log_scale.with_derivative(level)
        spread = log_scale.exp() * noise
        return ScaledNoise(spread, rate * spread, torch.exp(-log_scale) * noise)

    def marginal(self, plain: Gaussian, level: NoiseLevel) -> Gaussian:
        return Gaussian(plain.mean, plain.std * self.log_scale.at(level).exp())

    def extra_drift(self, away: Tensor, level: NoiseLevel, rate: Tensor) -> Tensor:
        log_scale, derivative = self.log_scale.with_derivative(level)
        return (derivative + rate * torch.expm1(-2 * log_scale)) * away


class ScaledProcess(NoisingProcess):
    """The forward process q(z_t|x) = N(alpha_t F(x, t), sigma_t² S S^T), in continuous time.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
        scale: S(x, t), such as exp(h(x, t)).
    """

    def __init__(self, schedule: Schedule, transform: Transform, scale: NoiseScale):
        super().__init__(schedule, transform)
        self.scale = scale

    def curve(self, x: Tensor) -> ScaledCurve:
        """Return t -> F(x, t) and t -> S(x, t) at ``x`` ``(B, *event)``."""
        return self.scale.curve(self.transform, x)

    def marginal(self, x: Tensor, level: NoiseLevel, curve: Curve | None = None) -> Gaussian:
        curve = self.curve(x) if curve is None else curve
        assert isinstance(curve, ScaledCurve), "a curve of this process"
        return curve.marginal(gaussian(curve.at(level), level), level)

    def drift(self, z: Tensor, x: Tensor, level: NoiseLevel, eta: float = 1.0) -> Tensor:
        """Return the conditional reverse-time drift f(z, t, x), ``(B, *event)``.

        The diffusion coefficient is g = eta sigma sqrt(gamma').
        """
        return self.drift_along(z, self.curve(x), level, eta)

    @staticmethod
    def drift_along(z: Tensor, curve: ScaledCurve, level: NoiseLevel, eta: float = 1.0) -> Tensor:
        """Return the drift from t -> F(x, t) and t -> S(x, t)."""
        value, derivative = curve.with_derivative(level)
        plain = drift_of(z, (value, derivative), level, eta)
        rate = 0.5 * eta**2 * expand(level.dgamma, z) if eta else torch.zeros_like(z)
        return plain + curve.extra_drift(z - expand(level.alpha, z) * value, level, rate)


@dataclass(frozen=True)
class ScaledReverse(Reverse):
    """The tied reverse process, with x̂ in F and in h."""

    process: ScaledProcess
    """The forward process, with a diagonal scale."""
    predictor: DataPredictor
    """x̂."""
    eta: float = 1.0
    """The eta of training."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.process, self.predictor

    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.predictor(z, level)

    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Return the argument of the norm in the diffusion term above, ``(B, *event)``."""
        at = level.expand(noise)
        value, derivative = curve.with_derivative(level)
        log_scale, rate = _diagonal(curve).log_scale.with_derivative(level)
        spread = log_scale.exp() * noise  # (z - mu)/sigma
        z = at.alpha * value + at.sigma * spread
        guess = _diagonal(self.process.curve(self.predictor(z, level)))
        guess_value, guess_derivative = guess.with_derivative(level)
        guess_log_scale, guess_rate = guess.log_scale.with_derivative(level)
        difference, tightness = value - guess_value, eta**2 * torch.exp(-2 * guess_log_scale)
        slope = (derivative - guess_derivative - guess_rate * difference) * at.inverse_dgamma
        of_mean = slope - 0.5 * (1 + tightness) * difference
        narrower = torch.expm1(-2 * (log_scale - guess_log_scale))
        of_scale = (rate - guess_rate) * at.inverse_dgamma + 0.5 * tightness * narrower
        return of_mean + at.sigma / at.alpha * spread * of_scale, None

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        return self.process.drift_along(z, self.process.curve(self.predictor(z, level)), level, eta)

    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        return ode_log_prob(self, z, settings, source, progress)


def _diagonal(curve: Curve) -> DiagonalCurve:
    assert isinstance(curve, DiagonalCurve), "a curve of a process with a diagonal scale"
    return curve


class NFDM(DiffusionModel):
    """A Neural Flow Diffusion Model with Gaussian marginals, for events of any shape.

    It runs in continuous time only. Source: Bartosh, Vetrov, Naesseth, NeurIPS 2024.

    Args:
        schedule: noise levels over time.
        transform: F(x, t); latents must have the shape of the data.
        scale: h(x, t), the logarithm of the standard deviation over sigma_t.
        predictor: x̂(z, t).
        decoder: p(x|z_0).
        time_sampler: how times are drawn in training; low-discrepancy by default.
        eta: stochasticity of the reverse process whose bound is trained, positive: g = eta sigma
            sqrt(gamma').

    Raises:
        UserError: parts do not fit together, or S(x, 1) depends on x while the schedule keeps no
            signal at t = 1, so that g is infinite there.
    """

    process: ScaledProcess

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        scale: DiagonalScale,
        predictor: DataPredictor,
        decoder: Decoder,
        time_sampler: TimeSampler | None = None,
        eta: float = 1.0,
    ):
        check_part("scale", scale, DiagonalScale, "ndm.NetworkScale(network)")
        check_part("predictor", predictor, DataPredictor, "ndm.Predictor(network)")
        check_part("transform", transform, Transform, "ndm.NetworkTransform(network)")
        if not transform.keeps_shape:
            raise UserError(
                "F is an encoder into another space, whose noise NFDM cannot scale by x; use"
                " ndm.NDM"
            )
        process = ScaledProcess(schedule, transform, scale)
        super().__init__(process, decoder, time_sampler, None, eta)
        self.predictor = predictor
        predictor.check(self.process, decoder, "tied")
        with torch.no_grad():
            end = schedule(torch.ones(1, dtype=self.like.dtype, device=self.like.device))
        if not scale.one_at_end and bool((end.alpha == 0).any()):
            raise UserError(
                "the schedule keeps no signal at t = 1, where the bound is infinite unless S(x, 1)"
                " = 1: give the scale gate='bridge', or keep some signal, for example"
                " FlowMatchingSchedule(alpha_1=1e-3)"
            )

    @property
    def scale(self) -> NoiseScale:
        """The noise scale, h."""
        return self.process.scale

    @property
    def reverse_process(self) -> ScaledReverse:
        return ScaledReverse(self.process, self.predictor, self.eta)
