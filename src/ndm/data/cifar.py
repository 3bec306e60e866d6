r"""CIFAR-10 from its binary version: six files of 10,000 records of 3,073 bytes.

.. math::
    x = (2k + 1)/256 - 1, \qquad k \in \{0, \dots, 255\} .

A record is one label byte, 0 to 9, then 1,024 bytes each of red, green and blue, row by row. Source
of the format: cs.toronto.edu/~kriz/cifar.html ("CIFAR-10 binary version",
``cifar-10-binary.tar.gz``). The Python version on the same page contains pickles, which can run
code; it is not read.
"""

from pathlib import Path

import numpy as np

from ndm.data.arrays import discrete
from ndm.data.release import check_content, check_sha256_argument, describe_release
from ndm.data.source import DataSource, Loaded
from ndm.data.splits import check_classes
from ndm.errors import UserError

FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
"""Split -> its files, in order."""
COUNTS = {"train": 50_000, "test": 10_000}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32
"""Bytes per example."""


class CIFAR10(DataSource):
    """CIFAR-10, ``(3, 32, 32)``, 256 values, split as in the files.

    Args:
        path: folder of the six files, ``cifar-10-batches-bin``, or its parent folder.
        partial: accept files with fewer images, under the name ``cifar10-partial``.
        sha256: checksum recorded by a run, to reject any other content; None accepts all.
    """

    def __init__(self, path: str, partial: bool = False, sha256: str | None = None):
        check_sha256_argument(sha256)
        self.path = path
        self.partial = partial
        self.sha256 = sha256

    def load(self) -> Loaded:
        folder = _folder(Path(self.path))
        records = {
            split: np.concatenate([_records(folder / name) for name in names])
            for split, names in FILES.items()
        }
        found = {split: len(part) for split, part in records.items()}
        name, addition = describe_release("cifar10", found, COUNTS, self.partial, str(folder))
        labels = {split: part[:, 0].astype(np.int64) for split, part in records.items()}
        whole = name == "cifar10"
        if whole:
            check_classes(labels, CLASSES, str(folder), "download cifar-10-binary.tar.gz again")
        arrays = {split: part[:, 1:].reshape(-1, 3, 32, 32) for split, part in records.items()}
        loaded = discrete(
            name,
            f"binary version{addition}",
            arrays,
            256,
            labels=labels,
            classes=CLASSES if whole else (),
        )
        return check_content(loaded, self.sha256, str(folder))


def _folder(path: Path) -> Path:
    """Return the folder of the files: ``path``, or the folder in it that the archive unpacks to."""
    expected = [name for names in FILES.values() for name in names]
    for folder in (path, path / "cifar-10-batches-bin"):
        present = [name for name in expected if (folder / name).is_file()]
        if len(present) == len(expected):
            return folder
        if present:
            missing = ", ".join(name for name in expected if name not in present)
            raise UserError(
                f"{folder} lacks {missing}; the binary version of CIFAR-10 has the six files"
                f" {', '.join(expected)}"
            )
    if (path / "data_batch_1").is_file() or (path / "cifar-10-batches-py").is_dir():
        raise UserError(
            f"{path} holds the Python version of CIFAR-10; its pickles can run code and are never"
            " opened; download the binary version, cifar-10-binary.tar.gz, from the same page"
        )
    raise UserError(
        f"{path} has no {expected[0]}; give the folder of the six files of CIFAR-10's binary"
        f" version: {', '.join(expected)}"
    )


def _records(file: Path) -> np.ndarray:
    """Read the records of a file, ``(N, 3073)``."""
    try:
        data = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}); download it again"
        ) from error
    if not len(data) or len(data) % RECORD:
        raise UserError(
            f"{file} is truncated or damaged: its {len(data)} bytes are not a multiple of {RECORD},"
            " the size of a record; download it again"
        )
    records = data.reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        row = int((records[:, 0] > 9).argmax())
        raise UserError(
            f"{file} is damaged: record {row} has the label {records[row, 0]}, allowed are 0 to 9;"
            " download it again"
        )
    return records
