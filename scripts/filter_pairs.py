"""Filter training rows for a retriever, for example queries that a model wrote for documents.

    python scripts/filter_pairs.py data/scifact written.jsonl --round_trip dense:MODEL --top 10 -o rows.jsonl
    python scripts/filter_pairs.py data/scifact lists.jsonl --teacher_first --min_percentile 25 -o rows.jsonl

Rows that repeat the query and the document of an earlier one are always dropped. The filters run in the order
of the options in `--help`: first those that compare rows with each other, last the round trip, which is the
most expensive. `rlkit/envs/ranking/pairs/filters.py` has their definitions. For each filter, the script
prints the number of rows before and after it, and at the end how much the queries copy from their documents.

The retriever of `--round_trip` must not be trained to convergence on the same rows, since it would find all
that it has memorized. BM25 favors queries with copied words. Examples in the prompt of the model that wrote
the queries pass any filter: leave their documents out when the rows are written.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from statistics import fmean

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.filters import (
    check_collection,
    copied_share,
    is_teacher_first,
    reaches_percentile,
    source_ranks,
    without_ambiguous_queries,
    without_duplicates,
)
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, query_key, read_rows, write_rows
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.queries import open_collection
from rlkit.retrieval.retrievers import open_retriever
from rlkit.words import words

Filter = Callable[[Sequence[PairRow]], list[PairRow]]


def main() -> int:
    """Write the rows that pass all filters to a file and print how many each filter drops."""
    options = build_parser().parse_args(sys.argv[1:])
    check_options(options)
    collection = open_collection(options.collection, None, 0)
    rows = read_rows(options.pairs)
    if rows[0].passages_are_queries:
        raise UserError(f"{options.pairs} has sets of words as passages (PROP), which no filter applies to")
    check_collection(rows, collection)
    for name, select in filters(options, collection).items():
        selected = select(rows)
        share = len(selected) / len(rows)
        print(f"{name}: {len(rows):,} -> {len(selected):,} rows, {share:.1%}")
        if not selected:
            raise UserError(f"{name} removed the last {len(rows):,} rows: relax it or check the rows")
        rows = selected
    write_rows(options.out, rows)
    num_queries = len({query_key(row.query) for row in rows})
    print(f"{len(rows):,} rows, {num_queries:,} distinct queries{describe_copies(rows)}: {options.out}")
    return 0


def describe_copies(rows: Sequence[PairRow]) -> str:
    """Return the mean share of copied trigrams, or "" if a row does not have the passage of its document."""
    try:
        share = fmean(map(copied_share, rows))
    except UserError:
        return ""
    return f"; on average, the document has {share:.1%} of a query's word trigrams"


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Filter training rows for a retriever.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="collection with the documents of the rows")
    add("pairs", type=Path, metavar="PAIRS", help="file of rows, JSONL or Parquet")
    add(
        "--unique_queries", action="store_true", help="drop all rows of a query that occurs for two documents"
    )
    add("--min_percentile", type=float, metavar="P", help="drop rows whose highest target is below the P-th "
        "percentile of the targets of all passages of all rows")  # fmt: skip
    add("--teacher_first", action="store_true", help="drop rows in which the passage from the row's document "
        "does not have a higher target than all others")  # fmt: skip
    add("--min_words", type=int, metavar="N", help="drop queries of fewer than N words")
    add("--max_words", type=int, metavar="N", help="drop queries of more than N words")
    add("--max_copied", type=float, metavar="SHARE", help="drop queries with more than this share of their "
        "word trigrams in the document")  # fmt: skip
    add("--round_trip", metavar="RETRIEVER", help="drop rows whose document is not among the first that this "
        "retriever finds for the query; a tie counts against the row")  # fmt: skip
    add("--top", type=int, metavar="K", help="round_trip: number of first documents (default: 1)")
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the rows")
    return parser


def check_options(options: Namespace) -> None:
    """Raise UserError if there is no filter, or an option is out of range."""
    names = ("min_percentile", "min_words", "max_words", "max_copied", "round_trip")
    has_filter = any(getattr(options, name) is not None for name in names)
    if not (has_filter or options.unique_queries or options.teacher_first):
        raise UserError("there is no filter: set --round_trip or another one; see --help")
    for name in ("min_words", "max_words", "top"):
        if getattr(options, name) is not None:
            check_integer(f"--{name}", getattr(options, name), 1)
    for name, maximum in (("min_percentile", 100), ("max_copied", 1)):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= maximum:
            raise UserError(f"--{name} must be from 0 to {maximum}, not {value}")
    if options.max_words and options.min_words and options.max_words < options.min_words:
        raise UserError(
            f"--max_words must be at least --min_words, {options.min_words}, not {options.max_words}"
        )
    if options.top is not None and options.round_trip is None:
        raise UserError("--top has no effect without --round_trip: set both")
    check_output(options.out)


def filters(options: Namespace, collection: Collection) -> dict[str, Filter]:
    """Return the filters by name, in the order in which they run."""
    selected: dict[str, Filter] = {"duplicates": without_duplicates}
    if options.unique_queries:
        selected["unique_queries"] = without_ambiguous_queries
    if options.min_percentile is not None:
        selected["min_percentile"] = lambda rows: list(
            compress(rows, reaches_percentile([row.targets for row in rows], options.min_percentile))
        )
    if options.teacher_first:
        selected["teacher_first"] = lambda rows: list(filter(is_teacher_first, rows))
    if options.min_words is not None:
        selected["min_words"] = lambda rows: [
            row for row in rows if len(words(row.query)) >= options.min_words
        ]
    if options.max_words is not None:
        selected["max_words"] = lambda rows: [
            row for row in rows if len(words(row.query)) <= options.max_words
        ]
    if options.max_copied is not None:
        selected["max_copied"] = lambda rows: [row for row in rows if copied_share(row) <= options.max_copied]
    if options.round_trip is not None:
        selected["round_trip"] = lambda rows: round_trip(rows, collection, options)
    return selected


def round_trip(rows: Sequence[PairRow], collection: Collection, options: Namespace) -> list[PairRow]:
    """Return the rows whose document is among the first that the retriever finds for the query."""
    engine = open_retriever(options.round_trip, collection)
    ranks = source_ranks(rows, collection, engine, options.top or 1)
    return [row for row, rank in zip(rows, ranks, strict=True) if rank is not None]


if __name__ == "__main__":
    raise SystemExit(run_command(main))
