"""Damage to files: single bits, bytes, blocks, cut ends, and pieces that parsers trip over."""

import random
from collections.abc import Callable

PIECES = (
    b"",
    b"\x00",
    b"\xff" * 8,
    b"NaN",
    b"-1",
    b"1e999",
    b"9" * 400,
    b"null",
    b"[" * 200,
    b"{" * 200,
    b"\n\n",
    b",,,",
    b'"',
    b"\xc3\x28",
    b"&a [*a]",
    b"!!int x",
    b"true",
    b"../../x",
)


def _flip(data: bytearray, random: random.Random) -> None:
    for _ in range(random.choice((1, 1, 1, 4, 32))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _replace(data: bytearray, random: random.Random) -> None:
    start = random.randrange(len(data))
    data[start : start + random.randrange(1, 9)] = random.choice(PIECES)


def _insert(data: bytearray, random: random.Random) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = random.choice(PIECES)


def _cut(data: bytearray, random: random.Random) -> None:
    del data[random.randrange(len(data)) :]


def _drop(data: bytearray, random: random.Random) -> None:
    start = random.randrange(len(data))
    del data[start : start + random.randrange(1, 65)]


def _repeat(data: bytearray, random: random.Random) -> None:
    start = random.randrange(len(data))
    block = data[start : start + random.randrange(1, 129)]
    data[start:start] = block * random.choice((1, 1, 2, 50))


def _zero(data: bytearray, random: random.Random) -> None:
    start, size = random.randrange(len(data)), random.randrange(1, 33)
    data[start : start + size] = bytes(len(data[start : start + size]))


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _replace,
    _insert,
    _cut,
    _drop,
    _repeat,
    _zero,
)


def mutate(data: bytes, random: random.Random) -> bytes:
    """Return the bytes with one to three mutations, most of them near the start or the end."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3))):
        if not changed:
            break
        where = random.random()
        if where < 0.5 and len(changed) > 512:  # headers are there
            side = slice(0, 512) if where < 0.3 else slice(len(changed) - 512, len(changed))
            part = changed[side]
            random.choice(MUTATIONS)(part, random)
            changed[side] = part
        else:
            random.choice(MUTATIONS)(changed, random)
    return bytes(changed)
