"""A generated collection: buildings that do not exist, and queries with exactly known relevant documents.

Each building has a kind, a material, a builder's trade, a use and a region, and a document about it::

    Velmora Bridge
    Velmora Bridge is a viaduct. Trains cross it twice a day. It was made of grey stone by monks. It
    stands near the town of Tarinham.

A query asks for a set of buildings: "kind and region", "kind and material, not use", "kind of one region or
another". It often uses other words than the documents: "crossing" for a viaduct, or "in the Pelasmark valley"
for the towns there, a link that only the judgments teach.

A building that satisfies the whole query has grade 2. In queries with three conditions, a building of the
right kind that satisfies one of the other two has grade 1. A two-hop query names a building and asks for
others that share one of its properties.

Building i depends on (seed, i) and query i of a split on (seed, split, i). Two splits never share a query's
meaning.

For training, there are also documents about buildings outside the collection, which satisfy a given part of a
query (`Buildings.graded_documents`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.names import BITS, draw, shuffled, word
from rlkit.retrieval.documents import Document

QUERIES = {"train": 600, "dev": 100, "test": 200}
SHARES = {"train": (0, 6), "dev": (6, 7), "test": (7, 10)}  # ranges of a meaning's hash modulo 10
# Values of each facet: phrases that documents use, and the phrase of its own that queries use.
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
TOWNS = 6  # per region
FACETS = ("kind", "material", "builder", "use", "region")
GRADES = (3, 2, 1, 0)  # of the documents that are written for a query
_SIZES = (len(KINDS), len(MATERIALS), len(BUILDERS), len(USES), REGIONS)
_CONDITIONS = (  # forms of a condition in a query, by facet
    "{}",
    "made of {}",
    "put up by {}",
    "used today for {}",
    "in the {} valley",
)
# Shapes of a query: two conditions, three, an exclusion, an alternative, or two hops (like a named building).
_SHAPES = ("and", "and and", "not", "or", "like")
_SENTENCES = (  # forms of a sentence in a document, by facet
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
class Meaning:
    """Meaning of a query: pairs of a facet and one of its values, both as indices.

    Attributes:
        facets: Required values, the kind first.
        excluded: Value that a building must not have; None if there is none.
        alternative: Value that satisfies the last condition of `facets` as well; None if there is none.
    """

    facets: tuple[tuple[int, int], ...]
    excluded: tuple[int, int] | None = None
    alternative: tuple[int, int] | None = None

    @property
    def conditions(self) -> dict[int, set[int]]:
        """The values that satisfy each condition, by facet, the kind first; all as indices."""
        conditions = {facet: {value} for facet, value in self.facets}
        if self.alternative is not None:
            facet, value = self.alternative
            conditions[facet].add(value)
        if self.excluded is not None:
            facet, value = self.excluded
            conditions[facet] = set(range(_SIZES[facet])) - {value}
        return conditions

    def __str__(self) -> str:
        """Return the key of the random draw that assigns the meaning to a split.

        These are the names that the class and its fields had at first. Other names would move queries to
        other splits and so change every generated collection.
        """
        return f"Wanted(facets={self.facets}, excluded={self.excluded}, other={self.alternative})"


@dataclass(frozen=True)
class Buildings:
    """Generator of a collection of `size` buildings; raises UserError for fewer than 200."""

    size: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 200:
            raise UserError(f"a generated collection must have at least 200 documents, not {self.size}")

    @cached_property
    def facets(self) -> np.ndarray:
        """The values of each building, as indices of shape (size, facets)."""
        rows = []
        for i in range(self.size):
            row = [draw(self.seed, i, facet) % size for facet, size in zip(FACETS, _SIZES, strict=True)]
            rows.append(row)
        return np.array(rows)

    @property
    def _name_bits(self) -> int:
        """Number of bits of the number that a building's name spells."""
        bits = -(-(self.size.bit_length() + 1) // BITS) * BITS
        # A Feistel network needs an even number of bits.
        return bits + bits % 2

    def name(self, i: int) -> str:
        """Return the name of building i, unique in the collection."""
        return word(shuffled(i, self._name_bits, self.seed, "building"), self._name_bits)

    def document(self, i: int) -> Document:
        """Return the document about building i."""
        return Document(f"b{i}", self.name(i), self._text(i, self.name(i), self.facets[i]))

    def _text(self, key: int | str, name: str, facets: Sequence[int]) -> str:
        """Return the text about a building: a sentence for each facet, and up to two fillers.

        Args:
            key: Key of the random draws, the number of a building of the collection.
            name: Name of the building.
            facets: Index of its value of each facet.
        """
        sentences = []
        for facet, (value, forms) in enumerate(zip(facets, _SENTENCES, strict=True)):
            form = forms[draw(self.seed, key, facet, "text") % len(forms)]
            sentences.append(form.format(name=name, word=self._document_phrase(key, facet, int(value))))
        for n in range(draw(self.seed, key, "fillers") % 3):
            filler = _FILLERS[draw(self.seed, key, "filler", n) % len(_FILLERS)]
            sentences.append(filler.format(year=1700 + draw(self.seed, key, "year", n) % 250))
        # The first sentence stays first: it has the name and the kind.
        order = sorted(range(1, len(sentences)), key=lambda n: draw(self.seed, key, "order", n))
        return " ".join(_capitalize(sentences[n]) for n in [0, *order])

    def _document_phrase(self, key: int | str, facet: int, value: int) -> str:
        """Return the phrase by which the document with a key expresses a value."""
        if FACETS[facet] == "region":
            return self.town(value, draw(self.seed, key, "town") % TOWNS)
        phrases = (KINDS, MATERIALS, BUILDERS, USES)[facet][value][0]
        return phrases[draw(self.seed, key, facet, "word") % len(phrases)]

    def graded_documents(self, number: int, seed: int) -> list[tuple[int, Document]]:
        """Return four documents about buildings outside the collection, with their grades for a query.

        Grade 3 satisfies all conditions of the query, 2 the kind and all other conditions but one, 1 only
        one condition other than the kind, and 0 none. With three conditions, the grade is the number of
        satisfied ones. These grades are not those of the judgments, where a document that violates one of
        three conditions has grade 1, and one of two conditions, grade 0. Values that the query does not ask
        about are random.

        Args:
            number: Number of the training query.
            seed: Seed of the documents; another one gives other buildings for the same query.
        """
        meaning, _, _ = self._draw_query("train", number)
        bits = self._name_bits + BITS  # one syllable more than the collection's names, so that none is equal
        documents = []
        for grade in GRADES:
            key = f"graded {seed} {number} {grade}"
            facets = self._facets_of_grade(meaning, grade, key)
            name = word(shuffled(number * len(GRADES) + grade, bits, self.seed, seed, "graded"), bits)
            text = self._text(key, name, facets)
            documents.append((grade, Document(f"graded/train-{number}/{grade}", name, text)))
        return documents

    def _facets_of_grade(self, meaning: Meaning, grade: int, key: str) -> list[int]:
        """Return random values of a building that satisfies a query to a degree; see `graded_documents`."""
        kind, *others = meaning.conditions
        others.sort(key=lambda facet: draw(self.seed, key, "satisfied", facet))
        satisfied = ((), others[:1], (kind, *others[1:]), (kind, *others))[grade]
        values = []
        for facet, size in enumerate(_SIZES):
            options = set(range(size))
            if facet in satisfied:
                options = meaning.conditions[facet]
            elif facet in meaning.conditions:
                options -= meaning.conditions[facet]
            values.append(sorted(options)[draw(self.seed, key, facet) % len(options)])
        return values

    def town(self, region: int, number: int) -> str:
        """Return the name of a region's town."""
        return word(shuffled(region * TOWNS + number, 12, self.seed, "town"), 12) + "ham"

    def region(self, region: int) -> str:
        """Return the name of a region, which queries use and documents never do."""
        return word(shuffled(region, 12, self.seed, "region"), 12) + "mark"

    def query(self, split: str, number: int) -> tuple[str, dict[str, int]]:
        """Return the text and the grades of a query."""
        meaning, anchor, key = self._draw_query(split, number)
        return self._query_text(meaning, anchor, key), self._grades(meaning, anchor)

    def _draw_query(self, split: str, number: int) -> tuple[Meaning, int | None, tuple]:
        """Return the meaning of a query, the building that it names or None, and the key of its draws.

        Meanings are drawn until one belongs to the split and has at least 3 relevant documents, but no more
        than a tenth of the collection.
        """
        for attempt in range(1000):
            key = (self.seed, split, number, attempt)
            shape = _SHAPES[draw(*key, "shape") % len(_SHAPES)]
            meaning, anchor = self._draw_meaning(key, shape)
            low, high = SHARES[split]
            # The meaning alone decides the split, so that no split has another wording of it.
            if not low <= draw(self.seed, "meaning", meaning, anchor) % 10 < high:
                continue
            grades = self._grades(meaning, anchor)
            if 3 <= sum(grade == 2 for grade in grades.values()) <= self.size // 10:
                return meaning, anchor, key
        raise UserError(
            f"a collection of {self.size} documents is too small for its queries: use a larger size"
        )

    def _draw_meaning(self, key: tuple, shape: str) -> tuple[Meaning, int | None]:
        """Draw the meaning of a query, and the building that a two-hop query names (else None)."""
        values = [draw(*key, facet) % size for facet, size in zip(FACETS, _SIZES, strict=True)]
        order = sorted(range(1, len(FACETS)), key=lambda facet: draw(*key, "order", facet))
        first, second = order[:2]
        anchor = None
        if shape == "like":
            anchor = draw(*key, "anchor") % self.size
            values[first] = int(self.facets[anchor][first])
        options = [values[first]]
        if shape == "or":
            options.append((values[first] + 1 + draw(*key, "other") % (_SIZES[first] - 1)) % _SIZES[first])
            options.sort()
        # Conditions are sorted: the same meaning must have one form, because its hash decides the split.
        facets = [(0, values[0]), (first, options[0])]
        if shape == "and and":
            facets = sorted([*facets, (second, values[second])])
        excluded = (second, values[second]) if shape == "not" else None
        alternative = (first, options[1]) if shape == "or" else None
        return Meaning(tuple(facets), excluded, alternative), anchor

    def _grades(self, meaning: Meaning, anchor: int | None) -> dict[str, int]:
        """Return the grades 2 and 1 by document id; all other documents have grade 0."""
        holds = np.stack([self.facets[:, facet] == value for facet, value in meaning.facets])
        if meaning.alternative is not None:
            facet, value = meaning.alternative
            holds[-1] |= self.facets[:, facet] == value
        num_violated = len(holds) - holds.sum(0)
        # With only two conditions, a near miss would share nothing but the kind.
        near = holds[0] & (num_violated == 1) & (len(holds) > 2)
        if meaning.excluded is not None:
            facet, value = meaning.excluded
            num_violated[self.facets[:, facet] == value] = len(holds)
        grades = {f"b{i}": 2 for i in np.flatnonzero(num_violated == 0)}
        grades |= {f"b{i}": 1 for i in np.flatnonzero(near)}
        # The building that the query names is not an answer.
        grades.pop(f"b{anchor}", None)
        return grades

    def _query_text(self, meaning: Meaning, anchor: int | None, key: tuple) -> str:
        conditions = [self._condition(facet, value, key) for facet, value in meaning.facets]
        if anchor is not None:
            shared = FACETS[meaning.facets[1][0]]
            return f"{_capitalize(conditions[0])} of the same {shared} as {self.name(anchor)}"
        if meaning.alternative is not None:
            conditions[-1] = f"{conditions[-1]} or {self._condition(*meaning.alternative, key)}"
        if meaning.excluded is not None:
            conditions.append(f"but not {self._condition(*meaning.excluded, key)}")
        return _capitalize(" ".join(conditions))

    def _condition(self, facet: int, value: int, key: tuple) -> str:
        """Return a condition of a query, in half of the cases with a phrase that documents use."""
        if FACETS[facet] == "region":
            return _CONDITIONS[facet].format(self.region(value))
        document_phrases, query_phrase = (KINDS, MATERIALS, BUILDERS, USES)[facet][value]
        number = draw(*key, facet, value, "asked") % (2 * len(document_phrases))
        phrase = document_phrases[number] if number < len(document_phrases) else query_phrase
        return _CONDITIONS[facet].format(phrase)


def _capitalize(text: str) -> str:
    # str.capitalize would lower-case names.
    return text[0].upper() + text[1:]


def generate(size: int, seed: int) -> Collection:
    """Return the collection `generated:SIZE:SEED`, with 600 train, 100 dev and 200 test queries."""
    buildings = Buildings(size, seed)

    def documents() -> Iterator[Document]:
        return (buildings.document(i) for i in range(size))

    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split, count in QUERIES.items():
        qrels[split] = {}
        for i in range(count):
            queries[f"{split}-{i}"], qrels[split][f"{split}-{i}"] = buildings.query(split, i)
    return Collection(f"generated:{size}:{seed}", documents, queries, qrels)
