"""Supervised ranking losses: baselines and warm starts of the policy gradient of `plackett_luce`.

Shapes: B queries, n documents each. A mask is True for documents and False for padding. Scores in half
precision are cast to float32 first, and all losses are finite however far apart the scores are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def infonce(scores: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Return the cross-entropy of each query's positive document among the documents of the mask, (B,).

    Args:
        scores: Scores (B, n), divided by the temperature. For in-batch negatives, the n
            documents are those of the whole batch.
        positive: Index of each query's positive document, (B,), or a mask of positives, (B, n). The loss is
            the mean over the positives, none of which is a negative of another.
        mask: Documents to compare with, (B, n). The positive is added to them.
    """
    scores = _at_least_float32(scores)
    if positive.dtype != torch.bool:
        positive = torch.zeros_like(mask).scatter(1, positive[:, None], True)
    # -1e9 instead of -inf, whose gradient would be NaN for a query without negatives.
    negatives = scores.masked_fill(~mask | positive, -1e9).logsumexp(-1, keepdim=True)
    losses = functional.softplus(negatives - scores)  # log(e^s + e^negatives) - s
    return torch.where(positive, losses, 0.0).sum(-1) / positive.sum(-1)


def ranknet(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of log(1 + exp(s_j - s_i)) over pairs with grade_i > grade_j, (B,); 0 without pairs.

    The mean is over each query's own pairs, so that every query has the same weight, however many pairs it
    has. It is log 2 if all scores are equal. E2Rank (arXiv 2510.22733) uses it with s = 10 cos and graded
    ranks.
    """
    scores = _at_least_float32(scores)
    losses = functional.softplus(scores[:, None] - scores[:, :, None])
    return _mean_over_pairs(losses, grades, mask)


def softmax_margin(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of 2 sigmoid(s_j - s_i) over pairs with grade_i > grade_j, (B,); 0 without pairs.

    With p, the softmax of the two scores of a pair, this is PROP's hinge loss max(0, 1 - p_i + p_j) (arXiv
    2010.10137): p_i + p_j is 1, so the loss is 2 p_j, which is never 0. A list of two is PROP's case. Its
    other loss, masked language modeling of the document, is not implemented.
    """
    scores = _at_least_float32(scores)
    losses = 2 * (scores[:, None] - scores[:, :, None]).sigmoid()
    return _mean_over_pairs(losses, grades, mask)


def _mean_over_pairs(losses: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return each query's mean of losses[i, j], (B, n, n), over pairs with grade_i > grade_j, (B,)."""
    pairs = (grades[:, :, None] > grades[:, None]) & mask[:, :, None] & mask[:, None]
    return (losses * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def listwise_distillation(scores: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(scores)), (B,) (arXiv 2502.19712).

    Args:
        scores: Scores (B, n), divided by their temperature (0.05 in the paper).
        teacher: Teacher's scores (B, n), divided by their temperature (0.3 in the paper).
        mask: Mask of documents, (B, n).
    """
    target = _at_least_float32(teacher).masked_fill(~mask, -torch.inf).softmax(-1)
    log_probs = _at_least_float32(scores).masked_fill(~mask, -torch.inf).log_softmax(-1)
    # At padding this is 0 * inf = NaN, which `where` replaces. The clamp avoids log 0 for tiny probabilities.
    terms = target * (target.clamp(min=1e-30).log() - log_probs)
    return torch.where(mask, terms, 0.0).sum(-1)


def gaussian_wasserstein(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared 2-Wasserstein distance of two Gaussians fitted to the rows of the batch, a scalar::

        |mu_P - mu_Q|^2 + tr S_P + tr S_Q - 2 tr (S_P S_Q)^(1/2),   P = softmax(scores), Q = softmax(labels)

    This is `WS2Loss` of SyCL's code (arXiv 2503.23239). The trace of the root is computed from the (b, b)
    product of the deviations instead of the (m, m) covariances. The distance does not
    change when the rows of `scores` are permuted, so two queries that rank each other's passages first are
    not penalized.

    Args:
        scores: Scores (b, m) of all documents of the batch, divided by the temperature.
        labels: Grades (b, m), 0 for documents that are not relevant to the query.
        mask: Documents that each query may rank, (b, m), or None for all.

    Raises:
        ValueError: The batch has a single query, which has no covariance.
    """
    if len(scores) < 2:
        raise ValueError("gaussian_wasserstein needs at least two queries per batch")
    scores, labels = scores.double(), labels.double()
    if mask is not None:
        scores, labels = scores.masked_fill(~mask, -torch.inf), labels.masked_fill(~mask, -torch.inf)
    p, q = scores.softmax(-1), labels.softmax(-1)
    mean_p, mean_q = p.mean(0), q.mean(0)
    root = (len(scores) - 1) ** 0.5
    c_p, c_q = ((p - mean_p) / root).T, ((q - mean_q) / root).T
    cross = c_p.T @ c_q
    # The square root has no finite gradient at 0, hence 1e-15.
    roots = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).add(1e-15).sqrt().sum()
    return (mean_p - mean_q).square().sum() + c_p.square().sum() + c_q.square().sum() - 2 * roots


def pointwise(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of a query's documents, (B,).

    The score is the logit, and the target is the grade divided by the query's highest one: 1 for the best
    documents, 0 for those that are not relevant.

    Args:
        scores: Scores (B, n).
        grades: Grades (B, n), at least 0, with one above 0 per query.
        mask: Mask of documents, (B, n).
    """
    scores = _at_least_float32(scores)
    targets = (grades / grades.max(-1, keepdim=True).values).to(scores.dtype)
    losses = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none")
    return torch.where(mask, losses, 0.0).sum(-1) / mask.sum(-1)


def _at_least_float32(scores: Tensor) -> Tensor:
    """Return scores in float32 or float64. Sums of exponentials in half precision lose documents."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
