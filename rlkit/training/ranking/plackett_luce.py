"""Plackett-Luce rankings as a policy, and estimators of its gradient (Neural PG-RANK, arXiv 2310.04407).

A ranking is drawn document by document, each time by a softmax over those that are left::

    pi(r) = prod over k of exp s(r_k) / sum over j >= k of exp s(r_j)

What is maximised is the expected utility of the first K, e.g. nDCG. Shapes: B queries, n documents each, N
rankings drawn for each query, K positions. A mask is True at documents, False at padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkit.arguments.presets import ESTIMATORS, UTILITIES

_FLOOR = -1e9  # a score of what is not there: -inf has no gradient


class PlackettLuce:
    """The distribution of rankings that scores stand for.

    Args:
        scores: (B, n).
        mask: (B, n), or None where all are documents.

    Raises:
        ValueError: a query without documents.
    """

    def __init__(self, scores: Tensor, mask: Tensor | None = None):
        self.mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
        if not self.mask.any(-1).all():
            raise ValueError("a query has no documents to rank")
        # A constant changes nothing; without it 1e9 is far enough below.
        highest = scores.detach().masked_fill(~self.mask, _FLOOR).max(-1, keepdim=True).values
        self.scores = (scores - highest).to(torch.promote_types(scores.dtype, torch.float32))
        self.scores = self.scores.masked_fill(~self.mask, _FLOOR)

    def sample(self, N: int, K: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the first K of N rankings, (B, N, K): indices of documents, -1 where there are fewer.

        They are the largest of the scores plus Gumbel noise, which has the law of drawing one by one.
        """
        B, n = self.scores.shape
        noise = torch.empty(B, N, n, device=self.scores.device)
        noise.exponential_(generator=generator).log_().neg_()
        found = (self.scores.detach()[:, None] + noise).topk(min(K, n), dim=-1).indices
        there = torch.arange(found.shape[-1], device=found.device) < self.mask.sum(-1)[:, None, None]
        return found.masked_fill(~there, -1)

    def log_prob(self, rankings: Tensor) -> Tensor:
        """Logarithms of the probabilities of each choice, (B, N, K); 0 where there is none."""
        there = rankings >= 0
        rows = self.scores[:, None].expand(-1, rankings.shape[1], -1)
        chosen = rows.gather(-1, rankings.clamp(min=0)).masked_fill(~there, _FLOOR)
        denominators = _denominators(rows, chosen, rankings)
        return torch.where(there, chosen - denominators, 0.0)


def _denominators(rows: Tensor, chosen: Tensor, rankings: Tensor) -> Tensor:
    """Log-sum-exp of the scores of those that were left before each choice, (B, N, K).

    Summed from the end: a subtraction from the sum of all would lose its digits.
    """
    placed = torch.where(rankings >= 0, rankings, rankings[..., :1])  # the first is always there
    rest = rows.scatter(-1, placed, _FLOOR).logsumexp(-1, keepdim=True)
    return torch.cat([rest, chosen.flip(-1)], dim=-1).logcumsumexp(-1)[..., 1:].flip(-1)


def utility_by_position(name: str, rankings: Tensor, grades: Tensor, ideal: Tensor | None = None) -> Tensor:
    """What each position adds to the utility of a ranking, (B, N, K); their sum is the utility, in [0, 1].

    Args:
        name: "ndcg" (linear gain), or "rr", the reciprocal rank of the first that is relevant.
        rankings: (B, N, K).
        grades: (B, n), 0 or more; above 0 is relevant.
        ideal: (B,), the DCG at K of the best ranking, where relevant documents are not among the n; None:
            that of the n documents.

    Raises:
        ValueError: another name.
    """
    if name not in UTILITIES:
        raise ValueError(f"there is no utility {name!r}: take one of {', '.join(UTILITIES)}")
    K = rankings.shape[-1]
    found = grades[:, None].expand(-1, rankings.shape[1], -1).gather(-1, rankings.clamp(min=0))
    found = found.masked_fill(rankings < 0, 0)
    if name == "rr":
        relevant = found > 0
        first = relevant & (relevant.cumsum(-1) == 1)
        return first / torch.arange(1, K + 1, device=found.device)
    discounts = dcg_discounts(K, found.device)
    if ideal is None:
        ideal = dcg(grades.sort(-1, descending=True).values[:, :K])
    return found * discounts / ideal.clamp(min=1e-12)[:, None, None]


def dcg_discounts(K: int, device: torch.device | None = None) -> Tensor:
    """1 / log2(1 + rank), (K,)."""
    return 1 / torch.log2(torch.arange(2, K + 2, device=device))


def dcg(gains: Tensor) -> Tensor:
    """Discounted sum of the gains of ranked documents, (..., K) -> (...)."""
    return (gains * dcg_discounts(gains.shape[-1], gains.device)).sum(-1)


def policy_gradient_loss(log_probs: Tensor, utility: Tensor, estimator: str = "placement_loo") -> Tensor:
    """A loss for each query, (B,), whose gradient is minus an unbiased estimate of the expected utility's.

    "placement" weighs a choice by what comes from its position on, since earlier positions cannot depend on
    it; "loo" subtracts the mean of the other rankings of the query. The mean of the whole group (GRPO) in its
    place makes the gradient smaller by (N - 1) / N; dividing by the deviation would bias it.

    Args:
        log_probs: (B, N, K), of `PlackettLuce.log_prob`.
        utility: (B, N, K), of `utility_by_position`.
        estimator: "reinforce", "loo", "placement" or "placement_loo".

    Raises:
        ValueError: another estimator, or a single ranking where others are needed.
    """
    if estimator not in ESTIMATORS[:4]:
        raise ValueError(f"there is no estimator {estimator!r}: take one of {', '.join(ESTIMATORS)}")
    N = utility.shape[1]
    total = utility.sum(-1, keepdim=True)
    gained = total - utility.cumsum(-1) + utility if estimator.startswith("placement") else total
    if estimator.endswith("loo"):
        if N < 2:
            raise ValueError(f"{estimator} needs at least two rankings of a query")
        gained = (gained - gained.mean(1, keepdim=True)) * (N / (N - 1))
    return -(log_probs * gained.detach()).sum(-1).mean(-1)


def pl_rank_loss(policy: PlackettLuce, rankings: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    """The same by PL-Rank-3 (Oosterhuis, SIGIR 2022), for a utility that is a sum over positions, (B,)::

        d/ds_d E[sum_k w_k gain(r_k)] = E[ PR_d + sum_{k <= rank of d} pi(d | r_<k) (w_k gain_d - DR_k) ]

    with DR_k what comes from rank k on, PR_d what comes after d, and all ranks where d is not placed.

    Args:
        policy: the distribution.
        rankings: (B, N, K), drawn from it.
        gains: (B, n), what a document adds to the utility, without the weight of its position.
        weights: (K,).
    """
    with torch.no_grad():
        gradient = _pl_rank_gradient(policy, rankings, gains, weights)
    return -(gradient * policy.scores.masked_fill(~policy.mask, 0)).sum(-1)


def _pl_rank_gradient(policy: PlackettLuce, rankings: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    B, N, K = rankings.shape
    rows = policy.scores[:, None].expand(-1, N, -1)
    there = rankings >= 0
    index = rankings.clamp(min=0)
    chosen = rows.gather(-1, index).masked_fill(~there, _FLOOR)
    inverse = torch.where(there, (-_denominators(rows, chosen, rankings)).exp(), 0.0)
    rewards = torch.where(there, gains[:, None].expand(-1, N, -1).gather(-1, index) * weights, 0.0)
    onward = rewards.flip(-1).cumsum(-1).flip(-1)  # DR_k
    weighted, rewarded = (weights * inverse).cumsum(-1), (onward * inverse).cumsum(-1)
    last = torch.full(rows.shape, K - 1, device=rankings.device)
    positions = torch.arange(K, device=rankings.device).expand(B, N, K)
    last = _put(last, index, positions, there)
    after = _put(torch.zeros_like(rows), index, onward - rewards, there)
    shares = gains[:, None] * weighted.gather(-1, last) - rewarded.gather(-1, last)
    return (after + rows.exp() * shares).mean(1)


def _put(into: Tensor, index: Tensor, values: Tensor, there: Tensor) -> Tensor:
    """Write values at the indices that are there, (B, N, n)."""
    wider = torch.cat([into, into[..., :1]], dim=-1)  # one more column takes the rest
    index = index.masked_fill(~there, into.shape[-1])
    return wider.scatter(-1, index, values.to(into.dtype))[..., :-1]
