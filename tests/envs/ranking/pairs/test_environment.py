import json
import sys

import pytest
from sentence_transformers import SentenceTransformer

from rlkit.commands import main as cli
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.errors import UserError
from rlkit.registry import load_environment
from tests.envs.ranking.folders import write_beir

DOCUMENTS = {
    "d1": ("Fox", "red fox in the forest"),
    "d2": ("Wolf", "grey wolf on the hill"),
    "d3": ("Tree", "green tree by the river"),
}
QRELS = {"train": {"q1": {"d1": 1}}, "test": {"q2": {"d2": 1}}}
ROWS = [
    PairRow("ict/d1/0", "a fox", ("Fox: in the forest",), (1.0,), "ict", "d1"),
    PairRow("ict/d2/0", "a wolf", ("Wolf: on the hill",), (1.0,), "ict", "d2"),
    PairRow(
        "wlp/d3/0", "a tree", ("Fox: red", "Wolf: grey"), (1.0, 0.25), "wlp", "d3", ("d1", "d2"), ("d3", "d1")
    ),
    PairRow("list", "a river", ("one", "two"), (2.0, 0.0)),
]


@pytest.fixture
def arguments(tmp_path):
    queries = {"q1": "red fox", "q2": "grey wolf"}
    write_rows(tmp_path / "pairs.jsonl", ROWS)
    folder = write_beir(tmp_path / "collection", DOCUMENTS, queries, QRELS)
    return {"pairs": str(tmp_path / "pairs.jsonl"), "collection": folder}


def test_training_tasks_are_the_rows_of_the_file(arguments):
    environment = load_environment("pairs-v1", **arguments)
    tasks = list(environment.tasks("train"))
    assert sorted(task["query_id"] for task in tasks) == sorted(row.id for row in ROWS)
    assert [task["query_id"] for task in environment.tasks("train", 2)] == [
        task["query_id"] for task in tasks[:2]
    ]
    by_id = {task["query_id"]: environment.candidate_documents(task) for task in tasks}
    pair, wlp, graded = (by_id[name] for name in ("ict/d1/0", "wlp/d3/0", "list"))
    assert (pair.query, list(pair.passages), list(pair.grades)) == ("a fox", ["Fox: in the forest"], [1.0])
    assert list(pair.ids) == ["d1"] and list(pair.possible_answers) == ["d1"]
    assert list(wlp.ids) == ["d1", "d2"] and list(wlp.possible_answers) == ["d3", "d1"]
    assert list(wlp.ideal) == [1.0, 0.25]
    assert list(graded.ids) == [] and list(graded.possible_answers) == [] and list(graded.ideal) == [2.0]


def test_training_needs_no_collection(arguments):
    environment = load_environment("pairs-v1", pairs=arguments["pairs"])
    assert len(environment.tasks("train")) == len(ROWS) and environment.documents() is None
    with pytest.raises(UserError, match="or evaluation_tasks to 0"):
        environment.tasks("test")


def test_answer_of_a_row_earns_the_full_reward(arguments):
    environment = load_environment("pairs-v1", **arguments)
    for task in environment.tasks("train"):
        assert environment.score(task, environment.answer(task))["ndcg"] == pytest.approx(1)


def test_held_out_tasks_are_those_of_rerank(arguments):
    tasks = load_environment("pairs-v1", **arguments).tasks("test")
    rerank = load_environment("rerank-v3", collection=arguments["collection"]).tasks("test")
    assert list(tasks) == list(rerank)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": None}, "set environment_args.pairs"),
        ({"pairs": "missing.jsonl"}, "no file missing.jsonl"),
        ({"pairs": 5}, "pairs must be the path of a file, not 5"),
        ({"pair": "x.jsonl"}, "no argument 'pair' .did you mean 'pairs'"),
        ({"candidats": 3}, "no argument 'candidats' .did you mean 'candidates'"),
    ],
)
def test_invalid_arguments_are_errors(arguments, change, message):
    with pytest.raises(UserError, match=message):
        load_environment("pairs-v1", **(arguments | change)).tasks("train")


@pytest.fixture
def rank(arguments, tmp_path, monkeypatch):
    """Function that runs `rlkit rank` on the rows for two steps and returns its exit code."""

    def run(*options):
        command = ["rlkit", "rank", "--environment", "pairs-v1", "--environment_args", json.dumps(arguments),
                   "--use_cpu", "true", "--model_name_or_path", "bundled:all-minilm-l6-v2",
                   "--adapter_rank", "4", "--max_steps", "2", "--per_device_train_batch_size", "2",
                   "--evaluation_tasks", "1", "--logging_steps", "1", "--report_to", "none",
                   "--output_dir", str(tmp_path / "run"), *options]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        return cli.main()

    return run


def test_pairs_train_an_encoder_with_in_batch_negatives(rank, tmp_path):
    out = tmp_path / "run"
    assert rank("--objective", "infonce") == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("loss", 0) > 0 for line in lines)
    assert len(SentenceTransformer(str(out / "model")).encode_query("a fox")) == 384


def test_pairs_need_other_queries_in_the_batch(rank, capsys):
    assert rank("--objective", "infonce", "--per_device_train_batch_size", "1") == 2
    assert "pairs need a per_device_train_batch_size of at least 2" in capsys.readouterr().err


def test_pairs_without_negatives_of_their_own_need_an_in_batch_objective(rank, tmp_path, capsys):
    write_rows(tmp_path / "pairs.jsonl", ROWS[:2])
    assert rank("--objective", "ranknet") == 2
    assert "for pairs, train an encoder with the objective infonce" in capsys.readouterr().err
