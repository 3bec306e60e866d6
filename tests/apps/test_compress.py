"""The codec: bit-exact round trips of anything, at the rate of the bound, whatever the threads,
batches and noise of the networks.
"""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from ndm.apps.compress.archive import _START, Archive, image_checksums, pack, read_archive, unpack
from ndm.apps.compress.chain import FINE, MARGIN, Chain, Plan, Rounding, make_plan
from ndm.apps.compress.choose import Rows, choose_plan
from ndm.apps.compress.coder import Coded, Stack, decode, encode, initial_words
from ndm.apps.compress.items import Item
from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.evaluation.evaluate import Evaluation
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.reverse import ReverseKind
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.serialize import fingerprint
from ndm.transform import GatedTransform, Identity, NetworkTransform, Transform
from oracles import randomized


def network(shape: Sequence[int], seed: int, outputs: int | None = None) -> nn.Module:
    torch.manual_seed(seed)
    if len(shape) == 3:
        net: nn.Module = UNet(
            shape[0], 8, (1,), attention=bool(seed % 2), max_frequency=4.0, outputs=outputs
        )
    else:
        net = MLP(math.prod(shape), hidden=16, blocks=1, max_frequency=4.0, outputs=outputs)
    return randomized(net, 0.03, seed).float()


def make_model(
    shape: Sequence[int],
    num_values: int = 16,
    seed: int = 0,
    schedule: Schedule | None = None,
    gamma_0: float = -5.0,
) -> NDM:
    kinds: list[Transform] = [
        Identity(),
        NetworkTransform(network(shape, seed + 1)),
        GatedTransform(network(shape, seed + 2)),
    ]
    transform = randomized(kinds[seed % 3], 0.02, seed).float()
    schedule = schedule or LinearLogSNRSchedule(gamma_0, 4.0)
    reverse: ReverseKind = get_args(ReverseKind)[seed // 3 % 4] if seed > 9 else "tied"
    predictor = Predictor(network(shape, seed + 3, 2 if reverse == "direct-score" else None))
    return NDM(
        schedule, transform, predictor, DiscretizedGaussian(num_values), reverse=reverse
    ).eval()


def patterns(generator: np.random.Generator, count: int, dims: int, num_values: int) -> np.ndarray:
    """Noise, all black, all white, two values, or a ramp."""
    kind = generator.integers(5)
    if kind == 0:
        return generator.integers(0, num_values, (count, dims))
    if kind == 1:
        return np.zeros((count, dims), dtype=np.int64)
    if kind == 2:
        return np.full((count, dims), num_values - 1)
    if kind == 3:
        return generator.integers(0, 2, (count, dims)) * (num_values - 1)
    return np.tile(np.arange(dims) % num_values, (count, 1))


@pytest.mark.parametrize("block", range(8))
def test_two_hundred_shapes_patterns_depths_and_schedules_come_back(block: int) -> None:
    for case in range(25 * block, 25 * block + 25):
        generator = np.random.default_rng(case)
        flat = bool(generator.integers(2))
        shape = (
            tuple(generator.integers(1, 9, 1))
            if flat
            else (int(generator.integers(1, 4)), *generator.integers(2, 8, 2))
        )
        shape = tuple(map(int, shape))
        num_values, steps, batch = (
            int(generator.choice([2, 3, 16, 17, 256])),
            int(generator.integers(1, 5)),
            int(generator.integers(1, 6)),
        )
        schedule = [
            LinearLogSNRSchedule(-7.0, 4.0),
            FlowMatchingSchedule(0.05, 0.0),
            LearnedSchedule(-6.0, 3.0),
        ][case % 3]
        model = make_model(shape, num_values, case, schedule)
        count = int(generator.integers(1, 9))
        index = patterns(generator, count, math.prod(shape), num_values)
        scale = torch.from_numpy(generator.uniform(0.5, 3, 2)) if case % 2 else None
        plan = make_plan(model, steps, batch, scale, float(generator.choice([0.25, 0.5, 1.0])))
        coded = encode(Chain(model, plan, shape, rows=int(generator.integers(1, 5))), index)
        restored = Plan.unpack(plan.pack())
        found = decode(
            Chain(model, restored, shape, rows=int(generator.integers(1, 9))),
            Coded(coded.words, coded.initial, coded.exceptions),
            count,
        )
        np.testing.assert_array_equal(found, index, err_msg=f"case {case}")


def test_neither_threads_nor_rows_change_the_archive() -> None:
    model = make_model((1, 8, 8), 16, 5)
    index = np.random.default_rng(0).integers(0, 16, (12, 64))
    plan = make_plan(model, 4, 5)
    coded = encode(Chain(model, plan, (1, 8, 8)), index)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = encode(Chain(model, plan, (1, 8, 8), rows=3), index)
        np.testing.assert_array_equal(again.words, coded.words)
        np.testing.assert_array_equal(
            decode(Chain(model, plan, (1, 8, 8), rows=7), coded, 12), index
        )
    finally:
        torch.set_num_threads(threads)


class Shaky(nn.Module):
    """A network whose output is off by a random 1e-12, as on another machine."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x, t)
        return out + 1e-12 * torch.randn_like(out)


def test_numerical_noise_of_another_machine_does_not_matter() -> None:
    model = make_model((24,), 16, 1)
    index = np.random.default_rng(0).integers(0, 16, (400, 24))
    plan = make_plan(model, 8, 50)
    coded = encode(Chain(model, plan, (24,)), index)
    other = Chain(model, plan, (24,))
    other.model.predictor.network = Shaky(other.model.predictor.network)
    np.testing.assert_array_equal(decode(other, coded, 400), index)


def test_the_way_near_a_boundary_is_written_and_followed() -> None:
    values = np.array([0.5 - MARGIN / 3, 1.2, 2.5 + MARGIN / 3, -3.5, 7.49])
    writer = Rounding()
    written = writer(values, 4)
    assert written.tolist() == [0, 1, 3, -3, 7]
    exceptions = writer.exceptions()
    assert exceptions[:, 0].tolist() == [4, 4, 4]
    for noise in (-0.49, 0.49):
        np.testing.assert_array_equal(
            Rounding(exceptions)(values + noise * MARGIN * np.array([1, 1, 1, 1, 1]), 4), written
        )
    assert Rounding(exceptions)(values, 5).tolist() == [
        0,
        1,
        3,
        -3,
        7,
    ], "another call has no exceptions"
    assert len(Rounding(np.zeros((0, 2), dtype=np.int64)).exceptions()) == 0
    with pytest.raises(UserError, match="finite"):
        writer(np.array([math.nan]), 0)
    with pytest.raises(ValueError, match="exception"):
        Rounding(np.array([[0, 99]]))(np.zeros(3), 0)


@pytest.mark.parametrize(("steps", "width"), [(3, 0.5), (5, 0.25), (8, 0.5), (5, 1.0)])
def test_the_rate_is_the_bound(steps: int, width: float) -> None:
    """Both by the same steps and reverse variance; the rate is one draw of what the bound is the
    mean of.

    With a reverse variance that does not fit, pushed bits are not random, and what is popped from
    them is no sample of q.
    """
    shape, count = (6,), 3000
    model = make_model(shape, 16, 2)
    index = np.clip(np.random.default_rng(0).normal(8, 2, (count, 6)).round(), 0, 15).astype(
        np.int64
    )
    rows = Rows(index, model.decoder.values, shape)  # type: ignore[union-attr,arg-type]
    scale = best_variance_ratio(model, rows, steps).values
    bound = Evaluation(model, rows).nelbo(steps, 50, rows)
    coded = encode(Chain(model, make_plan(model, steps, 500, scale, width), shape), index)
    rate = 32 * (len(coded.words) - coded.initial) / index.size
    assert rate == pytest.approx(bound.bpd, rel=0.01)
    assert coded.initial > 0


def test_the_means_are_those_of_the_process() -> None:
    shape, steps = (5,), 4
    model = make_model(shape, 16, 1).double()
    plan = make_plan(model, steps, 1)
    chain, index = Chain(model, plan, shape), np.random.default_rng(0).integers(0, 16, 15)
    x = torch.from_numpy(chain.values[index]).reshape(3, 5)
    transformed = chain.transformed(index)
    last = model.process.level(1.0, x)
    with torch.no_grad():
        expected = model.process.marginal(x, last).mean.flatten().numpy()
        np.testing.assert_allclose(
            chain.first(transformed) / FINE * plan.delta[-1], expected, rtol=1e-6
        )
        latent = np.random.default_rng(1).integers(-20, 20, 15).astype(float)
        for step in range(1, steps + 1):
            s, t = (model.process.level(i / steps, x) for i in (step - 1, step))
            z = torch.from_numpy(latent * plan.delta[step]).reshape(3, 5)
            for values, source in (
                (chain.pull(transformed[step - 1], transformed[step], step), x),
                (chain.predicted(latent, step), model.predictor(z, t)),
            ):
                posterior = model.process.posterior(z, source, s, t, model.eta)
                mean = chain.mean(values, latent, step) * plan.delta[step - 1]
                np.testing.assert_allclose(
                    mean, posterior.mean.flatten().numpy(), rtol=1e-5, atol=1e-6
                )
            assert float(posterior.std.flatten()[0]) == pytest.approx(
                plan.delta[step - 1] / plan.width, rel=1e-6
            )


@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-4.0, 4.0), FlowMatchingSchedule(0.1, 0.0)],
    ids=["linear", "flow"],
)
def test_the_decoder_is_that_of_the_model(schedule: Schedule) -> None:
    model = make_model((1,), 17, 0, schedule).double()
    chain = Chain(model, make_plan(model, 2, 1, width=0.25), (1,))
    latent = np.arange(-60, 60, 7).astype(float)
    z = torch.from_numpy(latent * chain.plan.delta[0])[:, None]
    assert isinstance(model.decoder, DiscretizedGaussian)
    expected = model.decoder.logits(z, model.process.level(0.0, z))[:, 0].exp().numpy()
    found = chain.probabilities(latent)
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), expected, atol=0.02)


def test_damaged_bits_do_not_end_where_the_encoder_began() -> None:
    model = make_model((4,), 16, 1)
    chain, index = (
        Chain(model, make_plan(model, 3, 2), (4,)),
        np.random.default_rng(0).integers(0, 16, (6, 4)),
    )
    coded = encode(chain, index)
    for place in range(len(coded.words) - 1):
        words = coded.words.copy()
        words[place] ^= 1 << 7
        with pytest.raises(ValueError, match=r"do not end|too few bits|out of reach"):
            decode(chain, Coded(words, coded.initial, coded.exceptions), 6)
    with pytest.raises(ValueError, match="do not end"):
        decode(chain, Coded(coded.words, coded.initial + 1, coded.exceptions), 6)


def test_initial_bits_are_those_of_one_batch() -> None:
    model = make_model((8,), 16, 1)
    index = np.random.default_rng(0).integers(0, 16, (64, 8))
    initial = {
        batch: encode(Chain(model, make_plan(model, 10, batch), (8,)), index).initial
        for batch in (8, 32)
    }
    assert 2.5 < initial[32] / initial[8] < 5
    bits = 32 * initial[32] / (32 * 8 * 11)
    assert bits == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.e) / 0.5), rel=0.25)


def test_the_initial_stream_of_a_shorter_stack_is_the_top_of_a_longer_one() -> None:
    np.testing.assert_array_equal(initial_words(10), initial_words(25)[15:])
    assert initial_words(10)[-1] % 2 == 1
    assert len(initial_words(0)) == 0


def test_a_push_takes_back_a_pop() -> None:
    stack = Stack(initial_words(500), 0.5)
    generator = np.random.default_rng(0)
    mean, other = generator.normal(0, 1e4, 300), generator.normal(0, 3, 300)
    before = stack.words()
    values = stack.pop(mean, 2.0, stack.near)
    assert float(np.std(values - mean)) == pytest.approx(2.0, rel=0.2)
    stack.push(values, mean + other, 5.0, stack.far)
    np.testing.assert_array_equal(stack.pop(mean + other, 5.0, stack.far), values)
    stack.push(values, mean, 2.0, stack.near)
    np.testing.assert_array_equal(stack.words(), before)
    far = stack.within_reach(mean + 1e5, mean)
    assert float((far - mean).max()) == pytest.approx(stack.far - stack.near - 1)


def test_the_plan_weighs_initial_bits_against_the_bound() -> None:
    model = make_model((16,), 16, 0)
    index = np.random.default_rng(0).integers(4, 12, (600, 16))
    forecasts: list[float] = []
    plan, chosen = choose_plan(
        model, index, (16,), tell=lambda forecast: forecasts.append(forecast.bits)
    )
    assert chosen.bits <= 1.01 * min(forecasts)
    assert plan.steps == chosen.steps
    few, _ = choose_plan(model, index[:3], (16,))
    assert few.steps <= plan.steps
    assert few.batch == 1
    forced, _ = choose_plan(model, index, (16,), steps=7, batch=13)
    assert (forced.steps, forced.batch) == (7, 13)


def make_archive(
    model: NDM, index: np.ndarray, shape: tuple[int, ...], steps: int = 3, batch: int = 4
) -> Archive:
    plan = make_plan(model, steps, batch)
    item = Item("x.npy", "npy", len(index), "uint8", (len(index), *shape))
    return Archive(
        fingerprint(model),
        shape,
        16,
        0,
        plan,
        (item,),
        image_checksums(index),
        encode(Chain(model, plan, shape), index),
    )


def test_an_archive_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = make_model((5,), 16, 1)
    index = np.random.default_rng(0).integers(0, 16, (9, 5))
    archive = make_archive(model, index, (5,))
    (tmp_path / "x.ndm").write_bytes(pack(archive))
    found = read_archive(tmp_path / "x.ndm")
    for name in ("fingerprint", "event_shape", "num_values", "low", "plan", "items"):
        assert getattr(found, name) == getattr(archive, name)
    np.testing.assert_array_equal(found.checksums, archive.checksums)
    np.testing.assert_array_equal(found.coded.words, archive.coded.words)
    np.testing.assert_array_equal(decode(Chain(model, found.plan, (5,)), found.coded, 9), index)
    overhead = len(pack(archive)) - 4 * len(archive.coded.words)
    assert overhead < 500


def resealed(body: bytes) -> bytes:
    import hashlib

    return body + hashlib.sha256(body).digest()


def mutate(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    """A damaged copy, half of them with a checksum that fits."""
    body, kind = bytearray(data[:-32]), generator.integers(7)
    if kind == 0:
        for _ in range(generator.integers(1, 4)):
            body[generator.integers(len(body))] ^= 1 << generator.integers(8)
    elif kind == 1:
        del body[generator.integers(len(body)) :]
    elif kind == 2:
        cut = generator.integers(len(body))
        body[cut:] = other[cut:-32]
    elif kind == 3:  # a size of the start
        at = 8 + 4 * int(generator.integers(6))
        body[at : at + 4] = int(
            generator.choice([0, 1, 2**31, 2**32 - 1, int(generator.integers(2**16))])
        ).to_bytes(4, "little")
    elif kind == 4:  # a number of the header
        _, _, size, *_ = _START.unpack_from(body)
        header = json.loads(zlib.decompress(bytes(body[_START.size : _START.size + size])))
        key = str(
            generator.choice(["event_shape", "num_values", "low", "initial", "items", "model"])
        )
        header[key] = [None, -1, 2**63, 2**200, "x" * 64, [], [2**63], {"name": "../x"}, 1.5, True][
            generator.integers(10)
        ]
        text = zlib.compress(json.dumps(header).encode())
        body[_START.size : _START.size + size] = text
        body[12:16] = len(text).to_bytes(4, "little")
    elif kind == 5:  # a number of the plan
        _, _, size, steps, *_ = _START.unpack_from(body)
        at = _START.size + size + 4 * int(generator.integers(3 * steps + 6))
        body[at : at + 4] = generator.choice(
            np.array([0, -1, 1e-30, 1e30, math.nan, math.inf, 0.7], dtype="<f4")
        ).tobytes()
    else:
        body[-int(generator.integers(1, 40)) :] = generator.bytes(int(generator.integers(0, 60)))
    return resealed(bytes(body)) if generator.integers(2) or kind > 2 else bytes(body) + data[-32:]


def test_ten_thousand_damaged_archives_are_refused_or_decode_to_the_same(tmp_path: Path) -> None:
    shape, path = (4,), tmp_path / "x.ndm"
    model = make_model(shape, 16, 1)
    generator = np.random.default_rng(0)
    index = generator.integers(0, 16, (6, 4))
    data, other = (
        pack(make_archive(model, rows, shape))
        for rows in (index, generator.integers(0, 16, (6, 4)))
    )
    outcomes = {"same": 0, "refused": 0}
    with np.errstate(all="ignore"):
        for _ in range(10_000):
            damaged = mutate(data, generator, other)
            path.write_bytes(damaged)
            try:
                found = read_archive(path)
                if found.event_shape != shape or found.count > 1000:
                    raise ValueError("not the model's")
                rows = decode(Chain(model, found.plan, shape), found.coded, found.count)
                if not np.array_equal(image_checksums(rows), found.checksums):
                    raise ValueError("checksum")
                outcomes["same"] += 1
                assert np.array_equal(rows, index) or damaged[:-32] == other[:-32]
            except (
                UserError
            ):  # everything that is wrong with a file, and an output that is not finite
                outcomes["refused"] += 1
            except ValueError:  # everything that is wrong with its bits
                outcomes["refused"] += 1
    assert outcomes["refused"] > 9000, outcomes


def test_sizes_that_lie_are_found_before_anything_is_made() -> None:
    model = make_model((4,), 16, 1)
    data = pack(make_archive(model, np.zeros((3, 4), dtype=np.int64), (4,)))
    for at in range(12, 32, 4):
        body = bytearray(data[:-32])
        body[at : at + 4] = (2**32 - 1).to_bytes(4, "little")
        with pytest.raises(ValueError, match="size"):
            unpack(resealed(bytes(body)))
    bomb = zlib.compress(b"[" + b" " * 2**27 + b"]", 9)
    body = bytearray(data[:-32])
    _, _, size, *_ = _START.unpack_from(body)
    body[_START.size : _START.size + size] = bomb
    body[12:16] = len(bomb).to_bytes(4, "little")
    with pytest.raises(ValueError, match="too long"):
        unpack(resealed(bytes(body)))


def test_a_continuous_model_is_no_codec() -> None:
    model = NDM(
        LinearLogSNRSchedule(-5.0, 4.0), Identity(), Predictor(MLP(2, 8, 1)), GaussianDecoder()
    )
    with pytest.raises(UserError, match="continuous"):
        Chain(model, make_plan(model, 2, 1), (2,))
