"""`rlkit index CORPUS -o FOLDER`: build the index of a corpus for a local search engine.

    rlkit index corpus.jsonl --engine bm25 -o indexes/corpus
    rlkit index world:100000:0 --engine dense --model BAAI/bge-small-en-v1.5 -o indexes/world

The same command continues an index whose building was killed (docs/search_engines.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.progress import track

from rlkit.arguments.bounds import NOT_NEGATIVE, SHARE, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import corpus_source, read_corpus
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.engines.index import KINDS, build_index
from rlkit.retrieval.store import read_header


def main(argv: Sequence[str]) -> int:
    """Build the index, print how many documents it has, and return the exit code."""
    options = vars(build_parser().parse_args(argv))
    for name, allowed in (("k1", NOT_NEGATIVE), ("b", SHARE)):
        if name in options:
            check_number(f"--{name}", options[name], allowed)
    corpus = options.pop("corpus")
    try:
        out = build_index(read_corpus(corpus), source=corpus_source(corpus), progress=track, **options)
    except EngineError as error:
        raise UserError(str(error)) from error
    print(f"{read_header(out)['documents']:,} documents: {out}")
    return 0


def build_parser() -> CommandParser:
    """Build the parser of the command; settings that are not given are left out of its result."""
    parser = CommandParser(
        prog="rlkit index",
        description="Build the index of a corpus.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("corpus", help=".jsonl, .parquet or .csv file; folder with corpus.jsonl; or world:SIZE:SEED")
    add("--engine", choices=list(KINDS), default="bm25", help="default: %(default)s")
    add("-o", "--out", required=True, metavar="FOLDER", help="folder of the index")
    add("--overwrite", action="store_true", default=False, help="replace the index that is there")
    add("--k1", type=float, help="bm25: how slowly repeated words saturate (0.9)")
    add("--b", type=float, help="bm25: how much the score of long documents is reduced (0.4)")
    add("--model", help="dense: a sentence-transformers model, name or path")
    add("--query_prefix", help='dense: prefix of queries, for e5 "query: "')
    add("--passage_prefix", help='dense: prefix of passages, for e5 "passage: "')
    return parser
