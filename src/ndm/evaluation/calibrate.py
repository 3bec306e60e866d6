r"""The best reverse variance and the best eta of a trained model, fitted after training.

Discrete time: with :math:`u = E\|\Delta\mu\|^2 / (D v)` the step's cost :math:`\tfrac D2 [\log r +
(1 + u)/r - 1]` is least at

.. math::
    r = 1 + u, \qquad \text{where it is } \tfrac D2 \log(1 + u) \le \tfrac D2 u .

Continuous time: with :math:`c = \Delta\dot F/\gamma' - \tfrac12 \Delta F` the integrand is
:math:`\tfrac12 e^{-\gamma}\gamma' [\|c\|^2/\eta^2 - c \cdot \Delta F + \tfrac14 \eta^2 \|\Delta F\|^2]`, least at

.. math::
    \eta^2 = 2 \sqrt{E\, w \|c\|^2 / E\, w \|\Delta F\|^2}, \qquad w = e^{-\gamma}\gamma' \qquad (F = x \text{ gives } 1) .

Both are bounds of the model with that reverse process, whatever data the fit used; fit on the
training split, so that the number on the test split stays a fair one. Source of the first:
Analytic-DPM (Bao et al. 2022); of the second: ours.
"""

from collections.abc import Callable

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
    """Fit r(t), by which the reverse variance of the T-step model should exceed v.

    Args:
        model: the model.
        data: the examples to fit on; not those to evaluate on.
        steps: T.
        bins: one r for each of the T steps, or for each of this many parts of [0, 1] if T is
            larger.
        examples: how many examples to use, evenly spread over the data.
        batch_size: examples at once.
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
    """Fit eta(t) of the reverse process in continuous time; arguments as
    :func:`best_variance_ratio`.

    Returns:
        eta(t), for the argument ``eta`` of :meth:`ndm.NDM.bound`.
    """

    def errors(x: Tensor, u: Tensor, noise: Tensor) -> list[Tensor]:
        # The error is c - ½ eta² ΔF: at eta = 0 it is c, and what is gone at eta = 1 is ½ ΔF. One
        # evaluation of the networks serves both.
        both = torch.tensor([0.0, 1.0]).to(x).reshape(2, *[1] * noise.dim())
        level, (rest, at_one), _ = continuous_errors(
            model.reverse_process, model.process.curve(x), Draw(u, noise), both
        )
        difference = 2 * (rest - at_one)
        weight = level.snr_decay  # it changes within a part, and belongs to both means
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
    """Means over the data of each result of ``errors(x, u, noise)``, at a random time in each part
    of [0, 1]; each ``(bins,)``, float64.
    """
    if len(data) == 0:
        raise UserError("there is nothing to fit on: the split is empty")
    check_whole("bins", bins, 1)
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    chosen, training = spread(len(data), examples), model.training
    model.eval()
    sums: list[list[Tensor]] = [[] for _ in range(bins)]
    bar = tqdm(
        total=len(chosen),
        desc="fitting the reverse process",
        unit="example",
        disable=not progress,
        delay=1,
        leave=False,
    )
    try:
        for start in range(0, len(chosen), batch_size):
            batch = chosen[start : start + batch_size]
            x, source = (
                data.__getitems__(batch).to(model.like),
                ExampleGenerators(seed, batch, _FIT),
            )
            for part in range(bins):
                u = (part + uniform(x.reshape(len(batch), -1)[:, 0], source)) / bins
                values = torch.stack(
                    errors(
                        x,
                        u.clamp(max=1 - torch.finfo(u.dtype).eps),
                        standard_normal(model.process.curve(x).like, source),
                    )
                )
                sums[part].append(values.cpu().double().sum(1))
            bar.update(len(batch))
    finally:
        bar.close()
        model.train(training)
    return list(torch.stack([torch.stack(part).sum(0) for part in sums], dim=1) / len(chosen))
