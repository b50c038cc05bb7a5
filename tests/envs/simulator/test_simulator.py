"""simulator-v2: its tasks from a world and from the rollouts of a run, and what a simulator is paid for."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from rlkit.check import check_environment
from rlkit.check.play import play
from rlkit.envs.simulator.environment import split_of
from rlkit.envs.simulator.examples import read_examples
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.reward import call_reward
from rlkit.rewards.simulation import holds_answer
from tests.quick import ROOT

ROW = {
    "question": "Who?",
    "answers": ["Ann"],
    "query": "who",
    "documents": "Doc 1: It was Ann.",
    "label": "useful",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def environment():
    return load_environment("simulator-v2", topk=2, world_size=500)


def test_it_is_sound(environment):
    assert [check for check in check_environment(environment, n=40) if not check.passed] == []


def test_useful_documents_hold_what_noise_does_not(environment):
    tasks = list(environment.tasks("train", 200))
    assert [task["label"] for task in tasks] == ["useful", "noisy"] * 100
    holding = {label: [t["holds"] for t in tasks if t["label"] == label] for label in ("useful", "noisy")}
    # A first hop's passage has no answer to the whole question.
    assert sum(holding["useful"]) > 50 and sum(holding["noisy"]) < 10
    assert {task["asked"] for task in tasks} == {2}
    for task in tasks[:20]:
        assert f"2 {task['label']} documents" in task["prompt"][0]["content"]
        assert task["answers"][0] in task["prompt"][0]["content"]


def test_the_wrong_kind_of_documents_is_not_paid(environment):
    tasks = list(environment.tasks("dev", 60))
    useful = next(task for task in tasks if task["holds"])
    noisy = next(task for task in tasks if not task["holds"] and task["label"] == "noisy")
    answer = useful["answers"][0]
    assert environment.score(useful, "Doc 1: It rains.\nDoc 2: It snows.") == {"obeys": 0, "form": 1}
    assert environment.score(noisy, f"Doc 1: It is {noisy['answers'][0]}.\nDoc 2: b") == {
        "obeys": 0,
        "form": 1,
    }
    assert environment.score(useful, answer) == {"obeys": 0, "form": 0}


def test_no_question_of_a_file_is_in_two_splits(tmp_path):
    rows = [ROW | {"question": f"Who was {i % 100}?", "query": f"q{i}"} for i in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = load_environment("simulator-v2", data=str(path))
    prompts = {s: set(environment.tasks(s)["task_id"]) for s in ("train", "dev", "test")}
    assert sum(map(len, prompts.values())) == 200
    assert {split_of(f"Who was {i}?") for i in range(100)} == {"train", "dev", "test"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ":1: no JSON"),
        ("[1]", ":1: no question"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW | {"query": ""}), ":2: no query"),
        (json.dumps(ROW | {"label": "bad"}), ":1: the label is 'bad'"),
        (json.dumps(ROW | {"answers": ["The"]}), ":1: nothing is left"),
        ("", "no rows"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        read_examples(tmp_path / "a.jsonl")


def rollouts(tmp_path):
    """A run of search-v2: the oracle's searches with a right answer, and with a wrong one."""
    search = load_environment("search-v2", world_size=500, topk=2, hops=[1], prompt_style="short")
    tasks = [task for task in search.tasks("train", 30) if search.script(task)]
    scripts = [search.script(task) for task in tasks]
    half = len(tasks) // 2
    scripts[half:] = [[*turns[:-1], "<answer>nobody</answer>"] for turns in scripts[half:]]
    rows = [
        {
            "prompt": row["prompt"][0]["content"],
            "answer": search.answer(row),
            "turns": row["turns"],
            "invalid": None if i else "the search failed",
            "rewards/f1": float(call_reward(search.rewards["f1"], row)),
        }
        for i, row in enumerate(play(search, tasks, scripts))
    ]
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    pd.DataFrame(rows).to_parquet(tmp_path / "run" / "rollouts" / "step-000001.parquet")
    return rows, half


def build(tmp_path, *words):
    command = [sys.executable, str(ROOT / "scripts" / "build_simulator_data.py"), *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("label", ["answer", "documents"])
def test_rollouts_of_a_real_engine_become_examples(tmp_path, label):
    rows, half = rollouts(tmp_path)
    done = build(tmp_path, tmp_path / "run", "--out", tmp_path / "data.jsonl", "--label", label)
    assert done.returncode == 0, done.stderr
    found = read_examples(tmp_path / "data.jsonl")
    assert len(found) == len(rows) - 1  # one is invalid
    useful = [one.label == "useful" for one in found]
    assert useful == (
        [True] * (half - 1) + [False] * (len(rows) - half) if label == "answer" else [True] * len(found)
    )
    assert all(holds_answer(one.documents, one.answers) for one in found)
    assert all(one.question.endswith("?") and one.documents.startswith("Doc 1(") for one in found)
    environment = load_environment("simulator-v2", data=str(tmp_path / "data.jsonl"))
    task = environment.tasks("train", 1)[0]
    assert environment.score(task, environment.answer(task))["obeys"] == 1


def test_what_is_no_run(tmp_path):
    done = build(tmp_path, tmp_path, "--out", tmp_path / "data.jsonl")
    assert done.returncode == 2 and "is not a run directory" in done.stderr and "Traceback" not in done.stderr
