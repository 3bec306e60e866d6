r"""Likelihood on natural images (NDM, section 4.1).

CIFAR-10, ImageNet at 32 x 32 and 64 x 64, CelebA-HQ at 64 x 64 and, in a latent space, at
256 x 256:

.. math::
    F(x, t) = (1 - t)\, x + t\, g(x, t), \qquad
    \text{bits/dim} = \frac{\text{nats}}{D \ln 2}, \quad D = 3 \cdot \text{side}^2 .

:data:`FACTS` describes the five experiments. Each trains the configuration of its name, measures
the NELBO in continuous time on the test split and the NLL by the ODE on part of it, and compares
both with published numbers. ``smoke`` writes a few synthetic images in the real format of the data
set and shrinks the model. It only checks that everything runs; its numbers mean nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ndm.data import DataSource, spread
from ndm.decoder import NetworkDecoder
from ndm.device import Precision, autocast, pick_device
from ndm.evaluation.evaluate import Evaluation
from ndm.evaluation.tables import plus_minus
from ndm.model import DiffusionModel
from ndm.ode import OdeSettings
from ndm.quality import compare_features, torchscript_features
from ndm.random import part_seed
from ndm.reproduce.report import Report, check_learned
from ndm.reproduce.synthetic import write_cifar, write_faces, write_imagenet
from ndm.viz import image_grid, new_figure, transform_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Published:
    """A bound that a paper reports."""

    who: str
    bpd: float
    release: str = ""
    """The release of the data, where there are several."""


OORD_RELEASE = "release of van den Oord et al. 2016"
UNKNOWN_RELEASE = "unknown release"
NDM_PAPER = "NDM (Bartosh et al. 2024)"
VDM_PAPER = "VDM (Kingma et al. 2021)"
DIFFENC_PAPER = "DiffEnc (Nielsen et al. 2024)"
TOLERANCE = 0.05
"""Tolerance above the published bound, bits/dim: larger than differences between seeds, smaller
than those between the published models.
"""
SMOKE = {
    "model.predictor.network.channels": 8,
    "model.predictor.network.blocks": 1,
    "model.transform.network.channels": 8,
    "data.partial": True,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.warmup": 1,
    "train.precision": "32-true",
    "train.workers": 0,
    "train.accelerator": "cpu",
    "train.devices": 1,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.evaluation_draws": 1,
    "train.evaluation_limit": 4,
    "train.sample_images": 4,
    "train.sample_steps": 2,
}
"""Overrides for the smoke size of all five experiments."""
SMALL_TRANSFORM = {"model.transform.network.blocks": 1, "model.transform.network.multiples": [1]}
SMALL_STAGES = {
    "model.predictor.network.multiples": [1, 1],
    "model.predictor.network.attention": [False, True],
}


@dataclass(frozen=True)
class Facts:
    """Description of one data set's experiment."""

    title: str
    synthesize: Callable[[Path, int], None]
    """Writes a few synthetic images in the format of the data set into a folder."""
    published: tuple[Published, ...] = ()
    draws: int = 8
    """Times per image in the NELBO."""
    nll_images: int = 1000
    """Images for the NLL; each takes hundreds of evaluations and as many gradients."""
    sample_steps: int = 500
    quality_images: int = 50_000
    """Samples for FID; 50,000 is customary."""
    smoke: Mapping[str, object] = field(default_factory=lambda: dict(SMALL_TRANSFORM))
    """Overrides for the smoke size."""


FACTS: Mapping[str, Facts] = {
    "cifar10": Facts(
        "CIFAR-10",
        write_cifar,
        (Published(NDM_PAPER, 2.70), Published(VDM_PAPER, 2.65), Published(DIFFENC_PAPER, 2.62)),
    ),
    "imagenet32": Facts(
        "ImageNet, 32 x 32",
        lambda folder, seed: write_imagenet(folder, 32, seed),
        (Published(NDM_PAPER, 3.55, UNKNOWN_RELEASE), Published(VDM_PAPER, 3.72, OORD_RELEASE)),
        draws=2,
        nll_images=500,
    ),
    "imagenet64": Facts(
        "ImageNet, 64 x 64",
        lambda folder, seed: write_imagenet(folder, 64, seed),
        (Published(NDM_PAPER, 3.35, UNKNOWN_RELEASE), Published(VDM_PAPER, 3.40, OORD_RELEASE)),
        draws=2,
        nll_images=200,
    ),
    "celebahq64": Facts(
        "CelebA-HQ, 64 x 64",
        lambda folder, seed: write_faces(folder, 32, seed),
        nll_images=200,
        smoke={"data.size": 16, **SMALL_STAGES, "model.transform.network.blocks": 1},
    ),
    "celebahq256": Facts(
        "CelebA-HQ, 256 x 256, in a latent space",
        lambda folder, seed: write_faces(folder, 32, seed),
        draws=4,
        nll_images=200,
        smoke={"data.size": 32, **SMALL_STAGES, "model.decoder.network.channels": 8},
    ),
}


def run(report: Report) -> None:
    """Train the model, measure it and plot the figures."""
    facts = FACTS[report.name]
    overrides = (
        (SMOKE, facts.smoke, report.synthetic_data(facts.synthesize)) if report.smoke else ()
    )
    config = check_learned(report.config(report.name, *overrides))
    model, data = report.train("ndm", config)
    model.to(pick_device(config.get("train.accelerator")))
    introduce(report, facts, data)
    likelihood(report, facts, model, data)
    quality(report, facts, model, data, config.get("train.precision"))
    pictures(report, facts, model, data)


def introduce(report: Report, facts: Facts, data: DataSource) -> None:
    """Describe the data on the page."""
    description = data.describe()
    counts = ", ".join(f"{count:,} {split}" for split, count in description.splits.items())
    report.text(
        f"{facts.title}: `{description.name}`, {description.version}; {counts} images; sha256 of"
        f" the content `{description.sha256}`."
    )
    if report.smoke:
        report.text("**A few synthetic images and a tiny model: these numbers mean nothing.**")


def likelihood(report: Report, facts: Facts, model: DiffusionModel, data: DataSource) -> None:
    """Measure NELBO and NLL, and tabulate them with the published numbers."""
    description, test = data.describe(), data.split("test")
    if report.smoke:
        bound_limit, draws, nll_limit, reverse_check = 4, 2, 2, 0
        settings = OdeSettings(nodes=4, probes=1, rtol=1e-2, atol=1e-2)
    else:
        bound_limit, draws, nll_limit, reverse_check = None, facts.draws, facts.nll_images, 16
        settings = OdeSettings()

    def evaluation(limit: int | None) -> Evaluation:
        about = description.about("test")
        return Evaluation(model, test, report.seed, limit, progress=True, about=about)

    nelbo = report.measure("nelbo", lambda: evaluation(bound_limit).nelbo(None, draws=draws))
    nll = report.measure(
        "nll",
        lambda: evaluation(nll_limit).nll(settings=settings, reverse_check=reverse_check),
    )
    rows = [
        [f"{one.who}, published", f"{one.bpd:.2f}", one.release or "the test split"]
        for one in facts.published
    ]
    for what, record in (("NELBO, continuous time", nelbo), ("NLL by the ODE", nll)):
        rows.append(
            [
                f"this run, {what}",
                plus_minus(record["bpd"], record["bpd_stderr"], 4),
                f"{record['num_examples']:,} of {record['split_size']:,} test images",
            ]
        )
    report.table(["model", "bits/dim", "measured on"], rows)
    if not facts.published:
        report.text("No published number: we know of no reliable one on this split.")
    if any(one.release for one in facts.published):
        report.text(
            "Bits/dim on the two releases of small ImageNet cannot be compared: the release of"
            " Chrabaszcz et al. 2017 is smoother and easier."
        )
    for one in facts.published:
        if one.who == NDM_PAPER and not one.release and not description.name.endswith("-partial"):
            report.expect(
                f"NELBO, bits/dim, at most {TOLERANCE} above the published {one.bpd:.2f}",
                nelbo["bpd"],
                one.bpd + TOLERANCE,
            )


def quality(
    report: Report, facts: Facts, model: DiffusionModel, data: DataSource, precision: Precision
) -> None:
    """Compare samples with the train split by FID, KID, precision and recall.

    This takes the user's feature network.
    """
    if report.settings.features is None:
        report.text(
            "FID is not measured. It needs a feature network: `--features FILE`, the usual"
            " Inception network as TorchScript."
        )
        return
    description, train, test = data.describe(), data.split("train"), data.split("test")
    images, steps = (8, 2) if report.smoke else (facts.quality_images, facts.sample_steps)
    network = torchscript_features(
        report.settings.features, description.event_shape, device=model.like.device
    )
    options: dict[str, Any] = {"seed": report.seed, "progress": True}

    def chunk(index: int) -> Tensor:
        count, seed = min(_CHUNK, images - index * _CHUNK), part_seed(report.seed, _QUALITY, index)
        with autocast(model.like.device, precision):
            x = model.sample(
                (count, *description.event_shape), steps=steps, seed=seed, batch_size=64
            )
        return network(x, 64)

    def measure() -> dict[str, Any]:
        chunks = tqdm(
            range(math.ceil(images / _CHUNK)),
            desc="sampling for FID",
            unit=f"{_CHUNK} images",
            disable=None,
        )
        key = f"features-{network.sha256[:12]}"
        samples = torch.cat(
            [report.cache_tensor(f"{key}-{index:03d}", partial(chunk, index)) for index in chunks]
        )
        real, held_out = (
            network(split, 64, True, spread(len(split), images)) for split in (train, test)
        )
        found = {"samples": samples, "test images": held_out}
        return {
            name: compare_features(real, features, network, **options).to_dict()
            for name, features in found.items()
        }

    found = report.cache(f"quality-{network.sha256[:12]}", measure)
    report.add_number("quality", found)
    record = found["samples"]
    report.text(
        f"{record['generated_images']:,} ancestral samples of {steps} steps against"
        f" {record['real_images']:,} train images, by {record['features']} (sha256"
        f" {record['features_sha256'][:12]}, d = {record['dims']}):"
    )
    report.quality_table(found, (3, 5, 3, 3))


_QUALITY = 7  # random stream
# samples whose features are cached in one file, so that an interrupted run loses few of them
_CHUNK = 1000


def pictures(report: Report, facts: Facts, model: DiffusionModel, data: DataSource) -> None:
    """Plot samples next to test images, and F(x, t), z_t and x̂ over time."""
    steps, side = (4, 2) if report.smoke else (facts.sample_steps, 8)
    report.figure(
        "samples",
        sample_figure(model, data, side, steps, report.seed),
        f"Left: all ancestral samples of seed {report.seed}, {steps} steps. Right: test images.",
    )
    test, decoder = data.split("test"), model.decoder
    note = ""
    show: Callable[[Tensor], Tensor] | None = None
    if isinstance(decoder, NetworkDecoder):
        show = decoder.network
        note = " Latents are shown decoded; F(x, t) = E(x) does not depend on t."
    chosen = test.__getitems__([0, len(test) // 2])
    with torch.no_grad():
        drawn = transform_figure(model, chosen, seed=report.seed, show=show)
    report.figure(
        "transform", drawn, f"Two test images over time: F(x, t), z_t and the prediction.{note}"
    )


def sample_figure(
    model: DiffusionModel, data: DataSource, side: int, steps: int, seed: int
) -> "Figure":
    """Draw ``side`` x ``side`` ancestral samples next to test images, evenly spread."""
    test, shape = data.split("test"), data.describe().event_shape
    samples = model.sample(
        (side * side, *shape), "ancestral", steps=steps, seed=seed, progress=True
    )
    numbers = spread(max(len(test), side * side), side * side)
    truth = test.__getitems__([number % len(test) for number in numbers])
    figure = new_figure(8.4, 4.6)
    panels = (("samples", samples), ("test images", truth))
    for axis, (title, images) in zip(figure.subplots(1, 2), panels, strict=True):
        axis.imshow(image_grid(images, side, gap=max(1, shape[-1] // 32)), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
