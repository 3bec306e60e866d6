r"""The best reverse variance and the best eta of a trained model, fitted after training.

Discrete time: with :math:`u = E\|\Delta\mu\|^2 / (D v)`, the cost of a step,
:math:`\tfrac D2 [\log r + (1 + u)/r - 1]`, has its minimum at

.. math::
    r = 1 + u, \qquad \text{with the value } \tfrac D2 \log(1 + u) \le \tfrac D2 u .

Continuous time: with :math:`c = \Delta\dot F/\gamma' - \tfrac12 \Delta F`, the integrand,
:math:`\tfrac12 e^{-\gamma}\gamma' [\|c\|^2/\eta^2 - c \cdot \Delta F + \tfrac14 \eta^2 \|\Delta F\|^2]`,
has its minimum at

.. math::
    \eta^2 = 2 \sqrt{E\, w \|c\|^2 / E\, w \|\Delta F\|^2}, \qquad w = e^{-\gamma}\gamma'
    \qquad (F = x \text{ gives } 1) .

Both are valid bounds of the model with the fitted reverse process, whatever data the fit used. Fit
on the training split, so that results on the test split stay fair. The fit of r is that of
Analytic-DPM (Bao et al. 2022); the fit of eta is ours.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import EventDataset, spread
from ndm.elbo import Draw, continuous_errors, discrete_errors
from ndm.errors import UserError, check_whole
from ndm.model import DiffusionModel
from ndm.random import ExampleGenerators, standard_normal, uniform
from ndm.reverse import require_markov
from ndm.shapes import event_size, sum_event
from ndm.time_sampling import PiecewiseConstant

_FIT = 20  # stream of noise


@torch.no_grad()
def best_variance_ratio(
    model: DiffusionModel,
    data: EventDataset,
    steps: int,
    *,
    bins: int = 64,
    examples: int = 512,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> PiecewiseConstant:
    """Fit r(t), the factor by which the reverse variance of the T-step model exceeds v.

    Args:
        model: the model.
        data: examples to fit on, different from those to evaluate on.
        steps: T.
        bins: number of equal parts of [0, 1] with one r each; if T is smaller, each step has its r.
        examples: number of examples to use, evenly spread over the data.
        batch_size: examples per batch.
        seed: seed of times and noise.
        progress: show a progress bar.

    Returns:
        r(t), for the argument ``variance_ratio`` of :meth:`ndm.NDM.bound` and of
        :class:`ndm.sample.Ancestral`.
    """
    check_whole("steps", steps, 1)

    reverse = require_markov(model.reverse_process, "a fitted reverse variance")

    def errors(x: Tensor, u: Tensor, noise: Tensor) -> list[Tensor]:
        square, _, _ = discrete_errors(
            reverse, model.process.curve(x), Draw(u, noise), steps, model.eta
        )
        return [square / event_size(noise)]

    (excess,) = _means(model, data, errors, min(steps, bins), examples, batch_size, seed, progress)
    return PiecewiseConstant(1 + excess)


@torch.no_grad()
def best_eta(
    model: DiffusionModel,
    data: EventDataset,
    *,
    bins: int = 32,
    examples: int = 512,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> PiecewiseConstant:
    """Fit eta(t) of the reverse process in continuous time.

    The arguments are those of :func:`best_variance_ratio`.

    Returns:
        eta(t), for the argument ``eta`` of :meth:`ndm.NDM.bound`.
    """

    def errors(x: Tensor, u: Tensor, noise: Tensor) -> list[Tensor]:
        # The error is c - ½ eta² ΔF: eta = 0 gives c, and the difference to eta = 1 is ½ ΔF.
        # One evaluation of the networks gives both.
        both = torch.tensor([0.0, 1.0]).to(x).reshape(2, *[1] * noise.dim())
        level, (rest, at_one), _ = continuous_errors(
            model.reverse_process, model.process.curve(x), Draw(u, noise), both
        )
        difference = 2 * (rest - at_one)
        weight = level.snr_decay  # varies within a part of [0, 1], so it belongs in both means
        return [weight * sum_event(rest**2), weight * sum_event(difference**2)]

    rest, square = _means(model, data, errors, bins, examples, batch_size, seed, progress)
    tiny = torch.finfo(torch.float32).tiny
    return PiecewiseConstant((2 * (rest.clamp(min=tiny) / square.clamp(min=tiny)).sqrt()).sqrt())


def _means(
    model: DiffusionModel,
    data: EventDataset,
    errors: Callable[[Tensor, Tensor, Tensor], list[Tensor]],
    bins: int,
    examples: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[Tensor]:
    """Return means over the data of the results of ``errors(x, u, noise)``.

    Each mean is ``(bins,)``, float64, one value for each part of [0, 1]. Each example has a random
    time u in each part.
    """
    if len(data) == 0:
        raise UserError("there is nothing to fit on: the split is empty")
    check_whole("bins", bins, 1)
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    chosen = spread(len(data), examples)
    sums: list[list[Tensor]] = [[] for _ in range(bins)]
    bar = tqdm(
        total=len(chosen),
        desc="fitting the reverse process",
        unit="example",
        disable=not progress,
        delay=1,
        leave=False,
    )
    with bar, evaluation_mode(model):
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            x = data.__getitems__(batch).to(model.like)
            source = ExampleGenerators(seed, batch, _FIT)
            for part in range(bins):
                u = (part + uniform(x.reshape(len(batch), -1)[:, 0], source)) / bins
                u = u.clamp(max=1 - torch.finfo(u.dtype).eps)
                noise = standard_normal(model.process.curve(x).like, source)
                values = torch.stack(errors(x, u, noise))
                sums[part].append(values.cpu().double().sum(1))
            bar.update(len(batch))
    return list(torch.stack([torch.stack(part).sum(0) for part in sums], dim=1) / len(chosen))


@contextlib.contextmanager
def evaluation_mode(model: DiffusionModel) -> Iterator[None]:
    """Put a model into evaluation mode, and restore its mode at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class Calibration:
    """Fitted reverse processes of a model, each computed once.

    Args:
        model: the model.
        options: arguments of :func:`best_variance_ratio` and :func:`best_eta`.
    """

    def __init__(self, model: DiffusionModel, **options: Any):
        self.model, self.options = model, options
        self._fits: dict[tuple[int | None, int, int], dict[str, PiecewiseConstant]] = {}

    def fit(
        self, steps: int | None, data: EventDataset | None, examples: int
    ) -> dict[str, PiecewiseConstant]:
        """Return the fitted argument of :meth:`ndm.NDM.bound` by its name; empty without data.

        Args:
            steps: T to fit the reverse variance, None to fit eta in continuous time.
            data: examples to fit on.
            examples: number of them to use.
        """
        if data is None:
            return {}
        key = (steps, id(data), examples)
        if key not in self._fits:
            options = {"examples": examples, **self.options}
            if steps is None:
                self._fits[key] = {"eta": best_eta(self.model, data, **options)}
            else:
                ratio = best_variance_ratio(self.model, data, steps, **options)
                self._fits[key] = {"variance_ratio": ratio}
        return self._fits[key]

    def describe(
        self, steps: int | None, data: EventDataset | None, examples: int
    ) -> dict[str, Any]:
        """Return the eta and the reverse variance of a bound, for its protocol."""
        if data is None:
            return {"eta": self.model.eta, "reverse_variance": "v"}
        fitted = f"fitted on {min(examples, len(data))} training examples"
        if steps is None:
            return {"eta": fitted, "reverse_variance": "v"}
        return {"eta": self.model.eta, "reverse_variance": fitted}
