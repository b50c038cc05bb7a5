"""Rewriting without training: what becomes of keywords, what has leaked, the script with a real model."""

import json
import subprocess
import sys

import pytest

from rlkit.envs.ranking.rewriting import KEYWORDS, ensemble, keywords, leakage
from rlkit.evaluation import Evaluation
from rlkit.retrieval.collections.load import load_collection
from tests.quick import ROOT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("red wine, grapes , red wine", "red wine, grapes"),
        ("1. red wine\n2) grapes\n- casks", "red wine, grapes, casks"),
        (" , ;\n", ""),
        ("1984 novel", "novel"),
    ],
)
def test_keywords(text, found):
    assert keywords(text) == found


def test_ensemble_has_the_query_first_and_each_once():
    assert ensemble("q", ["a, b", "", "c", "a, b"]) == "q a, b c"


@pytest.mark.parametrize(
    ("rewritten", "share"),
    [
        ("who built the old bridge", 0.0),  # the query's own words
        ("it was built by monks", 1.0),
        ("stone bridge it was built by", 0.75),  # all but the first three words
        ("bridges", 0.0),
        ("", 0.0),
    ],
)
def test_leakage(rewritten, share):
    assert leakage(rewritten, "who built the old bridge", "The old bridge: it was built by monks") == (
        pytest.approx(share)
    )


def test_ten_ways_to_ask():
    assert len(set(KEYWORDS)) == 10


@pytest.fixture
def folder(tmp_path):
    """A small collection in BEIR's layout."""
    path = tmp_path / "small"
    (path / "qrels").mkdir(parents=True)
    texts = {"a": "a bridge of stone", "b": "a ship with sails", "c": "a hut on a hill"}
    queries = {"1": "crossing of stone", "2": "vessel"}
    judged = {"train": "2\tb\t1\n", "test": "1\ta\t1\n"}
    lines = [json.dumps({"_id": d, "title": "", "text": text}) for d, text in texts.items()]
    (path / "corpus.jsonl").write_text("\n".join(lines))
    lines = [json.dumps({"_id": q, "text": text}) for q, text in queries.items()]
    (path / "queries.jsonl").write_text("\n".join(lines))
    for split, rows in judged.items():
        (path / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return path


def script(*words):
    command = [sys.executable, str(ROOT / "scripts" / "rewrite_queries.py"), "bundled:smollm2-135m", *words]
    return subprocess.run(map(str, command), capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ensemble", "fusion"])
def test_the_bundled_model_expands_queries(folder, tmp_path, method):
    out = tmp_path / "out.json"
    words = ("--collection", folder, "--method", method, "--tokens", "16", "--out", out)
    done = script(*words, "--run_file", tmp_path / "a.run")
    assert done.returncode == 0, done.stderr
    found = Evaluation.load(out)
    assert set(found.scores) == {"1"} and found.rewards["ndcg@10"] == found.accuracy.mean
    asked = found.completions[0]["prompt"]
    assert asked.startswith("crossing of stone") and len(asked.split()) > 10
    assert asked.count(" | ") == 0 if method == "ensemble" else asked.count(" | ") >= 5
    assert (tmp_path / "a.run").read_text().startswith("1 Q0 ")


@pytest.mark.slow
def test_rewriting_with_the_answer_at_hand_is_for_another_collection(folder, tmp_path):
    to = tmp_path / "clear"
    words = ("--collection", folder, "--method", "context", "--evaluation_split", "train")
    done = script(*words, "--tokens", "16", "--to", to)
    assert done.returncode == 0, done.stderr
    assert "leakage 0." in done.stdout or "leakage 1." in done.stdout
    old, new = load_collection(str(folder)), load_collection(str(to))
    assert new.queries["1"] == old.queries["1"] and new.queries["2"] != old.queries["2"]
    again = script(*words, "--to", to)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_context_needs_a_place(folder):
    done = script("--collection", folder, "--method", "context")
    assert done.returncode == 2 and "--to goes with --method context" in done.stderr
