"""``ndm compress``, ``decompress`` and ``inspect`` from files to files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from ndm.apps.compress.archive import read_archive
from ndm.apps.compress.items import Item, read_items, write_items
from ndm.cli.main import main
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
    fields = {
        "name": "x",
        "version": "1",
        "kind": "image",
        "splits": {"train": 1},
        "sha256": "0" * 64,
    }
    return {
        "data": {
            **fields,
            "event_shape": list(shape),
            "num_values": num_values,
            "low": low,
            "high": None,
        }
    }


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
    for index, name in enumerate(("b.png", "a.bmp", "sub/c.png", "black.png", "white.ppm")):
        pixels = (
            generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)
            if index < 3
            else np.full((6, 5, 3), 255 * (index - 3), dtype=np.uint8)
        )
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def refused(capsys: pytest.CaptureFixture[str], words: list[str], *culprits: str) -> None:
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("ndm: error: ")
    for culprit in culprits:
        assert culprit in lines[0], lines[0]


def test_a_folder_of_images_comes_back(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, archive = photos(tmp_path / "photos"), tmp_path / "photos.ndm"
    assert (
        main(
            [
                "compress",
                str(source),
                "--model",
                str(model),
                "-o",
                str(archive),
                "--steps",
                "2",
                "--batch-size",
                "2",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "verified" in out
    assert "initial bits" in out
    assert main(["inspect", str(archive)]) == 0
    text = capsys.readouterr().out
    assert "5 images of 3 x 6 x 5, 256 values" in text
    assert f"{archive.stat().st_size:,} bytes" in text
    assert (
        main(
            [
                "decompress",
                str(archive),
                "--model",
                str(model),
                "-o",
                str(tmp_path / "back"),
                "--batch_size",
                "1",
            ]
        )
        == 0
    )
    expected = {
        "a.bmp": "a.bmp.png",
        "b.png": "b.png",
        "black.png": "black.png",
        "sub/c.png": "sub/c.png",
        "white.ppm": "white.ppm.png",
    }
    found = sorted(
        path.relative_to(tmp_path / "back").as_posix()
        for path in (tmp_path / "back").rglob("*")
        if path.is_file()
    )
    assert found == sorted(expected.values())
    assert [item.name for item in read_archive(archive).items] == [
        expected[name] for name in sorted(expected)
    ]
    for before, after in expected.items():
        np.testing.assert_array_equal(
            np.asarray(Image.open(source / before)),
            np.asarray(Image.open(tmp_path / "back" / after)),
        )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_photographs_are_compressed_upright(tmp_path: Path) -> None:
    """What comes back has no EXIF data that would turn it."""
    pixels, exif = (
        np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8),
        Image.Exif(),
    )
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
    np.savez(
        tmp_path / "two.npz",
        first=generator.integers(-3, 13, (2, 4)),
        second=np.asfortranarray(generator.integers(0, 5, (3, 4)).astype(np.uint8)),
    )
    files = [str(tmp_path / name) for name in ("many.npy", "one.npy", "two.npz")]
    assert main(["compress", *files, "--model", str(model), "--out", str(tmp_path / "x.ndm")]) == 0
    assert (
        main(
            [
                "decompress",
                str(tmp_path / "x.ndm"),
                "--model",
                str(model),
                "--out",
                str(tmp_path / "back"),
            ]
        )
        == 0
    )
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
def test_gray_images_of_few_levels_as_arrays(
    num_values: int, values: list[int], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", (1, 4, 4), num_values)
    array = (
        np.random.default_rng(0)
        .choice(values, (9, 4, 4))
        .astype(bool if num_values == 2 else np.uint8)
    )
    np.save(tmp_path / "x.npy", array)
    assert (
        main(
            [
                "compress",
                str(tmp_path / "x.npy"),
                "--model",
                str(model),
                "-o",
                str(tmp_path / "x.ndm"),
                "--steps",
                "3",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "decompress",
                str(tmp_path / "x.ndm"),
                "--model",
                str(model),
                "-o",
                str(tmp_path / "back"),
            ]
        )
        == 0
    )
    found = np.load(tmp_path / "back/x.npy")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_what_does_not_fit_is_one_clear_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "x.ndm"
    rgb = np.zeros((6, 5, 3), dtype=np.uint8)
    made = {
        "wide.png": np.zeros((6, 6, 3), dtype=np.uint8),
        "gray.png": np.zeros((6, 5), dtype=np.uint8),
        "alpha.png": np.zeros((6, 5, 4), dtype=np.uint8),
        "deep.png": np.zeros((6, 5), dtype=np.uint16),
    }
    for name, pixels in made.items():
        Image.fromarray(pixels).save(tmp_path / name)
    np.save(tmp_path / "float.npy", np.zeros((2, *SHAPE)))
    np.save(tmp_path / "high.npy", np.full((2, *SHAPE), 256))
    np.save(tmp_path / "shape.npy", np.zeros((2, 5), dtype=np.uint8))
    np.save(tmp_path / "object.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    (tmp_path / "broken.png").write_bytes(b"\\x89PNG nothing")
    (tmp_path / "empty").mkdir()
    Image.fromarray(rgb).save(tmp_path / "b.png")
    cases = {
        "wide.png": "(3, 6, 6)", "gray.png": "(1, 6, 5)", "alpha.png": "RGBA", "deep.png": "I;16", "float.npy": "float64", "high.npy": "256",
        "shape.npy": "(2, 5)", "object.npy": "object.npy", "broken.png": "broken.png", "missing.png": "missing.png", "empty": "empty",
    }  # fmt: skip
    for name, culprit in cases.items():
        refused(
            capsys,
            ["compress", str(tmp_path / name), "--model", str(model), "-o", str(out)],
            culprit,
        )
    refused(
        capsys,
        ["compress", str(tmp_path / "b.png"), str(source), "--model", str(model), "-o", str(out)],
        "b.png",
        "twice",
    )
    itself = str(tmp_path / "b.png")
    refused(
        capsys,
        ["compress", itself, "--model", str(model), "-o", itself],
        "b.png is itself an input",
    )
    refused(
        capsys,
        ["compress", str(tmp_path / "b.png"), "--model", str(tmp_path / "nowhere"), "-o", str(out)],
        "nowhere",
    )
    refused(capsys, ["compress", str(tmp_path / "b.png"), "--model", str(model)], "out")
    refused(capsys, ["compress", "--model", str(model), "-o", str(out)], "")
    for option in ("--steps", "--batch_size", "--rows"):
        refused(
            capsys,
            [
                "compress",
                str(tmp_path / "b.png"),
                "--model",
                str(model),
                "-o",
                str(out),
                option,
                "0",
            ],
            option[2:],
        )
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_names_are_checked_before_and_not_after(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / '2024-01-01 12:00:00 "x".npy', tmp_path / "c:x.npy"
    for path in (good, bad):
        np.save(path, np.zeros((2, *SHAPE), dtype=np.uint8))
    words = ["--model", str(model), "--steps", "2", "-o", str(tmp_path / "x.ndm")]
    assert main(["compress", str(good), *words]) == 0
    assert (
        main(
            [
                "decompress",
                str(tmp_path / "x.ndm"),
                "--model",
                str(model),
                "-o",
                str(tmp_path / "back"),
            ]
        )
        == 0
    )
    assert (tmp_path / "back" / good.name).exists()
    refused(
        capsys,
        ["compress", str(bad), "--model", str(model), "-o", str(tmp_path / "y.ndm")],
        "c:x.npy",
        "rename",
    )
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    refused(
        capsys,
        [
            "compress",
            str(tmp_path / "broken.npz"),
            "--model",
            str(model),
            "-o",
            str(tmp_path / "y.ndm"),
        ],
        "broken.npz",
    )
    refused(
        capsys, ["compress", str(good), "--model", str(model), "-o", str(tmp_path)], "is a folder"
    )
    assert not (tmp_path / "y.ndm").exists()


def test_a_model_of_continuous_data_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = NDM(
        LinearLogSNRSchedule(-5.0, 4.0), Identity(), Predictor(MLP(2, 8, 1)), GaussianDecoder()
    )
    model.save_pretrained(tmp_path / "model", description((2,), None, None))
    np.save(tmp_path / "x.npy", np.zeros((2, 2), dtype=np.uint8))
    refused(
        capsys,
        [
            "compress",
            str(tmp_path / "x.npy"),
            "--model",
            str(tmp_path / "model"),
            "-o",
            str(tmp_path / "x.ndm"),
        ],
        "continuous",
    )


@pytest.fixture(scope="module")
def archive(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    assert (
        main(
            [
                "compress",
                str(photos(folder / "photos")),
                "--model",
                str(model),
                "-o",
                str(folder / "x.ndm"),
                "--steps",
                "2",
            ]
        )
        == 0
    )
    return folder / "x.ndm"


def test_another_model_a_damaged_file_and_a_later_version(
    archive: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, back = archive.read_bytes(), tmp_path / "back"
    other = save_model(tmp_path / "other", seed=1)
    refused(
        capsys,
        ["decompress", str(archive), "--model", str(other), "-o", str(back)],
        "another model",
    )
    damaged = {
        "cut.ndm": data[:-7],
        "flipped.ndm": data[:300] + bytes([data[300] ^ 4]) + data[301:],
        "empty.ndm": b"",
        "text.ndm": b"hello" * 100,
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        refused(
            capsys,
            ["decompress", str(tmp_path / name), "--model", str(model), "-o", str(back)],
            name,
            "truncated, damaged",
        )
        refused(capsys, ["inspect", str(tmp_path / name)], name)
    (tmp_path / "later.ndm").write_bytes(data[:8] + (2).to_bytes(4, "little") + data[12:])
    refused(
        capsys,
        ["decompress", str(tmp_path / "later.ndm"), "--model", str(model), "-o", str(back)],
        "version 2",
        "update ndm",
    )
    refused(
        capsys,
        ["decompress", str(tmp_path / "missing.ndm"), "--model", str(model), "-o", str(back)],
        "missing.ndm",
    )
    assert not back.exists()


def test_nothing_is_overwritten(
    archive: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "back/b.png").write_text("mine")
    with monkeypatch.context() as patch:  # before hours of decoding
        patch.setattr(
            "ndm.cli.compress.decode", lambda *_, **__: pytest.fail("nothing is to be decoded")
        )
        refused(
            capsys,
            ["decompress", str(archive), "--model", str(model), "-o", str(tmp_path / "back")],
            "b.png",
            "exists already",
        )
    assert [path.name for path in (tmp_path / "back").rglob("*")] == ["b.png"]
    refused(
        capsys,
        ["decompress", str(archive), "--model", str(model), "-o", str(tmp_path / "back/b.png")],
        "is a file",
    )


@pytest.mark.parametrize(
    "name", ["../x.png", "/x.png", "a/../../x.png", "a//b.png", "C:\\\\x.png", "x\\n.png", ""]
)
def test_names_that_lead_out_of_the_folder_are_damage(name: str) -> None:
    with pytest.raises(ValueError, match="outside"):
        Item.from_dict({"name": name, "kind": "image", "count": 1, "mode": "L"})


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    (tmp_path / "back/sub").write_text("a file where a folder is needed")
    items = [Item("a.npy", "npy", 1, "uint8", (4,)), Item("sub/b.npy", "npy", 1, "uint8", (4,))]
    with pytest.raises(UserError, match="cannot write"):
        write_items(items, np.zeros((2, 4), dtype=np.uint16), (4,), 0, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["back", "sub"]


def test_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    items = read_items([str(photos(tmp_path / "photos"))], SHAPE, 256, 0)
    assert [item.name for item in items] == [
        "a.bmp.png",
        "b.png",
        "black.png",
        "sub/c.png",
        "white.ppm.png",
    ]
    assert json.dumps([item.to_dict() for item in items])
