"""`rlkit index CORPUS -o FOLDER`: build a search index of a corpus.

    rlkit index corpus.jsonl --engine bm25 -o indexes/corpus
    rlkit index notes -o indexes/notes                  # a folder of .txt and .md files
    rlkit index zeitung.csv --language german -o indexes/zeitung
    rlkit index world:100000:0 --engine dense --model BAAI/bge-small-en-v1.5 -o indexes/world
    rlkit index corpus.jsonl --engine dense --model MODEL --augment queries.jsonl -o indexes/augmented
    rlkit index corpus.jsonl --engine dense --model MODEL --train_queries queries.jsonl -o indexes/trained

If the build was interrupted, the same command resumes it (docs/search_engines.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from rich.progress import track

from rlkit.arguments.bounds import NOT_NEGATIVE, SHARE, check_number
from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.corpus import corpus_source, read_corpus
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.engines.index import ENGINES, build_index
from rlkit.retrieval.store import read_header


def main(argv: Sequence[str]) -> int:
    """Build the index, print its number of documents and its folder, and return the exit code."""
    options = vars(build_parser().parse_args(argv))
    for name, allowed in (("k1", NOT_NEGATIVE), ("b", SHARE)):
        if name in options:
            check_number(f"--{name}", options[name], allowed)
    if "alpha" in options and "augment" not in options:
        raise UserError("--alpha has no effect without queries to fuse: set --augment, too")
    if "train_epochs" in options and "train_queries" not in options:
        raise UserError("--train_epochs has no effect without queries to train on: set --train_queries, too")
    if "train_epochs" in options:
        check_integer("--train_epochs", options["train_epochs"], 1)
    corpus = options.pop("corpus")
    try:
        out = build_index(read_corpus(corpus), source=corpus_source(corpus), progress=track, **options)
    except EngineError as error:
        raise UserError(str(error)) from error
    header = read_header(out)
    print(f"{header['documents']:,} documents: {out}")
    if (augment := header["settings"].get("augment")) is not None:
        print(describe_fusion(augment))
    if (train := header["settings"].get("train")) is not None:
        print(
            f"vectors of {train['documents']:,} documents trained on {train['queries']:,} queries: "
            f"{train['epochs']:,} epochs, loss {train['losses'][0]:.3g} to {train['losses'][-1]:.3g}; "
            f"{train['duplicates']:,} duplicate rows dropped"
        )
    return 0


def describe_fusion(augment: Mapping[str, float]) -> str:
    """Return a line about the fused queries of an index. Their sum weighs up to alpha * n."""
    queries_per_document = augment["queries"] / augment["documents"]
    return (
        f"{augment['queries']:,} queries fused into {augment['documents']:,} documents: "
        f"alpha {augment['alpha']:g}, n {queries_per_document:.3g} queries per document, "
        f"alpha * n {augment['alpha'] * queries_per_document:.3g}; "
        f"{augment['duplicates']:,} duplicate rows dropped"
    )


def build_parser() -> CommandParser:
    """Build the parser of the command. Options that are not set are missing from the parsed namespace."""
    parser = CommandParser(
        prog="rlkit index",
        description="Build a search index of a corpus. The same command resumes an interrupted build.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("corpus", metavar="CORPUS",
        help="file (.jsonl, .json, .parquet, .csv, .tsv, .txt, .md; also .gz), folder of such files, or "
        "world:SIZE:SEED")  # fmt: skip
    add("--engine", choices=list(ENGINES), default="bm25", help="search engine (default: %(default)s)")
    add("-o", "--out", required=True, metavar="FOLDER", help="output folder of the index")
    add("--overwrite", action="store_true", default=False, help="replace an existing index")
    add("--k1", type=float, metavar="X", help="bm25: term frequency saturation (default: 0.9)")
    add("--b", type=float, metavar="X",
        help="bm25: strength of the document length normalization, 0 to 1 (default: 0.4)")  # fmt: skip
    add("--language", metavar="LANGUAGE",
        help="bm25: language of the stemmer and the stop words, such as german or de (default: english); "
        "none indexes all words as they are")  # fmt: skip
    add("--model", metavar="MODEL", help="dense: sentence-transformers model, Hub id or local path")
    add("--query_prefix", metavar="PREFIX", help='dense: prefix of queries, e.g. "query: " for E5')
    add("--passage_prefix", metavar="PREFIX", help='dense: prefix of passages, e.g. "passage: " for E5')
    add("--similarity", choices=("cosine", "dot"), help="dense: similarity (default: the model's own)")
    add("--approximate", action="store_true",
        help="dense: search approximately, for more than about a million documents")  # fmt: skip
    add("--recall", type=float, metavar="X",
        help="dense: share of the nearest documents that --approximate finds (default: 0.95)")  # fmt: skip
    add("--augment", metavar="FILE",
        help="dense: table of queries (columns `query` and `document`, an id) to fuse into the vectors of "
        "their documents")  # fmt: skip
    add("--alpha", type=float, metavar="X",
        help="dense: weight of each query of --augment, 0 to 1 (default: 0.01)")  # fmt: skip
    add("--train_queries", metavar="FILE",
        help="dense: table of queries, with the columns of --augment, on which to train the vectors of "
        "their documents")  # fmt: skip
    add("--train_epochs", type=int, metavar="N",
        help="dense: number of passes over --train_queries (default: 10)")  # fmt: skip
    return parser
