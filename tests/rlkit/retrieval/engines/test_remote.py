"""The client of search servers: its requests, and its retries, circuit breaker and cache."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlkit.environment import Turn
from rlkit.errors import UnavailableError, UserError
from rlkit.registry import load_environment
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.engines.remote import CircuitBreaker, Remote
from rlkit.retrieval.engines.responses import RemoteError
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


class BehavingServer:
    """Server whose function decides on each request.

    Args:
        respond: Function of the list of queries and of the server. It returns the JSON or the bytes of the
            body, (status, body, headers), a generator of the parts of the body, or None to close the
            connection without a response.

    Attributes:
        requests: Lists of queries, in the order of their arrival.
        stopped: Event that ends requests that hang.
        seen: (method, path, Authorization header) of each request.
    """

    def __init__(self, respond):
        self.respond, self.requests, self.seen = respond, [], []
        self.stopped = threading.Event()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                received = json.loads(body)["queries"] if body else None
                server.requests.append(received)
                server.seen.append((self.command, self.path, self.headers["Authorization"]))
                response = server.respond(received, server)
                if response is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, body, headers = response if isinstance(response, tuple) else (200, response, {})
                with suppress(OSError):  # the client has gone
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    parts = body
                    if not isinstance(body, Iterator):
                        parts = [body if isinstance(body, bytes) else json.dumps(body).encode()]
                        self.send_header("Content-Length", str(len(parts[0])))
                    self.end_headers()
                    for part in parts:
                        self.wfile.write(part)

            do_GET = do_POST

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


def answer(texts):
    """Return the response of a healthy server: a document named like each query."""
    return {"result": [[{"document": {"id": text, "contents": text}, "score": 1.0}] for text in texts]}


def drip(server):
    """Yield a byte at a time, for as long as the server runs."""
    while not server.stopped.wait(0.05):
        yield b" "


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
    assert sorted(text for batch in engine.batches for text in batch) == ["nothing", "velmora", "x1"]


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


def test_failing_batch_does_not_affect_other_batches():
    with serving(DictionaryEngine()) as url:
        results = Remote(url, batch=1).search(queries("velmora", "broken", "x1"), 3)
    assert [result.error is None for result in results] == [True, False, True]
    assert "the index is gone" in results[1].error


def test_circuit_breaker_opens_and_then_admits_one_probe():
    # Waiting as long as the server asks for would exceed the deadline, so there is no retry.
    down, now = (503, {}, {"Retry-After": "3600"}), [0.0]
    with scripted_server(down, down, (200, GOOD, {})) as (url, requests):
        remote = Remote(url, cooldown=10.0)
        remote._breaker.clock = lambda: now[0]
        assert "503" in remote.search(queries("a"), 3)[0].error
        assert "circuit breaker open" in remote.search(queries("a"), 3)[0].error and len(requests) == 1
        now[0] = 11.0
        assert "503" in remote.search(queries("a"), 3)[0].error and len(requests) == 2  # the probe
        assert "circuit breaker open" in remote.search(queries("a"), 3)[0].error and len(requests) == 2
        now[0] = 22.0
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
        first = Remote(url, cache=str(tmp_path))
        results = first.search(queries("velmora", "x1", "nothing"), 3)
        assert first.search(queries("broken", "x2"), 3)[0].error
        second = Remote(url, cache=str(tmp_path))
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


# What a server does to a request with a bad query, and words of the error.
FAILURES = {
    "rejects": (lambda server: (413, {"error": "too long"}, {}), "413"),
    "rejects as unprocessable": (lambda server: (422, b"what?", {}), "422"),
    "fails": (lambda server: (500, b"Traceback", {}), "500"),
    "fails behind a proxy": (lambda server: (502, b"", {}), "502"),
    "times out behind a proxy": (lambda server: (504, b"", {}), "504"),
    "fails with an unusual status": (lambda server: (520, b"", {}), "520"),
    "hangs": (lambda server: server.stopped.wait() and b"", "Timeout"),
    "drips": (drip, "Timeout"),
    "crashes": (lambda server: None, "RemoteProtocolError"),
    "shows a login page": (lambda server: b"<html>log in</html>", "not valid JSON"),
    "sends no body": (lambda server: b"", "not valid JSON"),
    "sends a truncated body": (lambda server: b'{"result": [[', "not valid JSON"),
    "sends bad gzip": (
        lambda server: (200, b"this is not gzip", {"Content-Encoding": "gzip"}),
        "DecodingError",
    ),
    "sends too few results": (lambda server: {"result": []}, "0 results for"),
    "sends too many results": (lambda server: {"result": [[]] * 65}, "65 results for"),
    "sends an error with status 200": (lambda server: {"error": "x"}, "no list of results"),
}


@pytest.mark.parametrize(("fail", "message"), FAILURES.values(), ids=FAILURES)
def test_bad_query_is_an_error_of_its_own(fail, message):
    def respond(texts, server):
        return fail(server) if "bad" in texts else answer(texts)

    texts = [f"q{i}" for i in range(63)]
    texts.insert(40, "bad")
    with BehavingServer(respond) as server:
        remote = Remote(server.url, timeout=2.0, retry_timeout=12.0)
        results = remote.search(queries(*texts), 3)
        (after,) = remote.search(queries("again"), 3)
    for text, result in zip(texts, results, strict=True):
        if text == "bad":
            assert message in result.error and server.url in result.error and not result.documents
        else:
            assert result.error is None and result.documents[0].id == text
    assert after.error is None  # the circuit breaker is closed
    # The batch, its queries alone, and at most one retry of each failure and of each broken connection.
    assert server.requests[0] == texts or message == "RemoteProtocolError"
    assert sum("bad" not in texts for texts in server.requests) == 64
    assert 2 <= sum("bad" in texts for texts in server.requests) <= 6


def test_bad_queries_do_not_take_all_slots():
    def respond(texts, server):
        if any(text.startswith("bad") for text in texts):
            server.stopped.wait()
        return answer(texts)

    texts = ["bad1", "bad2", "bad3", "good1", "good2"]
    with BehavingServer(respond) as server:
        results = Remote(server.url, retry_timeout=9.0, concurrency=2).search(queries(*texts), 3)
    assert [result.error is None for result in results] == [False, False, False, True, True]


@pytest.mark.parametrize("status", [429, 503])
def test_batch_is_retried_as_a_batch_after_overload(status):
    statuses = [status, status]

    def respond(texts, server):
        return (statuses.pop(), b"busy", {"Retry-After": "0"}) if statuses else answer(texts)

    with BehavingServer(respond) as server:
        results = Remote(server.url).search(queries("a", "b"), 3)
    assert server.requests == [["a", "b"]] * 3 and all(result.error is None for result in results)


@pytest.mark.parametrize("status", [429, 503])
def test_query_that_is_always_refused_is_an_error_of_its_own(status):
    def respond(texts, server):
        return (status, b"busy", {}) if "bad" in texts else answer(texts)

    with BehavingServer(respond) as server:
        remote = Remote(server.url, retry_timeout=5.0)
        results = remote.search(queries("a", "bad", "b"), 3)
        (after,) = remote.search(queries("again"), 3)
    assert [result.error is None for result in results] == [True, False, True]
    assert str(status) in results[1].error and after.error is None  # the circuit breaker is closed


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "RLKIT_SEARCH_KEY"), (403, "RLKIT_SEARCH_KEY"), (404, "/retrieve"), (405, "/retrieve")],
)
def test_request_that_all_queries_share_fails_at_once_with_a_remedy(status, remedy):
    with BehavingServer(lambda texts, server: (status, b"no", {})) as server:
        results = Remote(server.url).search(queries("a", "b"), 3)
    assert server.requests == [["a", "b"]]
    assert all(f"status {status}: no; " in result.error and remedy in result.error for result in results)


@pytest.mark.parametrize(
    "retry_after",
    ["3600", "1e9", "Fri, 31 Dec 2100 23:59:59 GMT"],
)
def test_search_does_not_wait_for_a_retry_after_beyond_its_deadline(retry_after):
    with BehavingServer(lambda texts, server: (503, b"", {"Retry-After": retry_after})) as server:
        (result,) = Remote(server.url, retry_timeout=30).search(queries("a"), 3)
    assert "503" in result.error and len(server.requests) == 1


@pytest.mark.parametrize(
    "retry_after", ["", "soon", "-1", "nan", "²", "Wed, 21 Oct 2015 07:28:00 GMT", "9 9"]
)
def test_search_ignores_a_retry_after_without_meaning(retry_after):
    responses = [(503, b"", {"Retry-After": retry_after.encode().decode("latin-1")})]
    with BehavingServer(lambda texts, server: responses.pop() if responses else answer(texts)) as server:
        (result,) = Remote(server.url).search(queries("a"), 3)
    assert result.error is None and len(server.requests) == 2


def test_deadline_covers_all_batches():
    """The server hangs. Without one deadline, each of the six batches would take its own time in turn."""
    with BehavingServer(lambda texts, server: server.stopped.wait() and b"") as server:
        remote = Remote(server.url, retry_timeout=1.0, concurrency=1, batch=1)
        results = remote.search(queries(*"abcdef"), 3)
        assert "Timeout" in results[0].error
        assert all("used up" in result.error for result in results[1:])
        assert server.requests == [["a"]]
        assert "circuit breaker open" in remote.search(queries("a"), 3)[0].error


def test_search_of_several_threads_shares_the_connections():
    running, most = [], []

    def respond(texts, server):
        running.append(texts)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(texts)
        return answer(texts)

    with BehavingServer(respond) as server, ThreadPoolExecutor(8) as pool:
        remote = Remote(server.url, concurrency=3, batch=1)
        batches = [[f"{thread}-{i}" for i in range(5)] for thread in range(8)]
        for texts, results in zip(
            batches, pool.map(lambda texts: remote.search(queries(*texts), 1), batches), strict=True
        ):
            assert [result.documents[0].id for result in results] == texts
    assert max(most) <= 3


inherited = {}  # by a forked process


def search_in_fork(text):
    return inherited["remote"].search(queries(text), 3)


def test_search_works_in_a_forked_process():
    with serving(DictionaryEngine()) as url:
        remote = inherited["remote"] = Remote(url)
        expected = remote.search(queries("velmora"), 3)
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.apply_async(search_in_fork, ("velmora",)).get(60) == expected
        assert remote.search(queries("x1"), 3)[0].error is None


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirect_keeps_the_post_and_the_key(status, monkeypatch):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", "secret")

    def respond(texts, server):
        path = server.seen[-1][1]
        return (status, b"", {"Location": "/retrieve"}) if path == "/retrieve/" else answer(texts)

    with BehavingServer(respond) as server:
        results = Remote(f"{server.url}/retrieve/").search(queries("a", "b"), 3)
    assert [result.documents[0].id for result in results] == ["a", "b"]
    assert server.seen == [("POST", path, "Bearer secret") for path in ("/retrieve/", "/retrieve")]


def test_redirect_to_another_host_does_not_carry_the_key(monkeypatch):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", "secret")
    with BehavingServer(lambda texts, server: answer(texts)) as other:
        redirect = (307, b"", {"Location": f"{other.url}/retrieve"})
        with BehavingServer(lambda texts, server: redirect) as server:
            (result,) = Remote(server.url).search(queries("a"), 3)
    assert result.error is None and other.seen == [("POST", "/retrieve", None)]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/retrieve", "redirects"),
        ("ftp://host/", "UnsupportedProtocol"),
        ("http://127.0.0.1:99999/", ""),
        ("http://[", ""),
        ("", ""),
    ],
)
def test_redirect_without_a_target_is_an_error(location, message):
    headers = {"Location": location} if location else {}
    with BehavingServer(lambda texts, server: (307, b"", headers)) as server:
        results = Remote(server.url, retry_timeout=5.0).search(queries("a", "b"), 3)
    assert all(result.error and message in result.error for result in results)


def test_lone_surrogates_of_queries_are_replaced(tmp_path):
    with BehavingServer(lambda texts, server: answer(texts)) as server:
        remote = Remote(server.url, cache=str(tmp_path))
        results = remote.search(queries("a", "b \ud800", "b ?", "\udfff"), 3)
        assert remote.search(queries("a", "b \ud800", "b ?", "\udfff"), 3) == results
    assert server.requests == [["a", "b ?", "?"]]
    assert [result.documents[0].text for result in results] == ["a", "b ?", "b ?", "?"]


@pytest.mark.parametrize(
    ("key", "header"),
    [("", None), ("  ", None), ("secret\n", "Bearer secret"), ("Schlüssel 東京", "Bearer Schlüssel 東京")],
)
def test_api_key_is_sent_as_utf8_and_an_empty_one_is_none(key, header, monkeypatch):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", key)
    with BehavingServer(lambda texts, server: answer(texts)) as server:
        (result,) = Remote(server.url).search(queries("a"), 3)
    ((_, _, received),) = server.seen
    assert result.error is None
    assert received is None if header is None else received.encode("latin-1").decode() == header


def test_api_key_with_control_characters_is_a_user_error(monkeypatch):
    monkeypatch.setenv("RLKIT_SEARCH_KEY", "a\nb")
    with pytest.raises(UserError, match="RLKIT_SEARCH_KEY has control characters"):
        Remote("http://127.0.0.1:9")


def test_probe_accepts_a_healthy_server():
    with BehavingServer(lambda texts, server: answer(texts)) as server:
        Remote(server.url).probe()
    assert server.requests == [["test"]]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((401, b"", {}), "RLKIT_SEARCH_KEY"),
        ((404, b"not\nfound", {}), "/retrieve"),
        ((503, b"", {}), "retry later"),
        ((500, b"", {}), "start the server with `rlkit serve-search INDEX`, or fix the URL"),
        (b"<html>", "fix the URL"),
        ({"result": [None]}, "fix the URL"),
    ],
)
def test_probe_names_the_url_and_a_remedy(response, message):
    with (
        BehavingServer(lambda texts, server: response) as server,
        pytest.raises(UnavailableError, match=message) as raised,
    ):
        Remote(server.url).probe()
    assert f"{server.url}/retrieve" in str(raised.value) and "\n" not in str(raised.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fail", [drip, lambda server: server.stopped.wait() and b""])
def test_probe_of_a_server_that_does_not_answer_ends(fail):
    with (
        BehavingServer(lambda texts, server: fail(server)) as server,
        pytest.raises(UnavailableError, match="Timeout"),
    ):
        Remote(server.url, timeout=0.5).probe()
    assert len(server.requests) == 1


def down_url():
    return f"http://127.0.0.1:{free_port()}"


def run_rlkit(*arguments):
    command = [sys.executable, "-m", "rlkit", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("split", ["train", "dev"])
def test_check_reports_a_server_that_is_down_in_one_line(split):
    url = down_url()
    process = run_rlkit("check", "search-v3", "--split", split, "--environment_args.engine", url)
    assert process.returncode == 2 and not process.stdout
    (line,) = process.stderr.strip().splitlines()
    assert url in line and "rlkit serve-search INDEX" in line


@pytest.mark.parametrize("key", ["engine", "held_out_engine"])
def test_dry_run_reports_a_server_that_is_down_in_one_line(key, tmp_path):
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "config.json").write_text("{}")
    url = down_url()
    arguments = {
        "environment": "search-v3",
        "environment_args": {key: url, "world_size": 100},
        "model_name_or_path": str(tmp_path / "no-model"),  # the server is checked before the model
        "evaluation_tasks": 4,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(arguments))
    process = run_rlkit("train", str(tmp_path / "run.yaml"), "--dry_run")
    assert process.returncode == 2
    assert url in process.stderr and "rlkit serve-search INDEX" in process.stderr
    assert "Traceback" not in process.stderr and "no-model" not in process.stderr


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
        "search-v3", engine=f"http://127.0.0.1:{port}", engine_args=arguments, world_size=200
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
