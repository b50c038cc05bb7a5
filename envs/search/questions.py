"""Load questions with answers from datasets: the benchmarks of search agents, or any other dataset.

A dataset is given in one of three ways. A row has a question and one or more answers.

- Short name: one of the seven datasets of Search-R1 and ZeroSearch, which FlashRAG hosts on the Hugging Face
  Hub. Several are joined with `+`, as in `nq+hotpotqa`.
- Path: a file, or a folder with one file per split.
- Hub name: `owner/name` or `owner/name:config`.

The names of FlashRAG's configs and splits are from its dataset card; the dataset itself was not downloaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlkit.errors import UserError, nearest
from rlkit.retrieval.reading import SUFFIXES, hub_splits, read_file, read_hub
from rlkit.rewards.qa import check_answers, normalize

HUB = "RUC-NLPIR/FlashRAG_datasets"
NAMES = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
QUESTIONS = ("question", "query", "problem")
ANSWERS = ("answers", "golden_answers", "answer", "target")
# Other columns are not loaded: they may contain entire articles.
COLUMNS = (*QUESTIONS, *ANSWERS, "answerable", "data_source")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}
HELD_OUT = 0.1  # fraction of the training questions that becomes dev, or test, if a dataset has no such split
# A list of strings. An answer such as "[1912]" is not parsed, because the brackets may be part of it.
_JSON_LIST = re.compile(r"""\s*\[\s*["']""")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetQuestion:
    """A question of a dataset.

    Attributes:
        id: Hash of question and answers.
        question: Text of the question.
        answers: Accepted answers, none of which is empty after normalization; () if no answer is comparable.
        source: Name of the dataset: the row's `data_source`, or else the name that it was requested by.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    source: str


def read_questions(data: str, split: str) -> list[DatasetQuestion]:
    """Return the questions of a split without duplicates.

    If a dataset has a dev but no test split, dev is used as test, as in published results. Splits that are
    then missing are held out from train by a hash of the question, a fraction `HELD_OUT` each. Rows without a
    comparable answer (`answerable` is false, or all answers are empty after normalization) are skipped with a
    warning.

    Args:
        data: Dataset, as in the module's docstring.
        split: "train", "dev" or "test".

    Raises:
        UserError: The dataset does not exist or lacks the split, or a row is invalid.
    """
    questions: dict[str, DatasetQuestion] = {}
    names = [data] if Path(data).expanduser().exists() else data.split("+")
    for name in map(str.strip, names):
        rows, portion = _load_rows(name, split)
        for number, row in enumerate(rows, 1):
            location = f"{name}, row {number}"
            question = _parse_row(row, location, name)
            if not portion.low <= _hash_fraction(question.question) < portion.high:
                continue
            if question.answers:
                questions.setdefault(question.id, question)
            else:  # e.g. "The The", which normalizes to nothing: no prediction could be compared with it
                _log.warning("skipped: %s has no answer that can be compared", location)
    if not questions:
        raise UserError(f"{data} has no questions in the split {split!r}")
    return list(questions.values())


def shuffled(questions: Iterable[DatasetQuestion], seed: int) -> list[DatasetQuestion]:
    """Return the questions shuffled by the seed; the result does not depend on the order of the rows."""
    return sorted(questions, key=lambda question: _digest(f"{seed} {question.id}"))


def _load_rows(name: str, split: str) -> tuple[Sequence[Mapping[str, Any]], Portion]:
    """Return the rows of the stored split that provides `split`, and which portion of them to use."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES}
        portion = _find_portion(name, list(files), split)
        return read_file(files[portion.stored_split], COLUMNS), portion
    if path.suffix in SUFFIXES:
        return read_file(path, COLUMNS), _find_portion(name, ["train"], split)
    hub, config = (HUB, name) if name in NAMES else _parse_hub_name(name)
    portion = _find_portion(name, hub_splits(hub, config), split)
    return read_hub(hub, config, portion.stored_split, columns=COLUMNS), portion


def _parse_hub_name(name: str) -> tuple[str, str | None]:
    if "/" not in name:
        raise UserError(f"there is no dataset or file {name!r}{nearest(name, NAMES)}")
    hub, _, config = name.partition(":")
    return hub, config or None


class Portion(NamedTuple):
    """Portion of a stored split: the rows whose hash fraction is in [low, high)."""

    stored_split: str
    low: float = 0.0
    high: float = 1.0


def assign_splits(stored_splits: Sequence[str]) -> dict[str, Portion]:
    """Return the portion for each of train, dev and test that a dataset with these stored splits provides."""
    train, dev, test = (
        next((name for name in names if name in stored_splits), None) for names in SPLIT_NAMES.values()
    )
    if test is None:
        test, dev = dev, None
    portions = {}
    if dev is not None:
        portions["dev"] = Portion(dev)
    if test is not None:
        portions["test"] = Portion(test)
    if train is not None:
        low = 0.0
        for split in ("test", "dev"):
            if split not in portions:
                portions[split] = Portion(train, low, low + HELD_OUT)
                low += HELD_OUT
        portions["train"] = Portion(train, low)
    return portions


def _find_portion(name: str, stored_splits: Sequence[str], split: str) -> Portion:
    portions = assign_splits(stored_splits)
    if split not in portions:
        available = ", ".join(portions or stored_splits) or "none"
        raise UserError(f"{name} has no split {split!r}; it has {available}")
    return portions[split]


def _hash_fraction(question: str) -> float:
    """Return a number in [0, 1) that depends on the normalized question alone."""
    # Normalized, so that two spellings of a question cannot be in different splits.
    return int(_digest(normalize(question))[:8], 16) / 16**8


def _parse_row(row: Mapping[str, Any], location: str, source: str) -> DatasetQuestion:
    question = _first_value(row, QUESTIONS)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{location}: the row needs a question in one of the columns {', '.join(QUESTIONS)}")
    question = _clean(question)
    answers: list[str] = []
    if row.get("answerable") is not False:
        answers = _parse_answers(_first_value(row, ANSWERS), location)
    comparable = tuple(dict.fromkeys(answer for answer in answers if _is_comparable(answer)))
    # The id is a hash of the content: ids in the rows repeat between datasets, and rows with equal ids would
    # be grouped as one task.
    question_id = _digest(f"{question}\x1f{sorted(comparable)}")[:16]
    return DatasetQuestion(question_id, question, comparable, str(row.get("data_source") or source))


def _parse_answers(cell: Any, location: str) -> list[str]:
    """Return the answers in a cell: one answer or a list, which CSV files encode as JSON."""
    if isinstance(cell, str) and _JSON_LIST.match(cell):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise UserError(f"{location}: the answers {cell[:60]!r} are not a JSON list") from error
    cells = cell if isinstance(cell, list) else [cell]
    answers = [answer for answer in cells if answer is not None]
    if not answers:
        raise UserError(f"{location}: the row needs an answer in one of the columns {', '.join(ANSWERS)}")
    for answer in answers:
        # A float has several spellings: 1912.0 would be normalized to 19120.
        if not isinstance(answer, str | int) or isinstance(answer, bool):
            raise UserError(f"{location}: the answer {str(answer)[:60]} is not a string: put it in quotes")
    return [_clean(str(answer)) for answer in answers]


def _clean(text: str) -> str:
    """Strip, and replace lone surrogates, which tokenizers reject, by "?"."""
    return text.encode("utf-8", "replace").decode().strip()


def _is_comparable(text: str) -> bool:
    """Return whether an answer is not empty after normalization."""
    try:
        check_answers([text])
    except ValueError:
        return False
    return True


def _first_value(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[name] for name in columns if row.get(name) is not None), None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
