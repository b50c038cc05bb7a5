"""What a training pair is worth to a retriever, to first order and in closed form.

The retriever is a frozen encoder with a residual W of the query vector, W = 0 at first::

    s_j = cos((I + W) q, d_j) / tau,    p = softmax(s) over all documents,    L(q, d) = -log p_d

At W = 0, the gradient of the loss L of a pair is the matrix g q^T with rank one, where::

    g(q, d) = (I - q q^T) sum_j (p_j - 1[j = d]) d_j / tau

A step of gradient descent on the pair (q, d) thus lowers the loss of a pair (v, e) by the step size times::

    <g(q, d) q^T, g(v, e) v^T> = (g(q, d) . g(v, e)) (q . v)

This is the value of (q, d) for (v, e), TracIn's influence (arXiv 2002.08484) for one step.
"""

from __future__ import annotations

import numpy as np


def learning_values(
    queries: np.ndarray,
    targets: np.ndarray,
    documents: np.ndarray,
    dev_queries: np.ndarray,
    dev_targets: np.ndarray,
    *,
    temperature: float = 0.05,
) -> np.ndarray:
    """Return the value of each training pair for each dev pair, (Q, V).

    A single value is noisy, since most pairs share no documents. Means over several pairs are not.

    Args:
        queries: Vectors of the training queries, (Q, dimensions), of length 1.
        targets: Index of the document of each training query, (Q,).
        documents: Vectors of all documents, (D, dimensions), of length 1.
        dev_queries: Vectors of the dev queries, (V, dimensions), of length 1.
        dev_targets: Index of the document of each dev query, (V,).
        temperature: Temperature tau of the scores.
    """
    gradients = _gradients(queries, targets, documents, temperature)
    dev_gradients = _gradients(dev_queries, dev_targets, documents, temperature)
    return (gradients @ dev_gradients.T) * (queries @ dev_queries.T)


def _gradients(
    queries: np.ndarray, targets: np.ndarray, documents: np.ndarray, temperature: float
) -> np.ndarray:
    """Return g for each pair, (Q, dimensions)."""
    scores = queries @ documents.T / temperature
    probabilities = np.exp(scores - scores.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    probabilities[np.arange(len(queries)), targets] -= 1
    gradients = probabilities @ documents / temperature
    # The score is a cosine, which does not change along the query.
    return gradients - (gradients * queries).sum(1, keepdims=True) * queries
