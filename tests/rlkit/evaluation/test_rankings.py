"""`rlkit eval` of retrievers and leaderboards."""

import json
import sys

import pytest

from rlkit.commands import main as cli
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation
from rlkit.evaluation.rankings import evaluate_rankings, leaderboard_agreement
from rlkit.retrieval.queries import open_collection

NAME = "generated:200:0"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlkit", "eval", *map(str, arguments)])
        code = cli.main()
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


def test_command_scores_a_retriever_and_its_run_file(command, tmp_path):
    first = ("--collection", NAME, "--retriever", "bm25", "--out", tmp_path / "a.json")
    code, out, _ = command(*first, "--run_file", tmp_path / "a.run", "--depth", "50")
    assert code == 0 and out.startswith("ndcg@10") and "recall@100" in out and "length" not in out
    a = Evaluation.load(tmp_path / "a.json")
    assert len(a.scores) == 200 and 0 < a.accuracy.mean < 1 and a.rewards["ndcg@10"] == a.accuracy.mean
    # The run file has the same scores as the retriever; a shallower ranking has a lower recall.
    run = f"run:{tmp_path / 'a.run'}"
    command("--collection", NAME, "--retriever", run, "--out", tmp_path / "b.json")
    assert Evaluation.load(tmp_path / "b.json").scores == a.scores
    command("--collection", NAME, "--retriever", "bm25", "--depth", "5", "--out", tmp_path / "c.json")
    pair = ("--compare", tmp_path / "a.json", tmp_path / "c.json", "--json")
    shallow = json.loads(command(*pair, "--reward", "recall@100")[1])
    assert shallow["n"] == 200 and shallow["difference"] < 0 and shallow["p"] < 0.01


def test_command_evaluates_a_fold_of_a_collection(command):
    fold = ("--environment_args.folds", "5", "--environment_args.fold", "1")
    _, out, _ = command(
        "--collection", NAME, "--retriever", "bm25", "--json", *fold, "--measures", "rr@10", "ap"
    )
    result = json.loads(out)
    assert result["metric"] == "rr@10" and set(result["rewards"]) == {"rr@10", "ap"}
    assert result["accuracy"]["n"] == 900 // 5 and result["environment_args"]["fold"] == 1


def leaderboard(**means):
    """Return an evaluation with this mean for each system."""
    evaluations = []
    for model, mean in means.items():
        collection = open_collection(NAME, None, 0)
        evaluation = evaluate_rankings(collection, "bm25", name=model, arguments={}, split="dev", n=2)
        evaluations.append(Evaluation(**{**vars(evaluation), "model": model, "scores": {"q": [mean]}}))
    return evaluations


def test_leaderboard_agreement_matches_systems_by_name(command, tmp_path):
    first, second = leaderboard(x=0.9, y=0.5, z=0.1, only=0.3), leaderboard(y=0.7, x=0.8, z=0.75)
    result = leaderboard_agreement(first, second)
    assert result["tau"] == pytest.approx(1 / 3)
    assert [name for name, *_ in result["systems"]] == ["x", "y", "z"]
    paths = []
    for i, evaluation in enumerate([*first, *second]):
        evaluation.save(tmp_path / f"{i}.json")
        paths.append(tmp_path / f"{i}.json")
    code, out, _ = command("--leaderboard", *paths[:4], "--against", *paths[4:])
    assert code == 0 and "Kendall's tau 0.333" in out
    with pytest.raises(UserError, match="at least 2 systems in both leaderboards, not 1"):
        leaderboard_agreement(first, second[:1])
    with pytest.raises(UserError, match="x is in a leaderboard twice"):
        leaderboard_agreement([*first, first[0]], second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--collection", NAME), "--collection requires --retriever"),
        (("model", "--collection", NAME, "--retriever", "bm25"), "cannot be combined with a model"),
        (("--retriever", "bm25"), "require --collection"),
        (
            ("--collection", NAME, "--retriever", "bm25", "--environment_args.fodl", "1"),
            "takes only folds, fold and drop_query_id, not fodl",
        ),
        (("--collection", NAME, "--retriever", "bm2"), "no retriever 'bm2'"),
        (("--collection", NAME, "--retriever", "bm25", "--measures", "f1"), "no measure 'f1'"),
        (("--collection", "nowhere", "--retriever", "bm25"), "no collection 'nowhere'"),
        (
            ("--collection", NAME, "--retriever", "bm25", "-n", "0"),
            "evaluation_tasks must be at least 1",
        ),
        (("--leaderboard", "nowhere.json"), "set both or neither"),
        (("--leaderboard", "nowhere.json", "--against", "b.json"), "cannot read nowhere.json"),
    ],
)
def test_command_rejects_bad_input_in_one_line(command, arguments, message):
    code, _, error = command(*arguments)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
