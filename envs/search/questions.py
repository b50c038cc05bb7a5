"""Questions with answers from data sets: those that search agents are measured on, or any other.

By short name, alone or joined, as in `nq+hotpotqa`: the seven sets of Search-R1 and ZeroSearch, as FlashRAG
has them on the hub. By path: a file of rows, or a folder with a file for each split. By hub name:
`owner/name`, or `owner/name:config`. A row has a question and one or several answers.

The names of FlashRAG's configs and splits are those of its card on the hub; nothing was loaded from there.
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
COLUMNS = (*QUESTIONS, *ANSWERS, "answerable", "data_source")  # the rest may be whole articles
OTHER_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}
HELD_OUT = 0.1  # share of the training questions that become dev, or test, where a set has none
_LIST = re.compile(r"""\s*\[\s*["']""")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetQuestion:
    """One question of a data set.

    Attributes:
        id: a hash of question and answers.
        question: as it is written.
        answers: each can be told from other texts once it is normalised.
        source: the set, as the row says in `data_source` or as it was asked for.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    source: str


def read_questions(data: str, split: str) -> list[DatasetQuestion]:
    """The questions of a split, each once.

    Where a set has no test but a dev split, that is the test, as published results have it. What is then
    missing is taken from its train split by a hash of the question, a tenth each, and is not trained on.
    A row that nothing answers (`answerable` is false, or its answers are nothing once they are normalised)
    is left out, and said in the log.

    Raises:
        UserError: no such data, no such split in it, or a row that is not one.
    """
    found: dict[str, DatasetQuestion] = {}
    names = [data] if Path(data).expanduser().exists() else data.split("+")
    for name in map(str.strip, names):
        rows, part = _rows(name, split)
        for number, row in enumerate(rows, 1):
            where = f"{name}, row {number}"
            one = _read(row, where, name)
            if not part.low <= _place(one.question) < part.high:
                continue
            if one.answers:
                found.setdefault(one.id, one)
            else:  # "The The" is nothing once it is normalised: right could not be told from wrong
                _log.warning("left out: %s has no answer that can be compared", where)
    if not found:
        raise UserError(f"{data} has no questions in the split {split!r}")
    return list(found.values())


def ordered(questions: Iterable[DatasetQuestion], seed: int) -> list[DatasetQuestion]:
    """The questions in the order of a seed, which does not depend on the order of the rows."""
    return sorted(questions, key=lambda one: _digest(f"{seed} {one.id}"))


def _rows(name: str, split: str) -> tuple[Sequence[Mapping[str, Any]], Part]:
    """The rows that hold a split of one set, and which of them it is."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES}
        part = _part(name, list(files), split)
        return read_file(files[part.name], COLUMNS), part
    if path.suffix in SUFFIXES:
        return read_file(path, COLUMNS), _part(name, ["train"], split)
    hub, config = (HUB, name) if name in NAMES else _hub_name(name)
    part = _part(name, hub_splits(hub, config), split)
    return read_hub(hub, config, part.name, columns=COLUMNS), part


def _hub_name(name: str) -> tuple[str, str | None]:
    if "/" not in name:
        raise UserError(f"there is no data set or file {name!r}{nearest(name, NAMES)}")
    hub, _, config = name.partition(":")
    return hub, config or None


class Part(NamedTuple):
    """Where the rows of a split are: those of a set's own split whose place is between two shares."""

    name: str
    low: float = 0.0
    high: float = 1.0


def plan(parts: Sequence[str]) -> dict[str, Part]:
    """Which rows are train, dev and test, from the names of a set's own splits; some may be missing."""
    train, dev, test = (next((n for n in names if n in parts), None) for names in OTHER_NAMES.values())
    if test is None:
        test, dev = dev, None
    found = {key: Part(name) for key, name in (("dev", dev), ("test", test)) if name is not None}
    if train is not None:
        low = 0.0
        for key in [key for key in ("test", "dev") if key not in found]:
            found[key] = Part(train, low, low + HELD_OUT)
            low += HELD_OUT
        found["train"] = Part(train, low)
    return found


def _part(name: str, parts: Sequence[str], split: str) -> Part:
    found = plan(parts)
    if split not in found:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(found or parts) or 'none'}")
    return found[split]


def _place(question: str) -> float:
    """A number in [0, 1) that the question decides."""
    return int(_digest(normalize(question))[:8], 16) / 16**8


def _read(row: Mapping[str, Any], where: str, source: str) -> DatasetQuestion:
    question = _first(row, QUESTIONS)
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: no question in {', '.join(QUESTIONS)}")
    question = _clean(question)
    answers = [] if row.get("answerable") is False else _answers(_first(row, ANSWERS), where)
    good = tuple(dict.fromkeys(answer for answer in answers if _is_answer(answer)))
    # Of content: an id of a set's own would repeat between sets, and its rows be taken for one task.
    key = _digest(f"{question}\x1f{sorted(good)}")[:16]
    return DatasetQuestion(key, question, good, str(row.get("data_source") or source))


def _answers(cell: Any, where: str) -> list[str]:
    """One answer or a list of them, in CSV as JSON; only what has one spelling is taken for an answer."""
    if isinstance(cell, str) and _LIST.match(cell):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise UserError(f"{where}: the answers {cell[:60]!r} are not a list in JSON") from error
    answers = [one for one in (cell if isinstance(cell, list) else [cell]) if one is not None]
    if not answers:
        raise UserError(f"{where}: no answer in {', '.join(ANSWERS)}")
    for one in answers:
        if not isinstance(one, str | int) or isinstance(one, bool):  # 1912.0 would be compared as 19120
            raise UserError(f"{where}: the answer {str(one)[:60]} is no text: write it in quotes")
    return [_clean(str(one)) for one in answers]


def _clean(text: str) -> str:
    """Stripped, with a question mark for half a character, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode().strip()


def _is_answer(text: str) -> bool:
    try:
        check_answers([text])
    except ValueError:
        return False
    return True


def _first(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    return next((row[name] for name in columns if row.get(name) is not None), None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
