r"""Diffusion models: a forward process, a reverse process and a decoder, wired together.

.. math::
    q(z_t|x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I), \qquad
    p(z_s|z_t) = q(z_s|z_t, x = \hat x_\theta(z_t, t)), \qquad p(x|z_0) .

:class:`DiffusionModel` has the bound, samples, the likelihood, and saves and loads. :class:`NDM` is
the model of the paper; :mod:`ndm.variants` holds others.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ndm.condition import Condition
from ndm.curve import Curve
from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder, NetworkDecoder
from ndm.elbo import Bound, BoundDraw, diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError, check_whole, describe_value
from ndm.forward import ForwardProcess, NoisingProcess
from ndm.generation import SamplingModel
from ndm.likelihood import Dequantization, LogLikelihood, log_likelihood
from ndm.ode import OdeSettings
from ndm.parts import check_data, check_part, evaluation_mode
from ndm.predictor import DataPredictor
from ndm.random import ExampleGenerators, RandomSource, standard_normal, uniform
from ndm.reverse import ReverseKind, ReverseProcess
from ndm.schedule import Schedule
from ndm.serialize import load_model, save_model
from ndm.time_grid import MOST_STEPS, Steps
from ndm.time_sampling import (
    Eta,
    LowDiscrepancyTimeSampler,
    PiecewiseConstant,
    TimeSampler,
    TimeSamples,
)
from ndm.transform import Transform


class DiffusionModel(SamplingModel):
    """A forward process, a reverse process and a decoder, for events of any shape.

    Args:
        process: the forward process, q(z_t|x).
        decoder: p(x|z_0).
        time_sampler: draws the times of training; low-discrepancy by default.
        steps: T of a discrete-time model, or None for continuous time; the default of ``bound`` and
            ``sample``.
        eta: stochasticity of the reverse process in the training bound, positive; 1 is DDPM.
        condition: the kind of condition that the model takes, if any.

    Raises:
        UserError: an argument is out of range, or a part has the wrong type.
    """

    def __init__(
        self,
        process: NoisingProcess,
        decoder: Decoder,
        time_sampler: TimeSampler | None = None,
        steps: int | None = None,
        eta: float = 1.0,
        condition: Condition | None = None,
    ):
        super().__init__()
        if steps is not None and (
            isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS
        ):
            raise UserError(
                f"steps={describe_value(steps)}: give the number of steps T, an integer of at least"
                f" 1 and at most {MOST_STEPS}, or None for continuous time"
            )
        if not (isinstance(eta, (int, float)) and 0 < eta < math.inf):
            raise UserError(
                f"eta={eta}: give a finite number above 0; the bound of a deterministic reverse"
                " process, eta = 0, is infinite"
            )
        check_part("schedule", process.schedule, Schedule, "ndm.LinearLogSNRSchedule()")
        check_part("transform", process.transform, Transform, "ndm.NetworkTransform(network)")
        check_part(
            "decoder",
            decoder,
            Decoder,
            "ndm.DiscretizedGaussian(num_values), or ndm.GaussianDecoder()",
        )
        time_sampler = LowDiscrepancyTimeSampler() if time_sampler is None else time_sampler
        check_part("time_sampler", time_sampler, TimeSampler, "ndm.LowDiscrepancyTimeSampler()")
        transform = process.transform
        if not transform.keeps_shape and isinstance(
            decoder, (DiscretizedGaussian, GaussianDecoder)
        ):
            raise UserError(
                f"{type(transform).__name__} maps data to latents of another shape, which"
                f" {type(decoder).__name__} cannot decode; use decoder=NetworkDecoder(network,"
                f" {type(decoder).__name__}(...))"
            )
        self.process, self.decoder, self.steps, self.eta = process, decoder, steps, eta
        self.time_sampler, self.condition = time_sampler, condition
        self.info: dict[str, object] = {}
        """Further content of ``config.json``, such as the description of the data."""

    @property
    def bound_eta(self) -> Eta:
        """The eta of the training bound."""
        return self.eta

    def transformed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """F(x, t) in the shape of the latents, at times ``t`` in [0, 1], a number or ``(B,)``."""
        self.check_given()
        return self.transform(x, self.process.level(_checked_times(t), x))

    def noised(self, x: Tensor, t: Tensor | float, generator: RandomSource = None) -> Tensor:
        """Draw z_t from q(z_t|x), in the shape of F(x, t)."""
        self.check_given()
        marginal = self.process.marginal(x, self.process.level(_checked_times(t), x))
        return marginal.sample(standard_normal(marginal.mean, generator))

    def predict(self, z: Tensor, t: Tensor | float) -> Tensor:
        """Predict the data from z_t: x̂(z, t), or ŷ(z, t) with a direct reverse process."""
        self.check_given()
        return self.reverse_process.predict(z, self.process.level(_checked_times(t), z))

    def bound(
        self,
        x: Tensor,
        *,
        steps: Steps | Literal["trained"] | None = "trained",
        draws: int | None = None,
        generator: RandomSource = None,
        positions: Tensor | None = None,
        eta: Eta | None = None,
        variance_ratio: PiecewiseConstant | None = None,
    ) -> Bound:
        """Estimate the variational bound of each example, every term unbiased (NDM, Algorithm 1).

        Args:
            x: data ``(B, *event)``, on the decoder's grid if the decoder is discrete.
            steps: T or a :class:`ndm.TimeGrid`, None for continuous time, or ``"trained"`` for the
                steps of the model.
            draws: None draws one time for each example by the time sampler, for training. A number
                K averages over K times, one in each of K equal strata and independent between
                examples, so that total.std()/sqrt(B) is the standard error of total.mean().
            generator: the source of randomness; :class:`ndm.random.ExampleGenerators` need draws.
            positions: the position of each example's times within their strata, ``(B,)`` in [0, 1);
                random by default. Even positions over a data set lower the variance, see
                :mod:`ndm.evaluation.evaluate`.
            eta: another eta than the model's, or a function of time.
            variance_ratio: r(t), for the reverse variance r v in discrete time, see
                :func:`ndm.elbo.discrete_diffusion`.

        Returns:
            The terms of each example, ``(B,)``, nats.

        Raises:
            UserError: a value of x is off the decoder's grid, or an argument is out of range.
        """
        check_data(x, self)
        self.check_given()
        self.decoder.check(x)
        if draws is not None:
            check_whole("draws", draws, 1)
        horizon = self.steps if steps == "trained" else steps
        eta = self.bound_eta if eta is None else eta
        curve = self.process.curve(x)
        bounds: list[Bound] = []
        for index in range(draws or 1):
            u = None if draws is None else _stratum(index, draws, x, generator, positions)
            draw = self._draw(x, curve.like, generator, u)
            prior = bounds[0].prior if bounds else None
            bounds.append(self._bound_at(x, curve, draw, horizon, eta, variance_ratio, prior))
            if draws is None and self.training:
                self.learn_times(draw, bounds[-1].diffusion)
        regressions = [bound.regression for bound in bounds if bound.regression is not None]
        return Bound(
            bounds[0].prior,
            torch.stack([bound.diffusion for bound in bounds]).mean(0),
            torch.stack([bound.reconstruction for bound in bounds]).mean(0),
            torch.stack(regressions).mean(0) if regressions else None,
            None if draws is None else torch.stack([bound.total for bound in bounds], 1),
        )

    def forward(self, x: Tensor) -> Bound:
        """The training bound: :meth:`bound` with one time for each example."""
        return self.bound(x)

    def draw(self, x: Tensor, generator: RandomSource = None) -> BoundDraw:
        """Draw the random numbers of the training bound of ``x`` ``(B, *event)``."""
        return self._draw(x, x.new_empty(self.transform.latent_shape(x)), generator)

    def bound_at(self, x: Tensor, draw: BoundDraw) -> Bound:
        """Compute the training bound for given random numbers, without checking ``x``.

        It draws nothing (except for dropout), never waits for the device, and compiles into one
        graph.
        """
        return self._bound_at(x, self.process.curve(x), draw, self.steps, self.bound_eta, None)

    def learn_times(self, draw: BoundDraw, diffusion: Tensor) -> None:
        """Update the time sampler from the diffusion term ``(B,)`` of a training bound."""
        assert draw.weight is not None
        self.time_sampler.update(TimeSamples(draw.u, draw.weight), diffusion / draw.weight)

    def _draw(
        self, x: Tensor, like: Tensor, generator: RandomSource, u: Tensor | None = None
    ) -> BoundDraw:
        """Draw the random numbers of one time for each example; the time is ``u`` if given."""
        if u is None and isinstance(generator, ExampleGenerators):
            raise UserError(
                "without draws the times of a batch are drawn together: give draws=1, or a"
                " torch.Generator"
            )
        if u is None:
            times = self.time_sampler(x.shape[0], x, generator)
        else:
            times = TimeSamples(u, torch.ones_like(u))
        noise = standard_normal(like, generator)
        coin = uniform(times.u, generator)[:1] if self.reverse_process.tosses else None
        return BoundDraw(times.u, noise, coin, times.weight, standard_normal(like, generator))

    def _bound_at(
        self,
        x: Tensor,
        curve: Curve,
        draw: BoundDraw,
        steps: Steps | None,
        eta: Eta,
        variance_ratio: PiecewiseConstant | None,
        prior: Tensor | None = None,
    ) -> Bound:
        integrand = diffusion_integrand(
            self.reverse_process, curve, draw, steps, eta, variance_ratio
        )
        assert draw.weight is not None and draw.noise_0 is not None
        return Bound(
            prior_term(self.process, x, curve) if prior is None else prior,
            draw.weight * integrand.bound,
            reconstruction_term(self.process, self.decoder, x, draw.noise_0, curve),
            None if integrand.regression is None else draw.weight * integrand.regression,
        )

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
        differentiable: bool = False,
    ) -> LogLikelihood:
        """Estimate the log-likelihood of each example by the reverse process (NDM, section 3.3).

        :mod:`ndm.likelihood` has the formulas.

        Args:
            x: data ``(B, *event)`` in the dtype of the model, on the decoder's grid if the decoder
                is discrete.
            samples: K samples of z_0 for each example; the bound on log p(x) tightens with K.
            dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
            settings: solver, tolerance and probes of the ODE.
            seed: the same seed gives the same numbers.
            examples: the numbers of the examples in their data set, which seed their randomness;
                0 ... B-1 by default.
            progress: show progress bars.
            differentiable: keep the graph for gradients in x; memory grows with the evaluations.

        Returns:
            ``log_p`` ``(B,)``, nats, with the log-weights of the samples and the number of
            evaluations.
        """
        check_data(x, self)
        self.check_given()
        with evaluation_mode(self):
            return log_likelihood(
                self.reverse_process,
                self.decoder,
                x,
                samples=samples,
                dequantization=dequantization,
                settings=settings,
                seed=seed,
                examples=examples,
                progress=progress,
                differentiable=differentiable,
            )

    def save_pretrained(
        self, path: str | os.PathLike[str], info: Mapping[str, object] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder.

        Args:
            path: the folder.
            info: JSON-ready information to store with the model; its ``info`` by default.
        """
        save_model(path, self, self.info if info is None else info)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], modules: Mapping[str, nn.Module] | None = None
    ) -> Self:
        """Read a model from a folder of :meth:`save_pretrained`, in evaluation mode.

        Args:
            path: the folder, such as ``RUN/model``.
            modules: parts from outside this library, by their place in the model:
                ``{"model.predictor.network": network}``.

        Raises:
            UserError: a file is missing, damaged or does not fit, or a network from outside was not
                passed.
        """
        model, info = load_model(path, modules)
        if not isinstance(model, cls):
            raise UserError(
                f"{path} holds a model of class {type(model).__name__}, not {cls.__name__}"
            )
        model.info = info
        return model.eval()


class NDM(DiffusionModel):
    """A Neural Diffusion Model (Bartosh, Vetrov, Naesseth 2024), for events of any shape.

    Args:
        schedule: the noise levels over time.
        transform: F(x, t).
        predictor: x̂(z, t), or ŷ(z, t) with a direct reverse process.
        decoder: p(x|z_0).
        time_sampler: draws the times of training; low-discrepancy by default.
        steps: T of a discrete-time model, or None for continuous time; the default of ``bound`` and
            ``sample``.
        eta: stochasticity of the reverse process in the training bound, positive; 1 is DDPM.
        reverse: how the reverse process uses the predictor, see :mod:`ndm.reverse`. ``tied`` puts
            x̂ through F, as in the paper. ``direct`` predicts the target of the reverse process:
            one network evaluation for each step, by ancestral or SDE sampling; it needs an F that
            starts like sigma_t² (:class:`ndm.GatedTransform`, :class:`ndm.SeparableTransform`), or
            :class:`ndm.Encoder`, whose latents need ``direct`` and have the ODE. ``direct-score``
            adds a second output (``outputs=2`` of the network), for the ODE, its likelihood and
            DDIM. ``diffenc`` is that of DiffEnc.
        condition: the kind of condition c that the networks take, :mod:`ndm.condition`; bind the
            model to it by :meth:`given`.

    Raises:
        UserError: an argument is out of range, or parts do not fit together.
    """

    process: ForwardProcess

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        predictor: DataPredictor,
        decoder: Decoder,
        time_sampler: TimeSampler | None = None,
        steps: int | None = None,
        eta: float = 1.0,
        reverse: ReverseKind = "tied",
        condition: Condition | None = None,
    ):
        check_part("predictor", predictor, DataPredictor, "ndm.Predictor(network)")
        process = ForwardProcess(schedule, transform)
        super().__init__(process, decoder, time_sampler, steps, eta, condition)
        self.predictor, self.reverse = predictor, reverse
        _ = self.reverse_process  # it checks its kind
        predictor.check(self.process, decoder, reverse)
        if predictor.learned_variance and steps is None:
            raise UserError(
                "learned_variance trains the reverse variance of discrete time: give steps, or"
                " leave learned_variance out"
            )
        self.check_conditions()

    def check_masks(self) -> None:
        if not (self.predictor.takes_masks and self.transform.keeps_shape):
            raise UserError(
                "MaskCondition needs latents in the shape of the data and an ndm.Predictor or"
                " ndm.RoundingPredictor"
            )
        if isinstance(self.decoder, NetworkDecoder):
            raise UserError("MaskCondition does not go with a decoder that has a network")

    @property
    def reverse_process(self) -> ReverseProcess:
        return ReverseProcess(self.process, self.predictor, self.reverse, self.eta)


def _checked_times(t: Tensor | float) -> Tensor | float:
    """Return ``t``, which must be in [0, 1].

    Raises:
        UserError: it is not.
    """
    times = torch.as_tensor(t)
    if not bool(((times >= 0) & (times <= 1)).all()):
        raise UserError("t is outside [0, 1]: time runs from 0, data, to 1, noise")
    return t


def _stratum(
    index: int, draws: int, x: Tensor, generator: RandomSource, positions: Tensor | None
) -> Tensor:
    """Times in one of K equal strata of [0, 1), ``(B,)``."""
    within = uniform(x.new_empty(len(x)), generator) if positions is None else positions
    return ((index + within) / draws).clamp(max=1 - torch.finfo(x.dtype).eps)
