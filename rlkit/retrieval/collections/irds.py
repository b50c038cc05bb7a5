"""Collections of ir-datasets (https://ir-datasets.com), which are downloaded on first use."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.errors import UserError, first_line, nearest
from rlkit.retrieval.collections.base import (
    Collection,
    Qrels,
    canonical_split,
    check_judgments,
    drops_query_id,
)
from rlkit.retrieval.collections.corpus import file_source
from rlkit.retrieval.documents import Document

if TYPE_CHECKING:
    from types import ModuleType

    import ir_datasets

SPLITS = ("train", "training", "dev", "validation", "valid", "val", "test")
# Kinds of measures with a relevance level, by the names that ir_measures has for them.
KINDS = {
    "rr": "rr",
    "mrr": "rr",
    "ap": "ap",
    "map": "ap",
    "r": "recall",
    "recall": "recall",
    "setr": "recall",
    "p": "precision",
    "precision": "precision",
    "setp": "precision",
    "rprec": "precision",
    "success": "hit",
    "hit": "hit",
    "hits": "hit",
}
ALL_KINDS = ("rr", "ap", "recall", "precision", "hit")
_MEASURE = re.compile(r"(\w+)(?:\(([^)]*)\))?(?:@\d+)?")
_LEVEL = re.compile(r"\brel\s*=\s*(\d+)")
# Reading a corpus takes about 10 seconds per million documents. ir-datasets verifies its downloads.
MAX_CHECKED_DOCUMENTS = 1_000_000
BRIGHT_EXCLUDED = -100  # grade with which ir-datasets marks BRIGHT's excluded documents


def load_irds(name: str) -> Collection:
    """Load a dataset of ir-datasets with all of its splits ("beir/scifact"), or one split of it as "test".

    A document that is judged several times for a query, e.g. for each subtopic, has the highest grade.
    Measures other than nDCG have the minimum grades of the dataset's official measures.

    Raises:
        UserError: ir-datasets is not installed, the dataset is unknown or cannot be downloaded, or it has no
            documents or judgments.
    """
    try:
        import ir_datasets
    except ImportError:
        raise UserError("ir-datasets is not installed: pip install ir-datasets") from None
    try:
        dataset = ir_datasets.load(name)
    except KeyError:
        raise UserError(
            f"ir-datasets has no dataset {name!r}{nearest(name, ir_datasets.registry)}; see "
            "https://ir-datasets.com"
        ) from None
    splits = _judged_splits(ir_datasets, name)
    if not splits and dataset.has_qrels():
        splits = {"test": dataset}
    if not splits or not dataset.has_docs():
        raise UserError(
            f"{name!r} of ir-datasets has no documents or no judged queries; name one of its subsets"
            f"{_list_subsets(ir_datasets, name)}"
        )
    queries: dict[str, str] = {}
    qrels: dict[str, Qrels] = {}
    notes: list[str] = []
    try:
        for split, subset in splits.items():
            queries |= {query.query_id: _query_text(query) for query in subset.queries_iter()}
            qrels[split], split_notes = _read_qrels(subset)
            notes += split_notes
        count = _num_documents(dataset)
        is_checked = count is None or count <= MAX_CHECKED_DOCUMENTS
        ids = (document.doc_id for document in dataset.docs_iter()) if is_checked else None
        qrels, missing = check_judgments(name, qrels, queries, ids)
    except (OSError, RuntimeError, ImportError) as error:  # the network, a missing license, a missing parser
        raise UserError(
            f"ir-datasets cannot load {name!r}: {first_line(error)}. Check the network connection; "
            "https://ir-datasets.com says which files of a dataset have to be downloaded by hand"
        ) from error
    excluded = _exclude_documents(qrels) if name.startswith("bright/") else {}
    evaluated = next(splits[split] for split in ("test", "dev", "train") if split in splits)
    grades = [grade for judged in qrels.values() for grades in judged.values() for grade in grades.values()]
    min_grades, level_notes = find_min_grades(official_measures(evaluated), max(grades, default=0))
    return Collection(
        name,
        lambda: _documents(dataset),
        queries,
        qrels,
        excluded,
        drop_query_id=drops_query_id(name),
        min_grades=min_grades,
        source=["ir_datasets", name, *_file_state(dataset, count)],
        notes=[*notes, *missing, *level_notes],
    )


def official_measures(dataset: ir_datasets.Dataset) -> list[str]:
    """Return the official measures in the documentation of a dataset, e.g. "RR(rel=2)", or an empty list."""
    documentation = dataset.documentation() if hasattr(dataset, "documentation") else None
    return list((documentation or {}).get("official_measures") or ())


def find_min_grades(measures: Sequence[str], max_grade: int) -> tuple[dict[str, int], list[str]]:
    """Return the minimum relevant grade of each kind of measure that has one above 1, and notes.

    A kind that is not among the official measures has the level that all of them agree on, or else 1.

    Args:
        measures: Names of the official measures, in the form of ir_measures.
        max_grade: Highest grade. If it is 1, there is nothing to say about missing official measures.
    """
    levels: dict[str, set[int]] = defaultdict(set)
    for measure in measures:
        match = _MEASURE.fullmatch(measure.replace(" ", ""))
        kind = KINDS.get(match[1].lower()) if match else None
        if match and kind:
            level = _LEVEL.search(match[2] or "")
            levels[kind].add(int(level[1]) if level else 1)
    if not levels and max_grade <= 1:
        return {}, []
    if not levels:
        return {}, [
            "ir-datasets names no official measure with a relevance level: grades of 1 and more count as "
            "relevant in measures other than nDCG; rr(rel=2)@10, for example, sets another level"
        ]
    official = {level for values in levels.values() for level in values}
    common = min(official) if len(official) == 1 else 1
    min_grades = {kind: min(levels[kind]) if kind in levels else common for kind in ALL_KINDS}
    if set(min_grades.values()) == {1} and len(official) == 1:
        return {}, []
    values = ", ".join(f"{kind} {grade}" for kind, grade in min_grades.items())
    notes = [f"the minimum relevant grades are {values}: the official measures are {', '.join(measures)}"]
    return {kind: grade for kind, grade in min_grades.items() if grade != 1}, notes


def _judged_splits(package: ModuleType, name: str) -> dict[str, ir_datasets.Dataset]:
    """Return the subsets of a dataset that are named after a split and have judgments."""
    splits: dict[str, ir_datasets.Dataset] = {}
    for split in SPLITS:
        try:
            subset = package.load(f"{name}/{split}")
        # The registry raises KeyError for a split that a dataset does not have.
        except KeyError:
            continue
        if subset.has_qrels():
            splits.setdefault(canonical_split(split), subset)
    return splits


def _list_subsets(package: ModuleType, name: str) -> str:
    names = [other for other in package.registry if other.startswith(f"{name}/")]
    judged = [other for other in names if package.load(other).has_qrels()]
    return f": {', '.join(judged[:10])}{', ...' if len(judged) > 10 else ''}" if judged else ""


def _read_qrels(dataset: ir_datasets.Dataset) -> tuple[Qrels, list[str]]:
    qrels: Qrels = {}
    repeated: set[tuple[str, str]] = set()
    for judgment in dataset.qrels_iter():
        query, document, grade = judgment.query_id, judgment.doc_id, int(judgment.relevance)
        grades = qrels.setdefault(query, {})
        if grades.setdefault(document, grade) != grade:
            repeated.add((query, document))
            grades[document] = max(grades[document], grade)
    if not repeated:
        return qrels, []
    query, document = min(repeated)
    return qrels, [
        f"{len(repeated)} documents are judged several times for a query with different grades, for example "
        f"{document!r} for {query!r}; the highest grade is used"
    ]


def _exclude_documents(qrels: Mapping[str, Qrels]) -> dict[str, frozenset[str]]:
    """Remove BRIGHT's excluded documents from the judgments, and return them by query."""
    excluded = {}
    for judged in qrels.values():
        for query, grades in judged.items():
            names = frozenset(name for name, grade in grades.items() if grade == BRIGHT_EXCLUDED)
            excluded[query] = names
            for name in names:
                del grades[name]
    return excluded


def _num_documents(dataset: ir_datasets.Dataset) -> int | None:
    """Return the number of documents in the metadata of ir-datasets, or None for a dataset of the user's."""
    return dataset.docs_metadata().get("count") if hasattr(dataset, "docs_metadata") else None


def _file_state(dataset: ir_datasets.Dataset, count: int | None) -> list[Any]:
    """Return what shows that the documents have changed.

    ir-datasets verifies the hashes of its downloads, so their number is enough. Without metadata, the dataset
    is the user's, and its file may change.
    """
    if count is not None or not hasattr(dataset, "docs_path"):
        return [count]
    path = Path(dataset.docs_path())
    return file_source(path) if path.is_file() else [str(path)]


def _documents(dataset: ir_datasets.Dataset) -> Iterator[Document]:
    for document in dataset.docs_iter():
        text = getattr(document, "text", None)
        if text is None:
            # Fields differ between datasets. `default_text` joins those to search, with the title.
            yield Document(document.doc_id, "", document.default_text())
        else:
            yield Document(document.doc_id, getattr(document, "title", "") or "", text)


def _query_text(query: Any) -> str:
    return getattr(query, "text", None) or query.default_text()
