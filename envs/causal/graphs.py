"""Random graphs, and the endless stream of graphs that each split draws from.

The Weisfeiler-Lehman hash of a graph determines its split, so graphs of different splits are never
isomorphic, whatever the seeds and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from rlkit.environment import SPLITS
from rlkit.errors import UserError

Parents = tuple[tuple[int, ...], ...]

WL_ROUNDS = 4
MAX_DRAWS_WITHOUT_NEW = 100  # consecutive draws without a new graph of the split; then graphs may repeat
MAX_DRAWS_WITHOUT_ANY = 20_000  # draws without any graph of the split; then it is assumed to have none
# Percentage of graphs in each split. This salt spreads the few graphs of 3 to 5 nodes over all splits.
SHARES = {"train": 70, "dev": 15, "test": 15}
SALT = "7984"


@dataclass(frozen=True)
class GraphConfig:
    """Distribution of random graphs (arXiv 2512.20760, data generation).

    The first `roots` nodes have no parents. Every other node j has min(j, uniform in 1..max_in_degree)
    parents, drawn from 0..j-1 without replacement. So node indices are a topological order.

    Attributes:
        num_nodes: Number of nodes.
        roots: Number of nodes without parents; None draws it uniformly from 1..num_nodes - 1.
        max_in_degree: Maximum number of parents of a node.
    """

    num_nodes: int
    roots: int | None
    max_in_degree: int

    def draw(self, rng: np.random.Generator) -> Parents:
        """Draw a graph and return the parents of each node."""
        roots = self.roots if self.roots is not None else int(rng.integers(1, self.num_nodes))
        parents: list[tuple[int, ...]] = [()] * roots
        for node in range(roots, self.num_nodes):
            degree = min(node, int(rng.integers(1, self.max_in_degree + 1)))
            parents.append(tuple(int(p) for p in rng.choice(node, size=degree, replace=False)))
        return tuple(parents)


def structure_hash(parents: Parents) -> str:
    """Return the Weisfeiler-Lehman hash of the unlabeled graph; isomorphic graphs have the same hash.

    networkx has such a hash, too, but its values change between versions, and the split of a graph must not.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, node_parents in enumerate(parents):
        for parent in node_parents:
            children[parent].append(node)
    colors = [b""] * len(parents)
    for _ in range(WL_ROUNDS):
        next_colors = []
        for color, node_parents, node_children in zip(colors, parents, children, strict=True):
            parent_colors = sorted(colors[p] for p in node_parents)
            child_colors = sorted(colors[c] for c in node_children)
            next_colors.append(_digest(color, b"<", *parent_colors, b">", *child_colors))
        colors = next_colors
    return _digest(*sorted(colors)).hex()


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=16).digest()


def split_of(structure: str) -> str:
    """Return the split that graphs with this hash belong to."""
    point = int(_digest(SALT.encode(), structure.encode()).hex(), 16) % 100
    for split, share in SHARES.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares sum to 100")


def random_stream(
    purpose: int, split: str, seed: int, graph: int = 0, question: int = 0
) -> np.random.Generator:
    """Return the random generator for one purpose: 0 graphs, 1 the tables of a graph, 2 a question about it.

    All seed sequences have the same length because numpy pads them with zeros: [1, 2] and [1, 2, 0] give the
    same stream.
    """
    return np.random.default_rng([purpose, SPLITS.index(split), seed, graph, question])


def graph_stream(config: GraphConfig, split: str, seed: int) -> Iterator[tuple[Parents, str]]:
    """Yield graphs of a split with their hashes, without end. The stream depends on the arguments alone.

    No hash repeats until `MAX_DRAWS_WITHOUT_NEW` consecutive draws give no new graph; then all graphs may be
    used again. With 10 nodes that does not happen in practice. With 3 nodes there are only 5 graphs, which
    recur with new tables and names.

    Raises:
        UserError: No graph of this configuration is in the split.
    """
    rng = random_stream(0, split, seed)
    used: set[str] = set()
    draws = 0  # since the last new graph
    while True:
        parents = config.draw(rng)
        structure = structure_hash(parents)
        if split_of(structure) == split and structure not in used:
            used.add(structure)
            draws = 0
            yield parents, structure
            continue
        draws += 1
        if used and draws == MAX_DRAWS_WITHOUT_NEW:
            used.clear()
        if draws == MAX_DRAWS_WITHOUT_ANY:
            raise UserError(
                f"there is no {config.num_nodes}-node graph for the split {split!r}: raise num_nodes"
                " (or leave roots and max_in_degree at their defaults)"
            )
