"""A tree over a collection: documents in clusters of clusters, each inner node with a few words about it.

Clusters are made bottom-up (Ward's linkage over unit vectors, of an encoder or of words), as LATTICE does it
(arXiv 2510.13217), whose own code for this is not released. Above `MOST` documents they are dealt to parts by
k-means first. A node's words are those that its documents have more often than its parent's, and titles of
its most central documents; or a model writes them (`rlkit.envs.ranking.summaries`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.cache import cached, collection_digest, write_json
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, full_text
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.queries import cut

MOST = 5000  # vectors that are clustered at once: time and memory are quadratic
DIMENSIONS = 128  # of vectors of words
WORDS, TITLES = 8, 2  # that stand for a node


@dataclass(frozen=True)
class Tree:
    """Nodes by number; the root is 0.

    Attributes:
        children: of each node; leaves have none.
        texts: what is shown of a node: of a leaf its document, cut.
        documents: the judged id of a leaf, "" of an inner node.
    """

    children: Sequence[Sequence[int]]
    texts: Sequence[str]
    documents: Sequence[str]

    @cached_property
    def parents(self) -> dict[int, int]:
        """The parent of each node but the root."""
        return {child: node for node, children in enumerate(self.children) for child in children}

    @cached_property
    def leaf_of(self) -> dict[str, int]:
        """The leaf of each document."""
        return {document: node for node, document in enumerate(self.documents) if document}

    def above(self, node: int) -> list[int]:
        """The inner nodes from the root down to a node, without it."""
        found = []
        while node:
            node = self.parents[node]
            found.append(node)
        return found[::-1]


def open_tree(collection: Collection, embedder: str, branching: int, words: int, summaries: str) -> Tree:
    """A collection's tree in the cache; the first process that asks builds it, others wait.

    Args:
        collection: its documents are the leaves; of passages the first one of each document.
        embedder: "words", or "dense:MODEL".
        branching: children of a node, about; never more than twice as many.
        words: of a document's text that are shown.
        summaries: "words", or a model that writes them.

    Raises:
        UserError: no such embedder or model, or fewer than two documents.
    """
    digest = collection_digest(collection, embedder, branching, words, summaries)
    with cached(f"tree-{digest}.json") as path:
        if not path.exists():
            tree = build_tree(collection, embedder, branching, words, summaries)
            write_json(path, {"children": tree.children, "texts": tree.texts, "documents": tree.documents})
        return Tree(**json.loads(path.read_text(encoding="utf-8")))


def build_tree(collection: Collection, embedder: str, branching: int, words: int, summaries: str) -> Tree:
    """See `open_tree`."""
    leaves: dict[str, Document] = {}
    for document in collection.documents():
        leaves.setdefault(collection.judged_id(document.id), document)
    if len(leaves) < 2:
        raise UserError(f"{collection.name} has too few documents for a tree")
    texts = [full_text(document) for document in leaves.values()]
    vectors = embed(texts, embedder)
    root = _cluster(vectors, branching)
    flat = _Flat(root)
    shown = {i: cut(text.replace("\n", ": "), words) for i, text in enumerate(texts)}
    if summaries == "words":
        about = _about(flat, texts, vectors, [document.title for document in leaves.values()])
    else:
        from rlkit.envs.ranking.summaries import summarise

        about = summarise(flat.children, flat.leaf, shown, summaries)
    names = list(leaves)
    return Tree(
        flat.children,
        [about[node] if leaf is None else shown[leaf] for node, leaf in enumerate(flat.leaf)],
        ["" if leaf is None else names[leaf] for leaf in flat.leaf],
    )


def embed(texts: Sequence[str], embedder: str) -> np.ndarray:
    """Unit vectors of texts, (texts, dimensions); raises UserError for no such embedder."""
    kind, _, model = embedder.partition(":")
    if kind == "dense" and model:
        return encode(load_encoder(model).encode_document, texts, None)
    if embedder != "words":
        raise UserError(f"there is no embedder {embedder!r}: take words or dense:MODEL")
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        counts = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(texts)
    except ValueError:  # there is no word to tell them apart by
        return np.ones((len(texts), 1))
    if min(counts.shape) > DIMENSIONS:
        counts = TruncatedSVD(DIMENSIONS, random_state=0).fit_transform(counts)
    return np.asarray(normalize(counts if isinstance(counts, np.ndarray) else counts.toarray()))


Nested = int | list[Any]  # a leaf, or the children of a node


def _cluster(vectors: np.ndarray, branching: int) -> list[Nested]:
    """Clusters of clusters until there are few enough for the root."""
    nodes: list[Nested] = list(range(len(vectors)))
    while len(nodes) > branching:
        groups = [part for group in _parts(vectors) for part in _divide(group, vectors, branching)]
        nodes = [[nodes[i] for i in group] if len(group) > 1 else nodes[group[0]] for group in groups]
        means = np.stack([vectors[group].mean(0) for group in groups])
        vectors = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return nodes


def _parts(vectors: np.ndarray) -> list[np.ndarray]:
    """Vectors in parts that can be clustered."""
    if len(vectors) <= MOST:
        return [np.arange(len(vectors))]
    from sklearn.cluster import MiniBatchKMeans

    labels = MiniBatchKMeans(2 * -(-len(vectors) // MOST), random_state=0).fit_predict(vectors)
    parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    # A part may still be too large, of vectors that are much alike.
    return [part[i : i + MOST] for part in parts for i in range(0, len(part), MOST)]


def _divide(group: np.ndarray, vectors: np.ndarray, branching: int) -> list[list[int]]:
    """A group in clusters of about `branching` members, and of at most twice as many."""
    if len(group) <= branching:
        return [group.tolist()]
    from sklearn.cluster import AgglomerativeClustering

    labels = AgglomerativeClustering(-(-len(group) // branching)).fit_predict(vectors[group])
    found: list[list[int]] = []
    for label in np.unique(labels):
        part = group[labels == label]
        if len(part) <= 2 * branching:
            found.append(part.tolist())
        elif len(part) == len(group):  # all are the same
            found += [part[i : i + branching].tolist() for i in range(0, len(part), branching)]
        else:
            found += _divide(part, vectors, branching)
    return found


class _Flat:
    """Nodes by number, parents before their children.

    Attributes:
        children: numbers.
        leaf: the text's number of a leaf, None of an inner node.
    """

    def __init__(self, root: list[Nested]):
        self.children: list[list[int]] = []
        self.leaf: list[int | None] = []
        self._add(root)

    def _add(self, node: Nested) -> int:
        number = len(self.leaf)
        self.leaf.append(node if isinstance(node, int) else None)
        self.children.append([])
        if not isinstance(node, int):
            self.children[number] = [self._add(child) for child in node]
        return number

    def leaves(self, node: int) -> list[int]:
        """Texts below a node."""
        if (leaf := self.leaf[node]) is not None:
            return [leaf]
        return [leaf for child in self.children[node] for leaf in self.leaves(child)]


def _about(flat: _Flat, texts: Sequence[str], vectors: np.ndarray, titles: Sequence[str]) -> dict[int, str]:
    """Words and titles for each inner node."""
    from sklearn.feature_extraction.text import CountVectorizer

    reader = CountVectorizer(stop_words="english", binary=True)
    counts = reader.fit_transform([*texts, "document"]).tocsr()  # there must be a word
    names = reader.get_feature_names_out()
    about: dict[int, str] = {0: ""}

    def share(leaves: Sequence[int]) -> np.ndarray:
        return np.asarray(counts[leaves].mean(0)).ravel()

    for node, children in enumerate(flat.children):
        around = share(flat.leaves(node)) if children else None
        for child in children:
            if not flat.children[child] or around is None:
                continue
            leaves = flat.leaves(child)
            own = share(leaves)
            telling = own * np.log(np.maximum(own, 1e-12) / np.maximum(around, 1e-12))
            best = [i for i in np.argsort(-telling, kind="stable")[:WORDS] if telling[i] > 0]
            central = np.argsort(-vectors[leaves] @ vectors[leaves].mean(0), kind="stable")[:TITLES]
            named = [titles[leaves[i]] for i in central if titles[leaves[i]]]
            said = ", ".join(names[i] for i in best) or f"{len(leaves)} documents"
            about[child] = said + (f" (such as {', '.join(named)})" if named else "")
    return about
