"""Rewrite the queries of a collection with a model, without training, and score what they find.

    python scripts/rewrite_queries.py MODEL --collection data/scifact --method ensemble -o ensemble.json
    python scripts/rewrite_queries.py MODEL --collection data/scifact --method fusion -o fusion.json
    python scripts/rewrite_queries.py MODEL --collection data/scifact --method context \\
        --evaluation_split train --to new
    rlkit eval --compare bm25.json ensemble.json

`ensemble` and `fusion` are GenQREnsemble's; `context` shows the model a relevant document, so it is for
training queries alone (CAR): `--to` writes a collection in BEIR's layout with the new queries of the split,
to train on with `rlkit rank` or `rerank-v1`, and the leakage is printed.
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
from rlkit.envs.ranking.query import fuse
from rlkit.envs.ranking.rewriting import CONTEXT, FORM, KEYWORDS, ensemble, keywords, leakage
from rlkit.errors import UserError
from rlkit.evaluation.rankings import as_evaluation
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.evaluate import score, write_trec
from rlkit.retrieval.queries import Judged, cut, documents_of, judged_queries
from rlkit.retrieval.retrievers import open_retriever, retrieve
from rlkit.rollouts.text_generation import THROUGH, Writer, open_writer

METHODS = ("ensemble", "fusion", "context")
DOCUMENT_WORDS = 150
BLOCK = 64  # texts between two steps of the progress bar


def write(writer: Writer, prompts: Sequence[str], seed: int) -> list[str]:
    """Answers to prompts; raises UserError where one fails."""
    found: list[str] = []
    for start in track(range(0, len(prompts), BLOCK), description="writing"):
        block = prompts[start : start + BLOCK]
        messages = [[{"role": "user", "content": text}] for text in block]
        for one in writer.write(messages, [seed + start + i for i in range(len(block))]):
            if one.error is not None:
                raise UserError(f"{writer.name} failed: {one.error}")
            found.append(one.text)
    return found


def expand(writer: Writer, asked: Sequence[Judged], seed: int) -> dict[str, list[str]]:
    """Keywords for each query, by each instruction."""
    prompts = [FORM.format(instruction=one, query=query.text) for query in asked for one in KEYWORDS]
    texts = iter(write(writer, prompts, seed))
    return {query.id: [keywords(next(texts)) for _ in KEYWORDS] for query in asked}


def with_context(
    writer: Writer, asked: Sequence[Judged], collection: Collection, seed: int
) -> tuple[dict[str, str], float]:
    """A new query for each, with one of its best documents at hand, and the mean leakage."""
    best = {query.id: max(query.grades, key=query.grades.__getitem__) for query in asked}
    documents = documents_of(collection, best.values())
    texts = {
        query.id: f"{documents[best[query.id]].title} {documents[best[query.id]].text}" for query in asked
    }
    prompts = [
        CONTEXT.format(document=cut(texts[query.id], DOCUMENT_WORDS), query=query.text) for query in asked
    ]
    written = [" ".join(text.split()) for text in write(writer, prompts, seed)]
    new = {query.id: text or query.text for query, text in zip(asked, written, strict=True)}
    leaked = [leakage(new[query.id], query.text, texts[query.id]) for query in asked]
    return new, float(np.mean(leaked))


def rank(collection: Collection, retriever: str, queries: dict[str, list[str]], depth: int) -> dict[str, Any]:
    """Rankings of one query each, or of several that are fused."""
    engine = open_retriever(retriever, collection)
    most = max(map(len, queries.values()))
    lists: dict[str, list[list[str]]] = {name: [] for name in queries}
    for i in range(most):
        part = {name: texts[i] for name, texts in queries.items() if i < len(texts)}
        for name, ranking in retrieve(engine, collection, part, depth).items():
            lists[name].append(ranking)
    return {name: fuse(found)[:depth] if len(found) > 1 else found[0] for name, found in lists.items()}


def save_collection(folder: Path, source: Path, new: dict[str, str]) -> None:
    """A copy in BEIR's layout with other texts for some queries."""
    if not (source / "queries.jsonl").exists():
        raise UserError(f"--to copies a folder in BEIR's layout, which {source} is not")
    if folder.exists():
        raise UserError(f"{folder} is there already: name another folder")
    shutil.copytree(source, folder)
    rows = [json.loads(line) for line in (source / "queries.jsonl").read_text().splitlines() if line.strip()]
    lines = [json.dumps(row | {"text": new.get(str(row["_id"]), row["text"])}) for row in rows]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")


def build_parser() -> CommandParser:
    """Build the parser of the script."""
    parser = CommandParser(description="Rewrite queries with a model and score what they find.")
    add = parser.add_argument
    add("model", help="a hub name, a folder or bundled:smollm2-135m")
    add("--collection", required=True, help="as of rlkit eval")
    add("--retriever", default="bm25", help="as of rlkit eval (default: bm25)")
    add("--method", choices=METHODS, required=True)
    add("--evaluation_split", default="test", help="split of the queries (default: test)")
    add("-n", "--evaluation_tasks", type=int, metavar="N", help="number of queries (default: all)")
    add("--seed", type=int, default=0, help="of the queries and of sampling (default: 0)")
    add("--through", default="transformers", help=f"{', '.join(THROUGH)}, or the URL of a server")
    add("--temperature", type=float, default=0.9, help="(default: 0.9)")
    add("--tokens", type=int, default=48, help="of a text at most (default: 48)")
    add("--depth", type=int, default=1000, help="documents of a ranking (default: 1000)")
    add("-o", "--out", type=output_file, help="write the evaluation as JSON")
    add("--run_file", type=output_file, help="write the rankings in TREC's form")
    add("--to", type=Path, help="of context: the folder of the new collection")
    return parser


def main() -> int:
    """Rewrite, rank, score, and print the means."""
    options = build_parser().parse_args(sys.argv[1:])
    if (options.method == "context") != (options.to is not None):
        raise UserError("--to goes with --method context")
    collection = load_collection(options.collection)
    asked = judged_queries(collection, options.evaluation_split, options.evaluation_tasks, options.seed)
    writer = open_writer(
        options.model, options.through, tokens=options.tokens, temperature=options.temperature
    )
    if options.method == "context":
        new, leaked = with_context(writer, asked, collection, options.seed)
        save_collection(options.to, Path(options.collection), new)
        print(f"leakage {leaked:.3f}: share of the new queries' words, by threes, that only the document has")
        queries = {name: [text] for name, text in new.items()}
    else:
        found = expand(writer, asked, options.seed)
        queries = {
            one.id: [ensemble(one.text, found[one.id])]
            if options.method == "ensemble"
            else [one.text, *(text for text in found[one.id] if text)]
            for one in asked
        }
    rankings = rank(collection, options.retriever, queries, options.depth)
    if options.run_file:
        write_trec(options.run_file, rankings, options.method)
    result = as_evaluation(
        {
            "queries": {name: " | ".join(texts) for name, texts in queries.items()},
            "rankings": rankings,
            "scores": score(collection, options.evaluation_split, rankings),
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
