"""Images of any size: tiles that come back exactly, with edges, in gray and in color."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.test_compress import make_model
from cli.commands import rejected, run_command
from ndm.apps.compress.items import Item
from ndm.apps.compress.tiles import coding_order, cut, join, layout, over_the_edge

EVENT = (3, 4, 5)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth picture with a little noise, ``(H, W, C)`` or ``(H, W)``."""
    generator = np.random.default_rng(seed)
    ramp = 3 * np.add.outer(np.arange(height), np.arange(width))[..., None] + 40 * np.arange(3)
    pixels = (ramp + generator.integers(0, 4, ramp.shape)).astype(np.uint8)
    return pixels if channels == 3 else pixels[..., 0]


@pytest.mark.parametrize(("height", "width"), [(4, 5), (8, 15), (9, 7), (1, 1), (3, 11), (4, 6)])
def test_tiles_cover_an_image_and_give_it_back(height: int, width: int) -> None:
    pixels = picture(height, width).transpose(2, 0, 1)
    tiles, (rows, columns) = cut(pixels, (4, 5)), layout(height, width, (4, 5))
    assert tiles.shape == (rows * columns, 60)
    np.testing.assert_array_equal(join(tiles, pixels.shape, (4, 5)), pixels)
    for row in range(rows):
        for column in range(columns):
            tile = tiles[row * columns + column].reshape(EVENT)
            down, right = (np.arange(4) + 4 * row), (np.arange(5) + 5 * column)
            inside = pixels[:, np.minimum(down, height - 1)][:, :, np.minimum(right, width - 1)]
            np.testing.assert_array_equal(tile, inside)
    item = Item("x.png", "image", rows * columns, shape=(3, height, width), mode="RGB")
    item.check_shape(EVENT, 256)
    whole = [
        4 * (row + 1) <= height and 5 * (column + 1) <= width
        for row in range(rows)
        for column in range(columns)
    ]
    assert over_the_edge([item], EVENT).tolist() == [not one for one in whole]


def test_tiles_over_an_edge_are_coded_first() -> None:
    items = [
        Item("a.npy", "npy", 2, shape=(2, *EVENT)),
        Item("b.png", "image", 4, shape=(3, 8, 6), mode="RGB"),
        Item("c.png", "image", 1, mode="RGB"),
    ]
    assert coding_order(items, EVENT).tolist() == [3, 5, 0, 1, 2, 4, 6]


def test_photographs_of_any_size_are_restored_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(EVENT, 256, 2)
    model.info = {"data": {**DATA, "event_shape": list(EVENT)}}
    model.save_pretrained(tmp_path / "model")
    sizes = {"a": (12, 15), "sub/b": (9, 11), "sub/deep/small": (2, 3), "exact": (4, 5)}
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        for channels, kind in ((3, "color"), (1, "gray")):
            file = tmp_path / "photos" / f"{name}-{kind}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(height, width, channels, seed)).save(file)
    Image.fromarray(picture(7, 9)).save(tmp_path / "photos" / "x.jpg", quality=95)
    archive = tmp_path / "photos.ndm"
    run_command("compress", tmp_path / "photos", "--model", tmp_path / "model", "-o", archive)
    text = capsys.readouterr().out
    assert "1 of 9 files are JPEG" in text and "expecting" in text
    run_command("inspect", archive)
    assert "9 images in 44 tiles" in capsys.readouterr().out
    out = tmp_path / "restored"
    run_command("decompress", archive, "--model", tmp_path / "model", "-o", out)
    assert "wrote 9 images in 9 files" in capsys.readouterr().out
    for file in (tmp_path / "photos").rglob("*.*"):
        relative = file.relative_to(tmp_path / "photos")
        found = out / (relative if file.suffix == ".png" else f"{relative}.png")
        expected, pixels = Image.open(file), Image.open(found)
        assert pixels.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(pixels), np.asarray(expected))


DATA = {
    "name": "x",
    "version": "1",
    "kind": "image",
    "num_values": 256,
    "low": 0.0,
    "high": 255.0,
    "splits": {},
    "sha256": "0" * 64,
}


def test_models_of_gray_images_and_of_vectors_take_no_color(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture(9, 9)).save(tmp_path / "color.png")
    for event, culprit in (((1, 4, 4), "in color"), ((12,), "give a .npy file")):
        model, folder = make_model(event, 256, 2), tmp_path / culprit[:4]
        kind = "image" if len(event) == 3 else "vector"
        model.info = {"data": {**DATA, "kind": kind, "event_shape": list(event)}}
        model.save_pretrained(folder)
        command = ["compress", tmp_path / "color.png", "--model", folder, "-o", tmp_path / "x.ndm"]
        rejected(capsys, command, "color.png", culprit)
