r"""Bounds and likelihoods of a whole data set, with standard errors and protocols.

Each of the N examples is evaluated at K times. The times are stratified twice: each example has one
time in each of K equal strata of [0, 1], and the N times of a stratum are spread evenly over it, in
a random order :math:`\pi`:

.. math::
    u_{ik} = \frac{1}{K} \Bigl(k + \frac{\pi(i) + j_i}{N}\Bigr), \qquad j_i \sim U[0, 1), \qquad
    \text{stderr}^2 = \frac{1}{N} \cdot \frac{1}{2(N-1)} \sum_{m} (l_{m+1} - l_m)^2 ,

Here l is the estimate of an example, averaged over its K times, and m numbers the examples in the
order of :math:`\pi`. Neighbors in this order have nearly the same times. Their differences contain
the variance of the data and the Monte Carlo noise, but not the variance between times, which the
stratification removes from the mean. If T < K, K is a multiple of T, and every step is evaluated
equally often.

The random numbers of an example depend only on the seed and its index in the data set. Batch size
and number of processes therefore change results only by rounding and by the tolerance of an
adaptive solver. Bits per dimension are nats/(D ln 2). For discrete data they measure the
probability of the original integers, for continuous data a density.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import EventDataset, WithoutConditions, spread
from ndm.discrete_time import path_log_weight
from ndm.elbo import Bound, bits_per_dim
from ndm.errors import UserError, check_whole
from ndm.evaluation.calibrate import Calibration, Fit
from ndm.evaluation.measurement import (
    BoundProtocol,
    LikelihoodProtocol,
    Measurement,
    model_fields,
    neighbor_error,
    standard_error,
    strata_error,
    weights_error,
)
from ndm.evaluation.processes import Processes
from ndm.evaluation.tables import flat_record
from ndm.likelihood import Dequantization, latent
from ndm.model import DiffusionModel
from ndm.ode import ADAPTIVE_SOLVERS, OdeSettings, round_trip_error
from ndm.parts import evaluation_mode
from ndm.random import ExampleGenerators, part_seed, uniform

_BOUND, _POSITIONS, _PATHS = 10, 11, 12  # streams of noise


@dataclass
class Evaluation:
    """A model and the examples to measure it on; each method measures one quantity.

    Raises:
        UserError: there are no examples, or an argument is out of range.
    """

    model: DiffusionModel
    """The model; all computations have its dtype."""
    data: EventDataset
    """The split."""
    seed: int = 0
    """Seed of times, noise, latents and probes."""
    limit: int | None = None
    """Number of examples to measure, evenly spread over the split; None for all."""
    batch_size: int | None = None
    """Examples per batch; None for 256, or fewer if the decoder would need too much memory."""
    processes: Processes = field(default_factory=Processes)
    """The processes that share the work."""
    progress: bool = False
    """Show progress bars."""
    about: dict[str, Any] = field(default_factory=dict)
    """Description of the data, for the protocol."""

    def __post_init__(self) -> None:
        """Check the arguments and choose the examples."""
        if len(self.data) == 0:
            raise UserError("there is nothing to evaluate: the split is empty")
        check_whole("seed", self.seed, 0)
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        self.numbers = spread(len(self.data), self.limit)
        self.dims = self.data[0].numel()
        self.size = self.batch_size or default_batch_size(self.model, self.dims)
        self.progress = self.progress and self.processes.first
        self._calibration = Calibration(
            self.model, batch_size=self.size, seed=self.seed, progress=self.progress
        )

    @property
    def condition(self) -> str:
        """What the model is given of each example, see :class:`Protocol`."""
        kind, given = self.model.condition, self.data.conditions(self.numbers[:1])
        if kind is not None and self.model.fixed:
            return "fixed"
        if kind is not None and kind.masks:
            return "none"
        return "none" if kind is None or given is None else kind.name

    @property
    def _null(self) -> bool:
        kind = self.model.condition
        return kind is not None and not kind.masks and self.condition == "none"

    def nelbo(
        self,
        steps: int | str | None = "trained",
        draws: int = 16,
        fit: Fit | None = None,
    ) -> Measurement:
        """Measure the NELBO in discrete or continuous time.

        Args:
            steps: T; None for continuous time, ``"trained"`` for the T of the model.
            draws: K, times per example; raised to a multiple of T if T is smaller.
            fit: fit the reverse process and use it: its variance in discrete time, and its times if
                the fit says so; its eta in continuous time.
        """
        check_whole("draws", draws, 1)
        horizon = self.model.steps if steps == "trained" else steps
        if horizon is not None:
            check_whole("steps", horizon, 1)
        assert horizon is None or isinstance(horizon, int)
        if horizon is not None and horizon < draws:
            draws = math.ceil(draws / horizon) * horizon
        started = time.perf_counter()
        arguments = self._calibration.fit(horizon, fit)
        shuffler = np.random.default_rng(part_seed(self.seed, _POSITIONS))
        order = shuffler.permutation(len(self.numbers))
        place = dict(zip(self.numbers, order.tolist(), strict=True))

        def terms(model: DiffusionModel, x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            ranks = torch.tensor([place[number] for number in numbers], dtype=torch.float64)
            jitter = uniform(ranks, ExampleGenerators(self.seed, numbers, _POSITIONS))
            positions = ((ranks + jitter) / len(self.numbers)).to(x)
            source = ExampleGenerators(self.seed, numbers, _BOUND)
            bound = model.bound(x, draws=draws, generator=source, positions=positions, **arguments)
            # Double precision before the sum, so that the terms in the record add up to the bound.
            of_batch = Bound(
                bound.prior.cpu().double(),
                bound.diffusion.cpu().double(),
                bound.reconstruction.cpu().double(),
            ).terms()
            assert bound.draws is not None
            return {**of_batch, "error": strata_error(bound.draws.cpu().double())}

        values = self._measure(terms, "bound" if horizon is None else f"bound, T = {horizon}")
        total, errors = values.pop("nelbo"), values.pop("error")
        by_place = total[torch.from_numpy(np.argsort(order))]
        protocol = BoundProtocol(
            **self._shared(started),
            **self._calibration.describe(horizon, fit),
            time_samples_per_example=draws,
        )
        return Measurement(
            "nelbo",
            total,
            neighbor_error(by_place),
            self.dims,
            protocol,
            steps=horizon,
            as_trained=horizon == self.model.steps,
            fitted=fit is not None,
            null=self._null,
            errors=errors,
            terms={name: float(value.mean()) for name, value in values.items()},
        )

    def nelbo_iw(
        self,
        steps: int,
        samples: int,
        fit: Fit | None = None,
    ) -> Measurement:
        """Measure the importance-weighted bound of the T-step model.

        Each example needs T K evaluations of the predictor.

        Args:
            steps: T.
            samples: K, paths per example.
            fit: fit the reverse process and use it.
        """
        check_whole("steps", steps, 1)
        check_whole("samples", samples, 1)
        started = time.perf_counter()
        options = {"eta": self.model.eta, **self._calibration.fit(steps, fit)}

        def weights(model: DiffusionModel, x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            paths = []
            for k in range(samples):
                source = ExampleGenerators(self.seed, numbers, _PATHS, k)
                path = path_log_weight(
                    model.reverse_process, model.decoder, x, source=source, **options
                )
                paths.append(path.cpu().double())
            log_weights = torch.stack(paths, 1)
            nelbo = math.log(samples) - torch.logsumexp(log_weights, 1)
            return {"nelbo": nelbo, "error": weights_error(log_weights)}

        found = self._measure(weights, f"importance-weighted bound, T = {steps}")
        values = found["nelbo"]
        protocol = BoundProtocol(
            **self._shared(started),
            **self._calibration.describe(steps, fit),
            nfe_mean=steps * samples,
        )
        return Measurement(
            "nelbo",
            values,
            standard_error(values),
            self.dims,
            protocol,
            steps=steps,
            importance_samples=samples,
            fitted=fit is not None,
            null=self._null,
            errors=found["error"],
        )

    def nll(
        self,
        samples: int = 1,
        dequantization: Dequantization = "variational",
        settings: OdeSettings | None = None,
        reverse_check: int = 64,
    ) -> Measurement:
        """Measure the negative log-likelihood under the generative ODE.

        Args:
            samples: K, importance samples of z_0 per example.
            dequantization: how z_0 maps to x, see :mod:`ndm.likelihood`.
            settings: solver, tolerance, probes.
            reverse_check: number of examples to solve forward and back, to report the error.
        """
        settings, started = settings or OdeSettings(), time.perf_counter()
        check_whole("reverse_check", reverse_check, 0)
        exact = self.model.reverse_process.exact_density
        # First, because it is fast and fails whenever the rest would.
        reversibility = (
            None if exact else self._reversibility(dequantization, settings, reverse_check)
        )

        def values_of(model: DiffusionModel, x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            found = model.log_likelihood(
                x,
                samples=samples,
                dequantization=dequantization,
                settings=settings,
                seed=self.seed,
                examples=numbers,
                progress=self.progress,
            )
            nfe = torch.full((len(x),), found.nfe * samples, dtype=torch.float64)
            coarse, fine = found.coarse_log_weights, found.log_weights
            shift = torch.logsumexp(coarse, 1) - torch.logsumexp(fine, 1)
            return {"nll": -found.log_p, "single": -found.single, "nfe": nfe, "shift": -shift}

        values = self._measure(values_of, "likelihood")
        nll, single, shift = values["nll"], values["single"], values["shift"]
        several = len(nll) > 1
        protocol = LikelihoodProtocol(
            **self._shared(started),
            dequantization=dequantization,
            **({} if exact else self._ode_fields(settings)),
            nfe_mean=float(values["nfe"].mean()),
            one_sample_bpd=self._bpd(single.mean()),
            one_sample_bpd_stderr=self._bpd(standard_error(single)) if several else None,
            half_the_nodes_shift_bpd=self._bpd(shift.mean()),
            half_the_nodes_shift_bpd_stderr=self._bpd(standard_error(shift)) if several else 0.0,
            reversibility=reversibility,
        )
        return Measurement(
            "nll",
            nll,
            standard_error(nll),
            self.dims,
            protocol,
            importance_samples=samples,
            null=self._null,
        )

    def _ode_fields(self, settings: OdeSettings) -> dict[str, Any]:
        """Return the fields of the protocol that describe how the ODE was solved."""
        latent_shape = self.model.transform.latent_shape(self._batch(self.numbers[:1]))[1:]
        probes = settings.probes_for(math.prod(latent_shape))
        adaptive = settings.solver in ADAPTIVE_SOLVERS
        return {
            "solver": settings.solver,
            "rtol": settings.rtol if adaptive else None,
            "atol": settings.atol if adaptive else None,
            "nodes": settings.nodes,
            "probes": "exact" if probes is None else probes,
            "probe": None if probes is None else settings.probe,
        }

    def _bpd(self, nats: Tensor | float) -> float:
        return float(bits_per_dim(nats, self.dims))

    def _reversibility(
        self, dequantization: Dequantization, settings: OdeSettings, count: int
    ) -> dict[str, Any] | None:
        if count == 0 or not self.processes.first:
            return None
        chosen = self.numbers[: min(count, self.size)]
        source = ExampleGenerators(self.seed, chosen, _POSITIONS)
        model, x = self.model.given_data(self.data, chosen), self._batch(chosen)
        z, _ = latent(model.process, model.decoder, x, dequantization, source)
        with evaluation_mode(self.model):
            error = round_trip_error(model.reverse_process, z, settings)
        return {
            "examples": len(chosen),
            "rms_error": float(error.square().mean().sqrt()),
            "largest_rms_error": float(error.max()),
        }

    def _batch(self, numbers: list[int]) -> Tensor:
        return self.data.__getitems__(numbers).to(self.model.like)

    @torch.no_grad()
    def _measure(
        self,
        function: Callable[[DiffusionModel, Tensor, list[int]], dict[str, Tensor]],
        what: str,
    ) -> dict[str, Tensor]:
        """Return the values of all examples, from all processes, in the order of the data.

        The function takes the model given the conditions of a batch, the batch, and its numbers.
        Each value is ``(N,)``, float64.
        """
        starts = range(0, len(self.numbers), self.size)
        mine = self.processes.share(len(starts))
        numbers: list[int] = []
        parts: list[dict[str, Tensor]] = []
        bar = tqdm(mine, desc=what, unit="batch", disable=not self.progress, delay=1, leave=False)
        with evaluation_mode(self.model):
            for index in bar:
                batch = self.numbers[starts[index] : starts[index] + self.size]
                given = self.model.given_data(self.data, batch)
                found = function(given, self._batch(batch), batch)
                parts.append({name: value.cpu().double() for name, value in found.items()})
                numbers += batch
        names = parts[0] if parts else {}
        values = {name: torch.cat([part[name] for part in parts]) for name in names}
        numbers, values = self.processes.gather(numbers, values)
        order = torch.tensor(np.argsort(numbers))
        values = {name: value[order] for name, value in values.items()}
        main = next(iter(values)) if "nelbo" not in values else "nelbo"
        bad = (~values[main].isfinite()).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"the {what} of {len(bad)} of {len(numbers)} examples is not finite, first of"
                f" example {sorted(numbers)[bad[0]]}; if training diverged, lower"
                " train.learning_rate"
            )
        return values

    def _shared(self, started: float) -> dict[str, Any]:
        """Return the fields that all protocols share."""
        return {
            "about": self.about,
            "num_examples": len(self.numbers),
            "split_size": len(self.data),
            "limit": self.limit,
            "seed": self.seed,
            "batch_size": self.size,
            "processes": self.processes.size,
            "condition": self.condition,
            "seconds": round(time.perf_counter() - started, 3),
            **model_fields(self.model),
        }


def evaluate_bound(
    model: DiffusionModel,
    data: EventDataset,
    *,
    draws: int = 16,
    limit: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the bound on a data set, in the discrete or continuous time of training.

    Args:
        model: the model.
        data: the examples.
        draws: K, times per example.
        limit: number of examples to evaluate, evenly spread over the data set; None for all.
        batch_size: examples per batch; None for 256, or fewer if the decoder would need too much
            memory.
        seed: seed of times and noise.
        progress: show a progress bar.

    Returns:
        A record for JSON: the bound and its terms in bits/dim, standard errors, counts and seed;
        ``*_nats`` are nats per example. A model that takes a condition is given that of the data;
        ``nelbo_unconditional_*`` is the bound on p(x).

    Raises:
        UserError: the data set is empty, or the bound is not finite.
    """
    measurements = []
    for examples in (data, WithoutConditions(data)) if has_both(model, data) else (data,):
        evaluation = Evaluation(
            model, examples, seed=seed, limit=limit, batch_size=batch_size, progress=progress
        )
        measurements.append(evaluation.nelbo(draws=draws))
    seconds = sum(one.protocol.seconds for one in measurements)
    return {**flat_record(measurements), "seconds": seconds}


def has_both(model: DiffusionModel, data: EventDataset) -> bool:
    """Return whether both p(x|c) and p(x) of a model can be measured on a data set."""
    condition = model.condition
    if condition is None or condition.masks or not condition.has_null:
        return False
    if model.fixed or not len(data):
        return False
    return data.conditions([0]) is not None


def default_batch_size(model: DiffusionModel, dims: int) -> int:
    """Return 256, or fewer, so that the decoder computes at most 2**26 probabilities at once."""
    num_values = 1 if model.decoder.values is None else len(model.decoder.values)
    return max(1, min(256, 2**26 // (dims * num_values)))
