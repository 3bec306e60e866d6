"""Simple coders: their rates on data of known entropy."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ndm.errors import UserError
from ndm.evaluation.baselines import (
    PICTURE_FORMATS,
    histogram_bpd,
    installed_formats,
    picture_bpd,
    picture_bytes,
    webp_bpd,
    xz_bpd,
)


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


def test_noise_takes_its_entropy_in_every_picture_format() -> None:
    images = noise(256, 6, 3, 32, 32).numpy().astype(np.uint8)
    names = installed_formats()
    assert {"PNG", "WebP"} <= set(names) <= set(PICTURE_FORMATS)
    for name in names:
        found = picture_bpd(images, name)
        assert 8 < found["sheet"] < found["each"] < 9.2, "headers and separate tables cost"


def test_the_bytes_of_a_picture_are_those_of_the_file_that_pillow_writes() -> None:
    """Gray images too; the sheet of one image is the image."""
    for channels in (1, 3):
        pixels = noise(7, 1, channels, 5, 9).numpy().astype(np.uint8)
        array = pixels[0, 0] if channels == 1 else pixels[0].transpose(1, 2, 0)
        for name in installed_formats():
            file = io.BytesIO()
            Image.fromarray(array).save(file, **PICTURE_FORMATS[name])
            assert picture_bytes(pixels, name) == len(file.getvalue())


def test_formats_that_change_pixels_or_are_missing_are_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lossy = {"JPEG": {"format": "JPEG", "quality": 50}}
    monkeypatch.setattr("ndm.evaluation.baselines.PICTURE_FORMATS", lossy)
    images = noise(256, 4, 3, 8, 8).numpy().astype(np.uint8)
    with pytest.raises(UserError, match="JPEG is not lossless"):
        picture_bytes(images, "JPEG")
    monkeypatch.setitem(lossy, "unknown", {"format": "UNKNOWN"})
    assert installed_formats() == ["JPEG"]
    with pytest.raises(UserError, match="cannot write unknown"):
        picture_bytes(images, "unknown")
