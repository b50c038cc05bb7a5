"""Random graphs, and the endless stream of them that each split draws from.

A graph belongs to a split by its Weisfeiler-Lehman hash, so graphs of different splits are never isomorphic,
whatever the seeds and sizes.
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
TRIES = 100  # draws in a row without a new graph of the split, after which its graphs may be used again
ATTEMPTS = 20_000  # draws without a single graph of the split, after which there is taken to be none
# Shares of the splits in percent. The salt spreads the few graphs of 3 to 5 nodes over all splits.
SHARES = {"train": 70, "dev": 15, "test": 15}
SALT = "7984"


@dataclass(frozen=True)
class GraphLaw:
    """How a graph is drawn (arXiv 2512.20760, data generation).

    The first `roots` nodes have no parents (a number, or None for uniform in 1..num_nodes - 1); every other
    node j has min(j, uniform in 1..max_in_degree) parents, drawn from 0..j-1 without replacement. So indices
    are a topological order.
    """

    num_nodes: int
    roots: int | None
    max_in_degree: int

    def draw(self, rng: np.random.Generator) -> Parents:
        """Draw the parents of each node."""
        roots = self.roots if self.roots is not None else int(rng.integers(1, self.num_nodes))
        parents: list[tuple[int, ...]] = [()] * roots
        for node in range(roots, self.num_nodes):
            degree = min(node, int(rng.integers(1, self.max_in_degree + 1)))
            parents.append(tuple(int(p) for p in rng.choice(node, size=degree, replace=False)))
        return tuple(parents)


def structure_hash(parents: Parents) -> str:
    """The Weisfeiler-Lehman hash of the graph without names: isomorphic graphs have the same.

    Ours and not networkx's, whose values change between versions: the split of a graph must not.
    """
    children: list[list[int]] = [[] for _ in parents]
    for node, above in enumerate(parents):
        for parent in above:
            children[parent].append(node)
    colours = [b""] * len(parents)
    for _ in range(WL_ROUNDS):
        colours = [
            _digest(
                colour, b"<", *sorted(colours[p] for p in above), b">", *sorted(colours[c] for c in below)
            )
            for colour, above, below in zip(colours, parents, children, strict=True)
        ]
    return _digest(*sorted(colours)).hex()


def _digest(*parts: bytes) -> bytes:
    return blake2b(b"".join(parts), digest_size=16).digest()


def split_of(structure: str) -> str:
    """The split that a graph with this hash belongs to."""
    point = int(_digest(SALT.encode(), structure.encode()).hex(), 16) % 100
    for split, share in SHARES.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("the shares sum to 100")


def random_stream(
    purpose: int, split: str, seed: int, graph: int = 0, question: int = 0
) -> np.random.Generator:
    """The random numbers for one purpose: 0 graphs, 1 the tables of a graph, 2 a question about it.

    Keys have one length because numpy pads them with zeros: [1, 2] and [1, 2, 0] are the same stream.
    """
    return np.random.default_rng([purpose, SPLITS.index(split), seed, graph, question])


def graph_stream(law: GraphLaw, split: str, seed: int) -> Iterator[tuple[Parents, str]]:
    """Yield graphs of a split with their hashes, without end; it depends on the arguments alone.

    No hash repeats until `TRIES` draws in a row gave no new graph; then all may be used again. With 10 nodes
    that does not happen; with 3 there are 5 graphs, which come back with new tables and names.

    Raises:
        UserError: no graph of this law falls into the split.
    """
    rng = random_stream(0, split, seed)
    used: set[str] = set()
    tries = 0
    while True:
        parents = law.draw(rng)
        structure = structure_hash(parents)
        if split_of(structure) == split and structure not in used:
            used.add(structure)
            tries = 0
            yield parents, structure
            continue
        tries += 1
        if used and tries == TRIES:
            used.clear()
        if tries == ATTEMPTS:
            raise UserError(
                f"there is no {law.num_nodes}-node graph for the split {split!r}: raise num_nodes"
                " (or leave roots and max_in_degree at their defaults)"
            )
