"""Scores of a model on one scale, where it is stricter with one slate than with another (LATTICE's model).

A latent relevance of each node, one slope and an offset for each slate are fitted to the scores::

    (1 - lambda) NLL of the slates' orders under Plackett-Luce(tau theta)
        + lambda mean of w (a tau theta + b_slate - tau score)^2,     w = max(sigmoid(score - 1/2), 0.1)

by AdamW as the authors' code does. Its default is lambda = 1: the orders play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TAU, STEPS, RATE, DECAY, CLIP, FLOOR = 5.0, 200, 1e-2, 1e-4, 1.0, 0.1


def calibrate(
    slates: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], weight: float = 1.0
) -> dict[int, float]:
    """A score for each node, at most 1, the highest being 1 where it is above 0.

    Args:
        slates: nodes, with repeats over the slates.
        scores: of the nodes, in [0, 1].
        weight: lambda.
    """
    import torch

    names = list(dict.fromkeys(node for slate in slates for node in slate))
    if not names:
        return {}
    place = {node: i for i, node in enumerate(names)}
    which = torch.tensor([place[node] for slate in slates for node in slate])
    slate_of = torch.tensor([i for i, slate in enumerate(slates) for _ in slate])
    given = torch.tensor([score for one in scores for score in one], dtype=torch.float32)
    weights = (given - 0.5).sigmoid().clamp(min=FLOOR)
    counts = torch.zeros(len(names)).index_add(0, which, torch.ones_like(given))
    with torch.enable_grad():
        theta = (torch.zeros(len(names)).index_add(0, which, given) / counts).requires_grad_()
        slope = torch.ones((), requires_grad=True)
        offsets = torch.zeros(len(slates), requires_grad=True)
        parameters = [theta, slope, offsets]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
        for _ in range(STEPS):
            fit = slope * TAU * theta[which] + offsets[slate_of] - TAU * given
            loss = weight * (weights * fit**2).mean()
            if weight < 1:
                loss = loss + (1 - weight) * _order_loss(TAU * theta[which], given, slate_of, len(slates))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
    found = (slope * theta).detach()
    highest = found.max().item()
    return dict(zip(names, (found / highest if highest > 0 else found).tolist(), strict=True))


def _order_loss(latent: Any, given: Any, slate_of: Any, count: int) -> Any:
    """Minus the mean log-likelihood of the slates' orders by score."""
    total: Any = 0.0
    for slate in range(count):
        rows = (slate_of == slate).nonzero()[:, 0]
        ordered = latent[rows[given[rows].argsort(descending=True, stable=True)]]
        total = total + (ordered.flip(0).logcumsumexp(0).flip(0) - ordered).mean()
    return total / count
