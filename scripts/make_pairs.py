"""Generate training pairs for a retriever from the documents of a collection, without labels.

    python scripts/make_pairs.py data/scifact --source ict bfs wlp --per_document 4 -o pairs.jsonl
    rlkit rank configs/ranking/pairs.yaml --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \\
        --environment_args '{"pairs": "pairs.jsonl", "collection": "data/scifact"}' --learning_rate 2e-5

Sources from the structure of documents are ict, bfs, wlp and crop (`rlkit/envs/ranking/pairs/structure.py`).
The sources prop and bprop (`words.py` and `attention.py` there) have two sets of words for a document, and
need a file of their own. "judged" has the judged training queries with their relevant documents, as a
supervised baseline. "graded" has four new passages of grades 3, 2, 1 and 0 for each training query of a
collection generated:SIZE:SEED (`graded.py`). The other sources read no queries, and judgments only for
--without_test_documents.

For each source, the script prints the number of rows and distinct queries, and the share of rows whose
passage contains the query, which a retriever can learn to copy.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.attention import bprop, effective_support, word_contrasts
from rlkit.envs.ranking.pairs.graded import GRADED, graded
from rlkit.envs.ranking.pairs.pages import read_pages
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, write_rows
from rlkit.envs.ranking.pairs.selection import test_documents
from rlkit.envs.ranking.pairs.structure import GENERATORS
from rlkit.envs.ranking.pairs.words import MIN_COUNT, prop
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.beir import find_folder
from rlkit.retrieval.documents import Document, passage_text
from rlkit.retrieval.queries import documents_by_id, judged_queries, open_collection

JUDGED = "judged"
WORD_SETS = ("prop", "bprop")


def main() -> int:
    """Write the rows of all sources to a file and print their numbers."""
    options = build_parser().parse_args(sys.argv[1:])
    check_integer("--per_document", options.per_document, 1)
    check_output(options.out)
    sources = dict.fromkeys(options.source)
    if len({source in WORD_SETS for source in sources}) > 1:
        raise UserError(f"rows of {' and '.join(WORD_SETS)} need a file of their own: run the script twice")
    if not options.temperature > 0:
        raise UserError(f"--temperature must be above 0, not {options.temperature}")
    collection = open_collection(options.collection, None, 0)
    excluded = test_documents(collection) if options.without_test_documents else frozenset()
    documents = [
        document for document in collection.documents() if collection.judged_id(document.id) not in excluded
    ]
    if not documents:
        raise UserError(f"all documents of {collection.name} are judged in its test split: none is left")
    rows: list[PairRow] = []
    for source in sources:
        generated = list(generate(source, collection, documents, options))
        print(describe(source, generated))
        rows += generated
    if not rows:
        raise UserError(f"{collection.name} gives no rows for {' '.join(options.source)}")
    write_rows(options.out, rows)
    print(f"{len(rows):,} rows: {options.out}")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Generate training pairs for a retriever.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="folder in BEIR's layout, or another collection")
    add(
        "--source",
        nargs="+",
        required=True,
        choices=[*GENERATORS, *WORD_SETS, JUDGED, GRADED],
        help="sources of the rows",
    )
    add("--per_document", type=int, default=4, metavar="N", help="maximum number of rows of a document from "
        "each source but judged and graded (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--without_test_documents", action="store_true", help="leave out the documents that are judged in "
        "the test split, so that the test shows what is learned for unseen documents")  # fmt: skip
    add("--min_count", type=int, default=MIN_COUNT, metavar="N", help="prop: number of occurrences in the "
        "corpus from which a word is used (default: %(default)s)")  # fmt: skip
    add("--encoder", default="bundled:all-minilm-l6-v2", metavar="MODEL",
        help="bprop: encoder whose attention chooses the words (default: %(default)s)")  # fmt: skip
    add("--temperature", type=float, default=1.0, metavar="T",
        help="bprop: temperature of the choice of words (default: %(default)s)")  # fmt: skip
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the rows")
    return parser


def generate(
    source: str, collection: Collection, documents: Sequence[Document], options: Namespace
) -> Iterator[PairRow]:
    """Return the rows of one source from the given documents of a collection."""
    seed, per_document = options.seed, options.per_document
    ids = {collection.judged_id(document.id) for document in documents}
    if source == JUDGED:
        return judged_rows(collection, ids, seed)
    if source == GRADED:
        return graded(options.collection, seed)
    if source == "prop":
        return prop(documents, per_document=per_document, seed=seed, min_count=options.min_count)
    if source == "bprop":
        contrasts = word_contrasts(documents, options.encoder)
        support = effective_support(contrasts, options.temperature)
        print(f"bprop: effective support of a document's words {support:.1%} (uniform: 100%)")
        return bprop(
            documents, contrasts, per_document=per_document, seed=seed, temperature=options.temperature
        )
    path = Path(options.collection).expanduser()
    folder = find_folder(path) if path.is_file() else path
    pages = [page for page in read_pages(collection, folder or path) if page.id in ids]
    return GENERATORS[source](pages, seed, per_document)


def judged_rows(collection: Collection, ids: Set[str], seed: int) -> Iterator[PairRow]:
    """Yield each judged training query with each of its relevant documents that is among `ids`.

    Raises:
        UserError: The collection has no training judgments, or it judges documents but ranks passages, so
            that the passage with the answer is unknown.
    """
    if "train" not in collection.qrels:
        raise UserError(f"{collection.name} has no training judgments: remove the source {JUDGED}")
    if collection.document_of is not None:
        raise UserError(f"{collection.name} judges documents, not passages: remove the source {JUDGED}")
    queries = judged_queries(collection, "train", None, seed)
    documents = documents_by_id(collection, (name for query in queries for name in query.relevant))
    for query in queries:
        for name in query.relevant:
            if name in documents and name in ids:
                yield PairRow(
                    f"{JUDGED}/{query.id}/{name}",
                    query.text,
                    (passage_text(documents[name]),),
                    (float(query.grades[name]),),
                    JUDGED,
                    name,
                    answers=tuple(query.relevant),
                )


def describe(source: str, rows: Sequence[PairRow]) -> str:
    """Return the numbers of a source's rows as a line."""
    if not rows:
        return f"{source}: no rows"
    num_queries = len({row.query for row in rows})
    num_documents = len({row.document for row in rows})
    num_copied = sum(row.query in passage for row in rows for passage in row.passages)
    return (
        f"{source}: {len(rows):,} rows, {num_queries:,} distinct queries, {num_documents:,} documents; the "
        f"passage contains the query in {num_copied / len(rows):.1%}"
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
