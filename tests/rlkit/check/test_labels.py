"""Statistics against scikit-learn, SciPy and values worked out by hand; the command end to end."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from rlkit.check.labels import cohens_kappa, label_agreement, nearest_class
from rlkit.commands.check import build_parser, main
from rlkit.errors import UserError
from rlkit.evaluation.statistics import accuracy_interval
from rlkit.registry import REWARDS, load_environment

REWARD_FILE = '''
import asyncio

from rlkit.errors import UserError


def length(completion, prompt, scale: float = 10.0):
    """Score that grows with the length of the completion."""
    if completion == "crash":
        raise ValueError("the judge has no answer")
    if completion == "skip":
        return None
    return len(completion) / scale


async def concurrent(completion, turns):
    await asyncio.sleep(0)
    assert turns == [{"role": "assistant", "content": completion}]
    return float(len(completion) > 5)


def batch(completions, answer, **columns):
    """A TRL reward function."""
    assert "label" not in columns
    return [float(c == a) for c, a in zip(completions, answer)]


def hang(completion):
    import time

    while completion == "hang":
        time.sleep(0.01)
    return 1.0


class Judge:
    def __init__(self, model, url="http://localhost", options=None):
        self.score = {"good": 1.0, "bad": 0.0}[model]
        assert options in (None, {"seed": 3})

    async def __call__(self, prompt, completion, **columns):
        assert "label" not in columns
        return self.score


def group(group):
    return [0.0 for _ in group]


def reads_label(completion, label):
    return label


def reads_correct(completion, correct):
    return correct


def reads_ids(completion_ids):
    return len(completion_ids)
'''


@pytest.fixture
def rewards(tmp_path):
    """Return the path of a file with rewards."""
    file = tmp_path / "my_rewards.py"
    file.write_text(REWARD_FILE)
    return str(file)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes rows, or strings as they are, to a JSONL file and returns its path."""

    def write_rows(*rows):
        file = tmp_path / "labeled.jsonl"
        file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
        return str(file)

    return write_rows


@pytest.fixture
def agree(write, rewards):
    """Return a function that compares the scores of a reward in the file with the labels of rows."""

    def score_rows(*rows, reward="length"):
        return label_agreement(load_environment("causal-v1"), write(*rows), f"{rewards}:{reward}")

    return score_rows


def row(completion, label, **columns):
    return {"prompt": "How long?", "completion": completion, "label": label, **columns}


LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=40)


@given(LABELS)
def test_kappa_equals_that_of_scikit_learn(pairs):
    labels, scores = np.array(pairs).T
    confusion = np.zeros((4, 4))
    np.add.at(confusion, (labels, scores), 1)
    if len(set(labels)) == 1:
        assert cohens_kappa(confusion) is None
    else:
        assert cohens_kappa(confusion) == pytest.approx(cohen_kappa_score(labels, scores))


@pytest.mark.parametrize(
    ("confusion", "kappa"),
    [
        ([[20, 5], [10, 15]], 0.4),  # p_o = 35/50, p_e = (25 * 30 + 25 * 20) / 2500 = 0.5
        ([[3, 0], [0, 3]], 1.0),
        ([[0, 3], [3, 0]], -1.0),
        ([[0, 2], [0, 2]], 0.0),  # constant scores agree as often as chance
        ([[2, 0, 0], [0, 1, 1], [0, 0, 2]], 0.75),  # p_o = 5/6, p_e = (2 * 2 + 2 * 1 + 2 * 3) / 36 = 1/3
        ([[2, 3], [0, 0]], None),
        ([[5, 0], [0, 0]], None),
        ([[0, 0], [0, 0]], None),
    ],
)
def test_kappa_equals_value_worked_out_by_hand(confusion, kappa):
    assert cohens_kappa(confusion) == (None if kappa is None else pytest.approx(kappa))


@pytest.mark.parametrize(
    ("classes", "scores", "indices"),
    [
        ([0, 1], [-3, 0, 0.499, 0.5, 1, 7], [0, 0, 0, 1, 1, 1]),
        ([0, 0.5, 1], [0.24, 0.25, 0.74, 0.75], [0, 1, 1, 2]),
        ([0.1, 0.2], [0.15, 0.149], [1, 0]),  # (0.1 + 0.2) / 2 > 0.15
        ([0.6, 0.7], [0.65, 0.649], [1, 0]),
    ],
)
def test_nearest_class_breaks_ties_upward(classes, scores, indices):
    assert nearest_class(scores, classes).tolist() == indices


def test_label_agreement_equals_values_worked_out_by_hand(agree):
    rows = [
        row("a" * 9, 1),  # longest: scores 0.9 and 0.8
        row("crash", 1),
        row("a", True),  # shortest: scores 0.1 and 0.2
        row("a" * 4, 0),  # middle: scores 0.4 and 0.6
        row("skip", 0),
        row("aa", False),
        row("a" * 6, 0),
        row("a" * 8, 1.0),
    ]
    result = agree(*rows)
    assert (result.reward, result.num_rows, result.num_scored) == ("length", 8, 6)
    assert result.num_not_applicable == 1
    assert result.num_out_of_range == 0
    assert result.invalid == [{"line": 2, "reason": "length: ValueError: the judge has no answer"}]
    assert result.classes == [0, 1]
    assert result.confusion == [[2, 1], [1, 2]]
    assert result.accuracy == accuracy_interval([1, 0, 1, 1, 0, 1])
    assert result.kappa == pytest.approx(1 / 3)  # p_o = 4/6, p_e = 1/2
    table = [(r.third, r.n, r.min_characters, r.max_characters) for r in result.length_bias]
    assert table == [("shortest", 2, 1, 2), ("middle", 2, 4, 6), ("longest", 2, 8, 9)]
    means = [(r.mean_label, r.mean_score, r.bias) for r in result.length_bias]
    assert means == [
        pytest.approx((0.5, 0.15, -0.35)),
        pytest.approx((0.0, 0.5, 0.5)),
        pytest.approx((1.0, 0.85, -0.15)),
    ]
    expected = stats.spearmanr([-0.1, -0.9, 0.4, 0.2, 0.6, -0.2], [9, 1, 4, 2, 6, 8])
    assert result.length_correlation.rho == pytest.approx(expected.statistic)
    assert result.length_correlation.p_value == pytest.approx(expected.pvalue)
    assert result.undefined == {}


def test_length_correlation_ignores_rounding_of_differences(agree):
    # 0.3 - 0.2 and 0.2 - 0.1 differ in the last bit.
    rows = [row("a" * n, n / 10 - 0.1) for n in (2, 3, 4, 5, 6)]
    result = agree(*rows)
    assert result.length_correlation is None
    assert result.undefined == {"length_correlation": "score - label is the same in all rows"}


def test_label_agreement_with_rows_of_one_length_has_no_correlation(agree):
    rows = [row("aaa", 0), row("aaa", 1), row("bbb", 0)]
    result = agree(*rows)
    assert result.length_correlation is None
    assert "the same length" in result.undefined["length_correlation"]


@pytest.mark.parametrize(
    ("label", "classes", "accuracy"), [(1, [0, 1], 0.5), (0, [0, 1], 0.5), (0.5, [0, 0.5, 1], 0.0)]
)
def test_constant_labels_leave_kappa_undefined(label, classes, accuracy, agree):
    result = agree(row("a", label), row("a" * 9, label))
    assert result.kappa is None
    assert result.undefined["kappa"] == f"all labels are {label}"
    assert result.classes == classes
    assert result.accuracy.mean == accuracy
    assert f"Cohen's kappa  undefined: all labels are {label}" in str(result)


def test_more_than_six_classes_have_no_confusion_table(agree):
    rows = [row("a" * n, n / 10) for n in range(8)]
    result = agree(*rows)
    assert result.accuracy.mean == result.kappa == 1
    assert len(result.classes) == 8
    assert result.confusion is None
    assert "label \\ score" not in str(result)


def test_file_without_scored_rows_has_no_statistics_and_exit_code_1(write, rewards, capsys):
    file = write(row("crash", 1), row("skip", 0))
    argv = ["causal-v1", "--agreement", file, "--reward", f"{rewards}:length"]
    assert main(argv) == 1
    assert capsys.readouterr().out.splitlines() == [
        "length: 0 of 2 rows scored, 1 invalid, 1 where the reward does not apply",
        "  line 1: length: ValueError: the judge has no answer",
    ]
    assert main([*argv, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] is None
    assert result["length_bias"] == []


def test_command_prints_agreement(write, rewards, capsys):
    chat = [{"role": "user", "content": "How long?"}]
    rows = [row("crash", 1, prompt=chat) for _ in range(5)]
    rows += [row("a" * n, n > 5, prompt=chat) for n in (1, 3, 5, 7, 9, 11)]
    assert main(["causal-v1", "--agreement", write(*rows), "--reward", f"{rewards}:length"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "length: 6 of 11 rows scored, 5 invalid, 0 where the reward does not apply",
        *(f"  line {line}: length: ValueError: the judge has no answer" for line in (1, 2, 3)),
        "  and 2 more",
        "scores outside 0 to 1: 1; the bias compares different scales",
        "",
        "accuracy       0.833 (95% interval 0.436 to 0.970)",
        "Cohen's kappa  0.667",
        "",
        "rows by label and score",
        "label \\ score       0       1",
        "            0       2       1",
        "            1       0       3",
        "",
        "completions       n      characters   label   score    bias",
        "shortest          2             1-3   0.000   0.200  +0.200",
        "middle            2             5-7   0.500   0.600  +0.100",
        "longest           2            9-11   1.000   1.000  +0.000",
        "Spearman's correlation of (score - label) with length: -0.406 (p = 0.42)",
    ]


def test_command_passes_nested_reward_args(write, rewards, capsys, monkeypatch):
    monkeypatch.setitem(REWARDS, "judge", f"{rewards}:Judge")
    argv = ["causal-v1", "--agreement", write(row("a", 1), row("b", 0)), "--json"]
    argv += ["--reward_args.judge.model", "good", "--reward_args.judge.options.seed=3"]
    assert main([*argv, "--environment_args.num_nodes", "4", "--reward_concurrency", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["reward"], result["num_scored"], result["confusion"]) == ("judge", 2, [[0, 1], [0, 1]])
    assert result["accuracy"]["mean"] == 0.5
    assert result["kappa"] == 0


@pytest.mark.parametrize("concurrency", [[], ["--reward_concurrency", "2"]])
@pytest.mark.parametrize("reward", ["concurrent", "batch", "length"])
def test_command_runs_rewards_of_every_kind(reward, concurrency, write, rewards, capsys):
    file = write(row("four", 0, answer="five"), row("longer", 1, answer="longer"))
    argv = ["causal-v1", "--agreement", file, "--reward", f"{rewards}:{reward}", "--json", *concurrency]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"]["mean"] == 1


def test_command_runs_reward_of_environment(write, capsys):
    file = write(row("\\boxed{4}", 1, answer="4"), row("\\boxed{5}", 0, answer="4"))
    argv = ["math-v1", "--environment_args.dataset", "arithmetic", "--agreement", file, "--reward", "correct"]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kappa"] == 1


def test_reward_time_limit_makes_row_invalid(write, rewards, capsys):
    file = write(row("fine", 1), row("hang", 0))
    argv = ["causal-v1", "--agreement", file, "--reward", f"{rewards}:hang", "--reward_time_limit", "0.3"]
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [item["line"] for item in result["invalid"]] == [2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "labeled.jsonl has no rows"),
        (["", " "], "has no rows"),
        (["{"], r"labeled.jsonl:1: not valid JSON"),
        ([row("a", 1), "", "[1]"], r"labeled.jsonl:3: not a JSON object"),
        (["[" * 100_000], "labeled.jsonl:1: not valid JSON"),
        ([{"completion": "a", "lable": 1}], r"jsonl:1: there is no 'label' \(did you mean 'lable'\?\)"),
        ([{"label": 1}], "jsonl:1: there is no 'completion'"),
        ([row(["a"], 1)], "jsonl:1: 'completion' must be a string"),
        (
            [row("a", 1), row("a", 1.5)],
            r"jsonl:2: 'label' must be a number from 0 to 1, true or false, not 1.5",
        ),
        ([row("a", "1")], "not '1'"),
        ([row("a", None)], "not None"),
        ([row("a", float("nan"))], "not nan"),
        ([row("a", float("inf"))], "not inf"),
        ([row("a", 1, prompt=[])], r"jsonl:1: 'prompt' must be a string or a list of messages"),
        ([row("a", 1, prompt=[{"content": "a"}])], "'prompt' must be"),
        ([row("a", 1, prompt=None)], "'prompt' must be"),
        ([{"completion": "a", "label": 1}], "jsonl:1: reward 'length' needs a column 'prompt'"),
        ([row("a", 1), row("a", 1, correct=1)], "jsonl:2: the dataset has a column 'correct'"),
    ],
)
def test_label_agreement_rejects_bad_rows(rows, message, agree):
    with pytest.raises(UserError, match=message) as error:
        agree(*rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("batch", r"labeled.jsonl:1: reward 'batch' needs a column 'answer' \(choices: completion, prompt\)"),
        ("group", "compares the rollouts of a task"),
        ("reads_label", "needs a column 'label', but 'label' in"),
        ("reads_correct", "reads 'correct', which only the rollout of a model has"),
        ("reads_ids", "jsonl:1: reward 'reads_ids' needs a column 'completion_ids'"),
        ("Judge", "Judge' needs 'model'; set reward_args"),
        ("absent", "has no 'absent'"),
    ],
)
def test_label_agreement_rejects_rewards_that_cannot_run(reward, message, agree):
    with pytest.raises(UserError, match=message):
        agree(row("a", 1), reward=reward)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--agreement", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--agreement", ""], "cannot read"),
        (["--agreement", "FILE", "--items", "FILE"], "set --agreement or --items, not both"),
        (["--reward", "judge"], "--reward needs --agreement"),
        (["--reward_args.judge.model", "a"], "--reward_args needs --agreement"),
        (["--reward_concurrency", "2"], "--reward_concurrency needs --agreement"),
        (["--reward_time_limit", "2"], "--reward_time_limit needs --agreement"),
        (["--agreement", "FILE", "-n", "4"], "--num_tasks has no effect with --agreement"),
        (["--agreement", "FILE", "--split", "test"], "--split has no effect"),
        (["--agreement", "FILE", "--seed", "1"], "--seed has no effect"),
        (["--agreement", "FILE", "--reward_concurrency", "0"], "must be at least 1"),
        (["--agreement", "FILE", "--reward_time_limit", "nan"], "must be above 0"),
        (["--agreement", "FILE", "--reward", "jugde"], "causal-v1 has no reward 'jugde'"),
        (["--agreement", "FILE", "--reward_args.judge"], "--reward_args.judge needs a value"),
        (["--agreement", "FILE", "--reward_args"], "expected one argument"),
        (["--agreement", "FILE", "--reward_args", "{"], "--reward_args must be a mapping such as"),
        (["--agreement", "FILE", "--reward_args", "{}", "--reward_args.a.b", "1"], "not both"),
        (["--agreement", "FILE", "--reward_args.distribution.a", "1"], "but the reward is 'judge'"),
        (["--agreement", "FILE", "--reward_arg.judge.model", "1"], "unknown option '--reward_arg"),
        (["--agreement", "FILE", "--agrement", "1"], "did you mean '--agreement'"),
    ],
)
def test_command_rejects_options(arguments, message, write):
    file = write(row("a", 1))
    with pytest.raises(UserError, match=message) as error:
        main(["causal-v1", *(file if argument == "FILE" else argument for argument in arguments)])
    assert "\n" not in str(error.value)


def test_parser_separates_arguments_of_the_environment_and_of_the_reward():
    argv = ["--reward_args.a.b", "-1", "x", "--environment_args.n=3", "--json", "--reward_args.a.c=2"]
    options = build_parser().parse_args(argv)
    assert options.reward_args == {"a": {"b": -1, "c": 2}} and options.environment_args == {"n": 3}
    assert options.environment == "x" and options.json


def test_help_lists_options_of_agreement():
    text = build_parser().format_help()
    for option in (
        "--agreement",
        "--reward ",
        "--reward_args",
        "--reward_concurrency",
        "--reward_time_limit",
    ):
        assert option in text
