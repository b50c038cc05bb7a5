"""Pronounceable names that do not exist, a different one for each number, and keyed random draws."""

from __future__ import annotations

import hashlib

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "tr")
_VOWELS = ("a", "e", "i", "o")
_SYLLABLES = tuple(onset + vowel for onset in _ONSETS for vowel in _VOWELS)
BITS = 6  # per syllable: 16 onsets times 4 vowels are 64
_ENDINGS = ("l", "n", "r", "s")
ROUNDS = 4  # of the Feistel network


def draw(*key: object) -> int:
    """Return a random 64-bit integer that depends on the string form of the key alone."""
    # The separator keeps ("a", "bc") and ("ab", "c") distinct. Python's own hash differs between processes.
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def shuffled(number: int, bits: int, *key: object) -> int:
    """Return the image of a number under a keyed random permutation of all `bits`-bit numbers.

    It is a Feistel network, so numbers that differ stay different without a table. `bits` must be even.
    """
    half = bits // 2
    mask = (1 << half) - 1
    high, low = number >> half, number & mask
    for round_ in range(ROUNDS):
        high, low = low, high ^ (draw(*key, round_, low) & mask)
    return (high << half) | low


def word(number: int, bits: int) -> str:
    """Return the capitalized word, of two or more syllables, that spells a `bits`-bit number."""
    count = max(2, -(-bits // BITS))
    parts = [_SYLLABLES[(number >> (BITS * i)) & (len(_SYLLABLES) - 1)] for i in range(count)]
    # The final consonant makes words sound less alike. It follows from the number and adds no information.
    return ("".join(parts) + _ENDINGS[number % len(_ENDINGS)]).capitalize()
