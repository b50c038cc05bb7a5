"""Score demonstrations by the probability of the correct answer, as training rows for a retriever of them.

    python scripts/score_demonstrations.py data/metatool --model bundled:smollm2-135m \\
        --retriever dense:bundled:all-minilm-l6-v2 --questions 200 -o demonstrations.jsonl
    rlkit rank configs/ranking/pairs.yaml --environment_args '{"pairs": "demonstrations.jsonl"}' \\
        --model_name_or_path bundled:all-minilm-l6-v2 --adapter_rank 64 --objective distillation \\
        --temperature 0.05 --learning_rate 3e-4 --max_steps 100 --per_device_train_batch_size 32 \\
        --evaluation_tasks 0 -o runs/demonstrations
    rlkit eval MODEL --environment demonstrate-v1 --environment_args.collection data/metatool \\
        --environment_args.retriever dense:runs/demonstrations/model

The questions are training queries. Each gets the first demonstrations of a retriever and some random ones,
and the frozen language model reads each of them alone before the question. If the script is stopped, the same
command resumes. The rows are those of
`rlkit/envs/ranking/pairs/demonstrations.py`.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

import numpy as np

from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.commands.run import run_command
from rlkit.envs.ranking.demonstrate import DemonstrateEnvironment, Example
from rlkit.envs.ranking.pairs.demonstrations import add_random, answer_probabilities, demonstration_rows
from rlkit.envs.ranking.pairs.partial import partial_path, resume, settings_of
from rlkit.envs.ranking.pairs.rows import PairRow, check_output, write_rows
from rlkit.errors import UserError, check_integer

BATCH_SIZE = 8  # questions between two writes of results


def main() -> int:
    """Write one row per question to a file and print what the model prefers."""
    options = build_parser().parse_args(sys.argv[1:])
    check_integer("--questions", options.questions, 1)
    check_integer("--candidates", options.candidates, 1)
    check_integer("--random_candidates", options.random_candidates, 0)
    if options.candidates + options.random_candidates < 2:
        raise UserError("a row needs two demonstrations to compare: increase --candidates")
    check_output(options.out)
    environment = DemonstrateEnvironment(
        collection=options.collection, retriever=options.retriever, folds=options.folds, fold=options.fold
    )
    questions = environment.questions("train", options.seed)[: options.questions]
    rankings = environment.find(questions, options.candidates, options.seed)
    candidates = add_random(environment, questions, rankings, options.random_candidates, options.seed)
    scored = [i for i, examples in enumerate(candidates) if len(examples) > 1]
    if not scored:
        raise UserError("no question has two demonstrations: use another --retriever")
    questions, candidates = [questions[i] for i in scored], [candidates[i] for i in scored]
    targets = score(options, questions, candidates)
    rows = demonstration_rows(questions, candidates, targets, environment.examples.values())
    write_rows(options.out, rows)
    partial_path(options.out).unlink()
    print(describe(rows, [len(rankings[i]) for i in scored]))
    print(f"{len(rows):,} rows: {options.out}")
    return 0


def build_parser() -> CommandParser:
    """Return the parser of the script's options."""
    parser = CommandParser(description="Score demonstrations with a frozen language model.")
    add = parser.add_argument
    add("collection", metavar="COLLECTION", help="collection whose training queries are the demonstrations")
    add("--model", default="bundled:smollm2-135m", help="language model (default: %(default)s)")
    add("--retriever", default="bm25", help="retriever of the first demonstrations, or random (default: "
        "%(default)s)")  # fmt: skip
    add("--candidates", type=int, default=12, metavar="N", help="number of demonstrations from the retriever "
        "per question (default: %(default)s)")  # fmt: skip
    add("--random_candidates", type=int, default=4, metavar="N",
        help="number of additional random demonstrations per question (default: %(default)s)")  # fmt: skip
    add("--questions", type=int, default=200, metavar="N",
        help="maximum number of questions (default: %(default)s)")  # fmt: skip
    add("--folds", type=int, help="number of cross-validation folds of the queries")
    add("--fold", type=int, default=0, help="index of the test fold (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("-o", "--out", type=output_file, required=True, metavar="FILE", help="JSONL file for the rows")
    return parser


def score(
    options: Namespace, questions: Sequence[Example], candidates: Sequence[Sequence[Example]]
) -> list[list[float]]:
    """Return the targets of the candidates of each question, in batches that are saved."""
    import torch
    from trl import ModelConfig

    from rlkit.models.fingerprint import model_fingerprint
    from rlkit.models.load import load_model

    model, tokenizer = load_model(ModelConfig(model_name_or_path=options.model, dtype="float32"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    examples_by_id = {question.id: examples for question, examples in zip(questions, candidates, strict=True)}
    questions_by_id = {question.id: question for question in questions}

    def compute(ids: Sequence[str]) -> dict[str, list[float]]:
        batch = [questions_by_id[name] for name in ids]
        targets = answer_probabilities(model, tokenizer, batch, [examples_by_id[name] for name in ids])
        return dict(zip(ids, targets, strict=True))

    settings = settings_of(options)
    settings["candidates"] = [[example.id for example in examples] for examples in candidates]
    settings["model_files"] = model_fingerprint(options.model)
    results = resume(
        partial_path(options.out),
        settings,
        list(questions_by_id),
        compute,
        batch_size=BATCH_SIZE,
        description="scoring",
    )
    return [results[name] for name in questions_by_id]


def describe(rows: Sequence[PairRow], num_retrieved: Sequence[int]) -> str:
    """Return the mean probability of the answer after the first, the best and the random candidates.

    Args:
        rows: Rows.
        num_retrieved: Number of the retriever's demonstrations in each row; the others are random.
    """
    first = [row.targets[0] for row, number in zip(rows, num_retrieved, strict=True) if number]
    best = np.mean([max(row.targets) for row in rows])
    drawn = [
        target for row, number in zip(rows, num_retrieved, strict=True) for target in row.targets[number:]
    ]
    parts = [f"{best:.3f} after the best candidate"]
    if first:
        parts.insert(0, f"{np.mean(first):.3f} after the retriever's first demonstration")
    if drawn:
        parts.append(f"{np.mean(drawn):.3f} after random ones")
    return f"probability of the answer per token: {', '.join(parts)}"


if __name__ == "__main__":
    raise SystemExit(run_command(main))
