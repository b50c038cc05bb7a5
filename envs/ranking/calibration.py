"""Scores of a model on one scale, where it is stricter with one slate than with another (LATTICE's model).

A latent relevance of each node, one slope a and an offset for each slate are fitted to the scores::

    mean of w (a tau theta + b_slate - tau score)^2,     w = max(sigmoid(score - 1/2), 0.1)

by AdamW with clipped gradients, as the authors' code does. Their formula also has a term for the orders,
which its default leaves out. Gradients are written out: a rollout calibrates at each turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TAU, STEPS, RATE, DECAY, CLIP, FLOOR = 5.0, 200, 1e-2, 1e-4, 1.0, 0.1
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


def calibrate(slates: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> dict[int, float]:
    """A score for each node, at most 1, the highest being 1 where it is above 0.

    Args:
        slates: nodes, with repeats over the slates.
        scores: of the nodes, in [0, 1].
    """
    names = list(dict.fromkeys(node for slate in slates for node in slate))
    if not names:
        return {}
    place = {node: i for i, node in enumerate(names)}
    which = np.array([place[node] for slate in slates for node in slate])
    slate_of = np.array([i for i, slate in enumerate(slates) for _ in slate])
    given = np.array([score for one in scores for score in one])
    theta, slope = _fit(which, slate_of, given, len(names), len(slates))
    found = slope * theta
    highest = found.max()
    return dict(zip(names, (found / highest if highest > 0 else found).tolist(), strict=True))


def _fit(
    which: np.ndarray, slate_of: np.ndarray, given: np.ndarray, nodes: int, slates: int
) -> tuple[np.ndarray, float]:
    """The latent relevance of the nodes, and the slope."""
    weights = np.maximum(1 / (1 + np.exp(0.5 - given)), FLOOR) * 2 / len(given)
    start = np.bincount(which, given, nodes) / np.bincount(which, minlength=nodes)
    values = np.concatenate([start, [1.0], np.zeros(slates)])
    first, second = np.zeros_like(values), np.zeros_like(values)
    for step in range(1, STEPS + 1):
        theta, slope, offsets = values[:nodes], values[nodes], values[nodes + 1 :]
        error = weights * (slope * TAU * theta[which] + offsets[slate_of] - TAU * given)
        gradient = np.concatenate(
            [
                slope * TAU * np.bincount(which, error, nodes),
                [TAU * (error * theta[which]).sum()],
                np.bincount(slate_of, error, slates),
            ]
        )
        gradient *= min(1.0, CLIP / (np.linalg.norm(gradient) + 1e-6))
        first += (1 - BETAS[0]) * (gradient - first)
        second += (1 - BETAS[1]) * (gradient**2 - second)
        scale = np.sqrt(second / (1 - BETAS[1] ** step)) + EPSILON
        values = values * (1 - RATE * DECAY) - RATE / (1 - BETAS[0] ** step) * first / scale
    return values[:nodes], float(values[nodes])
