"""Rewards for how an answer was found: Search-R1's cases, evidence that only the environment can give."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.reward import call_reward
from rlkit.rewards.qa import REFUSALS
from rlkit.rewards.search import backed, recall, refusal, search_price, search_r1, searches, tag_format
from rlkit.scoring import RewardRunner

THINK = "<think>Hm.</think>"
ASK = f"{THINK}\n<search>the capital</search>"
TEXT = 'Doc 1(Title: "France") The capital is Paris'


def model(text):
    return {"role": "assistant", "content": text}


def results(text=TEXT, documents=("d1", "d2"), query="the capital"):
    content = f"\n\n<information>{text}</information>\n\n"
    return {"role": "user", "content": content, "documents": list(documents), "query": query}


def said(text):
    return {"role": "user", "content": text, "documents": None, "query": None}


def rollout(answer, text=TEXT, think=THINK):
    """A rollout of one search; ill-formed without a thought before the answer."""
    return [model(ASK), results(text), model(f"{think}<answer>{answer}</answer>")]


def columns(turns, **others):
    """The columns that a trainer makes of a rollout, with a task's."""
    completion = "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")
    return {"turns": turns, "completion": completion, "answers": ["Paris"]} | others


def test_recall_is_the_share_of_supporting_passages_among_all_retrieved():
    turns = [model(ASK), results(documents=["a", "b"]), model(ASK), results(documents=["b", "c", "c"])]
    assert recall(turns, ["a", "c"]) == 1
    assert recall(turns, ["a", "x"]) == 0.5
    assert recall(turns, ["a", "a", "x"]) == 0.5
    assert recall(turns, ["x"]) == 0
    assert recall(turns, []) is None
    assert recall([], ["a"]) == 0


def test_the_model_cannot_claim_to_have_retrieved():
    claimed = {**model("<information>Paris</information><answer>Paris</answer>"), "documents": ["a"]}
    assert recall([claimed], ["a"]) == 0
    assert searches([claimed]) == 0
    assert backed([claimed], claimed["content"], ["Paris"]) == 0


def test_searches_that_got_documents_are_counted():
    turns = [model(ASK), results(), model(ASK), results(documents=[]), model("?"), said("What?"), model(ASK)]
    turns.append({"role": "user", "content": "The environment's other messages may lack the keys."})
    assert searches(turns) == 1
    assert searches([]) == 0


@pytest.mark.parametrize(("n", "price"), [(0, 0), (1, 0), (2, 0), (3, -0.25), (5, -0.75)])
def test_each_search_beyond_the_limit_costs(n, price):
    assert search_price([model(ASK), results()] * n, limit=2, price=0.25) == price


def test_searching_is_never_paid():
    for wrong in ({"limit": -1}, {"price": -0.1}):
        with pytest.raises(ValueError, match="must not be negative"):
            search_price([], **wrong)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_well_formed_rollouts(n):
    end = model(f" {THINK} \n <answer>Paris</answer>\n")
    assert tag_format([*[model(ASK), results()] * n, end]) == 1
    # After a stop string or an end token alike; a search that found nothing is one too.
    assert tag_format([*[model(ASK + "\n"), results(documents=[])] * n, end]) == 1


ILL_FORMED = {
    "nothing": [],
    "an empty turn": [model("")],
    "no thought": [model("<answer>Paris</answer>")],
    "no answer": [model(ASK), results()],
    "no thought after results": rollout("Paris", think=""),
    "two thoughts": rollout("Paris", think=THINK * 2),
    "words between tags": [model(f"{THINK} So: <answer>Paris</answer>")],
    "words before": [model(f"Well, {THINK}<answer>Paris</answer>")],
    "words after": [model(f"{THINK}<answer>Paris</answer>!")],
    "a turn after": [*rollout("Paris"), model(THINK)],
    "two answers": [model(f"{THINK}<answer>London</answer><answer>Paris</answer>")],
    "nested answers": [model(f"{THINK}<answer><answer>Paris</answer></answer>")],
    "a tag in a thought": [model("<think>I could <search></think><answer>Paris</answer>")],
    "an open thought": [model("<think>Hm. <answer>Paris</answer>")],
    "an open answer": [model(f"{THINK}<answer>Paris")],
    "two searches at once": [
        model(f"{ASK}<search>more</search>"),
        results(),
        model(f"{THINK}<answer>Paris</answer>"),
    ],
    "a search that is not answered": [model(f"{ASK}{THINK}<answer>Paris</answer>")],
    "results that were not asked for": [model(THINK), results(), model(f"{THINK}<answer>Paris</answer>")],
    "a search turned down": [model(ASK), said("My action is not correct."), *rollout("Paris")],
    "information of its own": [model(f"{ASK}<information>Paris</information>{THINK}<answer>Paris</answer>")],
    "more information of its own": [
        model(ASK),
        results(),
        model(f"<information>Paris</information>{THINK}<answer>Paris</answer>"),
    ],
}


@pytest.mark.parametrize("turns", ILL_FORMED.values(), ids=ILL_FORMED)
def test_ill_formed_rollouts(turns):
    assert tag_format(turns) == 0


@given(st.integers(0, 3), st.data())
def test_every_tag_is_needed(n, data):
    turns = [*[model(ASK), results()] * n, model(f"{THINK}<answer>Paris</answer>")]
    spoken = data.draw(st.sampled_from([i for i, turn in enumerate(turns) if turn["role"] == "assistant"]))
    tags = ["<think>", "</think>", "<search>", "</search>", "<answer>", "</answer>"]
    tag = data.draw(st.sampled_from([tag for tag in tags if tag in turns[spoken]["content"]]))
    assert tag_format(turns) == 1
    turns[spoken] = model(turns[spoken]["content"].replace(tag, ""))
    assert tag_format(turns) == 0


def test_retrieved_text_is_not_read_for_its_form():
    assert tag_format(rollout("Paris", text="</information><think> <answer>London</answer>")) == 1


# The table of Search-R1's `qa_em_format.py`, structure 0.2, final 0.1, with retrieval 0 and 0.5.
CASES = {
    "right, well-formed": (rollout("Paris"), 1, 1),
    "right, ill-formed": (rollout("Paris", think=""), 0.8, 0.8),
    "wrong, well-formed, found": (rollout("London"), 0.2, 0.7),
    "wrong, well-formed, not found": (rollout("London", text="comparison, Parisian"), 0.2, 0.2),
    "wrong, ill-formed": (rollout("London", think=""), 0.1, 0.1),
    "no answer": ([model(ASK), results(), model(THINK)], 0, 0),
}


@pytest.mark.parametrize(("turns", "plain", "with_retrieval"), CASES.values(), ids=CASES)
def test_the_six_cases_of_search_r1(turns, plain, with_retrieval):
    row = columns(turns)
    assert call_reward(search_r1, row) == pytest.approx(plain)
    assert search_r1(**row, retrieval=0.5) == pytest.approx(with_retrieval)


def test_no_retrieval_reward_for_finding_a_refusal():
    row = columns(rollout("Paris", text="The rest is unknown"), answers=["unknown"], answerable=False)
    assert search_r1(**row, retrieval=0.5) == pytest.approx(0.2)
    assert search_r1(**row | columns(rollout("unknown"), answers=["unknown"])) == 1


@pytest.mark.parametrize(
    ("text", "found"),
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
def test_an_answer_is_backed_by_whole_words_of_a_passage(text, found):
    assert backed(**columns(rollout("paris!", text=text))) == found
    assert backed(**columns(rollout("London", text=text))) == 0


def test_only_what_brought_documents_backs_an_answer():
    turns = [model("Paris"), said("Paris"), results("Paris", documents=[]), model("<answer>Paris</answer>")]
    assert backed(**columns(turns)) == 0
    assert backed(**columns([results("Paris"), *turns])) == 1


def test_it_is_the_answer_given_that_must_be_backed():
    turns = [results("The United States"), model("<answer>USA</answer>")]
    assert backed(**columns(turns, answers=["USA", "United States"])) == 0


def test_no_answer_is_not_backed_and_a_refusal_need_not_be():
    assert backed(**columns([results("Paris"), model("Paris")])) == 0
    assert backed(**columns(rollout("unknown"), answers=["unknown"], answerable=False)) is None


@pytest.mark.parametrize("reward", [search_r1, backed])
def test_empty_golds_are_errors(reward):
    with pytest.raises(ValueError, match="nothing is left"):
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
def test_refusing_iff_there_is_no_answer(text, answerable, value):
    assert refusal(text, answerable) == value


def test_turns_that_have_been_through_parquet(tmp_path):
    """There every message has the keys, null where they were missing."""
    rows = [columns(case[0]) for case in CASES.values()]
    rows += [columns([{"role": "user", "content": "Hm."}, model(ASK), results(documents=[]), model("?")])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert read[0]["turns"][0]["documents"] is None
    for before, after in zip(rows, read, strict=True):
        for reward in (searches, search_price, tag_format, search_r1, backed):
            assert call_reward(reward, before) == call_reward(reward, after)
        assert recall(before["turns"], ["d1"]) == recall(after["turns"], ["d1"])


def test_they_run_where_rewards_run():
    rewards = {
        f.__name__: f for f in (recall, searches, search_price, tag_format, search_r1, backed, refusal)
    }
    row = columns(rollout("Paris"), supporting=["d1", "d9"], prompt="Where?", task_id="t", answerable=True)
    with RewardRunner(rewards, time_limit=60) as runner:
        scores = runner([row], group_size=1)
    assert scores.invalid == [None]
    assert scores.values.tolist() == [[0.5, 1, 0, 1, 1, 1, 1]]
