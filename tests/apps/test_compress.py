"""The codec: lossless for every input, at the rate of the bound, with any threads and batches."""

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from ndm.apps.compress.archive import _START, Archive, levels_checksum, pack, read_archive, unpack
from ndm.apps.compress.chain import FINE, MARGIN, Chain, Plan, Rounding, make_plan
from ndm.apps.compress.choose import Rows, choose_plan
from ndm.apps.compress.coder import Stack, decode, encode, initial_words
from ndm.apps.compress.items import Item
from ndm.decoder import DiscretizedGaussian, GaussianDecoder
from ndm.errors import UserError
from ndm.evaluation.calibrate import best_variance_ratio
from ndm.model import NDM
from ndm.nn import MLP, UNet
from ndm.predictor import Predictor
from ndm.random import ExampleGenerators
from ndm.reverse import ReverseKind
from ndm.schedule import FlowMatchingSchedule, LearnedSchedule, LinearLogSNRSchedule, Schedule
from ndm.serialize import fingerprint
from ndm.time_grid import Steps, TimeGrid
from ndm.time_sampling import PiecewiseConstant
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
    learned_variance: bool = False,
) -> NDM:
    kinds: list[Transform] = [
        Identity(),
        NetworkTransform(network(shape, seed + 1)),
        GatedTransform(network(shape, seed + 2)),
    ]
    transform = randomized(kinds[seed % 3], 0.02, seed).float()
    schedule = schedule or LinearLogSNRSchedule(gamma_0, 4.0)
    reverse: ReverseKind = get_args(ReverseKind)[seed // 3 % 4] if seed > 9 else "tied"
    if learned_variance:
        reverse = "tied"
    outputs = 2 if learned_variance or reverse == "direct-score" else None
    net = network(shape, seed + 3, outputs)
    predictor = Predictor(net, learned_variance=learned_variance)
    decoder = DiscretizedGaussian(num_values)
    steps = 4 if learned_variance else None
    return NDM(schedule, transform, predictor, decoder, reverse=reverse, steps=steps).eval()


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
def test_two_hundred_random_cases_are_restored_exactly(block: int) -> None:
    for case in range(25 * block, 25 * block + 25):
        generator = np.random.default_rng(case)
        if generator.integers(2):
            shape: tuple[int, ...] = tuple(map(int, generator.integers(1, 9, 1)))
        else:
            channels = int(generator.integers(1, 4))
            shape = (channels, *map(int, generator.integers(2, 8, 2)))
        num_values = int(generator.choice([2, 3, 16, 17, 256]))
        steps, batch = int(generator.integers(1, 5)), int(generator.integers(1, 6))
        schedule = [
            LinearLogSNRSchedule(-7.0, 4.0),
            FlowMatchingSchedule(0.05, 0.0),
            LearnedSchedule(-6.0, 3.0),
        ][case % 3]
        model = make_model(shape, num_values, case, schedule, learned_variance=case % 4 == 1)
        count = int(generator.integers(1, 9))
        index = patterns(generator, count, math.prod(shape), num_values)
        scale = torch.from_numpy(generator.uniform(0.5, 3, 2))
        ratio = PiecewiseConstant(scale) if case % 2 else None
        grid = TimeGrid([0, *np.cumsum(generator.dirichlet([2] * steps))[:-1], 1])
        width = float(generator.choice([0.25, 0.5, 1.0]))
        plan = make_plan(model, grid if case % 3 else steps, batch, ratio, width)
        lead = int(generator.integers(0, count + 1)) if case % 5 == 0 else 0
        coded = encode(Chain(model, plan, shape, rows=int(generator.integers(1, 5))), index, lead)
        restored = Plan.unpack(plan.pack())
        chain = Chain(model, restored, shape, rows=int(generator.integers(1, 9)))
        found = decode(chain, replace(coded), count, lead)
        np.testing.assert_array_equal(found, index, err_msg=f"case {case}")


def test_the_archive_does_not_depend_on_threads_or_rows() -> None:
    model = make_model((1, 8, 8), 16, 5)
    index = np.random.default_rng(0).integers(0, 16, (12, 64))
    plan = make_plan(model, 4, 5)
    coded = encode(Chain(model, plan, (1, 8, 8)), index)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = encode(Chain(model, plan, (1, 8, 8), rows=3), index)
        np.testing.assert_array_equal(again.words, coded.words)
        found = decode(Chain(model, plan, (1, 8, 8), rows=7), coded, 12)
        np.testing.assert_array_equal(found, index)
    finally:
        torch.set_num_threads(threads)


class Noisy(nn.Module):
    """Add noise of 1e-12 to the outputs of a network, as another machine would."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x, t)
        return out + 1e-12 * torch.randn_like(out)


@pytest.mark.parametrize("learned", [False, True])
def test_numerical_noise_of_another_machine_does_not_change_the_decoding(learned: bool) -> None:
    model = make_model((24,), 16, 1, learned_variance=learned)
    index = np.random.default_rng(0).integers(0, 16, (400, 24))
    plan = make_plan(model, 8, 50)
    coded = encode(Chain(model, plan, (24,)), index)
    other = Chain(model, plan, (24,))
    other.model.predictor.network = Noisy(other.model.predictor.network)
    np.testing.assert_array_equal(decode(other, coded, 400), index)
    assert (other.calls, other.learned_variance) == (25 if learned else 17, learned)


def test_values_near_a_rounding_boundary_are_stored_and_reproduced() -> None:
    values = np.array([0.5 - MARGIN / 3, 1.2, 2.5 + MARGIN / 3, -3.5, 7.49])
    writer = Rounding()
    rounded = writer(values, 4)
    assert rounded.tolist() == [0, 1, 3, -3, 7]
    exceptions = writer.exceptions()
    assert exceptions[:, 0].tolist() == [4, 4, 4]
    for noise in (-0.49, 0.49):
        found = Rounding(exceptions)(values + noise * MARGIN, 4)
        np.testing.assert_array_equal(found, rounded)
    other_call = Rounding(exceptions)(values, 5)
    assert other_call.tolist() == [0, 1, 3, -3, 7], "exceptions apply to one call"
    assert len(Rounding(np.zeros((0, 2), dtype=np.int64)).exceptions()) == 0
    with pytest.raises(UserError, match="finite"):
        writer(np.array([math.nan]), 0)
    with pytest.raises(ValueError, match="exception"):
        Rounding(np.array([[0, 99]]))(np.zeros(3), 0)


FITTED = TimeGrid([0, 0.3, 0.5, 0.6, 0.9, 1])


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("steps", "width"), [(3, 0.5), (5, 0.25), (8, 0.5), (5, 1.0), (FITTED, 0.5)]
)
def test_the_rate_equals_the_bound(steps: Steps, width: float, learned: bool) -> None:
    """Both use the same steps and reverse variance. The rate is one draw, the bound is the mean.

    The reverse variance must be fitted: otherwise pushed bits are not random, and the values popped
    from them are not samples of q.
    """
    shape, count = (6,), 3000
    model = make_model(shape, 16, 2, learned_variance=learned)
    normal = np.random.default_rng(0).normal(8, 2, (count, 6))
    index = np.clip(normal.round(), 0, 15).astype(np.int64)
    rows = Rows(index, model.decoder.values, shape)  # type: ignore[union-attr,arg-type]
    ratio = best_variance_ratio(model, rows, steps)
    x, source = rows.__getitems__(range(count)), ExampleGenerators(0, range(count))
    with torch.no_grad():
        bound = model.bound(x, steps=steps, draws=50, generator=source, variance_ratio=ratio).total
    bits = float(bound.mean()) / math.log(2) / 6
    coded = encode(Chain(model, make_plan(model, steps, 500, ratio, width), shape), index)
    rate = 32 * (len(coded.words) - coded.initial) / index.size
    assert rate == pytest.approx(bits, rel=0.01)
    assert coded.initial > 0


def test_the_chain_has_the_means_of_the_process() -> None:
    shape, steps = (5,), 4
    model = make_model(shape, 16, 1).double()
    plan = make_plan(model, steps, 1)
    chain, index = Chain(model, plan, shape), np.random.default_rng(0).integers(0, 16, 15)
    x = torch.from_numpy(chain.values[index]).reshape(3, 5)
    transformed = chain.transformed(index)
    last = model.process.level(1.0, x)
    with torch.no_grad():
        expected = model.process.marginal(x, last).mean.flatten().numpy()
        found = chain.first(transformed) / FINE * plan.delta[-1]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        latent = np.random.default_rng(1).integers(-20, 20, 15).astype(float)
        for step in range(1, steps + 1):
            s, t = (model.process.level(i / steps, x) for i in (step - 1, step))
            z = torch.from_numpy(latent * plan.delta[step]).reshape(3, 5)
            for values, source in (
                (chain.pull(transformed[step - 1], transformed[step], step), x),
                (chain.predicted(latent, step)[0], model.predictor(z, t)),
            ):
                posterior = model.process.posterior(z, source, s, t, model.eta)
                mean = chain.mean(values, latent, step) * plan.delta[step - 1]
                expected = posterior.mean.flatten().numpy()
                np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
            std = plan.delta[step - 1] / plan.width
            assert float(posterior.std.flatten()[0]) == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [LinearLogSNRSchedule(-4.0, 4.0), FlowMatchingSchedule(0.1, 0.0)],
    ids=["linear", "flow"],
)
def test_the_chain_has_the_probabilities_of_the_decoder(schedule: Schedule) -> None:
    model = make_model((1,), 17, 0, schedule).double()
    chain = Chain(model, make_plan(model, 2, 1, width=0.25), (1,))
    latent = np.arange(-60, 60, 7).astype(float)
    z = torch.from_numpy(latent * chain.plan.delta[0])[:, None]
    assert isinstance(model.decoder, DiscretizedGaussian)
    expected = model.decoder.logits(z, model.process.level(0.0, z))[:, 0].exp().numpy()
    found = chain.probabilities(latent)
    np.testing.assert_allclose(found / found.sum(1, keepdims=True), expected, atol=0.02)


def test_damaged_bits_do_not_decode_to_the_initial_state() -> None:
    model = make_model((4,), 16, 1)
    chain = Chain(model, make_plan(model, 3, 2), (4,))
    index = np.random.default_rng(0).integers(0, 16, (6, 4))
    coded = encode(chain, index)
    for place in range(len(coded.words) - 1):
        words = coded.words.copy()
        words[place] ^= 1 << 7
        with pytest.raises(ValueError, match=r"do not end|too few bits|out of reach"):
            decode(chain, replace(coded, words=words), 6)
    with pytest.raises(ValueError, match="do not end"):
        decode(chain, replace(coded, initial=coded.initial + 1), 6)


def test_initial_bits_are_proportional_to_the_batch_size() -> None:
    model = make_model((8,), 16, 1)
    index = np.random.default_rng(0).integers(0, 16, (64, 8))
    initial = {
        batch: encode(Chain(model, make_plan(model, 10, batch), (8,)), index).initial
        for batch in (8, 32)
    }
    assert 2.5 < initial[32] / initial[8] < 5
    bits = 32 * initial[32] / (32 * 8 * 11)
    assert bits == pytest.approx(math.log2(math.sqrt(2 * math.pi * math.e) / 0.5), rel=0.25)


def test_a_shorter_initial_stream_is_the_top_of_a_longer_one() -> None:
    np.testing.assert_array_equal(initial_words(10), initial_words(25)[15:])
    assert initial_words(10)[-1] % 2 == 1
    assert len(initial_words(0)) == 0


def test_a_push_inverts_a_pop() -> None:
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


def test_the_plan_minimizes_initial_bits_plus_bound() -> None:
    model = make_model((16,), 16, 0)
    index = np.random.default_rng(0).integers(4, 12, (600, 16))
    forecasts: list[float] = []
    plan, chosen = choose_plan(model, index, (16,), tell=lambda one: forecasts.append(one.bits))
    assert chosen.bits <= 1.01 * min(forecasts)
    assert plan.steps == chosen.steps
    few, _ = choose_plan(model, index[:3], (16,))
    assert few.steps <= plan.steps
    forced, _ = choose_plan(model, index, (16,), steps=7, batch=13)
    assert (forced.steps, forced.batch) == (7, 13)


def make_archive(
    model: NDM, index: np.ndarray, shape: tuple[int, ...], steps: int = 3, batch: int = 4
) -> Archive:
    plan = make_plan(model, steps, batch)
    item = Item("x.npy", "npy", len(index), "uint8", (len(index), *shape))
    checksum, coded = levels_checksum(index), encode(Chain(model, plan, shape), index)
    return Archive(fingerprint(model), shape, 16, 0, plan, (item,), checksum, coded)


def test_the_learned_variance_is_rounded_to_powers_of_two() -> None:
    model = make_model((5,), 16, 2, learned_variance=True).double()
    grid = TimeGrid([0, 0.2, 0.7, 1])
    chain = Chain(
        model,
        make_plan(model, grid, 1, PiecewiseConstant(torch.tensor([1.0, 4.0, 9.0]), grid)),
        (5,),
    )
    latent = np.random.default_rng(1).integers(-20, 20, 15).astype(float)
    for step in (1, 2, 3):
        s, t = grid.tolist()[step - 1 : step + 1]
        x = torch.from_numpy(latent * chain.plan.delta[step]).reshape(3, 5)
        level_s, level_t = (model.process.level(time, x) for time in (s, t))
        with torch.no_grad():
            guess = model.reverse_process.guess(x, level_t, 1.0)  # type: ignore[attr-defined]
        v = float(model.process.posterior(x, x, level_s, level_t).std[0, 0]) ** 2
        pull = float(level_s.alpha[0] * -torch.expm1(level_s.gamma - level_t.gamma)[0])
        expected = step * np.sqrt(1 + pull**2 * guess.variance.flatten().numpy() / v) / 0.5
        _, exponents = chain.predicted(latent, step)
        assert exponents is not None and exponents.max() > 0.5
        found = chain.spread(np.rint(exponents), step)
        np.testing.assert_allclose(found, expected, rtol=0.5 * math.log(2) / 64 + 1e-6)


def test_an_archive_is_read_back_exactly(tmp_path: Path) -> None:
    model = make_model((5,), 16, 1)
    index = np.random.default_rng(0).integers(0, 16, (9, 5))
    archive = make_archive(model, index, (5,))
    (tmp_path / "x.ndm").write_bytes(pack(archive))
    found = read_archive(tmp_path / "x.ndm")
    for name in ("fingerprint", "event_shape", "num_values", "low", "plan", "items"):
        assert getattr(found, name) == getattr(archive, name)
    assert found.checksum == archive.checksum
    np.testing.assert_array_equal(found.coded.words, archive.coded.words)
    np.testing.assert_array_equal(decode(Chain(model, found.plan, (5,)), found.coded, 9), index)
    overhead = len(pack(archive)) - 4 * len(archive.coded.words)
    assert overhead < 500


def with_checksum(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def mutate(data: bytes, generator: np.random.Generator, other: bytes) -> bytes:
    """Return a damaged archive, half of the time with a valid checksum."""
    body, kind = bytearray(data[:-32]), generator.integers(7)
    if kind == 0:
        for _ in range(generator.integers(1, 4)):
            body[generator.integers(len(body))] ^= 1 << generator.integers(8)
    elif kind == 1:
        del body[generator.integers(len(body)) :]
    elif kind == 2:
        cut = generator.integers(len(body))
        body[cut:] = other[cut:-32]
    elif kind == 3:  # a size at the start
        at = 8 + 4 * int(generator.integers(6))
        sizes = [0, 1, 2**31, 2**32 - 1, int(generator.integers(2**16))]
        body[at : at + 4] = int(generator.choice(sizes)).to_bytes(4, "little")
    elif kind == 4:  # a number of the header
        _, _, size, *_ = _START.unpack_from(body)
        header = json.loads(zlib.decompress(bytes(body[_START.size : _START.size + size])))
        keys = ["event_shape", "num_values", "low", "initial", "items", "model"]
        values = [None, -1, 2**63, 2**200, "x" * 64, [], [2**63], {"name": "../x"}, 1.5, True]
        key = str(generator.choice(keys))
        header[key] = values[generator.integers(10)]
        text = zlib.compress(json.dumps(header).encode())
        body[_START.size : _START.size + size] = text
        body[12:16] = len(text).to_bytes(4, "little")
    elif kind == 5:  # a number of the plan
        _, _, size, steps, *_ = _START.unpack_from(body)
        at = _START.size + size + 4 * int(generator.integers(3 * steps + 6))
        numbers = np.array([0, -1, 1e-30, 1e30, math.nan, math.inf, 0.7], dtype="<f4")
        body[at : at + 4] = generator.choice(numbers).tobytes()
    else:
        body[-int(generator.integers(1, 40)) :] = generator.bytes(int(generator.integers(0, 60)))
    return (
        with_checksum(bytes(body))
        if generator.integers(2) or kind > 2
        else bytes(body) + data[-32:]
    )


def test_four_thousand_damaged_archives_are_rejected_or_decode_to_the_same(tmp_path: Path) -> None:
    shape, path = (4,), tmp_path / "x.ndm"
    model = make_model(shape, 16, 1)
    generator = np.random.default_rng(0)
    index = generator.integers(0, 16, (6, 4))
    data = pack(make_archive(model, index, shape))
    other = pack(make_archive(model, generator.integers(0, 16, (6, 4)), shape))
    outcomes = {"same": 0, "rejected": 0}
    with np.errstate(all="ignore"):
        for _ in range(4_000):
            damaged = mutate(data, generator, other)
            path.write_bytes(damaged)
            try:
                found = read_archive(path)
                if found.event_shape != shape or found.count > 1000:
                    raise ValueError("not the model's")
                rows = decode(Chain(model, found.plan, shape), found.coded, found.count)
                if levels_checksum(rows) != found.checksum:
                    raise ValueError("checksum")
                outcomes["same"] += 1
                assert np.array_equal(rows, index) or damaged[:-32] == other[:-32]
            except (UserError, ValueError):  # a faulty file or non-finite output, or faulty bits
                outcomes["rejected"] += 1
    assert outcomes["rejected"] > 3600, outcomes


def test_false_sizes_are_rejected_before_allocation() -> None:
    model = make_model((4,), 16, 1)
    data = pack(make_archive(model, np.zeros((3, 4), dtype=np.int64), (4,)))
    for at in range(12, 32, 4):
        body = bytearray(data[:-32])
        body[at : at + 4] = (2**32 - 1).to_bytes(4, "little")
        with pytest.raises(ValueError, match=r"size|add up"):
            unpack(with_checksum(bytes(body)))
    bomb = zlib.compress(b"[" + b" " * 2**27 + b"]", 9)
    body = bytearray(data[:-32])
    _, _, size, *_ = _START.unpack_from(body)
    body[_START.size : _START.size + size] = bomb
    body[12:16] = len(bomb).to_bytes(4, "little")
    with pytest.raises(ValueError, match="too long"):
        unpack(with_checksum(bytes(body)))


def test_a_continuous_model_is_rejected() -> None:
    model = NDM(
        LinearLogSNRSchedule(-5.0, 4.0), Identity(), Predictor(MLP(2, 8, 1)), GaussianDecoder()
    )
    with pytest.raises(UserError, match="continuous"):
        Chain(model, make_plan(model, 2, 1), (2,))
