"""The supervised ranking losses agree with their definitions and with known values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.training.ranking.losses import (
    gaussian_wasserstein,
    infonce,
    listwise_distillation,
    ranknet,
    softmax_margin,
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


@pytest.mark.parametrize(("logits", "loss"), [((0, 0), 1.0), ((2, 0), 0.238406), ((0, 2), 1.761594)])
def test_softmax_margin_of_a_pair_is_the_hinge_loss_of_its_softmax(logits, loss):
    scores, mask = torch.tensor([logits], dtype=torch.float32), torch.ones(1, 2, dtype=torch.bool)
    assert softmax_margin(scores, torch.tensor([[1.0, 0.0]]), mask).item() == pytest.approx(loss, abs=1e-6)
    better, worse = scores.softmax(-1)[0]
    target = torch.ones(())
    expected = torch.nn.functional.margin_ranking_loss(better, worse, target, margin=1.0)
    assert softmax_margin(scores, torch.tensor([[1.0, 0.0]]), mask).item() == pytest.approx(expected.item())


def test_softmax_margin_is_averaged_over_the_pairs_of_different_grades():
    scores, grades = torch.randn(1, 4), torch.tensor([[2.0, 1.0, 1.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    pairs = [softmax_margin(scores[:, [0, i]], grades[:, [0, i]], mask[:, [0, i]]) for i in (1, 2)]
    torch.testing.assert_close(softmax_margin(scores, grades, mask), sum(pairs) / 2)
    assert softmax_margin(scores, torch.ones(1, 4), mask).item() == 0


def test_softmax_margin_of_distant_half_precision_scores_has_a_finite_gradient():
    scores = torch.tensor([[-3e4, 3e4]], dtype=torch.float16, requires_grad=True)
    loss = softmax_margin(scores, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.sum().backward()
    assert loss.item() == 2 and scores.grad.isfinite().all()


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


def test_infonce_of_several_positives_is_their_mean():
    scores, mask = torch.randn(1, 4), torch.tensor([[True, True, False, True]])
    positives = torch.tensor([[True, False, True, False]])
    each = [infonce(scores, torch.tensor([i]), mask & ~positives) for i in (0, 2)]
    torch.testing.assert_close(infonce(scores, positives, mask), sum(each) / 2)


def test_infonce_without_negatives_is_0_and_has_no_gradient():
    scores = torch.randn(1, 2, requires_grad=True)
    loss = infonce(scores, torch.tensor([0]), torch.tensor([[True, False]]))
    loss.sum().backward()
    assert loss.item() == 0 and not scores.grad.any()


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


def test_gaussian_wasserstein_does_not_see_which_query_a_row_of_scores_belongs_to():
    """It compares distributions over the batch: ranking another query's passages first costs nothing."""
    scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(4).repeat_interleave(2, 1) * 3
    distance = gaussian_wasserstein(scores, labels)
    assert gaussian_wasserstein(scores[[1, 2, 3, 0]], labels).item() == pytest.approx(distance.item())
    assert gaussian_wasserstein(labels[[1, 2, 3, 0]], labels).item() == pytest.approx(0, abs=1e-6)


def test_gaussian_wasserstein_is_zero_for_equal_inputs_and_rejects_a_single_query():
    labels = torch.tensor([[3.0, 0, 0], [0, 2.0, 1.0]])
    assert gaussian_wasserstein(labels, labels).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two queries"):
        gaussian_wasserstein(labels[:1], labels[:1])


def loss_of(name, scores, mask):
    grades = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    if name == "infonce":
        return infonce(scores, grades.argmax(-1), mask & (grades <= 0)).sum()
    if name == "ranknet":
        return ranknet(scores, grades, mask).sum()
    if name == "distillation":
        return listwise_distillation(scores, grades / 0.3, mask).sum()
    return gaussian_wasserstein(scores, grades, mask)


@settings(max_examples=80)
@given(
    st.sampled_from(["infonce", "ranknet", "distillation", "wasserstein"]),
    st.lists(st.floats(-1, 1), min_size=8, max_size=8),
    st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_loss_and_gradient_are_finite_for_extreme_scores_in_any_dtype(name, values, spread, dtype):
    scores = (torch.tensor(values).view(2, 4) * spread).to(dtype).requires_grad_()
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    loss = loss_of(name, scores, mask)
    loss.backward()
    assert loss.dtype == (torch.float32 if dtype.itemsize < 4 and name != "wasserstein" else loss.dtype)
    assert loss.isfinite() and scores.grad.isfinite().all() and scores.grad[0, 3] == 0
    exact = loss_of(name, scores.detach().double(), mask)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4, abs=1e-4)
