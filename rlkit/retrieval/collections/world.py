"""A generated world: passages about persons, cities, companies, books and rivers that do not exist.

No pretrained model can know the answer to a question about it; only the passages have it. A passage, and a
two-hop question that starts from it::

    Kasemin Works
    Kasemin Works is a company that makes glass. It was founded in 1871 by Dobel Trivon. Its seat is the city
    of Zemokar. ...

    Where was the founder of the company Kasemin Works born?      (company -> founder -> birthplace)

Entity i has the type `i % 5`. Its name and facts are drawn from (seed, i), and a fact about another entity is
that entity's index. Passage i and question i are therefore computed at once in a world of any size. Names are
unique within a type; types share words, and so do the first and last names of persons. The passage of one
entity in four omits one of its facts, so questions that ask for it cannot be answered.
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
    FACTS,
    FILLERS,
    GOODS,
    JOBS,
    MAYOR,
    NAME_SUFFIXES,
    OPENINGS,
    PERSON,
    RELATIONS,
    SENTENCES,
    TYPES,
    accepted_answers,
    describe_entity,
)
from rlkit.retrieval.documents import Document

# Failed draws after which a world is considered to have no such question. The rarest questions, unanswerable
# ones in a world of 100 passages, took 430 draws on average. Three such worlds in forty had none at all in a
# split.
MAX_DRAWS = 20_000
OMITTED_SHARE = 0.25  # share of entities whose passage omits one of their facts
_FILLERS = ("filler", "filler 2")  # cities that a passage names besides its facts, as distractors


@dataclass(frozen=True)
class Step:
    """One hop of a question.

    Attributes:
        query: Search query that finds the passage.
        supporting: Id of the passage that has the fact.
    """

    query: str
    supporting: str


@dataclass(frozen=True)
class Question:
    """A question, its accepted answers, and the chain of facts that leads to them.

    Attributes:
        id: Hash of the question in its world.
        text: The question.
        answers: Accepted answers, the first one as a passage writes it; empty for an unanswerable question.
        steps: Hops of the chain, in order.
        kind: Names of the chained facts, such as "founder > birthplace".
        answerable: Whether a passage has the last fact of the chain.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    steps: tuple[Step, ...]
    kind: str
    answerable: bool

    @property
    def hops(self) -> int:
        """Number of chained facts."""
        return len(self.steps)

    @property
    def supporting(self) -> tuple[str, ...]:
        """Ids of the passages that the answer follows from."""
        return tuple(step.supporting for step in self.steps)


@dataclass(frozen=True)
class World:
    """A world of `size` passages, one per entity; raises UserError for fewer than 100."""

    seed: int = 0
    size: int = 10_000

    def __post_init__(self) -> None:
        if self.size < 100:
            raise UserError(f"a world must have at least 100 passages, not {self.size}")

    @cached_property
    def _bits(self) -> int:
        """Number of bits that a name spells.

        They fill complete syllables, and allow at least four times as many names as there are entities.
        """
        return -(-((self.size // len(TYPES)).bit_length() + 2) // BITS) * BITS

    def type(self, i: int) -> str:
        """Return the type of entity i."""
        return TYPES[i % len(TYPES)]

    def name(self, i: int) -> str:
        """Return the name of entity i, unique within its type."""
        kind = self.type(i)
        bits = 4 * BITS if kind == PERSON else self._bits
        number = shuffled(i // len(TYPES), bits, self.seed, kind)
        if kind == PERSON:  # each name spells half of the number, so persons share first and last names
            half = bits // 2
            return f"{word(number & ((1 << half) - 1), half)} {word(number >> half, half)}"
        name = word(number, bits)
        suffixes = NAME_SUFFIXES.get(kind)
        return f"{name} {suffixes[draw(self.seed, i, 'end') % len(suffixes)]}" if suffixes else name

    def fact(self, i: int, relation: str) -> int:
        """Return a fact of entity i: the index of an entity, or a number.

        Years are consistent: nobody founds a company or becomes mayor as a child, for example.
        """
        number = draw(self.seed, i, relation)
        if relation in ("company founded", "published"):
            owner = self.fact(i, "founder" if relation == "company founded" else "author")
            return self.fact(owner, "birth year") + 20 + number % 40
        if relation == "election":  # the year in which the second mayor succeeds the first
            return self.fact(self.fact(i, "first mayor"), "birth year") + 35 + number % 20
        if relation == "second mayor":
            return self._second_mayor(i)
        if relation in _NUMBERS:
            low, high = _NUMBERS[relation]
            return low + number % (high - low)
        return self._entity(_TARGETS[relation], number)

    def _second_mayor(self, city: int) -> int:
        """Return the first of 64 drawn persons with a suitable age at the election, or else any of them."""
        year = self.fact(city, "election")
        first_mayor = self.fact(city, "first mayor")
        persons = [self._entity(PERSON, draw(self.seed, city, "second mayor", n)) for n in range(64)]
        persons = [person for person in persons if person != first_mayor]
        for person in persons:
            if 30 <= year - self.fact(person, "birth year") <= 75:
                return person
        return persons[0]

    def mayor(self, city: int, year: int) -> int:
        """Return the person who is mayor of a city in a year."""
        return self.fact(city, "first mayor" if year < self.fact(city, "election") else "second mayor")

    def _entity(self, kind: str, number: int) -> int:
        """Return the entity of a type that any number selects (modulo the number of such entities)."""
        first = TYPES.index(kind)
        return first + len(TYPES) * (number % len(range(first, self.size, len(TYPES))))

    def omitted_fact(self, i: int) -> str | None:
        """Return the name of the fact that passage i omits, or None if it has all of them."""
        number = draw(self.seed, i, "silence")
        facts = FACTS[self.type(i)]
        # The two decisions use separate bits of the number, so they are independent.
        return facts[(number >> 16) % len(facts)].name if number % 4096 < OMITTED_SHARE * 4096 else None

    def passage(self, i: int) -> Document:
        """Return passage i, about entity i.

        Raises:
            IndexError: `i` is negative, or not below the size of the world.
        """
        if not 0 <= i < self.size:
            raise IndexError(f"passage {i} of a world of {self.size}")
        name, kind, omitted = self.name(i), self.type(i), self.omitted_fact(i)
        # The order of the draws decides the text. Changing it would change every world.
        rng = random.Random(draw(self.seed, i, "words"))
        sentences = [rng.choice(forms) for fact, forms in SENTENCES[kind].items() if fact != omitted]
        rng.shuffle(sentences)
        sentences = [rng.choice(OPENINGS[kind]), *sentences, rng.choice(FILLERS)]
        values = self._values(i, name, rng)
        text = " ".join(sentence.format(**values) for sentence in sentences)
        return Document(self.passage_id(i), name, text)

    def passage_id(self, i: int) -> str:
        """Return the id of passage i."""
        return f"w{self.seed}-{self.size}-{i}"

    def passages(self) -> Iterator[Document]:
        """Iterate over all passages, in order."""
        return (self.passage(i) for i in range(self.size))

    def _values(self, i: int, name: str, rng: random.Random) -> dict[str, object]:
        """Return the values of the placeholders in the sentences about entity i."""
        values: dict[str, object] = {
            "name": name,
            "goods": rng.choice(GOODS),
            "job": rng.choice(JOBS),
            "other": self.name(self.fact(i, _FILLERS[0])),
            "more": self.name(self.fact(i, _FILLERS[1])),
        }
        for relation in FACTS[self.type(i)]:
            if relation.name == MAYOR:
                values["election"] = self.fact(i, "election")
                values["first"] = self.name(self.fact(i, "first mayor"))
                values["second"] = self.name(self.fact(i, "second mayor"))
            else:
                value = self.fact(i, relation.name)
                key = relation.name.replace(" ", "_")
                values[key] = value if relation.target is None else self.name(value)
        return values

    def question(
        self, split: str, i: int, hops: Sequence[int] = (1, 2), unanswerable: float = 0.0, seed: int = 0
    ) -> Question:
        """Return question i of a split. A chain of facts from the same entity is asked in one split only.

        Args:
            split: "train", "dev" or "test".
            i: Index of the question, unbounded.
            hops: Possible numbers of chained facts, each from 1 to 4.
            unanswerable: Probability that no passage has the last fact of the chain.
            seed: Random seed of the questions, independent of the world's.

        Raises:
            UserError: The world is too small to have such a question in this split.
        """
        lengths = sorted(set(hops))
        # Order and repetition of `hops` and the type of `unanswerable` must not change the questions.
        rng = random.Random(draw(self.seed, self.size, split, seed, i, lengths, float(unanswerable)))
        length = rng.choice(lengths)
        answerable = rng.random() >= unanswerable
        for _ in range(MAX_DRAWS):
            question = self._draw_question(rng, length, answerable)
            if question is not None and self._split_of(question) == split:
                return question
        kind = "answerable" if answerable else "unanswerable"
        raise UserError(
            f"a world of {self.size} passages has no {kind} question with {length} hops in {split!r}: raise "
            "world_size"
        )

    def _draw_question(self, rng: random.Random, hops: int, answerable: bool) -> Question | None:
        """Draw a chain of facts; return None for a dead end, a cycle, or a question that leaks an answer."""
        entity = rng.randrange(self.size)
        phrase = describe_entity(self.type(entity), self.name(entity))
        steps, relations, names = [], [], [self.name(entity)]
        for hop in range(hops):
            last = hop == hops - 1
            omitted = self.omitted_fact(entity)
            # Only the last fact may be a number, and the last fact of an unanswerable question is omitted.
            choices = [
                relation for relation in FACTS[self.type(entity)]
                if (last or relation.target is not None)
                and (relation.name == omitted) == (last and not answerable)
            ]  # fmt: skip
            if not choices:
                return None
            relation = rng.choice(choices)
            year = self._question_year(entity, rng) if relation.name == MAYOR else None
            steps.append(Step(f"{self.name(entity)} {relation.search_words}", self.passage_id(entity)))
            relations.append(relation.name)
            value = self.fact(entity, relation.name) if year is None else self.mayor(entity, year)
            if last:
                text = rng.choice(relation.questions).format(x=phrase, year=year)
                answer = value if relation.target is None else self.name(value)
                answers = accepted_answers(relation, answer)
            else:
                phrase = relation.phrase.format(x=phrase, year=year)
                entity = value
                names.append(self.name(entity))
        has_cycle = len({*names, answers[0]}) <= hops
        if has_cycle or any(_contains_phrase(text, name) for name in [*names[1:], answers[0]]):
            return None
        return Question(
            id=f"{draw(self.seed, self.size, text):016x}",
            text=text,
            answers=answers if answerable else (),
            steps=tuple(steps),
            kind=" > ".join(relations),
            answerable=answerable,
        )

    def _split_of(self, question: Question) -> str:
        """Return the split of a question: 80% are in train, 10% in dev and 10% in test.

        It depends on the first entity and the chain of facts, so wordings and years never cross splits.
        """
        number = draw(self.seed, self.size, question.supporting[0], question.kind)
        # 0 to 7: train, 8: dev, 9: test.
        return ("train", "dev", "test")[max(0, number % 10 - 7)]

    def _question_year(self, city: int, rng: random.Random) -> int:
        """Draw a year 2 to 14 years before or after a city's election, for a question about its mayor."""
        election = self.fact(city, "election")
        return election + rng.choice((-1, 1)) * rng.randrange(2, 15)


# Types of the entities that facts refer to.
_TARGETS: dict[str, str] = {
    **{relation.name: relation.target for relation in RELATIONS if relation.target is not None},
    **dict.fromkeys(_FILLERS, CITY),
    "first mayor": PERSON,
}
# Ranges of facts that are numbers: [low, high).
_NUMBERS = {"birth year": (1800, 1950), "city founded": (1200, 1790), "length": (31, 2400)}


def _contains_phrase(text: str, phrase: str) -> bool:
    """Return whether a phrase occurs in a string, ignoring case and punctuation."""

    def normalize(string: str) -> str:
        spaced = "".join(character if character.isalnum() else " " for character in string.lower())
        return " ".join(spaced.split())

    return normalize(phrase) in normalize(text)
