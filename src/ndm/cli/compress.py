"""``ndm compress``, ``ndm decompress`` and ``ndm inspect``: lossless archives by a model."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ActionYesNo, ArgumentParser

from ndm.apps.compress.archive import Archive, image_checksums, pack, read_archive, unpack
from ndm.apps.compress.chain import Chain
from ndm.apps.compress.choose import Forecast, choose_plan
from ndm.apps.compress.coder import decode, encode
from ndm.apps.compress.items import check_places, read_items, write_items
from ndm.data import DataDescription
from ndm.decoder import DiscretizedGaussian
from ndm.device import pick_device
from ndm.errors import UserError, check_whole, require
from ndm.model import DiffusionModel
from ndm.serialize import CONFIG_NAME, fingerprint, write_atomically
from ndm.train.config import parse
from ndm.train.run import Run


def run_compress(words: Sequence[str]) -> None:
    """``ndm compress``: parse and compress."""
    parser = ArgumentParser(
        prog="ndm compress",
        description="Compress images or arrays losslessly with a trained model.",
        exit_on_error=False,
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="images, folders of images, .npy or .npz files"
    )
    parser.add_argument(
        "--verify",
        action=ActionYesNo,
        default=True,
        help="decode the archive before it is moved into place",
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="FILE.ndm", help="the archive to write"
    )
    parser.add_function_arguments(compress, as_positional=False, skip={"inputs", "verify", "out"})
    compress(**vars(parse(parser, words)))


def run_decompress(words: Sequence[str]) -> None:
    """``ndm decompress``: parse and decompress."""
    parser = ArgumentParser(
        prog="ndm decompress",
        description="Restore what ndm compress made an archive of.",
        exit_on_error=False,
    )
    parser.add_argument("archive", metavar="FILE", help="the archive")
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="folder to write into, made if need be"
    )
    parser.add_function_arguments(decompress, as_positional=False, skip={"archive", "out"})
    decompress(**vars(parse(parser, words)))


def run_inspect(words: Sequence[str]) -> None:
    """``ndm inspect``: parse and print."""
    parser = ArgumentParser(
        prog="ndm inspect",
        description="Show what an archive of ndm compress holds; no model is needed.",
        exit_on_error=False,
    )
    parser.add_argument("archive", metavar="FILE", help="the archive")
    inspect(**vars(parse(parser, words)))


def load_codec_model(path: str) -> tuple[DiffusionModel, DataDescription]:
    """A model of values on a grid, and what its data are.

    Raises:
        UserError: there is no such model, or it is one of continuous data.
    """
    require("constriction", "constriction", "compress")
    folder = Path(path)
    # Of a run that is not finished the model changes, and what was compressed with it would be
    # lost.
    model = (
        Run(folder).model()
        if (folder / "model" / CONFIG_NAME).is_file()
        else DiffusionModel.from_pretrained(folder)
    )
    description = DataDescription.from_dict(model.info.get("data"))
    if not isinstance(model.decoder, DiscretizedGaussian) or description.num_values is None:
        raise UserError(
            f"{folder} is a model of continuous data or has a decoder network; lossless compression"
            " needs decoder DiscretizedGaussian"
        )
    return model, description


def _device(name: str) -> torch.device:
    device = pick_device(name)
    return torch.device("cpu") if device.type == "mps" else device  # which has no double precision


def compress(
    inputs: list[str],
    model: str,
    out: str,
    steps: int | None = None,
    batch_size: int | None = None,
    rows: int = 64,
    verify: bool = True,
    device: str = "auto",
) -> None:
    """Compress images or arrays losslessly with a trained model.

    Args:
        inputs: images, folders of images, .npy or .npz files.
        model: folder of the model, RUN/model, or of a finished run.
        out: the archive to write.
        steps: T, latents for each pixel; by default the fewest whose archive is within 1% of the
            smallest.
        batch_size: images coded side by side: more are faster and take more initial bits; by
            default as many as keep these within 2%.
        rows: images that a network sees at once; does not change the archive.
        verify: decode the archive before it is moved into place.
        device: auto, cpu or cuda.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("rows", rows)):
        if value is not None:
            check_whole(name, value, 1)
    if (steps or 0) > 10_000 or (batch_size or 0) > 4096:
        raise UserError(
            f"steps={steps}, batch_size={batch_size}: at most 10000 steps and 4096 images side by"
            " side"
        )
    network, description = load_codec_model(model)
    low, num_values = int(description.low or 0), description.num_values or 0
    if Path(out).is_dir():
        raise UserError(f"{out} is a folder; give the archive to write")
    if Path(out).exists() and any(
        Path(out).resolve().is_relative_to(Path(name).resolve()) for name in inputs
    ):
        raise UserError(
            f"{out} is to be compressed itself, or lies in a folder that is; give another name for"
            " the archive"
        )
    items = read_items(inputs, description.event_shape, num_values, low)
    index = np.concatenate([item.values for item in items if item.values is not None])
    place = _device(device)
    network.to(place)

    def tell(forecast: Forecast) -> None:
        print(
            f"T = {forecast.steps:<4} {forecast.rate:7.3f} bits/dim, with initial bits"
            f" {forecast.bits / index.size:7.3f}",
            flush=True,
        )

    plan, _ = choose_plan(
        network, index, description.event_shape, steps, batch_size, tell=None if steps else tell
    )
    chain = Chain(network, plan, description.event_shape, rows, place)
    coded = encode(chain, index, progress=True)
    archive = Archive(
        fingerprint=fingerprint(network),
        event_shape=description.event_shape,
        num_values=num_values,
        low=low,
        plan=plan,
        items=tuple(replace(item, values=None) for item in items),
        checksums=image_checksums(index),
        coded=coded,
    )
    data = pack(archive)
    if verify and not _decodes(data, network, index, rows, place):
        raise UserError(
            "the archive does not decode on this machine, and was not written; please report this"
            " with the model"
        )
    write_atomically(Path(out), lambda temporary: temporary.write_bytes(data))
    _print_rates(archive, len(data))
    total = coded.clock.network + coded.clock.coder
    print(
        f"wrote {out}{', verified' if verify else ''}; {total:.1f} s to encode,"
        f" {coded.clock.network / total:.0%} of it in the networks"
    )


def _decodes(
    data: bytes, model: DiffusionModel, index: np.ndarray, rows: int, device: torch.device
) -> bool:
    """Whether the bytes of an archive decode to the values ``(N, D)``."""
    try:
        archive = unpack(data)
        chain = Chain(model, archive.plan, archive.event_shape, rows, device)
        return np.array_equal(decode(chain, archive.coded, archive.count, progress=True), index)
    except ValueError:
        return False


def decompress(
    archive: str,
    model: str,
    out: str,
    rows: int = 64,
    batch_size: int | None = None,
    device: str = "auto",
) -> None:
    """Restore what ndm compress made an archive of.

    Args:
        archive: the archive.
        model: folder of the very model that it was made with, RUN/model.
        out: folder to write into, made if need be.
        rows: images that a network sees at once; does not change the result.
        batch_size: the same as rows; how many images were coded side by side stands in the archive.
        device: auto, cpu or cuda.
    """
    rows = batch_size if batch_size is not None else rows
    check_whole("rows", rows, 1)
    found = read_archive(Path(archive))
    network, description = load_codec_model(model)
    if fingerprint(network) != found.fingerprint:
        raise UserError(
            f"{archive} was made with another model (fingerprint {found.fingerprint[:12]}), not"
            f" with {model}; give that one"
        )
    fits = (found.event_shape, found.num_values, found.low) == (
        description.event_shape,
        description.num_values,
        int(description.low or 0),
    )
    if not fits:
        raise UserError(
            f"{archive} is damaged: it does not have the shape or the values of its model"
        )
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    check_places(found.items, folder)
    place = _device(device)
    chain = Chain(network.to(place), found.plan, found.event_shape, rows, place)
    try:
        index = decode(chain, found.coded, found.count, progress=True)
        wrong = np.flatnonzero(image_checksums(index) != found.checksums)
        if len(wrong):
            raise ValueError(f"image {wrong[0]} differs from its checksum")
        paths = write_items(found.items, index, found.event_shape, found.low, folder)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{archive} could not be decoded ({error}); it is damaged, or this machine computes the"
            " networks too differently; nothing was written"
        ) from error
    print(f"wrote {found.count} images, {len(paths)} files, to {folder}; every checksum is right")


def inspect(archive: str) -> None:
    """Show what an archive holds; no model is needed.

    Args:
        archive: the archive.
    """
    found = read_archive(Path(archive))
    shape = " x ".join(map(str, found.event_shape))
    print(f"{archive}: {found.count} images of {shape}, {found.num_values} values from {found.low}")
    print(f"made with the model {found.fingerprint}")
    print(
        f"T = {found.plan.steps}, {found.plan.batch} images side by side, cells of"
        f" {found.plan.width:g} standard deviations"
    )
    _print_rates(found, Path(archive).stat().st_size)
    width = shutil.get_terminal_size().columns - 30
    for item in found.items[:20]:
        print(
            f"  {item.count:>8} in"
            f" {item.name[:width]}{f' {item.dtype} {item.shape}' if item.kind != 'image' else ''}"
        )
    if len(found.items) > 20:
        print(f"  and {len(found.items) - 20} more")


def _print_rates(archive: Archive, size: int) -> None:
    values = archive.count * math.prod(archive.event_shape)
    words, initial = len(archive.coded.words), archive.coded.initial
    rest = size - 4 * words
    print(f"{size:,} bytes, {8 * size / values:.4f} bits/dim:")
    print(
        f"  {4 * (words - initial):>12,} bytes of images, {32 * (words - initial) / values:.4f}"
        " bits/dim"
    )
    print(
        f"  {4 * initial:>12,} bytes of initial bits, {32 * initial / values:.4f} bits/dim, once an"
        " archive"
    )
    print(
        f"  {rest:>12,} bytes of names, checksums and settings, {len(archive.coded.exceptions)}"
        " roundings among them"
    )
