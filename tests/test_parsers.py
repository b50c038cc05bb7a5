"""Every parser of model output takes linear time: eight times the length takes less than 20 times the time.

A policy writes whatever earns reward, so its output is hostile input. The parsers run in the trainer's
process or under the time limit of a reward, and a regular expression that is quadratic takes seconds there on
one long completion.
"""

import contextlib
import gc
import time
from functools import partial

import pytest

from rlkit.envs.causal.foreign import read_prompt
from rlkit.envs.ranking.intent import parse_intent
from rlkit.envs.ranking.navigate import parse_scores, says_stop
from rlkit.envs.ranking.query import QueryEnvironment
from rlkit.envs.ranking.rewriting import clean_keywords, leakage, word_leakage
from rlkit.envs.search.protocol import read_action, results_text, write_results
from rlkit.envs.search.simulated import parse_documents
from rlkit.envs.search.tool_calls import read_call
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document
from rlkit.rewards import boxed, distribution, intent, qa, reranking, search, simulation
from rlkit.rewards.thinking import outside_thoughts
from rlkit.rollouts.replies import escape_stop_strings
from rlkit.words import keywords, separate_characters, truncate_words

LENGTHS = (2_500, 20_000)  # characters
MAX_RATIO = 20.0  # of the CPU times; 8 is linear, 64 quadratic
NEGLIGIBLE_SECONDS = 0.0025  # a quadratic parser takes longer at 20,000 characters
ATTEMPTS = 10

# fmt: off
UNITS = (
    "a", "7", "0", " ", "\n", "\t", "\r\n", "\\", ",", ".", ":", "=", "-", "+", "*", "/", "^", "_", "$", "%",
    "&", "~", '"', "'", "`", "#", ">", "<", "(", ")", "[", "]", "{", "}", "|", "!", "?", ";", "\0", "\u00a0",
    "\u0661", "\uff17", "\u202e", "\u00e9", "\u2212", "\ud800", "\U0001d7d9", "<answer>", "</answer>",
    "<answer></answer>", "<answer>a</answer>", "</answer><answer>", "<search>", "</search>",
    "<search>a</search>", "<search><answer>", "</answer></search>", "<think>", "</think>", "<think></think>",
    "<think>a</think>", "</think><think>", "<information>", "</information>", "<information>a</information>",
    "< /", "<  ", "</ ", "<intent>", "</intent>", "<intent>a</intent>", "<query>", "</query>",
    "<query>a</query>", "<query></query>", "/augment", "/augment ", "/embed", "/embed ", "stop", "stop\n",
    "stop ", "\nstop ", "<tool_call>", "</tool_call>", "<tool_call></tool_call>", "<tool_call>{}</tool_call>",
    '{"name": ', '{"name": "search", ', '{"name": {', '["', '", "', '\\"', "\\u0061", "\\ud800", "1e9,",
    "[1] ", "[1]", "[1] > ", "[1]>", "[ 1 ] ", "[1", "[ ", " ]", "[[", "]]", "[]", "][", "> ", ">>", "[1][2]",
    "[1] 80", "[1] 80\n", "[1] :", "[1] = ", "[1]\n", "[1]: 0.5 ", "[1] : ", "[12345]", "1 ", "1\n", "1.",
    "ANSWER", "ANSWER ", "ANSWER [", "ANSWER[]", "ANSWER [0.5, 0.5] ", "ANSWER [0.5,", "answer is ",
    "Answer\n", "answer: ", "answer:[", "0.5, ", "0.5,", "1/2, ", ".5 ", "1%,", "\\%", "\\frac{1}{2}, ",
    "\\frac{", "1-", "\\boxed", "\\boxed{", "\\boxed{}", "\\boxed{7}", "\\boxed{7", "\\boxed {", "\\\\boxed{",
    "\\{", "\\}", "{}", "}{", "\\left", "\\right", "\\left(", "\\text{", "\\text{a}", "\\mathrm{a} ", "\\,",
    "\\;", "\\ ", "\\!", "1,000", ",000", "1{,}000", "{,}000", "1\\,", "\\displaystyle", "\\sqrt{",
    "\\sqrt{2}", "x^", "x_{", "(1,", "\\not", "\\ne", "not ", "!=", "==", "= ", "a=", "1=", "1+", "1 + 1 = ",
    "\\cdot ", "\\begin{matrix}", "\\\\", "Doc 1", "Doc 1:", "Doc 1: a\n", "\nDoc 1(", 'Doc 1(Title: "',
    "Doc 1(Title: ", '(Title: "a") b\n', "Doc ", "Document 1\n", "\n ", " \n", "\n\n ", "```", "```json\n",
    "- ", "1) ", "* ", "a ", "the ", "a, ", "or ", "A ", "'s ", "1-1", "-\u2013", "<|im_end|>", "&lt;", "</",
    "/>", "//", "ab", "aab", "word ", "<<", "P(a) = [", "\n\n",
    "法", "法 ", "、", "。", "ก\u0e31", "\u0e31", "\u200b", "\u200ba", "法\u200b", "·", "·a", "・", "か",
    "和", "① ", "ー", "—", "，", "《", "１", "가", "1.法",
)
# fmt: on


def in_box(comparison, answer):
    return lambda text: boxed.correct(f"\\boxed{{{text}}}", answer, comparison)


def in_answer(reward):
    return lambda text: reward(f"<answer>{text}</answer>", ["Marie Curie", "1,867"])


def assistant(text, **record):
    return [{"role": "assistant", "content": text, **record}]


def read_causal_prompt(text):
    with contextlib.suppress(UserError):
        read_prompt(text)


PLAIN, ADAPTIVE = QueryEnvironment(), QueryEnvironment(adaptive=True)
TRUTH = [0.25, 0.75]
PARSERS = {
    "boxed.last_box": boxed.last_box,
    "boxed.box_format": boxed.box_format,
    "boxed.box_format, closed": lambda text: boxed.box_format(f"\\boxed{{7}}{text}"),
    "boxed.correct, integer": lambda text: boxed.correct(text, "7", "integer"),
    "boxed.correct, integer in a box": in_box("integer", "7"),
    "boxed.correct, math": lambda text: boxed.correct(text, "7", "math"),
    "boxed.correct, math in a box": in_box("math", "7"),
    "boxed.correct, expression in a box": in_box("math", "\\frac{x+1}{2}"),
    "boxed.correct, interval in a box": in_box("math", "[0, 1)"),
    "boxed.correct, word in a box": in_box("math", "\\text{Monday}"),
    "distribution.distribution": lambda text: distribution.distribution(text, TRUTH),
    "distribution.distribution, first": lambda text: distribution.distribution(text, TRUTH, which="first"),
    "distribution.distribution, official": lambda text: distribution.distribution(
        text, TRUTH, parser="official", which="last"
    ),
    "distribution.distribution in a list": lambda text: distribution.distribution(f"ANSWER [{text}]", TRUTH),
    "distribution.distribution, official in a list": lambda text: distribution.distribution(
        f"ANSWER [{text}]", TRUTH, parser="official"
    ),
    "qa.extract_answer": qa.extract_answer,
    "qa.exact_match": in_answer(qa.exact_match),
    "qa.exact_match, triviaqa": in_answer(partial(qa.exact_match, rules="triviaqa")),
    "qa.f1": in_answer(qa.f1),
    "qa.cover_match": in_answer(qa.cover_match),
    "qa.cover_match without spaces": lambda text: qa.cover_match(f"<answer>法{text}法</answer>", ["法"]),
    "separate_characters": lambda text: separate_characters(f"{text}法"),
    "keywords": lambda text: keywords(f"{text}法"),
    "truncate_words": lambda text: truncate_words(f"{text}法", 10**6),
    "search.tag_format": lambda text: search.tag_format(assistant(text)),
    "search.search_r1": lambda text: search.search_r1(assistant(text), text, ["Paris"]),
    "search.backed": lambda text: search.backed(
        [{"role": "user", "content": text, "documents": ["1"], "query": text}], f"<answer>{text}", ["Paris"]
    ),
    "search.refusal": lambda text: search.refusal(f"<answer>{text}</answer>", True),
    "reranking.ndcg": lambda text: reranking.ndcg(text, [1, 0, 2], [2, 1]),
    "reranking.ndcg after a chain": lambda text: reranking.ndcg(f"[1] > [2]{text}", [1, 0, 2], [2, 1]),
    "reranking.whole_list": lambda text: reranking.whole_list(text, [1, 0, 2]),
    "simulation.split_documents": simulation.split_documents,
    "simulation.split_documents in a title": lambda text: simulation.split_documents(f"Doc 1 (Title: {text}"),
    "simulation.split_documents in bold": lambda text: simulation.split_documents(f"**Doc 1{text}"),
    "simulation.split_documents in a list": lambda text: simulation.split_documents(f"1. {text}"),
    "simulation.requested_documents": simulation.requested_documents,
    "simulation.obeys": lambda text: simulation.obeys(f"Doc 1: {text}", ["Paris"], 1, True),
    "simulation.obeys in a title": lambda text: simulation.obeys(f"Doc 1(Title: {text}", ["Paris"], 1, True),
    "simulation.obeys in a quoted title": lambda text: simulation.form(f'Doc 1(Title: "{text}', 1),
    "intent.copied": lambda text: intent.copied(assistant("", intent=text), [text[:1000]], ["a"]),
    "parse_intent": parse_intent,
    "parse_intent, open": lambda text: parse_intent(f"<intent>{text}"),
    "parse_scores": lambda text: parse_scores(text, [3, 4]),
    "parse_scores after a number": lambda text: parse_scores(f"[1]{text}", [3, 4]),
    "says_stop": says_stop,
    "says_stop after stop": lambda text: says_stop(f"stop{text}x"),
    "parse_queries": lambda text: PLAIN.parse_queries(text, "q"),
    "parse_queries, open": lambda text: PLAIN.parse_queries(f"<query>{text}", "q"),
    "parse_queries, adaptive": lambda text: ADAPTIVE.parse_queries(text, "q"),
    "parse_queries, augmented": lambda text: ADAPTIVE.parse_queries(f"/augment {text}", "q"),
    "read_action": read_action,
    "read_action, open": lambda text: read_action(f"<search>{text}"),
    "read_action, closed": lambda text: read_action(f"<search>{text}</search>"),
    "read_call": read_call,
    "read_call, open": lambda text: read_call(f"<tool_call>{text}"),
    "read_call, JSON": lambda text: read_call('{"name": "search", "arguments": {"query_list": [' + text),
    "read_call, query": lambda text: read_call(
        '{"name": "search", "arguments": {"query_list": ["' + text + '"]}}'
    ),
    "read_call, function": lambda text: read_call(f"<function=search><parameter=query>{text}"),
    "read_call, GLM": lambda text: read_call(f"<tool_call>search<arg_key>{text}"),
    "read_call, LFM": lambda text: read_call(f"<|tool_call_start|>[search(query='{text}')]"),
    "read_call, gpt-oss": lambda text: read_call(f"<|channel|>analysis<|message|>{text}"),
    "read_call, Gemma": lambda text: read_call(f"<|tool_call>call:search{{{text}"),
    "read_call, Mistral": lambda text: read_call(f"[TOOL_CALLS]search[ARGS]{text}"),
    "outside_thoughts": lambda text: outside_thoughts(f"<think>{text}"),
    "parse_documents": lambda text: parse_documents(text, "useful", 3),
    "parse_documents, open": lambda text: parse_documents(f"Doc 1(Title: {text}", "useful", 3),
    "write_results": lambda text: write_results([Document("1", text, text)], 10**6),
    "write_results after a bracket": lambda text: write_results([Document("1", "", f"<{text}")], 10**6),
    "results_text": results_text,
    "escape_stop_strings": lambda text: escape_stop_strings(text, ["</search>", "</answer>"]),
    "escape_stop_strings after a bracket": lambda text: escape_stop_strings(f"<{text}", ["</answer>"]),
    "escape_stop_strings without tags": lambda text: escape_stop_strings(f"a{text}", ["ab", "\n\n", "aa"]),
    "clean_keywords": clean_keywords,
    "leakage": lambda text: leakage(text, "query", text[:1000]) + word_leakage(text, "query", text[:1000]),
    "read_prompt": read_causal_prompt,
}


def cpu_seconds(parse, text):
    gc.disable()  # a collection takes longer than the parser, and only long strings cause one
    try:
        start = time.process_time()
        parse(text)
        return time.process_time() - start
    finally:
        gc.enable()


def time_ratio(parse, unit):
    """Return the CPU time at 20,000 characters, in units of that at 2,500; 0 if it is negligible.

    Another process can only add to the time of a call, so the minimum of several calls counts.
    """
    short, long = (unit * (length // len(unit)) for length in LENGTHS)
    ratio, short_seconds, long_seconds = 0.0, float("inf"), float("inf")
    for _ in range(ATTEMPTS):
        long_seconds = min(long_seconds, cpu_seconds(parse, long))
        if long_seconds < NEGLIGIBLE_SECONDS:
            return 0.0
        # Several calls, since the time of a short one is known less precisely.
        short_seconds = min(short_seconds, *(cpu_seconds(parse, short) for _ in range(4)))
        ratio = long_seconds / short_seconds
        if ratio < MAX_RATIO / 2:
            break
    return ratio


@pytest.mark.parametrize("name", PARSERS)
def test_parser_takes_linear_time(name):
    PARSERS[name]("")  # imports and caches
    for unit in UNITS:
        ratio = time_ratio(PARSERS[name], unit)
        assert ratio < MAX_RATIO, (
            f"{unit!r} at {LENGTHS[1]} characters takes {ratio:.0f} times that at {LENGTHS[0]}"
        )
