"""Best-first beam search through a tree by scores of its nodes (LATTICE, arXiv 2510.13217).

Of a node c below v with the score s(c) in [0, 1] the path relevance is::

    path(c) = alpha s(c) + (1 - alpha) path(v)   if s(c) > 0.09, else s(c);   path(root) = 1

The next nodes to open are those with the highest one in the whole tree. A document's final score is
(1 - alpha) path(v) + alpha s(c), with s(c) calibrated over the slates where that is wanted.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlkit.envs.ranking.tree import Tree

LEAST = 0.09  # a score that is not chained
RARE = 1e-4  # weight of an anchor below the threshold


@dataclass(frozen=True)
class Slate:
    """Children of an opened node, and anchors: nodes seen before that are scored again beside them."""

    node: int
    items: tuple[int, ...]
    anchors: tuple[int, ...] = ()

    @property
    def shown(self) -> tuple[int, ...]:
        """All that is to be scored."""
        return self.items + self.anchors


@dataclass
class Beam:
    """A search that has seen some slates.

    Attributes:
        tree: what is searched.
        alpha: share of a node's own score.
        slates, scores: those seen, with the scores in [0, 1] of what they show.
    """

    tree: Tree
    alpha: float = 0.5
    slates: list[Slate] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)

    def see(self, slates: Sequence[Slate], scores: Sequence[Sequence[float]]) -> None:
        """Take in the scores of further slates."""
        self.slates += slates
        self.scores += [list(one) for one in scores]

    def path(self) -> dict[int, float]:
        """The path relevance of each node that was scored."""
        found = {0: 1.0}
        for slate, scores in zip(self.slates, self.scores, strict=True):
            for item, score in zip(slate.items, scores, strict=False):  # anchors are behind the items
                chained = self.alpha * score + (1 - self.alpha) * found[slate.node]
                found[item] = chained if score > LEAST else score
        return found

    def next(self, width: int) -> list[int]:
        """The inner nodes to open: the best ones that are not open, never one that was scored 0."""
        path, opened = self.path(), {slate.node for slate in self.slates}
        waiting = [n for n in path if self.tree.children[n] and n not in opened and path[n] > 0]
        return sorted(waiting, key=lambda n: (-path[n], n))[:width]

    def ranking(self, calibrated: Mapping[int, float] | None = None) -> list[str]:
        """Documents that were scored above 0, best first; equal ones as they were seen.

        Args:
            calibrated: scores of leaves that take the place of those that were given.
        """
        path, final = self.path(), {}
        for slate, scores in zip(self.slates, self.scores, strict=True):
            for item, score in zip(slate.items, scores, strict=False):
                if self.tree.documents[item] and score > 0:
                    own = score if calibrated is None else calibrated[item]
                    final[item] = self.alpha * own + (1 - self.alpha) * path[slate.node]
        return [self.tree.documents[item] for item in sorted(final, key=final.__getitem__, reverse=True)]

    def open(self, nodes: Sequence[int], anchors: int = 0, seed: object = None) -> list[Slate]:
        """Slates of nodes.

        Args:
            nodes: to open.
            anchors: documents seen before that stand beside a slate of documents; beside a slate of inner
                nodes stands the best one of the same depth. 0: neither.
            seed: of the choice, with everything that was seen.
        """
        slates = []
        for node in nodes:
            items = tuple(self.tree.children[node])
            chosen: Sequence[int] = ()
            if anchors and not any(self.tree.children[item] for item in items):
                chosen = self._seen_documents(anchors, f"{seed} {node}")
            elif anchors and node:
                chosen = self._best_of_depth(len(self.tree.above(items[0])))
            slates.append(Slate(node, items, tuple(chosen)))
        return slates

    def _seen_documents(self, most: int, seed: str) -> list[int]:
        """Drawn with weights 4 ** (2 s) above the valley between good and bad ones, else almost none."""
        if not (found := {n: s for n, s in self.calibrated().items() if self.tree.documents[n]}):
            return []
        names, scores = list(found), np.array(list(found.values()))
        weights = np.where(scores > valley(scores), 4 ** (2 * scores), RARE)
        generator = np.random.default_rng(random.Random(seed).getrandbits(64))
        size = min(most, len(names))
        return [names[i] for i in generator.choice(len(names), size, False, weights / weights.sum())]

    def _best_of_depth(self, depth: int) -> list[int]:
        path, opened = self.path(), {slate.node for slate in self.slates}
        same = [n for n in opened if n and len(self.tree.above(n)) == depth]
        return [max(same, key=lambda n: (path[n], -n))] if same else []

    def calibrated(self) -> dict[int, float]:
        """Scores on one scale for all that was scored, by `rlkit.envs.ranking.calibration`."""
        from rlkit.envs.ranking.calibration import calibrate

        return calibrate([slate.shown for slate in self.slates], self.scores)


def valley(scores: np.ndarray) -> float:
    """The score where two Gaussians that are fitted to the scores cross; below all of them where none are."""
    if len(np.unique(scores)) < 3:
        return float(scores.mean()) if len(np.unique(scores)) == 2 else -1.0
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(2, random_state=0).fit(scores[:, None])
    low, high = np.sort(mixture.means_.ravel())
    between = np.linspace(low, high, 201)
    return float(between[mixture.score_samples(between[:, None]).argmin()])
