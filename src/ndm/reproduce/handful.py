"""A handful of images in the real format of a data set, to try everything on: discs on gradients, drawn from a seed."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pictures(count: int, side: int, seed: int) -> np.ndarray:
    """A disc of one colour on a gradient between two others, uint8 ``(count, 3, side, side)``."""
    generator = np.random.default_rng(seed)
    place = (np.arange(side) + 0.5) / side
    angle = generator.uniform(0, 2 * np.pi, (count, 1, 1))
    along = np.cos(angle) * place[:, None] + np.sin(angle) * place
    along = (along - along.min((1, 2), keepdims=True)) / np.ptp(along, axis=(1, 2), keepdims=True)
    start, end, colour = generator.uniform(0, 255, (3, count, 3, 1, 1))
    middle, radius = generator.uniform(0.3, 0.7, (2, count, 1, 1)), generator.uniform(0.1, 0.3, (count, 1, 1))
    disc = (place[:, None] - middle[0]) ** 2 + (place - middle[1]) ** 2 < radius**2
    images = np.where(disc[:, None], colour, start + (end - start) * along[:, None])
    return np.clip(images + generator.normal(0, 4, images.shape), 0, 255).round().astype(np.uint8)


def write_cifar(folder: Path, seed: int) -> None:
    """Six files of CIFAR-10's binary version, ten images each."""
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{batch}.bin" for batch in range(1, 6)), "test_batch.bin"]):
        images = pictures(10, 32, seed + number).reshape(10, -1)
        np.concatenate([np.arange(10, dtype=np.uint8)[:, None], images], axis=1).tofile(folder / name)


def write_imagenet(folder: Path, side: int, seed: int) -> None:
    """The two archives of van den Oord's release."""
    folder.mkdir(parents=True)
    for name, count in ((f"train_{side}x{side}", 32), (f"valid_{side}x{side}", 8)):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for index, image in enumerate(pictures(count, side, seed + count)):
                data = _png(image)
                member = tarfile.TarInfo(f"{name}/{index + 1:07d}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_faces(folder: Path, side: int, seed: int) -> None:
    """A folder of forty images, as CelebA-HQ."""
    folder.mkdir(parents=True)
    for index, image in enumerate(pictures(40, side, seed)):
        (folder / f"{index:05d}.png").write_bytes(_png(image))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()
