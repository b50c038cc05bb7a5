"""The generated collection: judgments follow from the facets, splits share no meaning, items no order."""

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

MADE = Buildings(400, 3)


@pytest.fixture(scope="module")
def collection():
    return generate(400, 3)


def test_item_i_depends_on_seed_and_i_alone(collection):
    larger = generate(500, 3)
    assert [d.text for d in larger.documents()][:400] == [d.text for d in collection.documents()]
    assert list(generate(400, 3).documents()) == list(collection.documents())
    assert generate(400, 3).qrels == collection.qrels != generate(400, 4).qrels


def test_ids_and_names_differ(collection):
    documents = list(collection.documents())
    assert len({d.id for d in documents}) == len({d.title for d in documents}) == 400


def test_a_text_says_every_facet_and_names_no_region(collection):
    for i, document in enumerate(collection.documents()):
        kind = int(MADE.facets[i][0])
        assert any(word in document.text for word in KINDS[kind][0])
        assert not any(MADE.region(r) in document.text for r in range(8))


def test_a_text_with_its_name_tells_the_same_as_its_facets():
    """Towns differ between regions: a region can be learned from the towns."""
    towns = [MADE.town(region, n) for region in range(8) for n in range(6)]
    assert len(set(towns)) == len(towns) and len({MADE.region(r) for r in range(8)}) == 8


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_grades_are_those_of_the_query(collection, split):
    """Judged again by reading the query: each of its parts names a facet."""
    for name, grades in collection.judged(split).items():
        text = collection.queries[name].lower()
        right = [i for i in range(400) if grades.get(f"b{i}") == 2]
        assert right and len(right) <= 40
        kinds = Counter(int(MADE.facets[i][0]) for i in right)
        (kind,) = kinds
        assert text.startswith((KINDS[kind][1], *KINDS[kind][0]))
        if " of the same " in text:
            facet = next(n for n, f in enumerate(FACETS) if f"the same {f} as" in text)
            anchor = next(i for i in range(400) if text.endswith(MADE.name(i).lower()))
            same = (MADE.facets[:, 0] == kind) & (MADE.facets[:, facet] == MADE.facets[anchor][facet])
            assert set(right) == set(np.flatnonzero(same)) - {anchor}


def test_what_is_excluded_has_no_grade():
    found = 0
    for i in range(60):
        text, grades = MADE.query("train", i)
        if " but not " not in text:
            continue
        found += 1
        out = text.partition(" but not ")[2]
        if out.startswith("in the "):
            region = next(r for r in range(8) if MADE.region(r) in out)
            assert all(MADE.facets[int(name[1:])][4] != region for name in grades)
        else:
            facet = next(
                n for n, start in enumerate(("", "made", "put", "used")) if out.startswith(start or "?")
            )
            words, value = (MATERIALS, BUILDERS, USES)[facet - 1], None
            value = next(v for v, (known, own) in enumerate(words) if out.endswith((own, *known)))
            assert all(MADE.facets[int(name[1:])][facet] != value for name in grades)
    assert found > 3


def test_splits_share_no_meaning(collection):
    texts = {s: {collection.queries[q] for q in collection.judged(s)} for s in ("train", "dev", "test")}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"]
    assert not texts["dev"] & texts["test"]


def test_by_name():
    assert load_collection("generated:300:1").name == "generated:300:1"


def test_folds(collection):
    folds = [collection.folds(5, i) for i in range(5)]
    tests = [set(fold.judged("test")) for fold in folds]
    assert sum(map(len, tests)) == len(set().union(*tests)) == 900
    for fold in folds:
        parts = [set(fold.judged(split)) for split in ("train", "dev", "test")]
        assert sum(map(len, parts)) == 900 == len(set().union(*parts))
    assert "dev" not in collection.folds(2, 0).qrels
