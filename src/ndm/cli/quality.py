"""``ndm quality``: FID, KID, precision and recall of samples, accuracy of samples of classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ndm.cli.conditions import bound_to, wanted
from ndm.cli.evaluate import warn_of_changed_data
from ndm.cli.parsing import run_parser
from ndm.data import DataDescription, DataSource
from ndm.device import Precision, autocast, pick_device
from ndm.errors import UserError, check_whole
from ndm.guidance import Guide
from ndm.quality import (
    Classifier,
    FeatureNetwork,
    SampleQuality,
    as_frequent,
    class_accuracy,
    class_diversity,
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
        " precision and recall, and of samples of classes also accuracy and diversity.",
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
    condition: str | None = None,
    guidance: float = 1.0,
    guide: Guide = "curve",
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
        n: number of samples; with --condition, of each class.
        method: ancestral (DDPM), ddim, sde or ode, or transport for a TransportNDM; by default that
            of the model: ancestral, or sde in continuous time only.
        steps: steps of the time grid; by default the T of the model, or 100 in continuous time.
        eta: noise of the reverse process for ancestral and sde; 1 is DDPM, 0 is deterministic.
        solver: euler, heun, torchsde-euler or torchsde-srk for sde; heun, euler or dopri5 for ode.
        condition: classes to sample of a model that takes them, such as 3 or 0,1,2, a file with one
            class in each line, or nothing for p(x). By default classes are as frequent as in
            training. With classes, the samples' accuracy and diversity are measured too.
        guidance: weight of the condition; 1 samples p(x|c), more follows the condition more than
            the data do.
        guide: what is guided: curve, as in classifier-free guidance, or x, which evaluates F once.
        split: split of the data to compare with. All its images are used, or with --condition as
            many as have classes as frequent as the samples'. The images of the other splits are
            compared with it for reference.
        features: TorchScript file that maps images to features (B, d), such as Inception, or the
            folder of a classifier. By default a small classifier is trained on the labels of the
            train split and saved in RUN/classifier; it also finds the classes of samples.
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
    description = data.describe()
    if description.kind != "image":
        raise UserError(
            f"{description.name} does not contain images, which ndm quality needs; use ndm evaluate"
            " for other data"
        )
    data.split(split)  # raises an error if there is none of this name
    warn_of_changed_data(model.info.get("data"), description)
    asked = wanted(condition, n, model, description, seed, lambda: data.split("train"))
    check_whole("n", asked.count, neighbors + 1)
    model = bound_to(asked, model, guidance, guide)
    network, classifier = _networks(
        features, folder, data, features_scale, features_size, features_channels, str(place)
    )
    if asked.classes is not None:
        classifier = classifier or _classifier(folder / CLASSIFIER, data, str(place))
        _check_classes(classifier, description)
    alike = None if condition is None else asked.classes
    real = _real_images(data, split, network, batch_size, alike, seed)
    sampler: dict[str, Any] = {"steps": steps, "eta": eta, "solver": solver}
    with autocast(model.like.device, precision):
        samples = model.sample(
            (asked.count, *description.event_shape),
            method,
            seed=seed,
            batch_size=batch_size,
            **sampler,
            guidance=guidance,
            guide=guide,
            progress=True,
        )
    sets = {"samples": _Images(network(samples, batch_size, True), asked.classes)}
    sets |= {f"{name} images": one for name, one in real.items() if name != split}
    found = _compare(real[split], sets, network, neighbors, seed)
    print(_table(found))
    print(
        f"against {len(real[split].features)} real images of {description.name}/{split},"
        f" k = {neighbors}, seed {seed}"
    )
    print(f"features: {network.name}, d = {network.dims}, sha256 {network.sha256}")
    about: dict[str, Any] = {"run": run, **description.about(split)}
    if model.condition is not None:
        about |= {"condition": condition or "as in training", "guidance": guidance, "guide": guide}
    if asked.classes is not None and classifier is not None:
        accuracy = class_accuracy(classifier, samples, asked.classes, batch_size)
        of_classes = _of_classes(accuracy, classifier, real[split], sets)
        print(_class_lines(of_classes))
        about |= of_classes
    if json is not None:
        sampler |= {"precision": precision, "method": method or model.default_method}
        sampler |= {"seed": seed, "batch_size": batch_size}
        _write(Path(json), {**about, "sampler": sampler}, network, found)


@dataclass(frozen=True)
class _Images:
    """The features of images ``(N, d)`` and their classes ``(N,)``, if they are known."""

    features: Tensor
    classes: Tensor | None


def _check_options(json: str | None, n: int, neighbors: int, seed: int, batch_size: int) -> None:
    check_option("json", json)
    for name, value, least in (
        ("neighbors", neighbors, 1),
        ("n", n, neighbors + 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        check_whole(name, value, least)


def _real_images(
    data: DataSource,
    split: str,
    network: FeatureNetwork,
    batch_size: int,
    alike: Tensor | None,
    seed: int,
) -> dict[str, _Images]:
    """Return the real images of each split, the one to compare with first.

    Args:
        data: the data.
        split: the split to compare with.
        network: the feature network.
        batch_size: images per batch.
        alike: the classes of the samples, if the real images shall have theirs.
        seed: seed of the choice of images.
    """
    found = {}
    for name in (split, *(name for name in data.describe().splits if name != split)):
        images, chosen = data.split(name), None
        labels = images.labels
        if alike is not None and labels is not None:
            if name != split and not bool(torch.isin(alike, labels).all()):
                continue  # another split, which is only for reference, lacks a class
            chosen = as_frequent(labels, alike, seed)
            labels = labels[chosen]
        examples = None if chosen is None else chosen.tolist()
        found[name] = _Images(network(images, batch_size, True, examples), labels)
    return found


def _compare(
    real: _Images, sets: dict[str, _Images], network: FeatureNetwork, neighbors: int, seed: int
) -> dict[str, SampleQuality]:
    """Compare samples, and images of other splits, with real images."""
    return {
        name: compare_features(
            real.features, one.features, network, neighbors=neighbors, seed=seed, progress=True
        )
        for name, one in sets.items()
        if name == "samples" or len(one.features) > neighbors
    }


def _of_classes(
    accuracy: tuple[float, float], classifier: Classifier, real: _Images, sets: dict[str, _Images]
) -> dict[str, float | None]:
    """Return accuracy and diversity of samples of classes, each with that of real images."""
    measured: dict[str, float | None] = {
        "accuracy": accuracy[0],
        "accuracy_stderr": accuracy[1],
        "classifier_accuracy": classifier.info["accuracy"]["test"],
    }
    others = [name for name in sets if name != "samples"]
    for prefix, name in zip(("", "real_"), ("samples", *others[:1]), strict=False):
        one, found = sets[name], None
        if one.classes is not None and real.classes is not None:
            found = class_diversity(real.features, real.classes, one.features, one.classes)
        measured[f"{prefix}diversity"], measured[f"{prefix}diversity_stderr"] = found or (
            None,
            None,
        )
    return measured


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


def _networks(
    features: str | None,
    run: Path,
    data: DataSource,
    scale: Scale,
    size: int | None,
    channels: int,
    device: str,
) -> tuple[FeatureNetwork, Classifier | None]:
    """Load or train the feature network, and return the classifier if it is one."""
    if features is not None and not Path(features).is_dir():
        shape = data.describe().event_shape
        return torchscript_features(features, shape, scale, size, channels, device), None
    classifier = (
        _classifier(run / CLASSIFIER, data, device)
        if features is None
        else _shown(load_classifier(Path(features)), device)
    )
    return classifier_features(classifier), classifier


def _classifier(folder: Path, data: DataSource, device: str) -> Classifier:
    """Load or train the classifier of the run."""
    return _shown(find_classifier(folder, data, progress=True), device)


def _shown(classifier: Classifier, device: str) -> Classifier:
    accuracy = classifier.info["accuracy"]["test"]
    print(f"classifier of {classifier.info['data']}: accuracy {accuracy:.4f} on test")
    return classifier.to(device)


def _check_classes(classifier: Classifier, description: DataDescription) -> None:
    """Check that a classifier knows the classes of the data.

    Raises:
        UserError: it does not.
    """
    if classifier.classes != len(description.classes):
        raise UserError(
            f"the classifier has {classifier.classes} classes and {description.name} has"
            f" {len(description.classes)}: leave features out, or give a classifier of these data"
        )


def _class_lines(found: dict[str, float | None]) -> str:
    """Return accuracy and diversity for the terminal, each with that of other real images."""
    lines = []
    for name, reference in (("accuracy", "classifier_accuracy"), ("diversity", "real_diversity")):
        if (value := found[name]) is not None:
            text = f"{name} within classes" if name == "diversity" else f"{name} of classes"
            text += f" {value:.4f} ± {found[f'{name}_stderr']:.4f}"
            real = found.get(reference)
            lines.append(text if real is None else f"{text}, of real images {real:.4f}")
    return "\n".join(lines)


def _table(found: dict[str, SampleQuality]) -> str:
    """Return a plain-text table for the terminal."""
    head = f"{'':<16}{'images':>8}{'FID':>11}{'KID':>11}{'std':>10}{'precision':>11}{'recall':>9}"
    rows = [
        f"{name:<16}{one.generated_images:>8}{one.fid:>11.4f}{one.kid:>11.5f}{one.kid_std:>10.5f}"
        f"{one.precision:>11.4f}{one.recall:>9.4f}"
        for name, one in found.items()
    ]
    return "\n".join([head, "-" * len(head), *rows])
