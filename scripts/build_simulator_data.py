"""Build training data for a search simulator from rollouts on a real engine.

    python scripts/build_simulator_data.py runs/search -o runs/simulator.jsonl
    rlkit sft --environment simulator-v3 --environment_args.data runs/simulator.jsonl ...

Each search of a rollout becomes a row, whose documents are labeled useful or noisy. With `--label answer`,
they are useful if the rollout's final answer is correct. With `--label documents`, they are useful if they
contain the task's reference answer.

A run that has not computed F1 or exact match is scored by F1 with the reference answer, the only accepted one
that rollouts are saved with.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.search.protocol import results_text
from rlkit.envs.simulator.examples import Example
from rlkit.errors import UserError
from rlkit.rewards.qa import extract_answer, f1
from rlkit.rewards.search import split_results
from rlkit.rewards.simulation import holds_answer, requested_documents, split_documents
from rlkit.runs.record import RolloutFiles

QUESTION = re.compile(r"Question: (.+?)\s*$", re.DOTALL)


def examples(rollout: Mapping[str, Any], label: str) -> Iterator[Example]:
    """Yield the searches of a rollout, except those of an invalid rollout and of a simulated engine."""
    question = QUESTION.search(rollout["prompt"])
    answer = extract_answer(rollout["answer"] or "")  # the reference answer of the task
    if rollout["invalid"] is not None or question is None or not answer:
        return
    is_correct = _is_correct(rollout, answer)
    for turn in rollout["turns"]:
        document_ids = turn.get("documents")
        is_search_result = turn["role"] != "assistant" and document_ids is not None and len(document_ids) > 0
        if not is_search_result or turn.get("label"):  # only a simulated engine labels its results
            continue
        for query, passages in split_results(turn):
            text = results_text(passages)
            # A tool message that cannot be split has several queries, one per line.
            if not text or (turn["role"] == "tool" and "\n" in query):
                continue
            useful = holds_answer(text, [answer]) if label == "documents" else is_correct
            yield Example(question[1], [answer], query, with_texts(text), "useful" if useful else "noisy")


def _is_correct(rollout: Mapping[str, Any], answer: str) -> bool:
    """Return whether the final answer of a rollout is right, by a reward of the run that compares answers."""
    for name in ("rewards/f1", "rewards/exact_match"):
        if rollout.get(name) is not None:
            return rollout[name] >= 1
    return f1(rollout["completion"], [answer]) >= 1


def with_texts(documents: str) -> str:
    """Return search results in which documents that are all title are `Doc 1: text`.

    Search-R1's form has the first line of a document without a title as its title. As an example of what a
    simulator should write, that would be a title without a document.
    """
    parts = split_documents(documents)
    if len(requested_documents(documents)) == len(parts):
        return documents
    lines = []
    for i, (title, body) in enumerate(parts, 1):
        lines.append(f'Doc {i}(Title: "{title}") {body}' if title else f"Doc {i}: {body}")
    return "\n".join(lines)


def read_rollouts(runs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the training rollouts of runs.

    Raises:
        UserError: A folder has no rollouts, or they are of another environment.
    """
    for run in runs:
        files = RolloutFiles(run)
        for step, file in files.files.items():
            if "turns" not in files.columns(step):
                raise UserError(f"{file} has no rollouts of several turns; pass runs of search-v3")
            yield from files.read(step)


def main() -> int:
    """Write the examples to a file, and print the number of each label."""
    parser = CommandParser(
        prog="build_simulator_data.py",
        description="Build training data for a search simulator from rollouts.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("-o", "--out", type=output_file, required=True, help="JSONL file to write")
    parser.add_argument(
        "--label",
        choices=("answer", "documents"),
        default="answer",
        help="documents are useful if the final answer is correct (answer), or if they contain the reference "
        "answer (documents) (default: answer)",
    )
    options = parser.parse_args(sys.argv[1:])
    # Rollouts of the same task repeat searches; the last example of each key is written.
    unique_examples: dict[tuple[str, str, str], Example] = {}
    for rollout in read_rollouts(options.runs):
        for example in examples(rollout, options.label):
            unique_examples[example.question, example.query, example.label] = example
    if not unique_examples:
        raise UserError(
            "no valid rollout of these runs has a search with results of a real engine; pass other runs of"
            " search-v3"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(example.as_row()) + "\n" for example in unique_examples.values()]
    options.out.write_text("".join(lines))
    for label in ("useful", "noisy"):
        labeled = [example for example in unique_examples.values() if example.label == label]
        num_with_answer = sum(holds_answer(example.documents, example.answers) for example in labeled)
        share = num_with_answer / max(len(labeled), 1)
        print(f"{len(labeled):,} {label}, {share:.0%} of them contain the answer")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
