"""Sample quality: closed forms of FID and KID, precision and recall by hand, fingerprints."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn

from ndm.data import Digits, EventDataset, TwoMoons
from ndm.errors import UserError
from ndm.quality import (
    Classifier,
    FeatureNetwork,
    classifier_features,
    compare_features,
    find_classifier,
    load_classifier,
    measures,
    precision_recall,
    sample_quality,
    save_classifier,
    torchscript_features,
    train_classifier,
)
from oracles import F64

FLAT = FeatureNetwork(nn.Flatten(), "the pixels", "0" * 64, 4)


def cloud(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> Tensor:
    """Points with exactly this sample mean and covariance."""
    points = np.random.default_rng(seed).standard_normal((count, len(mean)))
    points -= points.mean(0)
    points @= np.linalg.inv(np.linalg.cholesky(np.cov(points.T)).T)
    return torch.from_numpy(mean + points @ np.linalg.cholesky(covariance).T)


def frechet(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, in its symmetric form."""
    root = np.real(sqrtm(covariance_1))
    cross = np.real(sqrtm(root @ covariance_2 @ root))
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(covariance_1 + covariance_2 - 2 * cross))


MEANS = np.array([[0.2, -0.1, 0.0, 0.3], [-0.3, 0.1, 0.2, 0.1]])
FACTORS = np.random.default_rng(5).standard_normal((2, 4, 4)) * 0.07
COVARIANCES = FACTORS @ FACTORS.transpose(0, 2, 1) + 0.001 * np.eye(4)  # they do not commute


def test_fid_of_gaussian_clouds_is_their_wasserstein_distance() -> None:
    real, generated = (
        cloud(MEANS[i], COVARIANCES[i], 300 + 40 * i, i).reshape(-1, 1, 2, 2) for i in range(2)
    )
    assert real.abs().max() < 1, "values beyond ±1 would be clipped"
    assert generated.abs().max() < 1
    found = sample_quality(real.float(), generated.float(), FLAT)
    expected = frechet(MEANS[0], COVARIANCES[0], MEANS[1], COVARIANCES[1])
    assert found.fid == pytest.approx(expected, rel=1e-5)
    assert (found.real_images, found.generated_images) == (300, 340)
    assert (found.neighbor_images, found.dims) == (300, 4)
    assert (found.features, found.features_sha256) == ("the pixels", "0" * 64)


def test_equal_sets_have_zero_fid_and_swapped_sets_swap_precision_and_recall() -> None:
    first, second = (cloud(MEANS[i], COVARIANCES[i], 100, i) for i in range(2))
    same = compare_features(first, first.flip(0))
    assert same.fid == pytest.approx(0.0, abs=1e-7)
    assert (same.precision, same.recall) == (1.0, 1.0)
    there, back = compare_features(first, second), compare_features(second, first)
    assert there.fid == pytest.approx(back.fid, rel=1e-9)
    assert (there.precision, there.recall) == (back.recall, back.precision)


def moments(mean: float, std: float) -> Tensor:
    return torch.tensor([mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])


@pytest.mark.slow
@pytest.mark.parametrize("other", [(0.2, 0.5), (0.5, 0.4)])
def test_kid_is_an_unbiased_estimate_of_its_closed_form(other: tuple[float, float]) -> None:
    """For d = 1 the kernel is (ab + 1)³ = 1 + 3ab + 3a²b² + a³b³: MMD² compares three moments."""
    gap = (moments(0.2, 0.5) - moments(*other)) ** 2
    exact = float((torch.tensor([3.0, 3.0, 1.0]) * gap).sum())
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(200):
        first, second = (torch.randn(60, 1, generator=generator, dtype=F64) for _ in range(2))
        first, second = 0.2 + 0.5 * first, other[0] + other[1] * second
        estimates.append(compare_features(first, second, kid_subsets=1).kid)
    values = torch.tensor(estimates)
    error = float(values.std() / math.sqrt(len(values)))
    assert error < 0.02
    assert float(values.mean()) == pytest.approx(exact, abs=3 * error)
    if exact == 0:
        assert (values < 0).any(), "an unbiased estimate of zero is sometimes negative"


def test_precision_and_recall_match_a_hand_count() -> None:
    """Radii of the real points: 1, 1, 1, 8; of the generated points: 4.5, 4.5, 1, 1."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    generated = torch.tensor([[0.5], [5.0], [20.0], [21.0]])
    assert precision_recall(real, generated, neighbors=1) == (0.5, 0.75)
    assert precision_recall(generated, real, neighbors=1) == (0.75, 0.5)


def test_missing_modes_lower_recall_and_invented_modes_lower_precision() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw() -> Tensor:
        return torch.randn(400, 2, generator=generator, dtype=F64)

    one, two = draw(), torch.cat([draw()[:200], draw()[:200] + 1000])
    precision, recall = precision_recall(two, one)
    assert precision > 0.95
    assert 0.45 < recall <= 0.5
    precision, recall = precision_recall(one, two)
    assert 0.45 < precision <= 0.5
    assert recall > 0.95
    assert precision_recall(one, draw() + 1000) == (0.0, 0.0)
    found = compare_features(two, draw(), kid_subsets=1)
    assert 0.45 < found.recall <= 0.5


def test_blocks_and_batches_do_not_change_the_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    real, generated = (
        0.25 * torch.randn(90, 1, 2, 2, generator=generator) + 0.3 * i for i in range(2)
    )
    whole = sample_quality(real, generated, FLAT)
    monkeypatch.setattr(measures, "_PAIRS_AT_ONCE", 700)
    parts = sample_quality(real, generated, FLAT, batch_size=7)
    assert whole.to_dict() == parts.to_dict()
    assert 0 < whole.precision < 1
    assert 0 < whole.recall < 1
    assert sample_quality(real, generated, FLAT, seed=1, kid_subset_size=50).kid != whole.kid


def test_bad_counts_and_images_are_rejected() -> None:
    rows = torch.randn(9, 4)
    with pytest.raises(UserError, match="9 real and 3 generated"):
        compare_features(rows, rows[:3])
    with pytest.raises(UserError, match="neighbors=0"):
        compare_features(rows, rows, neighbors=0)
    broken = torch.zeros(5, 1, 2, 2)
    broken[3] = math.nan
    with pytest.raises(UserError, match="1 of 5 images"):
        FLAT(broken)
    with pytest.raises(UserError, match=r"\(B, C, H, W\)"):
        FLAT(rows)


def feature_network(**options: Any) -> FeatureNetwork:
    return FeatureNetwork(nn.Flatten(), "", "", 4, **options)


def test_scale_bytes_recovers_the_integers_of_the_data() -> None:
    num_values = torch.arange(256)
    x = ((2 * num_values + 1) / 256 - 1).reshape(256, 1, 1, 1)
    assert torch.equal(feature_network(scale="bytes").prepare(x).flatten(), num_values.byte())
    unit = feature_network(scale="unit").prepare(x).flatten()
    assert torch.allclose(unit, (num_values + 0.5) / 256)
    assert torch.equal(feature_network().prepare(x), x)
    outside = torch.tensor([-7.0, 7.0]).reshape(2, 1, 1, 1)
    assert feature_network(scale="bytes").prepare(outside).flatten().tolist() == [0, 255]


def test_images_are_resized_and_channels_are_repeated() -> None:
    x = torch.full((2, 1, 8, 8), 0.25)
    x[:, :, :4] = -0.5
    grown = feature_network(size=16, channels=3).prepare(x)
    assert grown.shape == (2, 3, 16, 16)
    assert torch.equal(grown[:, 0], grown[:, 2])
    assert torch.allclose(grown[:, :, :6], torch.tensor(-0.5))
    assert torch.allclose(grown[:, :, 10:], torch.tensor(0.25))
    stripes = torch.tensor([-1.0, 1.0, 1.0, -1.0]).repeat(8).expand(1, 1, 32, 32)
    shrunk = feature_network(size=8).prepare(stripes)[..., 1:-1]
    assert shrunk.abs().max() < 0.3, "without antialiasing it would be 1 everywhere"
    with pytest.raises(UserError, match="2 channels"):
        feature_network(channels=3).prepare(torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match="choose one of bytes, unit, symmetric"):
        feature_network(scale="percent")


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().sum((2, 3))


class Optional(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        sums = x.float().sum((2, 3))
        return sums if return_features else sums.softmax(1)


class Maps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def saved(path: Path, module: nn.Module) -> Path:
    # TorchScript is deprecated, but the standard networks are distributed in it.
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(module), str(path))
    return path


@pytest.mark.parametrize("module", [Sums(), Optional()])
def test_a_torchscript_file_gets_bytes_in_three_channels(module: nn.Module, tmp_path: Path) -> None:
    path = saved(tmp_path / "sums.pt", module)
    found = torchscript_features(path, (1, 2, 2))
    x = (2 * torch.tensor([[0, 1, 2, 3], [255, 255, 255, 252]]) + 1) / 256 - 1
    assert found(x.reshape(2, 1, 2, 2)).tolist() == [[6.0] * 3, [1017.0] * 3]
    assert (found.name, found.dims) == ("sums.pt", 3)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_that_are_not_feature_networks_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no feature network"):
        torchscript_features(tmp_path / "missing.pt", (1, 2, 2))
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match="not a TorchScript file"):
        torchscript_features(tmp_path / "text.pt", (1, 2, 2))
    with pytest.raises(UserError, match=r"must return features \(B, d\)"):
        torchscript_features(saved(tmp_path / "maps.pt", Maps()), (1, 2, 2))
    wide = saved(tmp_path / "wide.pt", nn.Sequential(nn.Flatten(), nn.Linear(7, 2)))
    with pytest.raises(UserError, match="set its input format: scale, size and channels"):
        torchscript_features(wide, (1, 2, 2), "unit")


def count_errors(data: EventDataset, model: Classifier) -> int:
    assert data.labels is not None
    return int((model(data.__getitems__(list(range(len(data))))).argmax(1) != data.labels).sum())


@pytest.mark.slow
def test_the_classifier_learns_and_standardizes_its_features(
    classifier: Classifier, digits: Digits
) -> None:
    assert classifier.info["accuracy"]["test"] > 0.85
    errors = round((1 - classifier.info["accuracy"]["test"]) * 359)
    assert count_errors(digits.split("test"), classifier) == errors
    train = classifier_features(classifier)(digits.split("train"))
    assert torch.allclose(train.mean(0), torch.zeros(64, dtype=F64), atol=1e-4)
    assert torch.allclose(train.std(0, correction=0), torch.ones(64, dtype=F64), atol=1e-4)


@pytest.mark.slow
def test_the_fingerprint_depends_on_seed_and_weights(
    classifier: Classifier, digits: Digits, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    again = train_classifier(digits, seed=0, steps=150)
    other = train_classifier(digits, seed=1, steps=1)
    unchanged = torch.equal(before, torch.random.get_rng_state())
    assert unchanged, "training must not use the global generator"
    fingerprint = classifier_features(classifier).sha256
    assert classifier_features(again).sha256 == fingerprint == classifier.info["sha256"]
    assert classifier_features(other).sha256 != fingerprint
    save_classifier(tmp_path / "c", again)
    stored = load_classifier(tmp_path / "c")
    assert classifier_features(stored).sha256 == fingerprint
    assert stored.info == classifier.info
    with torch.no_grad():
        again.head[1].bias[0] += 1e-6
    assert classifier_features(again).sha256 != fingerprint
    weights = load_file(tmp_path / "c" / "model.safetensors")
    weights["mean"] += 1
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(UserError, match="do not match the fingerprint"):
        load_classifier(tmp_path / "c")


def test_a_saved_classifier_is_reused_unless_its_settings_change(
    digits: Digits, tmp_path: Path
) -> None:
    first = find_classifier(tmp_path / "c", digits, seed=0, steps=2)
    stamp = (tmp_path / "c" / "model.safetensors").stat().st_mtime_ns
    assert find_classifier(tmp_path / "c", digits, seed=0, steps=2).info == first.info
    assert (tmp_path / "c" / "model.safetensors").stat().st_mtime_ns == stamp
    assert find_classifier(tmp_path / "c", digits, seed=3, steps=2).info["seed"] == 3
    assert find_classifier(tmp_path / "c", Digits(classes=[0, 1]), seed=3, steps=2).classes == 2


def test_features_separate_digits_from_their_negatives(
    classifier: Classifier, digits: Digits
) -> None:
    features = classifier_features(classifier)
    test = digits.split("test").__getitems__(list(range(359)))
    right, negative = (
        sample_quality(digits.split("train"), x, features, kid_subsets=10) for x in (test, -test)
    )
    assert negative.fid > 10 * right.fid
    assert negative.kid > 10 * abs(right.kid)
    assert right.precision > 0.7 > 0.3 > negative.precision
    assert right.features_sha256 == classifier.info["sha256"]


def test_data_without_labels_cannot_train_a_classifier() -> None:
    with pytest.raises(UserError, match="are not images with labels"):
        train_classifier(TwoMoons(train_size=10, test_size=10))
