"""``ndm quality``: FID, KID, precision and recall of samples of a trained run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ndm.cli.evaluate import warn_of_changed_data
from ndm.cli.parsing import run_parser
from ndm.data import DataSource, EventDataset
from ndm.device import Precision, autocast, pick_device
from ndm.errors import UserError, check_whole
from ndm.quality import (
    FeatureNetwork,
    SampleQuality,
    classifier_features,
    compare_features,
    find_classifier,
    load_classifier,
)
from ndm.quality.features import Scale, torchscript_features
from ndm.serialize import write_json
from ndm.train.config import parse
from ndm.train.run import Run
from ndm.writing import check_option

CLASSIFIER = "classifier"
"""Subfolder of the run for the classifier trained on its data."""


def run_quality(arguments: Sequence[str]) -> None:
    """Parse the arguments of ``ndm quality``, draw samples and measure them."""
    parser = run_parser(
        "quality",
        "Draw samples from a trained run on images and compare them with real images: FID, KID,"
        " precision and recall.",
        "Example: ndm quality runs/digits --n 5000 --json quality.json",
    )
    parser.add_function_arguments(quality, as_positional=False, skip={"run"})
    quality(**vars(parse(parser, arguments)))


def quality(
    run: str,
    n: int = 2000,
    method: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    solver: str | None = None,
    split: str = "train",
    features: str | None = None,
    features_scale: Scale = "bytes",
    features_size: int | None = None,
    features_channels: int = 3,
    neighbors: int = 3,
    seed: int = 0,
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "32-true",
    json: str | None = None,
) -> None:
    """Draw samples from a trained run on images and compare them with real images.

    Args:
        run: folder of the run.
        n: number of samples.
        method: ancestral (DDPM), ddim, sde or ode, or transport for a TransportNDM; by default that
            of the model: ancestral, or sde in continuous time only.
        steps: steps of the time grid; by default the T of the model, or 100 in continuous time.
        eta: noise of the reverse process for ancestral and sde; 1 is DDPM, 0 is deterministic.
        solver: euler, heun, torchsde-euler or torchsde-srk for sde; heun, euler or dopri5 for ode.
        split: split of the data to compare with. All its images are used; the images of the other
            splits are compared with it for reference.
        features: TorchScript file that maps images to features (B, d), such as Inception, or the
            folder of a classifier. By default a small classifier is trained on the labels of the
            train split and saved in RUN/classifier.
        features_scale: values that the TorchScript file expects: bytes (0 to 255, uint8), unit ([0,
            1]) or symmetric ([-1, 1]).
        features_size: height and width that it expects; by default images are not resized.
        features_channels: channels that it expects; gray images are repeated.
        neighbors: k of precision and recall.
        seed: seed of the samples and of the measures; the classifier always has seed 0.
        batch_size: images per batch; the samples depend on it.
        device: auto, cpu or cuda.
        precision: precision of sampling: 32-true, bf16-mixed or 16-mixed. The mixed ones run the
            network of the predictor in half precision.
        json: JSON file for all results.
    """
    _check_options(json, n, neighbors, seed, batch_size)
    folder, place = Path(run), pick_device(device)
    model, data = Run(folder).model().to(place), Run(folder).data()
    description, real_images = data.describe(), data.split(split)
    if description.kind != "image":
        raise UserError(
            f"{description.name} does not contain images, which ndm quality needs; use ndm evaluate"
            " for other data"
        )
    warn_of_changed_data(model.info.get("data"), description)
    network = _network(
        features, folder, data, features_scale, features_size, features_channels, str(place)
    )
    sampler: dict[str, Any] = {"steps": steps, "eta": eta, "solver": solver}
    with autocast(model.like.device, precision):
        samples = model.sample(
            (n, *description.event_shape),
            method,
            seed=seed,
            batch_size=batch_size,
            **sampler,
            progress=True,
        )
    found = _compare(samples, data, split, network, neighbors, seed, batch_size)
    print(_table(found))
    print(
        f"against {len(real_images)} real images of {description.name}/{split}, k = {neighbors},"
        f" seed {seed}"
    )
    print(f"features: {network.name}, d = {network.dims}, sha256 {network.sha256}")
    if json is not None:
        sampler |= {"precision": precision, "method": method or model.default_method}
        sampler |= {"seed": seed, "batch_size": batch_size}
        about = {"run": run, **description.about(split), "sampler": sampler}
        _write(Path(json), about, network, found)


def _check_options(json: str | None, n: int, neighbors: int, seed: int, batch_size: int) -> None:
    check_option("json", json)
    for name, value, least in (
        ("neighbors", neighbors, 1),
        ("n", n, neighbors + 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        check_whole(name, value, least)


def _compare(
    samples: Tensor,
    data: DataSource,
    split: str,
    network: FeatureNetwork,
    neighbors: int,
    seed: int,
    batch_size: int,
) -> dict[str, SampleQuality]:
    """Compare the samples, and the images of the other splits, with those of the split."""
    sets: dict[str, Tensor | EventDataset] = {"samples": samples}
    sets |= {
        f"{name} images": data.split(name)
        for name, size in data.describe().splits.items()
        if name != split and size > neighbors
    }
    real = network(data.split(split), batch_size, progress=True)
    return {
        name: compare_features(
            real,
            network(images, batch_size, True),
            network,
            neighbors=neighbors,
            seed=seed,
            progress=True,
        )
        for name, images in sets.items()
    }


def _write(
    path: Path, about: dict[str, Any], network: FeatureNetwork, found: dict[str, SampleQuality]
) -> None:
    """Write all results as JSON."""
    features = {
        "features": network.name,
        "features_sha256": network.sha256,
        "features_scale": network.scale,
        "features_size": network.size,
    }
    measures = {name.replace(" ", "_"): one.to_dict() for name, one in found.items()}
    write_json(path, {**about, **features, **measures})
    print(f"wrote {path}")


def _network(
    features: str | None,
    run: Path,
    data: DataSource,
    scale: Scale,
    size: int | None,
    channels: int,
    device: str,
) -> FeatureNetwork:
    """Load or train the feature network."""
    if features is not None and not Path(features).is_dir():
        return torchscript_features(
            features, data.describe().event_shape, scale, size, channels, device
        )
    if features is None:
        classifier = find_classifier(run / CLASSIFIER, data, progress=True)
    else:
        classifier = load_classifier(Path(features))
    accuracy = classifier.info["accuracy"]["test"]
    print(f"classifier of {classifier.info['data']}: accuracy {accuracy:.4f} on test")
    return classifier_features(classifier.to(device))


def _table(found: dict[str, SampleQuality]) -> str:
    """Return a plain-text table for the terminal."""
    head = f"{'':<16}{'images':>8}{'FID':>11}{'KID':>11}{'std':>10}{'precision':>11}{'recall':>9}"
    rows = [
        f"{name:<16}{one.generated_images:>8}{one.fid:>11.4f}{one.kid:>11.5f}{one.kid_std:>10.5f}"
        f"{one.precision:>11.4f}{one.recall:>9.4f}"
        for name, one in found.items()
    ]
    return "\n".join([head, "-" * len(head), *rows])
