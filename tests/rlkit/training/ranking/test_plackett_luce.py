"""The policy agrees with enumeration, and each estimator with the exact gradient and a known variance."""

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


def expected_utility(scores):
    """Return the expected nDCG@3, by enumeration of all 60 rankings of 3 of the 5 documents."""
    policy = PlackettLuce(scores)
    probabilities = policy.log_prob(PREFIXES).sum(-1).exp()
    assert probabilities.sum().item() == pytest.approx(1)
    return (probabilities * utility_by_position("ndcg", PREFIXES, GRADES).sum(-1)).sum()


def test_exact_gradient_is_that_of_the_enumeration():
    scores = SCORES.clone().requires_grad_()
    value = expected_utility(scores)
    assert value.item() == pytest.approx(0.4119530427, abs=1e-9)
    value.backward()
    torch.testing.assert_close(scores.grad[0], EXACT, atol=1e-6, rtol=0)


def gradients(estimator, repeats, N=8):
    """Return independent estimates of the gradient, (repeats, 5), as the queries of one batch."""
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
# Sum over the scores of the variances of the estimates, with 8 rankings per query.
VARIANCES = {
    "reinforce": 0.0670,
    "loo": 0.0203,
    "placement": 0.0365,
    "placement_loo": 0.0119,
    "pl_rank": 0.0220,
}


@pytest.mark.parametrize("estimator", VARIANCES)
def test_estimator_is_unbiased_and_has_the_known_variance(estimator):
    estimates = gradients(estimator, REPEATS)
    standard_errors = estimates.std(0) / REPEATS**0.5
    assert ((estimates.mean(0) - EXACT).abs() < 4 * standard_errors).all()
    assert estimates.var(0).sum().item() == pytest.approx(VARIANCES[estimator], rel=0.06)


def test_estimators_are_ordered_by_variance():
    variances = {name: gradients(name, REPEATS).var(0).sum().item() for name in VARIANCES}
    variances["group mean"] = variances["loo"] * (7 / 8) ** 2
    order = ["placement_loo", "group mean", "loo", "pl_rank", "placement", "reinforce"]
    assert sorted(variances, key=variances.__getitem__) == order


def test_group_mean_baseline_scales_the_loo_gradient_by_seven_eighths():
    """GRPO's baseline, without the division by the standard deviation, gives (N - 1) / N of it; N = 8."""
    policy = PlackettLuce(SCORES)
    rankings = policy.sample(8, K)
    utility = utility_by_position("ndcg", rankings, GRADES)
    log_probs = policy.log_prob(rankings)
    total = utility.sum(-1, keepdim=True)
    group = -(log_probs * (total - total.mean(1, keepdim=True))).sum(-1).mean(-1)
    torch.testing.assert_close(group, policy_gradient_loss(log_probs, utility, "loo") * 7 / 8)


def sequential_log_probs(scores, ranking):
    """Return the log-probability of each choice of a ranking, computed from the definition."""
    remaining, log_probs = list(range(len(scores))), []
    for document in ranking:
        log_probs.append((scores[document].exp() / scores[remaining].exp().sum()).log())
        remaining.remove(document)
    return torch.stack(log_probs)


scores_of = st.lists(st.floats(-30, 30), min_size=1, max_size=7)


@settings(deadline=None)
@given(scores_of, st.integers(1, 8), st.integers(0, 3), st.floats(-1e4, 1e4))
def test_log_prob_equals_the_definition(values, k, padding, constant):
    """Neither a constant added to all scores nor padding changes the result."""
    scores = torch.tensor(values, dtype=torch.float64)
    padded = torch.cat([scores + constant, torch.full((padding,), 99.0)])[None].requires_grad_()
    mask = torch.arange(len(padded[0]))[None] < len(values)
    policy = PlackettLuce(padded, mask)
    rankings = policy.sample(3, k)
    log_probs = policy.log_prob(rankings)
    assert rankings.shape == log_probs.shape == (1, 3, min(k, len(values) + padding))
    for ranking, actual in zip(rankings[0], log_probs[0], strict=True):
        documents = ranking[ranking >= 0]
        assert len(documents) == min(k, len(values)) and len(set(documents.tolist())) == len(documents)
        assert (documents < len(values)).all() and (actual[ranking < 0] == 0).all()
        expected = sequential_log_probs(scores, documents)
        torch.testing.assert_close(actual[ranking >= 0], expected, atol=1e-6, rtol=1e-6)
    log_probs.sum().backward()
    assert padded.grad.isfinite().all() and (padded.grad[~mask] == 0).all()


def test_sample_draws_rankings_with_their_probability():
    """The frequencies of the 60 possible rankings are within 5 standard errors of their probabilities."""
    policy = PlackettLuce(SCORES)
    draws = 200_000
    rankings = policy.sample(draws, K, torch.Generator().manual_seed(0))[0]
    exact = policy.log_prob(PREFIXES).sum(-1).exp()[0]
    codes = (rankings * torch.tensor([25, 5, 1])).sum(-1)
    all_codes = PREFIXES[0] @ torch.tensor([25, 5, 1])
    frequencies = torch.stack([(codes == code).double().mean() for code in all_codes])
    assert ((frequencies - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all()


def test_pl_rank_averaged_over_all_rankings_is_the_exact_gradient():
    """The estimates for all 60 rankings are weighted by their probability. One document is padding."""
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
def test_estimator_is_unbiased_with_fewer_documents_than_positions(estimator):
    """With two documents and five positions, there are only two rankings to sum over exactly."""
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
    p = torch.sigmoid(torch.tensor(-0.5)).item()  # probability that the relevant document is first
    exact = p * (1 - p) * (1 - 1 / torch.log2(torch.tensor(3.0)).item())
    torch.testing.assert_close(
        -scores.grad[0], torch.tensor([-exact, exact, 0.0]).double(), atol=2e-3, rtol=0
    )


def test_utility_by_position_on_worked_examples():
    rankings = torch.tensor([[[4, 3, 1], [1, 3, 0], [0, 2, -1]]])
    reciprocal_rank = utility_by_position("rr", rankings, GRADES)
    assert reciprocal_rank.tolist() == [[[0, 0.5, 0], [1, 0, 0], [0, 0, 0]]]
    ndcg = utility_by_position("ndcg", rankings, GRADES).sum(-1)[0]
    assert ndcg[1] == pytest.approx(1) and ndcg[2] == 0
    ideal = 2 * dcg(torch.tensor([[2.0, 1.0]]))
    half = utility_by_position("ndcg", rankings, GRADES, ideal=ideal)
    assert half.sum(-1)[0, 1] == pytest.approx(0.5)
    irrelevant = utility_by_position("ndcg", rankings, torch.zeros(1, 5))
    assert (irrelevant == 0).all()


def test_invalid_arguments_raise_value_error():
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


def brute_force_pl_rank(scores, mask, rankings, gains, weights):
    """Return PL-Rank-3's estimate for one query, with a loop over documents, rankings and positions."""
    scores = scores.double()
    gradient = torch.zeros_like(scores)
    for ranking in rankings:
        chosen = [d for d in ranking.tolist() if d >= 0]
        rewards = [gains[d] * weights[k] for k, d in enumerate(chosen)]
        for document in mask.nonzero()[:, 0].tolist():
            remaining = mask.clone()
            for k, choice in enumerate(chosen):
                log_total = scores[remaining].logsumexp(0)
                probability = (scores[document] - log_total).exp()
                gradient[document] += probability * (weights[k] * gains[document] - sum(rewards[k:]))
                remaining[choice] = False
                if choice == document:
                    gradient[document] += sum(rewards[k + 1 :])
                    break
    return gradient / len(rankings)


spreads = st.sampled_from([0.0, 1.0, 50.0, 88.0, 89.0, 200.0, 1e3, 1e4])


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    spreads,
    st.integers(1, 7),
    st.integers(0, 2),
    st.integers(0, 10_000),
)
def test_pl_rank_equals_its_definition_at_any_spread_of_scores(values, spread, k, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.cat([torch.tensor(values) * spread, torch.full((padding,), 7.0)])[None].requires_grad_()
    mask = torch.arange(scores.shape[1])[None] < len(values)
    policy = PlackettLuce(scores, mask)
    # Uniform rankings reach the tails, where a sampled one would always follow the scores.
    order = torch.rand(4, len(values), generator=generator).argsort(-1)[:, :k]
    rankings = torch.full((1, 4, min(k, scores.shape[1])), -1)
    rankings[0, :, : order.shape[1]] = order
    gains = torch.rand(1, scores.shape[1], generator=generator).round()
    weights = dcg_discounts(rankings.shape[-1])
    pl_rank_loss(policy, rankings, gains, weights).sum().backward()
    expected = brute_force_pl_rank(scores.detach()[0], mask[0], rankings[0], gains[0], weights.double())
    torch.testing.assert_close(-scores.grad[0].double(), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=6),
    spreads,
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(["placement_loo", "reinforce", "pl_rank"]),
)
def test_policy_gradient_is_finite_in_any_dtype_and_spread(values, spread, dtype, estimator):
    scores = (torch.tensor([[*values, 0.5]]) * spread).to(dtype).requires_grad_()
    mask = torch.tensor([[True] * len(values) + [False]])
    policy = PlackettLuce(scores, mask)
    rankings = policy.sample(3, 4, torch.Generator().manual_seed(0))
    grades = torch.arange(len(values) + 1.0)[None]
    assert policy.scores.dtype == torch.float32
    if estimator == "pl_rank":
        loss = pl_rank_loss(policy, rankings, grades, dcg_discounts(rankings.shape[-1]))
    else:
        utility = utility_by_position("ndcg", rankings, grades)
        loss = policy_gradient_loss(policy.log_prob(rankings), utility, estimator)
    loss.sum().backward()
    assert loss.isfinite().all() and scores.grad.isfinite().all() and scores.grad[0, -1] == 0
