r"""Classifier-free guidance: samples that follow their condition more than p(x|c) does.

With the weight w, 1 is the conditional model, 0 the unconditional one. All that a sampler asks of
the reverse process, the posterior mean and the drift, is linear in the curve that replaces
F(x, .), in its value and its derivative together. So there are two ways:

.. math::
    \text{curve: } \; \hat F_w(\cdot) = w\, \hat F_c(\cdot) + (1 - w)\, \hat F_0(\cdot), \qquad
    \text{x: } \; \hat x_w = w\, \hat x_c + (1 - w)\, \hat x_0, \quad \hat F_w = F(\hat x_w, \cdot),

where :math:`\hat F_c` is the curve given c and :math:`\hat F_0` that given nothing. The first is
the guidance of Ho & Salimans (2022) for mean, drift and score at once, for every sampler and eta;
the second evaluates F once. Both are the same for F linear in x, and for direct reverse processes.
Guiding the value alone, without the derivative, would be wrong.

An F that takes the condition cannot be guided: q(z_t|x, c) and q(z_t|x) are then two forward
processes, and w is no power of p(c|z_t). No form of guidance draws from p(x|c)^w p(x)^(1-w), so a
guided model has no likelihood, and samplers differ for w other than 0 and 1.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ndm.condition import Condition
from ndm.curve import Curve
from ndm.errors import UserError, check_choice, describe_value
from ndm.forward import ForwardProcess, drift_of
from ndm.ode import LogDensity, OdeSettings
from ndm.predictor import DataPredictor
from ndm.random import RandomSource
from ndm.reverse import Guess, MarkovReverse, Reverse, ReverseProcess
from ndm.schedule import NoiseLevel

Guide = Literal["curve", "x"]


def guided(
    reverse: Reverse, condition: Condition | None, weight: float, guide: Guide = "curve"
) -> Reverse:
    """Return the guided reverse process of a model that is bound to a condition.

    Args:
        reverse: the reverse process, bound to the condition.
        condition: the kind of the condition.
        weight: w; 1 is the conditional model, 0 the unconditional one.
        guide: what is guided, ``curve`` or ``x``.

    Raises:
        UserError: the model cannot be guided.
    """
    check_choice("guide", guide, get_args(Guide))
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6:
        raise UserError(
            f"guidance={describe_value(weight)}: give a number of at least 0; 1 is the conditional"
            " model, 0 the unconditional one"
        )
    if weight == 1:
        return reverse
    if condition is None or not isinstance(reverse, ReverseProcess):
        raise UserError("guidance needs a model with a condition: train one with model.condition")
    if not condition.has_null:
        raise UserError(
            "guidance needs p(x) beside p(x|c), and the model was trained without dropping its"
            f" condition: train with {type(condition).__name__}(dropout=0.1)"
        )
    if reverse.process.conditional:
        raise UserError(
            "the transformation F of this model takes the condition, so the model cannot be guided;"
            " train one whose predictor alone takes it, or sample without guidance"
        )
    null = condition.null()
    if guide == "x" and reverse.kind != "direct-score":
        predictor = _GuidedPredictor(reverse.predictor, reverse.predictor.bind(null), float(weight))
        return replace(reverse, predictor=predictor)
    return GuidedReverse(reverse, replace(reverse, predictor=reverse.predictor.bind(null)), weight)


@dataclass(frozen=True)
class GuidedReverse(MarkovReverse):
    """A reverse process whose curve is w times one of two curves plus 1 - w times the other."""

    given: ReverseProcess
    """The reverse process given c."""
    null: ReverseProcess
    """The reverse process given nothing."""
    weight: float
    """w."""

    @property
    def process(self) -> ForwardProcess:  # type: ignore[override]
        """The forward process."""
        return self.given.process

    @property
    def eta(self) -> float:  # type: ignore[override]
        """The eta of training."""
        return self.given.eta

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        return self.given.parts

    @property
    def learned_variance(self) -> bool:
        return self.given.learned_variance

    @property
    def serves_every_eta(self) -> bool:
        return self.given.serves_every_eta

    def curve(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Curve:
        return self.guess(z, level, eta).curve

    def guess(self, z: Tensor, level: NoiseLevel, eta: float | Tensor) -> Guess:
        """Return the guided curve, with the learned variance given c."""
        given, null = self.given.guess(z, level, eta), self.null.guess(z, level, eta)
        return Guess(_Mixed(given.curve, null.curve, self.weight), variance=given.variance)

    def drift(self, z: Tensor, level: NoiseLevel, eta: float) -> Tensor:
        return drift_of(z, self.curve(z, level, eta).with_derivative(level), level, eta)

    def predict(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return torch.lerp(
            self.null.predict(z, level), self.given.predict(z, level), float(self.weight)
        )

    def training_guess(
        self,
        transformed: Tensor,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> Guess:
        raise _no_likelihood()

    def continuous_error(
        self,
        curve: Curve,
        noise: Tensor,
        level: NoiseLevel,
        eta: float | Tensor,
        coin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        raise _no_likelihood()

    def log_prob(
        self,
        z: Tensor,
        settings: OdeSettings | None = None,
        source: RandomSource = None,
        progress: bool = False,
    ) -> LogDensity:
        raise _no_likelihood()


def _no_likelihood() -> UserError:
    return UserError("a guided sampler has no bound and no likelihood: measure the model itself")


class _Mixed(Curve):
    """The curve w a + (1 - w) b."""

    def __init__(self, a: Curve, b: Curve, weight: float):
        self._a, self._b, self._weight = a, b, weight

    @property
    def like(self) -> Tensor:
        return self._a.like

    def _mix(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.lerp(b, a, self._weight)

    def at(self, level: NoiseLevel) -> Tensor:
        return self._mix(self._a.at(level), self._b.at(level))

    def with_derivative(self, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        pairs = zip(self._a.with_derivative(level), self._b.with_derivative(level), strict=True)
        value, slope = (self._mix(a, b) for a, b in pairs)
        return value, slope

    def at_both(self, s: NoiseLevel, t: NoiseLevel) -> tuple[Tensor, Tensor]:
        pairs = zip(self._a.at_both(s, t), self._b.at_both(s, t), strict=True)
        at_s, at_t = (self._mix(a, b) for a, b in pairs)
        return at_s, at_t


class _GuidedPredictor(DataPredictor):
    """The prediction w x̂_c + (1 - w) x̂_0, with the learned variance given c."""

    def __init__(self, given: DataPredictor, null: DataPredictor, weight: float):
        super().__init__()
        self.given, self.null, self.weight = given, null, weight
        self.learned_variance = given.learned_variance

    def forward(self, z: Tensor, level: NoiseLevel) -> Tensor:
        return torch.lerp(self.null(z, level), self.given(z, level), self.weight)

    def with_variance(self, z: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor | None]:
        prediction, variance = self.given.with_variance(z, level)
        return torch.lerp(self.null(z, level), prediction, self.weight), variance
