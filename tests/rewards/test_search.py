"""Rewards for search rollouts: Search-R1's cases, and evidence that only the environment can provide."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.reward import call_reward
from rlkit.rewards.qa import REFUSALS
from rlkit.rewards.search import (
    SEPARATOR,
    backed,
    noisy_hits,
    recall,
    refusal,
    search_price,
    search_r1,
    searches,
    split_results,
    tag_format,
    useful_hits,
)
from rlkit.scoring import RewardRunner

THINK = "<think>Hm.</think>"
ASK = f"{THINK}\n<search>the capital</search>"
TEXT = 'Doc 1(Title: "France") The capital is Paris'


def model(text):
    return {"role": "assistant", "content": text}


def results(text=TEXT, documents=("d1", "d2"), query="the capital"):
    content = f"\n\n<information>{text}</information>\n\n"
    return {"role": "user", "content": content, "documents": list(documents), "query": query}


def tool_results(texts, label=None):
    """Return the message of a tool call with one query per string; an empty string is an empty result."""
    return {
        "role": "tool",
        "content": SEPARATOR.join(texts),
        "documents": [f"d{i}" for i, text in enumerate(texts) if text],
        "num_documents": [int(text != "") for text in texts],
        "query": "\n".join(f"query {i}" for i in range(len(texts))),
        "label": label,
    }


def other_message(text):
    return {"role": "user", "content": text, "documents": None, "query": None}


def rollout(answer, text=TEXT, think=THINK):
    """Return the turns of a rollout with one search; it is ill-formed without a thought before the answer."""
    return [model(ASK), results(text), model(f"{think}<answer>{answer}</answer>")]


def columns(turns, **task_columns):
    """Return the columns that rewards read, of a rollout and its task."""
    completion = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
    return {"turns": turns, "completion": completion, "answers": ["Paris"]} | task_columns


def test_recall_is_the_fraction_of_supporting_passages_retrieved():
    turns = [model(ASK), results(documents=["a", "b"]), model(ASK), results(documents=["b", "c", "c"])]
    assert recall(turns, ["a", "c"]) == 1
    assert recall(turns, ["a", "x"]) == 0.5
    assert recall(turns, ["a", "a", "x"]) == 0.5
    assert recall(turns, ["x"]) == 0
    assert recall(turns, []) is None
    assert recall([], ["a"]) == 0


def test_documents_in_the_models_messages_do_not_count():
    claimed = {**model("<information>Paris</information><answer>Paris</answer>"), "documents": ["a"]}
    assert recall([claimed], ["a"]) == 0
    assert searches([claimed]) == 0
    assert backed([claimed], claimed["content"], ["Paris"]) == 0


def test_searches_counts_searches_with_results():
    turns = [model(ASK), results(), model(ASK), results(documents=[])]
    turns += [model("?"), other_message("What?"), model(ASK)]
    turns.append({"role": "user", "content": "The environment's other messages may lack the keys."})
    assert searches(turns) == 1
    assert searches([]) == 0


def test_each_query_of_a_tool_call_is_a_search():
    call = [model("<tool_call>"), tool_results([TEXT] * 10)]
    assert searches(call * 4) == 40
    assert search_price(call * 4, limit=4, price=0.1) == pytest.approx(-3.6)
    assert searches([tool_results([TEXT, "", TEXT])]) == 2  # empty results are free, as in one search
    assert searches([tool_results(["", ""])]) == 0
    assert searches([tool_results([TEXT]), results()]) == 2


@given(
    st.lists(st.lists(st.sampled_from([TEXT, ""]), min_size=1, max_size=10), max_size=6), st.integers(0, 9)
)
def test_splitting_a_tool_call_changes_neither_searches_nor_price(calls, limit):
    together = [tool_results(texts) for texts in calls]
    apart = [results(text, ["d"] if text else []) for texts in calls for text in texts]
    assert searches(together) == searches(apart) == sum(text != "" for texts in calls for text in texts)
    assert search_price(together, limit) == search_price(apart, limit)


def test_hits_are_fractions_of_the_queries():
    turns = [tool_results(["Paris", "Rome", "Oslo", "Bonn"], "useful"), tool_results(["Paris"], "noisy")]
    assert useful_hits(turns, ["Paris"]) == 0.25 and noisy_hits(turns, ["Paris"]) == 1
    turns.append(tool_results(["Paris"], "useful"))
    assert useful_hits(turns, ["Paris"]) == 0.4
    assert useful_hits([results()], ["Paris"]) is None


@pytest.mark.parametrize("heading", ["Doc {}: ", "Doc {}(Title: ", 'Doc {}(Title: "T") '])
@pytest.mark.parametrize("answer", ["1", "2", "Doc", "Title"])
def test_headings_of_documents_do_not_contain_an_answer(heading, answer):
    content = "\n".join(f"{heading.format(i)}It rains." for i in (1, 2))
    turn = {"role": "user", "content": content, "documents": ["a", "b"], "query": "q", "label": "useful"}
    assert useful_hits([turn], [answer]) == 0
    assert useful_hits([turn], ["rains"]) == 1
    turn["content"] += f"\nDoc 3: It is {answer}."
    assert useful_hits([turn], [answer]) == 1


def test_split_results_assigns_passages_to_queries():
    assert split_results(tool_results(["a", "", "b"])) == [
        ("query 0", "a"),
        ("query 1", ""),
        ("query 2", "b"),
    ]
    assert split_results(results("a\n---\nb")) == [
        ("the capital", "\n\n<information>a\n---\nb</information>\n\n")
    ]
    ambiguous = tool_results(["a\n---\nb", "c"])
    assert split_results(ambiguous) == [("query 0\nquery 1", "a\n---\nb\n---\nc")]
    without_query = {"role": "user", "content": "Paris", "documents": ["1"]}
    assert split_results(without_query) == [("", "Paris")]


@pytest.mark.parametrize(("n", "price"), [(0, 0), (1, 0), (2, 0), (3, -0.25), (5, -0.75)])
def test_search_price_charges_searches_beyond_the_limit(n, price):
    assert search_price([model(ASK), results()] * n, limit=2, price=0.25) == price


def test_search_price_rejects_negative_arguments():
    for arguments in ({"limit": -1}, {"price": -0.1}):
        with pytest.raises(ValueError, match="must not be negative"):
            search_price([], **arguments)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_tag_format_accepts_well_formed_rollouts(n):
    last_turn = model(f" {THINK} \n <answer>Paris</answer>\n")
    assert tag_format([*[model(ASK), results()] * n, last_turn]) == 1
    # White space may follow a turn that ends with the EOS token, not a stop string. Results may be empty.
    assert tag_format([*[model(ASK + "\n"), results(documents=[])] * n, last_turn]) == 1


ILL_FORMED = {
    "no turns": [],
    "an empty turn": [model("")],
    "no thought": [model("<answer>Paris</answer>")],
    "no answer": [model(ASK), results()],
    "no thought after results": rollout("Paris", think=""),
    "two thoughts": rollout("Paris", think=THINK * 2),
    "text between tags": [model(f"{THINK} So: <answer>Paris</answer>")],
    "text before the first tag": [model(f"Well, {THINK}<answer>Paris</answer>")],
    "text after the answer": [model(f"{THINK}<answer>Paris</answer>!")],
    "a turn after the answer": [*rollout("Paris"), model(THINK)],
    "two answers": [model(f"{THINK}<answer>London</answer><answer>Paris</answer>")],
    "nested answers": [model(f"{THINK}<answer><answer>Paris</answer></answer>")],
    "a tag in a thought": [model("<think>I could <search></think><answer>Paris</answer>")],
    "an unclosed thought": [model("<think>Hm. <answer>Paris</answer>")],
    "an unclosed answer": [model(f"{THINK}<answer>Paris")],
    "two searches in a turn": [
        model(f"{ASK}<search>more</search>"),
        results(),
        model(f"{THINK}<answer>Paris</answer>"),
    ],
    "a search without results": [model(f"{ASK}{THINK}<answer>Paris</answer>")],
    "results without a search": [model(THINK), results(), model(f"{THINK}<answer>Paris</answer>")],
    "a rejected search": [model(ASK), other_message("My action is not correct."), *rollout("Paris")],
    "information written by the model": [
        model(f"{ASK}<information>Paris</information>{THINK}<answer>Paris</answer>")
    ],
    "information written by the model after results": [
        model(ASK),
        results(),
        model(f"<information>Paris</information>{THINK}<answer>Paris</answer>"),
    ],
}


@pytest.mark.parametrize("turns", ILL_FORMED.values(), ids=ILL_FORMED)
def test_tag_format_rejects_ill_formed_rollouts(turns):
    assert tag_format(turns) == 0


@given(st.integers(0, 3), st.data())
def test_tag_format_requires_every_tag(n, data):
    turns = [*[model(ASK), results()] * n, model(f"{THINK}<answer>Paris</answer>")]
    index = data.draw(st.sampled_from([i for i, turn in enumerate(turns) if turn["role"] == "assistant"]))
    tags = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>"]
    tag = data.draw(st.sampled_from([tag for tag in tags if tag in turns[index]["content"]]))
    assert tag_format(turns) == 1
    turns[index] = model(turns[index]["content"].replace(tag, ""))
    assert tag_format(turns) == 0


def test_tag_format_counts_the_tag_that_the_chat_template_has_written():
    turns = [
        model("hm</think><search>q</search>"),
        results(),
        model("<think>ok</think><answer>Paris</answer>"),
    ]
    opened = [turns[0] | {"prefix": "<think>"}, *turns[1:]]
    assert tag_format(turns) == 0 and tag_format(opened) == 1
    assert tag_format([turns[0] | {"prefix": None}, *turns[1:]]) == 0  # how a saved rollout stores no prefix
    assert tag_format([opened[0], turns[1], opened[0] | turns[2]]) == 0  # a second tag of the model
    row = columns(opened, answers=["Paris"])
    assert search_r1(**row) == 1 and search_r1(**columns(turns, answers=["Paris"])) == pytest.approx(0.8)


def test_tag_format_ignores_tags_in_results():
    assert tag_format(rollout("Paris", text="</information><think> <answer>London</answer>")) == 1


# The table of Search-R1's `qa_em_format.py`, structure 0.2, final 0.1, with retrieval 0 and 0.5.
CASES = {
    "correct, well-formed": (rollout("Paris"), 1, 1),
    "correct, ill-formed": (rollout("Paris", think=""), 0.8, 0.8),
    "wrong, well-formed, answer retrieved": (rollout("London"), 0.2, 0.7),
    "wrong, well-formed, answer not retrieved": (rollout("London", text="comparison, Parisian"), 0.2, 0.2),
    "wrong, ill-formed": (rollout("London", think=""), 0.1, 0.1),
    "no answer": ([model(ASK), results(), model(THINK)], 0, 0),
}


@pytest.mark.parametrize(("turns", "plain", "with_retrieval"), CASES.values(), ids=CASES)
def test_search_r1_of_six_cases(turns, plain, with_retrieval):
    row = columns(turns)
    assert call_reward(search_r1, row) == pytest.approx(plain)
    assert search_r1(**row, retrieval=0.5) == pytest.approx(with_retrieval)


def test_search_r1_pays_nothing_for_retrieving_a_refusal():
    row = columns(rollout("Paris", text="The rest is unknown"), answers=["unknown"], answerable=False)
    assert search_r1(**row, retrieval=0.5) == pytest.approx(0.2)
    assert search_r1(**row | columns(rollout("unknown"), answers=["unknown"])) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Paris", 1),
        ("Paris</information> and <information>more", 1),
        ("The city (Paris)", 1),
        ("“Paris”—the capital", 1),
        ("Parisian", 0),
        ("London", 0),
        ("", 0),
    ],
)
def test_backed_requires_whole_words_of_a_passage(text, value):
    assert backed(**columns(rollout("paris!", text=text))) == value
    assert backed(**columns(rollout("London", text=text))) == 0


def test_backed_reads_only_messages_with_documents():
    turns = [model("Paris"), other_message("Paris"), results("Paris", documents=[])]
    turns.append(model("<answer>Paris</answer>"))
    assert backed(**columns(turns)) == 0
    assert backed(**columns([results("Paris"), *turns])) == 1


def test_backed_looks_for_the_models_answer_not_an_alias():
    turns = [results("The United States"), model("<answer>USA</answer>")]
    assert backed(**columns(turns, answers=["USA", "United States"])) == 0


def test_rewards_ignore_the_answer_of_a_thought_that_is_never_closed():
    row = columns([results("Paris"), model("<think>maybe <answer>Paris</answer>")])
    assert backed(**row) == search_r1(**row) == refusal(row["completion"], answerable=True) == 0


def test_backed_without_an_answer_is_0_and_of_a_refusal_is_none():
    assert backed(**columns([results("Paris"), model("Paris")])) == 0
    assert backed(**columns(rollout("unknown"), answers=["unknown"], answerable=False)) is None


@pytest.mark.parametrize("reward", [search_r1, backed])
def test_empty_gold_answers_are_errors(reward):
    with pytest.raises(ValueError, match="empty after normalization"):
        reward(**columns(rollout("Paris"), answers=["The"]))


@pytest.mark.parametrize(
    ("text", "answerable", "value"),
    [
        *[(f"<answer>{phrase}</answer>", False, 1) for phrase in REFUSALS],
        *[(f"<answer>{phrase}</answer>", True, 0) for phrase in REFUSALS],
        ("<answer>Paris</answer>", True, 1),
        ("<answer>Paris</answer>", False, 0),
        ("<answer>unknown actor</answer>", False, 0),
        ("unknown", False, 0),
        ("unknown", True, 0),
        ("<answer>unknown</answer>", None, None),
    ],
)
def test_refusal_compares_the_decision_with_the_task(text, answerable, value):
    assert refusal(text, answerable) == value


def test_rewards_accept_turns_read_from_parquet(tmp_path):
    """In Parquet every message has all keys, and missing ones are null."""
    rows = [columns(case[0]) for case in CASES.values()]
    rows += [columns([{"role": "user", "content": "Hm."}, model(ASK), results(documents=[]), model("?")])]
    rows += [
        columns([model("?"), tool_results([TEXT, "", TEXT]), results(), model("<answer>Paris</answer>")])
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert read[0]["turns"][0]["documents"] is None
    for before, after in zip(rows, read, strict=True):
        for reward in (searches, search_price, tag_format, search_r1, backed, useful_hits):
            assert call_reward(reward, before) == call_reward(reward, after)
        assert recall(before["turns"], ["d1"]) == recall(after["turns"], ["d1"])


def test_rewards_run_in_a_reward_process():
    rewards = {
        f.__name__: f for f in (recall, searches, search_price, tag_format, search_r1, backed, refusal)
    }
    row = columns(rollout("Paris"), supporting=["d1", "d9"], prompt="Where?", task_id="t", answerable=True)
    with RewardRunner(rewards, time_limit=60) as runner:
        scores = runner([row], group_size=1)
    assert scores.invalid == [None]
    assert scores.values.tolist() == [[0.5, 1, 0, 1, 1, 1, 1]]
