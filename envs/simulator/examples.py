"""Results of a real search engine, the training examples of a simulator, from a file or a generated world.

An example has `question`, `answers`, `query`, `documents` (as one string, in the form that a policy sees) and
`label`, "useful" or "noisy". scripts/build_simulator_data.py writes such rows from the rollouts of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlkit.envs.search import protocol
from rlkit.errors import UserError
from rlkit.retrieval.collections.world import Question
from rlkit.retrieval.documents import Query, SearchEngine
from rlkit.rewards.qa import check_answers

LABELS = ("useful", "noisy")
COLUMNS = ("question", "answers", "query", "documents", "label")
MAX_DOCUMENT_WORDS = 100  # a longer document is truncated


@dataclass(frozen=True)
class Example:
    """Documents that a real search engine returned for one query."""

    question: str
    answers: list[str]
    query: str
    documents: str
    label: str

    def as_row(self) -> dict[str, Any]:
        """Return the example as a row of the JSONL file."""
        return asdict(self)


def read_examples(path: Path) -> list[Example]:
    """Read the examples of a JSONL file.

    Raises:
        UserError: The file cannot be read, or a row is invalid; the message has its line number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    examples = [_parse_row(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise UserError(f"{path} has no rows")
    return examples


def _parse_row(line: str, location: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location}: not valid JSON: {error}") from error
    missing = [name for name in COLUMNS if not isinstance(row, Mapping) or not row.get(name)]
    if missing:
        raise UserError(f"{location}: missing or empty: {', '.join(missing)}")
    if row["label"] not in LABELS:
        raise UserError(f"{location}: label must be one of {', '.join(LABELS)}, not {row['label']!r}")
    try:
        check_answers(row["answers"])
    except ValueError as error:
        raise UserError(f"{location}: {error}") from error
    return Example(**{name: row[name] for name in COLUMNS})


def world_example(question: Question, engine: SearchEngine, i: int, k: int) -> Example:
    """Search for one step of a question about a generated world and return the result as example i.

    Even examples are useful: the supporting passage comes first. Odd examples are noisy and lack it.

    Args:
        question: Question about the world; i // 2 selects its step in turn.
        engine: Search engine over the passages of the world.
        i: Index of the example in its split.
        k: Maximum number of documents.
    """
    step = question.steps[i // 2 % len(question.steps)]
    hits = engine.search([Query(step.query)], k + 1)[0].documents  # one more than k: noisy examples drop one
    label = LABELS[i % 2]
    supporting = tuple(document for document in hits if document.id == step.supporting)
    distractors = tuple(document for document in hits if document.id != step.supporting)
    documents = (supporting + distractors)[:k] if label == "useful" else distractors[:k]
    # As in rollouts, whose messages have the documents between tags.
    text = protocol.write_results(documents, MAX_DOCUMENT_WORDS)
    return Example(question.text, list(question.answers), step.query, protocol.results_text(text), label)
