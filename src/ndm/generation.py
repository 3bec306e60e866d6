r"""Samples of a model: from noise, or from a latent at any time.

.. math::
    z_1 \sim N(0, I), \qquad z_s \sim p(z_s|z_t), \qquad x \sim p(x|z_0) .

:class:`SamplingModel` is the part of a model that draws samples (NDM, Algorithm 2). The loops are
in :mod:`ndm.sample`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.conditional_model import ConditionalModel
from ndm.decoder import Decoder
from ndm.errors import UserError, check_choice, check_whole, describe_value
from ndm.forward import NoisingProcess
from ndm.guidance import Guide, guided
from ndm.ode import LogDensity, OdeSettings, ode_log_prob
from ndm.parts import check_data, evaluation_mode, masked
from ndm.random import part_seed, standard_normal
from ndm.reverse import MarkovReverse, Reverse
from ndm.sample import Method, Sampler, Step, make_sampler
from ndm.schedule import Schedule
from ndm.shapes import sample_shape
from ndm.time_grid import Steps
from ndm.transform import Transform

Decoding = Literal["sample", "mean", "latent"]


class SamplingModel(ConditionalModel, ABC):
    """A model that draws samples by its reverse process and its decoder."""

    process: NoisingProcess
    """The forward process."""
    decoder: Decoder
    """p(x|z_0)."""
    steps: int | None
    """T of a discrete-time model, or None for continuous time."""
    eta: float
    """Stochasticity of the reverse process in training."""
    info: dict[str, object]
    """Further content of ``config.json``, such as the description of the data."""

    @property
    @abstractmethod
    def reverse_process(self) -> Reverse:
        """The reverse process p(z_s|z_t)."""

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
        """An empty tensor with the dtype and device of the parameters, for ``x.to(model.like)``."""
        first = next(self.parameters(), None)
        return torch.empty(0) if first is None else first.detach().new_empty(0)

    @property
    def samplers(self) -> Mapping[str, Callable[[], Sampler]]:
        """Samplers specific to this model, by name; the first is the default."""
        return {}

    @torch.no_grad()
    def sample(
        self,
        shape: int | Sequence[int],
        method: Method | str | Sampler | None = None,
        *,
        steps: Steps | None = None,
        eta: float | None = None,
        solver: str | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-4,
        guidance: float = 1.0,
        guide: Guide = "curve",
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw samples (NDM, Algorithm 2, and the SDE and ODE of section 3.3).

        Args:
            shape: ``(B, *event)`` of the data, or only B for a model whose ``info`` describes them.
            method: ``ancestral``, ``ddim``, ``sde``, ``ode``, a name of :attr:`samplers`, or a
                sampler. The default is ``ancestral``, or ``sde`` for models without discrete time.
            steps: steps of the time grid, or the grid; by default T, or 100 in continuous time.
            eta: stochasticity for ``ancestral`` and ``sde``; by default that of the model.
            solver: see :func:`ndm.sample.make_sampler`.
            rtol: relative tolerance of an adaptive solver.
            atol: absolute tolerance of an adaptive solver.
            guidance: weight of the condition, :mod:`ndm.guidance`; 1 is p(x|c), 0 is p(x).
            guide: what is guided, ``curve`` or ``x``.
            seed: the same seed and batch size give the same samples on the same machine; None
                draws a seed from PyTorch's global generator.
            batch_size: the largest batch; the samples are then collected on the CPU. None draws all
                in one batch.
            progress: show a progress bar.

        Returns:
            Samples of p(x), ``(B, *event)``.

        Raises:
            UserError: arguments contradict each other, or samples are not finite.
        """
        count, *event = sample_shape(shape, self.info.get("data"))
        self.check_given()
        self.check_count(count)
        sampler = self._sampler(method, steps, eta, solver, rtol, atol)
        seed = _seed(seed)
        if batch_size is None:
            return self._sample((count, *event), sampler, seed, progress, guidance, guide)
        check_whole("batch_size", batch_size, 1)
        parts, hidden = [], not progress or count <= batch_size
        with tqdm(total=count, desc="samples", unit="sample", disable=hidden, leave=False) as bar:
            for index, start in enumerate(range(0, count, batch_size)):
                size = min(batch_size, count - start)
                rows, of_part = self.rows(start, start + size), part_seed(seed, index)
                part = rows._sample((size, *event), sampler, of_part, progress, guidance, guide)
                parts.append(part.cpu())
                bar.update(size)
        return torch.cat(parts) if parts else torch.empty(0, *event)

    def denoise(
        self,
        z: Tensor,
        t: float,
        method: Method | str | Sampler | None = None,
        *,
        steps: Steps | None = None,
        eta: float | None = None,
        guidance: float = 1.0,
        guide: Guide = "curve",
        seed: int | None = None,
        decode: Decoding = "sample",
        differentiable: bool = False,
        progress: bool = False,
    ) -> Tensor:
        """Run the reverse process from z_t at a time t to the data.

        For example ``model.denoise(model.noised(x, 0.3), 0.3)``.

        Args:
            z: z_t, in the shape of F(x, t).
            t: its time, in (0, 1].
            method: as in :meth:`sample`; for other solvers give a sampler.
            steps: steps from t to 0; by default T t, or 100 t in continuous time. The times of a
                :class:`ndm.TimeGrid` are multiplied by t.
            eta: as in :meth:`sample`.
            guidance: as in :meth:`sample`.
            guide: as in :meth:`sample`.
            seed: as in :meth:`sample`.
            decode: what is returned: a ``sample`` of p(x|z_0), its ``mean``, or z_0, the
                ``latent``.
            differentiable: keep the graph for gradients in z and in the parameters; each step is
                computed again in the backward pass.
            progress: show a progress bar.

        Returns:
            ``(B, *event)``, or z_0 in the shape of z.

        Raises:
            UserError: arguments contradict each other, or the result is not finite.
        """
        check_choice("decode", decode, get_args(Decoding))
        if differentiable and decode == "sample":
            raise UserError("a sample has no gradient: with differentiable give decode='mean'")
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 < t <= 1:
            raise UserError(f"t={describe_value(t)}: give the time of z, a number in (0, 1]")
        check_data(z, self, "z")
        self.check_given()
        if steps is None and not isinstance(method, Sampler):
            steps = max(1, math.ceil(t * (self.steps or 100) - 1e-9))
        sampler = self._sampler(method, steps, eta, None, 1e-4, 1e-4)
        generator = torch.Generator(z.device).manual_seed(_seed(seed))
        with evaluation_mode(self), torch.set_grad_enabled(differentiable):
            z = sampler(self._reverse(guidance, guide), z, generator, progress, float(t))
            return self._decoded(z, generator, decode)

    def sample_with_log_prob(
        self,
        shape: int | Sequence[int],
        *,
        settings: OdeSettings | None = None,
        seed: int | None = None,
        progress: bool = False,
    ) -> LogDensity:
        """Draw z_0 by the generative ODE, with log p(z_0) from the same solution.

        Args:
            shape: ``(B, *event)`` of the data, or only B, as in :meth:`sample`.
            settings: solver, tolerance and probes of the ODE.
            seed: as in :meth:`sample`.
            progress: show progress bars.

        Returns:
            ``z_0`` ``(B, *latent)`` and ``log_p`` ``(B,)``, nats. The mean of the decoder is
            ``model.decoder.mean(z_0, model.process.level(0.0, z_0))``.

        Raises:
            UserError: the reverse process has no ODE, or the solver cannot reach the tolerances.
        """
        count, *event = sample_shape(shape, self.info.get("data"))
        self.check_given()
        reverse = self.reverse_process
        reverse.check_eta(0.0)
        generator = torch.Generator(self.like.device).manual_seed(_seed(seed))
        with evaluation_mode(self), torch.no_grad():
            noise = self._noise((count, *event), generator)
            return ode_log_prob(reverse, noise, settings, generator, progress, from_noise=True)

    def _reverse(self, guidance: float, guide: Guide) -> Reverse:
        reverse = guided(self.reverse_process, self.condition, guidance, guide)
        if guidance != 1 and not self.fixed:
            raise UserError("guidance needs a condition: use model.given(c)")
        return reverse

    def _decoded(self, z: Tensor, generator: torch.Generator, decode: Decoding) -> Tensor:
        """Return the data of z_0, or z_0.

        Raises:
            UserError: z_0 is not finite.
        """
        if not bool(z.isfinite().all()):
            raise UserError(
                "samples are not finite: the sampler diverges with this number of steps, or in"
                " half precision; take more steps, another method, or precision 32-true"
            )
        level = self.process.level(0.0, z)
        if decode == "latent":
            return z
        if decode == "mean":
            x = self.decoder.mean(z, level)
        else:
            x = self.decoder.sample(z, level, generator)
        return self.with_known(x)

    def impute(self, x: Tensor, missing: Tensor, **options: Any) -> Tensor:
        """Draw the missing dimensions of each example from p(x_missing|x_known).

        The model takes :class:`ndm.MaskCondition`; ``x`` is what is known, with any values where
        ``missing`` is True.

        Args:
            x: examples ``(B, *event)``.
            missing: bool, in the shape of x, or one that broadcasts against it.
            options: arguments of :meth:`sample`.

        Returns:
            x with samples in the missing dimensions.

        Raises:
            UserError: the model takes no masks.
        """
        return self.given((x, missing)).sample(x.shape, **options)

    @property
    def default_method(self) -> str:
        """The sampling method that is used when none is given."""
        markov = isinstance(self.reverse_process, MarkovReverse)
        return next(iter(self.samplers), "ancestral" if markov else "sde")

    def _sampler(
        self,
        method: Method | str | Sampler | None,
        steps: Steps | None,
        eta: float | None,
        solver: str | None,
        rtol: float,
        atol: float,
    ) -> Sampler:
        if isinstance(method, Sampler):
            if not (steps is None and eta is None and solver is None):
                raise UserError(
                    "steps, eta and solver belong to the sampler object: set them there"
                )
            return method
        if isinstance(method, Step):
            name = type(method).__name__
            raise UserError(
                f"method is one step, {name}: wrap it in ndm.GridSampler({name}(...), steps)"
            )
        name = self.default_method if method is None else method
        if name in self.samplers:
            return self.samplers[name]()
        noise = self.eta if eta is None and name in ("ancestral", "sde") else eta
        steps = self.steps or 100 if steps is None else steps
        return make_sampler(name, steps, noise, solver, rtol, atol)

    def _sample(
        self,
        shape: tuple[int, ...],
        sampler: Sampler,
        seed: int,
        progress: bool,
        guidance: float,
        guide: Guide,
    ) -> Tensor:
        generator = torch.Generator(self.like.device).manual_seed(seed)
        with evaluation_mode(self):
            noise = self._noise(shape, generator)
            z = sampler(self._reverse(guidance, guide), noise, generator, progress)
            return self._decoded(z, generator, "sample")

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw z_1 for data of this shape, ``(B, *latent)``; 0 in known dimensions."""
        z = self.like.new_empty(self.transform.latent_shape(self.like.new_empty(shape)))
        return masked(standard_normal(z, generator), self.process.missing)


def _seed(seed: int | None) -> int:
    """Return the seed, or one from PyTorch's global generator."""
    return int(torch.randint(2**62, ())) if seed is None else seed
