r"""The reverse process: what replaces F(x, .) when x is unknown.

.. math::
    p(z_s|z_t) = q(z_s|z_t, F \to \hat F), \qquad dz = f(z, t, F \to \hat F)\,dt + g\,d\bar w .

Both of these and the bound depend on F only through one target y. The posterior mean is
:math:`k z_t + (\alpha_s - k\alpha_t)\, y`, and the drift is
:math:`(\sigma'/\sigma + \tfrac12\eta^2\gamma')\, z - \tfrac12(1 + \eta^2)\,\alpha\gamma'\, y`, with

.. math::
    y = \frac{\alpha_s F(x, s) - k \alpha_t F(x, t)}{\alpha_s - k \alpha_t} \;\longrightarrow\;
    y_\eta = F - \frac{2}{1 + \eta^2} \frac{\dot F}{\gamma'} \qquad (s \to t), \qquad
    F = x \text{ gives } y = x .

================  ========================================  ========================================
reverse           in place of F(x, .)                       properties
================  ========================================  ========================================
``tied``          F(x̂(z, t), .), x̂ the predictor            the paper; SDE, ODE and every eta
``direct``        a constant ŷ(z, t), the predictor         the generator is a plain diffusion: one
                                                            network evaluation a step; only the eta
                                                            of training (ours)
``direct-score``  the same; a second output F̂               every eta, so the ODE and its
                  estimates E[F|z_t]                        likelihood too (ours)
``diffenc``       F̂ + F(F̂, .) - F(F̂, t),                    DiffEnc: correct to first order in
                  F̂(z, t) the predictor                     F - x (Nielsen et al. 2024); every eta
================  ========================================  ========================================

Both outputs together give :math:`\dot F/\gamma' = \tfrac12(1+\eta^2)(\hat F - \hat y)`, and for
another eta'

.. math::
    \hat y_{\eta'} = \hat F - \frac{1 + \eta^2}{1 + \eta'^2} (\hat F - \hat y) .

F̂ is not part of the bound. It is trained by a regression whose gradient does not reach the forward
process and which needs no further network evaluation. One half of the batch carries the gradient of
the bound through z_t, times two; the other half carries that of the regression, times two, with z_t
fixed. Both gradients stay unbiased.

In discrete time the target is that of the T steps of training. With other numbers of steps, or with
another eta from both outputs, it is correct to first order in 1/T.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ndm.curve import Constant, Curve, mask_curve
from ndm.errors import UserError, check_choice
from ndm.forward import (
    ForwardProcess,
    Gaussian,
    NoisingProcess,
    drift_of,
    gaussian,
    posterior_coefficients,
)
from ndm.ode import LogDensity, OdeSettings, ode_log_prob
from ndm.parts import masked
from ndm.predictor import DataPredictor, Predictor
from ndm.random import RandomSource
from ndm.schedule import NoiseLevel
from ndm.shapes import expand, sum_event
from ndm.transform import Transform

ReverseKind = Literal["tied", "direct", "direct-score", "diffenc"]


class Reverse(ABC):
    """A learned reverse process in continuous time: its bound, SDE, ODE and likelihood."""

    process: NoisingProcess
    """The forward process."""
    eta: float
    """The eta of training."""

    @property
    def tosses(self) -> bool:
        """Whether its bound needs a coin, see :meth:`continuous_error`."""
        return False

    @property
    def serves_every_eta(self) -> bool:
        """Whether it can run with any eta, including eta = 0 (the ODE and DDIM)."""
        return True

    @property
    def learned_variance(self) -> bool:
        """Whether the variance of p(z_s|z_t) is learned, and depends on z_t."""
        return False

    @property
    def exact_density(self) -> bool:
        """Whether :meth:`log_prob` is a closed form that needs no ODE and no settings."""
        return False

    @property
    @abstractmethod
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that it is made of."""

    def repeated(self, count: int) -> "Reverse":
        """Return it for a batch that is ``count`` copies of this one, one after another.

        They differ if it is bound to the conditions of a batch.
        """
        return self

    def check_eta(self, eta: object) -> None:
        """Check that this reverse process can run with this eta.

        Raises:
            UserError: it cannot.
        """
        if not self.serves_every_eta and not (isinstance(eta, (int, float)) and eta == self.eta):
            shown = f"eta={eta:g}" if isinstance(eta, (int, float)) else "another eta"
            raise UserError(
                f"a direct reverse process only runs with the eta of training, {self.eta:g}, not"
                f" with {shown}: sample by ancestral or sde. The ODE, DDIM, the likelihood and"
                " fitted eta need a second output: train with reverse=direct-score, or tied"
            )

    @abstractmethod
    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """Predict the data from latents ``z`` ``(B, *event)`` at times ``(B,)``, in their shape."""

    @abstractmethod
    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the error of the drift and the loss of a second head.

        The error is the difference of the drifts over alpha gamma', whose square is in the bound.

        Args:
            curve: the curve of the forward process at the data.
            noise: standard normal, in the shape of F(x, t).
            level: the level at t.
            eta: eta of the bound; a tensor broadcasts against ``noise``.
            coin: a uniform number ``(1,)``, if :attr:`tosses`.

        Returns:
            The error ``(B, *event)``, and the loss ``(B,)`` in nats, or None.
        """

    @abstractmethod
    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """Return the drift f(z, t), ``(B, *event)``."""

    @abstractmethod
    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        """Return log p(z_0) of latents ``z`` ``(B, *event)`` under the generative ODE.

        Args:
            z: z_0; the computation runs in its dtype.
            settings: solver, tolerance, probes.
            source: random source of the probes.
            progress: show progress bars.
        """


class Guess(NamedTuple):
    """What a reverse process puts in place of F(x, .) at z_t."""

    curve: Curve
    """The curve."""
    regression: Tensor | None = None
    """Loss of a second head, ``(B,)``, nats."""
    variance: Tensor | None = None
    """s², the variance of the error of the prediction, ``(B, *event)``; None if it is not learned.
    """


class MarkovReverse(Reverse):
    """A reverse process with posteriors p(z_s|z_t).

    It adds discrete time, ancestral sampling and compression.
    """

    process: ForwardProcess

    @abstractmethod
    def curve(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Curve:
        """Return the curve that replaces F(x, .) at latents ``z`` ``(B, *event)``, times ``(B,)``.

        It takes one evaluation of the predictor.

        Raises:
            UserError: this reverse process cannot run with this eta.
        """

    def guess(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Guess:
        """Return :meth:`curve` with the variance of its error, if that is learned."""
        return Guess(self.curve(z, level, eta))

    @abstractmethod
    def training_guess(
        self,
        transformed: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> Guess:
        """Return the guess at z_t drawn from q(z_t|x) by ``noise``.

        Args:
            transformed: F(x, t), ``(B, *event)``.
            noise: standard normal, ``(B, *event)``.
            level: the level at t.
            eta: eta of the bound.
            coin: a uniform number ``(1,)`` that decides which half of the batch trains the second
                head; None means the odd examples train the bound and the even ones the head.

        Returns:
            The guess. Its regression is ½ e^-gamma gamma' ||F - F̂||², or None without a second
            head or without gradients.
        """

    def posterior(self, z: Tensor, s: NoiseLevel, t: NoiseLevel, eta: float | Tensor) -> Gaussian:
        """Return p(z_s|z_t), with the learned variance if there is one and eta is not 0."""
        guess = self.guess(z, t, eta)
        posterior = self.process.posterior_of(z, guess.curve.at_both(s, t), s, t, eta)
        if guess.variance is None or (not isinstance(eta, Tensor) and eta == 0):
            return posterior
        step = posterior_coefficients(s.expand(z), t.expand(z), eta)
        added = step.target_weight**2 * guess.variance
        return Gaussian(posterior.mean, (step.variance + added).sqrt())


def require_markov(reverse: Reverse, what: str) -> MarkovReverse:
    """Return the reverse process if it has posteriors p(z_s|z_t).

    Raises:
        UserError: it is defined in continuous time only.
    """
    if not isinstance(reverse, MarkovReverse):
        raise UserError(
            f"{what} needs posteriors p(z_s|z_t), but this model is in continuous time only: leave"
            " steps out of its bound, sample by method='sde' or 'ode', or use ndm.NDM"
        )
    return reverse


@dataclass(frozen=True)
class ReverseProcess(MarkovReverse):
    """The reverse process of a Neural Diffusion Model.

    Raises:
        UserError: the kind is unknown, or does not fit the transformation.
    """

    process: ForwardProcess
    """The forward process."""
    predictor: DataPredictor
    """x̂ for tied, ŷ for direct (and F̂, its second output), F̂ for diffenc."""
    kind: ReverseKind = "tied"
    """``tied``, ``direct``, ``direct-score`` or ``diffenc``."""
    eta: float = 1.0
    """The eta that ŷ is trained for; only a direct reverse depends on it."""

    def __post_init__(self) -> None:
        """Check the kind."""
        check_choice("reverse", self.kind, get_args(ReverseKind))
        transform = self.process.transform
        if self.kind in ("tied", "diffenc") and not transform.keeps_shape:
            raise UserError(
                f"reverse={self.kind} passes the prediction through F, but"
                f" {type(transform).__name__} maps data into another space; use reverse=direct,"
                " whose predictor predicts the latent itself"
            )

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.process, self.predictor

    def repeated(self, count: int) -> "ReverseProcess":
        process, predictor = self.process.repeated(count), self.predictor.repeated(count)
        return replace(self, process=process, predictor=predictor)

    @property
    def tosses(self) -> bool:
        return self.kind == "direct-score" and torch.is_grad_enabled()

    @property
    def learned_variance(self) -> bool:
        return self.predictor.learned_variance

    @property
    def serves_every_eta(self) -> bool:
        return self.kind != "direct" or self.process.transform.constant

    def curve(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Curve:
        return self.guess(z, level, eta).curve

    def guess(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Guess:
        if self.kind in ("direct", "direct-score"):
            self.check_eta(eta)
        if self.kind == "direct-score":
            return self._guess(Constant(self._target(*self._two_headed.two(z, level), eta)))
        prediction, variance = self.predictor.with_variance(z, level)
        curve: Curve = Constant(prediction)
        if self.kind == "tied":
            curve = self.process.curve(prediction)
        elif self.kind == "diffenc":
            curve = _Shifted(self.process.transform, prediction, level)
        return self._guess(curve, variance=variance)

    def _guess(
        self, curve: Curve, regression: Tensor | None = None, variance: Tensor | None = None
    ) -> Guess:
        """Return a guess of the missing dimensions."""
        missing = self.process.missing
        if missing is not None and variance is not None:
            variance = masked(variance, missing)
        return Guess(mask_curve(curve, missing), regression, variance)

    @property
    def _two_headed(self) -> Predictor:
        return cast(Predictor, self.predictor)  # DataPredictor.check rejects any other

    def _target(self, target: Tensor, transformed: Tensor, eta: float | Tensor) -> Tensor:
        """Return ŷ for another eta."""
        if not isinstance(eta, Tensor) and eta == self.eta:
            return target
        return transformed - (1 + self.eta**2) / (1 + eta**2) * (transformed - target)

    def training_guess(
        self,
        transformed: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> Guess:
        missing = self.process.missing
        z = gaussian(transformed, level, missing).sample(noise)
        if not self.tosses:
            return self.guess(z, level, eta)
        parity = torch.arange(len(z), device=z.device) + (0 if coin is None else coin < 0.5)
        of_bound = (parity % 2).to(z)
        fixed = z.detach()
        # The same value, with the gradient doubled for the half of the bound and cut for the other.
        z = fixed + 2 * expand(of_bound, z) * (z - fixed)
        first, second = self._two_headed.two_outputs(z, level)
        fixed_level = level.detach()  # a learned schedule belongs to the forward process too
        estimate = self._two_headed.read(second, fixed, fixed_level)
        error = sum_event(masked((transformed.detach() - estimate) ** 2, missing))
        regression = (1 - of_bound) * fixed_level.snr_decay * error
        y, f = (self._two_headed.read(output, z, level) for output in (first, second))
        return self._guess(Constant(self._target(y, f, eta)), regression)

    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        value, derivative = curve.with_derivative(level)
        guess, regression, _ = self.training_guess(value, noise, level, eta, coin)
        guess_value, guess_derivative = guess.with_derivative(level)
        slope = (derivative - guess_derivative) * expand(level.inverse_dgamma, value)
        return slope - 0.5 * (1 + eta**2) * (value - guess_value), regression

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        found = drift_of(z, self.curve(z, level, eta).with_derivative(level), level, eta)
        return masked(found, self.process.missing)

    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        if self.kind == "direct-score":
            return self._two_headed.two(z, level)[0]
        return self.predictor(z, level)

    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        return ode_log_prob(self, z, settings, source, progress)


class _Shifted(Curve):
    """The curve F̂ + F(F̂, .) - F(F̂, t), which equals F̂ at t and has the slope of F at F̂."""

    def __init__(self, transform: Transform, guess: Tensor, level: NoiseLevel):
        self._x, self._inner, self._level = guess, transform.curve(guess), level

    @property
    def like(self) -> Tensor:
        return self._x

    def at(self, level: NoiseLevel) -> Tensor:
        at, here = self._inner.at_both(level, self._level)
        return self._x + at - here

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        value, derivative = self._inner.with_derivative(level)
        here = value if level is self._level else self._inner.at(self._level)
        return self._x + value - here, derivative

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        at_s, at_t = self._inner.at_both(s, t)
        here = at_t if t is self._level else self._inner.at(self._level)
        return self._x + at_s - here, self._x + at_t - here
