"""Hostile completions through every verifier: no exception, and no wrong answer with the score 1.

A wrong answer is known by construction. The pieces of the completions contain no digit nine, no letter "z"
and no variable "x", in any script, and every reference answer needs one of them. `pytest -m exhaustive` runs
a million completions.
"""

import random
import unicodedata

import pytest

from rlkit.encoding import encodable
from rlkit.envs.ranking.intent import parse_intent
from rlkit.envs.ranking.navigate import parse_scores, says_stop
from rlkit.envs.ranking.query import QueryEnvironment
from rlkit.envs.ranking.scoring import bm25_scores
from rlkit.envs.search.protocol import read_action, write_results
from rlkit.envs.search.simulated import parse_documents
from rlkit.envs.search.tool_calls import MAX_QUERIES, read_call
from rlkit.retrieval.documents import Document
from rlkit.retrieval.engines.bm25 import terms
from rlkit.rewards import boxed, distribution, identification, intent, qa, reranking, search, simulation
from rlkit.rollouts.replies import escape_stop_strings

BATCH = 1000  # completions of one test; a seed gives the same ones everywhere
NUM_USUAL_BATCHES, NUM_EXHAUSTIVE_BATCHES = 10, 1000
MAX_PIECES = 24
# fmt: off
PIECES = (
    "0", "1", "2", "7", "10", "36", "100", "1,000", "1{,}000", "1 000", "-1", "+7", "7.0", ".5", "0.5", "7.",
    "00", "1e5", "1e-5", "1E400", "10^{10^{10}}", "2^{3^{4^{5}}}", "7!", "100!", "0x1F", "1_000", "0.333",
    "1/2", "1/0", "\u0667", "\uff17", "\u00bd", "\u00b2", "\u2077", "\u2167", "\U0001d7df", "\u0661\u0662",
    "\uff10.\uff15", "\u202e", "\u200f", "\u2066", "\u200b", "\ufeff", "\u00a0", "\u2028", "\x85", "\0",
    "\x1b[0m", "\ud800", "\udfff", " ", "  ", "\n", "\n\n", "\t", "\r\n", ",", ", ", ".", ";", ":", "=", "==",
    "!=", "<", ">", " > ", "%", "$", "$$", "+", "-", "*", "/", "^", "_", "(", ")", "[", "]", "{", "}", "\\",
    "\\\\", "|", "&", "#", "~", '"', "'", "`", "\\boxed{", "\\boxed{7}", "\\boxed{}", "\\boxed{\\boxed{",
    "\\\\boxed{1", "\\boxed 7", "\\fbox{7}", "}}", "{{", "\\frac{1}{2}", "\\frac{", "\\dfrac12", "\\sqrt{2}",
    "\\sqrt[3]{", "\\pi", "\\infty", "\\text{b}", "\\text{", "i", "\\left(", "\\right)", "\\{", "\\}",
    "\\cup", "\\in", "\\not", "\\ne ", "\\le ", "\\pm ", "\\cdot ", "\\%", "^\\circ", "\\begin{pmatrix}",
    "\\end{pmatrix}", "\\sum_{n=1}^{7}", "\\int_0^1", "\\log_2", "\\binom{7}{2}", "\\ldots", "a", "(1, 2)",
    "[0, 1)", "\\{1, 2\\}", "y = 7", "y=1=2", "a or b", "not 7", "1 + 1", "7 \\text{ or } 1", "b^2", "True",
    "ANSWER", "ANSWER [", "ANSWER [0.5, 0.5]", "answer is [", "Answer:\n", "0.25", "0.75", "25%", "1.0",
    "\\frac{1}{4}", "[0.25, 0.25]", "[0.5, 0.5]", "[1, 0]", "[-0.5, 1.5]", "nan", "inf", "1" * 25, "[[", "]]",
    "[0.5;0.5]", "0.5 0.5", "<answer>", "</answer>", "<answer>Paris</answer>", "<answer></answer>",
    "<ANSWER>", "< answer>", "Paris", "the", "<search>", "</search>", "<search>who?</search>",
    "<information>", "</information>", "<think>", "</think>", "and", "[1] > [2]", "[1]", "[2] > ", "[3]",
    "[8] > [7]", "> [4]", "[100000000000000000000]", "[0]", "[-1]", "[\u0661]", "[1] 80", "[2]: 100",
    "[3] = 0", "[4] 101", "[5] 0.5", "[6]\n7", "stop", "stop.\n", "\nSTOP\n", "<intent>", "</intent>",
    "<intent>red brick</intent>", "<query>", "</query>", "<query>bridge</query>", "brick", "/augment ",
    "/embed", "<tool_call>", "</tool_call>", '{"name": "search", "arguments": {"query_list": ["', '"]}}',
    '{"name": ', '"search"', '["a"]', '"\\ud800"', "null", "[" * 50, "{" * 50, "<tool_call>{}</tool_call>",
    "```json", "Doc 1: a", "Doc 2(Title: ", '"b") brick\n', "\nDoc 3: ", "Doc \u0661: ", "Document 1(",
    "1867",
    "\u00e9", "I", "\u212a",
)
WRAPPERS = (
    "{}", "{}", "{}", "\\boxed{{{}}}", "\\boxed{{{}}}", "<answer>{}</answer>", "ANSWER [{}]",
    "<intent>{}</intent>", "<query>{}</query>", "<tool_call>{}</tool_call>", "Doc 1: {}", "<think>{}",
    "[1] > {}", "<search>{}</search>",
)
# Operands and forms of the expressions in boxes.
ATOMS = (
    "0", "1", "2", "3", "7", "10", "0.5", "1,000", "a", "b", "n", "y", "\\pi", "e", "i", "\\infty", "\\theta",
    "Paris",
)
FORMS = (
    "{}+{}", "{}-{}", "{}{}", "{} \\cdot {}", "\\frac{{{}}}{{{}}}", "{}/{}", "{}^{{{}}}", "{}_{{{}}}",
    "{} = {}", "{} \\ne {}", "{} \\le {}", "({}, {})", "[{}, {})", "({}, {}]", "\\{{{}, {}\\}}",
    "\\sqrt[{}]{{{}}}", "-{}, {}", "\\left({}\\right){}", "{} \\text{{ or }} {}", "{} \\cup {}",
    "\\log_{{{}}} {}", "{}!{}", "{} \\pm {}", "{}\\% {}", "|{}|{}", "\\sin {} \\cos {}",
    "\\binom{{{}}}{{{}}}", "\\text{{{}}}{}", "{}^\\circ {}", "{} \\in {}", "{}:{}",
    "\\begin{{pmatrix}} {} & {} \\end{{pmatrix}}", "\\sum_{{n={}}}^{{{}}} n", "\\overline{{{}}}{}",
    "{} \\ldots {}",
)
# Each needs a nine, a "z" or an "x".
MATH_ANSWERS = (
    "\\pi^{\\pi}+\\frac{1}{7919}", "x^2+1", "\\frac{x}{7}", "\\sqrt{x}", "(x, 7)", "\\{1, x\\}", "[0, x)",
    "x \\le 3", "\\text{Zanzibar}", "x+7919", "\\begin{pmatrix} x & 1 \\end{pmatrix}", "2\\pi x",
    "1 \\text{ or } x", "x!",
)
# fmt: on
QUERIES, ADAPTIVE = QueryEnvironment(), QueryEnvironment(adaptive=True)
# No distribution is within the tolerance of these.
IMPOSSIBLE_TRUTHS = ([0.25, 0.25], [-0.5, 1.5], [0.9, 0.9, 0.9], [1.0, 1.0], [0.0, 0.0], [0.5])


def random_completion(random_numbers):
    pieces = random_numbers.choices(PIECES, k=random_numbers.randint(1, MAX_PIECES))
    return random_numbers.choice(WRAPPERS).format("".join(pieces))


def random_expression(random_numbers, depth):
    if depth == 0 or random_numbers.random() < 0.2:
        return random_numbers.choice(ATOMS)
    operands = (random_expression(random_numbers, depth - 1) for _ in range(2))
    return random_numbers.choice(FORMS).format(*operands)


def assistant(text, **record):
    return [{"role": "assistant", "content": text, **record}]


def scores_of_wrong_answers(text, i):
    """Yield (verifier, score); by construction, none of the scores may be 1."""
    yield "boxed, integer", boxed.correct(text, "7919", "integer")
    yield "boxed, math", boxed.correct(text, MATH_ANSWERS[i % len(MATH_ANSWERS)], "math")
    truth = IMPOSSIBLE_TRUTHS[i % len(IMPOSSIBLE_TRUTHS)]
    for options in ({}, {"which": "first"}, {"parser": "official"}, {"parser": "official", "which": "last"}):
        yield f"distribution {options}", distribution.distribution(text, truth, **options)
    for gold in ("Zanzibar", "1969"):
        yield "exact_match", qa.exact_match(text, [gold])
        yield "exact_match, triviaqa", qa.exact_match(text, [gold], rules="triviaqa")
        yield "f1", qa.f1(text, [gold])
        yield "cover_match", qa.cover_match(text, [gold])
        yield "search_r1", search.search_r1(assistant(text), text, [gold])
        yield "backed", search.backed(assistant(text), text, [gold]) or 0.0
    relevant_is_ninth = [0] * 8 + [1]
    yield "ndcg", reranking.ndcg(text, relevant_is_ninth, [1])
    yield "identified", identification.hit(text, ["Zanzibar", "9"])
    yield "whole_list", reranking.whole_list(text, relevant_is_ninth)
    yield "obeys", simulation.obeys(text, ["Zanzibar", "1969"], 1 + i % 3, True)
    for slate_scores in parse_scores(text, [4, 5]) or []:
        assert all(0 <= score <= 1 for score in slate_scores)
    yield "parse_scores", (parse_scores(text, [4, 5]) or [[0.0]])[-1][-1]
    description = parse_intent(text)
    if description is not None and i % 10 == 0:  # BM25 takes a millisecond
        irrelevant_score, relevant_score = bm25_scores(description, ["red brick bridge 7", "Zanzibar"])
        ranking = ["relevant", "other"] if relevant_score > irrelevant_score else ["other", "relevant"]
        turns = assistant(text, intent=description, ranking=ranking, terms=next(terms([description])))
        yield "own_words", intent.own_words(turns, ["relevant"], ["other", "relevant"], [text], ["brick"])


def check_formats(text):
    """Check that the parsers and format rewards accept any string, and what they return."""
    for score in (
        *(
            boxed.box_format(text),
            distribution.answer_format(text, [0.5, 0.5]),
            search.tag_format(assistant(text)),
        ),
        *(
            search.refusal(text, True),
            simulation.form(text, 1),
            distribution.total_variation(text, [0.5, 0.5]),
        ),
    ):
        assert 0 <= score <= 1
    assert isinstance(says_stop(text), bool)
    for queries in (QUERIES.parse_queries(text, "q"), ADAPTIVE.parse_queries(text, "q")):
        assert queries is None or (1 <= len(queries) <= 3 and all(query.strip() for query in queries))
    action = read_action(text)
    line = " ".join(encodable(text).split())
    assert action.kind != "search" or (len(action.queries) == 1 and action.queries[0] in line)
    call = read_call(text)
    assert call.kind != "search" or 1 <= len(call.queries) <= MAX_QUERIES
    assert all(query.strip() and query.encode() for query in call.queries)
    result = parse_documents(text, "useful", 3)
    assert (result.error is None) == (1 <= len(result.documents) <= 3)
    assert read_action(write_results([Document("1", text, text)], 100)).kind == "invalid"
    assert "</answer>" not in escape_stop_strings(text, ["</search>", "</answer>"])


def check_batch(seed):
    """Check the completions of a seed; one in five has an expression in its box."""
    random_numbers = random.Random(seed)
    for i in range(BATCH):
        if i % 5 == 0:
            text = f"\\boxed{{{random_expression(random_numbers, random_numbers.randint(1, 3))}}}"
        else:
            text = random_completion(random_numbers)
        try:
            wrong = [name for name, score in scores_of_wrong_answers(text, seed + i) if score >= 1]
            check_formats(text)
        except Exception as error:
            raise AssertionError(f"seed {seed}, completion {i}: {text!r}") from error
        assert not wrong, f"seed {seed}, completion {i}: {wrong} accept {text!r}"


def test_pieces_cannot_write_a_reference_answer():
    for piece in (*PIECES, *WRAPPERS, *ATOMS, *FORMS):
        assert not any(unicodedata.numeric(character, 0) == 9 for character in piece)
        text = unicodedata.normalize("NFKC", piece)
        for command in ("\\text", "\\boxed", "\\fbox", "pmatrix", "0x1F"):
            text = text.replace(command, "")
        assert not {"9", "z", "x"} & set(text.casefold()), piece


@pytest.mark.parametrize("seed", range(NUM_USUAL_BATCHES))
def test_verifiers_reject_hostile_completions(seed):
    check_batch(seed)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_verifiers_reject_a_million_hostile_completions():
    for seed in range(NUM_EXHAUSTIVE_BATCHES):
        check_batch(seed)
