"""Archives from strangers, and restorations that are killed."""

import hashlib
import json
import os
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.commands import rejected, run_command
from ndm.apps.compress import restore
from ndm.apps.compress.archive import _START, Archive, levels_checksum, pack, read_archive
from ndm.apps.compress.chain import Plan
from ndm.apps.compress.coder import Coded
from ndm.apps.compress.items import Item
from ndm.apps.compress.restore import check_places, complete_move, write_items
from ndm.errors import UserError

SHAPE = (3, 2, 2)


def archive(images: int = 4) -> bytes:
    """An archive that can be read but not decoded."""
    items = tuple(Item(f"{n}.png", "image", 1, mode="RGB") for n in range(images))
    index = np.zeros((images, 12), dtype=np.int64)
    plan = Plan((0.0, 1.0), 1, 0.5, (1.0, 1.0), (1.0,), (1.0,), 1.0, 1.0)
    coded = Coded(np.zeros(8, dtype=np.uint32), 4, 0, np.zeros((0, 2), dtype=np.int64))
    return pack(Archive("0" * 64, SHAPE, 256, 0, plan, items, levels_checksum(index), coded))


def forge(data: bytes, change: Callable[[dict[str, Any]], object] | bytes) -> bytes:
    """Replace or change the header of an archive, with correct sizes and checksums."""
    size = _START.unpack_from(data)[2]
    end = _START.size + size
    if isinstance(change, bytes):
        text = change
    else:
        header = json.loads(zlib.decompress(data[_START.size : end]))
        change(header)
        text = json.dumps(header).encode()
    text = zlib.compress(text, 9)
    body = data[:12] + len(text).to_bytes(4, "little") + data[16 : _START.size] + text
    body += data[end:-32]
    return body + hashlib.sha256(body).digest()


def item(**values: object) -> Callable[[dict[str, Any]], object]:
    """Change the first item."""
    return lambda header: header["items"][0].update(values)


DEEP = b"[" * 100_000 + b"]" * 100_000
HEADERS: dict[str, Callable[[dict[str, Any]], object] | bytes] = {
    "lists": b'{"items": [' + b"[]," * 20_000_000 + b"[]]}",
    "lists as text": b'{"items": ["' + b"[]," * 2_000_000 + b'"]}',
    "numbers": b'{"items": [' + b"1," * 20_000_000 + b"1]}",
    "spaces": b"[" + b" " * 2**27 + b"]",
    "deep": DEEP,
    "no object": b"[]",
    "digits": b'{"event_shape": [' + b"9" * 100_000 + b"]}",
    "axes": item(kind="npy", mode="", shape=[1] * 1_000_000),
    "nine axes": item(kind="npy", mode="", shape=[1] * 6 + [3, 2, 2]),
    "event axes": lambda header: header.update(event_shape=[1] * 1_000_000),
    "surrogate": item(name="\ud800.png"),
    "surrogate in a key": item(
        name="x/\udc80", key="\udc80", kind="npz", mode="", shape=[1, 3, 2, 2]
    ),
    "control": item(name="\x1b[2J.png"),
    "twice": item(name="1.png"),
    "file as folder": item(name="1.png/x.png"),
    "folder as file": lambda header: (
        header["items"][0].update(name="a/b.png"),
        header["items"][1].update(name="a"),
    ),
    "npy and npz": lambda header: (
        header["items"][0].update(name="x.npz/k", key="k", kind="npz", mode="", shape=[1, *SHAPE]),
        header["items"][1].update(name="x.npz", kind="npy", mode="", shape=[1, *SHAPE]),
    ),
    "mode": item(mode="CMYK"),
    "too many tiles": item(shape=[3, 5, 5], count=1),
    "empty image": item(shape=[3, 0, 5]),
    "tiles of other channels": item(shape=[1, 2, 2]),
    "shape of an image": item(shape=[1]),
    "shape of an array": item(kind="npy", mode="", shape=[12]),
    "kind": item(kind="pickle"),
    "unknown": item(command="rm"),
    "fingerprint": lambda header: header.update(model="\x1b" * 64),
    "missing": lambda header: header.pop("items"),
    "items": lambda header: header.update(items={}),
    "nan": lambda header: header.update(low=float("nan")),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_forged_headers_are_rejected_in_bounded_time_and_memory(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.ndm"
    path.write_bytes(forge(archive(), HEADERS[kind]))
    rejected(capsys, ["inspect", tmp_path / "nothing"])  # imports
    start = time.perf_counter()
    tracemalloc.start()
    try:
        line = rejected(capsys, ["inspect", path], "x.ndm", "damaged")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 10 and peak < 10 * path.stat().st_size + 2**24
    assert len(line) < 300


def test_lists_are_bounded_by_the_images(tmp_path: Path) -> None:
    """As many images as there may be items do not excuse as many lists."""
    path = tmp_path / "x.ndm"
    for content in (b'{"items": [' + b"[]," * 10**6 + b"[]]}", b'{"items": [' + b"[" * 9_000):
        path.write_bytes(forge(archive(5_000), content))
        with pytest.raises(UserError, match=r"too long|lists and objects|nested"):
            read_archive(path)


def test_an_honest_header_is_read_whatever_its_names(tmp_path: Path) -> None:
    path = tmp_path / "x.ndm"
    names = ["[{,\"\\'é😀" * 20 + ".png", "\udcff.png", "日本/語.png", "x" * 251 + ".png"]

    def change(header: dict[str, Any]) -> None:
        for one, name in zip(header["items"], names, strict=True):
            one["name"] = name.replace("\\", "")

    path.write_bytes(forge(archive(), change))
    assert [one.name for one in read_archive(path).items] == [n.replace("\\", "") for n in names]
    run_command("inspect", path)


def test_inspect_escapes_what_a_terminal_would_obey(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.ndm"
    path.write_bytes(forge(archive(), item(name="a\x9b2J\u202e\udcff.png")))
    run_command("inspect", path)
    assert r"a\x9b2J\u202e\udcff.png" in capsys.readouterr().out


def test_a_pipe_is_not_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.ndm")
    rejected(capsys, ["inspect", tmp_path / "x.ndm"], "pipe")
    rejected(capsys, ["inspect", tmp_path / ("x" * 256)], "name too long")


@pytest.mark.parametrize(("dtype", "high"), [("bool", 16), ("int8", 200), ("uint8", 300)])
def test_a_dtype_that_does_not_hold_the_values_is_damage(
    dtype: str, high: int, tmp_path: Path
) -> None:
    items = [Item("a.npy", "npy", 2, "uint16", (2, 3)), Item("b.npy", "npy", 1, dtype, (1, 3))]
    index = np.array([[0, 1, high]] * 3)
    with pytest.raises(ValueError, match=f"do not fit {dtype}"):
        write_items(items, index, (3,), 0, tmp_path / "back")
    assert not list(tmp_path.iterdir())
    index[:, 2] = 1
    write_items(items, index, (3,), 0, tmp_path / "back")
    np.testing.assert_array_equal(np.load(tmp_path / "back/b.npy"), index[:1])


class Killed(BaseException):
    """Ends a process where it is."""


ITEMS = [Item(f"{n % 3}/{n}.npy", "npy", 1, "uint8", (1, 3)) for n in range(12)]
INDEX = np.arange(36, dtype=np.uint8).reshape(12, 3)


def visible(folder: Path) -> list[str]:
    """The files that a user sees."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


@pytest.mark.parametrize("state", ["missing", "empty", "link", "full"])
def test_a_killed_restoration_is_all_or_nothing_or_completed_by_a_rerun(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = sorted(one.place for one in ITEMS)
    for moment in range(40):
        work = tmp_path / str(moment)
        work.mkdir()
        folder, others = work / "back", ["mine.txt"] if state == "full" else []
        if state in ("empty", "full"):
            folder.mkdir()
        if state == "link":
            (work / "real").mkdir()
            folder.symlink_to("real")
        for name in others:
            (folder / name).write_text("mine")
        calls = 0

        def count(function: Callable[..., Any], moment: int = moment) -> Callable[..., Any]:
            def counted(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > moment:
                    raise Killed
                return function(*arguments, **options)

            return counted

        killed = True
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", count(Path.replace))
            patch.setattr(Path, "rename", count(Path.rename))
            patch.setattr(Path, "chmod", count(Path.chmod))
            patch.setattr(np, "save", count(np.save))
            patch.setattr(restore.shutil, "rmtree", count(lambda *_, **__: None))
            try:
                write_items(ITEMS, INDEX, (3,), 0, folder, "a1")
                killed = False
            except Killed:
                pass
        found = visible(folder) if folder.exists() else []
        if state != "full":
            assert found in (others, complete)
        if found != complete and not complete_move(ITEMS, folder, "a1"):
            check_places(ITEMS, folder)
            write_items(ITEMS, INDEX, (3,), 0, folder, "a1")
        assert visible(folder) == sorted([*complete, *others])
        for one, row in zip(ITEMS, INDEX, strict=True):
            np.testing.assert_array_equal(np.load(folder / one.place), row[None])
        if not killed:
            break
    else:
        pytest.fail("the moments were not enough")


def test_a_new_folder_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    write_items(ITEMS, INDEX, (3,), 0, tmp_path / "a/back")
    assert (tmp_path / "a/back").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["back"]


def test_a_rerun_does_not_overwrite_what_came_in_between(tmp_path: Path) -> None:
    folder = tmp_path / "back"
    pending = folder / ".ndm-restoring-a1"
    (pending / "1").mkdir(parents=True)
    (pending / "1/x.npy").write_text("restored")
    (folder / "1").mkdir()
    (folder / "1/x.npy").write_text("mine")
    items = [Item("1/x.npy", "npy", 1, "uint8", (1, 3))]
    with pytest.raises(UserError, match="exists already"):
        complete_move(items, folder, "a1")
    assert (folder / "1/x.npy").read_text() == "mine"
    assert not complete_move(items, folder, "b2")
