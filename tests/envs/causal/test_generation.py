"""Random graphs, their splits, random queries, and the tasks generated from them."""

from itertools import islice

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.environment import SPLITS
from rlkit.envs.causal import CausalEnvironment
from rlkit.envs.causal.graphs import GraphConfig, graph_stream, random_stream, split_of, structure_hash
from rlkit.envs.causal.inference import infer
from rlkit.envs.causal.model import LEVELS, descendants
from rlkit.envs.causal.problem import from_json
from rlkit.envs.causal.queries import draw_model, draw_query, kind_of
from rlkit.errors import UserError


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 4))
def test_draw_respects_graph_config(seed, num_nodes, max_in_degree):
    parents = GraphConfig(num_nodes, None, max_in_degree).draw(np.random.default_rng(seed))
    assert len(parents) == num_nodes
    assert 1 <= parents.count(()) <= num_nodes - 1
    for node, node_parents in enumerate(parents):
        assert len(set(node_parents)) == len(node_parents) <= max_in_degree
        assert all(0 <= parent < node for parent in node_parents)
        assert not node_parents or parents[:node].count(()) >= 1
    assert len(parents[1]) <= 1


def test_draw_puts_the_given_number_of_roots_first():
    for roots in (1, 3, 5):
        parents = GraphConfig(6, roots, 2).draw(np.random.default_rng(roots))
        assert [node_parents == () for node_parents in parents] == [True] * roots + [False] * (6 - roots)


def random_nx(rng, num_nodes):
    parents = GraphConfig(num_nodes, None, 2).draw(rng)
    graph = nx.DiGraph((p, node) for node, node_parents in enumerate(parents) for p in node_parents)
    graph.add_nodes_from(range(num_nodes))
    return parents, graph


def relabel(parents, order):
    relabeled = [()] * len(parents)
    for node, node_parents in enumerate(parents):
        relabeled[order[node]] = tuple(order[p] for p in reversed(node_parents))
    return tuple(relabeled)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_structure_hash_ignores_node_labels(seed, num_nodes):
    rng = np.random.default_rng(seed)
    parents, _ = random_nx(rng, num_nodes)
    assert structure_hash(parents) == structure_hash(relabel(parents, rng.permutation(num_nodes).tolist()))


def test_structure_hash_separates_non_isomorphic_small_graphs():
    rng = np.random.default_rng(0)
    for num_nodes, structures in ((3, 5), (4, 24)):
        graphs = {}
        for parents, graph in (random_nx(rng, num_nodes) for _ in range(1500)):
            first = graphs.setdefault(structure_hash(parents), graph)
            assert nx.is_isomorphic(first, graph)
        assert len(graphs) == structures


def test_structure_hash_and_split_are_stable():
    # If these change, graphs move between splits, and the environment needs a new version.
    assert structure_hash(((), (0,), (1,))) == "2a25758fdba9f1a4adba07cc992a9d51"
    assert [split_of(f"{i}") for i in range(8)] == [
        "train",
        "train",
        "train",
        "train",
        "train",
        "train",
        "test",
        "train",
    ]


def test_split_of_assigns_70_15_15_percent():
    rng = np.random.default_rng(1)
    hashes = {structure_hash(GraphConfig(10, None, 2).draw(rng)) for _ in range(2000)}
    splits = [split_of(structure) for structure in hashes]
    assert splits.count("train") / len(splits) == pytest.approx(0.70, abs=0.04)
    assert splits.count("dev") / len(splits) == pytest.approx(0.15, abs=0.03)
    assert splits.count("test") / len(splits) == pytest.approx(0.15, abs=0.03)


def test_graph_stream_does_not_repeat_graphs():
    hashes = [structure for _, structure in islice(graph_stream(GraphConfig(10, None, 2), "dev", 0), 150)]
    assert len(set(hashes)) == 150
    assert {split_of(structure) for structure in hashes} == {"dev"}


@pytest.mark.parametrize(("num_nodes", "structures"), [(3, 5), (4, 24), (5, 143)])
def test_graph_stream_of_few_nodes_covers_all_structures_of_every_split(num_nodes, structures):
    config = GraphConfig(num_nodes, None, 2)
    structures_by_split = []
    for split in SPLITS:
        hashes = [structure for _, structure in islice(graph_stream(config, split, 0), 150)]
        assert {split_of(structure) for structure in hashes} == {split}
        structures_by_split += sorted(set(hashes))
    assert len(structures_by_split) == len(set(structures_by_split))
    assert 0.8 * structures <= len(structures_by_split) <= structures


def test_graph_stream_yields_each_structure_once_per_pass():
    stream = graph_stream(
        GraphConfig(3, None, 2), "train", 0
    )  # the train split has three of the graphs with 3 nodes
    hashes = [structure for _, structure in islice(stream, 30)]
    assert {len(set(hashes[i : i + 3])) for i in range(0, 30, 3)} == {3}


def test_tasks_raises_if_no_graph_is_in_the_split():
    environment = CausalEnvironment(num_nodes=2, max_in_degree=1)
    assert len(environment.tasks("train", 3)) == 3
    with pytest.raises(UserError, match="raise num_nodes"):
        environment.tasks("test", 3)


def test_random_streams_of_different_keys_differ():
    streams = [
        random_stream(*key) for key in [(0, "train", 0), (1, "train", 0), (1, "dev", 0), (1, "train", 1)]
    ]
    streams += [
        random_stream(2, "train", 0, 0, 1),
        random_stream(2, "train", 0, 1, 0),
        random_stream(2, "train", 0),
    ]
    assert len({stream.random() for stream in streams}) == len(streams)


def test_draw_model_draws_dirichlet_rows_and_random_names():
    rng = np.random.default_rng(5)
    models = [draw_model(((), (0,)), 2, 1.0, rng) for _ in range(1500)]
    first = np.array([model.tables[1][1, 0] for model in models])
    assert first.mean() == pytest.approx(0.5, abs=0.03)
    assert first.var() == pytest.approx(1 / 12, abs=0.01)  # uniform
    assert np.mean([model.names == ("v0", "v1") for model in models]) == pytest.approx(0.5, abs=0.05)
    sharp = np.array([draw_model(((),), 2, 0.05, rng).tables[0].max() for _ in range(200)])
    assert np.median(sharp) > 0.99


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 10), st.sampled_from(LEVELS))
def test_draw_query_respects_the_level(seed, num_nodes, level):
    rng = np.random.default_rng(seed)
    model = draw_model(GraphConfig(num_nodes, None, 2).draw(rng), 2, 0.2, rng).printed()
    query = draw_query(model, level, rng)
    assert query.level == level
    if query.intervened:
        assert query.intervened[0] < num_nodes - 1
    if level == "counterfactual":
        assert query.observed[0] in descendants(model.parents, query.intervened[0])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from(LEVELS))
def test_kind_of_query_agrees_with_its_exact_answer(seed, num_nodes, level):
    rng = np.random.default_rng(seed)
    model = draw_model(GraphConfig(num_nodes, None, min(2, num_nodes - 1)).draw(rng), 2, 1.0, rng)
    query = draw_query(model, level, rng)
    answer = infer(model, query)
    kind = kind_of(model, query)
    assert (kind == "given") == bool((answer > 1 - 1e-12).any())
    rows = model.tables[query.target].reshape(-1, 2)
    is_row = np.isclose(rows, answer, rtol=0, atol=1e-12).all(axis=1).any()
    assert kind == "given" or (kind == "row") == bool(is_row)


def test_sample_follows_the_tables():
    rng = np.random.default_rng(2)
    model = draw_model(((), (0,), (0, 1)), 3, 1.0, rng)
    samples = np.array([model.sample(rng) for _ in range(6000)])
    assert np.bincount(samples[:, 0], minlength=3) / 6000 == pytest.approx(model.tables[0], abs=0.03)
    rows = samples[samples[:, 0] == 1]
    assert np.bincount(rows[:, 1], minlength=3) / len(rows) == pytest.approx(model.tables[1][1], abs=0.05)


def test_query_distribution_on_graphs_of_the_papers_size():
    """The shares follow from the sampling; measured on the release: 10% of targets are the conditioned node,
    and 58% of counterfactuals observe the intervened node.
    """
    for level in LEVELS:
        tasks = CausalEnvironment(level=level, questions_per_graph=4).tasks("test", 1200)
        queries = [from_json(task["problem"])[1] for task in tasks]
        targets_condition = np.mean([q.target == (q.intervened or q.observed)[0] for q in queries])
        assert targets_condition == pytest.approx(0.10, abs=0.03)
        if level == "counterfactual":
            observes_intervened = np.mean([q.observed[0] == q.intervened[0] for q in queries])
            assert observes_intervened == pytest.approx(0.58, abs=0.06)
            assert np.mean(tasks["is_core"]) == pytest.approx(0.086, abs=0.04)
        if level == "association":
            assert np.mean(tasks["is_core"]) == pytest.approx(0.49, abs=0.06)
        if level == "intervention":
            assert np.mean(tasks["is_core"]) == pytest.approx(0.26, abs=0.06)
