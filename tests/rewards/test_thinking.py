"""Private thoughts: every verifier reads the same part of a completion."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlkit.envs.ranking.intent import parse_intent
from rlkit.envs.ranking.navigate import parse_scores, says_stop
from rlkit.envs.ranking.query import QueryEnvironment
from rlkit.rewards import boxed
from rlkit.rewards.distribution import parse_distribution
from rlkit.rewards.qa import extract_answer
from rlkit.rewards.reranking import read_permutation
from rlkit.rewards.simulation import split_documents
from rlkit.rewards.thinking import after_thinking, outside_thoughts

PIECES = ("<think>", "</think>", "a", "b ", "\n", "<thin", "k>", "</", "<answer>")


ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("completion", "visible"),
    [
        ("<think> maybe \\boxed{42} hmm", ""),
        ("\\boxed{7} <think> hm", "\\boxed{7} "),
        ("no tags", "no tags"),
        ("", ""),
        ("opened by the prompt </think> b", " b"),
        ("<think>a</think> b", " b"),
        ("<think>a</think> b\n<think>c</think> d", " d"),
        ("<think>a</think> b\n<think>c", " b\n"),
        ("<think>a <think>b</think> c", " c"),
        ("<think>a</think>", ""),
        ("a <think> b <think> c", "a "),
        # marks of other models
        ("<|channel>thought\na<channel|>b", "b"),
        ("<thinking>a</thinking> b", " b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<seed:think>a", ""),
        ("◁think▷a◁/think▷b", "b"),
        # gpt-oss
        (f"{ANALYSIS}a", ""),
        (f"{ANALYSIS}a<|end|>{FINAL}b", "b"),
        (f"{ANALYSIS}a<|end|>{FINAL.replace('<|message|>', ' <|constrain|>json<|message|>')}b", "b"),
        (f"{ANALYSIS}a<|end|>{FINAL}b\n{ANALYSIS}c", "b\n"),  # the second turn is truncated
        (f"{ANALYSIS}a\n{FINAL.removeprefix('<|start|>assistant')}b", "b"),  # the EOS token ended the thought
        (f"{ANALYSIS}a<|end|>{FINAL}b\n{ANALYSIS}c<|end|>{FINAL}d", "d"),
    ],
)
def test_after_thinking(completion, visible):
    assert after_thinking(completion) == visible


@pytest.mark.parametrize(
    ("turn", "visible"),
    [
        ("a <think>b</think> c <think>d</think> e", "a  c  e"),
        ("opened by the prompt </think> a <think>b", " a "),
        ("<think>a <think>b</think> c", " c"),
        ("<think>\na", ""),
        (f"{ANALYSIS}a<|end|>{FINAL}b", f"{FINAL}b"),
        (f"{ANALYSIS}a<b", ""),
    ],
)
def test_outside_thoughts(turn, visible):
    assert outside_thoughts(turn) == visible


def test_outside_thoughts_takes_linear_time():
    # This takes a moment. In quadratic time it would take minutes.
    assert outside_thoughts("<think></think>" * 500_000 + "a") == "a"


def visible_characters(completion):
    """Return the oracle's answer: drop all up to the last closing tag, and stop at the next opening tag."""
    parts = completion.split("</think>")
    return parts[-1].split("<think>")[0]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
@example("</think></think>")
def test_after_thinking_is_a_part_without_tags(completion):
    visible = after_thinking(completion)
    assert visible == visible_characters(completion) and visible in completion
    assert "<think>" not in visible and "</think>" not in visible
    assert after_thinking(visible) == visible
    assert after_thinking(f"{completion}<think>x") == visible
    assert after_thinking(f"{completion}</think>x") == "x"


READERS = {
    "boxed": (lambda text: boxed.correct(text, "7") or None, "\\boxed{7}", "\\boxed{8}"),
    "distribution": (parse_distribution, "ANSWER [0.5, 0.5]", "ANSWER [0.1, 0.9]"),
    "extract_answer": (extract_answer, "<answer>Paris</answer>", "<answer>Rome</answer>"),
    "read_permutation": (lambda text: read_permutation(text, 3), "[3] > [2] > [1]", "[1] > [2] > [3]"),
    "split_documents": (lambda text: split_documents(text) or None, "Doc 1: a", "Doc 1: b"),
    "parse_intent": (parse_intent, "<intent>a</intent>", "<intent>b</intent>"),
    "parse_scores": (lambda text: parse_scores(text, [3]), "[1] 80", "[1] 20"),
    "says_stop": (lambda text: says_stop(text) or None, "stop", "\nstop\n"),
    "parse_queries": (
        lambda text: QueryEnvironment().parse_queries(text, "q"),
        "<query>a</query>",
        "<query>b</query>",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_verifiers_ignore_thoughts(name):
    read, answer, thought = READERS[name]
    expected = read(answer)
    assert expected is not None
    for visible in (
        f"<think>{thought}</think>\n{answer}",
        f"{thought}</think>\n{answer}",
        f"{answer}\n<think>{thought}",
        f"<think>{thought}</think>{thought}\n<think>{thought}</think>\n{answer}\n<think>{thought}",
    ):
        assert read(visible) == expected, visible
    for hidden in (f"<think>{answer}", f"<think>{answer}</think>", f"{answer}</think>"):
        assert read(hidden) is None, hidden
