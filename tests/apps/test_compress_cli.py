"""``ndm compress``, ``ndm decompress`` and ``ndm inspect``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from cli.commands import rejected, run_command
from ndm.apps.compress.archive import read_archive
from ndm.apps.compress.items import Item, read_items
from ndm.apps.compress.restore import write_items
from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.schedule import LinearLogSNRSchedule
from ndm.transform import GatedTransform, Identity

SHAPE = (3, 6, 5)


def description(
    shape: tuple[int, ...], num_values: int | None, low: float | None = 0.0
) -> dict[str, object]:
    """The description of the data that a model folder stores."""
    data = {"name": "x", "version": "1", "kind": "image", "sha256": "0" * 64}
    grid = {"num_values": num_values, "low": low, "high": None}
    return {"data": {**data, "splits": {"train": 1}, "event_shape": list(shape), **grid}}


def save_model(
    folder: Path,
    shape: tuple[int, ...] = SHAPE,
    num_values: int = 256,
    low: float = 0.0,
    seed: int = 0,
) -> Path:
    torch.manual_seed(seed)
    if len(shape) == 3:
        parts = [UNet(shape[0], 8, (1,), max_frequency=4.0) for _ in range(2)]
    else:
        parts = [MLP(shape[0], 8, 1, max_frequency=4.0) for _ in range(2)]  # type: ignore[misc]
    model = NDM(
        LinearLogSNRSchedule(-7.0, 4.0),
        GatedTransform(parts[0]),
        Predictor(parts[1]),
        DiscretizedGaussian(num_values),
    )
    model.save_pretrained(folder, description(shape, num_values, low))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("codec") / "model")


def photos(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for name in ("b.png", "a.bmp", "sub/c.png"):
        pixels = generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    for name, value in (("black.png", 0), ("white.ppm", 255)):
        Image.fromarray(np.full((6, 5, 3), value, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def compression(*sources: Path, model: Path, out: Path) -> list[str | Path]:
    """The command that compresses ``sources`` into the archive ``out``."""
    return ["compress", *sources, "--model", model, "-o", out]


def decompression(archive: Path, model: Path, out: Path) -> list[str | Path]:
    """The command that restores the files of an archive into the folder ``out``."""
    return ["decompress", archive, "--model", model, "-o", out]


def test_a_folder_of_images_is_restored_exactly(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, archive, back = photos(tmp_path / "photos"), tmp_path / "photos.ndm", tmp_path / "back"
    run_command(*compression(source, model=model, out=archive), "--steps 2 --batch-size 2")
    out = capsys.readouterr().out
    assert "verified" in out
    assert "initial bits" in out
    run_command("inspect", archive)
    text = capsys.readouterr().out
    assert "5 images of 3 x 6 x 5, 256 values" in text
    assert f"{archive.stat().st_size:,} bytes" in text
    run_command(*decompression(archive, model, back), "--batch_size 1")
    expected = {
        "a.bmp": "a.bmp.png",
        "b.png": "b.png",
        "black.png": "black.png",
        "sub/c.png": "sub/c.png",
        "white.ppm": "white.ppm.png",
    }
    files = [path for path in back.rglob("*") if path.is_file()]
    assert {path.relative_to(back).as_posix() for path in files} == set(expected.values())
    names = [item.name for item in read_archive(archive).items]
    assert names == [expected[name] for name in sorted(expected)]
    for before, after in expected.items():
        original, restored = Image.open(source / before), Image.open(back / after)
        np.testing.assert_array_equal(np.asarray(restored), np.asarray(original))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_photographs_are_compressed_upright(tmp_path: Path) -> None:
    """Restored images have no EXIF orientation."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(tmp_path / "x.png", exif=exif)
    (item,) = read_items([str(tmp_path)], (3, 6, 5), 256, 0)
    np.testing.assert_array_equal(item.values, pixels.transpose(2, 0, 1).reshape(1, -1))


def test_arrays_keep_dtype_shape_names_and_offset(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", (4,), 16, low=-3.0)
    generator = np.random.default_rng(0)
    np.save(tmp_path / "one.npy", generator.integers(-3, 13, 4).astype(np.int8))
    np.save(
        tmp_path / "many.npy", generator.integers(-3, 13, (7, 4)).astype(">i8").astype(np.int64)
    )
    first = generator.integers(-3, 13, (2, 4))
    second = np.asfortranarray(generator.integers(0, 5, (3, 4)).astype(np.uint8))
    np.savez(tmp_path / "two.npz", first=first, second=second)
    files = [tmp_path / name for name in ("many.npy", "one.npy", "two.npz")]
    run_command("compress", *files, "--model", model, "--out", tmp_path / "x.ndm")
    run_command("decompress", tmp_path / "x.ndm", "--model", model, "--out", tmp_path / "back")
    for name in ("many.npy", "one.npy"):
        before, after = np.load(tmp_path / name), np.load(tmp_path / "back" / name)
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        np.testing.assert_array_equal(before, after)
    before, after = np.load(tmp_path / "two.npz"), np.load(tmp_path / "back" / "two.npz")
    assert before.files == after.files == ["first", "second"]
    for key in before.files:
        assert before[key].dtype == after[key].dtype
        np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.parametrize(("num_values", "values"), [(2, [0, 1]), (16, list(range(16)))])
def test_arrays_of_gray_images_with_few_levels_are_restored_exactly(
    num_values: int, values: list[int], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", (1, 4, 4), num_values)
    levels = np.random.default_rng(0).choice(values, (9, 4, 4))
    array = levels.astype(bool if num_values == 2 else np.uint8)
    file, archive = tmp_path / "x.npy", tmp_path / "x.ndm"
    np.save(file, array)
    run_command(*compression(file, model=model, out=archive), "--steps 3")
    run_command(*decompression(archive, model, tmp_path / "back"))
    found = np.load(tmp_path / "back/x.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_unsuitable_files_are_rejected_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "x.ndm"
    images = {
        "b.png": np.zeros((6, 5, 3), dtype=np.uint8),
        "alpha.png": np.zeros((6, 5, 4), dtype=np.uint8),
        "deep.png": np.zeros((6, 5), dtype=np.uint16),
    }
    for name, pixels in images.items():
        Image.fromarray(pixels).save(tmp_path / name)
    np.save(tmp_path / "float.npy", np.zeros((2, *SHAPE)))
    np.save(tmp_path / "high.npy", np.full((2, *SHAPE), 256))
    np.save(tmp_path / "shape.npy", np.zeros((2, 5), dtype=np.uint8))
    np.save(tmp_path / "object.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    (tmp_path / "broken.png").write_bytes(b"\\x89PNG nothing")
    (tmp_path / "empty").mkdir()
    culprits = {
        "alpha.png": "RGBA",
        "deep.png": "I;16",
        "float.npy": "float64",
        "high.npy": "256",
        "shape.npy": "(2, 5)",
    }
    culprits |= {name: name for name in ("object.npy", "broken.png", "missing.png", "empty")}
    for name, culprit in culprits.items():
        rejected(capsys, compression(tmp_path / name, model=model, out=out), culprit)
    image = tmp_path / "b.png"
    rejected(capsys, compression(image, source, model=model, out=out), "b.png", "twice")
    rejected(capsys, compression(image, model=model, out=image), "b.png is itself an input")
    rejected(capsys, compression(image, model=tmp_path / "nowhere", out=out), "nowhere")
    rejected(capsys, ["compress", image, "--model", model], "out")
    rejected(capsys, compression(model=model, out=out))
    for option in ("steps", "batch_size", "rows"):
        rejected(capsys, [*compression(image, model=model, out=out), f"--{option} 0"], option)
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_file_names_are_checked_before_compression(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / '2024-01-01 12:00:00 "x".npy', tmp_path / "c:x.npy"
    for path in (good, bad):
        np.save(path, np.zeros((2, *SHAPE), dtype=np.uint8))
    run_command(*compression(good, model=model, out=tmp_path / "x.ndm"), "--steps 2")
    run_command(*decompression(tmp_path / "x.ndm", model, tmp_path / "back"))
    assert (tmp_path / "back" / good.name).exists()
    out, broken = tmp_path / "y.ndm", tmp_path / "broken.npz"
    rejected(capsys, compression(bad, model=model, out=out), "c:x.npy", "rename")
    broken.write_bytes(b"PK\x03\x04 nothing")
    rejected(capsys, compression(broken, model=model, out=out), "broken.npz")
    rejected(capsys, compression(good, model=model, out=tmp_path), "is a folder")
    assert not out.exists()


def test_a_model_of_continuous_data_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = NDM(
        LinearLogSNRSchedule(-5.0, 4.0), Identity(), Predictor(MLP(2, 8, 1)), GaussianDecoder()
    )
    model.save_pretrained(tmp_path / "model", description((2,), None, None))
    np.save(tmp_path / "x.npy", np.zeros((2, 2), dtype=np.uint8))
    folder, out = tmp_path / "model", tmp_path / "x.ndm"
    rejected(capsys, compression(tmp_path / "x.npy", model=folder, out=out), "continuous")


@pytest.fixture(scope="module")
def archive(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    source, out = photos(folder / "photos"), folder / "x.ndm"
    run_command(*compression(source, model=model, out=out), "--steps 2")
    return out


def test_other_models_damaged_archives_and_later_versions_are_rejected(
    archive: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, back = archive.read_bytes(), tmp_path / "back"
    other = save_model(tmp_path / "other", seed=1)
    rejected(capsys, decompression(archive, other, back), "another model")
    damaged = {
        "cut.ndm": data[:-7],
        "flipped.ndm": data[:300] + bytes([data[300] ^ 4]) + data[301:],
        "empty.ndm": b"",
        "text.ndm": b"hello" * 100,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        command = decompression(tmp_path / name, model, back)
        rejected(capsys, command, name, "truncated, damaged")
        rejected(capsys, ["inspect", tmp_path / name], name)
    other, missing = tmp_path / "other.ndm", tmp_path / "missing.ndm"
    for version in (1, 3):
        other.write_bytes(data[:8] + version.to_bytes(4, "little") + data[12:])
        rejected(capsys, decompression(other, model, back), f"has version {version}", "version 2")
    rejected(capsys, decompression(missing, model, back), "missing.ndm")
    assert not back.exists()


def test_existing_files_are_not_overwritten(
    archive: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("the archive is decoded")

    back = tmp_path / "back"
    back.mkdir()
    (back / "b.png").write_text("mine")
    with monkeypatch.context() as patch:  # decoding can take hours
        patch.setattr("ndm.cli.compress.decode", fail)
        rejected(capsys, decompression(archive, model, back), "b.png", "exists already")
    assert [path.name for path in back.rglob("*")] == ["b.png"]
    rejected(capsys, decompression(archive, model, back / "b.png"), "is a file")


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", "a//b.png", "C:\\\\x.png", "x\\n.png", ""]
)
def test_names_outside_the_folder_are_rejected_as_damage(name: str) -> None:
    with pytest.raises(ValueError, match="outside"):
        Item.from_dict({"name": name, "kind": "image", "count": 1, "mode": "L"})


def test_a_failed_write_leaves_no_files(tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "back/sub").write_text("a file where a folder is needed")
    items = [Item("a.npy", "npy", 1, "uint8", (4,)), Item("sub/b.npy", "npy", 1, "uint8", (4,))]
    with pytest.raises(UserError, match="cannot write"):
        write_items(items, np.zeros((2, 4), dtype=np.uint16), (4,), 0, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["back", "sub"]


def test_the_files_of_a_folder_are_sorted_by_name(tmp_path: Path) -> None:
    items = read_items([str(photos(tmp_path / "photos"))], SHAPE, 256, 0)
    names = ["a.bmp.png", "b.png", "black.png", "sub/c.png", "white.ppm.png"]
    assert [item.name for item in items] == names
    assert json.dumps([item.to_dict() for item in items])
