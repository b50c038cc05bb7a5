"""Text of the generated world: its facts, and how passages and questions express them.

Every string here is part of the generated data. A change requires new versions of the environments on it.
"""

from __future__ import annotations

from dataclasses import dataclass

PERSON, CITY, COMPANY, BOOK, RIVER = TYPES = ("person", "city", "company", "book", "river")
NAME_SUFFIXES = {
    COMPANY: ("Works", "Mills", "Lines", "Trading", "Foundry"),
    BOOK: ("Letters", "Chronicle", "Garden", "Voyage", "Winter"),
}
GOODS = ("glass", "clocks", "ropes", "lamps", "bells", "paper", "tiles", "boots")
JOBS = ("a painter", "an engineer", "a teacher", "a lawyer", "a botanist", "a printer")
MAYOR = "mayor"


@dataclass(frozen=True)
class Relation:
    """A type of fact: a relation from one entity to another, or to a number.

    Attributes:
        name: Name of the fact.
        source: Type of the entity that has the fact.
        target: Type of the entity that the fact refers to; None if it is a number.
        search_words: Words that a search query adds to the entity's name.
        phrase: Noun phrase for the target of entity {x}, such as "the founder of {x}".
        questions: Questions that ask for the target of entity {x}.
    """

    name: str
    source: str
    target: str | None
    search_words: str
    phrase: str
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "birthplace",
        PERSON,
        CITY,
        "born in the city",
        "the city where {x} was born",
        ("Where was {x} born?", "In which city was {x} born?"),
    ),
    Relation(
        "birth year",
        PERSON,
        None,
        "born in the year",
        "",
        ("When was {x} born?", "In which year was {x} born?"),
    ),
    Relation(
        "river",
        CITY,
        RIVER,
        "lies on the river",
        "the river of {x}",
        ("On which river is {x}?", "Which river flows through {x}?"),
    ),
    Relation(
        "city founded",
        CITY,
        None,
        "city founded in",
        "",
        ("When was {x} founded?", "In which year was {x} founded?"),
    ),
    Relation(
        MAYOR,
        CITY,
        PERSON,
        "mayor of the city",
        "the person who in {year} was mayor of {x}",
        ("In {year}, who was mayor of {x}?", "Who in {year} was mayor of {x}?"),
    ),
    Relation(
        "founder",
        COMPANY,
        PERSON,
        "company founded by",
        "the founder of {x}",
        ("Who founded {x}?", "Who was the founder of {x}?"),
    ),
    Relation(
        "seat",
        COMPANY,
        CITY,
        "company seat",
        "the city where {x} has its seat",
        ("Where is the seat of {x}?", "In which city does {x} have its seat?"),
    ),
    Relation(
        "company founded",
        COMPANY,
        None,
        "company founded in",
        "",
        ("When was {x} founded?", "In which year was {x} founded?"),
    ),
    Relation(
        "author",
        BOOK,
        PERSON,
        "book written by",
        "the author of {x}",
        ("Who wrote {x}?", "Who is the author of {x}?"),
    ),
    Relation(
        "printed",
        BOOK,
        CITY,
        "book printed in the city",
        "the city where {x} was printed",
        ("Where was {x} printed?", "In which city was {x} printed?"),
    ),
    Relation(
        "published",
        BOOK,
        None,
        "book published in",
        "",
        ("When was {x} published?", "In which year was {x} published?"),
    ),
    Relation(
        "source",
        RIVER,
        CITY,
        "river rises near the city",
        "the city near which {x} rises",
        ("Near which city does {x} rise?", "Near which city is the source of {x}?"),
    ),
    Relation(
        "length",
        RIVER,
        None,
        "river length kilometers",
        "",
        ("How many km long is {x}?", "What is the length of {x} in km?"),
    ),
)
FACTS = {kind: tuple(relation for relation in RELATIONS if relation.source == kind) for kind in TYPES}

OPENINGS = {
    PERSON: ("{name} was {job}.", "{name} is remembered as {job}."),
    CITY: ("{name} is a city.", "The city of {name} has a market every week."),
    COMPANY: ("{name} is a company that makes {goods}.", "The company {name} is known for its {goods}."),
    BOOK: ("{name} is a book about {goods}.", "The book {name} tells of {job}."),
    RIVER: ("The river {name} is rich in fish.", "{name} is a river with many bends."),
}
SENTENCES = {
    PERSON: {
        "birthplace": (
            "{name} was born in the city of {birthplace}.",
            "The birthplace of {name} is the city of {birthplace}.",
        ),
        "birth year": ("The year of birth was {birth_year}.", "{name} was born in the year {birth_year}."),
    },
    CITY: {
        "river": ("It lies on the river {river}.", "The river {river} flows through {name}."),
        "city founded": ("The city was founded in {city_founded}.", "{name} was founded in {city_founded}."),
        MAYOR: (
            "Until {election} its mayor was {first}; since then the mayor has been {second}.",
            "The mayor was {first} until {election}, when {second} became mayor.",
        ),
    },
    COMPANY: {
        "founder": ("Its founder was {founder}.", "{name} was founded by {founder}."),
        "seat": ("Its seat is the city of {seat}.", "{name} has its seat in the city of {seat}."),
        "company founded": (
            "The company was founded in {company_founded}.",
            "{name} was founded in {company_founded}.",
        ),
    },
    BOOK: {
        "author": ("It was written by {author}.", "The author of {name} is {author}."),
        "printed": (
            "It was printed in the city of {printed}.",
            "{name} was first printed in the city of {printed}.",
        ),
        "published": ("The book was published in {published}.", "{name} was published in {published}."),
    },
    RIVER: {
        "source": (
            "It rises near the city of {source}.",
            "The source of {name} is near the city of {source}.",
        ),
        "length": ("It is {length} km long.", "The length of {name} is {length} km."),
    },
}
FILLERS = (
    "A street in {other} has the same name, and so has an inn in {more}.",
    "Visitors from {other} and {more} often ask about it.",
    "The museum of {other} shows pictures of it, the museum of {more} a model.",
)


def describe_entity(kind: str, name: str) -> str:
    """Return how a question refers to an entity: with its type, except for persons, whose names suffice."""
    forms = {
        PERSON: "{}",
        CITY: "the city of {}",
        COMPANY: "the company {}",
        BOOK: "the book {}",
        RIVER: "the river {}",
    }
    return forms[kind].format(name)


def accepted_answers(relation: Relation, value: object) -> tuple[str, ...]:
    """Return the accepted forms of a correct value, the first one as a passage writes it."""
    # No form may add a word that many answers share, such as "km" or "city": F1 would reward that word alone.
    if relation.target == PERSON:
        first_name, last_name = str(value).split()
        return f"{value}", f"{last_name}, {first_name}"
    return (f"{value}",)
