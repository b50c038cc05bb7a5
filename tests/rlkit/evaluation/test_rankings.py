"""`rlkit eval` of retrievers and leaderboards."""

import json
import sys

import pytest

from rlkit.commands import main as cli
from rlkit.errors import UserError
from rlkit.evaluation import Evaluation
from rlkit.evaluation.rankings import agreement, evaluate_rankings

NAME = "generated:200:0"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def command(monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["rlkit", "eval", *map(str, words)])
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_a_retriever_its_run_and_the_comparison(command, tmp_path):
    first = ("--collection", NAME, "--retriever", "bm25", "--out", tmp_path / "a.json")
    code, out, _ = command(*first, "--run_file", tmp_path / "a.run", "--depth", "50")
    assert code == 0 and out.startswith("ndcg@10") and "recall@100" in out and "length" not in out
    a = Evaluation.load(tmp_path / "a.json")
    assert len(a.scores) == 200 and 0 < a.accuracy.mean < 1 and a.rewards["ndcg@10"] == a.accuracy.mean
    # The run that was written scores the same; half as deep, recall is less.
    run = f"run:{tmp_path / 'a.run'}"
    command("--collection", NAME, "--retriever", run, "--out", tmp_path / "b.json")
    assert Evaluation.load(tmp_path / "b.json").scores == a.scores
    command("--collection", NAME, "--retriever", "bm25", "--depth", "5", "--out", tmp_path / "c.json")
    pair = ("--compare", tmp_path / "a.json", tmp_path / "c.json", "--json")
    shallow = json.loads(command(*pair, "--reward", "recall@100")[1])
    assert shallow["n"] == 200 and shallow["difference"] < 0 and shallow["p"] < 0.01


def test_folds_of_a_collection(command):
    words = ("--collection", NAME, "--retriever", "bm25", "--json")
    _, out, _ = command(
        *words, "--environment_args.folds", "5", "--environment_args.fold", "1", "--measures", "rr@10", "ap"
    )
    found = json.loads(out)
    assert found["metric"] == "rr@10" and set(found["rewards"]) == {"rr@10", "ap"}
    assert found["accuracy"]["n"] == 900 // 5 and found["environment_args"]["fold"] == 1


def boards(**means):
    made = []
    for model, mean in means.items():
        one = evaluate_rankings(NAME, "bm25", name=model, split="dev", seed=0, folds={}, n=2)
        made.append(Evaluation(**{**vars(one), "model": model, "scores": {"q": [mean]}}))
    return made


def test_two_leaderboards(command, tmp_path):
    first, second = boards(x=0.9, y=0.5, z=0.1, only=0.3), boards(y=0.7, x=0.8, z=0.75)
    found = agreement(first, second)
    assert found["tau"] == pytest.approx(1 / 3) and [row[0] for row in found["systems"]] == ["x", "y", "z"]
    paths = []
    for i, one in enumerate([*first, *second]):
        one.save(tmp_path / f"{i}.json")
        paths.append(tmp_path / f"{i}.json")
    code, out, _ = command("--leaderboard", *paths[:4], "--against", *paths[4:])
    assert code == 0 and "Kendall's tau 0.333" in out
    with pytest.raises(UserError, match="1 systems in common"):
        agreement(first, second[:1])
    with pytest.raises(UserError, match="x is twice"):
        agreement([*first, first[0]], second)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--collection", NAME), "--collection goes with --retriever"),
        (("model", "--collection", NAME, "--retriever", "bm25"), "without a model"),
        (("--retriever", "bm25"), "need --collection"),
        (
            ("--collection", NAME, "--retriever", "bm25", "--environment_args.fodl", "1"),
            "are folds and fold, not fodl",
        ),
        (("--collection", NAME, "--retriever", "bm2"), "no retriever 'bm2'"),
        (("--collection", NAME, "--retriever", "bm25", "--measures", "f1"), "no measure 'f1'"),
        (("--collection", "nowhere", "--retriever", "bm25"), "no collection 'nowhere'"),
        (
            ("--collection", NAME, "--retriever", "bm25", "-n", "0"),
            "evaluation_tasks must be at least 1",
        ),
        (("--leaderboard", "nowhere.json"), "--leaderboard and --against go together"),
        (("--leaderboard", "nowhere.json", "--against", "b.json"), "cannot read nowhere.json"),
    ],
)
def test_bad_input_is_one_line(command, words, message):
    code, _, error = command(*words)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
