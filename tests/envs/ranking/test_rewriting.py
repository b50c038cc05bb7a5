"""Query rewriting without training: keywords, leakage, and the script with a real model."""

import json
import subprocess
import sys

import pytest

from rlkit.envs.ranking.rewriting import KEYWORD_INSTRUCTIONS, clean_keywords, ensemble, leakage, word_leakage
from rlkit.evaluation import Evaluation
from rlkit.retrieval.collections.load import load_collection
from tests.quick import ROOT


@pytest.mark.parametrize(
    ("reply", "keywords"),
    [
        ("red wine, grapes , red wine", "red wine, grapes"),
        ("1. red wine\n2) grapes\n- casks", "red wine, grapes, casks"),
        (" , ;\n", ""),
        ("1984 novel", "novel"),
        ("红酒、葡萄，木桶、红酒", "红酒, 葡萄, 木桶"),
    ],
)
def test_clean_keywords(reply, keywords):
    assert clean_keywords(reply) == keywords


def test_ensemble_has_the_query_first_and_each_expansion_once():
    assert ensemble("q", ["a, b", "", "c", "a, b"]) == "q a, b c"


@pytest.mark.parametrize(
    ("rewritten", "share"),
    [
        ("who built the old bridge", 0.0),  # only words of the query
        ("it was built by monks", 1.0),
        ("stone bridge it was built by", 0.75),  # all trigrams but the first
        ("bridges", 0.0),
        ("", 0.0),
    ],
)
def test_leakage(rewritten, share):
    assert leakage(rewritten, "who built the old bridge", "The old bridge: it was built by monks") == (
        pytest.approx(share)
    )


@pytest.mark.parametrize(
    ("rewritten", "share"),
    [
        ("the bridge who built", 0.0),  # only words of the query
        ("monks by built was it", 1.0),  # no trigram of the document
        ("stone monks", 0.5),
        ("", 0.0),
    ],
)
def test_word_leakage_ignores_the_order(rewritten, share):
    assert word_leakage(rewritten, "who built the old bridge", "The old bridge: it was built by monks") == (
        pytest.approx(share)
    )


@pytest.mark.parametrize(
    ("rewritten", "trigrams", "new_words"),
    [
        ("谁建造了这座旧桥", 0.0, 0.0),  # only the query
        ("僧侣用石头建造", 1.0, 1.0),
        ("用石头僧侣建造", 0.0, 3 / 5),  # not 头僧 and 侣建; 建造 is in the query
        ("很古老的大木桥", 0.0, 0.0),
    ],
)
def test_leakage_of_scripts_without_spaces(rewritten, trigrams, new_words):
    query, document = "谁建造了这座旧桥", "旧桥：僧侣用石头建造"
    assert leakage(rewritten, query, document) == pytest.approx(trigrams)
    assert word_leakage(rewritten, query, document) == pytest.approx(new_words)


def test_there_are_ten_distinct_instructions():
    assert len(set(KEYWORD_INSTRUCTIONS)) == 10


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


def run_script(*argv):
    command = [sys.executable, str(ROOT / "scripts" / "rewrite_queries.py"), "bundled:smollm2-135m", *argv]
    return subprocess.run(map(str, command), capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ensemble", "fusion"])
def test_script_expands_queries_with_the_bundled_model(folder, tmp_path, method):
    out = tmp_path / "out.json"
    argv = ("--collection", folder, "--method", method, "--max_tokens", "16", "--out", out)
    result = run_script(*argv, "--run_file", tmp_path / "a.run")
    assert result.returncode == 0, result.stderr
    evaluation = Evaluation.load(out)
    assert set(evaluation.scores) == {"1"}
    assert evaluation.rewards["ndcg@10"] == evaluation.accuracy.mean
    queries = evaluation.completions[0]["prompt"]
    assert queries.startswith("crossing of stone") and len(queries.split()) > 10
    # Fusion joins the query and at least five texts. The model may write a " | " itself.
    assert (queries.count(" | ") >= 5) == (method == "fusion")
    assert (tmp_path / "a.run").read_text().startswith("1 Q0 ")


@pytest.mark.slow
def test_script_saves_context_rewrites_as_a_new_collection(folder, tmp_path):
    to = tmp_path / "clear"
    argv = ("--collection", folder, "--method", "context", "--evaluation_split", "train")
    result = run_script(*argv, "--max_tokens", "16", "--to", to)
    assert result.returncode == 0, result.stderr
    assert "leakage 0." in result.stdout or "leakage 1." in result.stdout
    old, new = load_collection(str(folder)), load_collection(str(to))
    assert new.queries["1"] == old.queries["1"] and new.queries["2"] != old.queries["2"]
    repeated = run_script(*argv, "--to", to)
    assert repeated.returncode == 2 and "exists; pass another folder" in repeated.stderr


def test_script_requires_to_with_context(folder):
    result = run_script("--collection", folder, "--method", "context")
    assert result.returncode == 2 and "--method context requires --to" in result.stderr
