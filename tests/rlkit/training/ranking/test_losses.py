"""The supervised ranking losses agree with their definitions and with known values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.training.ranking.losses import (
    false_negatives,
    gaussian_wasserstein,
    infonce,
    listwise_distillation,
    ranknet,
)

ALL = torch.tensor([[True, True, True]])


def test_ranknet_is_log_2_for_equal_scores_and_falls_as_ordered_scores_move_apart():
    grades = torch.tensor([[2.0, 1.0, 0.0]])
    assert ranknet(torch.zeros(1, 3), grades, ALL).item() == pytest.approx(math.log(2))
    losses = [ranknet(torch.tensor([[x, 0.0, -x]]), grades, ALL).item() for x in (0.0, 0.5, 1.0)]
    assert losses[0] > losses[1] > losses[2]
    assert ranknet(torch.randn(1, 3), torch.ones(1, 3), ALL).item() == 0


def test_ranknet_equals_its_definition_with_padding():
    scores, grades = torch.randn(1, 4), torch.tensor([[0.0, 1.0, 1.0, 3.0]])
    mask = torch.tensor([[True, True, True, False]])
    pairs = [(i, j) for i in range(3) for j in range(3) if grades[0, i] > grades[0, j]]
    expected = sum(math.log1p(math.exp(scores[0, j] - scores[0, i])) for i, j in pairs) / len(pairs)
    assert ranknet(scores, grades, mask).item() == pytest.approx(expected, rel=1e-5)


def test_listwise_distillation_is_zero_up_to_a_constant_and_else_the_kl_divergence():
    teacher = torch.tensor([[1.0, -2.0, 0.5]])
    assert listwise_distillation(teacher + 7, teacher, ALL).item() == pytest.approx(0, abs=1e-6)
    scores = torch.tensor([[0.0, 1.0, 0.0]])
    expected = torch.nn.functional.kl_div(scores.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    torch.testing.assert_close(listwise_distillation(scores, teacher, ALL)[0], expected)
    padded = torch.cat([scores, torch.tensor([[99.0]])], -1).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    loss = listwise_distillation(padded, torch.cat([teacher, torch.tensor([[50.0]])], -1), mask)
    torch.testing.assert_close(loss[0], expected)
    loss.sum().backward()
    assert padded.grad.isfinite().all() and padded.grad[0, 3] == 0


def test_infonce_ignores_masked_documents_but_never_the_positive():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    expected = -math.log(math.exp(1) / (math.exp(1) + math.exp(3)))
    mask = torch.tensor([[False, False, True]])
    assert infonce(scores, torch.tensor([0]), mask).item() == pytest.approx(expected)


def test_false_negatives_are_matched_by_id_in_the_whole_batch():
    """For the first query, document 11 has 0.7 of the highest score; 12 has 0.6 and is a negative."""
    teacher = torch.tensor([[1.0, 0.7, 0.6], [0.5, 0.1, 0.0]])
    ids = torch.tensor([[10, 11, 12], [20, 11, -1]])  # -1 is padding
    excluded = false_negatives(teacher, ids, torch.tensor([10, 11, 12, 20, 11, 10]))
    assert excluded.int().tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    scores = torch.zeros(2, 6)
    loss = infonce(scores, torch.tensor([0, 3]), ~excluded)  # 2 negatives and 5 negatives
    assert loss.tolist() == pytest.approx([math.log(3), math.log(6)])


def dense_wasserstein(p, q):
    """Return the distance computed from full covariance matrices and the eigenvectors of one."""
    s_p, s_q = torch.cov(p.T), torch.cov(q.T)
    values, vectors = torch.linalg.eigh(s_p)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_q @ root).clamp(min=0).sqrt().sum()
    return (p.mean(0) - q.mean(0)).square().sum() + s_p.trace() + s_q.trace() - 2 * cross


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 1000))
def test_gaussian_wasserstein_equals_the_dense_formula(b, m, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, labels = (torch.randn(b, m, generator=generator, dtype=torch.float64) for _ in range(2))
    distance = gaussian_wasserstein(scores.requires_grad_(), labels)
    expected = dense_wasserstein(scores.softmax(-1), labels.softmax(-1)).item()
    assert distance.item() == pytest.approx(expected, abs=1e-5)
    distance.backward()
    assert scores.grad.isfinite().all()


def test_gaussian_wasserstein_is_zero_for_equal_inputs_and_rejects_a_single_query():
    labels = torch.tensor([[3.0, 0, 0], [0, 2.0, 1.0]])
    assert gaussian_wasserstein(labels, labels).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two queries"):
        gaussian_wasserstein(labels[:1], labels[:1])
