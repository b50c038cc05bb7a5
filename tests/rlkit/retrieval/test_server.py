"""The server of Search-R1's protocol: its replies, its limits, and that nothing sent to it ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlkit.commands.serve_search import main
from rlkit.errors import UserError
from rlkit.retrieval.server import RequestLimits
from tests.rlkit.retrieval.serving import Dictionary, free_port, serving

SCORED = (
    '[{"document":{"id":"7","contents":"\\"Velmora Works\\"\\nIt was founded by Tarin Oskel."},"score":12.5},'
    '{"document":{"id":"8","contents":"Ünïcode 東京 without a title"},"score":0.25}]'
)
BARE = (
    '[{"id":"7","contents":"\\"Velmora Works\\"\\nIt was founded by Tarin Oskel."},'
    '{"id":"8","contents":"Ünïcode 東京 without a title"}]'
)


@pytest.fixture(scope="module")
def url():
    with serving(Dictionary(), limits=RequestLimits(body=20_000, queries=8, characters=300)) as address:
        yield address


@pytest.fixture(scope="module")
def client():
    with httpx.Client(trust_env=False, timeout=20) as made:
        yield made


def ask(client, url, **body):
    return client.post(f"{url}/retrieve", json=body)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("scores", "one"), [(True, SCORED), (False, BARE)])
def test_the_reply_is_that_of_search_r1_byte_for_byte(client, url, n, scores, one):
    """Trap T4: the original breaks without scores, and for two queries it is silently wrong."""
    reply = ask(client, url, queries=["velmora"] * n, topk=3, return_scores=scores)
    assert reply.status_code == 200
    assert reply.text == f'{{"result":[{",".join([one] * n)}]}}'


def test_the_same_request_by_curl(url):
    body = '{"queries": ["velmora", "nothing"], "topk": 3, "return_scores": true}'
    command = ["curl", "-s", "--noproxy", "*", "-X", "POST", f"{url}/retrieve", "-d", body]
    command += ["-H", "Content-Type: application/json"]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    assert done.stdout.decode() == f'{{"result":[{SCORED},[]]}}'


def test_results_are_in_the_order_of_the_queries(client, url):
    result = ask(client, url, queries=["x3", "nothing", "x1", "velmora"]).json()["result"]
    assert [[one["id"] for one in documents] for documents in result] == [["x3"], [], ["x1"], ["7", "8"]]


@pytest.mark.parametrize("topk", [None, 0])
def test_topk_of_nothing_is_the_servers_own(client, topk):
    engine = Dictionary()
    with serving(engine, topk=1) as url:
        assert len(ask(client, url, queries=["velmora"], topk=topk).json()["result"][0]) == 1
        assert len(ask(client, url, queries=["velmora"], topk=2).json()["result"][0]) == 2


def test_no_queries_no_results(client, url):
    assert ask(client, url, queries=[]).json() == {"result": []}


BAD = [
    (b"", 400, "no JSON"),
    (b"{", 400, "no JSON"),
    (b"\xff\xfe", 400, "no JSON"),
    (b"[" * 9000, 400, "no JSON"),
    (b"[]", 400, "object"),
    (b"{}", 400, "list of texts"),
    (b'{"queries": "velmora"}', 400, "list of texts"),
    (b'{"queries": [1]}', 400, "list of texts"),
    (b'{"queries": ["a", "\\ud800"]}', 400, "surrogate"),
    (b'{"queries": [], "query": 1}', 400, "'query'"),
    (b'{"queries": [], "topk": "3"}', 400, "whole number"),
    (b'{"queries": [], "topk": true}', 400, "whole number"),
    (b'{"queries": [], "topk": -1}', 400, "from 1 to 100"),
    (b'{"queries": [], "topk": 101}', 400, "from 1 to 100"),
    (b'{"queries": [], "return_scores": 1}', 400, "true or false"),
    (json.dumps({"queries": ["a"] * 9}).encode(), 413, "at most 8"),
    (json.dumps({"queries": ["a" * 301]}).encode(), 413, "longer than 300"),
    (json.dumps({"queries": ["a" * 10_000_000]}).encode(), 413, "larger than 20,000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=[f"{b[:30]!r}" for b, *_ in BAD])
def test_what_is_wrong_is_said_and_the_server_lives_on(client, url, body, status, words):
    reply = client.post(f"{url}/retrieve", content=body)
    assert reply.status_code == status
    assert set(reply.json()) == {"error"} and words in reply.json()["error"]
    assert ask(client, url, queries=["x1"]).status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
fields = st.sampled_from(["queries", "topk", "return_scores", "query"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(fields, values | st.lists(st.text(max_size=9), max_size=4)) | values)
def test_no_json_breaks_it(client, url, body):
    reply = client.post(f"{url}/retrieve", content=json.dumps(body).encode())
    assert reply.status_code in (200, 400, 413)
    assert set(reply.json()) <= {"result", "error"}


@pytest.mark.parametrize("query", ["ill", "half"])
def test_a_failing_engine_is_no_empty_result(client, url, query):
    reply = ask(client, url, queries=["velmora", query])
    assert reply.status_code == 502 and "failed" in reply.json()["error"]


def test_a_key_is_asked_for(client):
    with serving(Dictionary(), api_key="secret") as url:
        assert ask(client, url, queries=[]).status_code == 401
        for value, status in (
            ("Bearer secret", 200),
            ("Bearer Secret", 401),
            ("secret", 401),
            ("Bearer sécret", 401),
        ):
            headers = {"Authorization": value.encode()}
            assert client.post(f"{url}/retrieve", json={"queries": []}, headers=headers).status_code == status


def test_a_slow_search_is_given_up_and_health_answers_meanwhile(client):
    with serving(Dictionary(pause=4.0), limits=RequestLimits(seconds=2)) as url:
        replies = []
        asking = threading.Thread(target=lambda: replies.append(ask(client, url, queries=["x1"])))
        asking.start()
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok" and not replies
        asking.join()
        assert replies[0].status_code == 504 and "2 seconds" in replies[0].json()["error"]


def test_a_request_that_does_not_come_is_given_up(client):
    with serving(Dictionary(), limits=RequestLimits(seconds=0.3)) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=10) as slow:
            slow.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert ask(client, url, queries=["x1"]).status_code == 200


def test_too_many_waiting_are_told_to_come_back(client):
    with serving(Dictionary(pause=0.4), limits=RequestLimits(waiting=2, threads=1)) as url:
        replies = []
        asking = [
            threading.Thread(target=lambda: replies.append(ask(client, url, queries=["x1"])))
            for _ in range(6)
        ]
        for one in asking:
            one.start()
        for one in asking:
            one.join()
        statuses = sorted(reply.status_code for reply in replies)
        assert set(statuses) == {200, 503} and statuses.count(200) >= 2
        assert all(r.headers["Retry-After"] == "1" for r in replies if r.status_code == 503)


def test_each_of_many_clients_gets_its_own_answer(url):
    wrong = []

    def one(i):
        with httpx.Client(trust_env=False, timeout=20) as mine:
            for j in range(5):
                reply = ask(mine, url, queries=[f"x{i}-{j}"]).json()
                if reply["result"][0][0]["id"] != f"x{i}-{j}":
                    wrong.append((i, j))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_command_serves_a_world_and_ends_with_a_signal(tmp_path, client):
    port = free_port()
    command = [sys.executable, "-m", "rlkit", "serve-search", "world:200:0", "--port", str(port)]
    variables = os.environ | {"RLKIT_CACHE": str(tmp_path)}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/retrieve" in process.stderr.readline()
        url = f"http://127.0.0.1:{port}"
        transport = httpx.HTTPTransport(retries=9)
        with httpx.Client(trust_env=False, transport=transport, timeout=20) as patient:
            assert patient.get(f"{url}/health").json()["documents"] == 200
        found = ask(client, url, queries=["lawyer"], topk=2, return_scores=True).json()["result"][0]
        assert len(found) == 2 and found[0]["score"] >= found[1]["score"] > 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        process.stderr.close()


def test_others_need_a_key(monkeypatch):
    monkeypatch.delenv("RLKIT_SEARCH_KEY", raising=False)
    for host in ("0.0.0.0", "example.com", "::"):
        with pytest.raises(UserError, match="RLKIT_SEARCH_KEY"):
            main(["world:200:0", "--host", host])
    with pytest.raises(UserError, match="world:SIZE:SEED"):
        main(["world:x:0"])
