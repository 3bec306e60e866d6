r"""Diffusion models: the parts wired together, sampled, measured, saved and loaded.

.. math::
    q(z_t|x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I), \qquad p(z_s|z_t) = q(z_s|z_t, x = \hat x_\theta(z_t, t)), \qquad p(x|z_0) .

:class:`DiffusionModel` is what every model of the family can do; :class:`NDM` is the model of the paper. :mod:`ndm.variants` has others.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder
from ndm.elbo import Bound, BoundDraw, Eta, diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError, check_whole
from ndm.forward import ForwardProcess, NoisingProcess
from ndm.likelihood import Dequantization, LogLikelihood, log_likelihood
from ndm.ode import OdeSettings
from ndm.parts import Part
from ndm.predictor import DataPredictor
from ndm.random import ExampleGenerators, RandomSource, part_seed, standard_normal, uniform
from ndm.reverse import MarkovReverse, Reverse, ReverseKind, ReverseProcess
from ndm.sample import Method, Sampler, make_sampler
from ndm.schedule import Schedule
from ndm.serialize import load_model, save_model
from ndm.time_sampling import LowDiscrepancyTimeSampler, PiecewiseConstant, TimeSampler, TimeSamples
from ndm.transform import Curve, Transform


class DiffusionModel(Part, ABC):
    """A forward process, a reverse process and a decoder. Any event shape.

    Args:
        process: the forward process, q(z_t|x).
        decoder: p(x|z_0).
        time_sampler: how times are drawn in training; low-discrepancy by default.
        steps: T of a discrete-time model, None for continuous time: what ``bound`` and ``sample``
            use unless told otherwise.
        eta: stochasticity of the reverse process whose bound is trained, positive; 1 is DDPM.

    Raises:
        UserError: an argument is out of range, or a part is of the wrong kind.
    """

    def __init__(
        self,
        process: NoisingProcess,
        decoder: Decoder,
        time_sampler: TimeSampler | None = None,
        steps: int | None = None,
        eta: float = 1.0,
    ):
        super().__init__()
        if steps is not None and (
            isinstance(steps, bool) or not isinstance(steps, int) or steps < 1
        ):
            raise UserError(
                f"steps={steps}: give the number of steps T, a whole number of at least 1, or leave"
                " it out for continuous time"
            )
        if not eta > 0:
            raise UserError(
                f"eta={eta}: the bound of a deterministic reverse process is infinite; give eta > 0"
            )
        check_part("schedule", process.schedule, Schedule, "ndm.LinearLogSNRSchedule()")
        check_part("transform", process.transform, Transform, "ndm.NetworkTransform(network)")
        check_part(
            "decoder",
            decoder,
            Decoder,
            "ndm.DiscretizedGaussian(num_values), or ndm.GaussianDecoder()",
        )
        transform = process.transform
        if not transform.keeps_shape and isinstance(
            decoder, (DiscretizedGaussian, GaussianDecoder)
        ):
            raise UserError(
                f"{type(transform).__name__} maps data into a space of its own, from which"
                f" {type(decoder).__name__} does not lead back; use decoder=NetworkDecoder(network,"
                f" {type(decoder).__name__}(...))"
            )
        self.process, self.decoder, self.steps, self.eta = process, decoder, steps, eta
        self.time_sampler = LowDiscrepancyTimeSampler() if time_sampler is None else time_sampler
        self.info: dict[str, object] = {}
        """What ``config.json`` held beside the model, such as the description of its data."""

    @property
    @abstractmethod
    def reverse_process(self) -> Reverse:
        """The reverse process, with what samplers need."""

    @property
    def bound_eta(self) -> Eta:
        """The eta of the bound that is trained."""
        return self.eta

    @property
    def samplers(self) -> Mapping[str, Callable[[], Sampler]]:
        """Samplers that only this model has, by name; the first is its default."""
        return {}

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.process.schedule

    @property
    def transform(self) -> Transform:
        """The transformation F."""
        return self.process.transform

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the parameters, to move data with
        ``x.to(model.like)``.
        """
        first = next(self.parameters(), None)
        return (
            torch.empty(0)
            if first is None
            else torch.empty(0, dtype=first.dtype, device=first.device)
        )

    def transformed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """F(x, t), ``(B, *event)`` or the shape of the latents, at times ``t`` (a number or
        ``(B,)``).
        """
        return self.transform(x, self.process.level(t, x))

    def noised(self, x: Tensor, t: Tensor | float, generator: RandomSource = None) -> Tensor:
        """z_t drawn from q(z_t|x), in the shape of F(x, t)."""
        marginal = self.process.marginal(x, self.process.level(t, x))
        return marginal.sample(standard_normal(marginal.mean, generator))

    def predict(self, z: Tensor, t: Tensor | float) -> Tensor:
        """What the model predicts of the data from z_t: x̂(z, t), ŷ(z, t) where the reverse process
        is direct; ``(B, *event)``.
        """
        return self.reverse_process.predict(z, self.process.level(t, z))

    def bound(
        self,
        x: Tensor,
        *,
        steps: int | Literal["trained"] | None = "trained",
        draws: int | None = None,
        generator: RandomSource = None,
        positions: Tensor | None = None,
        eta: Eta | None = None,
        variance_ratio: PiecewiseConstant | None = None,
    ) -> Bound:
        """The variational bound of each example, an unbiased estimate of every term (NDM, Algorithm
        1).

        Args:
            x: data ``(B, *event)``; on the decoder's grid if the decoder is discrete.
            steps: T for discrete time, None for continuous time, ``"trained"`` for the model's own.
            draws: None draws one time an example by the model's time sampler, for training. A
                number K averages K times an example, one in each of K equal strata, independently
                across examples: then total.std()/sqrt(B) is the standard error of total.mean().
            generator: source of randomness; with :class:`ndm.random.ExampleGenerators`, give draws.
            positions: where in its stratum each example's times lie, ``(B,)`` in [0, 1); at random
                by default. Even positions over a whole data set lower the variance, see
                :mod:`ndm.evaluation.evaluate`.
            eta: another eta than the model's own, or a function of time.
            variance_ratio: r(t), another reverse variance r v in discrete time, see
                :func:`ndm.elbo.discrete_diffusion`.

        Returns:
            Per-example terms ``(B,)``, nats.

        Raises:
            UserError: a value of x is off the decoder's grid, or an argument is out of range.
        """
        _check_floats(x)
        self.decoder.check(x)
        if draws is not None:
            check_whole("draws", draws, 1)
        horizon, eta, curve = (
            self.steps if steps == "trained" else steps,
            self.bound_eta if eta is None else eta,
            self.process.curve(x),
        )
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
        )

    def forward(self, x: Tensor) -> Bound:
        """The training bound of ``x``: :meth:`bound` with one time an example."""
        return self.bound(x)

    def draw(self, x: Tensor, generator: RandomSource = None) -> BoundDraw:
        """Draw the random numbers of a training bound of ``x`` ``(B, *event)``: one time an
        example, by the model's time sampler.
        """
        return self._draw(x, x.new_empty(self.transform.latent_shape(x)), generator)

    def bound_at(self, x: Tensor, draw: BoundDraw) -> Bound:
        """The training bound at given random numbers: :meth:`bound` without a check of ``x``, for a
        compiler.

        It draws nothing (but for dropout), never waits for the device, and compiles into one graph.
        """
        return self._bound_at(x, self.process.curve(x), draw, self.steps, self.bound_eta, None)

    def learn_times(self, draw: BoundDraw, diffusion: Tensor) -> None:
        """Let the time sampler learn from the diffusion term ``(B,)`` of a training bound."""
        assert draw.weight is not None
        self.time_sampler.update(TimeSamples(draw.u, draw.weight), diffusion / draw.weight)

    def _draw(
        self, x: Tensor, like: Tensor, generator: RandomSource, u: Tensor | None = None
    ) -> BoundDraw:
        """Random numbers of one time an example, in the shape ``like`` of the latents; at times
        ``u`` where they are given.
        """
        if u is None and isinstance(generator, ExampleGenerators):
            raise UserError(
                "times of one batch are drawn together unless draws is given: give draws=1, or a"
                " torch.Generator"
            )
        times = (
            self.time_sampler(x.shape[0], x, generator)
            if u is None
            else TimeSamples(u, torch.ones_like(u))
        )
        noise = standard_normal(like, generator)
        coin = uniform(times.u, generator)[:1] if self.reverse_process.tosses else None
        return BoundDraw(times.u, noise, coin, times.weight, standard_normal(like, generator))

    def _bound_at(
        self,
        x: Tensor,
        curve: Curve,
        draw: BoundDraw,
        steps: int | None,
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

    @torch.no_grad()
    def sample(
        self,
        shape: int | Sequence[int],
        method: Method | str | Sampler | None = None,
        *,
        steps: int | None = None,
        eta: float | None = None,
        solver: str | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples (NDM, Algorithm 2, and the SDE and ODE of section 3.3).

        Args:
            shape: ``(B, *event)``, of the data; a number B where the model's ``info`` says what its
                data are.
            method: ``ancestral`` (the default), ``ddim``, ``sde`` or ``ode``, a name of
                :attr:`samplers`, or a sampler. Models in continuous time only have ``sde`` for
                default.
            steps: steps of the time grid; by default the model's T, or 100 in continuous time.
            eta: noise of the reverse process for ``ancestral`` and ``sde``; by default the model's,
                whose bound is trained.
            solver: see :func:`ndm.sample.make_sampler`.
            rtol: relative tolerance of an adaptive solver.
            atol: absolute tolerance of an adaptive solver.
            seed: the same seed (and batch size) gives the same samples on the same machine; None
                draws a fresh one.
            batch_size: draw so many at once, and gather them on the CPU; None draws all at once.
            progress: show a progress bar.

        Returns:
            Samples of p(x), ``(B, *event)``, on the model's device, or on the CPU with
            ``batch_size``.

        Raises:
            UserError: the choices contradict one another, or what comes out is not finite.
        """
        count, *event = self._shape(shape)
        sampler = self._sampler(method, steps, eta, solver, rtol, atol)
        if batch_size is None:
            return self._sample((count, *event), sampler, seed, progress)
        check_whole("batch_size", batch_size, 1)
        seed = torch.Generator().seed() % 2**62 if seed is None else seed
        parts = []
        with tqdm(
            total=count,
            desc="samples",
            unit="sample",
            disable=not progress or count <= batch_size,
            leave=False,
        ) as bar:
            for index, start in enumerate(range(0, count, batch_size)):
                parts.append(
                    self._sample(
                        (min(batch_size, count - start), *event),
                        sampler,
                        part_seed(seed, index),
                        progress,
                    ).cpu()
                )
                bar.update(len(parts[-1]))
        return torch.cat(parts) if parts else torch.empty(0, *event)

    def _shape(self, shape: int | Sequence[int]) -> tuple[int, ...]:
        if not isinstance(shape, int):
            return tuple(shape)
        data = self.info.get("data")
        event = data.get("event_shape") if isinstance(data, Mapping) else None
        if not isinstance(event, (list, tuple)):
            raise UserError(
                f"sample({shape}): this model does not know the shape of its data; give"
                f" sample(({shape}, *event))"
            )
        return (shape, *event)

    def _sampler(
        self,
        method: Method | str | Sampler | None,
        steps: int | None,
        eta: float | None,
        solver: str | None,
        rtol: float,
        atol: float,
    ) -> Sampler:
        if isinstance(method, Sampler):
            return method
        default = next(
            iter(self.samplers),
            "ancestral" if isinstance(self.reverse_process, MarkovReverse) else "sde",
        )
        name = default if method is None else method
        if name in self.samplers:
            return self.samplers[name]()
        noise = self.eta if eta is None and name in ("ancestral", "sde") else eta
        steps = self.steps or 100 if steps is None else steps
        return make_sampler(name, steps, noise, solver, rtol, atol)

    def _sample(
        self, shape: tuple[int, ...], sampler: Sampler, seed: int | None, progress: bool
    ) -> Tensor:
        like = self.like
        generator = torch.Generator(like.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        training = self.training
        self.eval()  # dropout is for training
        try:
            z = torch.empty(
                self.transform.latent_shape(like.new_empty(shape)),
                dtype=like.dtype,
                device=like.device,
            )
            z = sampler(self.reverse_process, standard_normal(z, generator), generator, progress)
            if not bool(z.isfinite().all()):
                raise UserError(
                    "samples are not finite: the sampler diverges with these steps, or half"
                    " precision does; take more steps, another method or 32-true"
                )
            return self.decoder.sample(z, self.process.level(0.0, z), generator)
        finally:
            self.train(training)

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
        """Log-likelihood of each example by the reverse process (NDM, section 3.3); see
        :mod:`ndm.likelihood` for what is estimated.

        Args:
            x: data ``(B, *event)``; on the decoder's grid if the decoder is discrete. Its dtype
                must be that of the model.
            samples: K samples of z_0 for each example; the bound on log p(x) tightens with K.
            dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
            settings: solver, tolerance and probes of the ODE.
            seed: the same seed gives the same numbers.
            examples: numbers of the examples in their data set, which decide on their random
                numbers; 0 ... B-1 by default.
            progress: show progress bars.

        Returns:
            ``log_p`` ``(B,)``, nats, with the log-weights of the samples and the number of
            evaluations.
        """
        _check_floats(x)
        training = self.training
        self.eval()
        try:
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
            )
        finally:
            self.train(training)

    def save_pretrained(
        self, path: str | os.PathLike[str], info: Mapping[str, object] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder ``path``, whole or not at
        all.

        Args:
            path: the folder.
            info: JSON-ready information to keep beside the model; the model's own ``info`` by
                default.
        """
        save_model(path, self, self.info if info is None else info)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], modules: Mapping[str, nn.Module] | None = None
    ) -> Self:
        """Read a model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            path: the folder, such as ``RUN/model``.
            modules: networks that are not part of this library, by their place:
                ``{"model.predictor.network": network}``.

        Raises:
            UserError: a file is missing, damaged or does not fit, or a network of yours was not
                given.
        """
        model, info = load_model(path, modules)
        if not isinstance(model, cls):
            raise UserError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        model.info = info
        return model.eval()


class NDM(DiffusionModel):
    """A Neural Diffusion Model (Bartosh, Vetrov, Naesseth 2024). Any event shape.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
        predictor: x̂(z, t), or ŷ(z, t) where the reverse process is direct.
        decoder: p(x|z_0).
        time_sampler: how times are drawn in training; low-discrepancy by default.
        steps: T of the discrete-time model, None for continuous time: what ``bound`` and ``sample``
            use unless told otherwise.
        eta: stochasticity of the reverse process whose bound is trained, positive; 1 is DDPM.
        reverse: how the reverse process uses the predictor, see :mod:`ndm.reverse`: ``tied`` puts
            x̂ through F (the paper); ``direct`` predicts the target of the reverse process itself,
            at one evaluation a sampling step, by ancestral or SDE sampling; ``direct-score`` adds a
            second output (``outputs=2`` of the network), for the ODE, its likelihood and DDIM;
            ``diffenc`` is DiffEnc's. A direct one needs an F that starts like sigma_t²,
            :class:`ndm.GatedTransform` or
            :class:`ndm.SeparableTransform`. Latents of another shape than the data (:class:`ndm.Encoder`) need ``direct``, which then
            has the ODE as well.

    Raises:
        UserError: an argument is out of range, or parts do not fit one another.
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
    ):
        check_part("predictor", predictor, DataPredictor, "ndm.Predictor(network)")
        super().__init__(ForwardProcess(schedule, transform), decoder, time_sampler, steps, eta)
        self.predictor, self.reverse = predictor, reverse
        _ = self.reverse_process  # checks the kind
        predictor.check(self.process, decoder, reverse)

    @property
    def reverse_process(self) -> ReverseProcess:
        return ReverseProcess(self.process, self.predictor, self.reverse, self.eta)


def check_part(name: str, value: object, kind: type, example: str) -> None:
    """Check that a part of a model is of its kind.

    Raises:
        UserError: it is not, such as a network that is not wrapped.
    """
    if not isinstance(value, kind):
        raise UserError(
            f"{name} must be a {kind.__name__}, such as {example}, got {type(value).__name__}"
        )


def _stratum(
    index: int, draws: int, x: Tensor, generator: RandomSource, positions: Tensor | None
) -> Tensor:
    """Times in one of K equal strata of [0, 1), ``(B,)``."""
    u = (
        index + (uniform(x.new_empty(len(x)), generator) if positions is None else positions)
    ) / draws
    return u.clamp(max=1 - torch.finfo(x.dtype).eps)


def _check_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise UserError(
            f"x has dtype {x.dtype}; the model takes floats: put integers k on the decoder's grid,"
            " decoder.values[k].float()"
        )
