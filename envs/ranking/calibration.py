"""Calibration of scores across slates, because a model scores some slates more strictly (LATTICE).

A latent relevance theta of each node, one slope a, and an offset b of each slate minimize::

    mean of w (a tau theta + b_slate - tau score)^2,     w = max(sigmoid(score - 1/2), 0.1)

with AdamW and clipped gradients, as in the authors' code. Their formula also has a term for the order of the
nodes, which their default disables. The gradients are written out, because autograd would be too slow: a
rollout calibrates in each turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TAU, MIN_WEIGHT = 5.0, 0.1
STEPS, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 200, 1e-2, 1e-4, 1.0
BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults for AdamW


def calibrate(slates: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> dict[int, float]:
    """Return one calibrated score per node; the highest is 1 if any is above 0.

    Args:
        slates: Nodes of each slate; nodes that occur in several slates link their scales.
        scores: Scores of the nodes of each slate, in [0, 1].
    """
    nodes = list(dict.fromkeys(node for slate in slates for node in slate))
    if not nodes:
        return {}
    index_of = {node: i for i, node in enumerate(nodes)}
    node_index = np.array([index_of[node] for slate in slates for node in slate])
    slate_index = np.array([i for i, slate in enumerate(slates) for _ in slate])
    flat_scores = np.array([score for slate_scores in scores for score in slate_scores])
    theta, slope = _fit(node_index, slate_index, flat_scores, len(nodes), len(slates))
    calibrated = slope * theta
    highest = calibrated.max()
    if highest > 0:
        calibrated = calibrated / highest
    return dict(zip(nodes, calibrated.tolist(), strict=True))


def _fit(
    node_index: np.ndarray, slate_index: np.ndarray, scores: np.ndarray, num_nodes: int, num_slates: int
) -> tuple[np.ndarray, float]:
    """Return the latent relevance of the nodes, (num_nodes,), and the slope.

    `node_index`, `slate_index` and `scores` have one entry per scored node of a slate.
    """
    # The factor 2 / n of the gradient of a mean of squares is part of the weights.
    weights = np.maximum(1 / (1 + np.exp(0.5 - scores)), MIN_WEIGHT) * 2 / len(scores)
    mean_scores = np.bincount(node_index, scores, num_nodes) / np.bincount(node_index, minlength=num_nodes)
    parameters = np.concatenate([mean_scores, [1.0], np.zeros(num_slates)])  # theta, slope, offsets
    first_moment, second_moment = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, STEPS + 1):
        theta, slope, offsets = parameters[:num_nodes], parameters[num_nodes], parameters[num_nodes + 1 :]
        error = weights * (slope * TAU * theta[node_index] + offsets[slate_index] - TAU * scores)
        gradient = np.concatenate(
            [
                slope * TAU * np.bincount(node_index, error, num_nodes),
                [TAU * (error * theta[node_index]).sum()],
                np.bincount(slate_index, error, num_slates),
            ]
        )
        gradient *= min(1.0, MAX_GRAD_NORM / (np.linalg.norm(gradient) + 1e-6))
        first_moment += (1 - BETAS[0]) * (gradient - first_moment)
        second_moment += (1 - BETAS[1]) * (gradient**2 - second_moment)
        scale = np.sqrt(second_moment / (1 - BETAS[1] ** step)) + EPSILON
        step_size = LEARNING_RATE / (1 - BETAS[0] ** step)
        parameters = parameters * (1 - LEARNING_RATE * WEIGHT_DECAY) - step_size * first_moment / scale
    return parameters[:num_nodes], float(parameters[num_nodes])
