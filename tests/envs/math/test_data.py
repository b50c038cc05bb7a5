"""Math problems from datasets: formats, columns, unusable rows, and splits."""

import csv
import json
import logging
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlkit.check import check_environment
from rlkit.environment import SPLITS
from rlkit.envs.math import MathEnvironment
from rlkit.envs.math.data import final_answer, worked_solution
from rlkit.errors import UserError

ROWS = [
    {"problem": f"Halve {n}.", "answer": rf"\frac{{{n}}}{{2}}", "level": f"L{n % 3}"} for n in range(1, 500)
]


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.fixture
def jsonl(tmp_path):
    return lambda rows: write(tmp_path / "data.jsonl", rows)


def ids(environment, split, **arguments):
    return list(environment.tasks(split, **arguments)["task_id"])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_environment_of_each_file_format_is_sound(tmp_path, suffix):
    environment = MathEnvironment(
        dataset=write(tmp_path / f"data{suffix}", ROWS), breakdown_columns=["level"]
    )
    checks = check_environment(environment)
    assert [check for check in checks if not check.passed] == []
    tasks = [task for split in SPLITS for task in environment.tasks(split)]
    assert sorted(task["problem"] for task in tasks) == sorted(row["problem"] for row in ROWS)
    task = next(task for task in tasks if task["problem"] == "Halve 7.")
    assert task["answer"] == r"\frac{7}{2}" and task["level"] == "L1"
    assert environment.solution(task) is None
    assert environment.score(task, r"\boxed{3.5}")["correct"] == 1.0
    assert environment.breakdown == ("level",)


def test_splits_are_disjoint_and_independent_of_the_row_order(jsonl, tmp_path):
    environment = MathEnvironment(dataset=jsonl(ROWS))
    shuffled_rows = random.Random(0).sample(ROWS, len(ROWS))
    shuffled = MathEnvironment(dataset=write(tmp_path / "shuffled.jsonl", shuffled_rows))
    sets = [set(ids(environment, split)) for split in SPLITS]
    assert [len(s) for s in sets] == pytest.approx([400, 50, 50], abs=25)
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    for split in SPLITS:
        assert ids(environment, split) == ids(shuffled, split)
    assert ids(environment, "train", n=20) == ids(environment, "train")[:20]
    assert ids(environment, "train", seed=1) != ids(environment, "train")
    fewer = MathEnvironment(dataset=write(tmp_path / "fewer.jsonl", ROWS[::2]))
    assert set(ids(fewer, "test")) <= sets[2]


def test_fractions_set_the_sizes_of_the_splits(jsonl):
    environment = MathEnvironment(dataset=jsonl(ROWS), fractions=[0, 0, 1])
    assert len(environment.tasks("test")) == len(ROWS)
    with pytest.raises(UserError, match=r"split 'train' of .*data.jsonl has 0 problems"):
        environment.tasks("train")
    with pytest.raises(UserError, match="has 499 problems, but n is 500"):
        environment.tasks("test", 500)


@pytest.mark.parametrize(
    ("cell", "answer", "solution"),
    [
        ("42", "42", ""),
        ("$x^2$", "x^2", ""),
        ("48/2 = <<48/2=24>>24 clips.\n#### 1,024", "1,024", "48/2 = 24 clips.\n\\boxed{1,024}"),
        ("#### 5", "5", ""),
        (
            r"Add: \boxed{3}, so \boxed{\frac{1}{2}}.",
            r"\frac{1}{2}",
            r"Add: \boxed{3}, so \boxed{\frac{1}{2}}.",
        ),
        (r"\boxed{1", "", r"\boxed{1"),
    ],
)
def test_final_answer_and_worked_solution_of_a_cell(cell, answer, solution):
    assert final_answer(cell) == answer
    assert worked_solution(cell, answer) == solution


def test_gsm8k_rows_have_worked_solutions(jsonl):
    rows = [{"question": "How many?", "answer": "Half is <<8/2=4>>4.\n#### 4"}]
    environment = MathEnvironment(dataset=jsonl(rows), fractions=[1, 0, 0])
    task = environment.tasks("train")[0]
    assert task["answer"] == "4" and environment.solution(task) == "Half is 4.\n\\boxed{4}"
    assert environment.score(task, environment.solution(task)) == {"correct": 1.0, "format": 1.0}


def test_columns_are_detected_or_set(jsonl):
    rows = [{"q": "1 + 1?", "final_answer": 2, "answer": 3, "n": 0.5}]
    with pytest.raises(
        UserError, match="set problem_column to one of its columns: q, final_answer, answer, n"
    ):
        MathEnvironment(dataset=jsonl(rows)).tasks("train")
    arguments = {"dataset": jsonl(rows), "problem_column": "q", "fractions": [1, 0, 0]}
    assert MathEnvironment(**arguments).tasks("train")["answer"] == ["3"]
    assert MathEnvironment(**arguments, answer_column="final_answer").tasks("train")["answer"] == ["2"]
    assert MathEnvironment(**arguments, answer_column="n").tasks("train")["answer"] == ["0.5"]
    with pytest.raises(UserError, match=r"no column 'anser' \(answer_column\); it has q, final_answer"):
        MathEnvironment(**arguments, answer_column="anser").tasks("train")
    with pytest.raises(UserError, match=r"no column 'level' \(breakdown_columns\)"):
        MathEnvironment(**arguments, breakdown_columns="level").tasks("train")


GOOD = {"problem": "1 + 1?", "answer": "2"}
BAD = [
    ({"problem": " ", "answer": "2"}, "row 2: column 'problem' has no problem"),
    ({"problem": "2 + 2?", "answer": ""}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?", "answer": None}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?", "answer": float("nan")}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?", "answer": ["4"]}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?"}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?", "answer": r"\boxed{4"}, "row 2: column 'answer' has no answer"),
    ({"problem": "2 + 2?", "answer": r"\frac{"}, "1 of 2 answers cannot be compared: row 2, .* braces"),
    ({"problem": "2 + 2?", "answer": "9^{9^{9^{9}}}"}, "1 of 2 answers .* row 2, .* no value"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_row_raises_or_is_dropped(jsonl, row, message, caplog):
    arguments = {"dataset": jsonl([GOOD, row]), "fractions": [1, 0, 0]}
    with pytest.raises(UserError, match=f"data.jsonl[,:] {message}.*set bad_rows to 'drop'"):
        MathEnvironment(**arguments).tasks("train")
    with caplog.at_level(logging.WARNING):
        assert len(MathEnvironment(**arguments, bad_rows="drop").tasks("train")) == 1
    assert "dropped" in caplog.text and "row 2" in caplog.text


def test_answers_that_cannot_be_compared_are_counted_with_three_examples(jsonl, caplog):
    bad = [{"problem": f"{i}?", "answer": rf"\frac{{{i}}}{{0}}"} for i in range(5)]
    dataset = jsonl([*ROWS, *bad])
    with pytest.raises(UserError, match=r"5 of 504 answers cannot be compared: row 500, .*row 502") as error:
        MathEnvironment(dataset=dataset).tasks("train", 1)
    assert "row 503" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        environment = MathEnvironment(dataset=dataset, bad_rows="drop")
        assert sum(len(environment.tasks(split)) for split in SPLITS) == len(ROWS)
    assert caplog.text.count("5 of 504 answers cannot be compared") == 1


def test_duplicates_are_dropped_and_conflicts_raise(jsonl):
    rows = [GOOD, {"problem": "1 +  1? ", "answer": "2.0"}, GOOD, {"problem": "3?", "answer": "3"}]
    assert len(MathEnvironment(dataset=jsonl(rows), fractions=[1, 0, 0]).tasks("train")) == 2
    conflict = jsonl([*rows, {"problem": "1 + 1?", "answer": "3"}])
    with pytest.raises(UserError, match="row 5: same problem as row 1 but a different answer, '3', not '2'"):
        MathEnvironment(dataset=conflict).tasks("train")
    tasks = MathEnvironment(dataset=conflict, fractions=[1, 0, 0], bad_rows="drop").tasks("train")
    assert tasks["problem"] == ["3?"]


def test_integer_comparison_rejects_other_answers(jsonl):
    rows = jsonl([{"problem": "Half of 3?", "answer": "1.5"}])
    with pytest.raises(UserError, match="cannot be compared"):
        MathEnvironment(dataset=rows, comparison="integer", fractions=[1, 0, 0]).tasks("train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"problem": "1"}\nnot json', r"data\.jsonl:2: the line is not valid JSON"),
        ("data.jsonl", "[1]\n", "the line must be a JSON object"),
        ("data.json", '{"a": 1}', "must contain a list of JSON objects"),
        ("data.jsonl", "", "has no rows"),
        ("data.parquet", "no parquet", "cannot be read"),
    ],
)
def test_unreadable_file_raises(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        MathEnvironment(dataset=str(tmp_path / name)).tasks("train")


def test_missing_file_raises():
    with pytest.raises(UserError, match=r"there is no file nowhere.jsonl"):
        MathEnvironment(dataset="nowhere.jsonl").tasks("train")


def test_hub_dataset_is_loaded_once_with_its_config_and_revision(monkeypatch):
    calls = []

    def load(*names, **kwargs):
        calls.append((names, kwargs))
        if names[0] == "gone/gone":
            raise ConnectionError("no route\nto the hub")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    environment = MathEnvironment(dataset="a/b", dataset_config="main", dataset_split="test", revision="v1")
    assert len(environment.tasks("train")) > 300 and len(environment.tasks("dev")) > 20
    assert calls == [(("a/b", "main"), {"split": "test", "revision": "v1"})]
    with pytest.raises(UserError, match=r"'gone/gone' is neither a file .*: no route$"):
        MathEnvironment(dataset="gone/gone").tasks("train")
