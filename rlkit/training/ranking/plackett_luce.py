"""Plackett-Luce rankings as a policy, and estimators of its gradient (Neural PG-RANK, arXiv 2310.04407).

A ranking is drawn document by document, each from the softmax over the scores of the remaining documents::

    pi(r) = prod over k of exp s(r_k) / sum over j >= k of exp s(r_j)

Training maximizes the expected utility of the first K documents, such as nDCG. Shapes: B queries, n documents
per query, N rankings drawn per query, K positions. A mask is True for documents and False for padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlkit.arguments.presets import ESTIMATORS, UTILITIES

_PADDING_SCORE = -1e9  # not -inf, whose gradient would be NaN


class PlackettLuce:
    """Distribution over rankings that is defined by scores.

    Args:
        scores: Scores of the documents, (B, n).
        mask: Mask of the documents, (B, n), or None if there is no padding.

    Raises:
        ValueError: A query has no documents.
    """

    def __init__(self, scores: Tensor, mask: Tensor | None = None):
        self.mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
        if not self.mask.any(-1).all():
            raise ValueError("a query has no documents to rank")
        # float16 has no -1e9, and half precision gives close documents the same score.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # Subtracting the maximum does not change the distribution, and puts all scores far above -1e9.
        highest = scores.detach().masked_fill(~self.mask, _PADDING_SCORE).max(-1, keepdim=True).values
        self.scores = (scores - highest).masked_fill(~self.mask, _PADDING_SCORE)

    def sample(self, N: int, K: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw N rankings of each query and return their first K documents, (B, N, K).

        The values are indices of documents, and -1 after the last document of a query with fewer than K.
        Taking the top K of scores plus Gumbel noise is equivalent to drawing one document after the other.
        """
        B, n = self.scores.shape
        noise = torch.empty(B, N, n, device=self.scores.device)
        noise.exponential_(generator=generator).log_().neg_()
        rankings = (self.scores.detach()[:, None] + noise).topk(min(K, n), dim=-1).indices
        exists = torch.arange(rankings.shape[-1], device=rankings.device) < self.mask.sum(-1)[:, None, None]
        return rankings.masked_fill(~exists, -1)

    def log_prob(self, rankings: Tensor) -> Tensor:
        """Return the log-probability of the choice at each position, (B, N, K); 0 at padding."""
        exists = rankings >= 0
        scores = self.scores[:, None].expand(-1, rankings.shape[1], -1)  # (B, N, n)
        chosen = scores.gather(-1, rankings.clamp(min=0)).masked_fill(~exists, _PADDING_SCORE)
        denominators = _log_denominators(scores, chosen, rankings)
        return torch.where(exists, chosen - denominators, 0.0)


def _log_denominators(scores: Tensor, chosen: Tensor, rankings: Tensor) -> Tensor:
    """Return the log-sum-exp of the scores of the documents that remain before each choice, (B, N, K).

    It is accumulated from the last position to the first. Subtracting the chosen documents from the sum over
    all documents would cancel most digits.
    """
    # Padding must not be scattered to; repeating the first document, which always exists, does no harm.
    ranked = torch.where(rankings >= 0, rankings, rankings[..., :1])
    unranked = scores.scatter(-1, ranked, _PADDING_SCORE).logsumexp(-1, keepdim=True)
    return torch.cat([unranked, chosen.flip(-1)], dim=-1).logcumsumexp(-1)[..., 1:].flip(-1)


def utility_by_position(name: str, rankings: Tensor, grades: Tensor, ideal: Tensor | None = None) -> Tensor:
    """Return what each position contributes to the utility of a ranking, (B, N, K).

    The sum over positions is the utility, in [0, 1].

    Args:
        name: "ndcg" (with linear gain) or "rr" (reciprocal rank of the first relevant document).
        rankings: Rankings (B, N, K) from `PlackettLuce.sample`.
        grades: Grades of the documents, (B, n), at least 0. A grade above 0 is relevant.
        ideal: DCG at K of the best possible ranking, (B,), or None for the best ranking of the n documents.
            Pass it if relevant documents may be missing from the n.

    Raises:
        ValueError: Unknown name.
    """
    if name not in UTILITIES:
        raise ValueError(f"unknown utility {name!r}; expected one of {', '.join(UTILITIES)}")
    K = rankings.shape[-1]
    gains = grades[:, None].expand(-1, rankings.shape[1], -1).gather(-1, rankings.clamp(min=0))
    gains = gains.masked_fill(rankings < 0, 0)
    if name == "rr":
        relevant = gains > 0
        first = relevant & (relevant.cumsum(-1) == 1)
        return first / torch.arange(1, K + 1, device=gains.device)
    discounts = dcg_discounts(K, gains.device)
    if ideal is None:
        ideal = dcg(grades.sort(-1, descending=True).values[:, :K])
    # The minimum makes the nDCG of a query without relevant documents 0.
    return gains * discounts / ideal.clamp(min=1e-12)[:, None, None]


def dcg_discounts(K: int, device: torch.device | None = None) -> Tensor:
    """Return the discounts of DCG, 1 / log2(1 + rank), for ranks 1 to K, (K,)."""
    return 1 / torch.log2(torch.arange(2, K + 2, device=device))


def dcg(gains: Tensor) -> Tensor:
    """Return the discounted cumulative gain, (...,), of gains in the order of the ranking, (..., K)."""
    return (gains * dcg_discounts(gains.shape[-1], gains.device)).sum(-1)


def policy_gradient_loss(log_probs: Tensor, utility: Tensor, estimator: str = "placement_loo") -> Tensor:
    """Return a loss per query, (B,), whose gradient is an unbiased estimate of minus the utility's.

    "placement" weights a choice by the utility of its position and the later ones, since the earlier ones do
    not depend on it. "loo" subtracts the mean of the other rankings of the query as a baseline. The mean of
    all rankings of the group, as in GRPO, would scale the gradient by (N - 1) / N, and dividing by the
    standard deviation would bias it.

    Args:
        log_probs: Log-probabilities (B, N, K) from `PlackettLuce.log_prob`.
        utility: Utility by position (B, N, K) from `utility_by_position`.
        estimator: "reinforce", "loo", "placement" or "placement_loo".

    Raises:
        ValueError: Unknown estimator, or "loo" with a single ranking per query.
    """
    if estimator not in ESTIMATORS[:4]:
        raise ValueError(f"unknown estimator {estimator!r}; expected one of {', '.join(ESTIMATORS[:4])}")
    N = utility.shape[1]
    total = utility.sum(-1, keepdim=True)
    returns = total
    if estimator.startswith("placement"):
        returns = total - utility.cumsum(-1) + utility  # the sum from each position on
    if estimator.endswith("loo"):
        if N < 2:
            raise ValueError(f"{estimator} needs at least two rankings per query; increase rankings")
        returns = (returns - returns.mean(1, keepdim=True)) * (N / (N - 1))
    return -(log_probs * returns.detach()).sum(-1).mean(-1)


def pl_rank_loss(policy: PlackettLuce, rankings: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    """Return a loss per query, (B,), whose gradient is PL-Rank-3's estimate (Oosterhuis, SIGIR 2022).

    The utility must be a sum over positions of gain times weight::

        d/ds_d E[sum_k w_k gain(r_k)] = E[ PR_d + sum_{k <= rank of d} pi(d | r_<k) (w_k gain_d - DR_k) ]

    DR_k is the utility of rank k and the later ranks, PR_d that of the ranks after document d. If d is not
    ranked, PR_d is 0 and the sum is over all ranks.

    Args:
        policy: Distribution of the rankings.
        rankings: Rankings (B, N, K) drawn from the policy.
        gains: Gain of each document, (B, n), at least 0.
        weights: Weight of each position, (K,), at least 0.
    """
    with torch.no_grad():
        gradient = _pl_rank_gradient(policy, rankings, gains, weights)
    return -(gradient * policy.scores.masked_fill(~policy.mask, 0)).sum(-1)


def _pl_rank_gradient(policy: PlackettLuce, rankings: Tensor, gains: Tensor, weights: Tensor) -> Tensor:
    """Return the estimate of d expected utility / d score, (B, n), in O(n + K) per ranking."""
    B, N, K = rankings.shape
    # In float32, a score of 10,000 has an error of 5e-4, and so has the logarithm of a probability.
    scores = policy.scores.double()[:, None].expand(-1, N, -1)  # (B, N, n)
    gains, weights = gains.double(), weights.double()
    exists = rankings >= 0
    index = rankings.clamp(min=0)
    chosen = scores.gather(-1, index).masked_fill(~exists, _PADDING_SCORE)
    denominators = _log_denominators(scores, chosen, rankings)
    rewards = torch.where(exists, gains[:, None].expand(-1, N, -1).gather(-1, index) * weights, 0.0)
    DR = rewards.flip(-1).cumsum(-1).flip(-1)
    # pi(d | r_<k) = exp(s_d - denominator_k), so the sums over k are cumulative sums that all documents
    # share. exp(-denominator_k) alone overflows if scores are far apart, hence the logarithms.
    log_weight_sums = (weights.log() - denominators).masked_fill(~exists, -torch.inf).logcumsumexp(-1)
    log_DR_sums = (DR.log() - denominators).masked_fill(~exists, -torch.inf).logcumsumexp(-1)  # (B, N, K)
    # For each document (B, N, n): its position, or the last one if it is not ranked, and PR_d.
    position = torch.full(scores.shape, K - 1, device=rankings.device)
    positions = torch.arange(K, device=rankings.device).expand(B, N, K)
    position = _scatter_existing(position, index, positions, exists)
    PR = _scatter_existing(torch.zeros_like(scores), index, DR - rewards, exists)
    # Up to its position a document is a choice, so that its score is at most the denominators.
    weight_sums = (scores + log_weight_sums.gather(-1, position)).exp()
    DR_sums = (scores + log_DR_sums.gather(-1, position)).exp()
    return (PR + gains[:, None] * weight_sums - DR_sums).mean(1).to(policy.scores.dtype)


def _scatter_existing(target: Tensor, index: Tensor, values: Tensor, exists: Tensor) -> Tensor:
    """Return a copy of `target` (B, N, n) with the values of existing entries written at their indices."""
    wider = torch.cat([target, target[..., :1]], dim=-1)  # the extra column takes the values of padding
    index = index.masked_fill(~exists, target.shape[-1])
    return wider.scatter(-1, index, values.to(target.dtype))[..., :-1]
