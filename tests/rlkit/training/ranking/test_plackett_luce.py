"""The policy against enumeration, and each estimator against the exact gradient of the specification."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.training.ranking.plackett_luce import (
    PlackettLuce,
    dcg,
    dcg_discounts,
    pl_rank_loss,
    policy_gradient_loss,
    utility_by_position,
)

SCORES = torch.tensor([[0.3, -0.2, 0.8, 0.1, -0.5]], dtype=torch.float64)
GRADES = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
K = 3
EXACT = torch.tensor([-0.072374, 0.145915, -0.065551, 0.045070, -0.053061], dtype=torch.float64)
PREFIXES = torch.tensor(list(itertools.permutations(range(5), K)))[None]


def expected(scores):
    """The expected nDCG@3 by enumeration of the 60 beginnings."""
    policy = PlackettLuce(scores)
    probabilities = policy.log_prob(PREFIXES).sum(-1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    return (probabilities * utility_by_position("ndcg", PREFIXES, GRADES).sum(-1)).sum()


def test_the_oracle():
    scores = SCORES.clone().requires_grad_()
    value = expected(scores)
    assert value.item() == pytest.approx(0.4119530427, abs=1e-9)
    value.backward()
    torch.testing.assert_close(scores.grad[0], EXACT, atol=1e-6, rtol=0)


def gradients(estimator, repeats, N=8):
    """Estimates of the gradient, (repeats, 5): each repeat is a query of the batch."""
    scores = SCORES.repeat(repeats, 1).requires_grad_()
    policy = PlackettLuce(scores)
    generator = torch.Generator().manual_seed(1)
    rankings = policy.sample(N, K, generator)
    grades = GRADES.expand(repeats, -1)
    if estimator == "pl_rank":
        ideal = dcg(GRADES.sort(-1, descending=True).values[:, :K])
        losses = pl_rank_loss(policy, rankings, grades / ideal[:, None], dcg_discounts(K).double())
    else:
        utility = utility_by_position("ndcg", rankings, grades)
        losses = policy_gradient_loss(policy.log_prob(rankings), utility, estimator)
    losses.sum().backward()
    return -scores.grad


REPEATS = 6000
VARIANCES = {
    "reinforce": 0.0670,
    "loo": 0.0203,
    "placement": 0.0365,
    "placement_loo": 0.0119,
    "pl_rank": 0.0220,
}


@pytest.mark.parametrize("estimator", VARIANCES)
def test_an_estimator_is_unbiased_and_has_the_variance_of_the_table(estimator):
    found = gradients(estimator, REPEATS)
    errors = found.std(0) / REPEATS**0.5
    assert ((found.mean(0) - EXACT).abs() < 4 * errors).all()
    assert found.var(0).sum().item() == pytest.approx(VARIANCES[estimator], rel=0.06)


def test_the_order_of_the_variances():
    found = {name: gradients(name, REPEATS).var(0).sum().item() for name in VARIANCES}
    found["group mean"] = found["loo"] * (7 / 8) ** 2
    order = ["placement_loo", "group mean", "loo", "pl_rank", "placement", "reinforce"]
    assert sorted(found, key=found.__getitem__) == order


def test_the_group_mean_is_seven_eighths():
    """GRPO's baseline without its deviation: 7/8 of leave-one-out, ranking by ranking."""
    policy = PlackettLuce(SCORES)
    rankings = policy.sample(8, K)
    utility = utility_by_position("ndcg", rankings, GRADES)
    log_probs = policy.log_prob(rankings)
    total = utility.sum(-1, keepdim=True)
    group = -(log_probs * (total - total.mean(1, keepdim=True))).sum(-1).mean(-1)
    torch.testing.assert_close(group, policy_gradient_loss(log_probs, utility, "loo") * 7 / 8)


def one_by_one(scores, ranking):
    """Probabilities of choices, by the definition."""
    left, found = list(range(len(scores))), []
    for document in ranking:
        found.append((scores[document].exp() / scores[left].exp().sum()).log())
        left.remove(document)
    return torch.stack(found)


scores_of = st.lists(st.floats(-30, 30), min_size=1, max_size=7)


@settings(deadline=None)
@given(scores_of, st.integers(1, 8), st.integers(0, 3), st.floats(-1e4, 1e4))
def test_log_probabilities(values, k, padding, constant):
    """As by the definition, whatever is added to all scores, and however much padding there is."""
    scores = torch.tensor(values, dtype=torch.float64)
    wide = torch.cat([scores + constant, torch.full((padding,), 99.0)])[None].requires_grad_()
    mask = torch.arange(len(wide[0]))[None] < len(values)
    policy = PlackettLuce(wide, mask)
    rankings = policy.sample(3, k)
    log_probs = policy.log_prob(rankings)
    assert rankings.shape == log_probs.shape == (1, 3, min(k, len(values) + padding))
    for row, found in zip(rankings[0], log_probs[0], strict=True):
        real = row[row >= 0]
        assert len(real) == min(k, len(values)) and len(set(real.tolist())) == len(real)
        assert (real < len(values)).all() and (found[row < 0] == 0).all()
        torch.testing.assert_close(found[row >= 0], one_by_one(scores, real), atol=1e-6, rtol=1e-6)
    log_probs.sum().backward()
    assert wide.grad.isfinite().all() and (wide.grad[~mask] == 0).all()


def test_the_first_of_many_have_the_law_of_the_definition():
    """Drawn K at a time: frequencies of the 60 beginnings within 5 standard errors."""
    policy = PlackettLuce(SCORES)
    draws = 200_000
    rankings = policy.sample(draws, K, torch.Generator().manual_seed(0))[0]
    exact = policy.log_prob(PREFIXES).sum(-1).exp()[0]
    codes = (rankings * torch.tensor([25, 5, 1])).sum(-1)
    found = torch.stack([(codes == code).double().mean() for code in PREFIXES[0] @ torch.tensor([25, 5, 1])])
    assert ((found - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_pl_rank_is_exact_where_all_beginnings_are_weighed_by_their_probability():
    """With each of the 60 as often as it should be drawn it is the gradient itself; and with padding."""
    policy = PlackettLuce(SCORES)
    probabilities = policy.log_prob(PREFIXES).sum(-1).exp()[0]
    ideal = dcg(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    total = 0
    for prefix, probability in zip(PREFIXES[0], probabilities, strict=True):
        scores = torch.cat([SCORES, torch.tensor([[7.0]])], -1).requires_grad_()
        padded = PlackettLuce(scores, torch.tensor([[True] * 5 + [False]]))
        gains = torch.cat([GRADES / ideal, torch.tensor([[9.0]])], -1)
        pl_rank_loss(padded, prefix[None, None], gains, dcg_discounts(K).double()).sum().backward()
        total = total - probability * scores.grad[0]
    torch.testing.assert_close(total[:5], EXACT, atol=1e-6, rtol=0)
    assert total[5] == 0


@pytest.mark.parametrize("estimator", ["placement_loo", "pl_rank"])
def test_fewer_documents_than_positions(estimator):
    """Two documents, five positions: the gradient of the exact sum over both rankings."""
    scores = torch.tensor([[0.4, -0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    grades = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64) * mask
    policy = PlackettLuce(scores, mask)
    rankings = policy.sample(60_000, 5, torch.Generator().manual_seed(0))
    if estimator == "pl_rank":
        losses = pl_rank_loss(policy, rankings, grades, dcg_discounts(3).double())
    else:
        utility = utility_by_position("ndcg", rankings, grades)
        losses = policy_gradient_loss(policy.log_prob(rankings), utility)
    losses.sum().backward()
    p = torch.sigmoid(torch.tensor(-0.5)).item()  # that the relevant one is first
    exact = p * (1 - p) * (1 - 1 / torch.log2(torch.tensor(3.0)).item())
    torch.testing.assert_close(
        -scores.grad[0], torch.tensor([-exact, exact, 0.0]).double(), atol=2e-3, rtol=0
    )


def test_utilities():
    rankings = torch.tensor([[[4, 3, 1], [1, 3, 0], [0, 2, -1]]])
    found = utility_by_position("rr", rankings, GRADES)
    assert found.tolist() == [[[0, 0.5, 0], [1, 0, 0], [0, 0, 0]]]
    found = utility_by_position("ndcg", rankings, GRADES).sum(-1)[0]
    assert found[1] == pytest.approx(1) and found[2] == 0
    half = utility_by_position("ndcg", rankings, GRADES, ideal=2 * dcg(torch.tensor([[2.0, 1.0]])))
    assert half.sum(-1)[0, 1] == pytest.approx(0.5)
    nothing = utility_by_position("ndcg", rankings, torch.zeros(1, 5))
    assert (nothing == 0).all()


def test_what_is_refused():
    policy = PlackettLuce(SCORES)
    rankings = policy.sample(1, K)
    with pytest.raises(ValueError, match="two rankings"):
        policy_gradient_loss(policy.log_prob(rankings), utility_by_position("ndcg", rankings, GRADES))
    with pytest.raises(ValueError, match="estimator"):
        policy_gradient_loss(policy.log_prob(rankings), torch.zeros(1, 1, K), "lo")
    with pytest.raises(ValueError, match="utility"):
        utility_by_position("ndgc", rankings, GRADES)
    with pytest.raises(ValueError, match="no documents"):
        PlackettLuce(SCORES, torch.zeros(1, 5, dtype=torch.bool))
