"""Small synthetic data sets in the real formats: random discs on color gradients."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ndm.viz import write_images


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """Draw discs of one color on gradients between two others, uint8 ``(count, 3, side, side)``."""
    generator = np.random.default_rng(seed)
    place = (np.arange(side) + 0.5) / side
    angle = generator.uniform(0, 2 * np.pi, (count, 1, 1))
    along = np.cos(angle) * place[:, None] + np.sin(angle) * place
    along = (along - along.min((1, 2), keepdims=True)) / np.ptp(along, axis=(1, 2), keepdims=True)
    start, end, color = generator.uniform(0, 255, (3, count, 3, 1, 1))
    middle = generator.uniform(0.3, 0.7, (2, count, 1, 1))
    radius = generator.uniform(0.1, 0.3, (count, 1, 1))
    disc = (place[:, None] - middle[0]) ** 2 + (place - middle[1]) ** 2 < radius**2
    images = np.where(disc[:, None], color, start + (end - start) * along[:, None])
    return np.clip(images + generator.normal(0, 4, images.shape), 0, 255).round().astype(np.uint8)


def write_cifar(folder: Path, seed: int) -> None:
    """Write the six files of CIFAR-10's binary version, with ten images each."""
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"]
    labels = np.arange(10, dtype=np.uint8)[:, None]
    for number, name in enumerate(names):
        images = pictures(10, 32, seed + number).reshape(10, -1)
        np.concatenate([labels, images], axis=1).tofile(folder / name)


def write_imagenet(folder: Path, side: int, seed: int) -> None:
    """Write the two archives of van den Oord's release of small ImageNet."""
    folder.mkdir(parents=True)
    for name, count in ((f"train_{side}x{side}", 32), (f"valid_{side}x{side}", 8)):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for index, image in enumerate(pictures(count, side, seed + count)):
                data = _png(image)
                member = tarfile.TarInfo(f"{name}/{index + 1:07d}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_faces(folder: Path, side: int, seed: int) -> None:
    """Write a folder of forty images, the layout of CelebA-HQ."""
    write_images(folder, pictures(40, side, seed))


def write_photos(folder: Path, seed: int) -> None:
    """Write subfolders ``train`` and ``test`` with four and six images of 72 x 72 pixels."""
    for index, (split, count) in enumerate((("train", 4), ("test", 6))):
        write_images(folder / split, pictures(count, 72, seed + index))


def write_mnist(folder: Path, seed: int) -> None:
    """Write the four files of MNIST, with gray squares on black of 10 x 10 pixels.

    There are 40 train and 20 test images.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for split, count in (("train", 40), ("t10k", 20)):
        images = np.zeros((count, 10, 10), dtype=np.uint8)
        for image in images:
            top, left = generator.integers(1, 5, 2)
            image[top : top + 4, left : left + 4] = generator.integers(128, 256)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
            content = gzip.compress(header + array.tobytes(), mtime=0)
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(content)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
