r"""FID and KID by torchmetrics; precision and recall by nearest neighbors. The formulas stand in
:mod:`ndm.quality`.

KID is the mean over random subsets, drawn from both sets without replacement; its ``kid_std`` is
the standard deviation over subsets, which overlap, so it is no standard error. Precision and recall
depend on the number of images: both sets are cut to the size of the smaller one, at random.
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
    """Numbers for generated images against real ones, with what is needed to get them again."""

    fid: float
    """Fréchet distance of the features, biased upward by small numbers of images."""
    kid: float
    """Squared maximum mean discrepancy of the features, unbiased (it may be negative)."""
    kid_std: float
    """Standard deviation of the KID over subsets."""
    precision: float
    """Part of the generated images that lie among real ones."""
    recall: float
    """Part of the real images that lie among generated ones."""
    real_images: int
    """Real images, for FID and KID."""
    generated_images: int
    """Generated images, for FID and KID."""
    neighbors: int
    """k of precision and recall."""
    neighbor_images: int
    """Images of each kind for precision and recall."""
    kid_subsets: int
    """Number of subsets."""
    kid_subset_size: int
    """Images of each kind in a subset."""
    dims: int
    """Number d of features."""
    features: str = ""
    """The feature network."""
    features_sha256: str = ""
    """Its fingerprint."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-ready."""
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
    """FID, KID, precision and recall of generated images.

    Args:
        real: real images in [-1, 1], ``(N, C, H, W)`` or a split.
        generated: generated images, likewise.
        network: what makes the features.
        neighbors: k of precision and recall.
        kid_subsets: number of subsets for KID.
        kid_subset_size: images of each kind in one, fewer if there are fewer.
        seed: of the subsets, and of which images are left out where the sets differ in size.
        batch_size: images at once.
        progress: show progress bars.

    Raises:
        UserError: there are too few images, or they do not fit the network.
    """
    first, second = (network(images, batch_size, progress) for images in (real, generated))
    options: dict[str, Any] = {
        "neighbors": neighbors,
        "kid_subsets": kid_subsets,
        "kid_subset_size": kid_subset_size,
    }
    return compare_features(first, second, network, **options, seed=seed, progress=progress)


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
    """:func:`sample_quality` of features ``(N, d)`` that are there already; ``network`` is what
    made them, for the record.
    """
    for name, value in (("neighbors", neighbors), ("kid_subsets", kid_subsets)):
        check_whole(name, value, 1)
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
    """Improved precision and recall (Kynkäänniemi et al. 2019, equations 1 and 2), over all the
    rows given.

    Args:
        real: features ``(N, d)``.
        generated: features ``(M, d)``.
        neighbors: k, less than N and M.
        progress: show a progress bar.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        UserError: there are too few rows.
    """
    check_whole("neighbors", neighbors, 1)
    if min(len(real), len(generated)) <= neighbors:
        raise UserError(
            f"neighbors={neighbors}: there are {len(real)} and {len(generated)} images; give fewer"
            " neighbors"
        )
    real_radius, generated_radius = (
        _radius(rows, neighbors, progress) for rows in (real, generated)
    )
    precise, recalled, start = [], torch.zeros(len(real), dtype=torch.bool), 0
    for distances in _distances(generated, real, progress):
        rows = slice(start, start + len(distances))
        precise.append((distances <= real_radius).any(1))
        recalled |= (distances <= generated_radius[rows, None]).any(0)
        start += len(distances)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radius(rows: Tensor, neighbors: int, progress: bool) -> Tensor:
    """Distance of each row to its k-th nearest neighbor among the others: the nearest of all is the
    row itself.
    """
    return torch.cat(
        [
            distances.kthvalue(neighbors + 1, dim=1).values
            for distances in _distances(rows, rows, progress)
        ]
    )


def _distances(a: Tensor, b: Tensor, progress: bool) -> Iterator[Tensor]:
    """Distances of some rows of a to all of b, block after block."""
    # Differences, not |a|² + |b|² - 2ab: the latter loses the distances of near neighbors to
    # rounding.
    for rows in tqdm(
        a.split(max(1, _PAIRS_AT_ONCE // len(b))),
        desc="neighbors",
        unit="block",
        disable=not progress,
        delay=1,
        leave=False,
    ):
        yield torch.cdist(rows, b, compute_mode="donot_use_mm_for_euclid_dist")


class _AsIs(nn.Module):
    """What torchmetrics takes for a feature network where features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fid(real: Tensor, generated: Tensor) -> float:
    require("torchmetrics", "torchmetrics", "eval")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsIs(real.shape[1]))
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return float(metric.compute())


def _kid(
    real: Tensor, generated: Tensor, subsets: int, size: int, seed: int
) -> tuple[float, float]:
    require("torchmetrics", "torchmetrics", "eval")
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings(action="ignore"):  # it says that it keeps all features
        metric = KernelInceptionDistance(
            feature=_AsIs(real.shape[1]), subsets=subsets, subset_size=size
        )
    metric.update(real, real=True)
    metric.update(generated, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return float(mean), float(spread)
