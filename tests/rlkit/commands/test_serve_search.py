"""`rlkit serve-search`: options, API key, port, and errors that name the remedy."""

import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest

from rlkit.commands.serve_search import main
from rlkit.errors import UserError
from rlkit.retrieval.engines.index import build_index
from tests.rlkit.retrieval.serving import BOOK, PLAIN, free_port


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("RLKIT_SEARCH_KEY", raising=False)


@pytest.fixture
def index(tmp_path):
    return str(build_index([BOOK, PLAIN], tmp_path / "index"))


@contextmanager
def serve_search(*arguments, **variables):
    """Run the command until it serves; yield the URL and the process."""
    port = free_port()
    command = [sys.executable, "-m", "rlkit", "serve-search", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/retrieve" in process.stderr.readline()
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        process.stderr.close()


def post(url, **body):
    return httpx.post(f"{url}/retrieve", json=body, trust_env=False, timeout=20)


def test_command_serves_world_until_sigterm(tmp_path):
    # The socket listens before the address is logged, so the first connection succeeds.
    with serve_search("world:200:0", RLKIT_CACHE=str(tmp_path)) as (url, _):
        assert httpx.get(f"{url}/health", trust_env=False).json()["documents"] == 200
        hits = post(url, queries=["lawyer"], topk=2, return_scores=True).json()["result"][0]
        assert len(hits) == 2 and hits[0]["score"] >= hits[1]["score"] > 0


def test_limits_are_options(index):
    options = ["--topk", "1", "--max_topk", "2", "--max_queries", "3", "--max_query_characters", "7"]
    options += ["--max_body_bytes", "200", "--max_waiting", "5", "--threads", "1", "--timeout", "9"]
    with serve_search(index, *options) as (url, _):
        assert len(post(url, query="velmora oskel").json()["result"][0]) == 1
        assert post(url, query="velmora", topk=3).status_code == 400
        assert post(url, queries=["a"] * 4).status_code == 413
        assert post(url, queries=["a" * 300]).status_code == 413
        # Only the first seven characters are searched for.
        assert post(url, query="another velmora").json() == {"result": [[]]}


def test_empty_key_is_no_key(index):
    with serve_search(index, RLKIT_SEARCH_KEY="") as (url, _):
        assert post(url, query="velmora").status_code == 200


def test_port_in_use_is_user_error_before_address_is_logged(index):
    with serve_search(index) as (url, _):
        command = [sys.executable, "-m", "rlkit", "serve-search", index, "--port", str(httpx.URL(url).port)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2 and second.stdout == ""
    (line,) = second.stderr.splitlines()
    assert "Address already in use" in line and "--port" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topk", "1001"], "--topk must be at least 1 and at most 1,000"),
        (["--topk", "-5"], "--topk must be"),
        (["--topk", "0"], "--topk must be"),
        (["--max_topk", "2"], "--topk must be at least 1 and at most 2, not 3"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--threads", "100000"], "--threads must be"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--timeout", "1e300"], "--timeout must be"),
        (["--timeout", "nan"], "--timeout must be"),
        (["--timeout", "inf"], "--timeout must be"),
        (["--max_topk", "0"], "--max_topk must be at least 1"),
        (["--max_queries", "0"], "--max_queries must be"),
        (["--max_query_characters", "-1"], "--max_query_characters must be"),
        (["--max_body_bytes", "0"], "--max_body_bytes must be"),
        (["--max_waiting", "0"], "--max_waiting must be"),
        (["--max_waiting", "many"], "--max_waiting"),
        (["--port", "70000"], "--port must be"),
        (["--max-querys", "1"], "did you mean '--max_queries'"),
    ],
)
def test_option_out_of_range_is_user_error(options, message):
    with pytest.raises(UserError, match=message) as error:
        main(["world:200:0", *options])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [None, ""])
@pytest.mark.parametrize("host", ["0.0.0.0", "example.com", "::", ""])
def test_public_host_requires_api_key(monkeypatch, host, key):
    if key is not None:
        monkeypatch.setenv("RLKIT_SEARCH_KEY", key)
    with pytest.raises(UserError, match="RLKIT_SEARCH_KEY"):
        main(["world:200:0", "--host", host])


@pytest.mark.parametrize("key", [" secret", "secret\n", "sec\tret", "sec\x7fret", "two\nlines", " "])
def test_key_that_no_header_can_carry_is_user_error(monkeypatch, key):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", key)
    with pytest.raises(UserError, match="RLKIT_SEARCH_KEY"):
        main(["world:200:0"])


def test_path_without_index_is_user_error_with_remedy(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "1", "text": "one"}\n')
    port = str(free_port())
    for path in (corpus, tmp_path):  # a file, and a folder in BEIR's layout
        with pytest.raises(UserError, match=f"rlkit index {path} -o FOLDER"):
            main([str(path), "--port", port])
    with pytest.raises(UserError, match="there is no index"):
        main([str(tmp_path / "missing"), "--port", port])
    with pytest.raises(UserError, match="world:SIZE:SEED"):
        main(["world:x:0", "--port", port])
    # The socket was closed each time.
    with socket.create_server(("127.0.0.1", int(port))):
        pass


def test_address_of_another_machine_is_user_error(monkeypatch):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", "secret")
    for host in ("192.0.2.1", "no..host"):
        with pytest.raises(UserError, match=f"cannot listen on {re.escape(host)}"):
            main(["world:200:0", "--host", host])
