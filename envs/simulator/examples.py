"""What a real engine answered, from which a simulator learns: rows of a file, or of the generated world.

A row has `question`, `answers`, `query`, `documents` (their text as a policy sees it) and `label`, "useful"
or "noisy"; scripts/build_simulator_data.py writes such rows from the rollouts of a run.
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
WORDS = 100  # a longer document is cut


@dataclass(frozen=True)
class Example:
    """One answer of a real engine."""

    question: str
    answers: list[str]
    query: str
    documents: str
    label: str

    def as_row(self) -> dict[str, Any]:
        """A row of a file."""
        return asdict(self)


def read_examples(path: Path) -> list[Example]:
    """The rows of a JSONL file.

    Raises:
        UserError: no file, or a row that is not one, with its line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    examples = [_read(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise UserError(f"{path} has no rows")
    return examples


def _read(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: no JSON: {error}") from error
    missing = [name for name in COLUMNS if not isinstance(row, Mapping) or not row.get(name)]
    if missing:
        raise UserError(f"{where}: no {', '.join(missing)}")
    if row["label"] not in LABELS:
        raise UserError(f"{where}: the label is {row['label']!r}, not one of {', '.join(LABELS)}")
    try:
        check_answers(row["answers"])
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return Example(**{name: row[name] for name in COLUMNS})


def world_example(asked: Question, engine: SearchEngine, i: int, k: int) -> Example:
    """Example i, a search for a question about a world: with the passage that it needs, or without."""
    step = asked.steps[i // 2 % len(asked.steps)]
    found = engine.search([Query(step.query)], k + 1)[0].documents
    label = LABELS[i % 2]
    needed = tuple(document for document in found if document.id == step.supporting)
    others = tuple(document for document in found if document.id != step.supporting)
    shown = (needed + others)[:k] if label == "useful" else others[:k]
    text = protocol.write_results(shown, WORDS)
    return Example(asked.text, list(asked.answers), step.query, protocol.results_text(text), label)
