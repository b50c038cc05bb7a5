"""A generated world: passages about persons, cities, companies, books and rivers that do not exist.

Nothing a pretrained model knows answers a question about it; the passages do. One of them, and a question of
two hops that it begins::

    Kasemin Works
    Kasemin Works is a company that makes glass. It was founded in 1871 by Dobel Trivon. Its seat is the city
    of Zemokar. ...

    Where was the founder of the company Kasemin Works born?      (company -> founder -> birthplace)

Entity i has the type `i % 5`; its facts and its name are drawn from (seed, i), and a fact about another one
is that one's index, so passage i and question i are made at once in a world of any size. Names are unique
within a type; words are shared between types and among the parts of persons' names. One entity in four keeps
silent about one of its facts: what asks for it cannot be answered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rlkit.errors import UserError
from rlkit.retrieval.collections.names import BITS, draw, shuffled, word
from rlkit.retrieval.collections.world_text import (
    CITY,
    ENDS,
    FACTS,
    FILLERS,
    GOODS,
    JOBS,
    MAYOR,
    OPENINGS,
    PERSON,
    RELATIONS,
    TEXTS,
    TYPES,
    accepted,
    naming,
)
from rlkit.retrieval.documents import Document

# Draws of a question before the world is taken to have none. The rarest ones, unanswerable ones in a world of
# 100 passages, took 430 draws on average; three such worlds in forty had none at all in a split.
MAX_TRIES = 20_000
SILENT = 0.25  # share of entities that keep silent about a fact
_FILLERS = ("filler", "filler 2")  # cities that a passage names besides its facts


@dataclass(frozen=True)
class Step:
    """One hop: what to search for, and the passage that tells."""

    query: str
    supporting: str


@dataclass(frozen=True)
class Question:
    """A question, its answers (the first as a passage has it), and how they are found."""

    id: str
    text: str
    answers: tuple[str, ...]
    steps: tuple[Step, ...]
    kind: str
    answerable: bool

    @property
    def hops(self) -> int:
        """How many facts it chains."""
        return len(self.steps)

    @property
    def supporting(self) -> tuple[str, ...]:
        """The passages that the answer follows from."""
        return tuple(step.supporting for step in self.steps)


@dataclass(frozen=True)
class World:
    """A world of `size` passages; raises UserError for fewer than 100."""

    seed: int = 0
    size: int = 10_000

    def __post_init__(self) -> None:
        if self.size < 100:
            raise UserError(f"a world has at least 100 passages, not {self.size}")

    @cached_property
    def _bits(self) -> int:
        """Of the number that a name stands for: whole syllables, with room between the names."""
        return -(-((self.size // len(TYPES)).bit_length() + 2) // BITS) * BITS

    def type(self, i: int) -> str:
        """The type of entity i."""
        return TYPES[i % len(TYPES)]

    def name(self, i: int) -> str:
        """The name of entity i, unique within its type."""
        kind = self.type(i)
        bits = 4 * BITS if kind == PERSON else self._bits
        number = shuffled(i // len(TYPES), bits, self.seed, kind)
        if kind == PERSON:  # two words of half the number: first names and surnames are shared
            half = bits // 2
            return f"{word(number & ((1 << half) - 1), half)} {word(number >> half, half)}"
        ends = ENDS.get(kind)
        own = word(number, bits)
        return f"{own} {ends[draw(self.seed, i, 'end') % len(ends)]}" if ends else own

    def fact(self, i: int, relation: str) -> int:
        """A fact of entity i: the index of an entity, or a number. Years fit together."""
        number = draw(self.seed, i, relation)
        if relation in ("company founded", "published"):
            owner = self.fact(i, "founder" if relation == "company founded" else "author")
            return self.fact(owner, "birth year") + 20 + number % 40
        if relation == "election":  # the year in which the first mayor goes
            return self.fact(self.fact(i, "first mayor"), "birth year") + 35 + number % 20
        if relation == "second mayor":
            year = self.fact(i, "election")
            first = self.fact(i, "first mayor")
            drawn = [self._entity(PERSON, draw(self.seed, i, relation, n)) for n in range(64)]
            fit = (one for one in drawn if 30 <= year - self.fact(one, "birth year") <= 75 and one != first)
            return next(fit, next(one for one in drawn if one != first))
        if relation in _NUMBERS:
            low, high = _NUMBERS[relation]
            return low + number % (high - low)
        return self._entity(_TARGETS[relation], number)

    def mayor(self, city: int, year: int) -> int:
        """Who is mayor of a city in a year."""
        return self.fact(city, "first mayor" if year < self.fact(city, "election") else "second mayor")

    def _entity(self, kind: str, number: int) -> int:
        """An entity of a type, by any number."""
        first = TYPES.index(kind)
        return first + len(TYPES) * (number % len(range(first, self.size, len(TYPES))))

    def silence(self, i: int) -> str | None:
        """The fact that passage i does not tell, or None."""
        number = draw(self.seed, i, "silence")
        facts = FACTS[self.type(i)]
        return facts[(number >> 16) % len(facts)].name if number % 4096 < SILENT * 4096 else None

    def passage(self, i: int) -> Document:
        """Passage i, about entity i.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= i < self.size:
            raise IndexError(f"passage {i} of a world of {self.size}")
        name = self.name(i)
        chance = random.Random(draw(self.seed, i, "words"))
        sentences = [
            chance.choice(texts) for fact, texts in TEXTS[self.type(i)].items() if fact != self.silence(i)
        ]
        chance.shuffle(sentences)
        sentences = [chance.choice(OPENINGS[self.type(i)]), *sentences, chance.choice(FILLERS)]
        values = self._values(i, name, chance)
        text = " ".join(sentence.format(**values) for sentence in sentences)
        return Document(self.passage_id(i), name, text)

    def passage_id(self, i: int) -> str:
        """The id of passage i."""
        return f"w{self.seed}-{self.size}-{i}"

    def passages(self) -> Iterator[Document]:
        """All passages, in order."""
        return (self.passage(i) for i in range(self.size))

    def _values(self, i: int, name: str, chance: random.Random) -> dict[str, object]:
        values: dict[str, object] = {
            "name": name,
            "goods": chance.choice(GOODS),
            "job": chance.choice(JOBS),
        }
        values |= {
            "other": self.name(self.fact(i, _FILLERS[0])),
            "more": self.name(self.fact(i, _FILLERS[1])),
        }
        for relation in FACTS[self.type(i)]:
            key = relation.name.replace(" ", "_")
            if relation.name == MAYOR:
                first, second = (self.name(self.fact(i, f"{which} mayor")) for which in ("first", "second"))
                values |= {"election": self.fact(i, "election"), "first": first, "second": second}
            else:
                value = self.fact(i, relation.name)
                values[key] = value if relation.target is None else self.name(value)
        return values

    def question(
        self, split: str, i: int, hops: Sequence[int] = (1, 2), unanswerable: float = 0.0, seed: int = 0
    ) -> Question:
        """Question i of a split. What is asked about an entity in one split is asked in no other.

        Args:
            split: "train", "dev" or "test".
            i: any number.
            hops: how many facts it may chain, from 1 to 4.
            unanswerable: the chance that its last fact is told nowhere.
            seed: other questions.

        Raises:
            UserError: the world is too small to have such a question in this split.
        """
        lengths = sorted(set(hops))
        chance = random.Random(draw(self.seed, self.size, split, seed, i, lengths, float(unanswerable)))
        length = chance.choice(lengths)
        answerable = chance.random() >= unanswerable
        for _ in range(MAX_TRIES):
            question = self._try(chance, length, answerable)
            if question is not None and self._split_of(question) == split:
                return question
        kind = "answerable" if answerable else "unanswerable"
        raise UserError(
            f"a world of {self.size} passages has no {kind} question with {length} hops in {split!r}: raise "
            "world_size"
        )

    def _try(self, chance: random.Random, hops: int, answerable: bool) -> Question | None:
        """A chain drawn at random, where it is one and its question gives nothing away."""
        at = chance.randrange(self.size)
        phrase = naming(self.type(at), self.name(at))
        steps, told, names = [], [], [self.name(at)]
        for hop in range(hops):
            last = hop == hops - 1
            silent = self.silence(at)
            choices = [
                r for r in FACTS[self.type(at)]
                if (last or r.target is not None) and (r.name == silent) == (last and not answerable)
            ]  # fmt: skip
            if not choices:
                return None
            relation = chance.choice(choices)
            year = self._year(at, chance) if relation.name == MAYOR else None
            steps.append(Step(f"{self.name(at)} {relation.words}", self.passage_id(at)))
            told.append(relation.name)
            value = self.fact(at, relation.name) if year is None else self.mayor(at, year)
            if last:
                text = chance.choice(relation.questions).format(x=phrase, year=year)
                answers = accepted(relation, value if relation.target is None else self.name(value))
            else:
                phrase = relation.phrase.format(x=phrase, year=year)
                at = value
                names.append(self.name(at))
        hidden = [*names[1:], answers[0]]
        if len({*names, answers[0]}) <= hops or any(_stands_in(one, text) for one in hidden):
            return None  # it goes in a circle, or names what is to be found
        name = f"{draw(self.seed, self.size, text):016x}"
        return Question(name, text, answers if answerable else (), tuple(steps), " > ".join(told), answerable)

    def _split_of(self, question: Question) -> str:
        """Eight in ten are for training: what is chained from where decides, in whatever words and years."""
        number = draw(self.seed, self.size, question.supporting[0], question.kind)
        return ("train", "dev", "test")[max(0, number % 10 - 7)]

    def _year(self, city: int, chance: random.Random) -> int:
        election = self.fact(city, "election")
        return election + chance.choice((-1, 1)) * chance.randrange(2, 15)


_TARGETS: dict[str, str] = {
    **{relation.name: relation.target for relation in RELATIONS if relation.target is not None},
    **dict.fromkeys(_FILLERS, CITY),
    "first mayor": PERSON,
}
_NUMBERS = {"birth year": (1800, 1950), "city founded": (1200, 1790), "length": (31, 2400)}


def _stands_in(words: str, text: str) -> bool:
    def spaced(one: str) -> str:
        return f" {''.join(c if c.isalnum() else ' ' for c in one.lower())} "

    return " ".join(spaced(words).split()) in " ".join(spaced(text).split())
