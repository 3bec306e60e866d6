r"""The reverse process: what takes the place of F(x, .) once x is not known.

.. math::
    p(z_s|z_t) = q(z_s|z_t, F \to \hat F), \qquad dz = f(z, t, F \to \hat F)\,dt + g\,d\bar w .

Both, and the bound, see F through one combination alone: the posterior mean is :math:`k z_t +
(\alpha_s - k\alpha_t)\, y`, and the drift is
:math:`(\sigma'/\sigma + \tfrac12\eta^2\gamma')\, z - \tfrac12(1 + \eta^2)\,\alpha\gamma'\, y`, with the target

.. math::
    y = \frac{\alpha_s F(x, s) - k \alpha_t F(x, t)}{\alpha_s - k \alpha_t} \;\longrightarrow\;
    y_\eta = F - \frac{2}{1 + \eta^2} \frac{\dot F}{\gamma'} \qquad (s \to t), \qquad F = x \text{ gives } y = x .

================  =====================================================  ========================================================
``tied``          F(x̂(z, t), .), x̂ the predictor                         the paper; SDE, ODE and every eta
``direct``        a constant, ŷ(z, t), the predictor's output            the generator is a plain diffusion: one network evaluation
                                                                         a step, the eta of training
                                                                         alone (ours)
``direct-score``  the same; a second output F̂ estimates E[F|z_t]         every eta, so the ODE and its likelihood, too (ours)
``diffenc``       F̂ + F(F̂, .) - F(F̂, t), F̂(z, t) the predictor         DiffEnc: right to first order in F - x (Nielsen et al. 2024);
                                                                         every eta
================  =====================================================  ========================================================

From both outputs :math:`\dot F/\gamma' = \tfrac12(1+\eta^2)(\hat F - \hat y)`, and for another eta'

.. math::
    \hat y_{\eta'} = \hat F - \frac{1 + \eta^2}{1 + \eta'^2} (\hat F - \hat y) .

F̂ is no part of the bound. It learns by a regression of its own whose gradient does not reach the
forward process, at no further evaluation: half of the examples of a batch carry the gradient of the
bound through z_t, twice, and the other half, with z_t held fixed, that of the regression, twice.
Both gradients stay unbiased.

The target of a model in discrete time is that of its own T steps. With other numbers of steps, or
with another eta from both outputs, it is right to first order in 1/T.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ndm.errors import UserError, check_choice
from ndm.forward import ForwardProcess, Gaussian, NoisingProcess, drift_of, gaussian
from ndm.ode import LogDensity, OdeSettings, ode_log_prob
from ndm.predictor import DataPredictor, Predictor
from ndm.random import RandomSource
from ndm.schedule import NoiseLevel
from ndm.shapes import expand, sum_event
from ndm.transform import Constant, Curve, Transform

ReverseKind = Literal["tied", "direct", "direct-score", "diffenc"]


class Reverse(ABC):
    """A learned reverse process in continuous time: what the bound, the SDE, the ODE and the
    likelihood need.
    """

    process: NoisingProcess
    """The forward process."""
    eta: float
    """The eta of training."""

    @property
    def tosses(self) -> bool:
        """Whether its bound takes a coin, see :meth:`continuous_error`."""
        return False

    @property
    def serves_every_eta(self) -> bool:
        """Whether it can run with another eta than that of training, eta = 0 (the ODE and DDIM)
        included.
        """
        return True

    @property
    @abstractmethod
    def parts(self) -> tuple[nn.Module, ...]:
        """The modules that it depends on."""

    def check_eta(self, eta: object) -> None:
        """Check that this reverse process can run with this eta.

        Raises:
            UserError: it cannot.
        """
        if not self.serves_every_eta and not (isinstance(eta, (int, float)) and eta == self.eta):
            shown = f"eta={eta:g}" if isinstance(eta, (int, float)) else "another eta"
            raise UserError(
                f"a direct reverse process runs with the noise of its training, eta={self.eta:g},"
                f" not with {shown}: sample by ancestral or sde. The ODE, DDIM, the likelihood and"
                " fitted eta need its second head: train with reverse=direct-score, or tied"
            )

    @abstractmethod
    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """What it predicts of the data from latents ``z`` ``(B, *event)`` at times ``(B,)``; ``(B,
        *event)``.
        """

    @abstractmethod
    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The difference of the drifts over alpha gamma', which the bound in continuous time
        squares, and the loss of a second head.

        Args:
            curve: that of the forward process at the data.
            noise: standard normal, in the shape of F(x, t).
            level: the level at t.
            eta: of the bound; a tensor broadcasts against ``noise``.
            coin: a uniform number ``(1,)`` for a reverse process that tosses.

        Returns:
            ``(B, *event)``, and ``(B,)``, nats, or None.
        """

    @abstractmethod
    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        """f(z, t), ``(B, *event)``."""

    @abstractmethod
    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        """log p(z_0) of latents ``z`` ``(B, *event)`` under the generative ODE.

        Args:
            z: z_0; its dtype is that of the whole computation.
            settings: solver, tolerance, probes.
            source: where the probes come from.
            progress: show progress bars.
        """


class MarkovReverse(Reverse):
    """A reverse process with posteriors p(z_s|z_t): discrete time, ancestral sampling and
    compression as well.
    """

    process: ForwardProcess

    @abstractmethod
    def curve(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Curve:
        """What stands for F(x, .) at latents ``z`` ``(B, *event)`` and times ``(B,)``, by one
        evaluation of the predictor.

        Raises:
            UserError: this reverse process cannot run with that eta.
        """

    @abstractmethod
    def learning_curve(
        self,
        transformed: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Curve, Tensor | None]:
        """The curve at z_t drawn from q(z_t|x) by ``noise``, for the bound; with a second head and
        gradients, its loss as well.

        Args:
            transformed: F(x, t), ``(B, *event)``.
            noise: standard normal, ``(B, *event)``.
            level: the level at t.
            eta: of the bound.
            coin: a uniform number ``(1,)``, which decides which half of the batch the second head
                learns from; None takes the odd ones.

        Returns:
            The curve, and ½ e^-gamma gamma' ||F - F̂||² ``(B,)``, nats, or None.
        """

    def posterior(self, z: Tensor, s: NoiseLevel, t: NoiseLevel, eta: float | Tensor) -> Gaussian:
        """p(z_s|z_t)."""
        return self.process.posterior_of(z, self.curve(z, t, eta).at_both(s, t), s, t, eta)


def require_markov(reverse: Reverse, what: str) -> MarkovReverse:
    """The reverse process, which must have posteriors p(z_s|z_t).

    Raises:
        UserError: it is one in continuous time only.
    """
    if not isinstance(reverse, MarkovReverse):
        raise UserError(
            f"{what} needs posteriors p(z_s|z_t), and this is a model in continuous time: leave"
            " steps out of its bound, sample by method='sde' or 'ode', or take ndm.NDM"
        )
    return reverse


@dataclass(frozen=True)
class ReverseProcess(MarkovReverse):
    """The reverse process of a Neural Diffusion Model.

    Raises:
        UserError: the kind is not known, or does not fit the transformation.
    """

    process: ForwardProcess
    """The forward process."""
    predictor: DataPredictor
    """x̂ of the tied reverse, ŷ of the direct one (and F̂, its second output), F̂ of DiffEnc's."""
    kind: ReverseKind = "tied"
    """``tied``, ``direct``, ``direct-score`` or ``diffenc``."""
    eta: float = 1.0
    """The eta that ŷ was trained for; a tied reverse serves all."""

    def __post_init__(self) -> None:
        """Check the kind."""
        check_choice("reverse", self.kind, get_args(ReverseKind))
        transform = self.process.transform
        if self.kind in ("tied", "diffenc") and not transform.keeps_shape:
            raise UserError(
                f"reverse={self.kind} puts the prediction through F, but {type(transform).__name__}"
                " maps data into a space of its own; use reverse=direct, whose predictor predicts"
                " the latent itself"
            )

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.process, self.predictor

    @property
    def tosses(self) -> bool:
        return self.kind == "direct-score" and torch.is_grad_enabled()

    @property
    def serves_every_eta(self) -> bool:
        return self.kind != "direct" or self.process.transform.constant

    def curve(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Curve:
        if self.kind == "tied":
            return self.process.curve(self.predictor(z, level))
        if self.kind == "diffenc":
            return _Shifted(self.process.transform, self.predictor(z, level), level)
        self.check_eta(eta)
        if self.kind == "direct":
            return Constant(self.predictor(z, level))
        return Constant(self._target(*self._two_headed.two(z, level), eta))

    @property
    def _two_headed(self) -> Predictor:
        return cast(Predictor, self.predictor)  # DataPredictor.check lets no other pass

    def _target(self, target: Tensor, transformed: Tensor, eta: float | Tensor) -> Tensor:
        """ŷ of another eta."""
        if not isinstance(eta, Tensor) and eta == self.eta:
            return target
        return transformed - (1 + self.eta**2) / (1 + eta**2) * (transformed - target)

    def learning_curve(
        self,
        transformed: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Curve, Tensor | None]:
        z = gaussian(transformed, level).sample(noise)
        if not self.tosses:
            return self.curve(z, level, eta), None
        parity = torch.arange(len(z), device=z.device) + (0 if coin is None else coin < 0.5)
        of_bound = (parity % 2).to(z)
        fixed = z.detach()
        z = fixed + 2 * expand(of_bound, z) * (
            z - fixed
        )  # the same value, half of the gradients doubled, the other half cut
        first, second = self._two_headed.two_outputs(z, level)
        apart = level.detach()  # a learned schedule belongs to the forward process, too
        error = sum_event((transformed.detach() - self._two_headed.read(second, fixed, apart)) ** 2)
        regression = (1 - of_bound) * apart.snr_decay * error
        target = self._target(
            self._two_headed.read(first, z, level), self._two_headed.read(second, z, level), eta
        )
        return Constant(target), regression

    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        value, derivative = curve.with_derivative(level)
        guess, regression = self.learning_curve(value, noise, level, eta, coin)
        guess_value, guess_derivative = guess.with_derivative(level)
        slope = (derivative - guess_derivative) * expand(level.inverse_dgamma, value)
        return slope - 0.5 * (1 + eta**2) * (value - guess_value), regression

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        return drift_of(z, self.curve(z, level, eta).with_derivative(level), level, eta)

    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return (
            self._two_headed.two(z, level)[0]
            if self.kind == "direct-score"
            else self.predictor(z, level)
        )

    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        return ode_log_prob(self, z, settings, source, progress)


class _Shifted(Curve):
    """F̂ + F(F̂, .) - F(F̂, t): passes through F̂ at t, and has the slope of F at F̂."""

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
