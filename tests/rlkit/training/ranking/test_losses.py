"""The supervised losses against their definitions and the checks of the specification."""

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


def test_ranknet_of_equal_scores_is_log_2_and_falls_when_a_right_pair_moves_apart():
    grades = torch.tensor([[2.0, 1.0, 0.0]])
    assert ranknet(torch.zeros(1, 3), grades, ALL).item() == pytest.approx(math.log(2))
    apart = [ranknet(torch.tensor([[x, 0.0, -x]]), grades, ALL).item() for x in (0.0, 0.5, 1.0)]
    assert apart[0] > apart[1] > apart[2]
    assert ranknet(torch.randn(1, 3), torch.ones(1, 3), ALL).item() == 0


def test_ranknet_by_its_definition_with_padding():
    scores, grades = torch.randn(1, 4), torch.tensor([[0.0, 1.0, 1.0, 3.0]])
    mask = torch.tensor([[True, True, True, False]])
    pairs = [(i, j) for i in range(3) for j in range(3) if grades[0, i] > grades[0, j]]
    by_hand = sum(math.log1p(math.exp(scores[0, j] - scores[0, i])) for i, j in pairs) / len(pairs)
    assert ranknet(scores, grades, mask).item() == pytest.approx(by_hand, rel=1e-5)


def test_distillation_is_zero_up_to_a_constant_and_a_divergence_otherwise():
    teacher = torch.tensor([[1.0, -2.0, 0.5]])
    assert listwise_distillation(teacher + 7, teacher, ALL).item() == pytest.approx(0, abs=1e-6)
    other = torch.tensor([[0.0, 1.0, 0.0]])
    by_hand = torch.nn.functional.kl_div(other.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    torch.testing.assert_close(listwise_distillation(other, teacher, ALL)[0], by_hand)
    wide = torch.cat([other, torch.tensor([[99.0]])], -1).requires_grad_()
    mask = torch.tensor([[True, True, True, False]])
    loss = listwise_distillation(wide, torch.cat([teacher, torch.tensor([[50.0]])], -1), mask)
    torch.testing.assert_close(loss[0], by_hand)
    loss.sum().backward()
    assert wide.grad.isfinite().all() and wide.grad[0, 3] == 0


def test_infonce_leaves_out_what_is_masked_and_never_the_positive():
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    by_hand = -math.log(math.exp(1) / (math.exp(1) + math.exp(3)))
    mask = torch.tensor([[False, False, True]])
    assert infonce(scores, torch.tensor([0]), mask).item() == pytest.approx(by_hand)


def test_false_negatives_are_known_by_id_over_the_whole_batch():
    """Two queries: 11 has 0.7 of the first one's best, 12 has 0.6 of it and is a negative; one is padding."""
    teacher = torch.tensor([[1.0, 0.7, 0.6], [0.5, 0.1, 0.0]])
    ids = torch.tensor([[10, 11, 12], [20, 11, -1]])
    found = false_negatives(teacher, ids, torch.tensor([10, 11, 12, 20, 11, 10]))
    assert found.int().tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0]]
    scores = torch.zeros(2, 6)
    loss = infonce(scores, torch.tensor([0, 3]), ~found)  # against 2 and against 5 negatives
    assert loss.tolist() == pytest.approx([math.log(3), math.log(6)])


def dense_wasserstein(p, q):
    """With whole covariance matrices and a root by eigenvectors."""
    s_p, s_q = torch.cov(p.T), torch.cov(q.T)
    values, vectors = torch.linalg.eigh(s_p)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s_q @ root).clamp(min=0).sqrt().sum()
    return (p.mean(0) - q.mean(0)).square().sum() + s_p.trace() + s_q.trace() - 2 * cross


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 1000))
def test_wasserstein_is_the_dense_formula(b, m, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, labels = (torch.randn(b, m, generator=generator, dtype=torch.float64) for _ in range(2))
    found = gaussian_wasserstein(scores.requires_grad_(), labels)
    assert found.item() == pytest.approx(
        dense_wasserstein(scores.softmax(-1), labels.softmax(-1)).item(), abs=1e-5
    )
    found.backward()
    assert scores.grad.isfinite().all()


def test_wasserstein_of_the_same_is_zero_and_one_query_has_none():
    labels = torch.tensor([[3.0, 0, 0], [0, 2.0, 1.0]])
    assert gaussian_wasserstein(labels, labels).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two queries"):
        gaussian_wasserstein(labels[:1], labels[:1])
