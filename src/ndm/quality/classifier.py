r"""A small classifier of labeled images, whose last features serve where no standard network does.

.. math::
    \text{features}_i = (h_i - m_i)/s_i, \qquad m, s \text{ mean and standard deviation of } h \text{ over the train split} ,

h the d numbers from which a last layer tells the classes. Standardized, since what a classifier
leaves of scale is accident, FID grows with its square and KID with its sixth power.

Inception knows photographs, and means nothing for digits of 8 x 8 pixels. A convolutional network
trained on the labels of the train split knows what matters in such images. It is trained from its
seed and carries a fingerprint; on one machine the same seed gives the same classifier.

It has seen the train images, so their features differ from those of fresh images: real test images
do not reach a KID of zero against the train split. Measure them, too, for a reference.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ndm.data import DataSource, EventDataset
from ndm.errors import UserError, check_whole
from ndm.parts import Part
from ndm.quality.features import FeatureNetwork
from ndm.random import part_seed
from ndm.serialize import CONFIG_NAME, fingerprint, load_model, save_model

_ORDER = 32  # stream of noise
_WORDS = "classifier"  # where config.json keeps how it was trained


class Classifier(Part):
    """Three convolutions, two of them halving the image, and two linear layers.

    Args:
        event_shape: (channels, height, width) of the images.
        classes: number of classes.
        width: channels of the first convolution; the others have twice as many.
        dims: number d of features.
        dropout: dropout probability before the features.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        classes: int,
        width: int = 32,
        dims: int = 64,
        dropout: float = 0.3,
    ):
        super().__init__()
        self.event_shape, self.classes, self.width, self.dims, self.dropout = (
            list(event_shape),
            classes,
            width,
            dims,
            dropout,
        )
        channels, height, width_of_image = event_shape
        left = math.ceil(height / 4) * math.ceil(width_of_image / 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * left, dims),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dims, classes))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("scale", torch.ones(dims))
        self.info: dict[str, Any] = {}
        """How it was trained, and its accuracy."""

    def features(self, x: Tensor) -> Tensor:
        """Features ``(B, d)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        return (self.body(x) - self.mean) / self.scale

    @torch.no_grad()
    def standardize(self, data: EventDataset, batch_size: int = 256) -> None:
        """Let the features have mean 0 and standard deviation 1 over these images; a constant
        feature stays 0.
        """
        hidden = torch.cat([self.body(x) for x in _batches(data, batch_size)]).double()
        spread = hidden.std(0, correction=0)
        self.mean.copy_(hidden.mean(0))
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)``."""
        found: Tensor = self.head(self.body(x))
        return found


def train_classifier(
    data: DataSource,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    progress: bool = False,
) -> Classifier:
    """Train a classifier on the labels of the train split, and measure it on the test split.

    Args:
        data: labeled images.
        seed: of the first weights and the order of the images.
        steps: optimizer steps.
        batch_size: images in a step.
        learning_rate: peak rate of AdamW, which falls to zero by a cosine.
        progress: show a progress bar.

    Returns:
        The classifier in evaluation mode; its ``info`` says how it was trained and what it reaches.

    Raises:
        UserError: the data are no images or have no labels.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("steps", steps, 1),
        ("batch_size", batch_size, 1),
    ):
        check_whole(name, value, least)
    description = data.describe()
    train = data.split("train")
    if description.kind != "image" or train.labels is None or len(description.classes) < 2:
        raise UserError(
            f"{description.name} are not images with labels of two classes or more, so no"
            " classifier can learn features of them; name a feature network of your own, as a"
            " TorchScript file"
        )
    order = torch.Generator().manual_seed(part_seed(seed, _ORDER))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(description.event_shape, len(description.classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in tqdm(
            range(steps),
            desc="training the classifier",
            unit="step",
            disable=not progress,
            delay=1,
            leave=False,
        ):
            chosen = torch.randint(len(train), (batch_size,), generator=order)
            loss = cross_entropy(model(train.__getitems__(chosen.tolist())), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    model.eval().standardize(train)
    model.info = {
        "data": description.name,
        "data_sha256": description.sha256,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "accuracy": {name: accuracy(model, data.split(name)) for name in description.splits},
        "sha256": fingerprint(model),
    }
    return model


@torch.no_grad()
def accuracy(model: Classifier, data: EventDataset, batch_size: int = 256) -> float:
    """Part of the images that the classifier gets right."""
    assert data.labels is not None
    guesses = torch.cat([model(x).argmax(1) for x in _batches(data, batch_size)])
    return float((guesses == data.labels).double().mean())


def _batches(data: EventDataset, size: int) -> Iterator[Tensor]:
    for start in range(0, len(data), size):
        yield data.__getitems__(list(range(start, min(start + size, len(data)))))


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Write ``config.json`` (with accuracy and fingerprint) and ``model.safetensors``."""
    save_model(folder, classifier, {_WORDS: classifier.info})


def load_classifier(folder: Path) -> Classifier:
    """Read what :func:`save_classifier` wrote, in evaluation mode.

    Raises:
        UserError: files are missing or damaged, or the weights are not those of the fingerprint.
    """
    model, config = load_model(folder)
    info = config.get(_WORDS)
    if not isinstance(model, Classifier) or not isinstance(info, dict):
        raise UserError(f"{folder} holds a {type(model).__name__}, not a classifier of ndm quality")
    model.info = info
    if fingerprint(model) != info.get("sha256"):
        raise UserError(
            f"{folder}: the weights are not those of the fingerprint in config.json; train the"
            " classifier again"
        )
    return model.eval()


def find_classifier(
    folder: Path, data: DataSource, seed: int = 0, progress: bool = False, **options: Any
) -> Classifier:
    """The classifier of a folder if it was trained on these data from this seed with these options;
    else one trained now and written there.
    """
    wanted = {"data_sha256": data.describe().sha256, "seed": seed, **options}
    if (folder / CONFIG_NAME).exists():
        stored = load_classifier(folder)
        if all(stored.info.get(name) == value for name, value in wanted.items()):
            return stored
    classifier = train_classifier(data, seed, progress=progress, **options)
    save_classifier(folder, classifier)
    return classifier


class _Features(nn.Module):
    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier.features(x)


def classifier_features(classifier: Classifier) -> FeatureNetwork:
    """The classifier as a feature network; its fingerprint is that of the weights as they are now."""
    name = f"classifier of {classifier.info.get('data', 'images')}"
    return FeatureNetwork(
        _Features(classifier.eval()), name, fingerprint(classifier), classifier.dims
    )
