r"""ImageNet at 32 x 32 and 64 x 64 pixels: two releases whose results are not comparable.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

===========================  ======================  ============================================
source                       train and test images   release
===========================  ======================  ============================================
:class:`ImageNetOord`        1,281,149 and 49,999    PNG files of van den Oord et al. (2016),
                                                     ``train_32x32.tar`` and ``valid_32x32.tar``;
                                                     no longer on image-net.org. VDM and most
                                                     papers that report bits/dim use it
:class:`ImageNetChrabaszcz`  1,281,167 and 50,000    arrays of Chrabaszcz et al. (2017), on
                                                     image-net.org; scaled down by another,
                                                     smoother filter, and easier by more than a
                                                     tenth of a bit/dim
===========================  ======================  ============================================

As in those papers, the validation images of ImageNet are the test split. Nothing is loaded into
memory: PNG files are read from the archive or the folder, arrays are mapped. Loading reads all
bytes once, for the checksum.
"""

import os
import re
import tarfile
from pathlib import Path
from typing import Literal

import numpy as np

from ndm.data.files import find_files
from ndm.data.images import NUM_VALUES, EncodedImages, encoded
from ndm.data.mapped import MappedSplit, StoredArray, find_array
from ndm.data.release import check_content, check_sha256_argument, describe_release
from ndm.data.source import ContentHash, DataDescription, DataSource, Loaded
from ndm.errors import UserError, describe_value, one_line, require

Resolution = Literal[32, 64]
OORD = {"train": 1_281_149, "test": 49_999}
CHRABASZCZ = {"train": 1_281_167, "test": 50_000}


class TarImages(EncodedImages):
    """The PNG files of a tar archive, read in place.

    Args:
        file: the uncompressed archive.
    """

    def __init__(self, file: Path):
        super().__init__(3, None, None)
        self.file = file
        members: list[tuple[bytes, int, int]] = []
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.isfile() and _is_png(member.name):
                        members.append((os.fsencode(member.name), member.offset_data, member.size))
                    # A million entries would take a gigabyte.
                    archive.members.clear()  # type: ignore[attr-defined]
        except (tarfile.TarError, OSError, EOFError) as error:
            reason = one_line(error)
            raise UserError(
                f"{file} is truncated, damaged or not a plain tar archive ({reason}); download it"
                " again, or unpack it"
            ) from error
        # tarfile reads an archive that is cut inside a header as a shorter archive.
        if not _is_complete(file):
            raise UserError(
                f"{file} is truncated: its end-of-archive marker is missing; download it again"
            )
        members.sort()
        self._names = np.array([name for name, _, _ in members], dtype=np.bytes_)
        self._places = np.array([place for _, *place in members], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        return f"{self.file}: {os.fsdecode(self._names[index])}"

    def read(self, index: int) -> bytes:
        start, size = (int(value) for value in self._places[index])
        with self.file.open("rb") as stream:
            stream.seek(start)
            return stream.read(size)


class PngFolder(EncodedImages):
    """The PNG files under a folder, sorted by name.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path):
        super().__init__(3, None, None)
        self.folder = folder
        found = [os.fsencode(name) for name in find_files(folder).names if _is_png(name)]
        # A million names take less memory than a million paths.
        self._names = np.array(sorted(found), dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._names)

    def where(self, index: int) -> str:
        return str(self.folder / os.fsdecode(self._names[index]))

    def read(self, index: int) -> bytes:
        return Path(self.where(index)).read_bytes()


class ImageNetOord(DataSource):
    """ImageNet scaled down by van den Oord et al. (2016).

    Examples are ``(3, resolution, resolution)`` with 256 values, decoded when needed.

    Args:
        path: folder of ``train_32x32.tar`` and ``valid_32x32.tar`` (or 64), or of the folders that
            they unpack to.
        resolution: 32 or 64.
        partial: accept fewer images, under the name ``imagenet32-oord-partial``.
        sha256: checksum recorded by a run, to reject any other content; None accepts all. It is the
            same for archives and folders.
    """

    def __init__(
        self,
        path: str,
        resolution: Resolution = 32,
        partial: bool = False,
        sha256: str | None = None,
    ):
        _check(resolution, sha256)
        self.path = path
        self.resolution = resolution
        self.partial = partial
        self.sha256 = sha256

    def load(self) -> Loaded:
        require("PIL", "pillow", "data")
        folder, side = Path(self.path), f"{self.resolution}x{self.resolution}"
        names = {"train": f"train_{side}", "test": f"valid_{side}"}
        splits: dict[str, EncodedImages] = {}
        for split, name in names.items():
            if (folder / f"{name}.tar").is_file():
                splits[split] = TarImages(folder / f"{name}.tar")
            elif (folder / name).is_dir():
                splits[split] = PngFolder(folder / name)
            else:
                other = f"ndm.data.ImageNetChrabaszcz --data.resolution {self.resolution}"
                raise UserError(
                    f"{folder} has no {name}.tar and no folder {name}; give the folder of"
                    f" {' and '.join(names.values())} of van den Oord et al. 2016"
                    + _other_release(folder, "train_data_batch_1*", other)
                )
        found = {split: len(images) for split, images in splits.items()}
        name, addition = describe_release(
            f"imagenet{self.resolution}-oord", found, OORD, self.partial, str(folder)
        )
        for split, images in splits.items():
            if not len(images):
                raise UserError(f"{folder}: {names[split]} has no PNG files")
            height, width = images.size_of(0)
            if (height, width) != (self.resolution, self.resolution):
                raise UserError(
                    f"{images.where(0)} is {width} x {height}; resolution={self.resolution}"
                    f" requires images of {side}"
                )
        loaded = encoded(name, f"PNG files of van den Oord et al. 2016{addition}", splits)
        return check_content(loaded, self.sha256, str(folder))


class ImageNetChrabaszcz(DataSource):
    """ImageNet scaled down by Chrabaszcz et al. (2017).

    Examples are ``(3, resolution, resolution)`` with 256 values, mapped into memory.

    The files are those of the unpacked ``npz`` downloads: ``train_data_batch_1.npz`` to
    ``..._10.npz`` and ``val_data.npz``, each with an array ``data`` ``(N, 3 resolution²)``, red,
    then green, then blue. Labels are not read. The other downloads contain pickles, which can run
    code; they are not read.

    Args:
        path: folder of the files, or of subfolders with them.
        resolution: 32 or 64.
        partial: accept fewer images, under the name ``imagenet32-chrabaszcz-partial``.
        sha256: checksum recorded by a run, to reject any other content; None accepts all. It does
            not depend on how the arrays are packed.
        cache: folder for the expanded copies of compressed arrays, written once; by default
            ``expanded`` inside ``path``.
    """

    def __init__(
        self,
        path: str,
        resolution: Resolution = 32,
        partial: bool = False,
        sha256: str | None = None,
        cache: str | None = None,
    ):
        _check(resolution, sha256)
        self.path = path
        self.resolution = resolution
        self.partial = partial
        self.sha256 = sha256
        self.cache = cache

    def load(self) -> Loaded:
        folder = Path(self.path)
        event = (3, self.resolution, self.resolution)
        splits = {
            split: MappedSplit(self._arrays(folder, files), event)
            for split, files in self._files(folder).items()
        }
        found = {split: len(images) for split, images in splits.items()}
        name, addition = describe_release(
            f"imagenet{self.resolution}-chrabaszcz", found, CHRABASZCZ, self.partial, str(folder)
        )
        content = ContentHash()
        for split, images in splits.items():
            content.split(split)
            images.add_to(content, f"{name}, {split}")
        version = f"arrays of Chrabaszcz et al. 2017{addition}"
        description = DataDescription(
            name,
            version,
            "image",
            event,
            NUM_VALUES,
            0.0,
            NUM_VALUES - 1.0,
            found,
            content.hexdigest(),
        )
        return check_content(Loaded(description, dict(splits)), self.sha256, str(folder))

    def _files(self, folder: Path) -> dict[str, list[Path]]:
        """Return the files of each split, in order."""
        places = [folder, *sorted(place for place in folder.glob("*") if place.is_dir())]
        train = {
            int(match[1]): file
            for place in places
            for file in place.glob("*.npz")
            if (match := _BATCH.fullmatch(file.name)) and file.is_file()
        }
        test = [file for place in places for file in place.glob("val_data.npz") if file.is_file()]
        if train and test and sorted(train) == list(range(1, len(train) + 1)):
            return {"train": [train[number] for number in sorted(train)], "test": test[:1]}
        pickles = ("train_data_batch_1", "val_data")
        if not (train and test) and any(
            (place / name).exists() for place in places for name in pickles
        ):
            raise UserError(
                f"{folder} holds pickled batches, which can run code and are never opened; use the"
                " npz download from image-net.org (Imagenet32_train_npz.zip), or convert each batch"
                " where that is safe: numpy.savez('train_data_batch_1.npz', data=batch['data'])"
            )
        have = ", ".join(file.name for file in [*(train[n] for n in sorted(train)), *test])
        raise UserError(
            f"{folder} needs train_data_batch_1.npz to train_data_batch_10.npz, without gaps, and"
            f" val_data.npz; it has {have or 'none of them'}"
            + _other_release(
                folder, "train_*x*", f"ndm.data.ImageNetOord --data.resolution {self.resolution}"
            )
        )

    def _arrays(self, folder: Path, files: list[Path]) -> list[StoredArray]:
        cache = Path(self.cache) if self.cache else folder / "expanded"
        arrays = [find_array(file, "data", cache) for file in files]
        values = 3 * self.resolution**2
        for file, array in zip(files, arrays, strict=True):
            if len(array.shape) != 2 or array.shape[1] != values or not array.shape[0]:
                shape = " x ".join(str(size) for size in array.shape)
                raise UserError(
                    f"{file}: data is {shape}; resolution={self.resolution} requires N x {values}"
                    " (3 x resolution²)"
                )
        return arrays


_BATCH = re.compile(r"train_data_batch_(\d+)\.npz")


def _check(resolution: object, sha256: str | None) -> None:
    if resolution not in (32, 64):
        raise UserError(f"resolution={describe_value(resolution)}: the releases have 32 and 64")
    check_sha256_argument(sha256)


def _is_png(name: str) -> bool:
    """Return whether a path ends in .png and has no hidden part."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return name.lower().endswith(".png") and not any(part.startswith(".") for part in parts)


def _is_complete(file: Path) -> bool:
    """Return whether a tar archive ends in the required 1,024 zeros."""
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - 1024))
        return not any(stream.read())


def _other_release(folder: Path, pattern: str, source: str) -> str:
    """Return a hint for the message if the folder seems to hold the other release."""
    if not folder.is_dir() or not any((*folder.glob(pattern), *folder.glob(f"*/{pattern}"))):
        return ""
    return f". These look like the other release, which is another data set: --data {source}"
