"""Write files all at once: through a temporary file that is renamed when it is complete."""

import contextlib
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ndm.errors import UserError, one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl: Any = None  # type: ignore[no-redef]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for a full disk or quota, or a file that is too large."""
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that file systems allow."""
# Parts of the message of the RuntimeError that torch.save raises on a full disk.
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream error")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")


def check_name(path: Path) -> None:
    """Check that file systems can hold a path.

    Raises:
        UserError: it or one of its names is too long.
    """
    longest = max(len(os.fsencode(part)) for part in (*path.parts, ""))
    if longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH or "\0" in str(path):
        raise UserError(
            f"cannot write {shortened(path)}: the name is too long or has a character that is not"
            f" allowed; choose a name of at most {LONGEST_NAME} bytes"
        )


def check_target(path: Path) -> None:
    """Check, before anything is computed, that a file may be written at ``path``.

    Raises:
        UserError: it is a folder, or its name is too long.
    """
    check_name(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another name")


def check_option(option: str, value: str | None) -> None:
    """Check, before anything is computed, that a command may write the file of an option.

    Args:
        option: the name of the option, without dashes.
        value: its value, or None.

    Raises:
        UserError: it is a folder, or its name is too long.
    """
    if value is None:
        return
    check_name(Path(value))
    if Path(value).is_dir():
        raise UserError(f"--{option} {value} is a folder; give a file")


def shortened(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: at most 100 characters on one line."""
    text = " ".join(str(path).replace("\0", "\\0").split())
    return text if len(text) <= 100 else f"{text[:60]}...{text[-37:]}"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file next to ``path``, then rename it, so that no partial file remains.

    This also holds after a power failure. If ``path`` is a link, the file that it leads to is
    replaced. A device or a pipe, such as /dev/stdout, is written to when the content is complete.
    Temporary files that killed processes left for the same path are deleted.

    Args:
        path: the file; its folder is created if needed.
        write: writes the file at the path that it is called with.

    Raises:
        UserError: the folder cannot be created or written to, or the disk is full.
    """
    check_target(path)
    is_file = _descriptor(path) is None and (path.is_file() or not path.exists())
    target = Path(os.path.realpath(path)) if is_file and path.is_symlink() else path
    try:
        if is_file and target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if is_file:
            target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(target, target.parent if is_file else None)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that you can write to"
        ) from error
    try:
        if fcntl is None:
            os.close(handle)
        write(temporary)
        if is_file:
            _finish(temporary, target)
        else:
            _copy(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
            raise
        reason = getattr(error, "strerror", None) or one_line(error, 100)
        advice = "is the disk full?"
        if isinstance(error, OSError) and error.errno not in FULL:
            advice = "choose another name, or a folder that you can write to"
        raise UserError(f"cannot write {path}: {reason}; {advice}") from error
    finally:
        temporary.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(handle)


def _temporary(target: Path, folder: Path | None) -> tuple[int, Path]:
    """Create a locked temporary file with the suffix of the target; delete those left behind.

    Args:
        target: the file to write.
        folder: where; by default the system's folder of temporary files.
    """
    suffix = target.suffix if len(os.fsencode(target.suffix)) < 32 else ""
    prefix = f".{target.stem[:32]}-"
    if folder is not None:
        delete_abandoned(folder, prefix, suffix)
    while True:
        handle, name = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=suffix)
        lock(handle)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # Another process deleted it before it was locked.


def lock(handle: int) -> None:
    """Lock an open file or folder until it is closed, where the file system can."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)


def delete_abandoned(folder: Path, prefix: str, suffix: str = "") -> None:
    """Delete temporary files and folders that processes left when they were killed.

    Their names are the prefix, 8 characters, and the suffix. Those that a process has locked stay.
    """
    if fcntl is None:
        return
    for name in folder.glob(f"{glob.escape(prefix)}????????{glob.escape(suffix)}"):
        random = name.name[len(prefix) : len(prefix) + 8]
        if not re.fullmatch(r"[a-z0-9_]{8}", random) or name.is_symlink():
            continue
        with contextlib.suppress(OSError):
            handle = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if name.is_dir():
                    shutil.rmtree(name, ignore_errors=True)
                else:
                    name.unlink(missing_ok=True)
            finally:
                os.close(handle)


def allowed_mode(mode: int) -> int:
    """Return the permissions of a new file or folder: ``mode`` without those the user masks."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def _finish(temporary: Path, target: Path) -> None:
    """Rename a complete temporary file."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(allowed_mode(0o666))
    temporary.replace(target)


def _copy(temporary: Path, target: Path) -> None:
    """Copy a complete temporary file to a device, a pipe or an open file."""
    descriptor = _descriptor(target)
    if descriptor is None:
        sink: Any = target.open("wb")
    else:
        sys.stdout.flush()
        sink = os.fdopen(os.dup(descriptor), "wb")
    with temporary.open("rb") as source, sink:
        shutil.copyfileobj(source, sink)


def _descriptor(path: Path) -> int | None:
    """Return the number of the open file that a path such as /dev/stdout leads to, if any."""
    step = Path.cwd() / path
    for _ in range(40):
        found = _DESCRIPTOR.fullmatch(str(step))
        if found:
            return int(found[1])
        if not step.is_symlink():
            return None
        step = Path(os.path.normpath(step.parent / step.readlink()))
    return None
