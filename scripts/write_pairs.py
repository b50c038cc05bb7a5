"""Write training pairs for a retriever with a language model: queries for documents, or graded passages.

    python scripts/write_pairs.py data/metatool --source few_shot --model bundled:smollm2-135m -o pairs.jsonl
    python scripts/write_pairs.py data/scifact --source six --model Qwen/Qwen3-4B \\
        --backend http://localhost:8000/v1 --documents 5000 --without_test_documents -o six.jsonl

The source few_shot shows the model examples from the collection's training queries (Promptagator). `six`
stands for the sources question, claim, title, keywords, web_search and free, each with an instruction of its
own and, unless --examples says otherwise, without examples. The source graded has four passages for each
training query, which the model writes for the grades 3, 2, 1 and 0 (SyCL).

A small model's queries are often about something else: filter the rows before training. For each source, the
script prints the number of rows and distinct queries, the share of dropped replies, and the share of the
queries' trigrams that are copied from the document.

Replies are saved to OUT.partial after each batch. If the script is stopped, the same command resumes.
"""

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.partial import (
    Prompt,
    finish,
    generate_replies,
    partial_path,
    settings_of,
)
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, write_rows
from rlkit.envs.ranking.pairs.selection import QueryExample, choose_examples, sample_ids, test_documents
from rlkit.envs.ranking.pairs.writing import MAX_DOCUMENT_WORDS
from rlkit.envs.ranking.pairs.written import (
    FEW_SHOT,
    FREE,
    GRADED,
    SIX_TYPES,
    WrittenRows,
    describe,
    graded_prompts,
    graded_rows,
    query_prompts,
    query_rows,
)
from rlkit.errors import UserError, check_integer
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, passage_text
from rlkit.retrieval.queries import JudgedQuery, documents_by_id, judged_queries, open_collection
from rlkit.rollouts.text_generation import (
    BACKENDS,
    BATCH_TIMEOUT_SECONDS,
    Generation,
    load_text_model,
)

SIX = "six"
QUERY_TOKENS, PASSAGE_TOKENS = 64, 160  # default maximums of a reply


@dataclass(frozen=True)
class Material:
    """What the sources write about.

    Attributes:
        documents: Documents to write queries for.
        examples: Examples, none of which is for one of the documents.
        queries: Training queries to write graded passages for.
    """

    documents: Sequence[Document]
    examples: Sequence[QueryExample]
    queries: Sequence[JudgedQuery]


def main() -> int:
    """Write the rows of all sources to a file and print their numbers."""
    options = build_parser().parse_args(sys.argv[1:])
    check_options(options)
    sources: list[str] = []
    for source in options.source:
        sources += SIX_TYPES if source == SIX else [source]
    sources = list(dict.fromkeys(sources))
    collection = open_collection(options.collection, None, 0)
    material = select(collection, sources, options)
    partial = partial_path(options.out)
    model = load_text_model(
        options.model,
        options.backend,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        timeout=BATCH_TIMEOUT_SECONDS,
    )
    prompts = [prompt for source in sources for prompt in prompts_of(source, material, options)]
    replies = generate_replies(
        model, prompts, partial, settings_of(options), allow_failures=options.allow_failures
    )
    rows: list[PairRow] = []
    for source in sources:
        written = rows_of(source, material, replies, options)
        print(describe(source, written))
        rows += written.rows
    if not rows:
        raise UserError(f"{options.model} wrote no usable reply; {partial} has them all")
    write_rows(options.out, rows)
    finish(partial, len(prompts) - len(replies))
    print(f"{len(rows):,} rows: {options.out}")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Write training pairs for a retriever with a language model.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="folder in BEIR's layout, or another collection")
    add("--source", nargs="+", required=True, choices=[FEW_SHOT, SIX, *SIX_TYPES, GRADED],
        help="sources of the rows")  # fmt: skip
    add("--model", required=True, help="model that writes: hub name, folder or bundled:smollm2-135m")
    backends = ", ".join(BACKENDS)
    add("--backend", default="transformers", help=f"{backends} or a server's URL (default: transformers)")
    add("--temperature", type=float, default=0.7, metavar="T", help="sampling temperature (default: 0.7)")
    default = f"{QUERY_TOKENS}, or {PASSAGE_TOKENS} with {GRADED}"
    add("--max_tokens", type=int, metavar="N",
        help=f"maximum number of tokens of a reply (default: {default})")  # fmt: skip
    add("--examples", type=int, metavar="K", help="number of training queries to show, each with a document, "
        "for which nothing is written then (default: 8 for few_shot, else 0)")  # fmt: skip
    add("--instruction", metavar="TEXT", help="few_shot: instruction above the examples, which says what the "
        "queries of the task are (default: to write a search query)")  # fmt: skip
    add("--per_document", type=int, metavar="N", help="number of queries to write for a document from each "
        "source (default: 8 for few_shot, else 1)")  # fmt: skip
    add("--document_words", type=int, default=MAX_DOCUMENT_WORDS, metavar="N", help="maximum number of words "
        "of a document in a prompt; a longer one is truncated (default: %(default)s)")  # fmt: skip
    add("--documents", type=int, metavar="N", help="number of documents to sample (graded: training queries; "
        "default: all)")  # fmt: skip
    add("--without_test_documents", action="store_true", help="write nothing for the documents that are "
        "judged in the test split")  # fmt: skip
    add(
        "--allow_failures",
        action="store_true",
        help="skip prompts that fail instead of exiting with an error",
    )
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the rows")
    return parser


def check_options(options: Namespace) -> None:
    """Raise UserError if a number is out of range, or an option has no effect on any source."""
    check_output(options.out)
    for name, low in (("examples", 0), ("per_document", 1), ("documents", 1)):
        if getattr(options, name) is not None:
            check_integer(f"--{name}", getattr(options, name), low)
    if options.max_tokens is None:
        options.max_tokens = PASSAGE_TOKENS if GRADED in options.source else QUERY_TOKENS
    check_integer("--max_tokens", options.max_tokens, 1)
    check_integer("--document_words", options.document_words, 1)
    if not options.temperature >= 0:
        raise UserError(f"--temperature must be at least 0, not {options.temperature}")
    if options.temperature == 0 and any(num_queries_of(source, options) > 1 for source in options.source):
        raise UserError("--per_document must be 1 with --temperature 0, at which all replies are the same")
    if options.instruction is not None and FEW_SHOT not in options.source:
        raise UserError(f"--instruction is for the source {FEW_SHOT}: the others have their own")
    if options.source == [GRADED]:
        for name in ("examples", "per_document", "without_test_documents"):
            if getattr(options, name):
                raise UserError(f"--{name} has no effect on the source {GRADED}, which writes for queries")


def select(collection: Collection, sources: Sequence[str], options: Namespace) -> Material:
    """Return the documents, examples and queries that the sources need."""
    if sources == [GRADED]:
        documents: list[Document] = []
        examples: list[QueryExample] = []
    else:
        num_examples = max(num_examples_of(source, options.examples) for source in sources)
        examples = choose_examples(collection, num_examples, options.seed)
        excluded = {example.document for example in examples}
        if options.without_test_documents:
            excluded |= test_documents(collection)
        # Some collections have documents without text, for which there is nothing to ask.
        ids = {
            collection.judged_id(document.id)
            for document in collection.documents()
            if passage_text(document).strip()
        }
        sample = sample_ids(ids - excluded, options.documents, options.seed)
        documents = list(documents_by_id(collection, sample).values())
        if not documents:
            raise UserError(f"{collection.name} has no documents to write for: all are left out")
    queries: list[JudgedQuery] = []
    if GRADED in sources:
        if "train" not in collection.qrels:
            raise UserError(f"{collection.name} has no training queries: remove the source {GRADED}")
        queries = judged_queries(collection, "train", options.documents, options.seed)
    return Material(documents, examples, queries)


def num_examples_of(source: str, chosen: int | None) -> int:
    """Return the number of examples of a source."""
    if source in (GRADED, FREE):
        return 0
    if chosen is not None:
        return chosen
    return 8 if source == FEW_SHOT else 0


def num_queries_of(source: str, options: Namespace) -> int:
    """Return the number of queries per document of a source."""
    return options.per_document or (8 if source == FEW_SHOT else 1)


def prompts_of(source: str, material: Material, options: Namespace) -> Iterator[Prompt]:
    """Return the prompts of a source."""
    if source == GRADED:
        return graded_prompts(material.queries, options.seed)
    return query_prompts(
        source,
        material.documents,
        material.examples[: num_examples_of(source, options.examples)],
        per_document=num_queries_of(source, options),
        seed=options.seed,
        instruction=options.instruction if source == FEW_SHOT else None,
        document_words=options.document_words,
    )


def rows_of(
    source: str, material: Material, replies: dict[str, Generation], options: Namespace
) -> WrittenRows:
    """Return the rows of a source."""
    if source == GRADED:
        return graded_rows(material.queries, replies, options.seed)
    examples = material.examples[: num_examples_of(source, options.examples)]
    number = num_queries_of(source, options)
    return query_rows(source, material.documents, examples, replies, per_document=number)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
