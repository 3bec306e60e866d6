r"""CelebA-HQ (Karras et al. 2018): 30,000 faces in a folder of image files, with a split by their
order.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

Papers that report bits/dim on CelebA-HQ use 27,000 images for training and 3,000 for testing. The
copies of the data set that are passed around differ in format (TFRecords, folders of PNG or JPEG),
so no list of files is common to all. The split here is by file order: files are put in the order of
the numbers in their names, the last 3,000 are the test split.
"""

import re
from pathlib import Path

from ndm.data.folder import FileImages, image_files
from ndm.data.images import check_image_arguments, encoded, size_words
from ndm.data.release import check_content, check_sha256_argument, release_words
from ndm.data.source import DataSource, Loaded
from ndm.errors import UserError

COUNTS = {"train": 27_000, "test": 3_000}


class CelebAHQ(DataSource):
    """CelebA-HQ, ``(3, size, size)``, 256 values, decoded when needed.

    Args:
        path: folder of the image files, in subfolders or not.
        size: side to which images are scaled.
        partial: take another number of images than 30,000, the last tenth of them for testing,
            under the name ``celebahq64-partial``.
        sha256: the checksum that a run recorded, to refuse other content; None records it alone. It
            is of the files, not of scaled pixels.
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
        if not folder.is_dir():
            raise UserError(f"path={self.path!r} is not a directory; give the folder of the images")
        files = sorted(
            image_files(folder), key=lambda file: _natural(file.relative_to(folder).as_posix())
        )
        test = COUNTS["test"] if len(files) == sum(COUNTS.values()) else max(1, len(files) // 10)
        if len(files) < 2:
            raise UserError(
                f"{folder} has {len(files)} images; CelebA-HQ has 30,000 (partial: true takes any"
                " two or more)"
            )
        parts = {"train": files[:-test], "test": files[-test:]}
        name, words = release_words(
            f"celebahq{self.size}",
            {s: len(part) for s, part in parts.items()},
            COUNTS,
            self.partial,
            str(folder),
        )
        splits = {split: FileImages(part, 3, self.size, None) for split, part in parts.items()}
        version = f"image folder, train and test by file order{words}{size_words(self.size)}"
        return check_content(encoded(name, version, splits), self.sha256, str(folder))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A key by which 2.png comes before 10.png, whether or not the numbers are padded."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", name)
    ]
