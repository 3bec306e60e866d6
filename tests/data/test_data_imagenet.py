"""Synthetic files of both small ImageNet releases: exact pixels, and a message for each fault."""

import io
import pickle
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ndm.data import ImageNetChrabaszcz, ImageNetOord, imagenet
from ndm.errors import UserError

COUNTS = {"train": 7, "test": 4}
FOLDERS = {"train": "train_32x32", "test": "valid_32x32"}


@pytest.fixture
def pixels():
    generator = np.random.default_rng(0)
    return {
        split: generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        for split, count in COUNTS.items()
    }


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shrink the expected sizes of the releases to those of the fixture."""
    monkeypatch.setattr(imagenet, "OORD", COUNTS)
    monkeypatch.setattr(imagenet, "CHRABASZCZ", COUNTS)


def png(image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def as_folders(root, pixels):
    for split, images in pixels.items():
        (root / FOLDERS[split]).mkdir(parents=True)
        for index, image in enumerate(images):
            (root / FOLDERS[split] / f"{index:07d}.png").write_bytes(png(image))
    return root


def test_hidden_folders_are_skipped(tmp_path, pixels):
    as_folders(tmp_path, pixels)
    before = ImageNetOord(str(tmp_path)).describe()
    for name in (".thumbnails/x.png", "sub/.ipynb_checkpoints/0000000.png"):
        file = tmp_path / FOLDERS["train"] / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"no image")
    assert ImageNetOord(str(tmp_path)).describe() == before


def as_tars(root, pixels):
    """Write archives that are not sorted by name and contain hidden files of macOS."""
    root.mkdir(exist_ok=True)
    for split, images in pixels.items():
        with tarfile.open(root / f"{FOLDERS[split]}.tar", "w") as archive:
            for index in reversed(range(len(images))):
                image = (f"{index:07d}.png", png(images[index]))
                hidden = (f"._{index:07d}.png", b"no image")
                for name, data in (image, hidden):
                    member = tarfile.TarInfo(f"{FOLDERS[split]}/{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return root


def as_arrays(root, pixels, save=np.savez, batches=(3, 4)):
    root.mkdir(exist_ok=True)
    start = 0
    for number, size in enumerate(batches, 1):
        rows = pixels["train"][start : start + size].reshape(size, -1)
        save(root / f"train_data_batch_{number}.npz", data=rows, labels=np.arange(size) + 1)
        start += size
    rows = pixels["test"].reshape(len(pixels["test"]), -1)
    save(root / "val_data.npz", data=rows, labels=np.arange(4) + 1)
    return root


def assert_pixels(source, pixels):
    for split, images in pixels.items():
        examples = source.split(split)
        found = source.integers(examples.__getitems__(range(len(examples))))
        np.testing.assert_array_equal(found.numpy(), images)
        order = [3, 0, 2]
        one_by_one = torch.stack([examples[index] for index in order])
        assert torch.equal(examples.__getitems__(order), one_by_one)
        copied = pickle.loads(pickle.dumps(examples))  # as workers receive it
        assert torch.equal(copied[3], examples[3])


def test_archives_and_folders_give_the_same_data(tmp_path, pixels):
    tars = ImageNetOord(str(as_tars(tmp_path / "tar", pixels)))
    folders = ImageNetOord(str(as_folders(tmp_path / "png", pixels)))
    for source in (tars, folders):
        assert_pixels(source, pixels)
        assert source.describe().name == "imagenet32-oord" and source.describe().splits == COUNTS
    assert tars.describe() == folders.describe()


@pytest.mark.parametrize(
    ("save", "batches"), [(np.savez, (3, 4)), (np.savez_compressed, (1, 1, 5)), (np.savez, (7,))]
)
def test_arrays_are_mapped_in_place_or_expanded_once(tmp_path, pixels, save, batches):
    source = ImageNetChrabaszcz(str(as_arrays(tmp_path / "a", pixels, save, batches)))
    assert_pixels(source, pixels)
    assert source.describe().name == "imagenet32-chrabaszcz" and source.describe().splits == COUNTS
    other = ImageNetChrabaszcz(str(as_arrays(tmp_path / "b", pixels, np.savez, (2, 5))))
    assert source.describe().sha256 == other.describe().sha256
    expanded = sorted((tmp_path / "a" / "expanded").glob("*"))
    assert len(expanded) == (len(batches) + 1 if save is np.savez_compressed else 0)
    before = [file.stat().st_mtime_ns for file in expanded]
    assert_pixels(ImageNetChrabaszcz(str(tmp_path / "a")), pixels)
    assert [file.stat().st_mtime_ns for file in expanded] == before
    assert len(pickle.dumps(source.split("train"))) < 2000  # workers receive offsets, not pixels


def test_changed_files_are_expanded_again(tmp_path, pixels):
    folder = as_arrays(tmp_path / "a", pixels, np.savez_compressed)
    before = ImageNetChrabaszcz(str(folder), cache=str(tmp_path / "cache")).describe().sha256
    pixels["test"][0, 0, 0, 0] ^= 1
    as_arrays(folder, pixels, np.savez_compressed)
    source = ImageNetChrabaszcz(str(folder), cache=str(tmp_path / "cache"))
    assert source.describe().sha256 != before and not (folder / "expanded").exists()
    assert_pixels(source, pixels)


def test_batches_may_be_in_subfolders(tmp_path, pixels):
    as_arrays(tmp_path, pixels)
    names = ("train_data_batch_1.npz", "train_data_batch_2.npz", "val_data.npz")
    for folder, name in zip(("part1", "part2", "val"), names, strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / name)
    assert_pixels(ImageNetChrabaszcz(str(tmp_path)), pixels)


@pytest.mark.parametrize(
    ("build", "source"), [(as_tars, ImageNetOord), (as_arrays, ImageNetChrabaszcz)]
)
def test_a_partial_release_is_rejected_unless_partial_is_set(
    tmp_path, pixels, build, source, monkeypatch
):
    folder = str(build(tmp_path, pixels))
    for name in ("OORD", "CHRABASZCZ"):
        monkeypatch.setattr(imagenet, name, {"train": 8, "test": 4})
    with pytest.raises(UserError, match=r"7 of 8 train, 4 of 4 test.*partial: true"):
        source(folder).describe()
    description = source(folder, partial=True).describe()
    assert description.name.endswith("-partial") and "partial: 7 of 8 train" in description.version


def test_content_must_match_a_pinned_checksum(tmp_path, pixels):
    folder = str(as_arrays(tmp_path, pixels))
    pinned = ImageNetChrabaszcz(folder).describe().sha256
    assert ImageNetChrabaszcz(folder, sha256=pinned).describe().sha256 == pinned
    with pytest.raises(UserError, match=f"other content.*its sha256 is {pinned}"):
        ImageNetChrabaszcz(folder, sha256=64 * "0").describe()


def cut(name, part=0.6):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(part * len(data))])

    return damage


def flip(name, position):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 255
        (folder / name).write_bytes(bytes(data))

    return damage


def shrink(name):
    return lambda folder: (folder / name).write_bytes(png(np.zeros((3, 16, 16), np.uint8)))


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace_by_pickles(folder):
    for name in ("train_data_batch_1", "train_data_batch_2", "val_data"):
        (folder / f"{name}.npz").unlink()
        (folder / name).write_bytes(b"cos\nsystem\n(S'echo opened'\ntR.")


def store_objects(folder):
    rows = np.array([[None] * 3072] * 3, dtype=object)
    np.savez(folder / "train_data_batch_1.npz", data=rows)


def saved(**arrays):
    return lambda folder: np.savez(folder / "val_data.npz", **arrays)


@pytest.mark.parametrize(
    ("build", "damage", "culprits"),
    [
        (as_tars, cut("train_32x32.tar"), ["train_32x32.tar", "truncated"]),
        (
            as_tars,
            lambda f: (f / "valid_32x32.tar").write_bytes(b"<html>gone</html>"),
            ["valid_32x32.tar", "plain tar"],
        ),
        (as_tars, remove("valid_32x32.tar"), ["valid_32x32", "van den Oord"]),
        (as_folders, cut("train_32x32/0000003.png"), ["0000003.png", "cannot be read"]),
        (as_folders, remove("valid_32x32/0000001.png"), ["3 of 4 test", "partial"]),
        (as_folders, shrink("train_32x32/0000000.png"), ["16 x 16", "resolution=32"]),
        (
            as_arrays,
            cut("train_data_batch_2.npz"),
            ["train_data_batch_2.npz", "truncated, damaged"],
        ),
        (as_arrays, flip("train_data_batch_2.npz", 5000), ["train_data_batch_2.npz", "CRC-32"]),
        (
            partial(as_arrays, save=np.savez_compressed),
            flip("val_data.npz", 5000),
            ["val_data.npz", "damaged"],
        ),
        (
            as_arrays,
            replace_by_pickles,
            ["pickled batches", "never opened", "npz", "numpy.savez"],
        ),
        (
            as_arrays,
            store_objects,
            ["train_data_batch_1.npz", "Python objects", "never opened"],
        ),
        (
            as_arrays,
            saved(images=np.zeros((4, 3072), np.uint8)),
            ["val_data.npz", "'data'", "images"],
        ),
        (
            as_arrays,
            saved(data=np.zeros((4, 12288), np.uint8)),
            ["4 x 12288", "N x 3072", "resolution=32"],
        ),
        (as_arrays, saved(data=np.zeros((4, 3072))), ["float64", "uint8"]),
        (
            as_arrays,
            remove("train_data_batch_1.npz"),
            ["without gaps", "train_data_batch_2.npz, val_data.npz"],
        ),
    ],
)
def test_damage_is_reported_in_one_line(tmp_path, pixels, build, damage, culprits, capfd):
    damage(build(tmp_path, pixels))
    source = ImageNetChrabaszcz if any(tmp_path.glob("*data*")) else ImageNetOord
    with pytest.raises(UserError) as error:
        source(str(tmp_path)).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message
    assert "opened\n" not in capfd.readouterr().out  # no pickle ran


def test_the_other_release_is_recognized(tmp_path, pixels):
    advice = r"other release.*--data ndm.data.ImageNetChrabaszcz --data.resolution 32"
    with pytest.raises(UserError, match=advice):
        ImageNetOord(str(as_arrays(tmp_path / "a", pixels))).describe()
    with pytest.raises(UserError, match=r"other release.*--data ndm.data.ImageNetOord"):
        ImageNetChrabaszcz(str(as_tars(tmp_path / "b", pixels))).describe()
    with pytest.raises(UserError, match=r"resolution=16.*32 and 64"):
        ImageNetOord(str(tmp_path), resolution=16)


def test_the_two_releases_have_different_names_and_checksums(tmp_path, pixels):
    oord = ImageNetOord(str(as_tars(tmp_path / "a", pixels))).describe()
    chrabaszcz = ImageNetChrabaszcz(str(as_arrays(tmp_path / "b", pixels))).describe()
    assert oord.name != chrabaszcz.name and oord.sha256 != chrabaszcz.sha256
