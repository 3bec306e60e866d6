"""``ndm compress``, ``ndm decompress`` and ``ndm inspect``: lossless compression with a model."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ActionYesNo

from ndm.apps.compress.archive import Archive, levels_checksum, pack, read_archive, unpack
from ndm.apps.compress.chain import Chain
from ndm.apps.compress.choose import Forecast, choose_plan
from ndm.apps.compress.coder import decode, encode
from ndm.apps.compress.items import count_left_out, describe_jpeg, read_items
from ndm.apps.compress.restore import check_places, complete_move, write_items
from ndm.apps.compress.tiles import coding_order, over_the_edge
from ndm.data import DataDescription
from ndm.decoder import DiscretizedGaussian
from ndm.device import pick_device
from ndm.errors import UserError, check_whole, require
from ndm.model import DiffusionModel
from ndm.serialize import CONFIG_NAME, fingerprint, write_atomically
from ndm.train.config import Parser, parse
from ndm.train.run import Run
from ndm.writing import check_name


def run_compress(arguments: Sequence[str]) -> None:
    """Run ``ndm compress`` with these command-line arguments."""
    parser = Parser(
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
        help="decode the archive before writing it",
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="FILE.ndm", help="the archive to write"
    )
    parser.add_function_arguments(compress, as_positional=False, skip={"inputs", "verify", "out"})
    compress(**vars(parse(parser, arguments)))


def run_decompress(arguments: Sequence[str]) -> None:
    """Run ``ndm decompress`` with these command-line arguments."""
    parser = Parser(
        prog="ndm decompress",
        description="Restore the files from an archive of ndm compress.",
        exit_on_error=False,
    )
    parser.add_argument("archive", metavar="FILE", help="the archive")
    parser.add_argument(
        "-o", "--out", required=True, metavar="DIR", help="folder to write into, created if missing"
    )
    parser.add_function_arguments(decompress, as_positional=False, skip={"archive", "out"})
    decompress(**vars(parse(parser, arguments)))


def run_inspect(arguments: Sequence[str]) -> None:
    """Run ``ndm inspect`` with these command-line arguments."""
    parser = Parser(
        prog="ndm inspect",
        description="Show the content of an archive of ndm compress, without its model.",
        exit_on_error=False,
    )
    parser.add_argument("archive", metavar="FILE", help="the archive")
    inspect(**vars(parse(parser, arguments)))


def load_codec_model(path: str) -> tuple[DiffusionModel, DataDescription]:
    """Load a model of discrete data, and the description of its data.

    Args:
        path: folder of the model, or of a finished run.

    Raises:
        UserError: the folder has no model, or the model is for continuous data.
    """
    require("constriction", "constriction", "compress")
    folder = Path(path)
    # Not the checkpoint of an unfinished run: once its model changes, the archive is lost.
    if (folder / "model" / CONFIG_NAME).is_file():
        model = Run(folder).model()
    else:
        model = DiffusionModel.from_pretrained(folder)
    model.check_given()
    description = DataDescription.from_dict(model.info.get("data"))
    if not isinstance(model.decoder, DiscretizedGaussian) or description.num_values is None:
        raise UserError(
            f"{folder} is a model for continuous data or has a decoder network; lossless"
            " compression requires decoder DiscretizedGaussian"
        )
    return model, description


def _device(name: str) -> torch.device:
    device = pick_device(name)
    # MPS has no double precision.
    return torch.device("cpu") if device.type == "mps" else device


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
        steps: number of steps T; by default the fewest whose archive is within 1% of the smallest.
        batch_size: number of images coded in parallel; more are faster but take more initial bits;
            by default the most whose archive is within 2% of the smallest.
        rows: batch size of the networks; it does not change the archive.
        verify: decode the archive before writing it.
        device: auto, cpu or cuda.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("rows", rows)):
        if value is not None:
            check_whole(name, value, 1)
    if (steps or 0) > 10_000 or (batch_size or 0) > 4096:
        raise UserError(
            f"steps={steps}, batch_size={batch_size}: give at most 10000 steps and a batch size of"
            " at most 4096"
        )
    network, description = load_codec_model(model)
    low, num_values = int(description.low or 0), description.num_values or 0
    _check_output(Path(out), inputs)
    event_shape = description.event_shape
    items = read_items(inputs, event_shape, num_values, low)
    for note in (count_left_out(inputs), describe_jpeg(inputs)):
        if note:
            print(note)
    index = np.concatenate([item.values for item in items if item.values is not None])
    index = index[coding_order(items, event_shape)]  # tiles over the edge of an image are first
    edges = int(over_the_edge(items, event_shape).sum())
    place = _device(device)
    network.to(place)
    size = sum(item.size(event_shape) for item in items)
    tell = None if steps else partial(_print_forecast, size=size)
    plan, chosen = choose_plan(
        network, index, event_shape, steps, batch_size, tell=tell, edges=edges
    )
    print(
        f"expecting {chosen.bits / 8:,.0f} bytes with T = {chosen.steps}, {chosen.batch} images in"
        " parallel"
    )
    chain = Chain(network, plan, event_shape, rows, place)
    coded = encode(chain, index, chosen.lead, progress=True)
    archive = Archive(
        fingerprint=fingerprint(network),
        event_shape=event_shape,
        num_values=num_values,
        low=low,
        plan=plan,
        items=tuple(replace(item, values=None) for item in items),
        checksum=levels_checksum(index),
        coded=coded,
        lead=chosen.lead,
    )
    data = pack(archive)
    if verify and not _decodes(data, network, index, rows, place):
        raise UserError(
            f"{out} was not written, because the archive does not decode on this machine; please"
            " report this with the model"
        )
    write_atomically(Path(out), lambda temporary: temporary.write_bytes(data))
    _print_rates(archive, len(data))
    total = coded.clock.network + coded.clock.coder
    share = f", {coded.clock.network / total:.0%} of it in the networks" if total else ""
    print(f"wrote {out}{', verified' if verify else ''}; encoded in {total:.1f} s{share}")


def _print_forecast(forecast: Forecast, size: int) -> None:
    print(
        f"T = {forecast.steps:<4} {forecast.rate:7.3f} bits/dim, with initial bits"
        f" {forecast.bits / size:7.3f}",
        flush=True,
    )


def _check_output(out: Path, inputs: Sequence[str]) -> None:
    """Check that the archive to write is neither a folder nor one of the inputs.

    Raises:
        UserError: it is.
    """
    check_name(out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the archive to write")
    if out.exists() and any(out.resolve().is_relative_to(Path(name).resolve()) for name in inputs):
        raise UserError(
            f"{out} is itself an input, or lies in a folder that is; give another name for the"
            " archive"
        )


def _decodes(
    data: bytes, model: DiffusionModel, index: np.ndarray, rows: int, device: torch.device
) -> bool:
    """Return whether the bytes of an archive decode to the levels ``(N, D)``."""
    try:
        archive = unpack(data)
        chain = Chain(model, archive.plan, archive.event_shape, rows, device)
        found = decode(chain, archive.coded, archive.count, archive.lead, progress=True)
        return np.array_equal(found, index)
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
    """Restore the files from an archive of ndm compress.

    Args:
        archive: the archive.
        model: folder of the model that compressed it, RUN/model, or of the finished run.
        out: folder to write into, created if missing.
        rows: batch size of the networks; it does not change the result.
        batch_size: another name for rows; the batch size of the coder is stored in the archive.
        device: auto, cpu or cuda.
    """
    rows = batch_size if batch_size is not None else rows
    check_whole("rows", rows, 1)
    found = read_archive(Path(archive))
    network, description = load_codec_model(model)
    if fingerprint(network) != found.fingerprint:
        raise UserError(
            f"{archive} was made with another model than {model}; give the one with the fingerprint"
            f" {found.fingerprint[:12]}"
        )
    expected = (description.event_shape, description.num_values, int(description.low or 0))
    if (found.event_shape, found.num_values, found.low) != expected:
        raise UserError(
            f"{archive} is damaged: its shape or values differ from those of its model; restore it"
            " from a copy"
        )
    folder, identity = Path(out), _identity(Path(archive))
    check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder")
    if complete_move(found.items, folder, identity):
        print(f"completed the interrupted restoration of {found.count} images to {folder}")
        return
    check_places(found.items, folder)
    place = _device(device)
    chain = Chain(network.to(place), found.plan, found.event_shape, rows, place)
    try:
        index = decode(chain, found.coded, found.count, found.lead, progress=True)
        if levels_checksum(index) != found.checksum:
            raise ValueError("the images differ from their checksum")
        order = coding_order(found.items, found.event_shape)
        index = index[np.argsort(order)]
        paths = write_items(found.items, index, found.event_shape, found.low, folder, identity)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{archive} cannot be decoded ({error}); it is damaged, or the networks differ too much"
            " on this machine; nothing was written"
        ) from error
    print(f"wrote {found.pictures} images in {len(paths)} files to {folder}; the checksum matches")


def _identity(archive: Path) -> str:
    """Return the start of the checksum of an archive, which is at its end."""
    with archive.open("rb") as file:
        file.seek(-32, os.SEEK_END)
        return file.read(8).hex()


def inspect(archive: str) -> None:
    """Show the content of an archive, without its model.

    Args:
        archive: the archive.
    """
    found = read_archive(Path(archive))
    shape = " x ".join(map(str, found.event_shape))
    tiles = f" in {found.count} tiles" if found.count > found.pictures else ""
    print(
        f"{archive}: {found.pictures} images{tiles} of {shape}, {found.num_values} values from"
        f" {found.low}"
    )
    print(f"made with the model {found.fingerprint}")
    print(
        f"T = {found.plan.steps}, {found.plan.batch} images in parallel, cells of"
        f" {found.plan.width:g} standard deviations"
    )
    _print_rates(found, Path(archive).stat().st_size)
    width = shutil.get_terminal_size().columns - 30
    for item in found.items[:20]:
        array = "" if item.kind == "image" else f" {item.dtype} {item.shape}"
        print(f"  {item.count:>8} in {_printable(item.name)[: max(width, 10)]}{array}")
    if len(found.items) > 20:
        print(f"  and {len(found.items) - 20} more")


def _printable(name: str) -> str:
    """Escape what a terminal cannot show, or obeys; names need not be valid UTF-8."""
    escaped = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in name
    )
    encoding = sys.stdout.encoding or "utf-8"
    return "".join(escaped).encode(encoding, "backslashreplace").decode(encoding)


def _print_rates(archive: Archive, size: int) -> None:
    values = sum(item.size(archive.event_shape) for item in archive.items)
    initial = 4 * archive.coded.initial
    images = 4 * len(archive.coded.words) - initial
    rest = size - initial - images
    print(f"{size:,} bytes, {8 * size / values:.4f} bits/dim:")
    print(f"  {images:>12,} bytes of images by the model, {8 * images / values:.4f} bits/dim")
    first = f", with the first {archive.lead} images" if archive.lead else ""
    print(f"  {initial:>12,} bytes of initial bits, {8 * initial / values:.4f} bits/dim{first}")
    print(
        f"  {rest:>12,} bytes of names, checksums and settings, including"
        f" {len(archive.coded.exceptions)} roundings"
    )
