"""Writing prompts in both styles, and parsing prompts from any source."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.causal import CausalEnvironment
from rlkit.envs.causal.foreign import read_prompt
from rlkit.envs.causal.model import LEVELS, CausalModel, CausalQuery
from rlkit.envs.causal.prompts import official_prompt, short_name, short_prompt
from rlkit.errors import UserError
from tests.quick import ROOT

MODEL = CausalModel(
    ("v2", "v0", "v1"),
    ((), (), (0, 1)),
    (
        np.array([0.3, 0.7]),
        np.array([0.29, 0.71]),
        np.array([[[0.1, 0.9], [0.25, 0.75]], [[0.0, 1.0], [0.5, 0.5]]]),
    ),
)

OFFICIAL = """\
v0 can take values in [0, 1]
v1 can take values in [0, 1]
v2 can take values in [0, 1]

This is the causal directed acyclic graph (DAG):

strict digraph {
v0;
v1;
v2;
v0 -> v1;
v2 -> v1;
}


These are the causal conditional probability tables (CPT) of the DAG:

CPTs for v2:
P(v2) = [0.3, 0.7]

CPTs for v0:
P(v0) = [0.29, 0.71]

CPTs for v1:
P(v1 | v2=0,v0=0) = [0.1, 0.9]
P(v1 | v2=0,v0=1) = [0.25, 0.75]
P(v1 | v2=1,v0=0) = [0.0, 1.0]
P(v1 | v2=1,v0=1) = [0.5, 0.5]


Here's your Question: What is the marginal distribution of v1 given we intervented to set v0 to 1?

----------

Now start your solution process. Be precise."""

SHORT = """\
P(c)=[0.30, 0.70]
P(a)=[0.29, 0.71]
P(b|c=0,a=0)=[0.10, 0.90]
P(b|c=0,a=1)=[0.25, 0.75]
P(b|c=1,a=0)=[0.00, 1.00]
P(b|c=1,a=1)=[0.50, 0.50]
P(b|do(a=1)) = ?
Answer with a list such as [0.25, 0.75]."""


def test_official_prompt_has_the_layout_of_rlcausal():
    system, user = official_prompt(MODEL, CausalQuery(2, intervened=(1, 1)))
    assert (system["role"], user["role"]) == ("system", "user")
    assert "THOUGHT PROCESS" in system["content"] and "ANSWER" in system["content"]
    assert user["content"].endswith(OFFICIAL)


def test_short_prompt_has_one_line_per_row():
    assert short_prompt(MODEL, CausalQuery(2, intervened=(1, 1))) == [{"role": "user", "content": SHORT}]


def test_questions_are_worded_by_level_and_style():
    def official(query):
        return official_prompt(MODEL, query)[1]["content"]

    def short(query):
        return short_prompt(MODEL, query)[0]["content"]

    association, counterfactual = CausalQuery(0, (2, 1)), CausalQuery(0, (2, 1), (1, 0))
    assert "distribution of v2 given it is observed that v1=1?" in official(association)
    assert "P(c|b=1) = ?" in short(association)
    question = "distribution of v2 given we first observed v1 = 1 and then intervened to set v0 to 0?"
    assert question in official(counterfactual)
    assert "Observed b=1. Had we set a=0, P(c) = ?" in short(counterfactual)
    assert "selector" in official(counterfactual) and "selector" not in official(association)
    assert "independently" in short(counterfactual) and "independently" not in short(association)


def test_short_name_uses_letters_for_the_first_26_names():
    assert [short_name(f"v{i}") for i in (0, 25, 26, 199)] == ["a", "z", "v26", "v199"]


def assert_same_model(a, b):
    """Assert that two models are equal up to the order of their nodes."""
    index_in_b = {name: i for i, name in enumerate(b.names)}
    order = [index_in_b[name] for name in a.names]
    for node_a, node_b in enumerate(order):
        assert tuple(order[p] for p in a.parents[node_a]) == b.parents[node_b]
        np.testing.assert_allclose(a.tables[node_a], b.tables[node_b], atol=1e-12)


def test_read_prompt_inverts_official_prompt():
    for query in (CausalQuery(0, (2, 1)), CausalQuery(2, None, (1, 0)), CausalQuery(0, (2, 1), (1, 0))):
        messages = official_prompt(MODEL, query)
        for prompt in (messages, messages[1]["content"], "\n".join(m["content"] for m in messages)):
            parsed_model, parsed_query = read_prompt(prompt)
            assert_same_model(MODEL, parsed_model)
            assert parsed_query == query


@pytest.mark.parametrize("cardinality", [2, 3])
def test_solve_prompt_returns_the_truth_of_generated_tasks(cardinality):
    environment = CausalEnvironment(level=LEVELS, cardinality=cardinality, questions_per_graph=3)
    for task in environment.tasks("dev", 90):
        assert environment.solve_prompt(task["prompt"]) == pytest.approx(task["truth"], abs=1e-9)


def test_read_prompt_accepts_named_values_rounded_rows_and_any_order():
    text = OFFICIAL.replace("[0, 1]", "[no, yes]").replace("=0", "=no").replace("=1", "=yes")
    text = text.replace("set v0 to 1", "set v0 to yes").replace("= [0.3, 0.7]", "= [0.304, .7]")
    blocks = text.split("CPTs for v2:\nP(v2) = [0.304, .7]\n\n")
    text = blocks[0] + blocks[1].replace("\n\nHere's", "CPTs for v2:\nP(v2) = [0.304, .7]\n\nHere's")
    model, query = read_prompt(text)
    rounded = tuple(np.round(table, 2) for table in model.tables)
    assert_same_model(MODEL, CausalModel(model.names, model.parents, rounded))
    node, value = query.intervened
    assert (model.names[query.target], model.names[node], value) == ("v1", "v0", 1)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("v0 can take values in [0, 1]\n", "", "values of v0 are not listed"),
        (
            "v0 can take values in [0, 1]\n",
            "v0 can take values in [0, 0]\n",
            "v0 must be listed once, with 2 to 64 distinct values",
        ),
        (
            "v0 can take values in [0, 1]\n",
            "v0 can take values in [0]\n",
            "v0 must be listed once, with 2 to 64 distinct values",
        ),
        (
            "v0 can take values in [0, 1]\n",
            "v0 can take values in [0, 1]\n" * 2,
            "v0 must be listed once, with 2 to 64 distinct values",
        ),
        ("P(v0) = [0.29, 0.71]", "", "no row P\\(v0\\)"),
        ("P(v0) = [0.29, 0.71]", "P(v0) = [0.29, 0.8]", "sum to 1"),
        ("P(v0) = [0.29, 0.71]", "P(v0) = [0, 0]", "sum to 1"),
        ("P(v0) = [0.29, 0.71]", "P(v0) = [1.0]", "expected 2"),
        ("P(v0) = [0.29, 0.71]", "P(v0) = [0.2.9, 0.71]", "expected 2"),
        ("P(v0) = [0.29, 0.71]", "P(v0 | v1=0) = [0, 1]\nP(v0 | v1=1) = [0, 1]", "edge v1 -> v0"),
        ("v0 -> v1;\n", "", "edge v0 -> v1"),
        ("v2=1,v0=1", "v2=1,v0=0", "repeat"),
        ("v2=1,v0=1", "v0=1,v2=1", "same parents"),
        ("v2=1,v0=1", "v2=1,v0=2", "v0 cannot be 2"),
        ("P(v1 | v2=1,v0=1) = [0.5, 0.5]\n", "", "4 assignments"),
        ("set v0 to 1", "set v0 to 7", "v0 cannot be 7"),
        ("set v0 to 1", "set v9 to 1", "v9 are not listed"),
        ("we intervented to set", "we begged", "cannot parse the condition"),
        ("What is the marginal", "What was the marginal", "found 0 questions"),
        ("Now start", "What is the marginal distribution of v0?", "found 2 questions"),
    ],
)
def test_read_prompt_names_the_contradiction(old, new, reason):
    assert old in OFFICIAL
    with pytest.raises(UserError, match=reason):
        read_prompt(OFFICIAL.replace(old, new))


def test_read_prompt_rejects_cycles():
    text = OFFICIAL.replace("v0 -> v1;", "v0 -> v1;\nv1 -> v0;")
    text = text.replace("P(v0) = [0.29, 0.71]", "P(v0 | v1=0) = [0, 1]\nP(v0 | v1=1) = [0, 1]")
    with pytest.raises(UserError, match="cycle"):
        read_prompt(text)


def test_read_prompt_rejects_prompts_that_are_too_long():
    with pytest.raises(UserError, match="characters"):
        read_prompt(OFFICIAL + " " * 10**6)
    names = "".join(f"x{i} can take values in [0, 1]\n" for i in range(201))
    with pytest.raises(UserError, match="201 lines"):
        read_prompt(names)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "P(" * 10**5,
        "What is the marginal distribution of " * 20_000,
        "What is the marginal distribution of a given" + " " * 9 * 10**5,
        "P(a | " + "b=0," * 10**5 + ") = [0.1, 0.9]",
        "a can take values in [" + "0, " * 10**5 + "]",
        "v0 can take values in [0, 1]\nP(v0) = [" + "9" * 1500 + ", 0]",
        "v0 can take values in [0, 1]\nP(v0) = [__import__('os'), 0]",
    ],
)
def test_read_prompt_rejects_hostile_text(text):
    with pytest.raises(UserError):
        read_prompt(text)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_read_prompt_of_a_mangled_prompt_succeeds_or_raises_user_error(data):
    text = OFFICIAL
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        length = data.draw(st.integers(0, 12))
        text = text[:start] + data.draw(st.text("v012=|->[],. \nP()", max_size=6)) + text[start + length :]
    try:
        model, query = read_prompt(text)
    except UserError:
        return
    assert 0 <= query.target < len(model)
    assert all(abs(table.sum(axis=-1) - 1).max() < 1e-9 for table in model.tables)


def test_documentation_shows_real_tasks():
    page = (ROOT / "docs" / "environments" / "causal.md").read_text()
    for style in ("short", "official"):
        environment = CausalEnvironment(num_nodes=4, prompt_style=style)
        task = environment.tasks("train", 6)[5]
        texts = [message["content"] for message in task["prompt"]] + [environment.answer(task)]
        if style == "short":
            texts.append(environment.solution(task))
        assert all(text in page for text in texts)
