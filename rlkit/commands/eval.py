"""`rlkit eval`: evaluate a model on an environment or retrievers on a collection, or compare results.

rlkit eval runs/a/model --environment causal-v1 -n 400 --samples 8 --temperature 1
rlkit eval --collection data/scifact --retriever bm25 -o bm25.json --run_file bm25.run
rlkit eval --collection data/scifact --retriever bm25 dense:runs/a/model --measures nDCG@10 recall@100
rlkit eval --qrels qrels.txt --retriever a.run b.run
rlkit eval --compare runs/a/evaluation/before.json runs/a/evaluation/after.json
rlkit eval --leaderboard human/*.json --against synthetic/*.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.arguments.bounds import COUNT, check_evaluation, check_number
from rlkit.arguments.command_line import CommandParser, output_file
from rlkit.environment import SPLITS
from rlkit.errors import UserError, check_integer

if TYPE_CHECKING:
    from rlkit.evaluation import Evaluation
    from rlkit.retrieval.collections.base import Collection

DEPTH = 1000  # trec_eval's usual depth of a ranking


def main(argv: Sequence[str]) -> int:
    """Evaluate or compare, print the result, and return the exit code."""
    options = build_parser().parse_args(argv)
    _check(options)
    from rlkit.evaluation import Evaluation, compare, compare_by
    from rlkit.evaluation.rankings import leaderboard_agreement
    from rlkit.evaluation.systems import compare_systems, system_names

    if options.compare:
        evaluations = [Evaluation.load(path) for path in options.compare]
        reward = _canonical_reward(options.reward, evaluations)
        if len(evaluations) == 2:
            result: dict[str, Any] = dict(compare(evaluations[0], evaluations[1], reward))
            result["breakdown"] = {
                column: compare_by(evaluations[0], evaluations[1], column, reward)
                for column, values in evaluations[1].breakdown.items()
                if len(values) > 1
            }
            print(_to_json(result) if options.json else _format_comparison(result))
            return 0
        systems = compare_systems(evaluations, system_names(evaluations, options.compare), reward)
        print(_to_json(systems) if options.json else _format_systems(systems, "tasks"))
        return 0
    if options.leaderboard:
        first = [Evaluation.load(path) for path in options.leaderboard]
        second = [Evaluation.load(path) for path in options.against]
        reward = _canonical_reward(options.reward, [*first, *second])
        agreement = leaderboard_agreement(first, second, reward)
        print(_to_json(agreement) if options.json else _format_agreement(agreement))
        return 0
    if options.retriever:
        _run_retrievers(options)
        return 0
    (out,) = _output_paths("--out", options.out, [""], ".json")
    evaluation = _evaluate_model(options, "evaluation" if out is None else out.stem)
    if out is not None:
        evaluation.save(out)
    print(_to_json(_summary(evaluation)) if options.json else _format_evaluation(evaluation))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that contradict each other or are out of range."""
    if (options.leaderboard is None) != (options.against is None):
        raise UserError("--leaderboard and --against compare two leaderboards; set both or neither")
    if options.compare or options.leaderboard:
        if options.compare and len(options.compare) < 2:
            raise UserError(f"--compare requires at least 2 saved results, not 1 ({options.compare[0]})")
        names = ("model", "environment", "collection", "qrels", "retriever", "measures", "run_file", "out")
        if given := [name for name in names if getattr(options, name)]:
            option = "--compare" if options.compare else "--leaderboard"
            raise UserError(f"{option} reads saved results and cannot be combined with {', '.join(given)}")
        return
    if options.reward:
        raise UserError("--reward requires --compare or --leaderboard; an evaluation reports all rewards")
    if options.collection and options.qrels:
        raise UserError("--collection and --qrels both have judgments; set one of them")
    if options.collection or options.qrels:
        option = "--collection" if options.collection else "--qrels"
        if not options.retriever or options.model or options.environment:
            raise UserError(
                f"{option} requires --retriever and cannot be combined with a model or --environment"
            )
        _check_collection_args(options.environment_args)
    elif options.retriever or options.measures or options.run_file or options.depth != DEPTH:
        raise UserError("--retriever, --measures, --depth and --run_file require --collection or --qrels")
    elif not options.model or not options.environment:
        raise UserError(
            "rlkit eval requires a model and --environment, or --collection (or --qrels) and --retriever, or "
            "--compare, or --leaderboard and --against"
        )
    else:
        _output_paths("--out", options.out, [""], ".json")  # before the heavy imports
    check_number("depth", options.depth, COUNT)
    check_evaluation(vars(options))


def _check_collection_args(args: dict[str, Any]) -> None:
    """Raise UserError for unknown or invalid `environment_args` of a collection."""
    if unknown := sorted(set(args) - {"folds", "fold", "drop_query_id"}):
        raise UserError(
            "with --collection and --qrels, --environment_args takes only folds, fold and drop_query_id, not "
            f"{', '.join(unknown)}"
        )
    if args.get("folds") is not None:
        check_integer("folds", args["folds"], 2)
        check_integer("fold", args.get("fold", 0), 0)
    elif "fold" in args:
        raise UserError("the environment argument fold requires folds, the number of folds")
    if not isinstance(args.get("drop_query_id"), bool | None):
        raise UserError(f"drop_query_id must be true or false, not {args['drop_query_id']!r}")


def build_parser() -> CommandParser:
    """Build the parser of the command."""
    parser = CommandParser(
        prog="rlkit eval",
        description="Evaluate a model on held-out tasks of an environment, or a retriever on a collection; "
        "or compare saved results.",
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model: Hub id, local path or bundled:smollm2-135m")
    add("--environment", metavar="NAME", help="environment: id, package.module:Class or path/file.py:Class")
    parser.add_environment_args()
    add("--evaluation_split", choices=SPLITS, default="test", help="split of the tasks (default: test)")
    add("-n", "--evaluation_tasks", type=int, metavar="N",
        help="number of tasks (default: set by the environment) or queries (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="random seed of tasks and sampling (default: 0)")
    add("--samples", type=int, default=1, metavar="N",
        help="completions per task, for pass@k and avg@k (default: 1)")  # fmt: skip
    add("--temperature", type=float, default=0.0, metavar="T",
        help="sampling temperature; 0 is greedy decoding (default: 0)")  # fmt: skip
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus sampling threshold (default: 1)")
    add("--max_completion_length", type=int, default=512, metavar="TOKENS",
        help="maximum number of completion tokens (default: 512)")  # fmt: skip
    add("--evaluation_batch_size", type=int, default=64, metavar="N",
        help="number of completions per batch (default: 64)")  # fmt: skip
    add("--dtype", default="auto", help="weight dtype: auto, bfloat16, float16 or float32 (default: auto)")
    add("--trust_remote_code", action="store_true", help="allow model code from the Hugging Face Hub")
    add("--fold", metavar="FILE:NAME", help="fold to take the tasks from; see scripts/split_tasks.py")
    add("--collection", metavar="NAME", help="retrieval collection to evaluate the retrievers on; "
        "--environment_args folds and fold select one cross-validation fold, and drop_query_id sets whether "
        "documents with the id of their query are removed (default: as in the benchmark)")  # fmt: skip
    add("--qrels", metavar="FILE", help="relevance judgments to score run files with, without a collection")
    add("--retriever", nargs="+", metavar="NAME",
        help="bm25, bm25:LANGUAGE, dense:MODEL, hybrid:MODEL, 'rerank:FIRST|MODEL@100', docid:MODEL, index "
        "folder, server URL or TREC run file; the others are compared with the first one")  # fmt: skip
    add("--measures", nargs="+", metavar="M",
        help="ranking measures, e.g. nDCG@10 MRR@10 MAP R@100 P@5 hit@10 'RR(rel=2)@10' "
        "(default: ndcg@10 recall@100 rr@10)")  # fmt: skip
    add("--depth", type=int, default=DEPTH, metavar="K",
        help=f"number of documents per ranking (default: {DEPTH})")  # fmt: skip
    add("--run_file", metavar="FILE",
        help="output file for the rankings, in TREC format; a folder for several retrievers")  # fmt: skip
    add("-o", "--out", metavar="FILE.json",
        help="output file for the full result with completions; a folder for several retrievers")  # fmt: skip
    add("--json", action="store_true", help="print the summary as JSON")
    add("--compare", nargs="+", metavar="A.json",
        help="saved results to compare with paired tests against the first one")  # fmt: skip
    add("--leaderboard", nargs="+", metavar="A.json",
        help="saved results of several models on one set of tasks")  # fmt: skip
    add("--against", nargs="+", metavar="B.json",
        help="saved results of the same models on another set; prints Kendall's tau")  # fmt: skip
    add("--reward", metavar="NAME", help="reward to compare (default: the environment's metric)")
    return parser


def _output_paths(option: str, name: str | None, stems: Sequence[str], suffix: str) -> list[Path | None]:
    """Return the output file of each result: the named file, or one for each stem in the named folder.

    Raises:
        UserError: There are several results and the name is that of a file, or a file cannot be written.
    """
    if name is None:
        return [None] * len(stems)
    is_folder = name.endswith(("/", os.sep)) or Path(name).is_dir()
    try:
        if len(stems) == 1 and not (is_folder and stems[0]):
            return [output_file(name)]
        if not is_folder and (Path(name).exists() or Path(name).suffix == suffix):
            raise UserError(f"{option} must be a folder for {len(stems)} retrievers, not {name}")
        return [output_file(str(Path(name) / f"{stem}{suffix}")) for stem in stems]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{option}: {error}") from None


def _check_not_overwritten(
    options: argparse.Namespace, retrievers: Sequence[str], outputs: Sequence[Path | None]
) -> None:
    """Raise UserError if an output file is also an input file, or is written twice."""
    from rlkit.retrieval.evaluate import RUN_PREFIX

    names = [name.removeprefix(RUN_PREFIX) for name in retrievers if name.startswith(RUN_PREFIX)]
    names += [name for name in (options.qrels, options.collection) if name]
    used = {Path(name).expanduser().resolve() for name in names}
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in used:
            raise UserError(f"{path} is read or written already; give --out and --run_file another name")
        used.add(path.resolve())


def _evaluate_model(options: argparse.Namespace, name: str) -> Evaluation:
    from rlkit.evaluation.model import evaluate_model

    keys = (
        "environment_args", "evaluation_split", "evaluation_tasks", "evaluation_batch_size", "fold", "seed",
        "samples", "temperature", "top_p", "max_completion_length", "dtype", "trust_remote_code",
    )  # fmt: skip
    arguments = {key: getattr(options, key) for key in keys}
    return evaluate_model(options.model, options.environment, name=name, **arguments)


def _run_retrievers(options: argparse.Namespace) -> None:
    """Evaluate each retriever, save its result as soon as there is one, and print the means and tests."""
    from rlkit.evaluation.rankings import evaluate_rankings, file_stems
    from rlkit.evaluation.systems import check_distinct, compare_systems
    from rlkit.retrieval.evaluate import MEASURES, canonical_measures, canonical_retriever

    measures = canonical_measures(options.measures or MEASURES)
    retrievers = [canonical_retriever(name) for name in options.retriever]
    check_distinct(retrievers)
    stems = file_stems(retrievers)
    outs = _output_paths("--out", options.out, stems, ".json")
    run_files = _output_paths("--run_file", options.run_file, stems, ".run")
    _check_not_overwritten(options, retrievers, [*outs, *run_files])
    collection, arguments = _open_collection(options, retrievers)
    evaluations = []
    for retriever, stem, out, run_file in zip(retrievers, stems, outs, run_files, strict=True):
        name = stem if len(retrievers) > 1 else "evaluation"
        evaluation = evaluate_rankings(
            collection,
            retriever,
            name=name if out is None else out.stem,
            arguments=arguments,
            split=options.evaluation_split,
            n=options.evaluation_tasks,
            seed=options.seed,
            measures=measures,
            depth=options.depth,
            run_file=run_file,
            suggest_drop_query_id=arguments.get("drop_query_id") is None,
        )
        if out is not None:
            evaluation.save(out)
        evaluations.append(evaluation)
    if len(evaluations) == 1:
        print(_to_json(_summary(evaluations[0])) if options.json else _format_evaluation(evaluations[0]))
    else:
        systems = compare_systems(evaluations, retrievers)
        if options.json:
            print(_to_json([_summary(evaluation, systems) for evaluation in evaluations]))
        else:
            print(_format_systems(systems, f"queries, {options.evaluation_split}"))
    if not options.json:
        # `open_collection` has logged the notes of the collection.
        for line in _format_notes(evaluations, skip=len(collection.notes)):
            print(line)


def _open_collection(
    options: argparse.Namespace, retrievers: Sequence[str]
) -> tuple[Collection, dict[str, Any]]:
    """Return the judged queries and documents, and what results record about them.

    Raises:
        UserError: They cannot be loaded, or a retriever needs documents that `--qrels` does not have.
    """
    from rlkit.retrieval.evaluate import RUN_PREFIX, open_qrels
    from rlkit.retrieval.queries import open_collection

    args = options.environment_args
    if options.collection:
        collection = open_collection(
            options.collection, args.get("folds"), args.get("fold", 0), args.get("drop_query_id")
        )
        return collection, {"collection": options.collection, **args}
    for retriever in retrievers:
        if not retriever.startswith(RUN_PREFIX):
            raise UserError(
                f"with --qrels, --retriever must be run files, but there is no file {retriever!r}; other "
                "retrievers need the documents of a --collection"
            )
    collection = open_qrels(
        Path(options.qrels), args.get("folds"), args.get("fold", 0), args.get("drop_query_id")
    )
    return collection, {"qrels": options.qrels, **args}


def _canonical_reward(reward: str | None, evaluations: Sequence[Evaluation]) -> str | None:
    """Return the name under which results have a reward: "rr@10" for "MRR@10" if it is a measure."""
    from rlkit.retrieval.measures import canonical_measure

    if reward is None or any(reward in evaluation.rewards for evaluation in evaluations):
        return reward
    try:
        measure = canonical_measure(reward)
    except ValueError:
        return reward
    return measure if any(measure in evaluation.rewards for evaluation in evaluations) else reward


def _to_json(value: object) -> str:
    """Return JSON on one line. The interval of a single task has no bounds, which are written as null."""
    from rlkit.evaluation.result import without_nan

    return json.dumps(without_nan(value))


def _summary(evaluation: Evaluation, systems: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of an evaluation except those with an entry per task or completion.

    With several `systems`, `tests` has the tests of this one against the baseline.
    """
    summary = {
        key: value for key, value in asdict(evaluation).items() if key not in ("scores", "completions")
    }
    if systems is not None:
        summary["tests"] = [test for test in systems["tests"] if test["system"] == evaluation.model]
    return summary


def _format_evaluation(evaluation: Evaluation) -> str:
    a = evaluation.accuracy
    is_retriever = evaluation.environment == "collection"
    unit = "queries" if is_retriever else "tasks"
    lines = [
        f"{evaluation.metric}  {a.mean:.3f}  [{a.low:.3f}, {a.high:.3f}]  ({a.n} {unit}, {evaluation.split})"
    ]
    if is_retriever:
        others = (name for name in evaluation.rewards if name != evaluation.metric)
        return "\n".join([*lines, *(f"{name}  {evaluation.rewards[name]:.3f}" for name in others)])
    if evaluation.samples > 1:
        for label, values in (("pass", evaluation.pass_at), ("avg", evaluation.avg_at)):
            lines.append("  ".join(f"{label}@{k} {value:.3f}" for k, value in values.items()))
    lines.append(
        f"length {evaluation.length:.1f} tokens, truncated {evaluation.truncated:.1%}, "
        f"invalid {evaluation.invalid}"
    )
    lines += [f"reward {name}  {value:.3f}" for name, value in evaluation.rewards.items()]
    for column, groups in evaluation.breakdown.items():
        for value, group in groups.items():
            interval = f"[{group.low:.3f}, {group.high:.3f}]"
            lines.append(f"{column} = {value}: {group.mean:.3f}  {interval}  ({group.n} tasks)")
    return "\n".join(lines)


def _format_systems(result: dict[str, Any], unit: str) -> str:
    """Return a table of the means of systems, and one of the tests against the baseline."""
    rewards = list(result["n"])
    rows = [["", *rewards]]
    for system in result["systems"]:
        means = [system["means"][reward] for reward in rewards]
        best = [max(other["means"][reward] for other in result["systems"]) for reward in rewards]
        cells = [f"{mean:.3f}{'*' if mean == top else ' '}" for mean, top in zip(means, best, strict=True)]
        rows.append([system["name"], *cells])
    numbers = [f"{n} " for n in result["n"].values()]
    if len(set(numbers)) > 1:
        rows.append([unit, *numbers])
    lines = _align(rows)
    lines.append(f"({'' if len(set(numbers)) > 1 else numbers[0]}{unit}; * is the highest mean)")
    tests = [["", "", "difference", "95% interval", "p", "corrected p"]]
    for test in result["tests"]:
        interval = f"[{test['low']:+.3f}, {test['high']:+.3f}]"
        p_values = [f"{test[key]:.3g}" for key in ("p", "corrected_p")]
        tests.append([test["system"], test["reward"], f"{test['difference']:+.3f}", interval, *p_values])
    title = (
        f"differences from {result['baseline']}: paired permutation tests, and p corrected by Holm's method "
        f"(tests: {len(result['tests'])})"
    )
    return "\n".join([*lines, "", title, *_align(tests)])


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, with its first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def _format_notes(evaluations: Sequence[Evaluation], skip: int) -> list[str]:
    """Return the notes of all evaluations without the first `skip`, and each one that all share only once."""
    notes = [list(evaluation.notes[skip:]) for evaluation in evaluations]
    common = [note for note in notes[0] if all(note in others for others in notes)]
    lines = list(common)
    for evaluation, own_notes in zip(evaluations, notes, strict=True):
        lines += [f"{evaluation.model}: {note}" for note in own_notes if note not in common]
    return lines


def _format_agreement(result: dict[str, Any]) -> str:
    lines = [f"{first:.3f}  {second:.3f}  {name}" for name, first, second in result["systems"]]
    return "\n".join([*lines, f"Kendall's tau {result['tau']:.3f}, p = {result['p']:.3g}"])


def _format_comparison(result: dict[str, Any]) -> str:
    lines = [f"{_format_difference(result)}, paired permutation p = {result['p']:.3g}"]
    for column, groups in result["breakdown"].items():
        for value, group in groups.items():
            p_values = f"p = {group['p']:.3g}, corrected p = {group['corrected_p']:.3g}"
            lines.append(f"{column} = {value}: {_format_difference(group)}, {p_values}")
    return "\n".join(lines)


def _format_difference(result: dict[str, Any]) -> str:
    difference = (
        f"{result['before']:.3f} -> {result['after']:.3f} on {result['n']} tasks: difference "
        f"{result['difference']:+.3f}"
    )
    if not math.isfinite(result["low"]):  # of a single task
        return difference
    return f"{difference} [{result['low']:+.3f}, {result['high']:+.3f}]"
