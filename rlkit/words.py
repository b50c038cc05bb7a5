"""Words of strings in any language, also in scripts that are written without spaces between words.

In such a script (Chinese, Japanese, Thai, Lao, Khmer, Burmese, …), each character with its combining marks
counts as a word. Nothing is segmented with a dictionary. Korean is written with spaces, and only `keywords`
splits its words.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import pairwise

MAX_WORD_LENGTH = 40  # characters; hardly a word of any language is longer, but URLs and encoded data are

# Blocks with the scripts that are written without spaces between words, except for ideographs.
_BLOCKS = (
    range(0x0E00, 0x1000),  # Thai, Lao, Tibetan
    range(0x1000, 0x10A0),  # Burmese
    range(0x1780, 0x1800),  # Khmer
    range(0x1950, 0x1A00),  # Tai Le, New Tai Lue
    range(0x1A20, 0x1AB0),  # Tai Tham
    range(0x1B00, 0x1B80),  # Balinese
    range(0x3000, 0x3130),  # punctuation and repetition marks, Hiragana, Katakana, Bopomofo
    range(0x31A0, 0x3200),  # extensions of Bopomofo and Katakana
    range(0xA980, 0xAA00),  # Javanese, extensions of Burmese
    range(0xAA60, 0xAAE0),  # extensions of Burmese, Tai Viet
    range(0xFE10, 0xFE20),  # vertical punctuation
    range(0xFE30, 0xFE70),  # vertical and small punctuation
    range(0xFF5F, 0xFFA0),  # half-width punctuation and Katakana
    range(0x11700, 0x11750),  # Ahom
    range(0x1AFF0, 0x1B170),  # extensions of Kana
)
_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HANGUL = "\uac00-\ud7a3"


def _characters(blocks: Iterable[range], *categories: str) -> str:
    """Return the characters of these Unicode categories."""
    codes = (code for block in blocks for code in block)
    return "".join(chr(code) for code in codes if unicodedata.category(chr(code)) in categories)


def _ranges(characters: str) -> str:
    """Return the ranges of characters for use in `[...]`, which compile faster than single characters."""
    codes = set(map(ord, characters))
    firsts = sorted(code for code in codes if code - 1 not in codes)
    lasts = sorted(code for code in codes if code + 1 not in codes)
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in zip(firsts, lasts, strict=True))


# Letters and combining marks of these scripts, for use in `[...]`. Digits are not among them.
UNSPACED = _IDEOGRAPHS + _ranges(_characters(_BLOCKS, "Lo", "Lm", "Nl"))
MARKS = _ranges(_characters(_BLOCKS, "Mn", "Mc"))
# Punctuation of these scripts, without the full-width forms of ASCII.
PUNCTUATION = _characters(_BLOCKS, "Po", "Ps", "Pe", "Pi", "Pf", "Pd", "Pc")
# Characters without a width: soft hyphen, word joiners, possible line breaks, variants of an ideograph.
_INVISIBLE = "\u00ad\u200b-\u200d\u2060\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef"

_UNSPACED = re.compile(f"[{UNSPACED}]")
_INVISIBLE_INSIDE = re.compile(f"(?<=[{UNSPACED}{MARKS}])[{_INVISIBLE}]+(?=[{UNSPACED}])")
# `\w` has no combining marks, without which the words of Hindi and the characters of Thai would fall apart.
_ALL_MARKS = _ranges(_characters((range(0x0300, 0x2000), range(0xA66F, 0xAC00)), "Mn", "Mc")) + MARKS
_CHUNK = re.compile(rf"\w[\w{_ALL_MARKS}]*")
_WORD = re.compile(f"[{UNSPACED}][{MARKS}]*|[^{UNSPACED}]+")
_MIDDLE_DOTS = "\u00b7\u2027"  # between the parts of a name, which may also be written without them
# The lookbehind keeps a long sequence of invisible characters from taking quadratic time.
_RUN = re.compile(
    f"(?<![{_INVISIBLE}{_MIDDLE_DOTS}])[{_INVISIBLE}{_MIDDLE_DOTS}]*+"
    f"[{UNSPACED}][{UNSPACED}{MARKS}{_INVISIBLE}{_MIDDLE_DOTS}]*"
)
_WITHOUT_MEANING = re.compile(f"[{_INVISIBLE}{_MIDDLE_DOTS}]")
_SEARCHED_AS_BIGRAMS = re.compile(f"[{UNSPACED}{_HANGUL}]")
_CHARACTER = re.compile(f"[{UNSPACED}{_HANGUL}][{MARKS}]*")
_RUN_OR_WORD = re.compile(f"(?:[{UNSPACED}{_HANGUL}][{MARKS}]*)+|[^{UNSPACED}{_HANGUL}]+")
# The parts of a string without white space, each of which counts as a word. Those that follow the first one
# of a long word are short, because encoded data has many tokens.
_COUNTED = re.compile(
    f"[{UNSPACED}][{MARKS}]{{0,4}}"
    f"|(?<![^{UNSPACED}{MARKS}])[^{UNSPACED}]{{1,{MAX_WORD_LENGTH}}}|[^{UNSPACED}]{{1,8}}"
)


def has_unspaced(text: str) -> bool:
    """Return whether a string has a character of a script that is written without spaces."""
    return _UNSPACED.search(text) is not None


def separate_characters(text: str) -> str:
    """Return a string with spaces around each character of scripts without spaces, which is NFKC-normalized.

    Middle dots and invisible characters next to such characters are deleted. The others stay as they are.
    """

    def separated(run: re.Match[str]) -> str:
        characters = unicodedata.normalize("NFKC", _WITHOUT_MEANING.sub("", run[0]))
        return f" {' '.join(_WORD.findall(characters))} "

    return _RUN.sub(separated, text) if has_unspaced(text) else text


def words(text: str) -> list[str]:
    """Return the words of a string in order, NFKC-normalized and lowercased, without punctuation."""
    result: list[str] = []
    for chunk in _chunks(text):
        result += _WORD.findall(chunk) if has_unspaced(chunk) else [chunk]
    return result


def keywords(text: str, min_length: int = 1) -> list[str]:
    """Return the words by which a string is searched, NFKC-normalized and lowercased.

    A run of characters of scripts without spaces, or of Hangul, becomes its overlapping bigrams, as in
    Lucene's CJKAnalyzer, so that "巴黎" finds "巴黎是法国的首都". A run of one character is that character.
    Other words have at least `min_length` characters.
    """
    result: list[str] = []
    for chunk in _chunks(text):
        if chunk.isascii() or not _SEARCHED_AS_BIGRAMS.search(chunk):
            parts = [chunk] if len(chunk) >= min_length else []
        else:
            parts = [bigram for part in _RUN_OR_WORD.findall(chunk) for bigram in _bigrams(part, min_length)]
        result += parts
    return result


def _bigrams(part: str, min_length: int) -> list[str]:
    """Return the bigrams of a run, or a word in a list if it has at least `min_length` characters."""
    characters = _CHARACTER.findall(part)
    if not characters:
        return [part] if len(part) >= min_length else []
    return ["".join(pair) for pair in pairwise(characters)] or characters


def are_plain_words(text: str) -> bool:
    """Return whether the keywords of a string are just its longest sequences of letters and digits."""
    return keywords(text) == re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())


def bigrams_overlap(keyword: str, next_keyword: str) -> bool:
    """Return whether two keywords are bigrams, and the last character of the first begins the second."""
    first, second = _CHARACTER.findall(keyword), _CHARACTER.findall(next_keyword)
    return len(first) == len(second) == 2 and first[1] == second[0]


def ngrams(text: str, length: int) -> Iterator[tuple[str, ...]]:
    """Yield the overlapping sequences of `length` words.

    A character of a script without spaces counts as half a word, because a word of Chinese has about two.
    """
    tokens = words(text)
    sizes = [1 if has_unspaced(token) else 2 for token in tokens]
    end = size = 0
    for start in range(len(tokens)):
        while size < 2 * length:
            if end == len(tokens):
                return
            size += sizes[end]
            end += 1
        yield tuple(tokens[start:end])
        size -= sizes[start]


def first_words(text: str, max_words: int) -> str:
    """Return the first words of a string, separated by single spaces.

    Words are separated by white space and keep their punctuation. Each character of a script without spaces
    counts as a word, and so do each 8 characters of a word beyond its first `MAX_WORD_LENGTH`, so the result
    is bounded for every string.
    """
    beginning: list[str] = []
    for word in text.split():
        if max_words <= 0:
            break
        counted = [word]
        if len(word) > MAX_WORD_LENGTH or has_unspaced(word):
            counted = _COUNTED.findall(word)
        beginning.append("".join(counted[:max_words]))
        max_words -= len(counted)
    return " ".join(beginning)


def truncate_words(text: str, max_words: int) -> str:
    """Return a string unchanged if it has at most `max_words` words, else its first words and "…".

    For what counts as a word, see `first_words`.
    """
    beginning = first_words(text, max_words)
    return text if beginning == " ".join(text.split()) else f"{beginning} …".lstrip()


def _chunks(text: str) -> list[str]:
    """Return the runs of letters, digits and combining marks."""
    text = unicodedata.normalize("NFKC", text).lower()
    if not text.isascii() and has_unspaced(text):
        text = _INVISIBLE_INSIDE.sub("", text)
    return _CHUNK.findall(text)
