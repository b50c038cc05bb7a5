"""Make the data on which a search simulator is tuned, from rollouts on a real engine.

    python scripts/build_simulator_data.py runs/search -o runs/simulator.jsonl
    rlkit sft --environment simulator-v2 --environment_args.data runs/simulator.jsonl ...

Each search of a rollout is a row. Whether its documents count as useful or as noise is decided by the
rollout's answer (`--label answer`, right or wrong), or by whether an accepted one stands in them.
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
from rlkit.rewards.qa import extract_answer
from rlkit.rewards.simulation import holds_answer
from rlkit.runs.record import RolloutFiles

QUESTION = re.compile(r"Question: (.+?)\s*$", re.DOTALL)


def examples(rollout: Mapping[str, Any], label: str) -> Iterator[Example]:
    """The searches of one rollout; none of one that is invalid, or of a simulated engine."""
    asked = QUESTION.search(rollout["prompt"])
    answer = extract_answer(rollout["answer"])
    if rollout["invalid"] is not None or asked is None or not answer:
        return
    right = (rollout["rewards/f1"] or 0.0) >= 1
    for turn in rollout["turns"]:
        found = turn.get("documents")
        if turn["role"] == "assistant" or found is None or not len(found) or turn.get("label"):
            continue
        text = results_text(turn["content"])
        useful = holds_answer(text, [answer]) if label == "documents" else right
        yield Example(asked[1], [answer], turn["query"], text, "useful" if useful else "noisy")


def read_rollouts(runs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The training rollouts of runs.

    Raises:
        UserError: a folder without rollouts, or rollouts of another environment.
    """
    for run in runs:
        files = RolloutFiles(run)
        for step, file in files.files.items():
            if not {"rewards/f1", "turns"} <= set(files.columns(step)):
                raise UserError(f"{file} has no rollouts of search-v2 in several turns")
            yield from files.read(step)


def main() -> int:
    """Write the file, and print how many examples of each label it has."""
    parser = CommandParser(
        prog="build_simulator_data.py", description="Make data for a search simulator from rollouts."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("-o", "--out", type=output_file, required=True, help="JSONL file")
    parser.add_argument("--label", choices=("answer", "documents"), default="answer", help="%(default)s")
    options = parser.parse_args(sys.argv[1:])
    found = {
        (one.question, one.query, one.label): one
        for rollout in read_rollouts(options.runs)
        for one in examples(rollout, options.label)
    }
    if not found:
        raise UserError("there is no search of a valid rollout in these runs")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("".join(json.dumps(one.as_row()) + "\n" for one in found.values()))
    for label in ("useful", "noisy"):
        rows = [one for one in found.values() if one.label == label]
        holding = sum(holds_answer(one.documents, one.answers) for one in rows)
        print(f"{len(rows):,} {label}, {holding / max(len(rows), 1):.0%} of them hold the answer")
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
