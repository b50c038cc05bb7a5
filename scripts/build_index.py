"""Build the index of a corpus for a local search engine (docs/search_engines.md).

    python scripts/build_index.py corpus.jsonl --engine bm25 --out indexes/corpus
    python scripts/build_index.py world:100000:0 --engine dense --model BAAI/bge-small-en-v1.5 --out indexes/w

Killed and started again with the same arguments it goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.progress import track

from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import corpus_source, read_corpus
from rlkit.retrieval.documents import EngineError
from rlkit.retrieval.engines.index import KINDS, build_index
from rlkit.retrieval.store import read_header


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; settings that are not given are left out."""
    parser = argparse.ArgumentParser(
        description="Build the index of a corpus.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument(
        "corpus", help=".jsonl, .parquet or .csv file; folder with corpus.jsonl; or world:SIZE:SEED"
    )
    parser.add_argument("--engine", choices=list(KINDS), default="bm25", help="default: %(default)s")
    parser.add_argument("--out", required=True, help="folder of the index")
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="replace the index that is there"
    )
    parser.add_argument("--k1", type=float, help="bm25: how slowly repeated words saturate (0.9)")
    parser.add_argument("--b", type=float, help="bm25: how much long documents are held back (0.4)")
    parser.add_argument("--model", help="dense: a sentence-transformers model, name or path")
    parser.add_argument("--query-prefix", help='dense: before queries, for e5 "query: "')
    parser.add_argument("--passage-prefix", help='dense: before passages, for e5 "passage: "')
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build; 2 after a user's mistake, which is told in one line."""
    options = vars(parse(arguments))
    corpus = options.pop("corpus")
    try:
        out = build_index(read_corpus(corpus), source=corpus_source(corpus), progress=track, **options)
    except (UserError, EngineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{read_header(out)['documents']:,} documents: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
