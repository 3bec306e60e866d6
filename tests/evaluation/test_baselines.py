"""Simple coders: their rates on data of known entropy."""

import math

import pytest
import torch

from ndm.evaluation.baselines import histogram_bpd, webp_bpd, xz_bpd


def noise(num_values: int, *shape: int) -> torch.Tensor:
    return torch.randint(num_values, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_values", [4, 17, 256])
def test_noise_takes_its_entropy(num_values: int) -> None:
    train, test = noise(num_values, 20_000, 3, 2, 2), noise(num_values, 1500, 3, 4, 4)
    entropy = math.log2(num_values)
    found = histogram_bpd(train, test[:, :, :2, :2], num_values)
    assert found == pytest.approx(entropy, rel=0.01)
    assert entropy < xz_bpd(test, num_values) < 1.25 * entropy
    webp = webp_bpd(test, num_values)
    assert webp is not None and entropy < webp < 1.1 * entropy + 0.1


def test_smooth_pictures_take_less_by_webp_and_constant_ones_nothing() -> None:
    ramp = torch.arange(32)[:, None] + torch.arange(32)
    images = (ramp + noise(3, 64, 1, 32, 32)).expand(-1, 3, -1, -1)
    webp = webp_bpd(images, 256)
    assert webp is not None and webp < xz_bpd(images, 256)
    constant = webp_bpd(torch.full((64, 1, 32, 32), 7), 256)
    assert constant is not None and constant < 0.01


def test_webp_is_for_gray_and_color_images_of_256_values() -> None:
    assert webp_bpd(noise(9, 5, 12), 9) is None
    assert webp_bpd(noise(9, 5, 2, 4, 4), 9) is None
    assert webp_bpd(noise(300, 5, 1, 4, 4), 300) is None
