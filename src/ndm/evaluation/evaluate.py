r"""Bounds and likelihoods of a whole data set, each with its standard error and its protocol.

Each of the N examples is looked at K times t. Times are stratified twice: within an example, one in
each of K equal strata of [0, 1]; and over the data set, where the N times of a stratum are spread
evenly in a random order :math:`\pi`,

.. math::
    u_{ik} = \frac{1}{K} \Bigl(k + \frac{\pi(i) + j_i}{N}\Bigr), \qquad j_i \sim U[0, 1), \qquad
    \text{stderr}^2 = \frac{1}{N} \cdot \frac{1}{2(N-1)} \sum_{m} (l_{m+1} - l_m)^2 ,

where l is the estimate of an example, averaged over its K times, and m counts the examples in the
order of :math:`\pi`. Neighbors in that order have nearly the same times, so their differences hold
the spread of the data and the Monte Carlo noise, but not the spread between times, which this
design removes from the mean. Where T steps are few, K is a multiple of T and every step is visited
equally often.

The random numbers of an example depend on the seed and its number in the data set alone: batch size
and number of processes change the result by rounding only, and by the tolerance of an adaptive
solver. Bits per dimension are nats/(D ln 2). For data on a grid of values they are on the scale of
the original integers. For continuous data the bound is a density: nats are given too.
"""

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ndm
from ndm.data import EventDataset, spread
from ndm.elbo import Bound, bits_per_dim, path_log_weight
from ndm.errors import UserError, check_whole
from ndm.evaluation.calibrate import best_eta, best_variance_ratio
from ndm.evaluation.measurement import (
    BoundProtocol,
    LikelihoodProtocol,
    Measurement,
    neighbor_error,
    standard_error,
)
from ndm.evaluation.processes import Processes
from ndm.evaluation.tables import flat_record
from ndm.likelihood import Dequantization, latent
from ndm.model import DiffusionModel
from ndm.ode import ADAPTIVE_SOLVERS, OdeSettings, round_trip_error
from ndm.random import ExampleGenerators, part_seed, uniform

_BOUND, _POSITIONS, _PATHS = 10, 11, 12  # streams of noise


@dataclass
class Evaluation:
    """A model and the examples on which it is measured; each method measures one number.

    Raises:
        UserError: there are no examples, or an argument is out of range.
    """

    model: DiffusionModel
    """The model; its dtype is that of all computations."""
    data: EventDataset
    """The split."""
    seed: int = 0
    """Seed of times, noise, latents and probes."""
    limit: int | None = None
    """Measure only so many examples, evenly spread over the split."""
    batch_size: int | None = None
    """Examples at once; None takes 256, or fewer where the decoder would need too much memory."""
    processes: Processes = field(default_factory=Processes)
    """The processes that share the work."""
    progress: bool = False
    """Show progress bars."""
    about: dict[str, Any] = field(default_factory=dict)
    """What the data are, for the protocol."""

    def __post_init__(self) -> None:
        """Check the arguments, choose the examples."""
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
        self._fits: dict[tuple[int | None, int, int], dict[str, Any]] = {}

    def nelbo(
        self,
        steps: int | str | None = "trained",
        draws: int = 16,
        calibrate_on: EventDataset | None = None,
        calibration_examples: int = 512,
    ) -> Measurement:
        """The NELBO in discrete or continuous time.

        Args:
            steps: T, None for continuous time, ``"trained"`` for the model's own.
            draws: K, times an example; raised to a multiple of T if T is smaller.
            calibrate_on: fit the reverse variance (discrete time) or eta (continuous time) on these
                examples and use it.
            calibration_examples: how many of them to use.
        """
        check_whole("draws", draws, 1)
        horizon = self.model.steps if steps == "trained" else steps
        if horizon is not None:
            check_whole("steps", horizon, 1)
        assert horizon is None or isinstance(horizon, int)
        if horizon is not None and horizon < draws:
            draws = math.ceil(draws / horizon) * horizon
        started = time.perf_counter()
        fitted = self._calibrate(horizon, calibrate_on, calibration_examples)
        order = np.random.default_rng(part_seed(self.seed, _POSITIONS)).permutation(
            len(self.numbers)
        )
        place = dict(zip(self.numbers, order.tolist(), strict=True))

        def terms(x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            ranks = torch.tensor([place[number] for number in numbers], dtype=torch.float64)
            jitter = uniform(ranks, ExampleGenerators(self.seed, numbers, _POSITIONS))
            positions = ((ranks + jitter) / len(self.numbers)).to(x)
            source = ExampleGenerators(self.seed, numbers, _BOUND)
            bound = self.model.bound(
                x, steps=horizon, draws=draws, generator=source, positions=positions, **fitted
            )
            # In double precision before they are added up, so that the terms in the record add up
            # to the bound.
            return Bound(
                bound.prior.cpu().double(),
                bound.diffusion.cpu().double(),
                bound.reconstruction.cpu().double(),
            ).terms()

        values = self._measure(terms, "bound" if horizon is None else f"bound, T = {horizon}")
        total = values.pop("nelbo")
        by_place = total[torch.from_numpy(np.argsort(order))]
        protocol = BoundProtocol(
            **self._shared(started),
            **self._reverse(horizon, calibrate_on, calibration_examples),
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
            fitted=bool(fitted),
            terms={name: float(value.mean()) for name, value in values.items()},
        )

    def nelbo_iw(
        self,
        steps: int,
        samples: int,
        calibrate_on: EventDataset | None = None,
        calibration_examples: int = 512,
    ) -> Measurement:
        """The importance-weighted bound of the T-step model with K whole paths an example, T K
        evaluations of the predictor.

        Args:
            steps: T.
            samples: K.
            calibrate_on: fit the reverse variance on these examples and use it.
            calibration_examples: how many of them to use.
        """
        check_whole("steps", steps, 1)
        check_whole("samples", samples, 1)
        started = time.perf_counter()
        fitted = self._calibrate(steps, calibrate_on, calibration_examples)
        model = self.model
        options = {"eta": model.eta, **fitted}

        def weights(x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            paths = [
                path_log_weight(
                    model.reverse_process,
                    model.decoder,
                    x,
                    steps,
                    ExampleGenerators(self.seed, numbers, _PATHS, k),
                    **options,
                )
                .cpu()
                .double()
                for k in range(samples)
            ]
            return {"nelbo": math.log(samples) - torch.logsumexp(torch.stack(paths), 0)}

        values = self._measure(weights, f"importance-weighted bound, T = {steps}")["nelbo"]
        protocol = BoundProtocol(
            **self._shared(started),
            **self._reverse(steps, calibrate_on, calibration_examples),
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
            fitted=bool(fitted),
        )

    def nll(
        self,
        samples: int = 1,
        dequantization: Dequantization = "variational",
        settings: OdeSettings | None = None,
        reverse_check: int = 64,
    ) -> Measurement:
        """The negative log-likelihood by the generative ODE.

        Args:
            samples: K importance samples of z_0.
            dequantization: from z_0 to x, see :mod:`ndm.likelihood`.
            settings: solver, tolerance, probes.
            reverse_check: solve this many examples there and back, and report how far they come
                back from where they started.
        """
        settings, started = settings or OdeSettings(), time.perf_counter()
        check_whole("reverse_check", reverse_check, 0)
        model = self.model
        reversibility = self._reversibility(
            dequantization, settings, reverse_check
        )  # first: it is short, and fails where the rest would

        def values_of(x: Tensor, numbers: list[int]) -> dict[str, Tensor]:
            options: dict[str, Any] = {
                "settings": settings,
                "seed": self.seed,
                "examples": numbers,
                "progress": self.progress,
            }
            found = model.log_likelihood(
                x, samples=samples, dequantization=dequantization, **options
            )
            nfe = torch.full((len(x),), found.nfe * samples, dtype=torch.float64)
            shift = torch.logsumexp(found.coarse_log_weights, 1) - torch.logsumexp(
                found.log_weights, 1
            )
            return {"nll": -found.log_p, "single": -found.single, "nfe": nfe, "shift": -shift}

        values = self._measure(values_of, "likelihood")
        probes = settings.probes_for(
            math.prod(model.transform.latent_shape(self._batch(self.numbers[:1]))[1:])
        )
        adaptive = settings.solver in ADAPTIVE_SOLVERS
        nll, single, shift = values["nll"], values["single"], values["shift"]
        several = len(nll) > 1
        protocol = LikelihoodProtocol(
            **self._shared(started),
            dequantization=dequantization,
            solver=settings.solver,
            rtol=settings.rtol if adaptive else None,
            atol=settings.atol if adaptive else None,
            nodes=settings.nodes,
            probes="exact" if probes is None else probes,
            probe=None if probes is None else settings.probe,
            nfe_mean=float(values["nfe"].mean()),
            one_sample_bpd=self._bpd(single.mean()),
            one_sample_bpd_stderr=self._bpd(standard_error(single)) if several else None,
            half_the_nodes_shift_bpd=self._bpd(shift.mean()),
            half_the_nodes_shift_bpd_stderr=self._bpd(standard_error(shift)) if several else 0.0,
            reversibility=reversibility,
        )
        return Measurement(
            "nll", nll, standard_error(nll), self.dims, protocol, importance_samples=samples
        )

    def _bpd(self, nats: Tensor | float) -> float:
        return float(bits_per_dim(nats, self.dims))

    def _reversibility(
        self, dequantization: Dequantization, settings: OdeSettings, count: int
    ) -> dict[str, Any] | None:
        if count == 0 or not self.processes.first:
            return None
        chosen = self.numbers[: min(count, self.size)]
        x = self._batch(chosen)
        z, _ = latent(
            self.model.process,
            self.model.decoder,
            x,
            dequantization,
            ExampleGenerators(self.seed, chosen, _POSITIONS),
        )
        with _evaluating(self.model):
            error = round_trip_error(self.model.reverse_process, z, settings)
        return {
            "examples": len(chosen),
            "rms_error": float(error.square().mean().sqrt()),
            "largest_rms_error": float(error.max()),
        }

    def _calibrate(
        self, horizon: int | None, data: EventDataset | None, examples: int
    ) -> dict[str, Any]:
        if data is None:
            return {}
        key = (horizon, id(data), examples)
        if key not in self._fits:
            options: dict[str, Any] = {
                "examples": examples,
                "batch_size": self.size,
                "seed": self.seed,
                "progress": self.progress,
            }
            if horizon is None:
                self._fits[key] = {"eta": best_eta(self.model, data, **options)}
            else:
                self._fits[key] = {
                    "variance_ratio": best_variance_ratio(self.model, data, horizon, **options)
                }
        return self._fits[key]

    def _reverse(
        self, horizon: int | None, data: EventDataset | None, examples: int
    ) -> dict[str, Any]:
        """The eta and the reverse variance of a bound, for its protocol."""
        if data is None:
            return {"eta": self.model.eta, "reverse_variance": "v"}
        fitted = f"fitted on {min(examples, len(data))} training examples"
        if horizon is None:
            return {"eta": fitted, "reverse_variance": "v"}
        return {"eta": self.model.eta, "reverse_variance": fitted}

    def _batch(self, numbers: list[int]) -> Tensor:
        return self.data.__getitems__(numbers).to(self.model.like)

    @torch.no_grad()
    def _measure(
        self, function: Callable[[Tensor, list[int]], dict[str, Tensor]], what: str
    ) -> dict[str, Tensor]:
        """Values of all examples, ``(N,)`` each, float64, in the order of the data, from all
        processes.
        """
        starts = range(0, len(self.numbers), self.size)
        mine = self.processes.share(len(starts))
        numbers: list[int] = []
        parts: list[dict[str, Tensor]] = []
        with _evaluating(self.model):
            for index in tqdm(
                mine, desc=what, unit="batch", disable=not self.progress, delay=1, leave=False
            ):
                batch = self.numbers[starts[index] : starts[index] + self.size]
                parts.append(
                    {
                        name: value.cpu().double()
                        for name, value in function(self._batch(batch), batch).items()
                    }
                )
                numbers += batch
        values = (
            {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        )
        numbers, values = self.processes.gather(numbers, values)
        order = torch.tensor(np.argsort(numbers))
        values = {name: value[order] for name, value in values.items()}
        main = next(iter(values)) if "nelbo" not in values else "nelbo"
        bad = int((~values[main].isfinite()).sum())
        if bad:
            raise UserError(
                f"the {what} of {bad} of {len(numbers)} examples is not finite; the model did not"
                " train well"
            )
        return values

    def _shared(self, started: float) -> dict[str, Any]:
        """What the protocols of all numbers share."""
        like, values = self.model.like, self.model.decoder.values
        density, integers = "density of x as the model sees it", "probability of integers"
        packages = ("torch", "torchdiffeq", "numpy")
        return {
            "about": self.about,
            "num_examples": len(self.numbers),
            "split_size": len(self.data),
            "limit": self.limit,
            "scale": density if values is None else f"{integers}, {len(values)} values",
            "seed": self.seed,
            "batch_size": self.size,
            "processes": self.processes.size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(like.dtype).removeprefix("torch."),
            "device": str(like.device),
            "seconds": round(time.perf_counter() - started, 3),
            "versions": {
                "ndm": ndm.__version__,
                "python": platform.python_version(),
                **{package: version(package) for package in packages},
            },
        }


@contextlib.contextmanager
def _evaluating(model: DiffusionModel) -> Iterator[None]:
    """Evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


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
    """The bound on every example of a data set, in the time, discrete or continuous, that the model
    was trained in.

    Args:
        model: the model.
        data: the examples.
        draws: K, times an example.
        limit: evaluate only so many examples, evenly spread over the data set.
        batch_size: examples at once; None takes 256, or fewer where the decoder would need too much
            memory.
        seed: seed of times and noise.
        progress: show a progress bar.

    Returns:
        JSON-ready record: each term and the bound in bits/dim, with standard error, counts and
        seed; ``*_nats`` for an example.

    Raises:
        UserError: the data set is empty, or the bound is not finite.
    """
    measurement = Evaluation(
        model, data, seed=seed, limit=limit, batch_size=batch_size, progress=progress
    ).nelbo(draws=draws)
    return {**flat_record([measurement]), "seconds": measurement.protocol.seconds}


def default_batch_size(model: DiffusionModel, dims: int) -> int:
    """256, or as many examples as keep the decoder's probabilities of all values within 2**26
    numbers.
    """
    num_values = 1 if model.decoder.values is None else len(model.decoder.values)
    return max(1, min(256, 2**26 // (dims * num_values)))
