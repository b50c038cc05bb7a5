import subprocess
import sys

import pytest

from rlkit.envs.ranking.pairs.rows import read_rows
from tests.envs.ranking.folders import write_beir


@pytest.fixture
def collection(tmp_path):
    queries = {
        "w1": "Will it rain in Paris?",
        "w2": "Will it snow in Rome?",
        "n1": "What is the news in Rome?",
        "n2": "What is the news in Oslo?",
        "x": "Will it rain in Oslo?",
    }
    qrels = {
        "train": {name: {"Weather" if name[0] == "w" else "News": 1} for name in ("w1", "w2", "n1", "n2")}
    }
    qrels["test"] = {"x": {"Weather": 1}}
    return write_beir(tmp_path / "tools", {"Weather": "rain", "News": "news"}, queries, qrels)


def score_demonstrations(*arguments):
    """Run the script and return the process."""
    command = [sys.executable, "scripts/score_demonstrations.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_scores_retrieved_and_random_demonstrations_with_the_bundled_model(collection, tmp_path):
    out = tmp_path / "rows.jsonl"
    result = score_demonstrations(
        collection, "--candidates", 1, "--random_candidates", 2, "--questions", 3, "-o", out
    )
    assert result.returncode == 0, result.stderr
    assert f"3 rows: {out}" in result.stdout
    assert "after the retriever's first demonstration" in result.stdout
    rows = read_rows(out)
    assert len(rows) == 3
    for row in rows:
        assert 2 <= len(row.passages) <= 3
        assert row.query not in [passage.splitlines()[0] for passage in row.passages]
        assert all(0 < target < 1 for target in row.targets)


def test_one_candidate_is_rejected_in_one_line(collection, tmp_path):
    result = score_demonstrations(
        collection, "--candidates", 1, "--random_candidates", 0, "-o", tmp_path / "rows.jsonl"
    )
    assert result.returncode == 2
    assert "a row needs two demonstrations to compare" in result.stderr
    assert len(result.stderr.splitlines()) == 1
