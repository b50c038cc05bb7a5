"""Names that nobody has heard of: pronounceable words, a different one for each number."""

from __future__ import annotations

import hashlib

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr")
_VOWELS = ("a", "e", "i", "o")
_SYLLABLES = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
BITS = 6  # of a syllable
_ENDINGS = ("l", "n", "r", "s")
ROUNDS = 4


def draw(*key: object) -> int:
    """A number of 64 bits that depends on the key alone."""
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def shuffled(number: int, bits: int, *key: object) -> int:
    """Another number of as many bits, a different one for each: a Feistel network. `bits` is even."""
    half = bits // 2
    left, right = number >> half, number & ((1 << half) - 1)
    for turn in range(ROUNDS):
        left, right = right, left ^ (draw(*key, turn, right) & ((1 << half) - 1))
    return (left << half) | right


def word(number: int, bits: int) -> str:
    """A capitalised word of two syllables or more for each number of so many bits."""
    count = max(2, -(-bits // BITS))
    parts = [_SYLLABLES[(number >> (BITS * i)) & (len(_SYLLABLES) - 1)] for i in range(count)]
    # The ending depends on the number, too, so that it tells nothing more; words end less alike.
    return ("".join(parts) + _ENDINGS[number % len(_ENDINGS)]).capitalize()
