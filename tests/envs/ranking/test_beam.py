"""The beam search and its calibration: the formulas of the spec, worked by hand."""

import numpy as np
import pytest
import torch

from rlkit.envs.ranking.beam import Beam, Slate, valley
from rlkit.envs.ranking.calibration import calibrate
from rlkit.envs.ranking.tree import Tree

#      0
#    1   2
#   3 4  5 6 7
TREE = Tree(
    children=[[1, 2], [3, 4], [5, 6, 7], [], [], [], [], []],
    texts=["", "left", "right", "a", "b", "c", "d", "e"],
    documents=["", "", "", "a", "b", "c", "d", "e"],
)


def seen(alpha=0.5, left=0.8, right=0.4):
    beam = Beam(TREE, alpha)
    beam.see(beam.open([0]), [[left, right]])
    return beam


def test_path_relevance():
    """Of two levels; a score of 0.09 or less is not chained."""
    beam = seen()
    assert beam.path() == pytest.approx({0: 1.0, 1: 0.9, 2: 0.7})
    beam.see(beam.open([1]), [[0.09, 0.1]])
    assert beam.path()[3] == pytest.approx(0.09) and beam.path()[4] == pytest.approx(0.5 * 0.1 + 0.5 * 0.9)
    assert seen(alpha=0.75).path()[1] == pytest.approx(0.75 * 0.8 + 0.25)


def test_the_best_nodes_of_the_whole_tree_are_next():
    beam = seen()
    assert beam.next(1) == [1] and beam.next(5) == [1, 2]
    beam.see(beam.open([1]), [[1.0, 0.0]])
    assert beam.next(5) == [2]
    assert seen(left=0.0).next(5) == [2]
    assert seen(left=0.5, right=0.5).next(2) == [1, 2]


def test_the_ranking_has_what_was_scored_above_0():
    beam = seen()
    beam.see(beam.open([1, 2]), [[0.2, 0.0], [0.9, 0.2, 0.0]])
    # a: 0.1 + 0.45, c: 0.45 + 0.35, d: 0.1 + 0.35
    assert beam.ranking() == ["c", "a", "d"]
    assert beam.ranking({3: 0.9, 5: 0.1, 6: 0.8}) == ["a", "d", "c"]
    assert seen().ranking() == []


def test_anchors():
    """Beside documents stand documents seen before, good ones most of the time; beside nodes the best one."""
    beam = seen()
    assert [slate.anchors for slate in beam.open([1, 2], anchors=3)] == [(), ()]
    beam.see(beam.open([1]), [[0.9, 0.05]])
    drawn = [beam.open([2], anchors=1, seed=seed)[0].anchors for seed in range(20)]
    assert set(drawn) == {(3,)}
    assert sorted(beam.open([2], anchors=5)[0].anchors) == [3, 4]
    assert beam.open([2], anchors=1, seed=3) == beam.open([2], anchors=1, seed=3)
    scored_again = Slate(2, (5, 6, 7), (3,))
    beam.see([scored_again], [[0.5, 0.5, 0.5, 1.0]])
    assert beam.path()[3] == pytest.approx(0.5 * 0.9 + 0.5 * 0.9)  # an anchor keeps its own


def test_the_valley_lies_between_two_heaps():
    scores = np.array([0.1, 0.12, 0.14, 0.11, 0.8, 0.82, 0.85, 0.79])
    assert 0.14 < valley(scores) < 0.79
    assert valley(np.array([0.5])) < 0.5
    assert 0.2 < valley(np.array([0.2, 0.4])) < 0.4


def test_calibration_takes_out_a_slate_that_was_strict():
    """The same two nodes link a slate with one that has 0.3 less for everything."""
    lenient, strict = {1: 0.9, 2: 0.7, 3: 0.5}, {2: 0.4, 3: 0.2, 4: 0.6}
    found = calibrate([list(lenient), list(strict)], [list(lenient.values()), list(strict.values())])
    assert max(found.values()) == pytest.approx(1.0)
    raw = {n: np.mean([s[n] for s in (lenient, strict) if n in s]) for n in found}
    assert raw[4] < raw[1] and found[4] - found[1] > raw[4] - raw[1] + 0.1
    assert calibrate([], []) == {}
    assert set(calibrate([[1, 2]], [[0.0, 0.0]]).values()) == {0.0}


def test_calibration_is_what_the_authors_optimizer_finds():
    """Their loss by autograd and torch's AdamW."""
    slates, scores = [[5, 6, 7], [6, 8], [8, 5, 9, 7]], [[0.9, 0.1, 0.4], [0.5, 0.3], [0.2, 0.7, 0.6, 0.0]]
    which = torch.tensor([node - 5 for slate in slates for node in slate])
    slate_of = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    given = torch.tensor([score for one in scores for score in one])
    theta = torch.tensor([0.8, 0.3, 0.2, 0.25, 0.6], requires_grad=True)  # means of a node's scores
    slope, offsets = torch.ones((), requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([theta, slope, offsets], lr=0.01, weight_decay=1e-4)
    for _ in range(200):
        error = slope * 5 * theta[which] + offsets[slate_of] - 5 * given
        optimizer.zero_grad()
        ((given - 0.5).sigmoid().clamp(min=0.1) * error**2).mean().backward()
        torch.nn.utils.clip_grad_norm_([theta, slope, offsets], 1.0)
        optimizer.step()
    expected = (slope * theta / (slope * theta).max()).tolist()
    assert list(calibrate(slates, scores).values()) == pytest.approx(
        [expected[node - 5] for node in (5, 6, 7, 8, 9)], abs=1e-4
    )
