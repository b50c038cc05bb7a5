"""Hierarchical clustering of a collection: a tree with documents as leaves and a summary of each inner node.

Clusters are built bottom-up with Ward linkage over unit vectors, from an encoder or from tf-idf. This follows
LATTICE (arXiv 2510.13217), whose own code for this step is not released. A collection of more than
`MAX_CLUSTERED` documents is first partitioned by k-means. The summary of a node lists words that are more
frequent in its documents than in its parent's, and titles of its most central documents; or a model writes it
(`rlkit.envs.ranking.summaries`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from rlkit.errors import UserError
from rlkit.retrieval.cache import collection_digest, locked_cache_path, write_json
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, full_text, passage_text
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.queries import snippet
from rlkit.words import keywords

FORMAT = 2  # of the cached file; in version 1, the texts of sections contained titles of documents
MAX_CLUSTERED = 5000  # vectors in one agglomerative clustering, whose time and memory are quadratic
SVD_DIMENSIONS = 128  # to which tf-idf vectors are reduced
MAX_WORDS, MAX_TITLES = 8, 2  # in the summary of a node
# Arguments of scikit-learn's vectorizers. Their own pattern takes an unspaced sentence for one word.
_WORDS: dict[str, Any] = {
    "stop_words": "english",
    "tokenizer": partial(keywords, min_length=2),
    "token_pattern": None,
}


@dataclass(frozen=True)
class Tree:
    """Tree whose nodes are numbered; the root is 0.

    Attributes:
        children: Children of each node; leaves have none.
        texts: Text of each node: the truncated document of a leaf, or the summary of an inner node.
        documents: Judged id of each leaf's document; "" for an inner node.
        examples: Leaves and titles of central documents of each node, which `text` adds to its summary; empty
            if no node has any.
    """

    children: Sequence[Sequence[int]]
    texts: Sequence[str]
    documents: Sequence[str]
    examples: Sequence[Sequence[tuple[int, str]]] = ()

    @cached_property
    def parents(self) -> dict[int, int]:
        """Parent of each node except the root."""
        return {child: node for node, children in enumerate(self.children) for child in children}

    @cached_property
    def leaf_of(self) -> dict[str, int]:
        """Leaf of each document, by judged id."""
        return {document: node for node, document in enumerate(self.documents) if document}

    def ancestors(self, node: int) -> list[int]:
        """Return the inner nodes from the root down to the parent of a node."""
        path = []
        while node:
            node = self.parents[node]
            path.append(node)
        return path[::-1]

    def text(self, node: int, hidden: Set[int] = frozenset()) -> str:
        """Return the text to show of a node, without the titles of hidden leaves."""
        examples = self.examples[node] if self.examples else ()
        titles = [title for leaf, title in examples if leaf not in hidden]
        return f"{self.texts[node]} (such as {', '.join(titles)})" if titles else self.texts[node]

    def hidden_nodes(self, excluded: Iterable[str]) -> frozenset[int]:
        """Return the leaves of excluded documents and the nodes with no other leaves, but never the root."""
        hidden: set[int] = set()
        for document in excluded:
            node = self.leaf_of.get(document, 0)
            while node and all(child in hidden for child in self.children[node]):
                hidden.add(node)
                node = self.parents[node]
        return frozenset(hidden)


def open_tree(
    collection: Collection, embedder: str, branching: int, document_words: int, summaries: str
) -> Tree:
    """Load the tree of a collection from the cache. The first process builds it while the others wait.

    Args:
        collection: Collection whose documents are the leaves. If it ranks passages, the first passage of each
            document is the leaf.
        embedder: Vectors to cluster: "words" for tf-idf, or "dense:MODEL".
        branching: Approximate number of children of a node; the maximum is twice this number.
        document_words: Maximum number of words of a document to show.
        summaries: Summaries of inner nodes: "words", or the name of a model that writes them.

    Raises:
        UserError: There is no such embedder or model, or the collection has fewer than two documents.
    """
    settings = (embedder, branching, document_words, summaries)
    models = [embedder.removeprefix("dense:")] if embedder.startswith("dense:") else []
    models += [summaries] if summaries != "words" else []
    digest = collection_digest(collection, *settings, f"tree {FORMAT}", by_words=True, models=models)
    with locked_cache_path(f"tree-{digest}.json") as path:
        if not path.exists():
            tree = build_tree(collection, *settings)
            write_json(path, asdict(tree))
        return Tree(**json.loads(path.read_text(encoding="utf-8")))


def build_tree(
    collection: Collection, embedder: str, branching: int, document_words: int, summaries: str
) -> Tree:
    """Build the tree of a collection without the cache. For the arguments, see `open_tree`."""
    leaves: dict[str, Document] = {}
    for document in collection.documents():
        leaves.setdefault(collection.judged_id(document.id), document)
    if len(leaves) < 2:
        raise UserError(
            f"{collection.name} has too few documents for a tree: {len(leaves)}, but at least 2 are needed"
        )
    texts = [full_text(document) for document in leaves.values()]
    vectors = embed(texts, embedder)
    root = _cluster(vectors, branching)
    flat = _FlatTree(root)
    shown = {i: snippet(passage_text(document), document_words) for i, document in enumerate(leaves.values())}
    examples: list[list[tuple[int, str]]] = []
    if summaries == "words":
        node_summaries = _word_summaries(flat, texts)
        examples = _central_titles(flat, vectors, [document.title for document in leaves.values()])
    else:
        from rlkit.envs.ranking.summaries import summarize_nodes

        node_summaries = summarize_nodes(flat.children, flat.leaf, shown, summaries)
    ids = list(leaves)
    return Tree(
        flat.children,
        [node_summaries[node] if leaf is None else shown[leaf] for node, leaf in enumerate(flat.leaf)],
        ["" if leaf is None else ids[leaf] for leaf in flat.leaf],
        examples,
    )


def embed(texts: Sequence[str], embedder: str) -> np.ndarray:
    """Embed strings as unit vectors, (texts, dimensions); raises UserError if there is no such embedder."""
    kind, _, model = embedder.partition(":")
    if kind == "dense" and model:
        return encode(load_encoder(model).encode_document, texts, None)
    if embedder != "words":
        raise UserError(f"there is no embedder {embedder!r}; use 'words' or 'dense:MODEL'")
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    try:
        counts = TfidfVectorizer(**_WORDS, sublinear_tf=True).fit_transform(texts)
    except ValueError:  # the vocabulary is empty, so all documents look the same
        return np.ones((len(texts), 1))
    if min(counts.shape) > SVD_DIMENSIONS:
        counts = TruncatedSVD(SVD_DIMENSIONS, random_state=0).fit_transform(counts)
    return np.asarray(normalize(counts if isinstance(counts, np.ndarray) else counts.toarray()))


Nested = int | list[Any]  # the number of a leaf, or the list of an inner node's children


def _cluster(vectors: np.ndarray, branching: int) -> list[Nested]:
    """Cluster nodes bottom-up until at most `branching` are left, and return them: the root's children."""
    nodes: list[Nested] = list(range(len(vectors)))
    while len(nodes) > branching:
        groups = [group for part in _partition(vectors) for group in _split(part, vectors, branching)]
        nodes = [[nodes[i] for i in group] if len(group) > 1 else nodes[group[0]] for group in groups]
        # In the next round, a cluster is represented by its normalized mean.
        means = np.stack([vectors[group].mean(0) for group in groups])
        vectors = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return nodes


def _partition(vectors: np.ndarray) -> list[np.ndarray]:
    """Partition the indices of the vectors into parts of at most `MAX_CLUSTERED`."""
    if len(vectors) <= MAX_CLUSTERED:
        return [np.arange(len(vectors))]
    from sklearn.cluster import MiniBatchKMeans

    num_parts = 2 * -(-len(vectors) // MAX_CLUSTERED)  # rounded up, with room for unequal parts
    labels = MiniBatchKMeans(num_parts, random_state=0).fit_predict(vectors)
    parts = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    # k-means does not bound the size of a part, and many similar vectors can end up in one.
    return [part[i : i + MAX_CLUSTERED] for part in parts for i in range(0, len(part), MAX_CLUSTERED)]


def _split(indices: np.ndarray, vectors: np.ndarray, branching: int) -> list[list[int]]:
    """Split vectors into clusters of about `branching` and at most 2 * `branching` members."""
    if len(indices) <= branching:
        return [indices.tolist()]
    from sklearn.cluster import AgglomerativeClustering

    labels = AgglomerativeClustering(-(-len(indices) // branching)).fit_predict(vectors[indices])
    clusters: list[list[int]] = []
    for label in np.unique(labels):
        cluster = indices[labels == label]
        if len(cluster) <= 2 * branching:
            clusters.append(cluster.tolist())
        elif len(cluster) == len(indices):  # nothing was split, so recursion would not end
            clusters += [cluster[i : i + branching].tolist() for i in range(0, len(cluster), branching)]
        else:
            clusters += _split(cluster, vectors, branching)
    return clusters


class _FlatTree:
    """Nested clusters as numbered nodes; parents precede their children.

    Attributes:
        children: Children of each node.
        leaf: Number of the text of each leaf; None for an inner node.
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
        """Return the numbers of the texts below a node."""
        if (leaf := self.leaf[node]) is not None:
            return [leaf]
        return [leaf for child in self.children[node] for leaf in self.leaves(child)]


def _word_summaries(flat: _FlatTree, texts: Sequence[str]) -> dict[int, str]:
    """Return characteristic words of each inner node; the root's summary is "".

    A word is characteristic if its document frequency p in the node exceeds the frequency q in the parent: it
    is ranked by its term of the Kullback-Leibler divergence, p log(p / q).
    """
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(**_WORDS, binary=True)
    # The vectorizer raises if no text has a word, so add one.
    counts = vectorizer.fit_transform([*texts, "document"]).tocsr()
    vocabulary = vectorizer.get_feature_names_out()
    summaries: dict[int, str] = {0: ""}

    def document_frequency(leaves: Sequence[int]) -> np.ndarray:
        return np.asarray(counts[leaves].mean(0)).ravel()

    for node, children in enumerate(flat.children):
        inner_children = [child for child in children if flat.children[child]]
        if not inner_children:
            continue
        parent_frequency = document_frequency(flat.leaves(node))
        for child in inner_children:
            leaves = flat.leaves(child)
            frequency = document_frequency(leaves)
            divergence = frequency * np.log(
                np.maximum(frequency, 1e-12) / np.maximum(parent_frequency, 1e-12)
            )
            best = [i for i in np.argsort(-divergence, kind="stable")[:MAX_WORDS] if divergence[i] > 0]
            summaries[child] = ", ".join(vocabulary[i] for i in best) or f"{len(leaves)} documents"
    return summaries


def _central_titles(
    flat: _FlatTree, vectors: np.ndarray, titles: Sequence[str]
) -> list[list[tuple[int, str]]]:
    """Return the leaves and titles of the most central documents of each inner node except the root."""
    node_of = {leaf: node for node, leaf in enumerate(flat.leaf) if leaf is not None}
    examples: list[list[tuple[int, str]]] = [[] for _ in flat.children]
    for node, children in enumerate(flat.children):
        if not node or not children:
            continue
        leaves = flat.leaves(node)
        central = np.argsort(-vectors[leaves] @ vectors[leaves].mean(0), kind="stable")[:MAX_TITLES]
        examples[node] = [(node_of[leaves[i]], titles[leaves[i]]) for i in central if titles[leaves[i]]]
    return examples
