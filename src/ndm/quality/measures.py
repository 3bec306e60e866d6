"""FID and KID by torchmetrics, precision and recall by nearest neighbors.

The formulas are in :mod:`ndm.quality`. KID is the mean over random subsets, drawn from both sets
without replacement. Its ``kid_std`` is the standard deviation over subsets; they overlap, so it is
not a standard error. Precision and recall depend on the number of images, so the larger set is
reduced at random to the size of the smaller one.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ndm.data import EventDataset
from ndm.errors import UserError, check_whole, require
from ndm.quality.features import FeatureNetwork
from ndm.random import part_seed

_SUBSETS, _CUT = 30, 31  # streams of noise
_PAIRS_AT_ONCE = 2**22


@dataclass(frozen=True)
class SampleQuality:
    """Measures of generated images against real ones, and the settings to reproduce them."""

    fid: float
    """Fréchet distance of the features, biased upward for small numbers of images."""
    kid: float
    """Squared maximum mean discrepancy of the features, unbiased (it may be negative)."""
    kid_std: float
    """Standard deviation of the KID over subsets."""
    precision: float
    """Fraction of the generated images that lie among real ones."""
    recall: float
    """Fraction of the real images that lie among generated ones."""
    real_images: int
    """Number of real images for FID and KID."""
    generated_images: int
    """Number of generated images for FID and KID."""
    neighbors: int
    """k of precision and recall."""
    neighbor_images: int
    """Number of images of each set for precision and recall."""
    kid_subsets: int
    """Number of subsets for KID."""
    kid_subset_size: int
    """Number of images of each set in a subset."""
    dims: int
    """Number d of features."""
    features: str = ""
    """Name of the feature network."""
    features_sha256: str = ""
    """Fingerprint of the feature network."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, JSON-ready."""
        return asdict(self)


def sample_quality(
    real: Tensor | EventDataset,
    generated: Tensor | EventDataset,
    network: FeatureNetwork,
    *,
    neighbors: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
    progress: bool = False,
) -> SampleQuality:
    """Compute FID, KID, precision and recall of generated images.

    Args:
        real: real images in [-1, 1], ``(N, C, H, W)`` or a split.
        generated: generated images, likewise.
        network: the feature network.
        neighbors: k of precision and recall.
        kid_subsets: number of subsets for KID.
        kid_subset_size: images of each set in a subset, at most those of the smaller set.
        seed: seed of the subsets, and of the images left out if the sets differ in size.
        batch_size: images per batch.
        progress: show progress bars.

    Raises:
        UserError: there are too few images, or they do not fit the network.
    """
    return compare_features(
        network(real, batch_size, progress),
        network(generated, batch_size, progress),
        network,
        neighbors=neighbors,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        seed=seed,
        progress=progress,
    )


def compare_features(
    real: Tensor,
    generated: Tensor,
    network: FeatureNetwork | None = None,
    *,
    neighbors: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> SampleQuality:
    """Compute FID, KID, precision and recall from features.

    Args:
        real: features of real images, ``(N, d)``.
        generated: features of generated images, ``(M, d)``.
        network: the network that computed them, recorded in the result.
        neighbors: see :func:`sample_quality`, as for the other arguments.
        kid_subsets: number of subsets for KID.
        kid_subset_size: images of each set in a subset.
        seed: seed of the subsets and of the images left out.
        progress: show a progress bar.

    Raises:
        UserError: there are too few images.
    """
    check_whole("neighbors", neighbors, 1)
    check_whole("kid_subsets", kid_subsets, 1)
    check_whole("kid_subset_size", kid_subset_size, 2)
    check_whole("seed", seed, 0)
    least = min(len(real), len(generated))
    if least < neighbors + 1:
        raise UserError(
            f"{len(real)} real and {len(generated)} generated images are too few for {neighbors}"
            f" neighbors; give at least {neighbors + 1}"
        )
    real, generated, size = real.double(), generated.double(), min(kid_subset_size, least)
    kid, spread = _kid(real, generated, kid_subsets, size, part_seed(seed, _SUBSETS))
    cut = torch.Generator().manual_seed(part_seed(seed, _CUT))
    first, second = (
        rows[torch.randperm(len(rows), generator=cut)[:least].sort().values]
        for rows in (real, generated)
    )
    precision, recall = precision_recall(first, second, neighbors, progress)
    return SampleQuality(
        fid=_fid(real, generated),
        kid=kid,
        kid_std=spread,
        precision=precision,
        recall=recall,
        real_images=len(real),
        generated_images=len(generated),
        neighbors=neighbors,
        neighbor_images=least,
        kid_subsets=kid_subsets,
        kid_subset_size=size,
        dims=real.shape[1],
        features=network.name if network else "",
        features_sha256=network.sha256 if network else "",
    )


def precision_recall(
    real: Tensor, generated: Tensor, neighbors: int = 3, progress: bool = False
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2).

    Args:
        real: features ``(N, d)``.
        generated: features ``(M, d)``.
        neighbors: k, less than N and M.
        progress: show progress bars.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        UserError: there are too few rows.
    """
    check_whole("neighbors", neighbors, 1)
    if min(len(real), len(generated)) <= neighbors:
        raise UserError(
            f"neighbors={neighbors}: there are only {len(real)} and {len(generated)} images; give"
            " fewer neighbors"
        )
    real_radius, generated_radius = (
        _radius(rows, neighbors, progress) for rows in (real, generated)
    )
    precise, recalled, start = [], torch.zeros(len(real), dtype=torch.bool), 0
    for block in distances(generated, real, progress):
        rows = slice(start, start + len(block))
        precise.append((block <= real_radius).any(1))
        recalled |= (block <= generated_radius[rows, None]).any(0)
        start += len(block)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radius(rows: Tensor, neighbors: int, progress: bool) -> Tensor:
    """Return the distance of each row to its k-th nearest neighbor among the others."""
    order = neighbors + 1  # the nearest row of all is the row itself
    blocks = distances(rows, rows, progress)
    return torch.cat([block.kthvalue(order, dim=1).values for block in blocks])


def distances(a: Tensor, b: Tensor, progress: bool) -> Iterator[Tensor]:
    """Yield the distances of blocks of rows of a ``(N, d)`` to all rows of b ``(M, d)``."""
    blocks = a.split(max(1, _PAIRS_AT_ONCE // len(b)))
    # Not by |a|² + |b|² - 2ab, in which the distances of near neighbors are lost to rounding.
    for rows in tqdm(
        blocks, desc="neighbors", unit="block", disable=not progress, delay=1, leave=False
    ):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


class _Identity(nn.Module):
    """A feature network for torchmetrics that returns precomputed features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fid(real: Tensor, generated: Tensor) -> float:
    require("torchmetrics", "torchmetrics", "eval")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Identity(real.shape[1]))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def _kid(
    real: Tensor, generated: Tensor, subsets: int, size: int, seed: int
) -> tuple[float, float]:
    require("torchmetrics", "torchmetrics", "eval")
    from torchmetrics.image.kid import KernelInceptionDistance

    network = _Identity(real.shape[1])
    with warnings.catch_warnings(action="ignore"):  # torchmetrics warns of its memory use
        metric = KernelInceptionDistance(feature=network, subsets=subsets, subset_size=size)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return float(mean), float(spread)
