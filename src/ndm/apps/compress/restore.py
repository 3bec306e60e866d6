"""Write the files of an archive, all or none of them, even if the process is killed.

All files are written into a hidden folder first. A new or empty output folder is that folder,
renamed. Into a folder with other files they are moved one by one; if that is interrupted, the
hidden folder stays in it, and the same command completes the move.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ndm.apps.compress.items import Item, check_lengths
from ndm.apps.compress.tiles import join
from ndm.data.images import CHANNELS
from ndm.errors import UserError, describe_value
from ndm.writing import allowed_mode, delete_abandoned, lock


def check_places(items: Sequence[Item], folder: Path) -> list[str]:
    """Return the output files of items, below a folder, and check that none exists.

    Raises:
        UserError: one exists already, or has a name that is too long.
    """
    places = list(dict.fromkeys(item.place for item in items))
    for item in items:
        check_lengths(item)
    for place in places:
        if os.path.lexists(folder / place):
            raise UserError(f"{folder / place} exists already; choose another folder")
    return places


def write_items(
    items: Sequence[Item],
    index: np.ndarray,
    event_shape: tuple[int, ...],
    low: int,
    folder: Path,
    identity: str = "archive",
) -> list[Path]:
    """Write all files into a folder, or none.

    Args:
        items: descriptions in the order of the images.
        index: levels of all images, ``(N, D)``.
        event_shape: shape of one image.
        low: least value of a pixel.
        folder: the output folder, created if missing.
        identity: name of the archive for :func:`complete_move`, fit for a file name.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file exists already, or cannot be written.
        ValueError: the descriptions do not fit the images.
    """
    places = check_places(items, folder)
    target = Path(os.path.realpath(folder))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _is_replaceable(target):
            with _hidden_folder(target.parent, f".{target.name[:32]}-") as temporary:
                _write_files(items, index, event_shape, low, temporary)
                if _replace(temporary, target):
                    return [folder / place for place in places]
        with _hidden_folder(target, ".ndm-") as temporary:
            _write_files(items, index, event_shape, low, temporary)
            check_places(items, folder)
            # From here on the files are complete: a rerun moves what remains.
            pending = _pending(target, identity)
            if pending.exists():  # of an archive with the same identity, not moved yet
                shutil.rmtree(pending)
            temporary.rename(pending)
        _move(pending, target, undo=True)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    return [folder / place for place in places]


def complete_move(items: Sequence[Item], folder: Path, identity: str) -> bool:
    """Complete the move of a process that was killed, and return whether there was one.

    Args:
        items: the items of the archive.
        folder: the output folder.
        identity: that of :func:`write_items`.

    Raises:
        UserError: a file that remains to be moved exists already, or cannot be moved.
    """
    target = Path(os.path.realpath(folder))
    pending = _pending(target, identity)
    if not pending.is_dir() or pending.is_symlink():
        return False
    places = {item.place for item in items}
    found = {file.relative_to(pending).as_posix() for file in pending.rglob("*") if file.is_file()}
    moved = all((target / place).is_file() for place in places - found)
    if not found <= places or not moved:
        return False
    for place in found:
        if os.path.lexists(target / place):
            raise UserError(f"{folder / place} exists already; choose another folder")
    try:
        _move(pending, target, undo=False)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    return True


def _pending(target: Path, identity: str) -> Path:
    return target / f".ndm-restoring-{identity}"


def _is_replaceable(target: Path) -> bool:
    """Whether a folder is missing, or empty and neither in use as working folder nor a disk."""
    if not os.path.lexists(target):
        return True
    return (
        target.is_dir()
        and not target.is_mount()
        and target != Path(os.path.realpath(Path.cwd()))
        and not any(target.iterdir())
    )


@contextlib.contextmanager
def _hidden_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a locked folder, deleted at the end; delete those that killed processes left."""
    delete_abandoned(parent, prefix)
    parent.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    handle = None
    try:
        with contextlib.suppress(OSError):  # Windows cannot open folders
            handle = os.open(path, os.O_RDONLY)
            lock(handle)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _replace(source: Path, target: Path) -> bool:
    """Rename a folder to a missing or empty one; return whether the file system allows it."""
    source.chmod(target.stat().st_mode & 0o7777 if target.exists() else allowed_mode(0o777))
    try:
        source.rename(target)
    except OSError:
        return False
    return True


def _move(source: Path, target: Path, undo: bool) -> None:
    """Move all files of one folder into another and delete it.

    Args:
        source: the folder to empty.
        target: the other.
        undo: delete everything that was moved if one fails.
    """
    moved: list[Path] = []
    try:
        for file in sorted(source.rglob("*")):
            if not file.is_file():
                continue
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
            moved.append(place)
    except OSError:
        if undo:
            for path in moved:
                path.unlink(missing_ok=True)
            shutil.rmtree(source, ignore_errors=True)
        raise
    shutil.rmtree(source, ignore_errors=True)


def _write_files(
    items: Sequence[Item], index: np.ndarray, event_shape: tuple[int, ...], low: int, folder: Path
) -> None:
    """Write all files into an empty folder.

    Raises:
        ValueError: two have the same place, or the values do not fit a description.
    """
    start = 0
    archives: dict[str, dict[str, np.ndarray]] = {}
    for item in items:
        rows = index[start : start + item.count]
        start += item.count
        place = folder / item.place
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():  # perhaps with other capitals
            raise ValueError(f"{describe_value(item.place)} would be written twice")
        if item.kind == "image":
            _write_image(place, rows, item.shape or event_shape, event_shape, item.mode)
            continue
        values = (rows.astype(np.int64) + low).reshape(item.shape)
        array = values.astype(item.dtype)
        if not np.array_equal(array.astype(np.int64), values):
            raise ValueError(f"the values of {describe_value(item.name)} do not fit {item.dtype}")
        if item.kind == "npy":
            _save(place, array)
        else:
            archives.setdefault(item.place, {})[item.key] = array
    for name, arrays in archives.items():
        if (folder / name).exists():
            raise ValueError(f"{describe_value(name)} would be written twice")
        with (folder / name).open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _write_image(
    path: Path,
    rows: np.ndarray,
    shape: tuple[int, ...],
    event_shape: tuple[int, ...],
    mode: str,
) -> None:
    channels = CHANNELS.get(mode, 0)
    if len(shape) != 3 or not 0 < channels <= shape[0] or rows.max(initial=0) > 255:
        raise ValueError("an image does not have the shape of its mode")
    pixels = join(rows, shape, (event_shape[1], event_shape[2])).astype(np.uint8)
    if channels < shape[0] and (pixels != pixels[:1]).any():
        raise ValueError("an image in gray has colors")
    image = Image.fromarray(pixels[0] if mode == "L" else pixels.transpose(1, 2, 0))
    image.save(path, format="PNG", optimize=True)
