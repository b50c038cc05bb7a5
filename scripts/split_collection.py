"""Split a collection by document: test queries ask for documents that no training query asks for.

    python scripts/split_collection.py data/metatool --folds 5 --fold 0 -o data/metatool-unseen
    python scripts/split_collection.py data/metatool --folds 5 --fold 0 --seen_dev 0.1 -o data/metatool-unseen

The documents that are relevant to some query are divided into folds: one is the test split, the next one
dev, and the others train. A query goes to the split of its relevant documents; queries whose relevant
documents are in several splits are dropped. The corpus of the new collection, a folder in BEIR's layout, has
all documents.
With `--seen_dev`, dev is a share of the training queries instead: it asks for documents that are seen in
training, as a control. `folds` of `--environment_args` splits queries instead of documents.
"""

import sys

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.retrieval.collections.base import merge_splits
from rlkit.retrieval.collections.document_folds import split_by_document
from rlkit.retrieval.collections.write import check_fits_beir, new_folder, write_beir
from rlkit.retrieval.queries import open_collection


def main() -> int:
    """Write the collection, and print the number of its queries and of those that are dropped."""
    parser = CommandParser(description="Split a collection by document, for tests on unseen documents.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="collection, such as a folder in BEIR's layout")
    add("--folds", type=int, required=True, metavar="K", help="number of folds")
    add("--fold", type=int, required=True, metavar="F", help="index of the test fold, from 0")
    add("--seed", type=int, default=0, metavar="N", help="seed of the division into folds (default: 0)")
    add(
        "--seen_dev",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the training queries to use as dev, instead of the fold after the test fold",
    )
    add("-o", "--out", type=folder_path, required=True, metavar="FOLDER", help="folder to write")
    options = parser.parse_args(sys.argv[1:])
    collection = open_collection(options.collection, None, 0)
    check_fits_beir(collection)
    splits = split_by_document(
        collection.qrels, options.folds, options.fold, seed=options.seed, seen_dev=options.seen_dev
    )
    judged = merge_splits(splits)
    with new_folder(options.out) as scratch:
        queries = {query: collection.queries[query] for query in judged}
        write_beir(scratch, collection.documents(), queries, splits)
    for split, queries_of_split in splits.items():
        num_relevant = len(
            {name for grades in queries_of_split.values() for name, g in grades.items() if g > 0}
        )
        print(f"{split}: {len(queries_of_split):,} queries, {num_relevant:,} relevant documents")
    dropped = [grades for query, grades in merge_splits(collection.qrels).items() if query not in judged]
    num_without = sum(all(grade < 1 for grade in grades.values()) for grades in dropped)
    print(
        f"dropped: {len(dropped) - num_without:,} queries with relevant documents in several splits, "
        f"{num_without:,} without a relevant document"
    )
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
