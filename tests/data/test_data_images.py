"""Image folders and image columns: exact pixels, splits by class, and a message for each fault."""

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
    gray = pixels.ndim == 3 and pixels.shape[-1] == 1
    Image.fromarray(pixels[..., 0] if gray else pixels).save(buffer, "PNG")
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


def test_a_flat_folder_gives_the_exact_pixels_of_each_image_once(tmp_path):
    source = ImageFolder(flat(tmp_path / "imgs"))
    assert source.describe().event_shape == (3, 6, 5)
    assert source.describe().splits == {"train": 8, "test": 2}
    found = np.concatenate([pixels_of(source, split) for split in ("train", "test")])
    expected = [picture(index).transpose(2, 0, 1).astype(np.int64) for index in range(10)]
    assert sorted(x.tobytes() for x in found) == sorted(x.tobytes() for x in expected)
    examples = pickle.loads(pickle.dumps(source.split("test")))
    assert torch.equal(examples[1], source.split("test")[1])


def test_the_checksum_depends_on_the_pixels_and_not_on_the_path(tmp_path):
    first, second = (ImageFolder(flat(tmp_path / name / "imgs")).describe() for name in ("a", "b"))
    assert first == second
    changed = picture(3)
    changed[0, 0, 0] ^= 1
    write(tmp_path / "b" / "imgs" / "03.png", png(changed))
    assert ImageFolder(str(tmp_path / "b" / "imgs")).describe().sha256 != first.sha256


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_are_applied(tmp_path, orientation, kind):
    # Gray blocks of 8 x 8 pixels, which JPEG stores almost exactly.
    upright = np.kron(picture(0, 3, 2), np.ones((8, 8, 1), dtype=np.uint8))
    upright[..., :] = upright[..., :1]
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
    tolerance = 3 if kind == "JPEG" else 0
    found = pixels_of(source, "train")[0]
    np.testing.assert_allclose(found, upright.transpose(2, 0, 1), atol=tolerance)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_are_ignored(tmp_path):
    buffer = io.BytesIO()
    damaged = b"Exif\x00\x00MM\x00*\x00\x00\xff\xff broken"
    Image.fromarray(picture(0)).save(buffer, "JPEG", exif=damaged)
    for name in "abcdefghij":
        write(tmp_path / f"{name}.jpg", buffer.getvalue())
    source = ImageFolder(str(tmp_path))
    assert source.describe().event_shape == (3, 6, 5) and len(pixels_of(source, "train")) == 8


def test_split_and_class_folders_are_recognized(tmp_path):
    by_class(tmp_path / "train", {"cat": 3, "dog": 2})
    by_class(tmp_path / "test", {"cat": 1, "dog": 2})
    source = ImageFolder(str(tmp_path))
    assert source.describe().classes == ("cat", "dog")
    assert source.describe().splits == {"train": 5, "test": 3}
    assert source.split("test").labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(pixels_of(source, "test")[1], picture(100).transpose(2, 0, 1))
    assert ImageFolder(str(tmp_path), class_folders=False).describe().classes == ()


def test_the_version_counts_ignored_files(tmp_path):
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


def test_images_outside_the_split_folders_are_counted_as_ignored(tmp_path):
    flat(tmp_path / "train")
    flat(tmp_path / "test", count=2)
    flat(tmp_path / "more", count=4)
    description = ImageFolder(str(tmp_path)).describe()
    assert description.splits == {"train": 10, "test": 2}
    assert description.version == (
        "image folder, own train and test folders, 7 other files ignored"
    )


def test_a_drawn_split_is_stratified(tmp_path):
    source = ImageFolder(by_class(tmp_path, {"a": 10, "b": 20}), test_fraction=0.3)
    counts = [torch.bincount(source.split(split).labels).tolist() for split in ("train", "test")]
    assert counts == [[7, 14], [3, 6]]


def test_images_are_cropped_to_the_center_square_and_converted_to_gray(tmp_path):
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = 200
    for name in ("a.png", "b.png"):
        write(tmp_path / name, png(wide))
    write(tmp_path / "c.png", png(np.full((12, 12, 3), 200, dtype=np.uint8)))
    source = ImageFolder(str(tmp_path), channels=1, size=4, test_fraction=0.34)
    assert source.describe().event_shape == (1, 4, 4)
    assert all((pixels_of(source, split) == 200).all() for split in ("train", "test"))


def truncate(root):
    data = png(picture(0, 40, 40))
    write(root / "00.png", data[: len(data) // 2])
    return root


def truncated_pixels(root):
    flat(root)
    buffer = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(buffer, "JPEG")
    for index in range(10):
        (root / f"{index:02d}.png").unlink()
        write(root / f"{index:02d}.jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return ImageFolder(str(root)).split("train")[0]


def png_chunk(kind, data):
    length, checksum = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
    return length + kind + data + checksum


def sixteen_bits(root, mode):
    flat(root)
    if mode == "gray":
        Image.fromarray(np.full((6, 5), 1000, dtype=np.uint16)).save(root / "05.png")
    else:  # Pillow would read this PNG as 8 bits
        rows = b"".join(b"\0" + bytes(5 * 6) for _ in range(6))
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0))
        body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        write(root / "05.png", b"\x89PNG\r\n\x1a\n" + header + body)
    return ImageFolder(str(root)).describe()


def describe_after(action, root, **arguments):
    action(root)
    return ImageFolder(str(root), **arguments).describe()


def write_test_without_dogs(root):
    by_class(root / "train", {"cat": 2, "dog": 2})
    by_class(root / "test", {"cat": 2})


def write_stray_image(root):
    by_class(root, {"cat": 5})
    write(root / "stray.png", png(picture(0)))


FAULTS = {
    "no folder": (lambda d: ImageFolder(str(d / "none")).describe(), ["none", "not a folder"]),
    "no images": (lambda d: ImageFolder(flat(d, count=0)).describe(), ["no images", ".png"]),
    "unreadable": (
        lambda d: describe_after(lambda r: (flat(r), write(r / "04.png", b"hello")), d),
        ["04.png", "cannot be read"],
    ),
    "truncated": (
        lambda d: describe_after(lambda r: (flat(r), truncate(r)), d),
        ["00.png", "cannot be read"],
    ),
    "truncated pixels": (truncated_pixels, [".jpg", "cannot be read"]),
    "sizes": (
        lambda d: describe_after(
            lambda r: (flat(r), write(r / "09.png", png(picture(0, 7, 9)))), d
        ),
        [".png is 5 x 6", "09.png is 9 x 7", "size="],
    ),
    "16 bits": (lambda d: sixteen_bits(d, "gray"), ["05.png", "8 bits"]),
    "16 bits in color": (lambda d: sixteen_bits(d, "color"), ["05.png", "8 bits"]),
    "empty class": (
        lambda d: ImageFolder(by_class(d, {"cat": 5, "dog": 0})).describe(),
        ["class dog", "class_folders=False"],
    ),
    "class missing in test": (
        lambda d: describe_after(write_test_without_dogs, d),
        ["'test'", "class dog"],
    ),
    "class too small": (
        lambda d: ImageFolder(by_class(d, {"cat": 10, "dog": 1})).describe(),
        ["'test'", "class dog", "test_fraction=0.2"],
    ),
    "one image": (lambda d: ImageFolder(flat(d, count=1)).describe(), ["test split", "empty"]),
    "stray image": (
        lambda d: describe_after(write_stray_image, d, class_folders=True),
        ["stray.png", "class_folders=False"],
    ),
    "half a split": (
        lambda d: describe_after(lambda r: by_class(r / "train", {"cat": 5}), d),
        ["train", "test"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_reported_in_one_line(tmp_path, fault):
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
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features, arrays = {"image": datasets.Image()}, {"image": pa.array(rows, kind)}
    for name, (feature, values) in columns.items():
        features[name], arrays[name] = feature, pa.array(values)
    schema = datasets.Features(features).arrow_schema
    pq.write_table(pa.table(arrays).cast(schema), folder / f"{split}-00000.parquet")


def hub(folder, datasets, test_labels=(1, 0, 2), changed=False):
    pets, number = datasets.ClassLabel(names=["cat", "dog", "owl"]), datasets.Value("float64")
    images = [png(picture(index)) for index in range(9)]
    if changed:
        images[0] = png(picture(77))
    columns = {"label": (pets, [0, 1, 2] * 2), "weight": (number, np.arange(6.0))}
    write_split(folder, "train", images[:6], datasets, **columns)
    columns = {"label": (pets, list(test_labels)), "weight": (number, np.arange(3.0))}
    write_split(folder, "test", images[6:], datasets, **columns)
    return str(folder)


def test_an_image_column_gives_pixels_and_classes(tmp_path, offline):
    source = HuggingFace(hub(tmp_path / "pets", offline), label_column="label")
    description = source.describe()
    assert description.name == "pets" and description.splits == {"train": 6, "test": 3}
    assert description.classes == ("cat", "dog", "owl")
    images = np.stack([picture(index).transpose(2, 0, 1) for index in range(9)])
    np.testing.assert_array_equal(pixels_of(source, "train"), images[:6])
    np.testing.assert_array_equal(pixels_of(source, "test"), images[6:])
    assert source.split("test").labels.tolist() == [1, 0, 2]
    examples = pickle.loads(pickle.dumps(source.split("test")))
    assert torch.equal(examples[1], source.split("test")[1])


def test_the_checksum_of_a_column_depends_on_its_images(tmp_path, offline):
    first, second, changed = (
        HuggingFace(hub(tmp_path / name, offline, changed=name == "c")).describe().sha256
        for name in ("a", "b", "c")
    )
    assert first == second != changed


def test_numeric_columns_are_standardized(tmp_path, offline):
    source = HuggingFace(hub(tmp_path / "pets", offline), image_column=None, columns=["weight"])
    assert source.describe().event_shape == (1,) and source.describe().offset == (2.5,)
    x = source.split("test").__getitems__([0, 1, 2])
    expected = torch.tensor([[0.0], [1.0], [2.0]])
    assert torch.allclose(source.to_source_units(x).float(), expected, atol=1e-6)


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
def test_a_faulty_hub_data_set_is_reported_in_one_line(tmp_path, offline, fault):
    make, culprits = HUB_FAULTS[fault]
    with pytest.raises(UserError) as error:
        make(tmp_path / "pets", offline).describe()
    message = str(error.value)
    assert "\n" not in message and all(culprit in message for culprit in culprits), message


def test_a_missing_package_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"ndm\[hub\]"):
        HuggingFace("owner/name").describe()
