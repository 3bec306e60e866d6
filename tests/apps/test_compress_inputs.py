"""The files that ``ndm compress`` takes: exact or rejected, before anything is decoded."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.test_compress_cli import SHAPE, compression, decompression, photos, save_model
from cli.commands import rejected, run_command
from data.test_data_files import DEEP, chunk, png
from ndm.apps.compress.items import read_items
from ndm.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("inputs") / "model")


def rejection(*paths: Path, shape: tuple[int, ...] = SHAPE) -> str:
    with pytest.raises(UserError) as error:
        read_items([str(path) for path in paths], shape, 256, 0)
    message = str(error.value)
    assert "\n" not in message and len(message) <= 300, message
    return message


@pytest.mark.parametrize("name", DEEP)
def test_images_of_16_bits_are_rejected_by_their_own_header(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(DEEP[name])
    for path in (file, tmp_path):
        for shape in (SHAPE, (1, 6, 5)):
            message = rejection(path, shape=shape)
            assert name in message and ("more than 8 bits" in message or "mode" in message)


def test_transparency_is_rejected(tmp_path: Path) -> None:
    colored = png(5, 6, 8, 2, chunk(b"tRNS", bytes(6)))
    gray = png(5, 6, 8, 0, chunk(b"tRNS", bytes(2)))
    for name, data, shape in (("c.png", colored, SHAPE), ("g.png", gray, (1, 6, 5))):
        (tmp_path / name).write_bytes(data)
        message = rejection(tmp_path / name, shape=shape)
        assert name in message and "transparen" in message


def test_a_tiff_with_more_channels_than_are_shown_is_rejected(tmp_path: Path) -> None:
    Image.fromarray(np.full((6, 5, 4), 9, dtype=np.uint8)).save(tmp_path / "x.tif")
    data = bytearray((tmp_path / "x.tif").read_bytes())
    extra = data.index((338).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    data[extra + 8 : extra + 10] = bytes(2)  # the meaning of the fourth channel: unspecified
    (tmp_path / "x.tif").write_bytes(bytes(data))
    assert "channels" in rejection(tmp_path / "x.tif")


def test_hidden_paths_are_skipped_and_links_followed(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    before = read_items([str(folder)], SHAPE, 256, 0)
    for hidden in (".thumbnails/x.png", "sub/.ipynb_checkpoints/c.png", "sub/._c.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"not an image")
    os.mkfifo(folder / "pipe.png")
    (folder / "sub" / "up").symlink_to(folder)
    assert read_items([str(folder)], SHAPE, 256, 0) == before
    (folder / "sub" / "up").unlink()
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "linked").symlink_to(folder / "sub")
    (item,) = read_items([str(tmp_path / "farm")], SHAPE, 256, 0)
    assert item.name == "linked/c.png"


def test_what_is_left_out_is_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = photos(tmp_path / "photos")
    run_command(*compression(folder, model=model, out=tmp_path / "x.ndm"), "--steps 2")
    assert "1 other file ignored" in capsys.readouterr().out


def test_a_path_that_is_too_long_is_rejected(tmp_path: Path) -> None:
    assert "too long" in rejection(tmp_path / ("x" * 300))


def test_a_pipe_is_rejected(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipe.png", "pipe.npy", "pipe.npz", "pipe"):
        os.mkfifo(tmp_path / name)
        command = compression(tmp_path / name, model=model, out=tmp_path / "x.ndm")
        rejected(capsys, command, name, "not a regular file")


@pytest.mark.parametrize("bytes_of_name", [251, 252, 255])
def test_names_that_cannot_be_restored_are_rejected_before_compression(
    model: Path, tmp_path: Path, bytes_of_name: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "é" * ((bytes_of_name - 4) // 2) + "a" * ((bytes_of_name - 4) % 2) + ".jpg"
    assert len(os.fsencode(name)) == bytes_of_name
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((6, 5, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    out = tmp_path / "x.ndm"
    command = compression(tmp_path / "photos", model=model, out=out)
    if bytes_of_name > 251:
        rejected(capsys, command, "255 bytes", "rename")
        return
    run_command(*command, "--steps 2")
    run_command(*decompression(out, model, tmp_path / "back"))
    assert (tmp_path / "back" / f"{name}.png").is_file()


def test_class_folders_with_equal_file_names(model: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog", "more/cat")):
        (tmp_path / name).mkdir(parents=True)
        pixels = np.full((6, 5, 3), number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    folders = [tmp_path / name for name in ("cat", "dog", "more/cat")]
    out, back = tmp_path / "x.ndm", tmp_path / "back"
    run_command(*compression(*folders, model=model, out=out), "--steps 2")
    run_command(*decompression(out, model, back))
    for number, name in enumerate(("cat", "dog", "more/cat")):
        assert (np.asarray(Image.open(back / name / "0.png")) == number).all()
    items = read_items([f"{tmp_path}/cat", f"{tmp_path}/more/../dog/"], SHAPE, 256, 0)
    assert [item.name for item in items] == ["cat/0.png", "dog/0.png"]
    assert "twice" in rejection(tmp_path / "cat", tmp_path / "cat")


def test_folders_without_equal_names_keep_theirs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((6, 5, 3), dtype=np.uint8)).save(tmp_path / name / f"{name}.png")
    items = read_items([str(tmp_path / "a"), str(tmp_path / "b")], SHAPE, 256, 0)
    assert [item.name for item in items] == ["a.png", "b.png"]


def test_sizes_are_read_before_anything_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "huge.png").write_bytes(png(13_300, 13_400, 8, 2))
    header = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (2**28,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(header.getvalue())
        for _ in range(2**8):
            file.write(bytes(2**20))
    tracemalloc.start()
    assert "13300 x 13400" in rejection(tmp_path / "huge.png")
    assert "(268435456,)" in rejection(tmp_path / "bomb.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**8


def test_false_sizes_in_arrays_are_rejected_before_allocation(tmp_path: Path) -> None:
    shape = {"descr": "|u1", "fortran_order": False, "shape": (2**40, *SHAPE)}
    for name in ("x.npy", "x.npz"):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, shape)
        if name == "x.npy":
            (tmp_path / name).write_bytes(header.getvalue() + bytes(900))
        else:
            with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("a.npy", header.getvalue() + bytes(900))
        assert name in rejection(tmp_path / name)


HEADERS = {
    "open.npy": b"{'descr': '|u1', 'fortran_order': False, 'shape': (2,\n",
    "mixed.npy": b"{'descr': '|u1', 'fortran_order': False, 'shape': ('a', 1), }\n",
    "long.npy": b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }\n" % 10**30,
    "negative.npy": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 3, 6, 5), }\n",
    "keys.npy": b"{'descr': '|u1', 1: 2, 'shape': (1,), }\n",
    "deep.npy": b"(" * 5000 + b"\n",
    "dtype.npy": b"{'descr': ('a', 'b', 'c'), 'fortran_order': False, 'shape': (1,), }\n",
    "object.npy": b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 3, 6, 5), }\n",
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_headers_of_arrays_are_rejected(tmp_path: Path, name: str, packed: bool) -> None:
    data = b"\x93NUMPY\x01\x00" + len(HEADERS[name]).to_bytes(2, "little") + HEADERS[name]
    file = tmp_path / name
    if packed:
        file = file.with_suffix(".npz")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.npy", data + bytes(90))
    else:
        file.write_bytes(data + bytes(90))
    assert file.name in rejection(file)


def test_members_that_are_no_arrays_are_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"some text")
    assert "x.npz" in rejection(tmp_path / "x.npz")


def test_arrays_are_read_in_parts_in_any_order_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ndm.apps.compress.arrays.PART", 64)
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (7, *SHAPE))
    kinds = {
        "c": array.astype(">i2"),
        "f": np.asfortranarray(array.astype(np.uint8)),
        "one": array[0].astype(np.uint64),
    }
    np.savez_compressed(tmp_path / "x.npz", **kinds)
    np.savez(tmp_path / "y.npz", **kinds)
    for name, value in kinds.items():
        np.save(tmp_path / f"{name}.npy", value)
    for path in (tmp_path / "x.npz", tmp_path / "y.npz", *(tmp_path / f"{k}.npy" for k in kinds)):
        for item in read_items([str(path)], SHAPE, 256, 0):
            value = kinds[item.key or path.stem]
            assert (item.shape, item.dtype) == (value.shape, value.dtype.name)
            assert item.values is not None and item.values.dtype == np.uint8
            np.testing.assert_array_equal(item.values, value.reshape(-1, 90))


def test_a_cut_member_of_an_archive_is_rejected(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, *SHAPE), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", a=array)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[2000] ^= 1  # its checksum in the archive is wrong then
    (tmp_path / "x.npz").write_bytes(bytes(data))
    assert "x.npz" in rejection(tmp_path / "x.npz")


def test_all_damaged_files_are_named_together(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    for name in ("b.png", "a.bmp", "sub/c.png"):
        (folder / name).write_bytes(b"nothing")
    message = rejection(folder)
    assert "3 of 5" in message and all(name in message for name in ("b.png", "a.bmp", "sub/c.png"))


def test_names_that_are_not_utf8_are_restored_and_shown(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    name = os.fsdecode(b"\xff.png")
    Image.fromarray(np.zeros((6, 5, 3), dtype=np.uint8)).save(tmp_path / "photos" / name)
    out = tmp_path / "x.ndm"
    run_command(*compression(tmp_path / "photos", model=model, out=out), "--steps 2")
    run_command("inspect", out)
    assert "\\udcff.png" in capsys.readouterr().out
    run_command(*decompression(out, model, tmp_path / "back"))
    assert (tmp_path / "back" / name).is_file()
