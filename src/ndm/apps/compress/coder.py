r"""Bits-back coding with asymmetric numeral systems over the latents of the T-step model.

The method is that of Townsend et al. (2019). The coder is a stack of bits. To encode a batch of
images x,

.. math::
    &\text{pop } z_1 \sim q(z_1|x), \\
    &\text{pop } z_{i-1} \sim q(z_{i-1}|z_i, x) \text{ for } i = T \dots 1, \\
    &\text{push } x \text{ by } p(x|z_0), \\
    &\text{push } z_{i-1} \text{ by } p(z_{i-1}|z_i) \text{ for } i = 1 \dots T, \\
    &\text{push } z_1 \text{ by } p(z_1) .

Every pop recovers bits that pushes have spent, so a batch costs its discrete-time NELBO on average.
The decoder does the same backward. The first batch pops bits that no push has written: the initial
bits, paid once per archive and included in its size. They are the bytes of the first images, coded
without the model (:mod:`ndm.apps.compress.lead`), and, where these do not suffice, the beginning of
a fixed pseudo-random stream. The decoder checks that it ends with them.

The coder is that of constriction. Its distributions have a finite reach and give every symbol
within it a probability of at least 2^-24:

- q reaches 7 standard deviations around its mean. With a wider reach its smallest probabilities
  would add up, and one latent in thousands would be popped from anywhere in it, which spoils the
  predictions that follow.
- p reaches 64 standard deviations of q around its mean, and the mean of q is moved until p covers
  the reach of q. Encoder and decoder have both means when they need them. So any image can be
  coded, although perhaps at a high cost.
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
from ndm.apps.compress.lead import decode_lead, encode_lead, from_words, to_words
from ndm.errors import require

NEAR, FAR = 7.0, 64.0
"""Reach of q and of p, in standard deviations of q."""
_SPARE = 8  # words stored below the lowest that was read, so that the coder's state is never short


@dataclass
class Clock:
    """Seconds spent in the networks and in the coder."""

    network: float = 0.0
    """Seconds in the networks."""
    coder: float = 0.0
    """Seconds in the coder."""

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Add the seconds spent in the block to ``network`` or ``coder``."""
        started = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - started)


@dataclass(frozen=True)
class Coded:
    """The output of the encoder, for the decoder."""

    words: np.ndarray
    """The stack, uint32."""
    initial: int
    """Number of words of the stack that are initial bits."""
    lead_words: int
    """Number of these words that hold the first images, the last ones."""
    exceptions: np.ndarray
    """Recorded roundings (:class:`ndm.apps.compress.chain.Rounding`), ``(n, 2)``, int64."""
    clock: Clock = field(default_factory=Clock, compare=False)
    """Time spent by the encoder; the decoder adds its own."""


class OutOfBits(Exception):
    """The initial bits are used up."""


class Stack:
    """constriction's ANS coder with latents and levels as symbols.

    Args:
        words: the bits on the stack at the start, uint32.
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

    def pop(self, mean: np.ndarray, std: float | np.ndarray, reach: int) -> np.ndarray:
        """Pop integers, float64, with Gaussian distributions in cells; all ``(n,)``."""
        center, deviations = _center(mean), np.full(len(mean), std)
        symbols = self._coder.decode(self._families[reach], mean - center, deviations)
        self._note()
        return symbols + center

    def push(
        self, values: np.ndarray, mean: np.ndarray, std: float | np.ndarray, reach: int
    ) -> None:
        """Push integers, the inverse of :meth:`pop`.

        Raises:
            ValueError: a value is out of reach, which only happens with a damaged archive.
        """
        center = _center(mean)
        if not (np.abs(values - center) <= reach).all():
            raise ValueError("a latent is out of reach")
        symbols = (values - center).astype(np.int32)
        self._coder.encode_reverse(
            symbols, self._families[reach], mean - center, np.full(len(mean), std)
        )

    def within_reach(self, target: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Return the means of q, moved until p around ``mean`` covers the reach of q."""
        most = self.far - self.near - 1
        return mean + np.clip(target - mean, -most, most)

    def pop_values(self, probabilities: np.ndarray) -> np.ndarray:
        """Pop levels, ``(n,)``, with probabilities ``(n, L)``."""
        values = self._coder.decode(self._categorical, probabilities)
        self._note()
        return values

    def push_values(self, values: np.ndarray, probabilities: np.ndarray) -> None:
        """Push levels, the inverse of :meth:`pop_values`."""
        self._coder.encode_reverse(values.astype(np.int32), self._categorical, probabilities)

    def words(self) -> np.ndarray:
        """Return the bits on the stack, uint32."""
        return self._coder.get_compressed()

    def __len__(self) -> int:
        return self._coder.num_words()

    def _note(self) -> None:
        self.lowest = min(self.lowest, len(self))
        if self.lowest < _SPARE:
            raise OutOfBits


def _center(mean: np.ndarray) -> np.ndarray:
    """Return the nearest cell.

    Raises:
        ValueError: the mean is not finite or too large, which a damaged archive may cause.
    """
    if not (np.abs(mean) < 2.0**50).all():
        raise ValueError("a latent is out of range")
    return np.floor(mean + 0.5)


def initial_words(count: int) -> np.ndarray:
    """Return the first ``count`` words of a fixed stream in reverse order, uint32.

    The stack of a small count is thus the top of the stack of a larger count.
    """
    data = hashlib.shake_256(b"ndm initial bits").digest(4 * count)
    stream = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    stream[:1] |= 1  # the word on top must not be zero
    return stream[::-1].copy()


def encode(chain: Chain, index: np.ndarray, lead: int = 0, progress: bool = False) -> Coded:
    """Encode images.

    Args:
        chain: model and plan.
        index: levels 0 ... L-1 of N images, ``(N, D)``.
        lead: number of images to code without the model, the first ones; their bytes are initial
            bits.
        progress: whether to show a progress bar with the current rate.

    Raises:
        UserError: the model's output is not finite.
    """
    plan, first = chain.plan, np.zeros(0, dtype=np.uint32)
    if lead:
        first = to_words(encode_lead(index[:lead], chain.event_shape, len(chain.values)))
        index = index[lead:]
    # In words: a cell of half a standard deviation takes three bits.
    room = 64 + plan.batch * chain.dims * (plan.steps + 1) // 4
    while True:
        start = np.concatenate([initial_words(room), first])
        stack, rounding, clock = Stack(start, plan.width), Rounding(), Clock()
        try:
            with _progress_bar("compressing", len(index), progress) as bar:
                for number in batch_numbers(len(index), plan.batch):
                    part = batch(number, len(index), plan.batch)
                    levels = index[part].reshape(-1).astype(np.int64)
                    call = number * chain.calls
                    _encode_batch(chain, stack, levels, rounding, call, clock)
                    bar.update(part.stop - part.start)
                    rate = 32 * (len(stack) - len(start)) / (part.stop * chain.dims)
                    bar.set_postfix_str(f"{rate:.3f} bits/dim")
            break
        except OutOfBits:
            room *= 2
    untouched = min(stack.lowest - _SPARE, room)
    words, initial = stack.words()[untouched:], len(start) - untouched
    return Coded(words, initial, len(first), rounding.exceptions(), clock)


def decode(
    chain: Chain, coded: Coded, count: int, lead: int = 0, progress: bool = False
) -> np.ndarray:
    """Decode the output of :func:`encode`.

    Memory grows with the number of images decoded so far, not with the declared ``count``.

    Args:
        chain: model and plan.
        coded: output of the encoder.
        count: number of images.
        lead: number of images that are coded without the model.
        progress: whether to show a progress bar.

    Returns:
        Levels ``(N, D)``, uint16.

    Raises:
        ValueError: the decoder does not end where the encoder started: the archive is damaged, or
            the model or the machine differs.
    """
    stack, rounding = Stack(coded.words, chain.plan.width), Rounding(coded.exceptions)
    values: list[np.ndarray] = []
    count -= lead
    try:
        bar = _progress_bar("decompressing", count, progress)
        with bar, np.errstate(over="ignore", invalid="ignore"):  # damaged bits may overflow
            for number in reversed(batch_numbers(count, chain.plan.batch)):
                part = batch(number, count, chain.plan.batch)
                images, call = part.stop - part.start, number * chain.calls
                size = images * chain.dims
                levels = _decode_batch(chain, stack, size, rounding, call, coded.clock)
                values.append(levels.reshape(images, chain.dims).astype(np.uint16))
                bar.update(images)
    except OutOfBits as error:
        raise ValueError("it holds too few bits") from error
    words, below = stack.words(), coded.initial - coded.lead_words
    same = len(words) == coded.initial and np.array_equal(words[:below], initial_words(below))
    if not same or bool(lead) != bool(coded.lead_words):
        raise ValueError("its bits do not end where the encoder began")
    if lead:
        data = from_words(words[below:])
        values.append(decode_lead(data, lead, chain.event_shape, len(chain.values)))
    return np.concatenate(values[::-1])


def _progress_bar(title: str, count: int, show: bool) -> tqdm:
    return tqdm(total=count, desc=title, unit="image", disable=not show, delay=1, leave=False)


def batch_numbers(count: int, size: int) -> range:
    """Return the numbers of the batches of ``count`` images."""
    return range(-(-count // size) if count else 0)


def batch(number: int, count: int, size: int) -> slice:
    """Return the images of a batch.

    The first batch is the incomplete one, because it then pops the fewest initial bits.
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
        mean = stack.within_reach(rounding(start, call) / FINE, zero)
        latents = [stack.pop(mean, unit, stack.near)]
    guesses = []
    for step in range(plan.steps, 0, -1):
        with clock.on("network"):
            guess = chain.predicted(latents[-1], step)
            truth = chain.pull(transformed[step - 1], transformed[step], step)
        with clock.on("coder"):
            guesses.append(_rounded(chain, guess, latents[-1], step, rounding, call))
            target = chain.mean(rounding(truth, call + plan.steps + step), latents[-1], step)
            mean = stack.within_reach(target, guesses[-1][0])
            latents.append(stack.pop(mean, unit, stack.near))
    with clock.on("coder"):
        stack.push_values(index, chain.probabilities(latents[-1]))
        while guesses:
            stack.push(latents.pop(), *guesses.pop(), stack.far)
        stack.push(latents.pop(), zero, 1 / plan.delta[-1], stack.far)


def _rounded(
    chain: Chain,
    guess: tuple[np.ndarray, np.ndarray | None],
    latent: np.ndarray,
    step: int,
    rounding: Rounding,
    call: int,
) -> tuple[np.ndarray, float | np.ndarray]:
    """Return mean and standard deviation of p(n_{i-1}|n_i) in cells for the output of a network."""
    mean = chain.mean(rounding(guess[0], call + step), latent, step)
    if guess[1] is None:
        return mean, chain.spread(None, step)
    return mean, chain.spread(rounding(guess[1], call + 2 * chain.plan.steps + step), step)


def _decode_batch(
    chain: Chain, stack: Stack, size: int, rounding: Rounding, call: int, clock: Clock
) -> np.ndarray:
    plan, zero, unit = chain.plan, np.zeros(size), 1 / chain.plan.width
    latents = [stack.pop(zero, 1 / plan.delta[-1], stack.far)]
    guesses = []
    for step in range(plan.steps, 0, -1):
        with clock.on("network"):
            guess = chain.predicted(latents[-1], step)
        with clock.on("coder"):
            guesses.append(_rounded(chain, guess, latents[-1], step, rounding, call))
            latents.append(stack.pop(*guesses[-1], stack.far))
    with clock.on("coder"):
        index = stack.pop_values(chain.probabilities(latents[-1]))
    with clock.on("network"):
        transformed = chain.transformed(index)
    for step in range(1, plan.steps + 1):
        with clock.on("network"):
            truth = chain.pull(transformed[step - 1], transformed[step], step)
        with clock.on("coder"):
            value, mean = latents.pop(), guesses.pop()[0]
            target = chain.mean(rounding(truth, call + plan.steps + step), latents[-1], step)
            stack.push(value, stack.within_reach(target, mean), unit, stack.near)
    with clock.on("network"):
        start = chain.first(transformed)
    mean = stack.within_reach(rounding(start, call) / FINE, zero)
    stack.push(latents.pop(), mean, unit, stack.near)
    return index
