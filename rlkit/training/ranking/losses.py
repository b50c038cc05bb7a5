"""Supervised losses of ranking, the baselines and warm starts of a policy.

Shapes: B queries, n documents each. A mask is True at documents, False at padding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def infonce(scores: Tensor, positive: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of each query's positive document among all that are not masked away, (B,).

    Args:
        scores: (B, n), already divided by the temperature; the n may be those of the whole batch.
        positive: (B,), the index of the positive.
        mask: (B, n), which documents are compared; a positive always is.
    """
    kept = mask.clone()
    kept.scatter_(1, positive[:, None], True)
    return functional.cross_entropy(scores.masked_fill(~kept, -torch.inf), positive, reduction="none")


def false_negatives(teacher: Tensor, ids: Tensor, all_ids: Tensor, share: float = 0.6) -> Tensor:
    """Which documents of a batch are no negatives of each query, (B, M), for `infonce`.

    Those with a teacher score above `share` of the query's highest one, by id, wherever in the batch they
    stand (Tamber et al., arXiv 2502.19712); so its positive and copies of it are among them.

    Args:
        teacher: (B, n), scores of a query's own list, 0 or more.
        ids: (B, n), the numbers of those documents, -1 at padding.
        all_ids: (M,), the numbers of the documents of the batch.
        share: of the highest score.
    """
    high = (teacher > share * teacher.max(-1, keepdim=True).values) & (ids >= 0)
    return ((ids[:, :, None] == all_ids) & high[:, :, None]).any(1)


def ranknet(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Mean of log(1 + exp(s_j - s_i)) over the pairs with grade_i above grade_j, (B,); 0 without such pairs.

    log 2 where all scores are equal. E2Rank (arXiv 2510.22733) has it on 10 cos, by ranks.
    """
    pairs = (grades[:, :, None] > grades[:, None]) & mask[:, :, None] & mask[:, None]
    losses = functional.softplus(scores[:, None] - scores[:, :, None])
    return (losses * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def listwise_distillation(scores: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL divergence from the softmax of a teacher's scores to that of ours, (B,) (arXiv 2502.19712).

    Args:
        scores, teacher: (B, n), each divided by its temperature (0.05 and 0.3 there).
        mask: (B, n).
    """
    target = teacher.masked_fill(~mask, -torch.inf).softmax(-1)
    ours = scores.masked_fill(~mask, -torch.inf).log_softmax(-1)
    terms = target * (target.clamp(min=1e-30).log() - ours)
    return torch.where(mask, terms, 0.0).sum(-1)


def gaussian_wasserstein(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of two Gaussians fitted to the batch's rows, a scalar::

        |mu_P - mu_Q|^2 + tr S_P + tr S_Q - 2 tr (S_P S_Q)^(1/2),   P = softmax(scores), Q = softmax(labels)

    As SyCL's code computes it (arXiv 2503.23239, `WS2Loss`), with the trace of the root from the b x b
    product of the deviations.

    Args:
        scores: (b, m), divided by the temperature, of all documents of the batch.
        labels: (b, m), grades; 0 for other queries' documents.

    Raises:
        ValueError: a single query has no covariance.
    """
    if len(scores) < 2:
        raise ValueError("this loss needs at least two queries in a batch")
    p, q = scores.double().softmax(-1), labels.double().softmax(-1)
    mean_p, mean_q = p.mean(0), q.mean(0)
    root = (len(scores) - 1) ** 0.5
    c_p, c_q = ((p - mean_p) / root).T, ((q - mean_q) / root).T
    cross = c_p.T @ c_q
    roots = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).add(1e-15).sqrt().sum()
    return (mean_p - mean_q).square().sum() + c_p.square().sum() + c_q.square().sum() - 2 * roots
