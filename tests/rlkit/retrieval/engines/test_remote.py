"""The client of search servers: what it sends and reads, and what it does when a server fails."""

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
from rlkit.retrieval.engines.remote import Breaker, Remote, RemoteError, read_reply
from tests.quick import ROOT
from tests.rlkit.retrieval.serving import BOOK, PLAIN, Dictionary, free_port, serving


@contextmanager
def scripted(*answers):
    """A server that gives (status, body, headers) one after the other, the last one for ever."""
    left, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body, headers = left.pop(0) if len(left) > 1 else left[0]
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

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        listening.server_close()


def queries(*texts):
    return [Query(text) for text in texts]


GOOD = {"result": [[{"document": {"id": "7", "contents": '"T"\nx'}, "score": 1.0}]]}


def test_it_finds_what_our_server_finds():
    engine = Dictionary()
    with serving(engine) as url:
        remote = Remote(url, batch=2)
        found = remote.search(queries("x1", "velmora", "", "nothing", "x1", "  "), 3)
    assert found[0].documents == (Document("x1", "Title x1", "Text x1"),)
    assert found[1].documents == (BOOK, PLAIN) and found[1].scores == (12.5, 0.25)
    assert [len(one.documents) for one in found] == [1, 2, 0, 0, 1, 0]
    assert all(one.error is None for one in found)
    assert sorted(map(sorted, engine.asked)) == [
        ["nothing"],
        ["velmora", "x1"],
    ]  # once each, none that is empty


def test_the_request_is_that_of_search_r1():
    with scripted((200, GOOD, {})) as (url, seen):
        Remote(url).search(queries("東京"), 3)
    assert seen == [{"queries": ["東京"], "topk": 3, "return_scores": True}]


def test_a_failure_and_then_an_answer_is_an_answer():
    with scripted((500, {}, {}), (200, GOOD, {})) as (url, seen):
        (found,) = Remote(url).search(queries("a"), 3)
    assert found.documents[0].title == "T" and len(seen) == 2


def test_it_comes_back_when_it_was_told_to():
    with scripted((503, {}, {"Retry-After": "1"}), (200, GOOD, {})) as (url, _):
        start = time.monotonic()
        (found,) = Remote(url).search(queries("a"), 3)
    assert found.error is None and time.monotonic() - start >= 1


def test_what_is_refused_is_said_and_not_sent_again():
    with scripted((400, {"error": "topk is 900"}, {})) as (url, seen):
        (found,) = Remote(url).search(queries("a"), 3)
    assert "400" in found.error and "topk is 900" in found.error and len(seen) == 1


def test_a_server_that_is_too_slow_is_an_error_and_no_empty_result():
    with scripted((200, lambda: time.sleep(1) or GOOD, {})) as (url, _):
        (found,) = Remote(url, timeout=0.2, patience=0.5).search(queries("a"), 3)
    assert "Timeout" in found.error and not found.documents


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        (b"<html>", "no JSON"),
        ([], "no list"),
        ({"result": {}}, "no list"),
        ({"result": [[], []]}, "2 results for 1"),
        ({"result": [[{"document": {"id": "1"}}]]}, "without text"),
        ({"result": [[7]]}, "without text"),
    ],
)
def test_a_reply_that_is_none_is_an_error(reply, word):
    with scripted((200, reply, {})) as (url, _):
        (found,) = Remote(url).search(queries("a"), 3)
    assert word in found.error


def test_servers_differ():
    """Documents as objects, as texts, without scores or ids, and more of them than were asked for."""
    (found,) = read_reply({"result": [[{"document": "plain"}, {"contents": '"T"\nx'}, "text"]]}, 1, 5)
    assert [(d.title, d.text) for d in found.documents] == [("", "plain"), ("T", "x"), ("", "text")]
    assert found.scores == () and len({d.id for d in found.documents}) == 3
    (found,) = read_reply({"result": [[{"contents": "x", "id": None}, {"contents": "y", "id": None}]]}, 1, 2)
    assert len({d.id for d in found.documents}) == 2
    (found,) = read_reply({"result": [[{"title": "T", "text": "x", "id": 4}, "b", "c"]]}, 1, 2)
    assert found.documents == (Document("4", "T", "x"), Document(found.documents[1].id, "", "b"))


def test_one_batch_fails_and_the_others_do_not():
    with serving(Dictionary()) as url:
        found = Remote(url, batch=1, patience=0.1).search(queries("velmora", "ill", "x1"), 3)
    assert [one.error is None for one in found] == [True, False, True]
    assert "the index is gone" in found[1].error


def test_a_server_that_went_away_is_left_alone_and_then_tried_once():
    with scripted((500, {}, {}), (500, {}, {}), (200, GOOD, {})) as (url, seen):
        remote = Remote(url, patience=0.1, cool=1.5)
        assert "500" in remote.search(queries("a"), 3)[0].error
        assert "left alone" in remote.search(queries("a"), 3)[0].error and len(seen) == 1
        time.sleep(1.6)
        assert "500" in remote.search(queries("a"), 3)[0].error and len(seen) == 2  # the one that tries
        assert "left alone" in remote.search(queries("a"), 3)[0].error and len(seen) == 2
        time.sleep(1.6)
        assert remote.search(queries("a"), 3)[0].error is None
        assert remote.search(queries("b"), 3)[0].error is None


def test_the_breaker_lets_one_try():
    now = [0.0]
    breaker = Breaker(10, clock=lambda: now[0])
    assert breaker.enter() is False
    breaker.open("it fell over")
    now[0] = 9.9
    with pytest.raises(RemoteError, match="it fell over"):
        breaker.enter()
    now[0] = 10.1
    assert breaker.enter() is True
    with pytest.raises(RemoteError):
        breaker.enter()
    breaker.close()
    assert breaker.enter() is False


def test_results_are_kept_and_failures_are_not(tmp_path):
    engine = Dictionary()
    with serving(engine) as url:
        first = Remote(url, cache=str(tmp_path), patience=0.1)
        found = first.search(queries("velmora", "x1", "nothing"), 3)
        assert first.search(queries("ill"), 3)[0].error
        again = Remote(url, cache=str(tmp_path), patience=0.1)
        asked = len(engine.asked)
        assert again.search(queries("velmora", "x1", "nothing"), 3) == found
        assert len(engine.asked) == asked and (again.cache.hits, again.cache.misses) == (3, 0)
        again.search(queries("velmora"), 2)  # another k is another question
        assert len(engine.asked) == asked + 1


def test_a_key_goes_with_it(monkeypatch):
    with serving(Dictionary(), api_key="secret") as url:
        assert "401" in Remote(url).search(queries("x1"), 3)[0].error
        monkeypatch.setenv("RLKIT_SEARCH_KEY", "secret")
        assert Remote(url).search(queries("x1"), 3)[0].error is None


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="http://host:8000"):
        Remote(url)


def start(port, cache):
    command = [sys.executable, "-m", "rlkit", "serve-search", "world:200:0", "--port", str(port)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"RLKIT_CACHE": str(cache)}, stderr=subprocess.PIPE, text=True
    )
    assert "retrieve" in process.stderr.readline()
    return process


def test_a_rollout_waits_for_a_server_that_comes_back_and_is_invalid_without_one(tmp_path):
    port = free_port()
    arguments = {"patience": 20, "cool": 0.1, "timeout": 5}
    environment = load_environment(
        "search-v2", engine=f"http://127.0.0.1:{port}", engine_args=arguments, world_size=200
    )
    task = environment.tasks("train", 1)[0]
    asked = {"role": "assistant", "content": f"<search>{task['queries'][0]}</search>"}
    turn = Turn(task, [*task["prompt"], asked])
    server = start(port, tmp_path)
    try:
        (reply,) = environment.respond([turn])
        assert task["supporting"][0] in reply.record["documents"] and reply.invalid is None
        server.send_signal(signal.SIGKILL)
        server.wait()
        again = threading.Timer(1.0, lambda: servers.append(start(port, tmp_path)))
        servers = []
        again.start()
        (back,) = environment.respond([turn])
        again.join()
        server = servers[0]
        assert back == reply
    finally:
        server.kill()
        server.wait()
    environment.engine.patience = 0.5
    (gone,) = environment.respond([turn])
    assert gone.text is None and "the search failed" in gone.invalid
