"""Files are written completely or not at all, to files, links, devices and pipes."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ndm.errors import UserError
from ndm.serialize import write_json
from ndm.writing import write_atomically

if sys.platform == "win32":
    pytest.skip("needs POSIX devices, pipes and locks", allow_module_level=True)


def write(path: Path, text: str = "new") -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text))


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | 0o020000, os.makedev(1, 3))
        device.write_bytes(b"x")
    except OSError:
        pytest.skip("cannot create devices")
    write(device)
    link = tmp_path / "link"
    link.symlink_to("null")
    write(link)
    assert device.is_char_device() and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "null"]


def test_a_full_device_is_reported() -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    with pytest.raises(UserError, match=r"cannot write /dev/full.*disk full"):
        write(Path("/dev/full"))
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe.json", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"a": 1})
    reader.join(10)
    assert found == ['{\n  "a": 1\n}\n'] and pipe.is_fifo()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_is_written_to_in_order(name: str, piped: bool, tmp_path: Path) -> None:
    if name == "link":
        (tmp_path / "link").symlink_to("/dev/stdout")
        name = str(tmp_path / "link")
    elif not Path(name).exists():
        pytest.skip(f"there is no {name}")
    code = (
        "from pathlib import Path; from ndm.writing import write_atomically as w\n"
        f"print('before'); w(Path({name!r}), lambda p: p.write_text('new\\n')); print('after')"
    )
    target = tmp_path / "out.txt"
    with target.open("wb") as file:
        stdout = subprocess.PIPE if piped else file
        done = subprocess.run([sys.executable, "-c", code], stdout=stdout, check=True)
    text = done.stdout if piped else target.read_bytes()
    assert text == b"before\nnew\nafter\n"


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "x.json", tmp_path / "x.json"
    second = tmp_path / "second"
    link.symlink_to("real/x.json")
    second.symlink_to("x.json")
    for text in ("created", "replaced"):
        write(second, text)
        assert link.is_symlink() and second.is_symlink() and not target.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["x.json"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UserError, match=r"cannot write .*loop"):
        write(loop)
    assert loop.is_symlink()


@pytest.mark.parametrize("name", ["x" * 256, "x" * 251 + ".json", "é" * 128, "a/" + "x" * 300])
def test_names_that_are_too_long_are_rejected_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*at most 255 bytes") as caught:
        write(tmp_path / name)
    assert len(str(caught.value)) < 300 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "x" * 250 + ".json", "é" * 127, "x." + "y" * 253])
def test_the_longest_names_are_written(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).read_text() == "new"


def test_temporary_files_of_killed_processes_are_deleted(tmp_path: Path) -> None:
    target = tmp_path / "x[1].json"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ndm.writing import write_atomically as w\n"
        "def slow(p):\n    p.write_text('half'); print('ready', flush=True); time.sleep(60)\n"
        f"w(Path({str(target)!r}), slow)"
    )
    others = [
        tmp_path / name for name in (".x[1]-notes.json", ".y-abcdefgh.json", ".x[1]-ABCDEFGH.json")
    ]
    for other in others:
        other.write_text("mine")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        write(target)
        assert len(list(tmp_path.iterdir())) == 5, "a process that runs keeps its file"
        process.kill()
    time.sleep(0.1)
    write(target)
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])
