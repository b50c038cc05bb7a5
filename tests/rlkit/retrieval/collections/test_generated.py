"""The generated collection: grades follow from the facets, and splits never share a query's meaning."""

import hashlib
from collections import Counter

import numpy as np
import pytest

from rlkit.retrieval.collections.generated import (
    BUILDERS,
    FACETS,
    KINDS,
    MATERIALS,
    USES,
    Buildings,
    generate,
)
from rlkit.retrieval.collections.load import load_collection

BUILDINGS = Buildings(400, 3)


@pytest.fixture(scope="module")
def collection():
    return generate(400, 3)


def test_document_depends_only_on_seed_and_index(collection):
    larger = generate(500, 3)
    assert [d.text for d in larger.documents()][:400] == [d.text for d in collection.documents()]
    assert list(generate(400, 3).documents()) == list(collection.documents())
    assert generate(400, 3).qrels == collection.qrels != generate(400, 4).qrels


def test_collection_equals_recorded_one(collection):
    """A refactoring must not change generated data: results on it are compared across versions."""
    content = repr((list(collection.documents()), collection.queries, collection.qrels))
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "742faa764144a5b9"


def test_ids_and_names_are_unique(collection):
    documents = list(collection.documents())
    assert len({d.id for d in documents}) == len({d.title for d in documents}) == 400


def test_document_names_its_kind_but_no_region(collection):
    for i, document in enumerate(collection.documents()):
        kind = int(BUILDINGS.facets[i][0])
        assert any(word in document.text for word in KINDS[kind][0])
        assert not any(BUILDINGS.region(r) in document.text for r in range(8))


def test_towns_and_regions_have_unique_names():
    """A town belongs to one region, so a region can be learned from the towns that documents name."""
    towns = [BUILDINGS.town(region, n) for region in range(8) for n in range(6)]
    assert len(set(towns)) == len(towns) and len({BUILDINGS.region(r) for r in range(8)}) == 8


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_grades_agree_with_query_text(collection, split):
    """Derive the relevant buildings again from the text of the query."""
    for name, grades in collection.judged(split).items():
        text = collection.queries[name].lower()
        relevant = [i for i in range(400) if grades.get(f"b{i}") == 2]
        assert relevant and len(relevant) <= 40
        # Every condition includes the kind, so all relevant buildings have the same one.
        kinds = Counter(int(BUILDINGS.facets[i][0]) for i in relevant)
        (kind,) = kinds
        assert text.startswith((KINDS[kind][1], *KINDS[kind][0]))
        if " of the same " in text:
            facet = next(n for n, f in enumerate(FACETS) if f"the same {f} as" in text)
            anchor = next(i for i in range(400) if text.endswith(BUILDINGS.name(i).lower()))
            facets = BUILDINGS.facets
            same = (facets[:, 0] == kind) & (facets[:, facet] == facets[anchor][facet])
            assert set(relevant) == set(np.flatnonzero(same)) - {anchor}


def test_excluded_value_has_no_grade():
    num_exclusions = 0
    for i in range(60):
        text, grades = BUILDINGS.query("train", i)
        if " but not " not in text:
            continue
        num_exclusions += 1
        excluded = text.partition(" but not ")[2]
        if excluded.startswith("in the "):
            region = next(r for r in range(8) if BUILDINGS.region(r) in excluded)
            assert all(BUILDINGS.facets[int(name[1:])][4] != region for name in grades)
        else:
            facet = {"made": 1, "put": 2, "used": 3}[excluded.split()[0]]
            values = (MATERIALS, BUILDERS, USES)[facet - 1]
            value = next(
                v
                for v, (document_phrases, query_phrase) in enumerate(values)
                if excluded.endswith((query_phrase, *document_phrases))
            )
            assert all(BUILDINGS.facets[int(name[1:])][facet] != value for name in grades)
    assert num_exclusions > 3


def test_splits_share_no_query(collection):
    texts = {s: {collection.queries[q] for q in collection.judged(s)} for s in ("train", "dev", "test")}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"]
    assert not texts["dev"] & texts["test"]


def test_load_collection_generates_by_name():
    assert load_collection("generated:300:1").name == "generated:300:1"


def test_folds_partition_all_queries(collection):
    folds = [collection.folds(5, i) for i in range(5)]
    tests = [set(fold.judged("test")) for fold in folds]
    # The test splits of all folds are disjoint and cover the 600 + 100 + 200 queries.
    assert sum(map(len, tests)) == len(set().union(*tests)) == 900
    for fold in folds:
        parts = [set(fold.judged(split)) for split in ("train", "dev", "test")]
        assert sum(map(len, parts)) == 900 == len(set().union(*parts))
    # With two folds, one is for testing and one for training.
    assert "dev" not in collection.folds(2, 0).qrels
