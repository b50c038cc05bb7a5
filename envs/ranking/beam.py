"""Best-first beam search through a document tree, guided by scores of the nodes (LATTICE, arXiv 2510.13217).

A child c of node v with score s(c) in [0, 1] has the path relevance::

    path(c) = alpha s(c) + (1 - alpha) path(v)   if s(c) > 0.09, else s(c);   path(root) = 1

The next nodes to open are those with the highest path relevance in the entire tree. The final score of a
document is alpha s(c) + (1 - alpha) path(v), where s(c) can be calibrated over the slates.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import numpy as np

from rlkit.envs.ranking.tree import Tree

MIN_CHAINED_SCORE = 0.09  # the parent's path relevance counts only for scores above it
LOW_ANCHOR_WEIGHT = 1e-4  # sampling weight of an anchor with a low score


@dataclass(frozen=True)
class Slate:
    """List of nodes that the model scores together.

    Attributes:
        node: Opened node.
        items: Children of the node.
        anchors: Nodes of earlier slates to score again, which link the scales of the slates.
    """

    node: int
    items: tuple[int, ...]
    anchors: tuple[int, ...] = ()

    @property
    def shown(self) -> tuple[int, ...]:
        """All nodes to score: the items, then the anchors."""
        return self.items + self.anchors


@dataclass
class Beam:
    """State of a beam search.

    Attributes:
        tree: Tree to search.
        alpha: Weight of a node's own score in its path relevance.
        hidden: Nodes that are never shown; see `Tree.hidden_nodes`.
        slates: Scored slates, in order.
        scores: Scores of the nodes that each slate shows, in [0, 1].
    """

    tree: Tree
    alpha: float = 0.5
    hidden: Set[int] = frozenset()
    slates: list[Slate] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    def add_scores(self, slates: Sequence[Slate], scores: Sequence[Sequence[float]]) -> None:
        """Append scored slates, with one list of scores in [0, 1] per slate."""
        self.slates += slates
        self.scores += [list(slate_scores) for slate_scores in scores]

    def path_relevance(self) -> dict[int, float]:
        """Return the path relevance of the root and of each scored node."""
        relevance = {0: 1.0}
        for slate, scores in zip(self.slates, self.scores, strict=True):
            # Not strict, because the scores of anchors come last. An anchor keeps its first path relevance.
            for item, score in zip(slate.items, scores, strict=False):
                chained = self.alpha * score + (1 - self.alpha) * relevance[slate.node]
                relevance[item] = chained if score > MIN_CHAINED_SCORE else score
        return relevance

    def next_nodes(self, width: int) -> list[int]:
        """Return the `width` unopened inner nodes with the highest path relevance, excluding relevance 0."""
        relevance, opened = self.path_relevance(), {slate.node for slate in self.slates}
        unopened = [n for n in relevance if self.tree.children[n] and n not in opened and relevance[n] > 0]
        return sorted(unopened, key=lambda n: (-relevance[n], n))[:width]

    def ranking(self, calibrated: Mapping[int, float] | None = None) -> list[str]:
        """Return the documents with a score above 0, best first; ties keep the order of scoring.

        Args:
            calibrated: Scores of nodes that replace the model's own scores.
        """
        relevance, final = self.path_relevance(), {}
        for slate, scores in zip(self.slates, self.scores, strict=True):
            for item, score in zip(slate.items, scores, strict=False):
                if self.tree.documents[item] and score > 0:
                    leaf_score = score if calibrated is None else calibrated[item]
                    final[item] = self.alpha * leaf_score + (1 - self.alpha) * relevance[slate.node]
        return [self.tree.documents[item] for item in sorted(final, key=final.__getitem__, reverse=True)]

    def open_nodes(self, nodes: Sequence[int], anchors: int = 0, seed: object = None) -> list[Slate]:
        """Return a slate of the children of each node that are not hidden, with anchors.

        Args:
            nodes: Nodes to open.
            anchors: Maximum number of already scored documents to add to a slate of documents. A slate of
                inner nodes gets one anchor: the best opened node of the same depth. 0 disables both.
            seed: Seed that selects the anchors, together with all scores so far.
        """
        slates = []
        for node in nodes:
            items = tuple(child for child in self.tree.children[node] if child not in self.hidden)
            chosen: Sequence[int] = ()
            if anchors and not any(self.tree.children[item] for item in items):
                chosen = self._sample_scored_documents(anchors, f"{seed} {node}")
            elif anchors and node:
                chosen = self._best_opened_node(len(self.tree.ancestors(items[0])))
            slates.append(Slate(node, items, tuple(chosen)))
        return slates

    def _sample_scored_documents(self, max_documents: int, seed: str) -> list[int]:
        """Sample leaves without replacement, with weight 4 ** (2 s) above the valley of the scores s."""
        leaves = [(n, score) for n, score in self.calibrated().items() if self.tree.documents[n]]
        if not leaves:
            return []
        nodes, scores = [n for n, _ in leaves], np.array([score for _, score in leaves])
        weights = np.where(scores > valley(scores), 4 ** (2 * scores), LOW_ANCHOR_WEIGHT)
        generator = np.random.default_rng(random.Random(seed).getrandbits(64))
        size = min(max_documents, len(nodes))
        return [nodes[i] for i in generator.choice(len(nodes), size, False, weights / weights.sum())]

    def _best_opened_node(self, depth: int) -> list[int]:
        relevance, opened = self.path_relevance(), {slate.node for slate in self.slates}
        candidates = [n for n in opened if n and len(self.tree.ancestors(n)) == depth]
        return [max(candidates, key=lambda n: (relevance[n], -n))] if candidates else []

    def calibrated(self) -> dict[int, float]:
        """Return the scores of all scored nodes on one scale; see `rlkit.envs.ranking.calibration`."""
        from rlkit.envs.ranking.calibration import calibrate

        return calibrate([slate.shown for slate in self.slates], self.scores)


def valley(scores: np.ndarray) -> float:
    """Return the score with the lowest density between the two components of a Gaussian mixture.

    The valley separates high from low scores. With two distinct scores it is their mean, and with fewer it is
    below all of them.
    """
    num_distinct = len(np.unique(scores))
    if num_distinct < 2:
        return -1.0
    if num_distinct == 2:
        return float(scores.mean())
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, random_state=0).fit(scores[:, None])
    low, high = np.sort(mixture.means_.ravel())
    between = np.linspace(low, high, 201)
    return float(between[mixture.score_samples(between[:, None]).argmin()])
