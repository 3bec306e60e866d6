r"""A small classifier of labeled images as a feature network, where no standard network fits.

.. math::
    \text{features}_i = (h_i - m_i)/s_i, \qquad
    m, s \text{ mean and standard deviation of } h \text{ over the train split} .

h are the d inputs of the last layers. They are standardized because their scale is arbitrary, while
FID grows with its square and KID with its sixth power.

Inception is trained on photographs; its features mean little for digits of 8 x 8 pixels. A
convolutional network trained on the labels of the train split has features for such images. It has
a fingerprint, and on one machine the same seed gives the same classifier.

The classifier was trained on the train images, so their features differ from those of new images:
real test images do not reach a KID of zero against the train split. Measure them, too, for
reference.
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
_INFO = "classifier"  # key of the training information in config.json


class Classifier(Part):
    """Three convolutions, two of which halve the image, and two linear layers.

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
        self.event_shape, self.classes = list(event_shape), classes
        self.width, self.dims, self.dropout = width, dims, dropout
        channels, rows, columns = event_shape
        positions = math.ceil(rows / 4) * math.ceil(columns / 4)
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * positions, dims),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dims, classes))
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("scale", torch.ones(dims))
        self.info: dict[str, Any] = {}
        """Training information and accuracy."""

    def features(self, x: Tensor) -> Tensor:
        """Return features ``(B, d)`` of images ``(B, C, H, W)`` in [-1, 1]."""
        return (self.body(x) - self.mean) / self.scale

    @torch.no_grad()
    def standardize(self, data: EventDataset, batch_size: int = 256) -> None:
        """Scale the features to mean 0 and standard deviation 1 over these images.

        A constant feature becomes 0.
        """
        hidden = torch.cat([self.body(x) for x in _batches(data, batch_size)]).double()
        spread = hidden.std(0, correction=0)
        self.mean.copy_(hidden.mean(0))
        self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, classes)``."""
        logits: Tensor = self.head(self.body(x))
        return logits


def train_classifier(
    data: DataSource,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    progress: bool = False,
) -> Classifier:
    """Train a classifier on the labels of the train split.

    Args:
        data: labeled images.
        seed: seed of the initial weights and the order of the images.
        steps: number of optimizer steps.
        batch_size: images per step.
        learning_rate: initial learning rate of AdamW; it falls to zero along a cosine.
        progress: show a progress bar.

    Returns:
        The classifier in evaluation mode; its ``info`` has the training settings, and the accuracy
        on each split.

    Raises:
        UserError: the data are not images, or have no labels of at least two classes.
    """
    check_whole("seed", seed, 0)
    check_whole("steps", steps, 1)
    check_whole("batch_size", batch_size, 1)
    description = data.describe()
    train = data.split("train")
    if description.kind != "image" or train.labels is None or len(description.classes) < 2:
        raise UserError(
            f"{description.name} are not images with labels of at least two classes, so no"
            " classifier can be trained; give a feature network as a TorchScript file"
        )
    order = torch.Generator().manual_seed(part_seed(seed, _ORDER))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(description.event_shape, len(description.classes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        desc, hidden = "training the classifier", not progress
        for _ in tqdm(range(steps), desc=desc, unit="step", disable=hidden, delay=1, leave=False):
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


def accuracy(model: Classifier, data: EventDataset, batch_size: int = 256) -> float:
    """Return the fraction of images that are classified correctly."""
    assert data.labels is not None
    return float((classify(model, data, batch_size) == data.labels).double().mean())


@torch.no_grad()
def classify(model: Classifier, images: Tensor | EventDataset, batch_size: int = 256) -> Tensor:
    """Return the class that is found in each image, ``(N,)``, on the CPU.

    Args:
        model: the classifier, in evaluation mode.
        images: images ``(N, C, H, W)`` or a split; values beyond [-1, 1] are clipped.
        batch_size: images per batch.
    """
    place = model.mean.device
    batches = _batches(images, batch_size)
    return torch.cat([model(x.to(place).clamp(-1, 1)).argmax(1).cpu() for x in batches])


def _batches(images: Tensor | EventDataset, size: int) -> Iterator[Tensor]:
    for start in range(0, len(images), size):
        chosen = list(range(start, min(start + size, len(images))))
        yield images[chosen] if isinstance(images, Tensor) else images.__getitems__(chosen)


def save_classifier(folder: Path, classifier: Classifier) -> None:
    """Write ``config.json`` (with accuracy and fingerprint) and ``model.safetensors``."""
    save_model(folder, classifier, {_INFO: classifier.info})


def load_classifier(folder: Path) -> Classifier:
    """Load a classifier written by :func:`save_classifier`, in evaluation mode.

    Raises:
        UserError: files are missing or damaged, or the weights do not match the fingerprint.
    """
    model, config = load_model(folder)
    info = config.get(_INFO)
    if not isinstance(model, Classifier) or not isinstance(info, dict):
        raise UserError(
            f"{folder} has a {type(model).__name__}, not a classifier of ndm quality; give another"
            " folder"
        )
    model.info = info
    if fingerprint(model) != info.get("sha256"):
        raise UserError(
            f"{folder}: the weights do not match the fingerprint in config.json; train the"
            " classifier again"
        )
    return model.eval()


def find_classifier(
    folder: Path, data: DataSource, seed: int = 0, progress: bool = False, **options: Any
) -> Classifier:
    """Load the classifier of a folder, or train one and save it there.

    It is loaded if it was trained on the same data with the same seed and options.

    Args:
        folder: the folder of the classifier.
        data: labeled images.
        seed: see :func:`train_classifier`.
        progress: show a progress bar.
        options: further arguments of :func:`train_classifier`.
    """
    settings = {"data_sha256": data.describe().sha256, "seed": seed, **options}
    if (folder / CONFIG_NAME).exists():
        stored = load_classifier(folder)
        if all(stored.info.get(name) == value for name, value in settings.items()):
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
    """Return a classifier as a feature network, with the fingerprint of its current weights."""
    name = f"classifier of {classifier.info.get('data', 'images')}"
    module = _Features(classifier.eval())
    return FeatureNetwork(module, name, fingerprint(classifier), classifier.dims)
