"""Crops of images of any size: exact pixels, every place once, averages, and one-line errors."""

from pathlib import Path

import numpy as np
import pytest

from cli.commands import run_command
from data.test_data_images import picture, pixels_of, png, write
from ndm.data import ImageFolder
from ndm.data.crops import averaged, described_cropping
from ndm.data.other import ALL, read_like
from ndm.errors import UserError

SIZES = {"train/a": (7, 9), "train/b": (12, 5), "test/c": (9, 11), "test/d": (5, 5)}


def photos(root: Path) -> dict[str, np.ndarray]:
    """Write photographs of several sizes; return their pixels ``(C, H, W)``."""
    pictures = {
        name: picture(seed, height, width)
        for seed, (name, (height, width)) in enumerate(SIZES.items())
    }
    for name, pixels in pictures.items():
        write(root / f"{name}.png", png(pixels))
    return {name: pixels.transpose(2, 0, 1) for name, pixels in pictures.items()}


def grid(pixels: np.ndarray, side: int) -> list[np.ndarray]:
    _, height, width = pixels.shape
    top, left = height % side // 2, width % side // 2
    return [
        pixels[:, row : row + side, column : column + side]
        for row in range(top, height - side + 1, side)
        for column in range(left, width - side + 1, side)
    ]


def test_a_grid_has_every_whole_crop_once(tmp_path: Path) -> None:
    pixels = photos(tmp_path)
    source = ImageFolder(str(tmp_path), size=3, crop="grid")
    description = source.describe()
    assert description.event_shape == (3, 3, 3)
    assert description.splits == {"train": 2 * 3 + 4 * 1, "test": 3 * 3 + 1}
    for split, names in (("train", "ab"), ("test", "cd")):
        expected = [crop for name in names for crop in grid(pixels[f"{split}/{name}"], 3)]
        np.testing.assert_array_equal(pixels_of(source, split), expected)
    middle = ImageFolder(str(tmp_path), size=5, crop="center")
    np.testing.assert_array_equal(pixels_of(middle, "train")[1], pixels["train/b"][:, 3:8])
    np.testing.assert_array_equal(pixels_of(middle, "test")[0], pixels["test/c"][:, 2:7, 3:8])


def test_random_crops_are_all_places_of_the_train_split_and_a_grid_elsewhere(
    tmp_path: Path,
) -> None:
    pixels = photos(tmp_path)
    source = ImageFolder(str(tmp_path), size=4, crop="random")
    expected = [
        image[:, row : row + 4, column : column + 4]
        for image in (pixels["train/a"], pixels["train/b"])
        for row in range(image.shape[1] - 3)
        for column in range(image.shape[2] - 3)
    ]
    assert source.describe().splits == {"train": 4 * 6 + 9 * 2, "test": 2 * 2 + 1}
    np.testing.assert_array_equal(pixels_of(source, "train"), expected)
    test = [crop for name in "cd" for crop in grid(pixels[f"test/{name}"], 4)]
    np.testing.assert_array_equal(pixels_of(source, "test"), test)


def test_averages_round_halves_up_and_drop_what_fills_no_block(tmp_path: Path) -> None:
    pixels = photos(tmp_path)["train/a"]
    found = averaged(pixels, 2)
    means = pixels[:, :6, :8].reshape(3, 3, 2, 4, 2).mean((2, 4))
    np.testing.assert_array_equal(found, np.floor(means + 0.5))
    assert averaged(np.full((1, 3, 3), 255, np.uint8), 3).item() == 255
    source = ImageFolder(str(tmp_path), size=2, crop="grid", average=2)
    assert source.describe().splits["train"] == 1 * 2 + 3 * 1
    expected = grid(found, 2) + grid(averaged(photos(tmp_path)["train/b"], 2), 2)
    np.testing.assert_array_equal(pixels_of(source, "train"), expected)
    plain = ImageFolder(str(tmp_path), size=2, crop="grid").describe()
    assert plain.sha256 != source.describe().sha256


def test_crops_have_the_class_of_their_image(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("dog", 3)):
        for index in range(count):
            for split in ("train", "test"):
                write(tmp_path / split / name / f"{index}.png", png(picture(index, 6, 4)))
    source = ImageFolder(str(tmp_path), size=2, crop="grid")
    assert source.split("train").labels.tolist() == [0] * 12 + [1] * 18


def test_new_photographs_are_cut_like_those_of_the_test_split(tmp_path: Path) -> None:
    pixels = photos(tmp_path / "trained")
    write(tmp_path / "new" / "x.png", png(pixels["test/c"].transpose(1, 2, 0)))
    source = ImageFolder(str(tmp_path / "trained"), size=2, crop="random", average=2)
    trained = source.describe()
    for known in (source, None):  # the run, or only a model folder
        loaded = read_like(known, str(tmp_path / "new"), trained)
        crops = loaded.splits[ALL]
        found = source.integers(crops.__getitems__(range(len(crops)))).numpy()
        np.testing.assert_array_equal(found, grid(averaged(pixels["test/c"], 2), 2))


def test_the_description_tells_the_crops(tmp_path: Path) -> None:
    photos(tmp_path)
    version = ImageFolder(str(tmp_path), size=2, crop="random", average=2).describe().version
    assert version.endswith("averaged over 2 x 2 pixels, crops of 2 x 2 at random places")
    found = described_cropping(version)
    assert found is not None and (found.kind, found.size, found.average) == ("grid", 2, 2)
    assert described_cropping(ImageFolder(str(tmp_path), size=4).describe().version) is None


def test_wrong_arguments_and_small_images_are_refused(tmp_path: Path) -> None:
    photos(tmp_path)
    for arguments, culprit in (
        ({"crop": "grid"}, "give size"),
        ({"crop": "corner", "size": 2}, "crop='corner'"),
        ({"average": 2}, "average=2 goes with crops"),
        ({"crop": "grid", "size": 2, "average": 0}, "average=0"),
        ({"crop": "grid", "size": 0}, "size=0"),
    ):
        with pytest.raises(UserError, match=culprit):
            ImageFolder(str(tmp_path), **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"12 x 5 pixels, and a crop takes 6 x 6"):
        ImageFolder(str(tmp_path), size=3, crop="grid", average=2).describe()
    skipping = ImageFolder(str(tmp_path), size=3, crop="grid", average=2, on_error="skip")
    assert skipping.describe().splits == {"train": 1, "test": 1}


@pytest.mark.slow
def test_crops_train_and_evaluate_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos")
    run = tmp_path / "run"
    small = "--data.size 4 --model.transform ndm.Identity --model.predictor.network.channels 8"
    steps = "--train.steps 3 --train.batch_size 4 --train.sample_every null"
    run_command(
        "train --config images-small --data.crop random", small, steps, "--out", run,
        "--data.path", tmp_path / "photos",
    )  # fmt: skip
    run_command("evaluate", run, "--data", tmp_path / "photos" / "test", "--nelbo --draws 1")
    assert "5 examples" in capsys.readouterr().out


def test_images_of_the_models_size_are_taken_as_they_are(tmp_path: Path) -> None:
    """Such as samples of a model that was trained on averaged crops."""
    photos(tmp_path / "trained")
    source = ImageFolder(str(tmp_path / "trained"), size=2, crop="random", average=2)
    own = [picture(seed, 2, 2) for seed in range(3)]
    for index, pixels in enumerate(own):
        write(tmp_path / "own" / f"{index}.png", png(pixels))
    loaded = read_like(source, str(tmp_path / "own"), source.describe())
    found = source.integers(loaded.splits[ALL].__getitems__(range(3))).numpy()
    np.testing.assert_array_equal(found, [pixels.transpose(2, 0, 1) for pixels in own])
