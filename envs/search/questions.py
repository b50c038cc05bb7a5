"""Load questions with answers from datasets: the benchmarks of search agents, or any other dataset.

A dataset is given in one of three ways. A row has a question and one or more answers.

- Short name: one of the seven datasets of Search-R1 and ZeroSearch, which FlashRAG hosts on the Hugging Face
  Hub. Several are joined with `+`, as in `nq+hotpotqa`.
- Path: a file, or a folder with the files of each split, as in a checkout from the Hub.
- Hub name: `owner/name` or `owner/name:config`.

The names of FlashRAG's configs and splits are from its dataset card; the dataset itself was not downloaded.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlkit.encoding import encodable
from rlkit.envs.search.layouts import COLUMNS, MissingColumnError, find_answers, find_question
from rlkit.errors import UserError, nearest
from rlkit.retrieval.reading import hub_splits, open_hub, read_file, read_hub
from rlkit.retrieval.tables import file_type, get_value, is_table, iterate_rows
from rlkit.rewards.qa import check_answers, normalize

HUB = "RUC-NLPIR/FlashRAG_datasets"
NAMES = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
HELD_OUT = 0.1  # fraction of the training questions that becomes dev, or test, if a dataset has no such split
# Name of a split in the name of a file: `train.jsonl.gz`, `hotpot_dev_fullwiki_v1.json`.
_SPLIT = re.compile(r"(?<![a-z])(train|dev|validation|valid|val|test)(?![a-z])", re.IGNORECASE)
# Number of a shard at the end of a file's stem: `train-00000-of-00002`, also with a hash, `train_1`.
_SHARD = re.compile(r"[-_.](\d+)(?:-of-(\d+))?(?:-[0-9a-f]{8,})?")
MAX_EXAMPLES = 5  # of skipped rows, in a message

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
        tables, portion = _load_tables(name, split)
        for table in tables:
            for question in _parse_table(table, name):
                if portion.low <= _hash_fraction(question.question) < portion.high:
                    questions.setdefault(question.id, question)
    if not questions:
        raise UserError(
            f"{data} has no questions in the split {split!r}: add some, or give a folder with one file "
            "per split"
        )
    return list(questions.values())


def shuffled(questions: Iterable[DatasetQuestion], seed: int) -> list[DatasetQuestion]:
    """Return the questions shuffled by the seed; the result does not depend on the order of the rows."""
    return sorted(questions, key=lambda question: _digest(f"{seed} {question.id}"))


class Table(NamedTuple):
    """The rows of a file, or of a split on the Hub, with the columns in which questions and answers are.

    Attributes:
        name: Path of the file, or name of the dataset on the Hub.
        rows: Rows of the table.
        hub_split: Config and split of a dataset on the Hub, or None.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    hub_split: tuple[str | None, str] | None = None

    def columns(self, number: int) -> list[str]:
        """Return all columns of a row, including those that were not loaded; the first row has number 1."""
        if self.hub_split is not None:
            return open_hub(self.name, *self.hub_split).column_names
        (row,) = islice(iterate_rows(Path(self.name)), number - 1, number)
        return list(row.values)


def _load_tables(name: str, split: str) -> tuple[list[Table], Portion]:
    """Return the tables of the stored split that provides `split`, and which portion of them to use."""
    path = Path(name).expanduser()
    if name and path.is_dir():
        files = _split_files(path)
        portion = _find_portion(name, list(files), split)
        return [Table(str(file), read_file(file, COLUMNS)) for file in files[portion.stored_split]], portion
    if is_table(path):
        return [Table(str(path), read_file(path, COLUMNS))], _find_portion(name, ["train"], split)
    hub, config = (HUB, name) if name in NAMES else _parse_hub_name(name)
    portion = _find_portion(name, hub_splits(hub, config), split)
    rows = read_hub(hub, config, portion.stored_split, columns=COLUMNS)
    return [Table(hub, rows, (config, portion.stored_split))], portion


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of each split in a folder, or in its subfolder `data`, as in a checkout from the Hub.

    Raises:
        UserError: A split has several files that are not shards, or a shard is missing.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    for parent in (folder, folder / "data"):
        if splits or not parent.is_dir():
            continue
        for path in sorted(parent.iterdir()):
            if path.is_file() and is_table(path) and (match := _SPLIT.search(path.name)):
                splits[match[1].lower()].append(path)
    for split, paths in splits.items():
        _check_shards(split, paths)
    return splits


def _check_shards(split: str, paths: Sequence[Path]) -> None:
    """Raise UserError if several files of a split are not the complete set of its shards."""
    names = set()
    for path in paths:
        stem = path.name[: path.name.lower().rindex(file_type(path))]
        shard = next((m for m in _SHARD.finditer(stem) if m.end() == len(stem)), None)
        names.add((stem[: shard.start()] if shard else path.name, file_type(path)))
        total = int(shard[2] or 0) if shard else 0
        if total and len(paths) < total:
            raise UserError(
                f"{path.parent} has {len(paths)} of {total} files of the split {split!r}: download the others"
            )
    if len(names) > 1:
        raise UserError(
            f"{paths[0].parent} has several files of the split {split!r}, such as {paths[0].name} and "
            f"{paths[-1].name}: remove all but one"
        )


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


def _parse_table(table: Table, source: str) -> list[DatasetQuestion]:
    """Return the questions of a table that have a comparable answer; warn about the others.

    Raises:
        UserError: A row is invalid.
    """
    questions: list[DatasetQuestion] = []
    skipped: list[int] = []
    has_bar = False
    for number, row in enumerate(table.rows, 1):
        location = f"{table.name}, row {number}"
        try:
            question = _parse_row(row, location, source)
        except MissingColumnError as error:
            names = ", ".join(repr(str(name)[:40]) for name in table.columns(number)[:30])
            raise UserError(f"{error}; it has the columns {names or 'none'}") from None
        if not question.answers:  # e.g. "The The", which normalizes to nothing
            skipped.append(number)
            continue
        if len(question.answers) == 1 and "|" in question.answers[0] and not has_bar:
            has_bar = True
            _log.warning(
                "%s: %r is one answer; to accept several, write them as a JSON list: %s",
                location,
                question.answers[0][:60],
                '["Rome", "Roma"]',
            )
        questions.append(question)
    if skipped:
        examples = ", ".join(map(str, skipped[:MAX_EXAMPLES]))
        if len(skipped) > MAX_EXAMPLES:
            examples += ", ..."
        _log.warning(
            "skipped %d of %d rows of %s, which have no answer that can be compared: row %s",
            len(skipped),
            len(table.rows),
            table.name,
            examples,
        )
    return questions


def _parse_row(row: Mapping[str, Any], location: str, source: str) -> DatasetQuestion:
    question = _clean(find_question(row, location))
    answers = map(_clean, find_answers(row, location))
    comparable = tuple(dict.fromkeys(answer for answer in answers if _is_comparable(answer)))
    # The id is a hash of the content: ids in the rows repeat between datasets, and rows with equal ids would
    # be grouped as one task.
    question_id = _digest(f"{question}\x1f{sorted(comparable)}")[:16]
    source = _clean(str(get_value(row, ("data_source",)) or source))
    return DatasetQuestion(question_id, question, comparable, source)


def _clean(text: str) -> str:
    """Strip, and replace lone surrogates, which tokenizers reject, by "?"."""
    return encodable(text).strip()


def _is_comparable(text: str) -> bool:
    """Return whether an answer is not empty after normalization."""
    try:
        check_answers([text])
    except ValueError:
        return False
    return True


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
