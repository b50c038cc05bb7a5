"""Question and accepted answers of a row, in the layouts of public question-answering datasets.

Column names are compared without regard to case and underscores. All answers of a row are accepted, wherever
they are: `answers`, `answer_aliases`, `reward_model`. docs/environments/search.md has a table of the layouts.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

from rlkit.errors import UserError, one_line
from rlkit.retrieval.tables import canonical, get_value

QUESTIONS = ("question", "query", "problem")
# The first one has the main answer.
ANSWERS = (
    "answer",
    "answers",
    "golden_answers",
    "target",
    "ground_truth",
    "obj",  # PopQA, whose other answers are in the next two columns
    "possible_answers",
    "o_aliases",
    "answer_aliases",  # MuSiQue
    *("aliases", "normalized_aliases", "answer_alias", "answers_aliases", "alias"),
    *("short_answers", "gold_answers", "correct_answers", "ground_truths"),
)
# Other columns are not loaded: they may contain entire articles.
COLUMNS = (
    *QUESTIONS,
    *ANSWERS,
    *("prompt", "extra_info", "reward_model", "reward_spec"),  # verl, SkyRL
    "annotations",  # Natural Questions
    *("answerable", "is_impossible", "data_source"),
)
# Keys of an answer that is an object: TriviaQA's, SQuAD's, and those of verl's ground truth.
ANSWER_KEYS = ("value", "text", "target", "ground_truth", "aliases", "normalized_value", "normalized_aliases")
# A list of strings, or an empty one, also as NumPy represents it. An answer such as "[1912]" is not parsed,
# because the brackets may be part of it.
_LIST = re.compile(r"""\s*(?:array\()?\[\s*(?:["']|\]\s*$)""")
_OBJECT = re.compile(r"""\s*\{\s*["']""")
_CHAT = re.compile(r"""\s*\[\s*\{\s*["']""")
_MAX_DEPTH = 5  # of lists and objects in an answer
_NO_ANSWER = "<unk>"  # TriviaQA's test split has it as the value of its answers


class MissingColumnError(UserError):
    """A row has no column with a question, or none with an answer."""


def find_question(row: Mapping[str, Any], location: str) -> str:
    """Return the question of a row.

    It is in a column of its own, in verl's `extra_info`, or in the last user message of `prompt`.

    Raises:
        UserError: The row has no question.
    """
    question = get_value(row, QUESTIONS)
    parsed = _parse_object(question)
    if isinstance(parsed, Mapping):  # Natural Questions
        question = get_value(parsed, ("text",))
    if question is None:
        extra_info = _parse_object(get_value(row, ("extra_info",)))
        question = get_value(extra_info, ("question",)) if isinstance(extra_info, Mapping) else None
    if question is None:
        prompt = _parse_object(get_value(row, ("prompt",)))
        if isinstance(prompt, str) and _CHAT.match(prompt):
            # Its last line would be taken for a question, with quotes and brackets.
            raise UserError(
                f"{location}: the prompt {prompt[:60]!r} is not a list of messages in JSON or Python"
            )
        question = _question_of_prompt(prompt)
    if not isinstance(question, str) or not question.strip():
        raise MissingColumnError(
            f"{location}: the row needs a question in one of the columns {', '.join(QUESTIONS)}, or a user "
            "message in prompt"
        )
    return question


def _question_of_prompt(prompt: Any) -> str | None:
    """Return the question in a chat or in a string; in Search-R1's prompt, it follows "Question:"."""
    if isinstance(prompt, list):
        messages = [message for message in prompt if isinstance(message, Mapping)]
        prompt = next((m.get("content") for m in reversed(messages) if m.get("role") == "user"), None)
    if not isinstance(prompt, str):
        return None
    last_line = prompt.strip().rpartition("\n")[2]
    _, marker, question = last_line.rpartition("Question:")
    return question if marker else prompt


def find_answers(row: Mapping[str, Any], location: str) -> list[str]:
    """Return the accepted answers of a row, the main one first; [] if the row is marked as unanswerable.

    SQuAD 2, Natural Questions and TriviaQA's test split mark it with an object that contains no answer.

    Raises:
        UserError: The row has no answer, or an answer is not a string.
    """
    if _is_false(get_value(row, ("answerable",))) or _is_true(get_value(row, ("is_impossible",))):
        return []
    cells = [_parse_list(get_value(row, (name,)), location) for name in ANSWERS]
    reward_model = _parse_object(get_value(row, ("reward_model", "reward_spec")))
    if isinstance(reward_model, Mapping):
        cells.append(_parse_list(get_value(reward_model, ("ground_truth",)), location))
    annotations = _parse_object(get_value(row, ("annotations",)))
    answers = [answer for cell in cells for answer in _flatten(cell, location)]
    answers += _annotated_answers(annotations)
    is_marked = isinstance(annotations, Mapping | list) or any(isinstance(cell, Mapping) for cell in cells)
    if not answers and not is_marked:
        raise MissingColumnError(
            f"{location}: the row needs an answer in one of the columns {', '.join(ANSWERS)}, or in "
            "reward_model.ground_truth"
        )
    return list(dict.fromkeys(answers))


def _parse_list(cell: Any, location: str) -> Any:
    """Return the list or the object in a cell that is a string, as in CSV files; other cells unchanged."""
    if not isinstance(cell, str):
        return cell
    if _OBJECT.match(cell):
        parsed = _parse_object(cell)
        if not isinstance(parsed, Mapping):
            raise UserError(f"{location}: the answers {cell[:60]!r} are not an object in JSON or Python")
        return parsed
    if not _LIST.match(cell):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    problem = f"{location}: the answers {cell[:60]!r} are not a list in JSON or Python"
    try:
        parsed = ast.literal_eval(cell.strip())
        tokens = list(tokenize.generate_tokens(io.StringIO(cell.strip()).readline))
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        raise UserError(f'{problem}: write them as ["Rome", "Roma"]') from None
    # NumPy prints ['Rome' 'Roma'], which Python reads as ['RomeRoma'].
    if sum(token.type == tokenize.STRING for token in tokens) != len(parsed):
        raise UserError(f'{problem}, but an array printed by NumPy: write them as ["Rome", "Roma"]')
    return parsed


def _parse_object(cell: Any) -> Any:
    """Return the JSON object or list of objects in a cell that is a string; other cells unchanged."""
    if not isinstance(cell, str) or not re.match(r"\s*(\{|\[\s*\{)", cell):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return cell


def _flatten(cell: Any, location: str, depth: int = 0) -> Iterator[str]:
    """Yield the answers in a cell: a string, an integer, an object such as SQuAD's, or a list of these."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{location}: the answers are nested too deeply: write a list of strings")
    if isinstance(cell, list):
        for item in cell:
            yield from _flatten(item, location, depth + 1)
    elif isinstance(cell, Mapping):
        if {*map(canonical, cell)}.isdisjoint(map(canonical, ANSWER_KEYS)):
            keys = ", ".join(repr(str(key)[:40]) for key in list(cell)[:20])
            raise UserError(
                f"{location}: the answer is an object with the keys {keys or 'none'}, but none of "
                f"{', '.join(ANSWER_KEYS)}"
            )
        for key in ANSWER_KEYS:
            value = get_value(cell, (key,))
            if value != _NO_ANSWER:
                yield from _flatten(_parse_list(value, location), location, depth + 1)
    elif isinstance(cell, str | int) and not isinstance(cell, bool):
        yield str(cell)
    elif isinstance(cell, float) and isnan(cell):  # pandas writes NaN for a missing value
        return
    elif cell is not None:
        # A float has several spellings: 1912.0 would be normalized to 19120.
        remedy = (
            "write it as a string, in quotes" if isinstance(cell, float | bool) else "write it as a string"
        )
        raise UserError(f"{location}: the answer {one_line(str(cell)[:60])} is not a string: {remedy}")


def _annotated_answers(annotations: Any) -> list[str]:
    """Return the short answers, or "yes" or "no", of the annotators of Natural Questions.

    The annotations are a list with one object per annotator, or, on the Hub, an object of lists.
    """
    annotators: Sequence[Any] = annotations if isinstance(annotations, list) else [annotations]
    answers: list[str] = []
    for annotator in annotators:
        if not isinstance(annotator, Mapping):
            continue
        short = get_value(annotator, ("short_answers",))
        for short_answer in short if isinstance(short, list) else [short]:
            text = get_value(short_answer, ("text",)) if isinstance(short_answer, Mapping) else None
            answers += [
                value for value in (text if isinstance(text, list) else [text]) if isinstance(value, str)
            ]
        verdicts = get_value(annotator, ("yes_no_answer",))
        for verdict in verdicts if isinstance(verdicts, list) else [verdicts]:
            # The Hub stores the index of the class: 0 is no, 1 is yes, -1 is none.
            if verdict in (0, 1) and not isinstance(verdict, bool):
                answers.append("yes" if verdict else "no")
            elif isinstance(verdict, str) and verdict.lower() in ("yes", "no"):
                answers.append(verdict.lower())
    return answers


def _is_false(value: Any) -> bool:
    return value is False or value == 0 or (isinstance(value, str) and value.lower() in ("false", "no", "0"))


def _is_true(value: Any) -> bool:
    return value is True or value == 1 or (isinstance(value, str) and value.lower() in ("true", "yes", "1"))
