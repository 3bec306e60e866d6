r"""A Neural Diffusion Model: the parts wired together, saved and loaded; nothing else.

.. math::
    q(z_t|x) = N(\alpha_t F_\phi(x, t), \sigma_t^2 I), \qquad p(z_s|z_t) = q(z_s|z_t, x = \hat x_\theta(z_t, t)), \qquad p(x|z_0) .
"""

import os
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ndm.decoder import Decoder, DiscretizedGaussian, GaussianDecoder
from ndm.elbo import Bound, BoundDraw, Eta, diffusion_integrand, prior_term, reconstruction_term
from ndm.errors import UserError
from ndm.forward import ForwardProcess
from ndm.likelihood import Dequantization, LogLikelihood, OdeSettings, log_likelihood
from ndm.noise import ExampleNoise, Noise, standard_normal, uniform
from ndm.predictor import Predictor
from ndm.reverse import Reverse, ReverseProcess
from ndm.sample import Method, Sampler, make_sampler
from ndm.schedule import Schedule
from ndm.serialize import load_model, save_model
from ndm.times import LowDiscrepancyTimes, StepFunction, TimeDraw, TimeSampler
from ndm.transform import Curve, Transform


class NDM(nn.Module):
    """A Neural Diffusion Model (Bartosh, Vetrov, Naesseth 2024). Any event shape.

    Args:
        schedule: noise levels over time.
        transform: F(x, t).
        predictor: x̂(z, t), or ŷ(z, t) where the reverse process is direct.
        decoder: p(x|z_0).
        times: how times are drawn in training; low-discrepancy by default.
        steps: T of the discrete-time model, None for continuous time: what ``bound`` and ``sample`` use unless told otherwise.
        eta: stochasticity of the reverse process whose bound is trained, positive; 1 is DDPM.
        reverse: how the reverse process uses the predictor, see :mod:`ndm.reverse`: ``tied`` puts x̂ through F (the paper); ``direct``
            predicts the target of the reverse process itself, at one evaluation a sampling step, by ancestral or SDE sampling; ``direct-score``
            adds a second output (``outputs=2`` of the network), for the ODE, its likelihood and DDIM; ``diffenc`` is DiffEnc's. A direct one wants an F that starts
            like sigma_t², :class:`ndm.GatedTransform` or :class:`ndm.SeparableTransform`. Latents of another shape than the data
            (:class:`ndm.Encoder`) want ``direct``, which then knows the ODE as well.

    Raises:
        UserError: an argument is out of range, or parts do not fit one another.
    """

    def __init__(
        self,
        schedule: Schedule,
        transform: Transform,
        predictor: Predictor,
        decoder: Decoder,
        times: TimeSampler | None = None,
        steps: int | None = None,
        eta: float = 1.0,
        reverse: Reverse = "tied",
    ):
        super().__init__()
        if steps is not None and steps < 1:
            raise UserError(f"steps={steps}: give the number of steps T, at least 1, or leave it out for continuous time")
        if not eta > 0:
            raise UserError(f"eta={eta}: the bound of a deterministic reverse process is infinite; give eta > 0")
        self.process = ForwardProcess(schedule, transform)
        self.predictor, self.decoder = predictor, decoder
        self.times = LowDiscrepancyTimes() if times is None else times
        self.steps, self.eta, self.reverse = steps, eta, reverse
        _ = self.reverse_process  # checks the kind
        if not transform.keeps_shape and isinstance(decoder, (DiscretizedGaussian, GaussianDecoder)):
            raise UserError(
                f"{type(transform).__name__} maps data into a space of its own, from which {type(decoder).__name__} does not lead back; use "
                f"decoder=NetworkDecoder(network, {type(decoder).__name__}(...))"
            )
        if isinstance(predictor, Predictor):  # not a transport map
            predictor.check(self.process, decoder, reverse)
        self.info: dict[str, object] = {}
        """What ``config.json`` held beside the model, such as the description of its data."""

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
        """An empty tensor of the dtype and on the device of the parameters, to move data with ``x.to(model.like)``."""
        first = next(self.parameters(), None)
        return torch.empty(0) if first is None else torch.empty(0, dtype=first.dtype, device=first.device)

    @property
    def reverse_process(self) -> ReverseProcess:
        """The reverse process, with what samplers need: posterior and drift."""
        return ReverseProcess(self.process, self.predictor, self.reverse, self.eta)

    def transformed(self, x: Tensor, t: Tensor | float) -> Tensor:
        """F(x, t), ``(B, *event)`` or the shape of the latents, at times ``t`` (a number or ``(B,)``)."""
        return self.transform(x, self.process.level(t, x))

    def noised(self, x: Tensor, t: Tensor | float, generator: Noise = None) -> Tensor:
        """z_t drawn from q(z_t|x), in the shape of F(x, t)."""
        marginal = self.process.marginal(x, self.process.level(t, x))
        return marginal.sample(standard_normal(marginal.mean, generator))

    def predict(self, z: Tensor, t: Tensor | float) -> Tensor:
        """The predictor's x̂(z, t), ŷ(z, t) where the reverse process is direct; ``(B, *event)``."""
        level = self.process.level(t, z)
        return self.predictor.two(z, level)[0] if self.reverse == "direct-score" else self.predictor(z, level)

    def bound(
        self,
        x: Tensor,
        *,
        steps: int | Literal["trained"] | None = "trained",
        draws: int | None = None,
        generator: Noise = None,
        positions: Tensor | None = None,
        eta: Eta | None = None,
        scale: StepFunction | None = None,
    ) -> Bound:
        """The variational bound of each example, an unbiased estimate of every term (NDM, Algorithm 1).

        Args:
            x: data ``(B, *event)``; on the decoder's grid if the decoder is discrete.
            steps: T for discrete time, None for continuous time, ``"trained"`` for the model's own.
            draws: None draws one time an example by the model's time sampler, for training. A number K averages K times an
                example, one in each of K equal strata, independently across examples: then total.std()/sqrt(B) is the standard
                error of total.mean().
            generator: source of randomness; with :class:`ndm.noise.ExampleNoise`, give draws.
            positions: where in its stratum each example's times lie, ``(B,)`` in [0, 1); at random by default. Even positions over a
                whole data set lower the variance, see :mod:`ndm.evaluate`.
            eta: another eta than the model's own, or a function of time.
            scale: r(t), another reverse variance r v in discrete time, see :func:`ndm.elbo.discrete_diffusion`.

        Returns:
            Per-example terms ``(B,)``, nats.

        Raises:
            UserError: a value of x is off the decoder's grid, or an argument is out of range.
        """
        _check_floats(x)
        self.decoder.check(x)
        if draws is not None and draws < 1:
            raise UserError(f"draws={draws}: give the number of times an example, at least 1")
        horizon, eta, curve = self.steps if steps == "trained" else steps, self.eta if eta is None else eta, self.process.curve(x)
        bounds: list[Bound] = []
        for index in range(draws or 1):
            u = None if draws is None else self._stratum(index, draws, x, generator, positions)
            draw = self._draw(x, curve.like, generator, u)
            prior = bounds[0].prior if bounds else None
            bounds.append(self._bound_at(x, curve, draw, horizon, eta, scale, prior))
            if draws is None and self.training:
                self.learn_times(draw, bounds[-1].diffusion)
        regressions = [bound.regression for bound in bounds if bound.regression is not None]
        return Bound(
            bounds[0].prior,
            torch.stack([bound.diffusion for bound in bounds]).mean(0),
            torch.stack([bound.reconstruction for bound in bounds]).mean(0),
            torch.stack(regressions).mean(0) if regressions else None,
        )

    def draw(self, x: Tensor, generator: Noise = None) -> BoundDraw:
        """Draw the random numbers of a training bound of ``x`` ``(B, *event)``: one time an example, by the model's time sampler."""
        return self._draw(x, x.new_empty(self.transform.latent_shape(x)), generator)

    def bound_at(self, x: Tensor, draw: BoundDraw) -> Bound:
        """The training bound at given random numbers: :meth:`bound` without a check of ``x``, for a compiler.

        It draws nothing (but for dropout), never waits for the device, and compiles into one graph.
        """
        return self._bound_at(x, self.process.curve(x), draw, self.steps, self.eta, None)

    def learn_times(self, draw: BoundDraw, diffusion: Tensor) -> None:
        """Let the time sampler learn from the diffusion term ``(B,)`` of a training bound."""
        assert draw.weight is not None
        self.times.update(TimeDraw(draw.u, draw.weight), diffusion / draw.weight)

    def _draw(self, x: Tensor, like: Tensor, generator: Noise, u: Tensor | None = None) -> BoundDraw:
        """Random numbers of one time an example, in the shape ``like`` of the latents; ``u`` says which where it is given."""
        if u is None and isinstance(generator, ExampleNoise):
            raise UserError("times of one batch are drawn together unless draws is given: give draws=1, or a torch.Generator")
        times = self.times(x.shape[0], x, generator) if u is None else TimeDraw(u, torch.ones_like(u))
        noise = standard_normal(like, generator)
        coin = uniform(times.u, generator)[:1] if self.reverse_process.tosses else None
        return BoundDraw(times.u, noise, coin, times.weight, standard_normal(like, generator))

    @staticmethod
    def _stratum(index: int, draws: int, x: Tensor, generator: Noise, positions: Tensor | None) -> Tensor:
        """Times in one of K equal strata of [0, 1), ``(B,)``."""
        u = (index + (uniform(x.new_empty(len(x)), generator) if positions is None else positions)) / draws
        return u.clamp(max=1 - torch.finfo(x.dtype).eps)

    def _bound_at(
        self,
        x: Tensor,
        curve: Curve,
        draw: BoundDraw,
        steps: int | None,
        eta: Eta,
        scale: StepFunction | None,
        prior: Tensor | None = None,
    ) -> Bound:
        integrand = diffusion_integrand(self.reverse_process, curve, draw, steps, eta, scale)
        assert draw.weight is not None and draw.noise_0 is not None
        return Bound(
            prior_term(self.process, x, curve) if prior is None else prior,
            draw.weight * integrand.bound,
            reconstruction_term(self.process, self.decoder, x, draw.noise_0, curve),
            None if integrand.regression is None else draw.weight * integrand.regression,
        )

    def forward(self, x: Tensor) -> Bound:
        """The training bound of ``x``: :meth:`bound` with one time an example."""
        return self.bound(x)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        method: Method | Sampler = "ancestral",
        *,
        steps: int | None = None,
        eta: float | None = None,
        solver: str | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        seed: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples (NDM, Algorithm 2, and the SDE and ODE of section 3.3).

        Args:
            shape: ``(B, *event)``, of the data.
            method: ``ancestral``, ``ddim``, ``sde`` or ``ode``, or a sampler.
            steps: steps of the time grid; by default the model's T, or 100 in continuous time.
            eta: noise of the reverse process for ``ancestral`` and ``sde``; by default the model's, whose bound is trained.
            solver: see :func:`ndm.sample.make_sampler`.
            rtol: relative tolerance of an adaptive solver.
            atol: absolute tolerance of an adaptive solver.
            seed: the same seed gives the same samples on the same machine; None draws a fresh one.
            progress: show a progress bar.

        Returns:
            Samples of p(x), ``(B, *event)``, on the model's device.

        Raises:
            UserError: the choices contradict one another, or what comes out is not finite.
        """
        if isinstance(method, Sampler):
            sampler = method
        else:
            noise = self.eta if eta is None and method in ("ancestral", "sde") else eta
            sampler = make_sampler(method, steps if steps is not None else self.steps or 100, noise, solver, rtol, atol)
        like = self.like
        generator = torch.Generator(like.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        training = self.training
        self.eval()  # dropout is for training
        try:
            z = torch.empty(self.transform.latent_shape(like.new_empty(shape)), dtype=like.dtype, device=like.device)
            z = standard_normal(z, generator)
            z = sampler(self.reverse_process, z, generator, progress)
            if not bool(z.isfinite().all()):
                raise UserError(
                    "samples are not finite: the sampler diverges with these steps, or half precision does; take more steps, another method or 32-true"
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
        """Log-likelihood of each example by the generative ODE (NDM, section 3.3); see :mod:`ndm.likelihood` for what is estimated.

        Args:
            x: data ``(B, *event)``; on the decoder's grid if the decoder is discrete. Its dtype must be that of the model.
            samples: K samples of z_0 for each example; the bound on log p(x) tightens with K.
            dequantization: from z_0 to x: ``variational``, ``uniform`` or ``none``.
            settings: solver, tolerance and probes.
            seed: the same seed gives the same numbers.
            examples: numbers of the examples in their data set, which decide on their random numbers; 0 ... B-1 by default.
            progress: show progress bars.

        Returns:
            ``log_p`` ``(B,)``, nats, with the log-weights of the samples and the number of evaluations.
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

    def save_pretrained(self, path: str | os.PathLike[str], info: Mapping[str, object] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder ``path``, whole or not at all.

        Args:
            path: the folder.
            info: JSON-ready information to keep beside the model; the model's own ``info`` by default.
        """
        save_model(path, self, self.info if info is None else info)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], modules: Mapping[str, nn.Module] | None = None) -> "NDM":
        """Read a model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            path: the folder, such as ``RUN/model``.
            modules: networks that are not part of this library, by their place: ``{"model.predictor.network": network}``.

        Raises:
            UserError: a file is missing, damaged or does not fit, or a network of yours was not given.
        """
        model, info = load_model(path, modules)
        if not isinstance(model, cls):
            raise UserError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        model.info = info
        return model.eval()


def _check_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise UserError(f"x has dtype {x.dtype}; the model takes floats: put integers k on the decoder's grid, decoder.values[k].float()")
