"""Agreement of a reward with labels of completions: `rlkit check --agreement`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rlkit.check.agreement import read_items
from rlkit.environment import Environment
from rlkit.errors import UserError, nearest
from rlkit.evaluation.statistics import Interval, accuracy_interval
from rlkit.reward import COMPUTED_COLUMNS, Reward, RewardCall, Row, single_turn_row
from rlkit.scoring import RewardRunner, check_columns, load_rewards

MAX_CLASSES = 6  # more classes make a confusion table too wide to read
MAX_REASONS = 3  # invalid rows that are printed with their reasons
THIRDS = ("shortest", "middle", "longest")
# Decimals at which scores are compared, so that 0.3 - 0.2 equals 0.2 - 0.1.
DECIMALS = 9


@dataclass(frozen=True)
class LengthBias:
    """Scores and labels of a third of the rows, ordered by the length of the completion.

    Attributes:
        third: "shortest", "middle" or "longest".
        n: Number of rows.
        min_characters: Length of the shortest completion in characters.
        max_characters: Length of the longest completion in characters.
        mean_label: Mean label.
        mean_score: Mean score.
        bias: Mean of score - label.
    """

    third: str
    n: int
    min_characters: int
    max_characters: int
    mean_label: float
    mean_score: float
    bias: float


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, and the p value for the hypothesis that there is none."""

    rho: float
    p_value: float


@dataclass(frozen=True)
class LabelAgreement:
    """Result of comparing a reward with labels.

    Attributes:
        reward: Name of the reward.
        num_rows: Number of labeled rows.
        num_scored: Number of rows with a score; the statistics below are of these rows.
        num_not_applicable: Number of rows for which the reward returned None.
        num_out_of_range: Number of scores below 0 or above 1.
        invalid: Rows on which the reward failed, as `{"line": int, "reason": str}`.
        classes: The `K` classes in ascending order.
        accuracy: Share of scores in the class of their label, or None if there are no scores.
        kappa: Cohen's kappa, or None if it is undefined.
        confusion: (K, K) number of rows by class of the label and class of the score; None if K is above
            `MAX_CLASSES`.
        length_bias: Bias of the shortest, middle and longest third of the completions.
        length_correlation: Correlation of score - label with the length, or None if it is undefined.
        undefined: Why `kappa` or `length_correlation` is undefined, by its name.
    """

    reward: str
    num_rows: int
    num_scored: int
    num_not_applicable: int
    num_out_of_range: int
    invalid: list[dict[str, Any]]
    classes: list[float]
    accuracy: Interval | None
    kappa: float | None
    confusion: list[list[int]] | None
    length_bias: list[LengthBias]
    length_correlation: Correlation | None
    undefined: dict[str, str]

    def __str__(self) -> str:
        """Format the result for the terminal."""
        lines = [
            f"{self.reward}: {self.num_scored} of {self.num_rows} rows scored, {len(self.invalid)} invalid, "
            f"{self.num_not_applicable} where the reward does not apply"
        ]
        lines += [f"  line {item['line']}: {item['reason']}" for item in self.invalid[:MAX_REASONS]]
        if len(self.invalid) > MAX_REASONS:
            lines.append(f"  and {len(self.invalid) - MAX_REASONS} more")
        if self.num_out_of_range:
            lines.append(
                f"scores outside 0 to 1: {self.num_out_of_range}; the bias compares different scales"
            )
        if self.accuracy is None:
            return "\n".join(lines)
        interval = f"95% interval {self.accuracy.low:.3f} to {self.accuracy.high:.3f}"
        lines += ["", f"accuracy       {self.accuracy.mean:.3f} ({interval})"]
        kappa = self._undefined("kappa") if self.kappa is None else f"{self.kappa:.3f}"
        lines += [f"Cohen's kappa  {kappa}", *self._confusion_lines(), *self._length_lines()]
        return "\n".join(lines)

    def _undefined(self, name: str) -> str:
        return f"undefined: {self.undefined[name]}"

    def _confusion_lines(self) -> list[str]:
        if self.confusion is None:
            return []
        names = [f"{value:.3g}" for value in self.classes]
        lines = ["", "rows by label and score", "label \\ score" + "".join(f"{name:>8}" for name in names)]
        for name, counts in zip(names, self.confusion, strict=True):
            lines.append(f"{name:>13}" + "".join(f"{count:8}" for count in counts))
        return lines

    def _length_lines(self) -> list[str]:
        lines = ["", "completions       n      characters   label   score    bias"]
        for row in self.length_bias:
            characters = f"{row.min_characters}-{row.max_characters}"
            lines.append(
                f"{row.third:13}{row.n:6}{characters:>16}{row.mean_label:8.3f}{row.mean_score:8.3f}"
                f"{row.bias:+8.3f}"
            )
        correlation = self.length_correlation
        if correlation is None:
            value = self._undefined("length_correlation")
        else:
            value = f"{correlation.rho:+.3f} (p = {correlation.p_value:.2g})"
        return [*lines, f"Spearman's correlation of (score - label) with length: {value}"]


def label_agreement(
    environment: Environment,
    path: str,
    reward: str = "judge",
    reward_args: Mapping[str, Mapping[str, Any] | None] | None = None,
    *,
    max_concurrent: int | None = None,
    time_limit: float = 10.0,
) -> LabelAgreement:
    """Score the completions of a JSONL file with a reward, and compare the scores with the labels.

    Each row has `completion`, `label` (a number from 0 to 1, true or false) and the columns that the reward
    reads. The label itself is not passed to the reward.

    Args:
        environment: Environment whose rewards `reward` may name.
        path: JSONL file with the labeled rows.
        reward: Name of the reward, as in the key `rewards` of a config.
        reward_args: Keyword arguments by the name of the reward, as in the key `reward_args`.
        max_concurrent: Maximum number of concurrent calls. None uses the defaults of `RewardRunner`.
        time_limit: Seconds for one call, unless the reward has a `time_limit` of its own.

    Raises:
        UserError: The file is missing, empty or not JSONL, a row is malformed or lacks a column, or the
            reward cannot be loaded or does not score rows one by one.
        RewardError: A worker could not load the reward.
    """
    items = _read_rows(path)
    name, function = _load_reward(environment, reward, reward_args or {})
    _check_rows(items, path, name, function)
    rows = [_reward_row(item) for item in items.values()]
    labels = np.array([float(item["label"]) for item in items.values()])
    is_async = RewardCall(function).is_async
    runner = RewardRunner(
        {name: function},
        time_limit,
        # An async reward has a single worker for all its calls; others need one worker for each.
        num_workers=1 if is_async else max_concurrent or 1,
        max_concurrent={} if max_concurrent is None else {name: max_concurrent},
    )
    with runner:
        scores = runner(rows, group_size=1)
    invalid = [
        {"line": line, "reason": reason}
        for line, reason in zip(items, scores.invalid, strict=True)
        if reason is not None
    ]
    lengths = np.array([len(row["completion"]) for row in rows])
    return _compare(name, labels, scores.values[:, 0], lengths, invalid)


def cohens_kappa(confusion: ArrayLike) -> float | None:
    """Return Cohen's kappa (p_o - p_e) / (1 - p_e) of a (K, K) table of counts.

    p_o is the observed agreement, and p_e the one expected of independent ratings with the same marginals.
    It is None if the table is empty or all counts are in one row: agreement with a constant label cannot be
    told from chance.
    """
    table = np.asarray(confusion, dtype=float)
    total = table.sum()
    row_sums, column_sums = table.sum(axis=1), table.sum(axis=0)
    if np.count_nonzero(row_sums) < 2:
        return None
    observed = np.trace(table) / total
    expected = row_sums @ column_sums / total**2
    return float((observed - expected) / (1 - expected))


def nearest_class(scores: ArrayLike, classes: ArrayLike) -> NDArray[np.intp]:
    """Return the index of the class nearest to each score; a score halfway between two gets the higher one.

    Args:
        scores: Scores, shape (n,).
        classes: Values of the classes in ascending order, shape (K,).
    """
    values = np.asarray(classes, dtype=float)
    # Rounded, since (0.1 + 0.2) / 2 is greater than 0.15.
    thresholds = np.round((values[1:] + values[:-1]) / 2, DECIMALS)
    return np.searchsorted(thresholds, np.round(np.asarray(scores, dtype=float), DECIMALS), side="right")


def _read_rows(path: str) -> dict[int, Row]:
    """Return the labeled rows of a file by line number."""
    items: dict[int, Row] = {}
    for line, item in read_items(path):
        problem = _row_problem(item)
        if problem:
            raise UserError(f"{path}:{line}: {problem}")
        items[line] = item
    if not items:
        raise UserError(f"{path} has no rows")
    return items


def _row_problem(item: Row) -> str | None:
    """Return what is wrong with a labeled row, or None."""
    for column in ("completion", "label"):
        if column not in item:
            return f"there is no {column!r}{nearest(column, item)}"
    completion, label, prompt = item["completion"], item["label"], item.get("prompt", "")
    if not isinstance(completion, str):
        return f"'completion' must be a string, not {completion!r:.80}"
    # NaN, which json.loads accepts, is not in the range.
    if not isinstance(label, int | float) or not 0 <= label <= 1:
        return f"'label' must be a number from 0 to 1, true or false, not {label!r:.80}"
    if not isinstance(prompt, str) and not _is_chat(prompt):
        return (
            f"'prompt' must be a string or a list of messages with 'role' and 'content', not {prompt!r:.80}"
        )
    return None


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )


def _load_reward(
    environment: Environment, name: str, arguments: Mapping[str, Mapping[str, Any] | None]
) -> tuple[str, Reward]:
    """Return a reward and the name under which it is logged."""
    for key in arguments:
        if key != name:  # load_rewards would accept arguments of the metric, which does not run
            raise UserError(f"reward_args has arguments for {key!r}, but the reward is {name!r}")
    rewards, _ = load_rewards([name], environment, arguments=arguments)
    logged_name, reward = next(iter(rewards.items()))  # the metric comes last
    if RewardCall(reward).scope == "group":
        raise UserError(f"reward {name!r} compares the rollouts of a task, but labels are of single rollouts")
    return logged_name, reward


def _check_rows(items: Mapping[int, Row], path: str, name: str, reward: Reward) -> None:
    """Check that each row has the columns that the reward requires."""
    required = set(RewardCall(reward).required) - {"turns"}  # `_reward_row` adds it
    for column in sorted(required.intersection(COMPUTED_COLUMNS)):
        raise UserError(f"reward {name!r} reads {column!r}, which only the rollout of a model has")
    if "label" in required:
        raise UserError(
            f"reward {name!r} needs a column 'label', but 'label' in {path} is the score that it should give"
        )
    for line, item in items.items():
        for column in sorted(required - item.keys()):
            hint = nearest(column, item.keys() - {"label"})
            raise UserError(f"{path}:{line}: reward {name!r} needs a column {column!r}{hint}")
        try:
            check_columns({name: reward}, item)  # for reserved names
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from error


def _reward_row(item: Row) -> dict[str, Any]:
    """Return the row that the reward reads. It has no label, which a judge might copy."""
    columns = {key: value for key, value in item.items() if key != "label"}
    return single_turn_row(columns, item["completion"])


def _compare(
    name: str,
    labels: NDArray[np.float64],
    scores: NDArray[np.float64],
    lengths: NDArray[np.int64],
    invalid: list[dict[str, Any]],
) -> LabelAgreement:
    """Compute the statistics of scores, which are NaN for rows without one; all arrays have shape (rows,)."""
    is_scored = ~np.isnan(scores)
    classes = _classes(labels)
    num_rows, num_scored = len(labels), int(is_scored.sum())
    labels, scores, lengths = labels[is_scored], scores[is_scored], lengths[is_scored]
    label_class, score_class = nearest_class(labels, classes), nearest_class(scores, classes)
    confusion = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(confusion, (label_class, score_class), 1)
    undefined: dict[str, str] = {}
    kappa = cohens_kappa(confusion)
    if kappa is None:
        undefined["kappa"] = f"all labels are {labels[0]:g}" if num_scored else "there are no scores"
    correlation = _length_correlation(labels, scores, lengths)
    if isinstance(correlation, str):
        undefined["length_correlation"] = correlation
    return LabelAgreement(
        reward=name,
        num_rows=num_rows,
        num_scored=num_scored,
        num_not_applicable=num_rows - num_scored - len(invalid),
        num_out_of_range=int(((scores < 0) | (scores > 1)).sum()),
        invalid=invalid,
        classes=classes,
        accuracy=accuracy_interval(label_class == score_class) if num_scored else None,
        kappa=kappa,
        confusion=confusion.tolist() if len(classes) <= MAX_CLASSES else None,
        length_bias=_length_bias(labels, scores, lengths),
        length_correlation=None if isinstance(correlation, str) else correlation,
        undefined=undefined,
    )


def _classes(labels: NDArray[np.float64]) -> list[float]:
    """Return the distinct labels in ascending order."""
    classes = np.unique(labels)
    if len(classes) == 1:
        # With a single class, every score would agree.
        classes = np.unique([*classes, 0.0, 1.0])
    return classes.tolist()


def _length_bias(
    labels: NDArray[np.float64], scores: NDArray[np.float64], lengths: NDArray[np.int64]
) -> list[LengthBias]:
    """Return the bias by thirds of the rows; with fewer than three rows, some thirds are missing."""
    rows = []
    order = np.argsort(lengths, kind="stable")
    for third, indices in zip(THIRDS, np.array_split(order, len(THIRDS)), strict=True):
        if not len(indices):
            continue
        rows.append(
            LengthBias(
                third=third,
                n=len(indices),
                min_characters=int(lengths[indices].min()),
                max_characters=int(lengths[indices].max()),
                mean_label=float(labels[indices].mean()),
                mean_score=float(scores[indices].mean()),
                bias=float((scores - labels)[indices].mean()),
            )
        )
    return rows


def _length_correlation(
    labels: NDArray[np.float64], scores: NDArray[np.float64], lengths: NDArray[np.int64]
) -> Correlation | str:
    """Return the correlation of score - label with the length, or why it is undefined."""
    if len(labels) < 3:
        return "fewer than 3 rows have a score"
    differences = np.round(scores - labels, DECIMALS)
    if differences.min() == differences.max():
        return "score - label is the same in all rows"
    if lengths.min() == lengths.max():
        return "all completions have the same length"
    result = stats.spearmanr(differences, lengths)
    return Correlation(float(result.statistic), float(result.pvalue))
