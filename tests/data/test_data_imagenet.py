"""The two releases of small ImageNet in their real formats, made here: pixels come back exactly,
and each fault has its message.
"""

import io
import pickle
import tarfile

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
    """Releases of as many images as the files here hold."""
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


def as_tars(root, pixels):
    """In another order than that of the names, as archives are, with a hidden file of macOS among
    them.
    """
    root.mkdir(exist_ok=True)
    for split, images in pixels.items():
        with tarfile.open(root / f"{FOLDERS[split]}.tar", "w") as archive:
            for index in reversed(range(len(images))):
                for name, data in (
                    (f"{index:07d}.png", png(images[index])),
                    (f"._{index:07d}.png", b"no image"),
                ):
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
    save(
        root / "val_data.npz",
        data=pixels["test"].reshape(len(pixels["test"]), -1),
        labels=np.arange(4) + 1,
    )
    return root


def assert_holds(source, pixels):
    for split, images in pixels.items():
        examples = source.split(split)
        np.testing.assert_array_equal(
            source.integers(examples.__getitems__(range(len(examples)))).numpy(), images
        )
        order = [3, 0, 2]
        assert torch.equal(
            examples.__getitems__(order), torch.stack([examples[index] for index in order])
        )
        again = pickle.loads(pickle.dumps(examples))  # what a worker gets
        assert torch.equal(again[3], examples[3])


def test_archives_and_folders_hold_the_same_data(tmp_path, pixels):
    sources = [
        ImageNetOord(str(build(tmp_path / name, pixels)))
        for name, build in (("tar", as_tars), ("png", as_folders))
    ]
    for source in sources:
        assert_holds(source, pixels)
        assert source.describe().name == "imagenet32-oord" and source.describe().splits == COUNTS
    assert sources[0].describe() == sources[1].describe()


@pytest.mark.parametrize(
    ("save", "batches"), [(np.savez, (3, 4)), (np.savez_compressed, (1, 1, 5)), (np.savez, (7,))]
)
def test_arrays_are_mapped_in_place_or_expanded_once(tmp_path, pixels, save, batches):
    source = ImageNetChrabaszcz(str(as_arrays(tmp_path / "a", pixels, save, batches)))
    assert_holds(source, pixels)
    assert source.describe().name == "imagenet32-chrabaszcz" and source.describe().splits == COUNTS
    other = ImageNetChrabaszcz(str(as_arrays(tmp_path / "b", pixels, np.savez, (2, 5))))
    assert source.describe().sha256 == other.describe().sha256
    expanded = sorted((tmp_path / "a" / "expanded").glob("*"))
    assert len(expanded) == (len(batches) + 1 if save is np.savez_compressed else 0)
    before = [file.stat().st_mtime_ns for file in expanded]
    assert_holds(ImageNetChrabaszcz(str(tmp_path / "a")), pixels)
    assert [file.stat().st_mtime_ns for file in expanded] == before
    assert len(pickle.dumps(source.split("train"))) < 2000  # a worker gets places, not pixels


def test_new_files_are_expanded_again(tmp_path, pixels):
    folder = as_arrays(tmp_path / "a", pixels, np.savez_compressed)
    before = ImageNetChrabaszcz(str(folder), cache=str(tmp_path / "cache")).describe().sha256
    pixels["test"][0, 0, 0, 0] ^= 1
    as_arrays(folder, pixels, np.savez_compressed)
    source = ImageNetChrabaszcz(str(folder), cache=str(tmp_path / "cache"))
    assert source.describe().sha256 != before and not (folder / "expanded").exists()
    assert_holds(source, pixels)


def test_the_parts_of_the_larger_release_may_lie_in_subfolders(tmp_path, pixels):
    as_arrays(tmp_path, pixels)
    for name, part in (
        ("train_data_batch_1.npz", "part1"),
        ("train_data_batch_2.npz", "part2"),
        ("val_data.npz", "val"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / name).rename(tmp_path / part / name)
    assert_holds(ImageNetChrabaszcz(str(tmp_path)), pixels)


@pytest.mark.parametrize(
    ("build", "source"), [(as_tars, ImageNetOord), (as_arrays, ImageNetChrabaszcz)]
)
def test_a_part_is_refused_or_has_another_name(tmp_path, pixels, build, source, monkeypatch):
    folder = str(build(tmp_path, pixels))
    for name in ("OORD", "CHRABASZCZ"):
        monkeypatch.setattr(imagenet, name, {"train": 8, "test": 4})
    with pytest.raises(UserError, match=r"7 of 8 train, 4 of 4 test.*partial: true"):
        source(folder).describe()
    description = source(folder, partial=True).describe()
    assert description.name.endswith("-partial") and "partial: 7 of 8 train" in description.version


def test_a_pinned_checksum_holds_the_content(tmp_path, pixels):
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


def flip(name, place):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 255
        (folder / name).write_bytes(bytes(data))

    return damage


def pickled(folder):
    for name in ("train_data_batch_1", "train_data_batch_2", "val_data"):
        (folder / f"{name}.npz").unlink()
        (folder / name).write_bytes(b"cos\nsystem\n(S'echo opened'\ntR.")


def objects(folder):
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
        (as_tars, lambda f: (f / "valid_32x32.tar").unlink(), ["valid_32x32", "van den Oord"]),
        (as_folders, cut("train_32x32/0000003.png"), ["0000003.png", "cannot be read"]),
        (
            as_folders,
            lambda f: (f / "valid_32x32/0000001.png").unlink(),
            ["3 of 4 test", "partial"],
        ),
        (
            as_folders,
            lambda f: (f / "train_32x32/0000000.png").write_bytes(
                png(np.zeros((3, 16, 16), np.uint8))
            ),
            ["16 x 16", "resolution=32"],
        ),
        (
            as_arrays,
            cut("train_data_batch_2.npz"),
            ["train_data_batch_2.npz", "truncated, damaged"],
        ),
        (as_arrays, flip("train_data_batch_2.npz", 5000), ["train_data_batch_2.npz", "CRC-32"]),
        (
            lambda root, pixels: as_arrays(root, pixels, np.savez_compressed),
            flip("val_data.npz", 5000),
            ["val_data.npz", "damaged"],
        ),
        (as_arrays, pickled, ["pickled batches", "never opened", "npz", "numpy.savez"]),
        (as_arrays, objects, ["train_data_batch_1.npz", "Python objects", "never opened"]),
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
            lambda f: (f / "train_data_batch_1.npz").unlink(),
            ["without gaps", "train_data_batch_2.npz, val_data.npz"],
        ),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, pixels, build, damage, culprits, capfd):
    damage(build(tmp_path, pixels))
    source = ImageNetChrabaszcz if any(tmp_path.glob("*data*")) else ImageNetOord
    with pytest.raises(UserError) as error:
        source(str(tmp_path)).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message
    assert "opened\n" not in capfd.readouterr().out  # no pickle ran


def test_the_other_release_is_recognised(tmp_path, pixels):
    with pytest.raises(
        UserError, match=r"other release.*--data ndm.data.ImageNetChrabaszcz --data.resolution 32"
    ):
        ImageNetOord(str(as_arrays(tmp_path / "a", pixels))).describe()
    with pytest.raises(UserError, match=r"other release.*--data ndm.data.ImageNetOord"):
        ImageNetChrabaszcz(str(as_tars(tmp_path / "b", pixels))).describe()
    with pytest.raises(UserError, match=r"resolution=16.*32 and 64"):
        ImageNetOord(str(tmp_path), resolution=16)


def test_the_two_releases_are_two_data_sets(tmp_path, pixels):
    sources = [
        ImageNetOord(str(as_tars(tmp_path / "a", pixels))),
        ImageNetChrabaszcz(str(as_arrays(tmp_path / "b", pixels))),
    ]
    names, sums = (
        {getattr(source.describe(), key) for source in sources} for key in ("name", "sha256")
    )
    assert len(names) == len(sums) == 2
