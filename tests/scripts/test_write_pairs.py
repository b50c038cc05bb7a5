import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.rows import read_rows
from rlkit.envs.ranking.pairs.written import SIX_TYPES
from tests.envs.ranking.folders import write_beir
from tests.rlkit.rollouts.chat_server import completion, scripted_server

DOCUMENTS = {name: (name.upper(), f"all about {name}") for name in ("ants", "bees", "cats", "dogs")}
QUERIES = {"q1": "insects that build hills", "q2": "pets that bark"}
QRELS = {"train": {"q1": {"ants": 1}}, "test": {"q2": {"dogs": 1}}}


@pytest.fixture
def server():
    """Yield a chat server whose replies are the last document or query of the prompt and the seed."""

    def respond(request):
        lines = request["messages"][0]["content"].splitlines()
        text = lines[-2].removeprefix("Document: ") if len(lines) > 1 else ""
        return completion(f"{text} {request.get('seed')}")

    with scripted_server() as running:
        running.respond = respond
        yield running


@pytest.fixture
def collection(tmp_path):
    return write_beir(tmp_path / "collection", DOCUMENTS, QUERIES, QRELS)


@pytest.fixture
def write_pairs(collection, server, monkeypatch):
    """Function that runs the script in this process and returns its exit code."""
    path = Path("scripts/write_pairs.py")
    spec = importlib.util.spec_from_file_location("write_pairs", path)
    script = importlib.util.module_from_spec(spec)
    # `dataclass` looks up the module of a class.
    monkeypatch.setitem(sys.modules, "write_pairs", script)
    spec.loader.exec_module(script)

    def run(*arguments):
        command = [
            "write_pairs.py",
            collection,
            "--model",
            "m",
            "--backend",
            server.url,
            *map(str, arguments),
        ]
        monkeypatch.setattr(sys, "argv", command)
        return run_command(script.main)

    return run


def test_script_writes_the_rows_of_a_source(collection, server, tmp_path):
    out = tmp_path / "pairs.jsonl"
    command = [sys.executable, "scripts/write_pairs.py", collection, "--source", "few_shot",
               "--examples", "1", "--per_document", "2", "--without_test_documents",
               "--model", "m", "--backend", server.url, "-o", str(out)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = read_rows(out)
    assert [row.id for row in rows] == [f"few_shot/{name}/{i}" for name in ("bees", "cats") for i in range(2)]
    assert rows[0].query.startswith("BEES: all about bees") and rows[0].document == "bees"
    assert "few_shot: 4 rows, 4 distinct queries" in result.stdout and f"4 rows: {out}" in result.stdout
    assert not out.with_name("pairs.jsonl.partial").exists()
    content = server.requests[-1]["messages"][0]["content"]
    assert "Document: ANTS: all about ants\nQuery: insects that build hills\n\n" in content
    assert server.requests[-1]["temperature"] == 0.7 and server.requests[-1]["max_tokens"] == 64


def test_six_types_and_graded_passages_share_a_file(write_pairs, tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert write_pairs("--source", "six", "graded", "title", "--documents", 2, "-o", out) == 0
    rows = read_rows(out)
    assert [row.source for row in rows] == [*(source for source in SIX_TYPES for _ in range(2)), "graded"]
    assert rows[-1].query == QUERIES["q1"] and sorted(rows[-1].targets) == [0, 1, 2, 3]
    larger = tmp_path / "larger.jsonl"
    assert write_pairs("--source", "title", "--documents", 3, "-o", larger) == 0
    by_id = {row.id: row for row in read_rows(larger)}
    assert len(by_id) == 3 and all(by_id[row.id] == row for row in rows if row.source == "title")


def test_stopped_run_resumes_with_the_same_settings_only(write_pairs, server, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    respond = server.respond

    def fail_for_cats(request):
        return {} if "all about cats" in request["messages"][0]["content"] else completion("x")

    server.respond = fail_for_cats
    arguments = ["--source", "title", "--out", out]
    assert write_pairs(*arguments) == 2 and "run the same command to resume" in capsys.readouterr().err
    assert not out.exists()
    server.respond = respond
    assert write_pairs(*arguments, "--seed", 1) == 2
    assert (
        "pairs.jsonl.partial is from a stopped run with different settings (seed): delete it"
        in capsys.readouterr().err
    )
    assert write_pairs(*arguments) == 0 and len(read_rows(out)) == 4
    assert write_pairs(*arguments) == 2 and f"{out} already exists: delete it" in capsys.readouterr().err


def test_rows_whose_prompts_fail_are_left_out_on_request(write_pairs, server, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"

    def fail_for_cats(request):
        return {} if "all about cats" in request["messages"][0]["content"] else completion("x")

    server.respond = fail_for_cats
    assert write_pairs("--source", "title", "--out", out) == 2
    assert "failed to generate 1 of 4 replies" in capsys.readouterr().err
    assert write_pairs("--source", "title", "--out", out, "--allow_failures") == 0
    assert [row.document for row in read_rows(out)] == ["ants", "bees", "dogs"]
    assert "dropped 25.0% (failed 25.0%)" in capsys.readouterr().out
    assert out.with_name("pairs.jsonl.partial").exists()


def test_run_without_any_reply_fails(write_pairs, server, tmp_path, capsys):
    server.respond = lambda request: {} if "about" in request["messages"][0]["content"] else completion("x")
    out = tmp_path / "pairs.jsonl"
    assert write_pairs("--source", "title", "-o", out, "--allow_failures") == 2
    assert "failed to generate 4 of 4 replies" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "few_shot"], "has 1 documents with a training query: set --examples to 1 or fewer"),
        (["--source", "title", "--documents", "0"], "--documents must be an integer of at least 1, not 0"),
        (["--source", "title", "--instruction", "Write."], "--instruction is for the source few_shot"),
        (["--source", "titel"], "unknown --source 'titel'"),
        (["--source", "few_shot", "--temperature", "0"], "--per_document must be 1 with --temperature 0"),
        (["--source", "title", "--temperature", "-1"], "--temperature must be at least 0, not -1.0"),
    ],
)
def test_invalid_options_are_one_line(write_pairs, tmp_path, capsys, arguments, message):
    try:
        code = write_pairs(*arguments, "-o", tmp_path / "pairs.jsonl")
    except SystemExit as exit_:  # of the parser
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error
