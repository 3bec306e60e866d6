r"""Bits-back coding with asymmetric numeral systems (Townsend et al. 2019) over the latents of the
T-step model.

A stack of bits. To encode a batch of images x,

.. math::
    \text{pop } z_1 \sim q(z_1|x), \quad \text{pop } z_{i-1} \sim q(z_{i-1}|z_i, x) \text{ for } i = T \dots 1, \quad
    \text{push } x \text{ by } p(x|z_0), \quad \text{push } z_{i-1} \text{ by } p(z_{i-1}|z_i) \text{ for } i = 1 \dots T, \quad
    \text{push } z_1 \text{ by } p(z_1) .

Every pop gives back bits that the pushes have spent, so a batch costs its discrete-time NELBO on
average. The decoder does the same backward. The first batch pops bits that nobody has pushed: the
initial bits, paid once and counted. They are the beginning of a fixed pseudo-random stream, so the
decoder ends with them and checks that it does.

The coder is constriction's, whose distributions have a finite reach and give every symbol in it a
probability of at least 2^-24. Both matter:

- q reaches 7 standard deviations about its own mean. With a wide reach its smallest probabilities would add up, and one latent in thousands
  would be popped anywhere in it, which spoils the predictions after it.
- p reaches 64 standard deviations of q about its own mean, and the mean of q is moved to where p reaches all of it. Both sides know both
  means when they need them. So any image can be coded, at whatever cost.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from ndm.apps.compress.chain import FINE, Chain, Rounding
from ndm.errors import require

NEAR, FAR = 7.0, 64.0
"""Reach of q and of p, in standard deviations of q."""
_SPARE = 8  # words below the lowest that was touched, kept so that the coder's state is never short


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    network: float = 0.0
    coder: float = 0.0

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the seconds spent inside."""
        started = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - started)


@dataclass(frozen=True)
class Coded:
    """What an encoder hands to a decoder besides the plan."""

    words: np.ndarray
    """The stack, uint32."""
    initial: int
    """How many words of it are initial bits."""
    exceptions: np.ndarray
    """Places where rounding was written down, ``(n, 2)``, int64."""
    clock: Clock = field(default_factory=Clock, compare=False)


class OutOfBits(Exception):
    """The initial bits were used up."""


class Stack:
    """constriction's ANS coder with latents and values as symbols.

    Args:
        words: the bits that it starts with, uint32.
        width: w, width of a cell in standard deviations of q.
    """

    def __init__(self, words: np.ndarray, width: float):
        require("constriction", "constriction", "compress")
        import constriction

        model = constriction.stream.model
        self._coder = constriction.stream.stack.AnsCoder(words)
        self.near, self.far = math.ceil(NEAR / width), math.ceil(FAR / width)
        self._families = {
            reach: model.QuantizedGaussian(-reach, reach) for reach in (self.near, self.far)
        }
        self._categorical = model.Categorical(perfect=False)
        self.lowest = len(words)

    def pop(self, mean: np.ndarray, std: float, reach: int) -> np.ndarray:
        """Whole numbers, float64, by Gaussians in cells; all ``(n,)``."""
        center = _center(mean)
        symbols = self._coder.decode(self._families[reach], mean - center, np.full(len(mean), std))
        self._note()
        return symbols + center

    def push(self, values: np.ndarray, mean: np.ndarray, std: float, reach: int) -> None:
        """The inverse of :meth:`pop`.

        Raises:
            ValueError: a value is out of reach; only a damaged archive leads there.
        """
        center = _center(mean)
        if not (np.abs(values - center) <= reach).all():
            raise ValueError("a latent is out of reach")
        symbols = (values - center).astype(np.int32)
        self._coder.encode_reverse(
            symbols, self._families[reach], mean - center, np.full(len(mean), std)
        )

    def within_reach(self, target: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Means of q, moved to where p about ``mean`` reaches all that q reaches."""
        most = self.far - self.near - 1
        return mean + np.clip(target - mean, -most, most)

    def pop_values(self, probabilities: np.ndarray) -> np.ndarray:
        """Levels by their probabilities ``(n, L)``; ``(n,)``."""
        values = self._coder.decode(self._categorical, probabilities)
        self._note()
        return values

    def push_values(self, values: np.ndarray, probabilities: np.ndarray) -> None:
        """The inverse of :meth:`pop_values`."""
        self._coder.encode_reverse(values.astype(np.int32), self._categorical, probabilities)

    def words(self) -> np.ndarray:
        """The bits on the stack, uint32."""
        return self._coder.get_compressed()

    def __len__(self) -> int:
        return self._coder.num_words()

    def _note(self) -> None:
        self.lowest = min(self.lowest, len(self))
        if self.lowest < _SPARE:
            raise OutOfBits


def _center(mean: np.ndarray) -> np.ndarray:
    """The nearest cell.

    Raises:
        ValueError: there is none; a damaged archive may lead there.
    """
    if not (np.abs(mean) < 2.0**50).all():
        raise ValueError("a latent is out of range")
    return np.floor(mean + 0.5)


def initial_words(count: int) -> np.ndarray:
    """The last of these is the first of a fixed stream, and so on down: a shorter beginning is the
    top of a longer one; uint32.
    """
    stream = np.frombuffer(
        hashlib.shake_256(b"ndm initial bits").digest(4 * count), dtype="<u4"
    ).astype(np.uint32)
    stream[:1] |= 1  # the word on top must not be zero
    return stream[::-1].copy()


def encode(chain: Chain, index: np.ndarray, progress: bool = False) -> Coded:
    """Encode images.

    Args:
        chain: model and plan.
        index: values 0 ... L-1 of N images, ``(N, D)``.
        progress: show a progress bar with the running rate.

    Raises:
        UserError: the model's output is not finite.
    """
    plan = chain.plan
    room = (
        64 + plan.batch * chain.dims * (plan.steps + 1) // 4
    )  # words; a cell of half a deviation takes three bits
    while True:
        stack, rounding, clock = Stack(initial_words(room), plan.width), Rounding(), Clock()
        try:
            with tqdm(
                total=len(index),
                desc="compressing",
                unit="image",
                disable=not progress,
                delay=1,
                leave=False,
            ) as bar:
                for number in batch_numbers(len(index), plan.batch):
                    part = batch(number, len(index), plan.batch)
                    _encode_batch(
                        chain, stack, index[part].reshape(-1), rounding, number * chain.calls, clock
                    )
                    bar.update(part.stop - part.start)
                    bar.set_postfix_str(
                        f"{32 * (len(stack) - room) / (part.stop * chain.dims):.3f} bits/dim"
                    )
            break
        except OutOfBits:
            room *= 2
    untouched = stack.lowest - _SPARE
    words = stack.words()[untouched:]
    return Coded(words, room - untouched, rounding.exceptions(), clock)


def decode(chain: Chain, coded: Coded, count: int, progress: bool = False) -> np.ndarray:
    """Decode what :func:`encode` made.

    Memory grows with what the bits really decode to, not with the count that an archive claims.

    Returns:
        Levels ``(N, D)``, uint16.

    Raises:
        ValueError: the words do not decode to where an encoder started; the archive is damaged, or
            the model or machine differs.
    """
    stack, rounding = Stack(coded.words, chain.plan.width), Rounding(coded.exceptions)
    values: list[np.ndarray] = []
    try:
        bar = tqdm(
            total=count,
            desc="decompressing",
            unit="image",
            disable=not progress,
            delay=1,
            leave=False,
        )
        with bar, np.errstate(over="ignore", invalid="ignore"):  # damaged bits may lead anywhere
            for number in reversed(batch_numbers(count, chain.plan.batch)):
                part = batch(number, count, chain.plan.batch)
                images = part.stop - part.start
                found = _decode_batch(
                    chain, stack, images * chain.dims, rounding, number * chain.calls, coded.clock
                )
                values.append(found.reshape(images, chain.dims).astype(np.uint16))
                bar.update(images)
    except OutOfBits as error:
        raise ValueError("it holds too few bits") from error
    if len(stack) != coded.initial or not np.array_equal(
        stack.words(), initial_words(coded.initial)
    ):
        raise ValueError("its bits do not end where the encoder began")
    return np.concatenate(values[::-1])


def batch_numbers(count: int, size: int) -> range:
    """Numbers of the batches of ``count`` images."""
    return range(-(-count // size))


def batch(number: int, count: int, size: int) -> slice:
    """Images of a batch; the incomplete one is the first, which pops the fewest of the initial
    bits.
    """
    stop = count - (len(batch_numbers(count, size)) - 1 - number) * size
    return slice(max(0, stop - size), stop)


def _encode_batch(
    chain: Chain, stack: Stack, index: np.ndarray, rounding: Rounding, call: int, clock: Clock
) -> None:
    plan, zero, unit = chain.plan, np.zeros(len(index)), 1 / chain.plan.width
    with clock.on("network"):
        transformed = chain.transformed(index)
        start = chain.first(transformed)
    with clock.on("coder"):
        latents = [
            stack.pop(stack.within_reach(rounding(start, call) / FINE, zero), unit, stack.near)
        ]
    means = []
    for step in range(plan.steps, 0, -1):
        with clock.on("network"):
            guess = chain.predicted(latents[-1], step)
            truth = chain.pull(transformed[step - 1], transformed[step], step)
        with clock.on("coder"):
            mean = chain.mean(rounding(guess, call + step), latents[-1], step)
            target = chain.mean(rounding(truth, call + plan.steps + step), latents[-1], step)
            latents.append(stack.pop(stack.within_reach(target, mean), unit, stack.near))
            means.append(mean)
    with clock.on("coder"):
        stack.push_values(index, chain.probabilities(latents[-1]))
        for step in range(1, plan.steps + 1):
            stack.push(latents.pop(), means.pop(), plan.spread[step - 1], stack.far)
        stack.push(latents.pop(), zero, 1 / plan.delta[-1], stack.far)


def _decode_batch(
    chain: Chain, stack: Stack, size: int, rounding: Rounding, call: int, clock: Clock
) -> np.ndarray:
    plan, zero, unit = chain.plan, np.zeros(size), 1 / chain.plan.width
    latents = [stack.pop(zero, 1 / plan.delta[-1], stack.far)]
    means = []
    for step in range(plan.steps, 0, -1):
        with clock.on("network"):
            guess = chain.predicted(latents[-1], step)
        with clock.on("coder"):
            means.append(chain.mean(rounding(guess, call + step), latents[-1], step))
            latents.append(stack.pop(means[-1], plan.spread[step - 1], stack.far))
    with clock.on("coder"):
        index = stack.pop_values(chain.probabilities(latents[-1]))
    with clock.on("network"):
        transformed = chain.transformed(index)
    for step in range(1, plan.steps + 1):
        with clock.on("network"):
            truth = chain.pull(transformed[step - 1], transformed[step], step)
        with clock.on("coder"):
            value, mean = latents.pop(), means.pop()
            target = chain.mean(rounding(truth, call + plan.steps + step), latents[-1], step)
            stack.push(value, stack.within_reach(target, mean), unit, stack.near)
    with clock.on("network"):
        start = chain.first(transformed)
    stack.push(
        latents.pop(), stack.within_reach(rounding(start, call) / FINE, zero), unit, stack.near
    )
    return index
