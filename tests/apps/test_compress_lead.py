"""The first images of an archive, whose bytes are the initial bits."""

import itertools

import numpy as np
import pytest

from apps.test_compress import make_model
from ndm.apps.compress.chain import Chain, make_plan
from ndm.apps.compress.choose import choose_plan
from ndm.apps.compress.coder import decode, encode
from ndm.apps.compress.lead import (
    LeadCost,
    best_lead,
    decode_lead,
    encode_lead,
    from_words,
    to_words,
)
from ndm.model import NDM

SHAPES = [((3, 5, 4), 256), ((1, 6, 6), 17), ((3, 2, 9), 200), ((7,), 256), ((2, 3), 1000)]


def smooth(count: int, shape: tuple[int, ...], num_values: int, seed: int = 0) -> np.ndarray:
    """Levels of images that are ramps with a little noise, ``(N, D)``."""
    generator = np.random.default_rng(seed)
    ramp = np.add.outer(generator.integers(0, 9, count), np.arange(np.prod(shape)) // 4)
    return (ramp + generator.integers(0, 2, ramp.shape)) % num_values


@pytest.mark.parametrize(("shape", "num_values"), SHAPES)
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_the_first_images_come_back(shape: tuple[int, ...], num_values: int, count: int) -> None:
    noise = np.random.default_rng(count).integers(0, num_values, (count, int(np.prod(shape))))
    for index in (noise, smooth(count, shape, num_values), np.zeros_like(noise)):
        data = encode_lead(index, shape, num_values)
        np.testing.assert_array_equal(decode_lead(data, count, shape, num_values), index)
        words = to_words(data)
        assert words.dtype == np.uint32 and words[-1] == 1 and from_words(words) == data
    assert len(encode_lead(smooth(30, shape, num_values), shape, num_values)) < 30 * noise.shape[1]


def test_their_bits_look_random() -> None:
    """Popping needs random bits; those of an encoder are not, especially at its start."""
    words = to_words(bytes(40_000))[:-1]
    ones = np.unpackbits(words.view(np.uint8)).astype(float)
    assert abs(ones.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(ones))
    assert len(np.unique(words)) > 0.99 * len(words)


def test_damaged_bytes_are_rejected() -> None:
    shape, index = (3, 5, 4), smooth(9, (3, 5, 4), 256)
    good = encode_lead(index, shape, 256)
    zipped = encode_lead(index[:, :7], (7,), 256)
    generator = np.random.default_rng(0)
    for data, event in ((good, shape), (zipped, (7,))):
        for _ in range(300):
            damaged = bytearray(data)
            damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
            cut = bytes(damaged[: generator.integers(1, len(data) + 1)])
            try:
                found = decode_lead(cut, 9, event, 256)
            except ValueError:
                continue
            assert found.shape == (9, int(np.prod(event)))
    for count, event, values in ((8, shape, 256), (9, (3, 4, 5), 256), (9, shape, 3)):
        with pytest.raises(ValueError, match="first images"):
            decode_lead(good, count, event, values)
    for words in (np.zeros(0), np.array([1]), to_words(good)[:-1], to_words(good)[1:]):
        with pytest.raises(ValueError, match="first images"):
            from_words(words.astype(np.uint32))


@pytest.mark.parametrize("lead", [0, 1, 5, 12])
def test_archives_with_first_images_come_back(lead: int) -> None:
    model, shape = make_model((1, 4, 4), 16, 2), (1, 4, 4)
    index = smooth(12, shape, 16)
    chain = Chain(model, make_plan(model, 3, 2), shape)
    coded = encode(chain, index, lead)
    assert (coded.lead_words > 0) == (lead > 0)
    np.testing.assert_array_equal(decode(chain, coded, 12, lead), index)
    if lead == 12:
        assert len(coded.words) == coded.initial == coded.lead_words
    elif lead:
        with pytest.raises(ValueError, match=r"do not end|first images|too few"):
            decode(chain, coded, 12, lead - 1)


def test_the_number_of_first_images_is_the_best_by_brute_force() -> None:
    for count, rate, lead_rate, batch in itertools.product(
        (1, 6, 40), (2.0, 5.0), (3.0, 4.5), (1, 8)
    ):
        each, dims = 900.0, 50

        def bits(k: int, *_: object) -> float:
            initial = max(k * dims * lead_rate, min(batch, count - k) * each)  # noqa: B023
            return (count - k) * dims * rate + initial  # noqa: B023

        k, initial, total = best_lead(count, dims, rate, LeadCost(dims * lead_rate), batch, each)
        assert total == pytest.approx(min(map(bits, range(count + 1)))) == bits(k)
        assert total == pytest.approx((count - k) * dims * rate + initial)


def test_the_first_images_shorten_small_archives() -> None:
    shape = (1, 4, 4)
    index, model = smooth(20, shape, 16), make_model(shape, 16, 2)
    plan, chosen = choose_plan(model, index, shape)
    assert chosen.lead
    with_lead, without = (
        len(encode(Chain(model, plan, shape), index, lead).words) for lead in (chosen.lead, 0)
    )
    assert with_lead < 0.8 * without


def test_a_model_whose_eta_forbids_long_steps_is_compressed() -> None:
    shape = (1, 4, 4)
    plain = make_model(shape, 16, 0)
    model = NDM(plain.schedule, plain.transform, plain.predictor, plain.decoder, eta=1.2).eval()
    index = smooth(30, shape, 16)
    plan, chosen = choose_plan(model, index, shape)
    coded = encode(Chain(model, plan, shape), index, chosen.lead)
    found = decode(Chain(model, plan, shape), coded, 30, chosen.lead)
    np.testing.assert_array_equal(found, index)
    assert plan.steps > 1
