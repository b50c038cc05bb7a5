"""Give training pairs lists of candidates with a teacher's scores as targets, for listwise distillation.

    python scripts/score_pairs.py data/scifact six.jsonl --teacher cross-encoder/ms-marco-MiniLM-L6-v2 \\
        -o scored.jsonl
    rlkit rank configs/ranking/heterogeneous.yaml --objective distillation --adapter_side query \\
        --environment_args '{"pairs": "scored.jsonl", "collection": "data/scifact"}' -o runs/distilled

The candidates of a query are the first documents of several retrievers, fused by reciprocal rank, and the
document that the query is written for. The teacher is a cross-encoder, such as one that `rlkit rank
configs/ranking/cross_encoder.yaml` trains. Its scores are scaled so that the 1st percentile of all scores is
0 and the 99th is 1.

The script prints how often the teacher ranks the source document first: the share of rows that
`scripts/filter_pairs.py --teacher_first` keeps. If it is stopped, the same command resumes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.partial import partial_path, resume, settings_of
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, read_rows, write_rows
from rlkit.envs.ranking.pairs.teacher import (
    candidate_lists,
    normalize_scores,
    score_lists,
    teacher_ranks,
    with_targets,
)
from rlkit.errors import UserError, check_integer
from rlkit.models.fingerprint import model_fingerprint
from rlkit.retrieval.cross_encoders import load_cross_encoder
from rlkit.retrieval.queries import open_collection

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

BATCH_SIZE = 64  # lists between two writes of results
RETRIEVERS = ("bm25", "dense:bundled:all-minilm-l6-v2")


def main() -> int:
    """Write the lists and print the teacher's agreement with the pairs."""
    options = build_parser().parse_args(sys.argv[1:])
    check_integer("--depth", options.depth, 1)
    check_integer("--list_length", options.list_length, 2)
    check_output(options.out)
    collection, rows = open_collection(options.collection, None, 0), read_rows(options.pairs)
    if rows[0].passages_are_queries:
        raise UserError(f"{options.pairs} has word sets for documents, not documents for queries")
    teacher = load_cross_encoder(options.teacher, max_seq_length=options.max_seq_length)
    lists = candidate_lists(
        rows, collection, options.retrievers, depth=options.depth, length=options.list_length
    )
    scores = score(options, lists, teacher)
    write_rows(options.out, with_targets(lists, normalize_scores(scores)))
    partial_path(options.out).unlink()
    ranks = teacher_ranks(lists, scores)
    num_passages = sum(len(row.passages) for row in lists)
    print(
        f"{len(lists):,} lists of {num_passages / len(lists):.1f} passages: {options.out}; the teacher ranks "
        f"the source first in {sum(rank == 1 for rank in ranks) / len(ranks):.1%}"
    )
    return 0


def score(options: Namespace, lists: Sequence[PairRow], teacher: CrossEncoder) -> list[np.ndarray]:
    """Return the teacher's scores of each list, in batches that are saved."""
    by_id = {row.id: row for row in lists}

    def compute(ids: Sequence[str]) -> dict[str, list[float]]:
        batch = score_lists([by_id[name] for name in ids], teacher)
        return {name: of_list.tolist() for name, of_list in zip(ids, batch, strict=True)}

    settings = settings_of(options)
    passages = json.dumps([[row.id, row.query, row.passages] for row in lists])
    settings["lists"] = hashlib.sha256(passages.encode()).hexdigest()
    settings["teacher_files"] = model_fingerprint(options.teacher)
    results = resume(
        partial_path(options.out),
        settings,
        list(by_id),
        compute,
        batch_size=BATCH_SIZE,
        description="scoring",
    )
    return [np.array(results[name]) for name in by_id]


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Give training pairs lists with a teacher's scores.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="collection of the pairs' documents")
    add("pairs", metavar="PAIRS", help="file of pairs, such as scripts/write_pairs.py writes")
    add("--teacher", required=True, metavar="MODEL", help="cross-encoder that scores the candidates")
    add("--retrievers", nargs="+", default=list(RETRIEVERS), metavar="NAME",
        help=f"retrievers that find the candidates (default: {' '.join(RETRIEVERS)})")  # fmt: skip
    add("--depth", type=int, default=100, metavar="N",
        help="number of documents of each retriever to fuse (default: %(default)s)")  # fmt: skip
    add("--list_length", type=int, default=20, metavar="N",
        help="maximum number of candidates of a query (default: %(default)s)")  # fmt: skip
    add("--max_seq_length", type=int, metavar="N",
        help="maximum number of tokens of a pair (default: the teacher's own limit)")  # fmt: skip
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the lists")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main))
