"""A generated collection: buildings that do not exist, and queries whose relevant ones are known exactly.

Each building has a kind, a material, a builder's trade, a use and a region, and a text about it::

    Velmora Bridge
    Velmora Bridge is a viaduct. Trains cross it twice a day. It was made of grey stone by monks. It
    stands near the town of Tarinham.

A query asks for a set: "kind and region", "kind and material, not use", "kind of one region or another",
often in other words than the texts: "crossing" for a viaduct, or "in the Pelasmark valley" for the towns of
it, which only the judgments teach. Grade 2: all of it is so. Grade 1, of queries with three parts: the kind
is right and one of the other two. In a query of two hops a building is named, and others that are like it in
one way are asked for.

Building i depends on (seed, i), query i of a split on (seed, split, i); no meaning is in two splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.names import BITS, draw, shuffled, word
from rlkit.retrieval.documents import Document

QUERIES = {"train": 600, "dev": 100, "test": 200}
SHARES = {"train": (0, 6), "dev": (6, 7), "test": (7, 10)}  # of ten meanings
# For each value: words of the texts, and words of the queries.
KINDS = (
    (("bridge", "viaduct", "footbridge"), "crossing"),
    (("mill", "windmill", "watermill"), "place where grain was ground"),
    (("tower", "belfry", "keep"), "tall building"),
    (("inn", "tavern", "guest house"), "place to stay"),
    (("school", "academy", "college"), "place of learning"),
    (("chapel", "abbey", "church"), "place of worship"),
    (("barn", "granary", "warehouse"), "store"),
    (("theatre", "opera house", "playhouse"), "stage"),
)
MATERIALS = (
    (("granite", "grey stone"), "hard rock"),
    (("oak", "timber"), "wood"),
    (("brick", "baked clay"), "bricks"),
    (("iron", "cast metal"), "metal"),
    (("marble", "white stone"), "precious stone"),
)
BUILDERS = (
    (("monks", "the friars"), "the clergy"),
    (("soldiers", "a regiment"), "the army"),
    (("a guild of weavers", "cloth merchants"), "the textile trade"),
    (("a railway company", "railway engineers"), "the railways"),
    (("fishermen", "a fleet owner"), "people of the sea"),
)
USES = (
    (("a museum", "an exhibition hall"), "culture"),
    (("flats", "family homes"), "housing"),
    (("a clinic", "a hospital"), "health care"),
    (("offices", "the town council"), "administration"),
    (("a cafe", "a restaurant"), "dining"),
)
REGIONS = 8
TOWNS = 6  # of a region
FACETS = ("kind", "material", "builder", "use", "region")
_SIZES = (len(KINDS), len(MATERIALS), len(BUILDERS), len(USES), REGIONS)
_ASKED = (
    "{}",
    "made of {}",
    "put up by {}",
    "used today for {}",
    "in the {} valley",
)
_SHAPES = ("and", "and and", "not", "or", "like")
_TEXTS = (
    ("{name} is a {word}.", "This {word} is well known."),
    ("It was made of {word}.", "Its walls are of {word}."),
    ("It was built by {word}.", "{word} paid for it, as an inscription says."),
    ("Today it holds {word}.", "After repairs it became {word}."),
    ("It stands near the town of {word}.", "From {word} a path leads to it."),
)
_FILLERS = (
    "A storm damaged the roof in {year}.",
    "It is open from May to October.",
    "Painters have drawn it since {year}.",
    "A fair is held beside it each year.",
)


@dataclass(frozen=True)
class Wanted:
    """What a query asks for: values by facet, one that is excluded, and another one that is as good."""

    facets: tuple[tuple[int, int], ...]  # facet and value, the kind first
    excluded: tuple[int, int] | None = None
    other: tuple[int, int] | None = None  # instead of the last of `facets`


@dataclass(frozen=True)
class Buildings:
    """A generated collection of `size` buildings; raises UserError for fewer than 200."""

    size: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 200:
            raise UserError(f"a generated collection has at least 200 documents, not {self.size}")

    @cached_property
    def facets(self) -> np.ndarray:
        """The values of each building, (size, facets)."""
        rows = [
            [draw(self.seed, i, f) % n for f, n in zip(FACETS, _SIZES, strict=True)] for i in range(self.size)
        ]
        return np.array(rows)

    def name(self, i: int) -> str:
        """Unique in the collection."""
        bits = -(-(self.size.bit_length() + 1) // BITS) * BITS
        bits += bits % 2
        return word(shuffled(i, bits, self.seed, "building"), bits)

    def document(self, i: int) -> Document:
        """The text about a building."""
        sentences = []
        for facet, (value, texts) in enumerate(zip(self.facets[i], _TEXTS, strict=True)):
            text = texts[draw(self.seed, i, facet, "text") % len(texts)]
            sentences.append(text.format(name=self.name(i), word=self._word(i, facet, int(value))))
        for n in range(draw(self.seed, i, "fillers") % 3):
            filler = _FILLERS[draw(self.seed, i, "filler", n) % len(_FILLERS)]
            sentences.append(filler.format(year=1700 + draw(self.seed, i, "year", n) % 250))
        order = sorted(range(1, len(sentences)), key=lambda n: draw(self.seed, i, "order", n))
        text = " ".join(_capital(sentences[n]) for n in [0, *order])
        return Document(f"b{i}", self.name(i), text)

    def _word(self, i: int, facet: int, value: int) -> str:
        if FACETS[facet] == "region":
            return self.town(value, draw(self.seed, i, "town") % TOWNS)
        words = (KINDS, MATERIALS, BUILDERS, USES)[facet][value][0]
        return words[draw(self.seed, i, facet, "word") % len(words)]

    def town(self, region: int, number: int) -> str:
        """A town of a region."""
        return word(shuffled(region * TOWNS + number, 12, self.seed, "town"), 12) + "ham"

    def region(self, region: int) -> str:
        """What queries call a region; no text does."""
        return word(shuffled(region, 12, self.seed, "region"), 12) + "mark"

    def query(self, split: str, number: int) -> tuple[str, dict[str, int]]:
        """Text and grades of a query; the first of its draws that fits the split and finds something."""
        for attempt in range(1000):
            key = (self.seed, split, number, attempt)
            shape = _SHAPES[draw(*key, "shape") % len(_SHAPES)]
            wanted, anchor = self._wanted(key, shape)
            low, high = SHARES[split]
            if not low <= draw(self.seed, "meaning", wanted, anchor) % 10 < high:
                continue
            grades = self._grades(wanted, anchor)
            if 3 <= sum(grade == 2 for grade in grades.values()) <= self.size // 10:
                return self._text(wanted, anchor, key), grades
        raise UserError(f"a collection of {self.size} documents is too small for its queries: make it larger")

    def _wanted(self, key: tuple, shape: str) -> tuple[Wanted, int | None]:
        """What is asked for, and the building that is named."""
        values = [draw(*key, facet) % size for facet, size in zip(FACETS, _SIZES, strict=True)]
        order = sorted(range(1, len(FACETS)), key=lambda facet: draw(*key, "order", facet))
        first, second = order[:2]
        anchor = None
        if shape == "like":
            anchor = draw(*key, "anchor") % self.size
            values[first] = int(self.facets[anchor][first])
        asked = [values[first]]
        if shape == "or":
            asked.append((values[first] + 1 + draw(*key, "other") % (_SIZES[first] - 1)) % _SIZES[first])
            asked.sort()
        # One order for one meaning: it decides the split.
        facets = [(0, values[0]), (first, asked[0])]
        if shape == "and and":
            facets = sorted([*facets, (second, values[second])])
        excluded = (second, values[second]) if shape == "not" else None
        return Wanted(tuple(facets), excluded, (first, asked[1]) if shape == "or" else None), anchor

    def _grades(self, wanted: Wanted, anchor: int | None) -> dict[str, int]:
        """2 and 1 by document; those that are not there are 0."""
        holds = np.stack([self.facets[:, facet] == value for facet, value in wanted.facets])
        if wanted.other is not None:
            holds[-1] |= self.facets[:, wanted.other[0]] == wanted.other[1]
        wrong = len(holds) - holds.sum(0)
        near = holds[0] & (wrong == 1) & (len(holds) > 2)  # of two things one is the kind
        if wanted.excluded is not None:
            out = self.facets[:, wanted.excluded[0]] == wanted.excluded[1]
            wrong[out] = len(holds)
        found = {f"b{i}": 2 for i in np.flatnonzero(wrong == 0)} | {f"b{i}": 1 for i in np.flatnonzero(near)}
        found.pop(f"b{anchor}", None)
        return found

    def _text(self, wanted: Wanted, anchor: int | None, key: tuple) -> str:
        parts = [self._asked(*pair, key) for pair in wanted.facets]
        if anchor is not None:
            return f"{_capital(parts[0])} of the same {FACETS[wanted.facets[1][0]]} as {self.name(anchor)}"
        if wanted.other is not None:
            parts[-1] = f"{parts[-1]} or {self._asked(*wanted.other, key)}"
        if wanted.excluded is not None:
            parts.append(f"but not {self._asked(*wanted.excluded, key)}")
        return _capital(" ".join(parts))

    def _asked(self, facet: int, value: int, key: tuple) -> str:
        """A part of a query: by its own words, or half of the time by one of those of the texts."""
        if FACETS[facet] == "region":
            return _ASKED[facet].format(self.region(value))
        words, own = (KINDS, MATERIALS, BUILDERS, USES)[facet][value]
        drawn = draw(*key, facet, value, "asked") % (2 * len(words))
        return _ASKED[facet].format(words[drawn] if drawn < len(words) else own)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def generate(size: int, seed: int) -> Collection:
    """The collection of `generated:SIZE:SEED`, with 600, 100 and 200 queries."""
    made = Buildings(size, seed)

    def documents() -> Iterator[Document]:
        return (made.document(i) for i in range(size))

    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split, count in QUERIES.items():
        found = {f"{split}-{i}": made.query(split, i) for i in range(count)}
        queries |= {name: text for name, (text, _) in found.items()}
        qrels[split] = {name: grades for name, (_, grades) in found.items()}
    return Collection(f"generated:{size}:{seed}", documents, queries, qrels)
