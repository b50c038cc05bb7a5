"""Add hard negatives to a file of training pairs: documents of a retriever, or passages that a model writes.

    python scripts/mine_negatives.py data/scifact pairs.jsonl --by bm25 -o triples.jsonl
    python scripts/mine_negatives.py data/scifact pairs.jsonl \\
        --by 'rerank:bm25|runs/cross_encoder/model@100' -o triples.jsonl
    python scripts/mine_negatives.py data/scifact pairs.jsonl --by written --model bundled:smollm2-135m \\
        -o triples.jsonl

These are the sources that "Don't Retrieve, Generate" compares (arXiv 2504.21015). Rows for which no negative
is found or written are left out. Passages that a model writes are saved to OUT.partial after each batch. If
the script is stopped, the same command resumes.

The script prints how well a classifier tells positives from negatives without the query, by their length and
by their words.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.filters import check_collection
from rlkit.envs.ranking.pairs.negatives import (
    MAX_STYLE_ACCURACY,
    Negative,
    add_negatives,
    check_rows,
    mined_negatives,
    negative_prompt,
    positive_passage,
    style_accuracy,
    written_negatives,
)
from rlkit.envs.ranking.pairs.partial import (
    Prompt,
    finish,
    generate_replies,
    partial_path,
    prompt_seed,
    settings_of,
)
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, read_rows, write_rows
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.queries import open_collection
from rlkit.retrieval.retrievers import open_retriever
from rlkit.rollouts.text_generation import BACKENDS, BATCH_TIMEOUT_SECONDS, load_text_model

WRITTEN = "written"


def main() -> int:
    """Write the rows with their negatives to a file, and print their numbers."""
    options = build_parser().parse_args(sys.argv[1:])
    check_options(options)
    rows = read_rows(options.pairs)
    check_rows(rows)
    collection = open_collection(options.collection, None, 0)
    check_collection(rows, collection)
    num_failed = 0
    if options.by == WRITTEN:
        negatives, num_failed = write_negatives(rows, options)
    else:
        negatives = mine_negatives(rows, collection, options)
    lists = [
        add_negatives(row, of_row) for row, of_row in zip(rows, negatives, strict=True) if of_row
    ]  # a row without a negative would be compared with less than the others
    if not lists:
        raise UserError(f"{options.by} gives no negative for any of the {len(rows):,} rows")
    write_rows(options.out, lists)
    if options.by == WRITTEN:
        finish(partial_path(options.out), num_failed)
    num_negatives = sum(map(len, negatives))
    print(
        f"{len(rows):,} rows, {len(lists) / len(rows):.1%} with a negative; {len(rows) - len(lists):,} rows "
        f"without one are left out; {num_negatives:,} negatives: {options.out}"
    )
    print_style(rows, negatives, options.seed)
    return 0


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Add hard negatives to a file of training pairs.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="folder in BEIR's layout, or another collection")
    add("pairs", type=Path, metavar="PAIRS", help="file of rows, as make_pairs.py writes it")
    add("--by", required=True, metavar="SOURCE", help=f"retriever, as in rlkit eval, or {WRITTEN!r} for "
        "passages that a model writes")  # fmt: skip
    add("--num_negatives", type=int, default=1, metavar="N",
        help="maximum number of negatives of a row (default: %(default)s)")  # fmt: skip
    add("--skip", type=int, default=0, metavar="K", help="number of documents to skip at the top of a "
        "ranking, after the answers are removed (default: %(default)s)")  # fmt: skip
    add("--model", help=f"{WRITTEN}: model that writes: hub name, folder or bundled:smollm2-135m")
    add("--show_positive", action="store_true",
        help=f"{WRITTEN}: whether to show the positive to the model, in addition to the query")  # fmt: skip
    add("--backend", default="transformers",
        help=f"{WRITTEN}: {', '.join(BACKENDS)} or a server's URL (default: %(default)s)")  # fmt: skip
    add("--temperature", type=float, default=0.9, metavar="T",
        help=f"{WRITTEN}: sampling temperature (default: %(default)s)")  # fmt: skip
    add("--max_tokens", type=int, default=100, metavar="N",
        help=f"{WRITTEN}: maximum number of tokens of a passage (default: %(default)s)")  # fmt: skip
    add("--allow_failures", action="store_true",
        help=f"{WRITTEN}: skip prompts that fail instead of exiting with an error")  # fmt: skip
    add("--seed", type=int, default=0, help="random seed of sampling and of the classifiers' folds (default: "
        "%(default)s)")  # fmt: skip
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the rows")
    return parser


def check_options(options: Namespace) -> None:
    """Raise UserError for options that are out of range or do not belong to the source."""
    check_integer("--num_negatives", options.num_negatives, 1)
    check_integer("--skip", options.skip, 0)
    check_integer("--max_tokens", options.max_tokens, 1)
    check_output(options.out)
    if options.by == WRITTEN and options.model is None:
        raise UserError(f"--by {WRITTEN} needs --model, the model that writes")
    if options.by != WRITTEN and options.model is not None:
        raise UserError(f"--model is for --by {WRITTEN}: remove it, or use --by {WRITTEN}")
    if options.by == WRITTEN and options.skip:
        raise UserError(f"--skip must be 0 with --by {WRITTEN}, which has no ranking")
    if options.by != WRITTEN and options.show_positive:
        raise UserError(f"--show_positive must be used with --by {WRITTEN}")
    if options.by != WRITTEN and options.allow_failures:
        raise UserError(f"--allow_failures must be used with --by {WRITTEN}")
    if not options.temperature >= 0:
        raise UserError(f"--temperature must be at least 0, not {options.temperature}")
    if options.by == WRITTEN and options.temperature == 0 and options.num_negatives > 1:
        raise UserError("--num_negatives must be 1 with --temperature 0, at which all replies are the same")


def mine_negatives(
    rows: Sequence[PairRow], collection: Collection, options: Namespace
) -> list[list[Negative]]:
    """Return the negatives of each row from a retriever."""
    engine = open_retriever(options.by, collection)
    negatives = mined_negatives(
        rows, collection, engine, num_negatives=options.num_negatives, skip=options.skip
    )
    try:
        return list(track(negatives, description="searching", total=len(rows)))
    except EngineError as error:
        raise UserError(f"the retriever {options.by} fails: {error}") from None


def write_negatives(rows: Sequence[PairRow], options: Namespace) -> tuple[list[list[Negative]], int]:
    """Return the negatives of each row that a language model writes, and the number of failed prompts.

    The replies are saved to OUT.partial after each batch, so that a stopped run resumes.
    """
    model = load_text_model(
        options.model,
        options.backend,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        timeout=BATCH_TIMEOUT_SECONDS,
    )
    ids = [[f"{row.id}/{number}" for number in range(options.num_negatives)] for row in rows]
    prompts = (
        Prompt(
            name,
            negative_prompt(row.query, positive_passage(row) if options.show_positive else None),
            prompt_seed(options.seed, name),
        )
        for row, names in zip(rows, ids, strict=True)
        for name in names
    )
    replies = generate_replies(
        model,
        prompts,
        partial_path(options.out),
        settings_of(options),
        allow_failures=options.allow_failures,
    )
    texts = [[replies[name].text for name in names if name in replies] for names in ids]
    negatives = [written_negatives(row, of_row) for row, of_row in zip(rows, texts, strict=True)]
    return negatives, sum(map(len, ids)) - len(replies)


def print_style(rows: Sequence[PairRow], negatives: Sequence[Sequence[Negative]], seed: int) -> None:
    """Print how well the positives can be told from the first negatives without the query."""
    pairs = [
        (positive_passage(row), of_row[0][1]) for row, of_row in zip(rows, negatives, strict=True) if of_row
    ]
    try:
        accuracy = style_accuracy(*zip(*pairs, strict=True), seed)
    except UserError as error:
        print(f"style: not measured: {error}")
        return
    print(
        f"style: classifiers tell positives from negatives without the query with an accuracy of "
        f"{accuracy.length:.3f} by length and {accuracy.words:.3f} by words; chance is .5. Above "
        f"{MAX_STYLE_ACCURACY}, the negatives may teach style rather than relevance"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
