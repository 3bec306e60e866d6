r"""CelebA-HQ (Karras et al. 2018): 30,000 faces in a folder of image files, split by file order.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Papers that report bits/dim on CelebA-HQ use 27,000 images for training and 3,000 for testing. The
copies in circulation differ in format (TFRecords, folders of PNG or JPEG), so they share no list of
files. This source sorts the files by the numbers in their names; the last 3,000 are the test split.
"""

import re
from pathlib import Path

from ndm.data.files import check_no_splits, is_folder
from ndm.data.folder import FileImages, image_files
from ndm.data.images import check_image_arguments, describe_size, encoded
from ndm.data.release import check_content, check_sha256_argument, describe_release
from ndm.data.source import DataSource, Loaded
from ndm.errors import UserError, describe_value

COUNTS = {"train": 27_000, "test": 3_000}


class CelebAHQ(DataSource):
    """CelebA-HQ, ``(3, size, size)``, 256 values, decoded when needed.

    Args:
        path: folder of the image files; subfolders are included.
        size: side to which images are scaled.
        partial: accept any number of images other than 30,000, with the last tenth for testing,
            under the name ``celebahq64-partial``.
        sha256: checksum recorded by a run, to reject any other content; None accepts all. It covers
            the bytes of the files, not the scaled pixels.
    """

    def __init__(self, path: str, size: int = 64, partial: bool = False, sha256: str | None = None):
        check_image_arguments(3, size)
        check_sha256_argument(sha256)
        self.path = path
        self.size = size
        self.partial = partial
        self.sha256 = sha256

    def load(self) -> Loaded:
        folder = Path(self.path)
        if not is_folder(folder):
            raise UserError(
                f"path={describe_value(self.path)} is not a folder; give the folder of the images"
            )
        files = sorted(
            image_files(folder), key=lambda file: _natural(file.relative_to(folder).as_posix())
        )
        check_no_splits(
            folder,
            [file.relative_to(folder).as_posix() for file in files],
            "move all images into one folder, or use ImageFolder",
            top=True,
        )
        if len(files) < 2:
            raise UserError(
                f"{folder} has {len(files)} images; CelebA-HQ has 30,000 (partial: true accepts any"
                " number from two)"
            )
        test = COUNTS["test"] if len(files) == sum(COUNTS.values()) else max(1, len(files) // 10)
        parts = {"train": files[:-test], "test": files[-test:]}
        found = {split: len(part) for split, part in parts.items()}
        name, addition = describe_release(
            f"celebahq{self.size}", found, COUNTS, self.partial, str(folder)
        )
        splits = {
            split: FileImages(part, 3, self.size, None, folder) for split, part in parts.items()
        }
        version = f"image folder, train and test by file order{addition}{describe_size(self.size)}"
        return check_content(encoded(name, version, splits), self.sha256, str(folder))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts 2.png before 10.png, with or without padded numbers."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", name)
    ]
