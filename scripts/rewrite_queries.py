"""Rewrite the queries of a collection with a model, without training, and evaluate the rankings.

    python scripts/rewrite_queries.py MODEL --collection data/scifact --method ensemble -o ensemble.json
    python scripts/rewrite_queries.py MODEL --collection data/scifact --method fusion -o fusion.json
    python scripts/rewrite_queries.py MODEL --collection data/scifact --method context \\
        --evaluation_split train --to new
    rlkit eval --compare bm25.json ensemble.json

The methods `ensemble` and `fusion` are GenQREnsemble's. The method `context` (CAR) shows the model a relevant
document, so it is only for training queries. `--to` writes a copy of the collection in BEIR's layout with the
new queries of the split, for training with `rlkit rank` or `rerank-v3`, and the script prints the leakage.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.prompts import prompt_line
from rlkit.envs.ranking.rewriting import (
    CONTEXT_PROMPT,
    KEYWORD_INSTRUCTIONS,
    KEYWORD_PROMPT,
    clean_keywords,
    ensemble,
    leakage,
    word_leakage,
)
from rlkit.errors import UserError
from rlkit.evaluation.rankings import as_evaluation
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.engines.hybrid import fuse
from rlkit.retrieval.evaluate import score_rankings, write_trec_run
from rlkit.retrieval.queries import JudgedQuery, documents_by_id, judged_queries, open_collection
from rlkit.retrieval.retrievers import excluded_ids, open_retriever, retrieve
from rlkit.rewards.thinking import after_thinking
from rlkit.rollouts.text_generation import BACKENDS, BATCH_TIMEOUT_SECONDS, TextModel, load_text_model

METHODS = ("ensemble", "fusion", "context")
MAX_DOCUMENT_WORDS = 150  # of a document in a prompt
BATCH_SIZE = 64  # prompts between two updates of the progress bar


def generate(model: TextModel, prompts: Sequence[str], seed: int) -> list[str]:
    """Generate a reply to each prompt with a progress bar; raises UserError if a request fails."""
    replies: list[str] = []
    for start in track(range(0, len(prompts), BATCH_SIZE), description="generating"):
        batch = prompts[start : start + BATCH_SIZE]
        messages = [[{"role": "user", "content": prompt}] for prompt in batch]
        for generation in model.generate(messages, [seed + start + i for i in range(len(batch))]):
            if generation.error is not None:
                raise UserError(f"{model.name} failed to generate text: {generation.error}")
            replies.append(after_thinking(generation.text))
    return replies


def generate_keywords(model: TextModel, queries: Sequence[JudgedQuery], seed: int) -> dict[str, list[str]]:
    """Return the keywords of each query, one string per instruction, by query id."""
    prompts = [
        KEYWORD_PROMPT.format(instruction=instruction, query=prompt_line(query.text))
        for query in queries
        for instruction in KEYWORD_INSTRUCTIONS
    ]
    replies = iter(generate(model, prompts, seed))
    return {query.id: [clean_keywords(next(replies)) for _ in KEYWORD_INSTRUCTIONS] for query in queries}


def rewrite_with_context(
    model: TextModel, queries: Sequence[JudgedQuery], collection: Collection, seed: int
) -> tuple[dict[str, str], float, float]:
    """Rewrite each query with a document of its highest grade in the prompt.

    A query without a relevant document in the collection keeps its text.

    Returns:
        The new queries by query id, the mean leakage of trigrams and that of words.

    Raises:
        UserError: No query has a relevant document in the collection.
    """
    ids: dict[str, list[str]] = {}
    for query in queries:
        excluded = excluded_ids(collection, query.id)
        ids[query.id] = [name for name in query.relevant if name not in excluded]
    documents = documents_by_id(collection, (name for names in ids.values() for name in names))
    texts: dict[str, str] = {}
    for query in queries:
        if names := [name for name in ids[query.id] if name in documents]:
            document = documents[names[0]]
            texts[query.id] = f"{document.title} {document.text}"
    answerable = [query for query in queries if query.id in texts]
    if not answerable:
        raise UserError(f"no relevant document of the queries is in {collection.name}")
    prompts = [
        CONTEXT_PROMPT.format(
            document=prompt_line(texts[query.id], MAX_DOCUMENT_WORDS), query=prompt_line(query.text)
        )
        for query in answerable
    ]
    rewritten = {query.id: query.text for query in queries}
    for query, reply in zip(answerable, generate(model, prompts, seed), strict=True):
        rewritten[query.id] = " ".join(reply.split()) or query.text  # an empty reply keeps the query
    leaks = [
        [measure(rewritten[query.id], query.text, texts[query.id]) for measure in (leakage, word_leakage)]
        for query in answerable
    ]
    mean_leakage, mean_word_leakage = np.mean(leaks, axis=0)
    return rewritten, float(mean_leakage), float(mean_word_leakage)


def rank(collection: Collection, retriever: str, queries: dict[str, list[str]], depth: int) -> dict[str, Any]:
    """Return the ranking of each query id; the rankings of several query strings are fused."""
    engine = open_retriever(retriever, collection)
    rankings: dict[str, list[list[str]]] = {query_id: [] for query_id in queries}
    for i in range(max(map(len, queries.values()))):
        batch = {query_id: texts[i] for query_id, texts in queries.items() if i < len(texts)}
        for query_id, ranking in retrieve(engine, collection, batch, depth).items():
            rankings[query_id].append(ranking)
    fused: dict[str, Any] = {}
    for query_id, lists in rankings.items():
        fused[query_id] = list(fuse(lists))[:depth] if len(lists) > 1 else lists[0]
    return fused


def save_collection(folder: Path, source: Path, rewritten: dict[str, str]) -> None:
    """Copy a collection in BEIR's layout and replace the texts of the rewritten queries."""
    if not (source / "queries.jsonl").exists():
        raise UserError(f"--to needs a --collection in BEIR's layout, but {source} has no queries.jsonl")
    if folder.exists():
        raise UserError(f"{folder} exists; pass another folder to --to")
    shutil.copytree(source, folder)
    # Not `splitlines`, which also splits at line separators inside strings.
    lines = (source / "queries.jsonl").read_text(encoding="utf-8-sig").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    for row in rows:
        row["text"] = rewritten.get(str(row.get("_id", row.get("id"))), row["text"])
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Rewrite queries with a model and evaluate the rankings.")
    add = parser.add_argument
    add("model", help="model that rewrites: hub name, folder or bundled:smollm2-135m")
    add("--collection", required=True, help="collection with judged queries, as in rlkit eval")
    add("--retriever", default="bm25", help="retriever, as in rlkit eval (default: bm25)")
    add("--drop_query_id", choices=("true", "false"), help="whether to drop the document with the query's id")
    add("--method", choices=METHODS, required=True, help="method of rewriting")
    add("--evaluation_split", default="test", help="split of the queries (default: test)")
    add("-n", "--evaluation_tasks", type=int, metavar="N", help="number of queries (default: all)")
    add("--seed", type=int, default=0, help="seed of the order of queries and of sampling (default: 0)")
    backends = ", ".join(BACKENDS)
    add("--backend", default="transformers", help=f"{backends} or a server's URL (default: transformers)")
    add("--temperature", type=float, default=0.9, help="sampling temperature (default: 0.9)")
    add("--max_tokens", type=int, default=48, help="maximum number of tokens of a reply (default: 48)")
    add("--depth", type=int, default=1000, help="number of documents in a ranking (default: 1000)")
    add("-o", "--out", type=output_file, help="JSON file to write the evaluation to")
    add("--run_file", type=output_file, help="file to write the rankings to, in TREC run format")
    add("--to", type=Path, help="folder to write the rewritten collection to; only with --method context")
    return parser


def main() -> int:
    """Rewrite, rank, score, and print the means."""
    options = build_parser().parse_args(sys.argv[1:])
    if (options.method == "context") != (options.to is not None):
        raise UserError("--method context requires --to, and the other methods do not accept it")
    drop_query_id = None if options.drop_query_id is None else options.drop_query_id == "true"
    collection = open_collection(options.collection, None, 0, drop_query_id)
    queries = judged_queries(collection, options.evaluation_split, options.evaluation_tasks, options.seed)
    model = load_text_model(
        options.model,
        options.backend,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        timeout=BATCH_TIMEOUT_SECONDS,
    )
    query_texts: dict[str, list[str]] = {}
    if options.method == "context":
        rewritten, mean_leakage, mean_word_leakage = rewrite_with_context(
            model, queries, collection, options.seed
        )
        save_collection(options.to, Path(options.collection), rewritten)
        print(
            f"leakage {mean_leakage:.3f}: share of the new queries' trigrams that only the document contains"
        )
        print(f"word leakage {mean_word_leakage:.3f}: share of their new words that the document contains")
        query_texts = {query_id: [text] for query_id, text in rewritten.items()}
    else:
        keywords = generate_keywords(model, queries, options.seed)
        for query in queries:
            if options.method == "ensemble":
                query_texts[query.id] = [ensemble(query.text, keywords[query.id])]
            else:
                query_texts[query.id] = [query.text, *(text for text in keywords[query.id] if text)]
    rankings = rank(collection, options.retriever, query_texts, options.depth)
    if options.run_file:
        write_trec_run(options.run_file, rankings, options.method)
    result = as_evaluation(
        {
            "queries": {query_id: " | ".join(texts) for query_id, texts in query_texts.items()},
            "rankings": rankings,
            "scores": score_rankings(collection, options.evaluation_split, rankings),
        },
        name=options.method,
        model=f"{options.method} {options.model} {options.retriever}",
        arguments={"collection": options.collection},
        split=options.evaluation_split,
        seed=options.seed,
    )
    if options.out:
        result.save(options.out)
    for name, value in result.rewards.items():
        print(f"{name}  {value:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
