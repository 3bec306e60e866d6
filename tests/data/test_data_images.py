"""Image folders and image columns: pixels come back exactly, splits are by class, and each fault
has its message.
"""

import io
import pickle
import struct
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from ndm.data import HuggingFace, ImageFolder
from ndm.errors import MissingExtraError, UserError


def picture(seed: int, height=6, width=5, channels=3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(
        pixels.squeeze() if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    ).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def flat(root, count=10, **shape):
    for index in range(count):
        write(root / f"{index:02d}.png", png(picture(index, **shape)))
    (root / "README.txt").write_text("not an image")
    return str(root)


def by_class(root, counts):
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            write(root / name / f"{index}.png", png(picture(100 * number + index)))
    return str(root)


def pixels_of(source, split):
    examples = source.split(split)
    return source.integers(examples.__getitems__(range(len(examples)))).numpy()


def test_pixels_of_a_flat_folder_come_back_each_once(tmp_path):
    source = ImageFolder(flat(tmp_path / "imgs"))
    assert source.describe().event_shape == (3, 6, 5) and source.describe().splits == {
        "train": 8,
        "test": 2,
    }
    ours = sorted(
        image.tobytes() for split in ("train", "test") for image in pixels_of(source, split)
    )
    theirs = sorted(
        picture(index).transpose(2, 0, 1).astype(np.int64).tobytes() for index in range(10)
    )
    assert ours == theirs
    examples = pickle.loads(pickle.dumps(source.split("test")))
    assert torch.equal(examples[1], source.split("test")[1])


def test_checksum_changes_with_one_pixel_and_not_with_the_place(tmp_path):
    first, second = (ImageFolder(flat(tmp_path / name / "imgs")).describe() for name in ("a", "b"))
    assert first == second
    changed = picture(3)
    changed[0, 0, 0] ^= 1
    write(tmp_path / "b" / "imgs" / "03.png", png(changed))
    assert ImageFolder(str(tmp_path / "b" / "imgs")).describe().sha256 != first.sha256


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path, orientation, kind):
    """Whatever way the camera was held: EXIF's eight orientations against the turns that undo them."""
    upright = np.kron(
        picture(0, 3, 2), np.ones((8, 8, 1), dtype=np.uint8)
    )  # whole blocks of JPEG's
    upright[..., :] = upright[..., :1]  # and gray
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(buffer, kind, exif=exif)
    for name in "abcdefghij":
        write(tmp_path / f"{name}.{kind.lower()}", buffer.getvalue())
    source = ImageFolder(str(tmp_path))
    assert source.describe().event_shape == (3, 24, 16)
    np.testing.assert_allclose(
        pixels_of(source, "train")[0], upright.transpose(2, 0, 1), atol=3 if kind == "JPEG" else 0
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_turn_nothing(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(picture(0)).save(
        buffer, "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff broken"
    )
    for name in "abcdefghij":
        write(tmp_path / f"{name}.jpg", buffer.getvalue())
    source = ImageFolder(str(tmp_path))
    assert source.describe().event_shape == (3, 6, 5) and len(pixels_of(source, "train")) == 8


def test_own_splits_and_classes_are_found(tmp_path):
    by_class(tmp_path / "train", {"cat": 3, "dog": 2})
    by_class(tmp_path / "test", {"cat": 1, "dog": 2})
    source = ImageFolder(str(tmp_path))
    assert source.describe().classes == ("cat", "dog") and source.describe().splits == {
        "train": 5,
        "test": 3,
    }
    assert source.split("test").labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(pixels_of(source, "test")[1], picture(100).transpose(2, 0, 1))
    assert ImageFolder(str(tmp_path), class_folders=False).describe().classes == ()


def test_version_counts_the_files_that_are_ignored(tmp_path):
    version = "image folder, 80/20 split, seed 0"
    flat(tmp_path / "imgs")
    assert ImageFolder(str(tmp_path / "imgs")).describe().version == (
        f"{version}, 1 other file ignored"
    )
    (tmp_path / "imgs" / "README.txt").unlink()
    (tmp_path / "imgs" / ".hidden").write_text("not counted")
    assert ImageFolder(str(tmp_path / "imgs")).describe().version == version
    for name in ("a.json", "sub/b.npy", "sub/c.txt"):
        write(tmp_path / "imgs" / name, b"")
    assert ImageFolder(str(tmp_path / "imgs"), size=4).describe().version == (
        f"{version}, center square scaled to 4 x 4 (bicubic), 3 other files ignored"
    )


def test_images_outside_of_the_split_folders_are_counted_as_ignored(tmp_path):
    flat(tmp_path / "train")
    flat(tmp_path / "test", count=2)
    flat(tmp_path / "val", count=4)
    description = ImageFolder(str(tmp_path)).describe()
    assert description.splits == {"train": 10, "test": 2}
    assert description.version == (
        "image folder, own train and test folders, 7 other files ignored"
    )


def test_drawn_split_is_stratified(tmp_path):
    source = ImageFolder(by_class(tmp_path, {"a": 10, "b": 20}), test_fraction=0.3)
    counts = [torch.bincount(source.split(split).labels).tolist() for split in ("train", "test")]
    assert counts == [[7, 14], [3, 6]]


def test_size_cuts_the_center_square_and_gray_is_one_channel(tmp_path):
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = 200
    for name in ("a.png", "b.png"):
        write(tmp_path / name, png(wide))
    write(tmp_path / "c.png", png(np.full((12, 12, 3), 200, dtype=np.uint8)))
    source = ImageFolder(str(tmp_path), channels=1, size=4, test_fraction=0.34)
    assert source.describe().event_shape == (1, 4, 4)
    assert all((pixels_of(source, split) == 200).all() for split in ("train", "test"))


def cut(root):
    data = png(picture(0, 40, 40))
    write(root / "00.png", data[: len(data) // 2])
    return root


def late_damage(root):
    flat(root)
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(buffer, "JPEG")
    for index in range(10):
        (root / f"{index:02d}.png").unlink()
        write(root / f"{index:02d}.jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return ImageFolder(str(root)).split("train")[0]


def deep(root, mode):
    flat(root)
    if mode == "gray":
        Image.fromarray(np.full((6, 5), 1000, dtype=np.uint16)).save(root / "05.png")
    else:  # the header of a PNG with 16 bits a value, which Pillow would read as 8 bits

        def chunk(kind, data):
            return (
                struct.pack(">I", len(data))
                + kind
                + data
                + struct.pack(">I", zlib.crc32(kind + data))
            )

        rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(6))
        data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))
        write(root / "05.png", data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return ImageFolder(str(root)).describe()


def then(action, root, **arguments):
    action(root)
    return ImageFolder(str(root), **arguments).describe()


FAULTS = {
    "no folder": (lambda d: ImageFolder(str(d / "none")).describe(), ["none", "not a directory"]),
    "no images": (lambda d: ImageFolder(flat(d, count=0)).describe(), ["no images", ".png"]),
    "unreadable": (
        lambda d: then(lambda r: (flat(r), write(r / "04.png", b"hello")), d),
        ["04.png", "cannot be read"],
    ),
    "cut": (lambda d: then(lambda r: (flat(r), cut(r)), d), ["00.png", "cannot be read"]),
    "cut inside the pixels": (late_damage, [".jpg", "cannot be read"]),
    "sizes": (
        lambda d: then(lambda r: (flat(r), write(r / "09.png", png(picture(0, 7, 9)))), d),
        [".png is 5 x 6", "09.png is 9 x 7", "size="],
    ),
    "16 bits": (lambda d: deep(d, "gray"), ["05.png", "8 bits"]),
    "16 bits in color": (lambda d: deep(d, "color"), ["05.png", "8 bits"]),
    "empty class": (
        lambda d: ImageFolder(by_class(d, {"cat": 5, "dog": 0})).describe(),
        ["class dog", "class_folders=False"],
    ),
    "class missing in test": (
        lambda d: then(
            lambda r: (
                by_class(r / "train", {"cat": 2, "dog": 2}),
                by_class(r / "test", {"cat": 2}),
            ),
            d,
        ),
        ["'test'", "class dog"],
    ),
    "class too small": (
        lambda d: ImageFolder(by_class(d, {"cat": 10, "dog": 1})).describe(),
        ["'test'", "class dog", "test_fraction=0.2"],
    ),
    "one image": (lambda d: ImageFolder(flat(d, count=1)).describe(), ["test split", "empty"]),
    "stray image": (
        lambda d: then(
            lambda r: (by_class(r, {"cat": 5}), write(r / "stray.png", png(picture(0)))),
            d,
            class_folders=True,
        ),
        ["stray.png", "class_folders=False"],
    ),
    "half a split": (
        lambda d: then(lambda r: by_class(r / "train", {"cat": 5}), d),
        ["train", "test"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_folder_is_named_in_one_line(tmp_path, fault):
    make, culprits = FAULTS[fault]
    with pytest.raises(UserError) as error:
        make(tmp_path)
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


@pytest.fixture
def offline(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return datasets


def write_split(folder, split, images, datasets, **columns):
    folder.mkdir(exist_ok=True)
    features = {
        "image": datasets.Image(),
        **{name: feature for name, (feature, _) in columns.items()},
    }
    storage = pa.array(
        [{"bytes": image, "path": None} for image in images],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    arrays = {"image": storage, **{name: pa.array(values) for name, (_, values) in columns.items()}}
    schema = datasets.Features(features).arrow_schema
    pq.write_table(pa.table(arrays).cast(schema), folder / f"{split}-00000.parquet")


def hub(folder, datasets, test_labels=(1, 0, 2), changed=False):
    pets = datasets.ClassLabel(names=["cat", "dog", "owl"])
    images = [png(picture(index)) for index in range(9)]
    if changed:
        images[0] = png(picture(77))
    write_split(
        folder,
        "train",
        images[:6],
        datasets,
        label=(pets, [0, 1, 2] * 2),
        weight=(datasets.Value("float64"), np.arange(6.0)),
    )
    write_split(
        folder,
        "test",
        images[6:],
        datasets,
        label=(pets, list(test_labels)),
        weight=(datasets.Value("float64"), np.arange(3.0)),
    )
    return str(folder)


def test_image_column_gives_the_pixels_and_the_classes(tmp_path, offline):
    source = HuggingFace(hub(tmp_path / "pets", offline), label_column="label")
    description = source.describe()
    assert (
        description.name == "pets"
        and description.splits == {"train": 6, "test": 3}
        and description.classes == ("cat", "dog", "owl")
    )
    for split, start in (("train", 0), ("test", 6)):
        expected = np.stack(
            [
                picture(start + index).transpose(2, 0, 1)
                for index in range(description.splits[split])
            ]
        )
        np.testing.assert_array_equal(pixels_of(source, split), expected)
    assert source.split("test").labels.tolist() == [1, 0, 2]
    examples = pickle.loads(pickle.dumps(source.split("test")))
    assert torch.equal(examples[1], source.split("test")[1])


def test_checksum_of_a_column_is_of_its_images(tmp_path, offline):
    first, second, changed = (
        HuggingFace(hub(tmp_path / name, offline, changed=name == "c")).describe().sha256
        for name in ("a", "b", "c")
    )
    assert first == second != changed


def test_columns_of_numbers_are_standardized(tmp_path, offline):
    source = HuggingFace(hub(tmp_path / "pets", offline), image_column=None, columns=["weight"])
    assert source.describe().event_shape == (1,) and source.describe().offset == (2.5,)
    x = source.split("test").__getitems__([0, 1, 2])
    assert torch.allclose(source.to_source_units(x), torch.tensor([[0.0], [1.0], [2.0]]), atol=1e-6)


HUB_FAULTS = {
    "missing class": (
        lambda f, d: HuggingFace(hub(f, d, (0, 0, 1)), label_column="label"),
        ["'test'", "class owl"],
    ),
    "hidden labels": (
        lambda f, d: HuggingFace(hub(f, d, (0, 1, -1)), label_column="label"),
        ["'test'", "row 2", "-1"],
    ),
    "unknown column": (
        lambda f, d: HuggingFace(hub(f, d), image_column="img"),
        ["'img'", "image, label, weight"],
    ),
    "not an image": (
        lambda f, d: HuggingFace(hub(f, d), image_column="weight"),
        ["'weight'", "float64"],
    ),
    "unknown split": (
        lambda f, d: HuggingFace(hub(f, d), splits={"train": "train", "test": "exam"}),
        ["'exam'", "splits"],
    ),
    "not found": (
        lambda f, d: HuggingFace("nobody/nothing-of-this-name"),
        ["nobody/nothing-of-this-name", "network"],
    ),
    "text column": (
        lambda f, d: HuggingFace(hub(f, d), image_column=None, columns=["image"]),
        ["'image'", "not numbers"],
    ),
    "two kinds": (
        lambda f, d: HuggingFace("x", columns=["a"]),
        ["image_column='image'", "columns=['a']"],
    ),
    "no train": (lambda f, d: HuggingFace("x", splits={"test": "test"}), ["splits=", "'train'"]),
}


@pytest.mark.parametrize("fault", HUB_FAULTS)
def test_fault_of_a_hub_data_set_is_named_in_one_line(tmp_path, offline, fault):
    make, culprits = HUB_FAULTS[fault]
    with pytest.raises(UserError) as error:
        make(tmp_path / "pets", offline).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


def test_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"ndm\[hub\]"):
        HuggingFace("owner/name").describe()
