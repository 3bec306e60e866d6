"""Files of users: hidden parts, links, folders named like splits, depth, damage and memory."""

import gzip
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ndm.data import MNIST, CelebAHQ, HuggingFace, ImageFolder
from ndm.data.other import read_like
from ndm.errors import UserError


def picture(seed: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, seed: int, height: int = 6, width: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, height, width)).save(path)
    return path


def several(folder: Path, count: int, start: int = 0) -> Path:
    for index in range(count):
        save(folder / f"{index:02d}.png", start + index)
    return folder


def classes(folder: Path, start: int = 0, count: int = 5) -> Path:
    for number, name in enumerate(("cat", "dog")):
        several(folder / name, count, start + 100 * number)
    return folder


def rejection(source: Callable[[], object]) -> str:
    """Return the message of a UserError, which must be one line of at most 300 characters."""
    with pytest.raises(UserError) as error:
        source()
    message = str(error.value)
    assert "\n" not in message and len(message) <= 300, message
    return message


def chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png(width: int, height: int, bits: int, color: int, extra: bytes = b"") -> bytes:
    """Return a PNG of zeros, written by hand."""
    channels = {0: 1, 2: 3, 6: 4}[color]
    row = bytes(1 + (width * channels * bits + 7) // 8)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def deep_tiff(order: str = "<") -> bytes:
    """Return a TIFF of 5 x 6 pixels, three times 16 bits, written by hand."""
    tags = [
        (256, 3, 1, 5),
        (257, 3, 1, 6),
        (258, 3, 3, 134),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 140),
        (277, 3, 1, 3),
        (278, 3, 1, 6),
        (279, 4, 1, 180),
        (284, 3, 1, 1),
    ]
    data = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, kind, count, value in tags:
        short = kind == 3 and count == 1
        packed = struct.pack(f"{order}HH" if short else f"{order}I", *((value, 0)[: 1 + short]))
        data += struct.pack(f"{order}HHI", tag, kind, count) + packed
    return data + bytes(4) + struct.pack(f"{order}3H", 16, 16, 16) + bytes(180)


DEEP = {
    "rgb.png": png(5, 6, 16, 2),
    "rgba.png": png(5, 6, 16, 6),
    "gray.png": png(5, 6, 16, 0),
    "little.tif": deep_tiff(),
    "big.tiff": deep_tiff(">"),
    "raw.ppm": b"P6\n# a comment\n5 6\n65535\n" + bytes(180),
    "ten.ppm": b"P6 5 6 1023\n" + bytes(180),
    "plain.ppm": b"P3\n5 6\n65535\n" + b"0 " * 90,
    "gray.pgm": b"P5 5 6 1023\n" + bytes(60),
    "misnamed.jpg": png(5, 6, 16, 2),
}


@pytest.mark.parametrize("name", DEEP)
def test_depth_is_read_from_the_file(tmp_path: Path, name: str) -> None:
    folder = several(tmp_path / "photos", 10)
    trained = ImageFolder(str(folder)).describe()
    (folder / name).write_bytes(DEEP[name])
    for source in (
        lambda: ImageFolder(str(folder)).describe(),
        lambda: CelebAHQ(str(folder), 4, partial=True).describe(),
        lambda: read_like(None, str(folder), trained),
    ):
        message = rejection(source)
        assert name in message and "more than 8 bits" in message


def test_dropped_transparency_is_counted(tmp_path: Path) -> None:
    folder = several(tmp_path / "photos", 10)
    version = ImageFolder(str(folder)).describe().version
    Image.fromarray(np.full((6, 5, 4), 255, dtype=np.uint8)).save(folder / "opaque.png")
    assert ImageFolder(str(folder)).describe().version == version
    key = chunk(b"tRNS", struct.pack(">3H", 0, 0, 0))
    (folder / "key.png").write_bytes(png(5, 6, 8, 2, key))
    Image.fromarray(np.full((6, 5, 4), 7, dtype=np.uint8)).save(folder / "alpha.png")
    found = ImageFolder(str(folder)).describe().version
    assert found == f"{version}, transparency of 2 images dropped"


@pytest.mark.parametrize(
    "hidden",
    [".thumbnails/x.png", "cat/.ipynb_checkpoints/x.png", "cat/._00.png", ".a/b/c/x.png"],
)
def test_paths_with_a_hidden_part_are_skipped(tmp_path: Path, hidden: str) -> None:
    folder = classes(tmp_path / ".data" / "pets")
    before = ImageFolder(str(folder)).describe()
    faces = CelebAHQ(str(folder), 4, partial=True).describe()
    scored = read_like(None, str(folder), before).description
    save(folder / hidden, 9)
    assert ImageFolder(str(folder)).describe() == before and before.classes == ("cat", "dog")
    assert CelebAHQ(str(folder), 4, partial=True).describe() == faces
    assert read_like(None, str(folder), before).description == scored


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    plain = ImageFolder(str(classes(tmp_path / "pets"))).describe()
    farm = tmp_path / "farm" / "pets"
    farm.mkdir(parents=True)
    for name in ("cat", "dog"):
        (farm / name).symlink_to(tmp_path / "pets" / name)
    assert ImageFolder(str(farm)).describe() == plain
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "pets").symlink_to(farm)
    assert ImageFolder(str(tmp_path / "linked" / "pets")).describe().sha256 == plain.sha256


def test_cycles_of_links_end_and_no_image_is_taken_twice(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pets")
    before = ImageFolder(str(folder)).describe()
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "above").symlink_to(tmp_path)
    (folder / "again").symlink_to(folder / "dog")
    (folder / "loop").symlink_to(folder / "loop")
    after = ImageFolder(str(folder)).describe()
    assert (after.sha256, after.classes) == (before.sha256, before.classes)
    assert "3 linked folders" in after.version


def test_train_and_test_may_not_be_the_same_folder(tmp_path: Path) -> None:
    pool = several(tmp_path / "pool", 4)
    for split in ("train", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        (tmp_path / "photos" / split / "part").symlink_to(pool)
    message = rejection(lambda: ImageFolder(str(tmp_path / "photos")).describe())
    assert "train" in message and "test" in message and "pool" in message


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train", "test"), {"train": 6, "test": 2}),
        (("Train", "Test"), {"train": 6, "test": 2}),
        (("training", "testing"), {"train": 6, "test": 2}),
        (("seg_train", "seg_test"), {"train": 6, "test": 2}),
        (("train2017", "test2017"), {"train": 6, "test": 2}),
        (("TRAIN", "TEST", "VALID"), {"train": 6, "test": 2, "validation": 3}),
        (("train", "test", "val"), {"train": 6, "test": 2, "validation": 3}),
    ],
)
def test_folders_named_like_splits_are_splits(
    tmp_path: Path, names: tuple[str, ...], splits: dict[str, int]
) -> None:
    for name, count, start in zip(names, (6, 2, 3), (0, 10, 20), strict=False):
        several(tmp_path / name, count, start)
    source = ImageFolder(str(tmp_path))
    assert source.describe().splits == splits
    for split, start in zip(splits, (0, 10, 20), strict=False):
        found = source.integers(source.split(split)[0]).numpy()
        np.testing.assert_array_equal(found, picture(start).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "names",
    [
        ("training", "validation"),
        ("train", "val"),
        ("Train",),
        ("test", "cat"),
        ("trainA", "trainB", "testA", "testB"),
        ("train", "Training", "test"),
        ("images/train", "images/val"),
        ("cat/train", "cat/test", "dog/train", "dog/test"),
    ],
)
def test_ambiguous_folders_named_like_splits_are_rejected(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for number, name in enumerate(names):
        several(tmp_path / name, 3, 10 * number)
    message = rejection(lambda: ImageFolder(str(tmp_path)).describe())
    assert "splits" in message and Path(names[0]).name in message
    pooled = ImageFolder(str(tmp_path), splits={}, class_folders=False).describe()
    assert sum(pooled.splits.values()) == 3 * len(names)


def test_splits_can_be_assigned(tmp_path: Path) -> None:
    several(tmp_path / "training", 6)
    several(tmp_path / "validation", 2, 10)
    source = ImageFolder(str(tmp_path), splits={"train": "training", "test": "validation"})
    assert source.describe().splits == {"train": 6, "test": 2}
    for wrong in ({"test": "training"}, {"train": "none"}, {"train": "../x"}, {"train": 3}):
        assert "splits" in rejection(lambda: ImageFolder(str(tmp_path), splits=wrong).describe())  # noqa: B023


@pytest.mark.parametrize("names", [("bullet_train", "test_tube"), ("station", "pretrain")])
def test_class_folders_that_only_contain_such_words_stay_classes(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        several(tmp_path / name, 5)
    assert ImageFolder(str(tmp_path)).describe().classes == tuple(sorted(names))
    for split in ("train", "test"):  # the class "train" of CIFAR-100
        several(tmp_path / "whole" / split / "train", 3)
        several(tmp_path / "whole" / split / "bus", 3, 10)
    assert ImageFolder(str(tmp_path / "whole")).describe().classes == ("bus", "train")


def test_faces_in_split_folders_are_not_split_anew(tmp_path: Path) -> None:
    several(tmp_path / "train" / "male", 10)
    several(tmp_path / "val" / "male", 5, 20)
    message = rejection(lambda: CelebAHQ(str(tmp_path), 4, partial=True).describe())
    assert "train" in message and "val" in message


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, 64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_all_damaged_files_are_found_when_the_source_is_read(tmp_path: Path) -> None:
    for index in range(20):
        data = jpeg(index)
        cut = index in (3, 7, 11)
        (tmp_path / f"{index:02d}.jpg").write_bytes(data[: len(data) // 2] if cut else data)
    (tmp_path / "20.jpg").symlink_to(tmp_path / "missing.jpg")
    message = rejection(lambda: ImageFolder(str(tmp_path)).describe())
    assert "4 of 21" in message
    assert all(name in message for name in ("03.jpg", "07.jpg", "11.jpg", "20.jpg")), message


def test_a_long_list_of_damaged_files_ends_in_a_count(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 150)
    for index in range(60):
        save(folder / f"{index:02d}.png", index).write_bytes(b"nothing")
    message = rejection(lambda: ImageFolder(str(folder)).describe())
    assert "60 of 60" in message and "more" in message and "00.png" in message


@pytest.mark.parametrize("skip", ["cut", "deep"])
def test_skipped_files_are_written_down_and_enter_the_checksum(tmp_path: Path, skip: str) -> None:
    for index in range(10):
        (tmp_path / f"{index}.jpg").write_bytes(jpeg(index))
    whole = ImageFolder(str(tmp_path), on_error="skip").describe()
    assert whole == ImageFolder(str(tmp_path)).describe()
    bad = tmp_path / "4.jpg"
    bad.write_bytes(jpeg(4)[:300] if skip == "cut" else png(64, 64, 16, 2))
    source = ImageFolder(str(tmp_path), on_error="skip")
    found = source.describe()
    assert sum(found.splits.values()) == 9 and "1 image skipped: 4.jpg" in found.version
    assert all(not str(file).endswith("4.jpg") for split in ("train", "test")
               for file in source.split(split).files)  # type: ignore[attr-defined]  # fmt: skip
    bad.rename(tmp_path / "5b.jpg")
    assert ImageFolder(str(tmp_path), on_error="skip").describe().sha256 != found.sha256
    with pytest.raises(UserError, match="on_error"):
        ImageFolder(str(tmp_path), on_error="ignore")  # type: ignore[arg-type]


def test_a_model_alone_knows_how_its_images_were_scaled(tmp_path: Path) -> None:
    for index in range(10):
        save(tmp_path / f"{index}.png", index, 8 + index, 9)
    source = ImageFolder(str(tmp_path), size=6)
    trained = source.describe()
    with_source = read_like(source, str(tmp_path), trained)
    alone = read_like(None, str(tmp_path), trained)
    assert alone.description == with_source.description


def test_other_images_of_a_wrong_size_are_rejected_by_the_size_of_the_model(tmp_path: Path) -> None:
    trained = ImageFolder(str(several(tmp_path / "a", 10))).describe()
    several(tmp_path / "b", 2)
    save(tmp_path / "b" / "wide.png", 3, 6, 9)
    message = rejection(lambda: read_like(None, str(tmp_path / "b"), trained))
    assert "wide.png is 9 x 6" in message and "5 x 6" in message and "size=" not in message


@pytest.mark.slow
def test_a_huge_image_is_rejected_before_it_is_decoded(tmp_path: Path) -> None:
    several(tmp_path, 10)
    (tmp_path / "huge.png").write_bytes(png(13_300, 13_400, 8, 2))
    message = rejection(lambda: ImageFolder(str(tmp_path), size=4).describe())
    assert "huge.png" in message and "13300 x 13400" in message
    code = (
        "import sys, resource; from ndm.data import ImageFolder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: ImageFolder(sys.argv[1], size=4).describe()\n"
        "except ValueError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(grown.stdout) < 150_000  # KiB; the pixels alone take 535 MB


def test_pipes_among_the_files_are_not_opened(tmp_path: Path) -> None:
    several(tmp_path, 10)
    version = ImageFolder(str(tmp_path)).describe().version
    os.mkfifo(tmp_path / "pipe.png")
    assert ImageFolder(str(tmp_path)).describe().version == f"{version}, 1 other file ignored"


def test_a_path_that_is_too_long_is_rejected() -> None:
    for source in (ImageFolder("x" * 300), CelebAHQ("x" * 300)):
        assert "not a folder" in rejection(source.describe)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = several(tmp_path / "photos", 10)
    (folder / "00.png").rename(Path(os.fsdecode(os.fsencode(folder) + b"/\xff.png")))
    assert ImageFolder(str(folder)).describe().splits == {"train": 8, "test": 2}


def test_compressed_idx_files_are_read_as_far_as_their_header_declares(tmp_path: Path) -> None:
    for name, shape in (("images-idx3", (10, 2, 2)), ("labels-idx1", (10,))):
        header = struct.pack(f">{1 + len(shape)}I", 2048 + len(shape), *shape)
        for split in ("train", "t10k"):
            content = header + bytes(range(10)) * (np.prod(shape) // 10)
            data = gzip.compress(content)
            if (split, len(shape)) == ("t10k", 3):
                data = gzip.compress(content + bytes(2**28), 1)
            (tmp_path / f"{split}-{name}-ubyte.gz").write_bytes(data)
    tracemalloc.start()
    assert "more follow" in rejection(lambda: MNIST(str(tmp_path)).describe())
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 2051, 2**31, 2**31, 2)))
    assert "fewer follow" in rejection(lambda: MNIST(str(tmp_path)).describe())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**8


def test_damaged_images_in_a_column_are_listed_or_skipped(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    images = [png(5, 6, 16, 2) if index in (1, 3) else jpeg(index) for index in range(6)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    rows = pa.array([{"bytes": image, "path": None} for image in images], kind)
    pq.write_table(pa.table({"image": rows}), tmp_path / "train-0.parquet")
    make = partial(HuggingFace, str(tmp_path), splits={"train": "train"})
    message = rejection(lambda: make().describe())
    assert "2 of 6" in message and "image 1" in message and "image 3" in message
    found = make(on_error="skip").describe()
    assert found.splits == {"train": 4} and "2 images skipped: image 1, image 3" in found.version
