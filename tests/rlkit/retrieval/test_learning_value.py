import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlkit.retrieval.learning_value import learning_values


def unit_vectors(rng, n, size):
    """Return n random vectors of length 1."""
    vectors = rng.normal(size=(n, size))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def loss_gradient(query, target, documents, temperature):
    """Return the gradient of the pair's InfoNCE loss with respect to the residual at 0, by autograd."""
    residual = torch.zeros(len(query), len(query), dtype=torch.float64, requires_grad=True)
    query, documents = torch.tensor(query), torch.tensor(documents)
    moved = torch.nn.functional.normalize(query + residual @ query, dim=0)
    loss = -(documents @ moved / temperature).log_softmax(0)[target]
    (gradient,) = torch.autograd.grad(loss, residual)
    return gradient


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(2, 8), st.sampled_from([0.05, 1.0]))
def test_learning_value_is_the_product_of_the_gradients_of_autograd(seed, num_documents, size, temperature):
    rng = np.random.default_rng(seed)
    documents = unit_vectors(rng, num_documents, size)
    queries, dev_queries = unit_vectors(rng, 3, size), unit_vectors(rng, 2, size)
    targets, dev_targets = rng.integers(0, num_documents, 3), rng.integers(0, num_documents, 2)
    values = learning_values(queries, targets, documents, dev_queries, dev_targets, temperature=temperature)
    for row in range(3):
        gradient = loss_gradient(queries[row], targets[row], documents, temperature)
        for column in range(2):
            dev_gradient = loss_gradient(dev_queries[column], dev_targets[column], documents, temperature)
            expected = (gradient * dev_gradient).sum().item()
            assert values[row, column] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_query_equal_to_its_document_has_no_value():
    documents = np.eye(4)
    values = learning_values(documents[:1], np.array([0]), documents, documents[1:2], np.array([1]))
    assert values[0, 0] == pytest.approx(0, abs=1e-6)


def test_pair_with_itself_has_the_squared_norm_of_its_gradient():
    rng = np.random.default_rng(0)
    documents, queries = unit_vectors(rng, 5, 3), unit_vectors(rng, 1, 3)
    value = learning_values(queries, np.array([2]), documents, queries, np.array([2]))[0, 0]
    assert value == pytest.approx(loss_gradient(queries[0], 2, documents, 0.05).square().sum().item())
