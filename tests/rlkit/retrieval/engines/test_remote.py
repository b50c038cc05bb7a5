"""The client of search servers: its requests, and its retries, circuit breaker and cache."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkit.environment import Turn
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines.remote import CircuitBreaker, Remote
from rlkit.retrieval.engines.responses import RemoteError, parse_response
from tests.quick import ROOT
from tests.rlkit.retrieval.serving import BOOK, PLAIN, DictionaryEngine, free_port, serving


@contextmanager
def scripted_server(*responses):
    """Serve the responses (status, body, headers) in order, repeating the last one.

    Yields:
        The URL of the server, and the list of the request bodies that it has received.
    """
    remaining, requests = list(responses), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body, headers = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if callable(body):
                body = body()
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


def queries(*texts):
    return [Query(text) for text in texts]


GOOD = {"result": [[{"document": {"id": "7", "contents": '"T"\nx'}, "score": 1.0}]]}


def test_search_returns_results_of_rlkit_server():
    engine = DictionaryEngine()
    with serving(engine) as url:
        remote = Remote(url, batch=2)
        results = remote.search(queries("x1", "velmora", "", "nothing", "x1", "  "), 3)
    assert results[0].documents == (Document("x1", "Title x1", "Text x1"),)
    assert results[1].documents == (BOOK, PLAIN) and results[1].scores == (12.5, 0.25)
    assert [len(result.documents) for result in results] == [1, 2, 0, 0, 1, 0]
    assert all(result.error is None for result in results)
    # Equal queries are sent once, and empty ones never.
    assert sorted(map(sorted, engine.batches)) == [["nothing"], ["velmora", "x1"]]


def test_request_follows_search_r1():
    with scripted_server((200, GOOD, {})) as (url, requests):
        Remote(url).search(queries("東京"), 3)
    assert requests == [{"queries": ["東京"], "topk": 3, "return_scores": True}]


def test_search_retries_after_status_500():
    with scripted_server((500, {}, {}), (200, GOOD, {})) as (url, requests):
        (result,) = Remote(url).search(queries("a"), 3)
    assert result.documents[0].title == "T" and len(requests) == 2


def test_retry_waits_for_retry_after():
    with scripted_server((503, {}, {"Retry-After": "1"}), (200, GOOD, {})) as (url, _):
        start = time.monotonic()
        (result,) = Remote(url).search(queries("a"), 3)
    assert result.error is None and time.monotonic() - start >= 1


def test_rejected_request_is_not_retried():
    with scripted_server((400, {"error": "topk is 900"}, {})) as (url, requests):
        (result,) = Remote(url).search(queries("a"), 3)
    assert "400" in result.error and "topk is 900" in result.error and len(requests) == 1


def test_slow_server_is_an_error():
    with scripted_server((200, lambda: time.sleep(1) or GOOD, {})) as (url, _):
        (result,) = Remote(url, timeout=0.2, retry_timeout=0.5).search(queries("a"), 3)
    assert "Timeout" in result.error and not result.documents


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"<html>", "not valid JSON"),
        ([], "no list"),
        ({"result": {}}, "no list"),
        ({"result": [[], []]}, "2 results for 1"),
        ({"result": [[{"document": {"id": "1"}}]]}, "has no text"),
        ({"result": [[7]]}, "has no text"),
    ],
)
def test_malformed_response_is_an_error(response, message):
    with scripted_server((200, response, {})) as (url, _):
        (result,) = Remote(url).search(queries("a"), 3)
    assert message in result.error


def test_parse_response_accepts_objects_and_strings():
    ranking = [{"document": "plain"}, {"contents": '"T"\nx'}, "text"]
    (result,) = parse_response({"result": [ranking]}, 1, 5)
    assert [(d.title, d.text) for d in result.documents] == [("", "plain"), ("T", "x"), ("", "text")]
    assert result.scores == () and len({d.id for d in result.documents}) == 3


def test_parse_response_hashes_documents_without_id():
    ranking = [{"contents": "x", "id": None}, {"contents": "y", "id": None}]
    (result,) = parse_response({"result": [ranking]}, 1, 2)
    assert len({d.id for d in result.documents}) == 2


def test_parse_response_drops_documents_beyond_k():
    (result,) = parse_response({"result": [[{"title": "T", "text": "x", "id": 4}, "b", "c"]]}, 1, 2)
    assert result.documents == (Document("4", "T", "x"), Document(result.documents[1].id, "", "b"))


def test_failing_batch_does_not_affect_other_batches():
    with serving(DictionaryEngine()) as url:
        results = Remote(url, batch=1, retry_timeout=0.1).search(queries("velmora", "broken", "x1"), 3)
    assert [result.error is None for result in results] == [True, False, True]
    assert "the index is gone" in results[1].error


def test_circuit_breaker_opens_and_then_admits_one_probe():
    with scripted_server((500, {}, {}), (500, {}, {}), (200, GOOD, {})) as (url, requests):
        remote = Remote(url, retry_timeout=0.1, cooldown=1.5)
        # The timeout is over before the first retry is due, so the breaker opens.
        assert "500" in remote.search(queries("a"), 3)[0].error
        assert "circuit breaker open" in remote.search(queries("a"), 3)[0].error and len(requests) == 1
        time.sleep(1.6)
        assert "500" in remote.search(queries("a"), 3)[0].error and len(requests) == 2  # the probe
        assert "circuit breaker open" in remote.search(queries("a"), 3)[0].error and len(requests) == 2
        time.sleep(1.6)
        # The probe succeeds and closes the breaker.
        assert remote.search(queries("a"), 3)[0].error is None
        assert remote.search(queries("b"), 3)[0].error is None


def test_half_open_breaker_admits_one_probe():
    now = [0.0]
    breaker = CircuitBreaker(10, clock=lambda: now[0])
    assert breaker.acquire() is False
    breaker.open("it crashed")
    now[0] = 9.9
    with pytest.raises(RemoteError, match="it crashed"):
        breaker.acquire()
    now[0] = 10.1
    assert breaker.acquire() is True
    with pytest.raises(RemoteError):
        breaker.acquire()
    breaker.close()
    assert breaker.acquire() is False


def test_results_are_cached_and_errors_are_not(tmp_path):
    engine = DictionaryEngine()
    with serving(engine) as url:
        first = Remote(url, cache=str(tmp_path), retry_timeout=0.1)
        results = first.search(queries("velmora", "x1", "nothing"), 3)
        assert first.search(queries("broken"), 3)[0].error
        second = Remote(url, cache=str(tmp_path), retry_timeout=0.1)
        num_batches = len(engine.batches)
        assert second.search(queries("velmora", "x1", "nothing"), 3) == results
        assert len(engine.batches) == num_batches and (second.cache.hits, second.cache.misses) == (3, 0)
        second.search(queries("velmora"), 2)  # k is part of the cache key
        assert len(engine.batches) == num_batches + 1


def test_api_key_is_sent(monkeypatch):
    with serving(DictionaryEngine(), api_key="secret") as url:
        assert "401" in Remote(url).search(queries("x1"), 3)[0].error
        monkeypatch.setenv("RLKIT_SEARCH_KEY", "secret")
        assert Remote(url).search(queries("x1"), 3)[0].error is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_remote_rejects_invalid_url(url):
    with pytest.raises(UserError, match="http://host:8000"):
        Remote(url)


@pytest.mark.parametrize("name", ["timeout", "retry_timeout", "cooldown", "concurrency", "batch"])
def test_remote_rejects_argument_that_is_not_positive(name):
    with pytest.raises(UserError, match=f"^{name} of the search server must be positive, not 0$"):
        Remote("http://127.0.0.1:9", **{name: 0})


def start_server(port, cache):
    command = [sys.executable, "-m", "rlkit", "serve-search", "world:200:0", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"RLKIT_CACHE": str(cache)}, stderr=subprocess.PIPE, text=True
    )
    assert "retrieve" in process.stderr.readline()
    return process


def test_rollout_waits_for_restarted_server_and_is_invalid_without_one(tmp_path):
    port = free_port()
    arguments = {"retry_timeout": 20, "cooldown": 0.1, "timeout": 5}
    environment = load_environment(
        "search-v2", engine=f"http://127.0.0.1:{port}", engine_args=arguments, world_size=200
    )
    server = start_server(port, tmp_path)
    try:
        task = environment.tasks("train", 1)[0]
        message = {"role": "assistant", "content": f"<search>{task['queries'][0]}</search>"}
        turn = Turn(task, [*task["prompt"], message])
        (reply,) = environment.respond([turn])
        assert task["supporting"][0] in reply.record["documents"] and reply.invalid is None
        server.send_signal(signal.SIGKILL)
        server.wait()
        servers = []
        restart = threading.Timer(1.0, lambda: servers.append(start_server(port, tmp_path)))
        restart.start()
        (reply_after_restart,) = environment.respond([turn])
        restart.join()
        server = servers[0]
        assert reply_after_restart == reply
    finally:
        server.kill()
        server.wait()
    # The server is down for good now: without a short timeout the test would retry for 20 seconds.
    environment.engine.retry_timeout = 0.5
    (reply_without_server,) = environment.respond([turn])
    assert reply_without_server.text is None and "the search failed" in reply_without_server.invalid
