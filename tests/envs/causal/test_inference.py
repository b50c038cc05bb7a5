"""Compare exact inference with enumeration, with pgmpy, and with values computed by hand."""

import logging
from itertools import combinations, product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.causal import elimination
from rlkit.envs.causal.difficulty import Difficulty, measure_difficulty
from rlkit.envs.causal.elimination import plan_elimination
from rlkit.envs.causal.graphs import GraphConfig
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import LEVELS, CausalModel, CausalQuery, descendants, round_rows
from rlkit.envs.causal.queries import draw_model, draw_query
from rlkit.errors import UserError


def random_model(rng, num_nodes, cardinality=2, max_in_degree=2):
    parents = GraphConfig(num_nodes, None, max_in_degree).draw(rng)
    return draw_model(parents, cardinality, 1.0, rng)


def enumerate_joint(model, query):
    """Return the answer by summing the joint distribution over all assignments."""
    answer = np.zeros(model.cards[query.target])
    for values in product(*map(range, model.cards)):
        weight = 1.0
        for node, node_parents in enumerate(model.parents):
            if query.intervened and node == query.intervened[0]:
                weight *= values[node] == query.intervened[1]
            else:
                weight *= model.tables[node][tuple(values[p] for p in node_parents)][values[node]]
        if query.observed is None or values[query.observed[0]] == query.observed[1]:
            answer[values[query.target]] += weight
    return answer / answer.sum()


def enumerate_selectors(model, query):
    """Return the answer by summing over all selector values, which determine both worlds."""
    rows = [
        (node, parent_values)
        for node, node_parents in enumerate(model.parents)
        for parent_values in product(*(range(model.cards[p]) for p in node_parents))
    ]
    answer = np.zeros(model.cards[query.target])
    for drawn in product(*(range(model.cards[node]) for node, _ in rows)):
        selectors = dict(zip(rows, drawn, strict=True))
        factual, twin = [], []
        for node, node_parents in enumerate(model.parents):
            factual.append(selectors[node, tuple(factual[p] for p in node_parents)])
            value = selectors[node, tuple(twin[p] for p in node_parents)]
            twin.append(query.intervened[1] if node == query.intervened[0] else value)
        if factual[query.observed[0]] == query.observed[1]:
            answer[twin[query.target]] += prod(model.tables[n][key][v] for (n, key), v in selectors.items())
    return answer / answer.sum()


def count_selector_values(model):
    return prod(
        card ** prod(model.cards[p] for p in node_parents)
        for card, node_parents in zip(model.cards, model.parents, strict=True)
    )


@pytest.fixture(params=["one sum", "min-fill"])
def elimination_method(request, monkeypatch):
    """Sum small joint tables at once, the default, or also eliminate those in min-fill order."""
    if request.param == "min-fill":
        monkeypatch.setattr(elimination, "SMALL_JOINT", 0)


@pytest.mark.usefixtures("elimination_method")
@pytest.mark.parametrize("level", ["association", "intervention"])
@pytest.mark.parametrize(("num_nodes", "cardinality"), [(2, 2), (5, 2), (8, 2), (5, 3)])
def test_infer_equals_enumeration(level, num_nodes, cardinality):
    rng = np.random.default_rng(7)
    for _ in range(8):
        model = random_model(rng, num_nodes, cardinality)
        query = draw_query(model, level, rng)
        np.testing.assert_allclose(infer(model, query), enumerate_joint(model, query), atol=1e-12)


@pytest.mark.usefixtures("elimination_method")
@pytest.mark.parametrize(
    ("num_nodes", "cardinality", "in_degree"), [(2, 3, 1), (3, 2, 2), (4, 2, 2), (4, 2, 3)]
)
def test_infer_counterfactual_equals_enumeration_of_selectors(num_nodes, cardinality, in_degree):
    rng = np.random.default_rng(11)
    checked = 0
    while checked < 12:
        model = random_model(rng, num_nodes, cardinality, in_degree)
        query = draw_query(model, "counterfactual", rng)
        if count_selector_values(model) <= 2**12:
            np.testing.assert_allclose(infer(model, query), enumerate_selectors(model, query), atol=1e-12)
            checked += 1


CHAIN = CausalModel(("x", "y"), ((), (0,)), (np.array([0.5, 0.5]), np.array([[0.8, 0.2], [0.4, 0.6]])))


@pytest.mark.parametrize(
    ("observed", "intervened", "expected", "size"),
    [
        ((1, 1), (0, 0), [0.6, 0.4], 6),
        ((1, 1), (0, 1), [0.1, 0.9], 6),
        ((1, 0), (0, 0), [14 / 15, 1 / 15], 6),
        ((1, 0), (0, 1), [0.6, 0.4], 6),
        ((0, 1), (0, 0), [0.8, 0.2], 5),
    ],
)
def test_counterfactual_of_a_chain_by_hand(observed, intervened, expected, size):
    query = CausalQuery(1, observed, intervened)
    np.testing.assert_allclose(infer(CHAIN, query), expected, atol=1e-12)
    assert measure_difficulty(CHAIN, query).relevant_size == size


def test_counterfactual_does_not_use_one_uniform_per_node():
    # With one shared uniform per node, Y = 0 under X = 1 would imply Y = 0 under X = 0 in this model.
    assert infer(CHAIN, CausalQuery(1, (1, 0), (0, 1)))[1] == pytest.approx(0.4)


def test_difficulty_of_a_chain_by_hand():
    # Summing out y creates a factor over x with 2 cells from P(y | x) and the indicator of y = 1.
    assert measure_difficulty(CHAIN, CausalQuery(0, observed=(1, 1))) == Difficulty(2, sums=2, products=2)
    assert measure_difficulty(CHAIN, CausalQuery(1, observed=(1, 1))) == Difficulty(1, 0, 0)
    assert measure_difficulty(CHAIN, CausalQuery(1, intervened=(0, 1))) == Difficulty(2, sums=2, products=2)
    assert measure_difficulty(CHAIN, CausalQuery(0, intervened=(0, 1))) == Difficulty(1, 0, 0)
    assert measure_difficulty(CHAIN, CausalQuery(0, intervened=(1, 1))) == Difficulty(1, sums=1, products=0)


def test_min_fill_eliminates_leaves_of_a_star_first():
    # Eliminating the center 0 would connect the leaves 1, 2 and 3.
    star = [(0, 1), (0, 2), (0, 3)]
    plan = plan_elimination(star, [2] * 4, keep=3)
    assert plan.order == (1, 2, 0)
    assert (plan.sums, plan.products) == (2 + 2 + 2, 0 + 0 + 2 * 2)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.sampled_from([2, 3]), st.sampled_from(LEVELS))
def test_infer_returns_a_distribution(seed, num_nodes, cardinality, level):
    rng = np.random.default_rng(seed)
    model = random_model(rng, num_nodes, cardinality, max_in_degree=1 if num_nodes == 2 else 2)
    query = draw_query(model, level, rng)
    answer = infer(model, query)
    assert answer.shape == (cardinality,)
    assert np.all(answer >= 0)
    assert answer.sum() == pytest.approx(1)
    difficulty = measure_difficulty(model, query)
    assert 1 <= difficulty.relevant_size <= (num_nodes if level != "counterfactual" else 3 * num_nodes)
    node, value = query.intervened or query.observed
    if query.target == node:
        np.testing.assert_allclose(answer, np.eye(cardinality)[value], atol=1e-12)
        assert difficulty.relevant_size == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 7))
def test_intervention_affects_only_descendants(seed, num_nodes):
    rng = np.random.default_rng(seed)
    model = random_model(rng, num_nodes)
    query = draw_query(model, "intervention", rng)
    if query.target not in descendants(model.parents, query.intervened[0]):
        np.testing.assert_allclose(infer(model, query), infer(model, CausalQuery(query.target)), atol=1e-12)
        observed = (num_nodes - 1, 0)
        counterfactual = CausalQuery(query.target, observed, query.intervened)
        factual = CausalQuery(query.target, observed)
        np.testing.assert_allclose(infer(model, counterfactual), infer(model, factual), atol=1e-12)


def test_marginal_of_a_variable_in_many_factors():
    # A root with 40 observed children is in more factors than one call of einsum multiplies.
    tables = (
        np.array([0.5, 0.5]),
        *[np.array([[0.4, 0.6], [0.6, 0.4]])] * 40,
        np.ones((2, 1)) * [[0.3, 0.7]],
    )
    parents = ((), *[(0,)] * 40, (0,))
    model = CausalModel(tuple(f"v{i}" for i in range(42)), parents, tables)
    factors = [((0,), tables[0]), *(((0,), table[:, 1]) for table in tables[1:41])]
    odds = 1.5**40
    assert elimination.marginal(factors, 0) == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])
    assert infer(model, CausalQuery(0, observed=(3, 1))) == pytest.approx([0.6, 0.4])


def test_infer_raises_for_impossible_evidence():
    tables = (np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.3, 0.7]))
    model = CausalModel(("x", "y", "z"), ((), (0,), ()), tables)
    for query in (CausalQuery(0, observed=(1, 1)), CausalQuery(1, (1, 1), (0, 0))):
        with pytest.raises(UserError, match="probability zero"):
            infer(model, query)
    assert infer(model, CausalQuery(2, observed=(0, 1))) == pytest.approx([0.3, 0.7])


def test_infer_raises_for_tables_that_are_too_large():
    table = np.full((2,) * 12, 0.5)
    families = [tuple(range(11)), tuple(range(11, 22))]
    parents = (*[()] * 22, *families, (22, 23))
    tables = (*[np.full(2, 0.5)] * 22, table, table, np.full((2, 2, 2), 0.5))
    model = CausalModel(tuple(f"v{i}" for i in range(25)), parents, tables)
    assert infer(model, CausalQuery(24)) == pytest.approx([0.5, 0.5])
    with pytest.raises(UserError, match="too large"):
        infer(model, CausalQuery(22, observed=(22, 0), intervened=(0, 0)))
    clique = [(pair, np.ones((2, 2))) for pair in combinations(range(25), 2)]
    with pytest.raises(UserError, match="too large"):
        elimination.marginal(clique, 0)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1 / 3, 1 / 3, 1 / 3], [0.34, 0.33, 0.33]),
        ([0.124, 0.876], [0.12, 0.88]),
        ([0.999, 0.001], [1.0, 0.0]),
        ([0.29, 0.71], [0.29, 0.71]),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
    ],
)
def test_round_rows_keeps_the_sum_by_largest_remainder(row, expected):
    np.testing.assert_allclose(round_rows(np.array(row)), expected, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]))
def test_round_rows_is_close_and_idempotent(seed, cardinality):
    table = np.random.default_rng(seed).dirichlet([0.3] * cardinality, size=(2, 3))
    rounded = round_rows(table)
    np.testing.assert_allclose(rounded.sum(axis=-1), 1, atol=1e-9)
    assert np.all(rounded >= 0)
    assert np.abs(rounded - table).max() < 0.01
    np.testing.assert_array_equal(round_rows(rounded), rounded)
    if cardinality == 2:
        np.testing.assert_allclose(rounded, np.round(table, 2), atol=1e-12)


def pgmpy_answer(model, query):
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.inference import VariableElimination
    from pgmpy.models import DiscreteBayesianNetwork

    network = DiscreteBayesianNetwork()
    network.add_nodes_from(model.names)
    for node, node_parents in enumerate(model.parents):
        network.add_edges_from((model.names[p], model.names[node]) for p in node_parents)
        columns = model.tables[node].reshape(-1, model.cards[node]).T
        names = [model.names[p] for p in node_parents]
        cards = [model.cards[p] for p in node_parents]
        network.add_cpds(TabularCPD(model.names[node], model.cards[node], columns, names, cards))
    setting = query.observed or query.intervened
    if query.intervened:
        network = network.do([model.names[setting[0]]])
    evidence = {model.names[setting[0]]: setting[1]}
    target = model.names[query.target]
    return VariableElimination(network).query([target], evidence, show_progress=False).values


@pytest.mark.parametrize("level", ["association", "intervention"])
def test_infer_agrees_with_pgmpy_on_300_queries(level):
    logging.getLogger("pgmpy").setLevel(logging.ERROR)
    rng = np.random.default_rng(3)
    checked = 0
    while checked < 300:
        model = random_model(rng, 10)
        query = draw_query(model, level, rng)
        if query.target != (query.observed or query.intervened)[0]:  # pgmpy rejects evidence on the target
            np.testing.assert_allclose(infer(model, query), pgmpy_answer(model, query), atol=1e-9)
            checked += 1
