"""Beam search and calibration of `navigate-v4`: hand-computed values of the formulas."""

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


def scored_root(alpha=0.5, left_score=0.8, right_score=0.4):
    """Return a beam with the scores of the root's two children."""
    beam = Beam(TREE, alpha)
    beam.add_scores(beam.open_nodes([0]), [[left_score, right_score]])
    return beam


def test_path_relevance_chains_scores_above_the_threshold():
    """The path relevance of the parent counts only for a score above 0.09."""
    beam = scored_root()
    assert beam.path_relevance() == pytest.approx({0: 1.0, 1: 0.9, 2: 0.7})
    beam.add_scores(beam.open_nodes([1]), [[0.09, 0.1]])
    assert beam.path_relevance()[3] == pytest.approx(0.09)
    assert beam.path_relevance()[4] == pytest.approx(0.5 * 0.1 + 0.5 * 0.9)
    assert scored_root(alpha=0.75).path_relevance()[1] == pytest.approx(0.75 * 0.8 + 0.25)


def test_next_nodes_are_the_best_of_the_entire_tree():
    beam = scored_root()
    assert beam.next_nodes(1) == [1] and beam.next_nodes(5) == [1, 2]
    beam.add_scores(beam.open_nodes([1]), [[1.0, 0.0]])
    assert beam.next_nodes(5) == [2]
    assert scored_root(left_score=0.0).next_nodes(5) == [2]
    assert scored_root(left_score=0.5, right_score=0.5).next_nodes(2) == [1, 2]


def test_ranking_has_only_documents_with_a_score_above_0():
    beam = scored_root()
    beam.add_scores(beam.open_nodes([1, 2]), [[0.2, 0.0], [0.9, 0.2, 0.0]])
    # a: 0.1 + 0.45, c: 0.45 + 0.35, d: 0.1 + 0.35
    assert beam.ranking() == ["c", "a", "d"]
    assert beam.ranking({3: 0.9, 5: 0.1, 6: 0.8}) == ["a", "d", "c"]
    assert scored_root().ranking() == []


def test_open_nodes_adds_scored_documents_as_anchors():
    """Documents with a score above the valley are sampled almost always."""
    beam = scored_root()
    assert [slate.anchors for slate in beam.open_nodes([1, 2], anchors=3)] == [(), ()]
    beam.add_scores(beam.open_nodes([1]), [[0.9, 0.05]])
    samples = [beam.open_nodes([2], anchors=1, seed=seed)[0].anchors for seed in range(20)]
    assert set(samples) == {(3,)}
    assert sorted(beam.open_nodes([2], anchors=5)[0].anchors) == [3, 4]
    assert beam.open_nodes([2], anchors=1, seed=3) == beam.open_nodes([2], anchors=1, seed=3)
    with_anchor = Slate(2, (5, 6, 7), (3,))
    beam.add_scores([with_anchor], [[0.5, 0.5, 0.5, 1.0]])
    # An anchor keeps its first path relevance.
    assert beam.path_relevance()[3] == pytest.approx(0.5 * 0.9 + 0.5 * 0.9)


def test_valley_lies_between_two_clusters():
    scores = np.array([0.1, 0.12, 0.14, 0.11, 0.8, 0.82, 0.85, 0.79])
    assert 0.14 < valley(scores) < 0.79
    assert valley(np.array([0.5])) < 0.5
    assert 0.2 < valley(np.array([0.2, 0.4])) < 0.4


def test_calibrate_removes_the_offset_of_a_strict_slate():
    """Nodes 2 and 3 are in both slates, and all scores of the second slate are 0.3 lower."""
    lenient, strict = {1: 0.9, 2: 0.7, 3: 0.5}, {2: 0.4, 3: 0.2, 4: 0.6}
    calibrated = calibrate([list(lenient), list(strict)], [list(lenient.values()), list(strict.values())])
    assert max(calibrated.values()) == pytest.approx(1.0)
    raw = {n: np.mean([scores[n] for scores in (lenient, strict) if n in scores]) for n in calibrated}
    assert raw[4] < raw[1] and calibrated[4] - calibrated[1] > raw[4] - raw[1] + 0.1
    assert calibrate([], []) == {}
    assert set(calibrate([[1, 2]], [[0.0, 0.0]]).values()) == {0.0}


def test_calibrate_agrees_with_the_authors_optimizer():
    """The authors minimize the same loss with autograd and torch's AdamW."""
    slates, scores = [[5, 6, 7], [6, 8], [8, 5, 9, 7]], [[0.9, 0.1, 0.4], [0.5, 0.3], [0.2, 0.7, 0.6, 0.0]]
    node_index = torch.tensor([node - 5 for slate in slates for node in slate])
    slate_index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    flat_scores = torch.tensor([score for slate_scores in scores for score in slate_scores])
    theta = torch.tensor([0.8, 0.3, 0.2, 0.25, 0.6], requires_grad=True)  # mean score of each node
    slope, offsets = torch.ones((), requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([theta, slope, offsets], lr=0.01, weight_decay=1e-4)
    for _ in range(200):
        error = slope * 5 * theta[node_index] + offsets[slate_index] - 5 * flat_scores
        optimizer.zero_grad()
        ((flat_scores - 0.5).sigmoid().clamp(min=0.1) * error**2).mean().backward()
        torch.nn.utils.clip_grad_norm_([theta, slope, offsets], 1.0)
        optimizer.step()
    expected = (slope * theta / (slope * theta).max()).tolist()
    assert list(calibrate(slates, scores).values()) == pytest.approx(
        [expected[node - 5] for node in (5, 6, 7, 8, 9)], abs=1e-4
    )
