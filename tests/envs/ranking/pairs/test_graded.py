"""Graded lists: the grades follow from the words of the passages, and the corpus has none of them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.graded import graded
from rlkit.errors import UserError
from rlkit.retrieval.collections.generated import (
    BUILDERS,
    FACETS,
    KINDS,
    MATERIALS,
    REGIONS,
    TOWNS,
    USES,
    Buildings,
)
from rlkit.retrieval.collections.load import load_collection

COLLECTION = "generated:300:1"
ROWS = list(graded(COLLECTION, 0))


def facets_of(text, buildings):
    """Return the value of each facet that a passage expresses, read from its words alone."""
    phrases = [[of_value for of_value, _ in values] for values in (KINDS, MATERIALS, BUILDERS, USES)]
    phrases.append([[buildings.town(region, n) for n in range(TOWNS)] for region in range(REGIONS)])
    facets = []
    for of_facet in phrases:
        pattern = [rf"\b({'|'.join(of_value)})\b" for of_value in of_facet]
        (value,) = [v for v, regex in enumerate(pattern) if re.search(regex, text, re.IGNORECASE)]
        facets.append(value)
    return facets


def grade_of(query, facets, buildings):
    """Return the grade that the words of a query give to a building, or None if it is between two grades."""
    query_phrases = [
        [(*phrases, phrase) for phrases, phrase in values] for values in (KINDS, MATERIALS, BUILDERS, USES)
    ]
    query_phrases.append([(f"the {buildings.region(region)} valley",) for region in range(REGIONS)])
    forms = ("{}", "made of {}", "put up by {}", "used today for {}", "in {}")
    if " of the same " in query:
        facet = next(n for n, name in enumerate(FACETS) if f"the same {name} as" in query)
        anchor = next(i for i in range(buildings.size) if query.endswith(f" {buildings.name(i)}"))
        others = [facets[facet] == buildings.facets[anchor][facet]]
    else:
        included, _, excluded = query.partition(" but not ")
        others = []
        for facet in range(1, 5):
            pattern = [
                rf"{forms[facet].format('(' + '|'.join(of_value) + ')')}\b"
                for of_value in query_phrases[facet]
            ]
            values = [v for v, regex in enumerate(pattern) if re.search(regex, included)]
            if values:
                others.append(facets[facet] in values)
            if any(re.search(regex, excluded) for regex in pattern):
                others.append(not re.search(pattern[facets[facet]], excluded))
    has_kind = any(query.lower().startswith(phrase) for phrase in query_phrases[0][facets[0]])
    num_satisfied = sum(others)
    if has_kind:
        return 3 if all(others) else 2 if num_satisfied == len(others) - 1 else None
    return num_satisfied if num_satisfied < 2 else None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(0, 1000), st.integers(0, 599))
def test_grades_equal_the_conditions_that_a_passage_satisfies(collection_seed, seed, number):
    buildings = Buildings(400, collection_seed)
    query, _ = buildings.query("train", number)
    documents = buildings.graded_documents(number, seed)
    assert [grade for grade, _ in documents] == [3, 2, 1, 0]
    for grade, document in documents:
        assert grade_of(query, facets_of(document.text, buildings), buildings) == grade


def test_rows_have_four_passages_in_an_order_that_the_seed_decides():
    assert len(ROWS) == 600 and len({row.id for row in ROWS}) == 600
    assert all(sorted(row.targets) == [0, 1, 2, 3] for row in ROWS)
    assert all(len(set(row.passage_documents)) == len(row.passages) == 4 for row in ROWS)
    assert len({row.targets for row in ROWS}) == 24
    assert list(graded(COLLECTION, 0)) == ROWS
    other_seed = list(graded(COLLECTION, 1))
    assert [row.query for row in other_seed] == [row.query for row in ROWS]
    assert not {p for row in other_seed for p in row.passages} & {p for row in ROWS for p in row.passages}


def test_only_training_queries_have_rows():
    collection = load_collection(COLLECTION)
    assert {row.query for row in ROWS} == {collection.queries[query] for query in collection.judged("train")}


def test_buildings_are_not_in_the_corpus_and_have_names_of_their_own():
    documents = list(load_collection(COLLECTION).documents())
    names = [passage.partition(":")[0] for row in ROWS for passage in row.passages]
    assert len(set(names)) == len(names)
    assert not set(names) & {document.title for document in documents}
    texts = {document.text for document in documents}
    assert not any(passage.partition(": ")[2] in texts for row in ROWS for passage in row.passages)


def test_names_do_not_reveal_the_grade():
    """Each syllable and final letter is about as frequent among the buildings of each grade."""
    names = {grade: [] for grade in (0.0, 1.0, 2.0, 3.0)}
    for row in ROWS:
        for passage, grade in zip(row.passages, row.targets, strict=True):
            names[grade].append(passage.partition(":")[0])
    for letter in "lnrs":
        shares = [sum(name.endswith(letter) for name in of_grade) / 600 for of_grade in names.values()]
        assert max(shares) - min(shares) < 0.12
    first = [sum(name[1] in "ae" for name in of_grade) / 600 for of_grade in names.values()]
    assert max(first) - min(first) < 0.12


def test_other_collections_are_an_error():
    with pytest.raises(UserError, match="needs a collection generated:SIZE:SEED"):
        graded("data/scifact", 0)
