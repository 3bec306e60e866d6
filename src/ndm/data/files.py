"""The files of a user's folder: hidden ones are skipped, links are followed, splits are recognized.

Shared by all sources of image files and by ``ndm compress``.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ndm.errors import UserError, describe_value

SPLIT_WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation", "dev", "eval", "evaluation"),
}
"""Split -> the words, in any case, by which the name of a folder shows that it holds the split."""


@dataclass
class Files:
    """The visible files below a folder.

    A path is hidden if any part below the folder begins with a dot. Links to folders are followed,
    but no folder is read twice, so cycles end and no file occurs under two names by way of a linked
    folder.
    """

    root: Path
    """The folder."""
    names: list[str] = field(default_factory=list)
    """Paths below the folder, with ``/`` between parts: regular files, and links to no file."""
    folders: list[str] = field(default_factory=list)
    """Visible folders, including empty ones."""
    others: int = 0
    """Number of pipes, sockets, devices and the like, which are never opened."""
    repeated: int = 0
    """Number of linked folders that are not read again."""
    places: dict[str, str] = field(default_factory=dict)
    """Real path of every folder that was read -> its path."""

    def ending_in(self, suffixes: Collection[str]) -> list[Path]:
        """Return the files whose suffix, in lower case, is one of ``suffixes``, sorted by name."""
        chosen = (name for name in self.names if Path(name).suffix.lower() in suffixes)
        return [self.root / name for name in sorted(chosen)]


def find_files(root: Path, known: Collection[str] = ()) -> Files:
    """Find the visible files below a folder.

    Args:
        root: the folder.
        known: real paths of folders to leave out.

    Raises:
        UserError: a folder cannot be read.
    """
    found = Files(root, places=dict.fromkeys(known, ""))
    links: list[str] = []
    _read_folder(found, "", links)
    # Only then the links, so that a folder is found under its own name rather than through a link.
    start = os.path.realpath(root)
    while links:
        links.sort(reverse=True)
        name = links.pop()
        place = os.path.realpath(root / name)
        is_above = start == place or start.startswith(place.rstrip("/") + "/")
        if is_above or place in found.places:
            found.repeated += 1
        else:
            found.folders.append(name)
            _read_folder(found, name, links)
    return found


def _read_folder(found: Files, name: str, links: list[str]) -> None:
    """Add the content of a folder, and the links to other folders in it to ``links``."""
    waiting = [name]
    while waiting:
        name = waiting.pop()
        folder = found.root / name if name else found.root
        place = os.path.realpath(folder)
        if place in found.places:
            found.repeated += 1
            continue
        found.places[place] = name
        try:
            with os.scandir(folder) as content:
                entries = [entry for entry in content if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(
                f"the folder {folder} cannot be read: {error.strerror or error}"
            ) from error
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if _is(Path.is_file, entry):
                found.names.append(path)
            elif _is(Path.is_dir, entry):
                if entry.is_symlink():
                    links.append(path)
                else:
                    found.folders.append(path)
                    waiting.append(path)
            elif entry.is_symlink() and not _is(Path.exists, entry):
                found.names.append(path)
            else:
                found.others += 1


def _is(check: Callable[[Path], bool], entry: os.DirEntry[str]) -> bool:
    """Return whether an entry of a folder passes a check; not if it is a link that never ends."""
    try:
        return check(Path(entry.path))
    except (OSError, RuntimeError):
        return False


def describe_ignored(files: int, folders: int = 0) -> str:
    """Count what is left out, for a description's version: ``, 2 other files ignored``."""
    counts = [(files, "other file"), (folders, "linked folder")]
    shown = [f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count > 0]
    return f", {' and '.join(shown)} ignored" if shown else ""


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; False also for paths that the system does not take."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def check_regular(path: Path) -> None:
    """Check that a path is a regular file or a link to one, or does not exist.

    Raises:
        UserError: it is a pipe, a device or the like, which may never end, or no valid path.
    """
    try:
        is_other = path.exists() and not path.is_file()
    except OSError as error:
        raise UserError(f"{_short(path)}: {error.strerror or error}; check the path") from error
    if is_other:
        raise UserError(f"{path} is not a regular file (a pipe or a device); save it as a file")


def _split_and_rest(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the split that a folder's name shows and the other words of the name, or None."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+", name)
    words = [word.lower() for word in words]
    hits = [(split, word) for word in words for split in SPLIT_WORDS if word in SPLIT_WORDS[split]]
    if len(hits) != 1:
        return None
    ((split, hit),) = hits
    return split, tuple(word for word in words if word != hit)


def split_candidates(names: Iterable[str]) -> dict[str, list[str]]:
    """Return split -> sibling folders whose names show that they hold it.

    A name is either such a word only (``Train``), or shares its other words with a sibling that
    shows another split (``seg_train`` and ``seg_test``).
    """
    shown = [(name, *found) for name in sorted(names) if (found := _split_and_rest(name))]
    by_rest: dict[tuple[str, ...], set[str]] = {}
    for _, split, rest in shown:
        by_rest.setdefault(rest, set()).add(split)
    candidates: dict[str, list[str]] = {}
    for name, split, rest in shown:
        if not rest or len(by_rest[rest]) > 1:
            candidates.setdefault(split, []).append(name)
    return {split: candidates[split] for split in SPLIT_WORDS if split in candidates}


def find_splits(folder: Path, assigned: Mapping[str, str] | None) -> dict[str, str]:
    """Return split -> subfolder of ``folder`` that holds it; empty if no subfolder is a split.

    Args:
        folder: the folder.
        assigned: the split folders if the user names them; None to recognize them by their names.

    Raises:
        UserError: an assigned folder is missing, or the names are ambiguous or incomplete.
    """
    if assigned is not None:
        for split, name in assigned.items():
            if name in ("", ".", "..") or "/" in name or not (folder / name).is_dir():
                raise UserError(
                    f"splits={describe_value(dict(assigned))}: {folder} has no subfolder"
                    f" {describe_value(name)} for the split {split}"
                )
        return dict(assigned)
    subfolders = _subfolders(folder)
    found = split_candidates(subfolders)
    if not found:
        return {}
    if all(len(names) == 1 for names in found.values()) and {"train", "test"} <= found.keys():
        return {split: names[0] for split, names in found.items()}
    names = [name for part in found.values() for name in part]
    held_out = [name for split in ("test", "validation") for name in found.get(split, [])]
    example = f"{{train: {found.get('train', ['...'])[0]}, test: {held_out[0] if held_out else ''}"
    example = f"{example.rstrip()}{'' if held_out else ' ...'}}}"
    problem = "but not both train and test"
    if {"train", "test"} <= found.keys():
        problem = "so the folder of a split is ambiguous"
    raise UserError(
        f"{_short(folder)} has the subfolders {_listed(names)}, {problem}; give splits={example},"
        " or splits={} if no subfolder is a split"
    )


def check_no_splits(folder: Path, names: Iterable[str], advice: str, top: bool = False) -> None:
    """Check that the folders of files that are pooled are not named like splits.

    Args:
        folder: the folder.
        names: paths of the files below it.
        advice: how to fix it, for the message.
        top: whether to check its direct subfolders, too.

    Raises:
        UserError: they are, for at least two different splits.
    """
    siblings: dict[str, set[str]] = {}
    for name in names:
        parts = name.split("/")[:-1]
        for depth in range(0 if top else 1, len(parts)):
            siblings.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    found: dict[str, str] = {}
    for parent, children in siblings.items():
        for split, candidates in split_candidates(children).items():
            found.setdefault(split, f"{parent}/{candidates[0]}".lstrip("/"))
    if len(found) > 1:
        raise UserError(
            f"{_short(folder)} has the folders {_listed(list(found.values())[:2])}, which are named"
            f" like splits but would be pooled; {advice}"
        )


def check_disjoint(parts: Mapping[str, Files]) -> None:
    """Check that no folder belongs to two splits by way of a link.

    Raises:
        UserError: one does.
    """
    owners: dict[str, str] = {}
    for split, files in parts.items():
        for place in files.places:
            if place in owners:
                raise UserError(
                    f"{_short(Path(place))} belongs to the splits {owners[place]} and {split} by"
                    " way of links; link it from one of them"
                )
            owners[place] = split


def _subfolders(folder: Path) -> list[str]:
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and _is(Path.is_dir, entry)
        )
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror or error}") from error


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name if len(name) <= 25 else f"...{name[-22:]}" for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(path: Path) -> str:
    """Return a path, shortened at its beginning to 80 characters."""
    text = str(path)
    return text if len(text) <= 80 else f"...{text[-77:]}"
