"""Rate and speed of ndm compress, compared with PNG, WebP, JPEG XL, zstd and xz.

pip install -c constraints.txt -e '.[bench]'
python bench/compress.py [RUN] [--images 1000] [--split test] [--steps T] [--batch-size B]
    [--json FILE]

RUN is a trained run of ndm train on images, by default runs/digits (from make demo); the images are
from one of its splits. Picture formats code each image separately, and also all images in one
sheet, without the overhead of headers; zstd and xz code the raw pixels as one stream. For ndm,
"images" is the archive without initial bits, names, checksums and settings, and "archive" the file.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import zstandard
from constriction import stream

from ndm.apps.compress.archive import Archive, levels_checksum, pack
from ndm.apps.compress.chain import Chain
from ndm.apps.compress.choose import Forecast, choose_plan
from ndm.apps.compress.coder import FAR, NEAR, Clock, decode, encode
from ndm.apps.compress.items import Item
from ndm.data import EventDataset, spread
from ndm.evaluation.baselines import installed_formats, picture_bytes
from ndm.evaluation.evaluate import Evaluation
from ndm.model import DiffusionModel
from ndm.random import ExampleGenerators
from ndm.serialize import fingerprint
from ndm.train.run import Run


def rivals(images: np.ndarray) -> dict[str, Callable[[], int]]:
    """Return, by name, functions that compute the size of all images ``(N, C, H, W)``, uint8."""
    raw = images.tobytes()
    entries: dict[str, Callable[[], int]] = {}
    for name in installed_formats():
        entries[f"{name}, each image"] = lambda name=name: sum(
            picture_bytes(image[None], name) for image in images
        )
        entries[f"{name}, one sheet"] = lambda name=name: picture_bytes(images, name)
    entries["zstd -22"] = lambda: len(zstandard.ZstdCompressor(level=22).compress(raw))
    entries["xz -9e"] = lambda: len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    return entries


def bare_coder_seconds(symbols: int, calls: int, num_values: int, width: float) -> float:
    """Time constriction on the same number of symbols, without ndm.

    Each latent takes a pop and a push, each pixel a push.
    """
    generator = np.random.default_rng(0)
    coder = stream.stack.AnsCoder(
        generator.integers(1, 2**32, 4 * symbols * calls // 32 + 10_000, dtype=np.uint32)
    )
    near, far = (
        stream.model.QuantizedGaussian(-math.ceil(reach / width), math.ceil(reach / width))
        for reach in (NEAR, FAR)
    )
    categorical = stream.model.Categorical(perfect=False)
    weights = generator.random((symbols, num_values))
    mean, std = generator.uniform(-0.5, 0.5, symbols), np.full(symbols, 1 / width)
    started = time.perf_counter()
    for _ in range(calls):
        coder.encode_reverse(coder.decode(near, mean, std), far, mean, std)
    coder.encode_reverse(np.zeros(symbols, dtype=np.int32), categorical, weights)
    return time.perf_counter() - started


def coding(
    arguments: argparse.Namespace, model: DiffusionModel, split: EventDataset, pixels: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Encode and decode; return all measures, and the lines of the table."""
    shape, count, values = pixels.shape[1:], len(pixels), pixels.size
    index = pixels.reshape(count, -1)
    plan, forecast = choose_plan(model, index, shape, arguments.steps, arguments.batch_size)
    chain = Chain(model, plan, shape)
    started = time.perf_counter()
    coded = encode(chain, index, forecast.lead, progress=True)
    encoding = time.perf_counter() - started
    again = replace(coded, clock=Clock())
    started = time.perf_counter()
    if not np.array_equal(decode(chain, again, count, forecast.lead, progress=True), index):
        raise SystemExit("not lossless")
    decoding = time.perf_counter() - started
    item = Item("x.npy", "npy", count, "uint8", tuple(pixels.shape))
    checksum = levels_checksum(index)
    archive = Archive(
        fingerprint(model), tuple(shape), 256, 0, plan, (item,), checksum, coded, forecast.lead
    )
    size = len(pack(archive))

    rows = Evaluation(model, split, limit=arguments.images)
    plain = rows.nelbo(plan.steps, 16)
    bound = model_bound(rows, forecast)
    net = 32 * (len(coded.words) - coded.initial) / max(1, values - forecast.lead * index.shape[1])
    rest = count - forecast.lead
    batches = [min(plan.batch, rest - start) for start in range(0, rest, plan.batch)]
    bare = sum(
        bare_coder_seconds(batch * index.shape[1], plan.steps + 1, len(chain.values), plan.width)
        for batch in batches
    )
    record = {
        "steps": plan.steps,
        "batch": plan.batch,
        "images_bpd": net,
        "first_images": forecast.lead,
        "initial_bpd": 32 * coded.initial / values,
        "archive_bpd": 8 * size / values,
        "nelbo_same_steps_bpd": bound,
        "nelbo_same_steps_plain_variance_bpd": plain.bpd,
        "rate_over_nelbo": net / bound,
        "encode_images_per_second": count / encoding,
        "decode_images_per_second": count / decoding,
        "share_of_network": coded.clock.network / encoding,
        "share_of_coder": coded.clock.coder / encoding,
        "coder_over_bare_constriction": coded.clock.coder / bare,
    }
    print(f"ndm: T = {plan.steps}, batches of {plan.batch}")
    for name, value in record.items():
        print(f"  {name:<40}{value:10.4f}")
    return record, {"ndm, images": net, "ndm, archive": 8 * size / values}


def bounds(
    arguments: argparse.Namespace, model: DiffusionModel, split: EventDataset
) -> tuple[dict[str, float], dict[str, float]]:
    """Measure the bound of the model on the same images, without coding."""
    steps = arguments.steps or model.steps
    found = Evaluation(model, split, limit=arguments.images, progress=True).nelbo(steps, 4)
    name = "ndm, bound" if steps is None else f"ndm, bound of {steps} steps"
    return {"nelbo_bpd": found.bpd, "nelbo_bpd_stderr": found.bpd_stderr}, {name: found.bpd}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", type=Path, default=Path("runs/digits"), help="folder of a trained run"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, help="T; by default chosen as by ndm compress")
    parser.add_argument(
        "--batch-size", type=int, help="images per batch; by default chosen as by ndm compress"
    )
    parser.add_argument(
        "--bound", action="store_true", help="measure the model's bound instead of coding"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, data = Run(arguments.run).model(), Run(arguments.run).data()
    split = data.split(arguments.split)
    numbers = spread(len(split), arguments.images)
    pixels = data.integers(split.__getitems__(numbers)).numpy()
    shape, count, values = pixels.shape[1:], len(pixels), pixels.size
    print(
        f"{count} {arguments.split} images of {data.describe().name},"
        f" {' x '.join(map(str, shape))}, {torch.get_num_threads()} threads"
    )

    if arguments.bound:
        record, lines = bounds(arguments, model, split)
    else:
        record, lines = coding(arguments, model, split, pixels)
    images = pixels.astype(np.uint8)
    print(f"{'':<28}{'bits/dim':>9}{'seconds':>9}")
    for name, rate in lines.items():
        print(f"{name:<28}{rate:9.4f}")
    for name, compress in rivals(images).items():
        started = time.perf_counter()
        rate = 8 * compress() / values
        print(f"{name:<28}{rate:9.4f}{time.perf_counter() - started:9.2f}", flush=True)
        record[name] = rate
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def model_bound(rows: Evaluation, forecast: Forecast) -> float:
    """Return the bound of the model that the archive uses, with its times and reverse variance.

    It is in bits/dim and takes every step at least once for each image.
    """
    steps = forecast.steps
    total, draws = 0.0, max(steps, math.ceil(16 / steps) * steps)
    with torch.no_grad():
        for start in range(0, len(rows.numbers), 64):
            part = rows.numbers[start : start + 64]
            x = rows.data.__getitems__(part)
            bound = rows.model.bound(
                x,
                steps=forecast.grid,
                draws=draws,
                generator=ExampleGenerators(2, part),
                variance_ratio=forecast.variance_ratio,
            )
            total += float(bound.total.sum())
    return total / len(rows.numbers) / rows.dims / math.log(2)


if __name__ == "__main__":
    main()
