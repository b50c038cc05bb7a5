import runpy
import subprocess
import sys

import pytest

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.errors import UserError
from tests.envs.ranking.folders import write_beir
from tests.rlkit.rollouts.chat_server import completion, scripted_server

MAIN = runpy.run_path("scripts/mine_negatives.py")["main"]
NUMBERS = range(40)


@pytest.fixture
def files(tmp_path):
    """Collection of 40 documents, two words of which are in each query, and a pair for each."""
    words = [f"word{i}" for i in NUMBERS]
    documents = {f"d{i}": f"{words[i]} {words[(i + 1) % 40]} {'common ' * i}" for i in NUMBERS}
    qrels = {"train": {f"q{i}": {f"d{i}": 1} for i in NUMBERS}}
    queries = {f"q{i}": words[i] for i in NUMBERS}
    collection = write_beir(tmp_path / "collection", documents, queries, qrels)
    pairs = tmp_path / "pairs.jsonl"
    rows = [PairRow(f"r{i}", queries[f"q{i}"], (documents[f"d{i}"],), (1.0,), "", f"d{i}") for i in NUMBERS]
    write_rows(pairs, [*rows, PairRow("unknown", "nothing", ("nothing",), (1.0,), "", "d0")])
    return collection, pairs, tmp_path / "triples.jsonl"


def test_rows_with_their_negatives_are_written(files):
    collection, pairs, out = files
    command = [sys.executable, "scripts/mine_negatives.py", collection, str(pairs), "--by", "bm25"]
    result = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = read_rows(out)
    assert [row.id for row in rows] == [f"r{i}" for i in NUMBERS]
    assert [row.passage_documents for row in rows] == [(f"d{i}", f"d{(i - 1) % 40}") for i in NUMBERS]
    assert all(row.targets == (1.0, 0.0) for row in rows)
    assert "41 rows, 97.6% with a negative; 1 rows without one are left out; 40 negatives" in result.stdout
    assert "Above 0.9, the negatives may teach style rather than relevance" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "written"], "--by written needs --model"),
        (["--by", "bm25", "--model", "m"], "--model is for --by written: remove it"),
        (
            ["--by", "written", "--model", "m", "--num_negatives", "2", "--temperature", "0"],
            "--num_negatives must be 1 with --temperature 0",
        ),
        (["--by", "written", "--model", "m", "--skip", "1"], "--skip must be 0 with --by written"),
        (["--by", "bm25", "--show_positive"], "--show_positive must be used with --by written"),
        (["--by", "bm25", "--allow_failures"], "--allow_failures must be used with --by written"),
        (["--by", "written", "--model", "m", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--by", "bm25", "--num_negatives", "0"], "--num_negatives must be an integer of at least 1, not 0"),
        (["--by", "bm52"], "there is no retriever 'bm52'"),
        (["--by", "bm25", "--skip", "99"], "bm25 gives no negative for any of the 41 rows"),
    ],
)
def test_bad_options_are_refused(files, monkeypatch, options, message):
    collection, pairs, out = files
    monkeypatch.setattr(sys, "argv", ["mine_negatives.py", collection, str(pairs), *options, "-o", str(out)])
    with pytest.raises(UserError, match=message):
        MAIN()
    assert not out.exists()


def test_rows_whose_passages_are_queries_are_refused(files, monkeypatch):
    collection, pairs, out = files
    write_rows(pairs, [PairRow("p", "a document", ("a b", "c"), (1.0, 0.0), passages_are_queries=True)])
    monkeypatch.setattr(
        sys, "argv", ["mine_negatives.py", collection, str(pairs), "--by", "bm25", "-o", str(out)]
    )
    with pytest.raises(UserError, match="have queries as passages"):
        MAIN()


@pytest.mark.parametrize("options", [["--by", "bm25"], ["--by", "written", "--model", "m"]])
def test_rows_of_another_collection_are_refused(files, monkeypatch, options):
    collection, pairs, out = files
    write_rows(pairs, [PairRow("p", "word1", ("word1",), (1.0,), "", "elsewhere")])
    monkeypatch.setattr(sys, "argv", ["mine_negatives.py", collection, str(pairs), *options, "-o", str(out)])
    with pytest.raises(UserError, match="lacks 1 of the documents that the rows name, such as 'elsewhere'"):
        MAIN()


def test_stopped_run_of_written_negatives_resumes(files, monkeypatch):
    collection, pairs, out = files
    partial = out.with_name("triples.jsonl.partial")
    arguments = [collection, str(pairs), "--by", "written", "--model", "m", "--num_negatives", "2"]
    with scripted_server() as server:
        arguments += ["--backend", server.url, "-o", str(out)]
        monkeypatch.setattr(sys, "argv", ["mine_negatives.py", *arguments])
        is_first = iter([True, True, True])  # the test token, and two passages

        def respond(request):
            return completion(f"early {request.get('seed')}") if next(is_first, False) else {}

        server.respond = respond
        with pytest.raises(UserError, match="run the same command to resume"):
            MAIN()
        assert partial.exists() and not out.exists()
        num_requests = len(server.requests)
        server.respond = lambda request: completion(f"passage {request.get('seed')}")
        assert MAIN() == 0
        assert len(server.requests) - num_requests == 82 - 2 + 1
    assert not partial.exists()
    texts = [text for row in read_rows(out) for text in row.passages[1:]]
    assert len(texts) == 82 and sum(text.startswith("early") for text in texts) == 2


def test_failed_prompts_are_skipped_on_request_and_can_be_tried_again(files, monkeypatch):
    collection, pairs, out = files
    partial = out.with_name("triples.jsonl.partial")
    arguments = [collection, str(pairs), "--by", "written", "--model", "m", "--allow_failures"]
    with scripted_server() as server:
        arguments += ["--backend", server.url, "-o", str(out)]
        monkeypatch.setattr(sys, "argv", ["mine_negatives.py", *arguments])

        def respond(request):
            content = request["messages"][0]["content"]
            return {} if content.endswith("nothing\nPassage:") else completion(f"passage {request['seed']}")

        server.respond = lambda request: respond(request) if "seed" in request else completion("Hi")
        assert MAIN() == 0
        assert len(read_rows(out)) == 40 and partial.exists()
        out.unlink()
        server.respond = lambda request: completion("another passage")
        num_requests = len(server.requests)
        assert MAIN() == 0
        assert len(server.requests) - num_requests == 2  # the test token, and the failed prompt
    assert len(read_rows(out)) == 41 and not partial.exists()
