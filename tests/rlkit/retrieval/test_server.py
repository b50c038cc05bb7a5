"""The server of Search-R1's protocol: responses, limits, and robustness against malformed requests."""

import json
import logging
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uvicorn.config import HTTP_PROTOCOLS

from rlkit.retrieval.server_requests import RequestLimits
from tests.rlkit.retrieval.serving import DictionaryEngine, serving
from tests.waiting import wait_until

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
    with serving(
        DictionaryEngine(),
        limits=RequestLimits(max_body_bytes=20_000, max_queries=8, max_query_characters=300, max_topk=100),
    ) as address:
        yield address


@pytest.fixture(scope="module")
def client():
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def post(client, url, **body):
    return client.post(f"{url}/retrieve", json=body)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("return_scores", "ranking"), [(True, SCORED), (False, BARE)])
def test_response_equals_search_r1_byte_for_byte(client, url, n, return_scores, ranking):
    """Trap T4: the original server fails without scores, and its results for two queries are wrong."""
    response = post(client, url, queries=["velmora"] * n, topk=3, return_scores=return_scores)
    assert response.status_code == 200
    assert response.text == f'{{"result":[{",".join([ranking] * n)}]}}'


def test_retrieve_works_with_curl(url):
    body = '{"queries": ["velmora", "nothing"], "topk": 3, "return_scores": true}'
    command = ["curl", "-s", "--noproxy", "*", "-X", "POST", f"{url}/retrieve", "-d", body]
    command += ["-H", "Content-Type: application/json"]
    completed = subprocess.run(command, capture_output=True, timeout=20, check=True)
    assert completed.stdout.decode() == f'{{"result":[{SCORED},[]]}}'


def test_results_are_in_query_order(client, url):
    result = post(client, url, queries=["x3", "nothing", "x1", "velmora"]).json()["result"]
    ids = [[document["id"] for document in ranking] for ranking in result]
    assert ids == [["x3"], [], ["x1"], ["7", "8"]]


@pytest.mark.parametrize("topk", [None, 0])
def test_null_or_zero_topk_is_the_default(client, topk):
    engine = DictionaryEngine()
    with serving(engine, topk=1) as url:
        assert len(post(client, url, queries=["velmora"], topk=topk).json()["result"][0]) == 1
        assert len(post(client, url, queries=["velmora"], topk=2).json()["result"][0]) == 2


def test_no_queries_give_no_results(client, url):
    assert post(client, url, queries=[]).json() == {"result": []}


BAD_REQUESTS = [
    (b"", 400, "not valid JSON"),
    (b"{", 400, "not valid JSON"),
    (b"\xff\xfe", 400, "not valid JSON"),
    (b"[" * 9000, 400, "not valid JSON"),
    (b"[]", 400, "object"),
    (b"{}", 400, "list of strings"),
    (b'{"queries": null}', 400, "list of strings"),
    (b'{"queries": [1]}', 400, "list of strings"),
    (b'{"queries": {"a": 1}}', 400, "list of strings"),
    (b'{"queries": [], "topk": "three"}', 400, "an integer, not 'three'"),
    (b'{"queries": [], "topk": 2.5}', 400, "an integer"),
    (b'{"queries": [], "topk": NaN}', 400, "an integer"),
    (b'{"queries": [], "topk": -1}', 400, "from 1 to 100"),
    (b'{"queries": [], "topk": 101}', 400, "from 1 to 100"),
    (b'{"queries": [], "return_scores": "maybe"}', 400, "true or false"),
    (json.dumps({"queries": ["a"] * 9}).encode(), 413, "at most 8"),
    (json.dumps({"queries": ["a" * 10_000_000]}).encode(), 413, "larger than 20,000 bytes"),
]


@pytest.mark.parametrize(
    ("body", "status", "message"), BAD_REQUESTS, ids=[f"{body[:30]!r}" for body, *_ in BAD_REQUESTS]
)
def test_bad_request_gets_error_and_server_stays_up(client, url, body, status, message):
    response = client.post(f"{url}/retrieve", content=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"} and message in response.json()["error"]
    assert post(client, url, queries=["x1"]).status_code == 200


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
fields = st.sampled_from(["queries", "topk", "return_scores", "query", "top_k", "rerank_topk", "x"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(fields, values | st.lists(st.text(max_size=9), max_size=4)) | values)
def test_server_survives_arbitrary_json(client, url, body):
    response = client.post(f"{url}/retrieve", content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 413)
    assert set(response.json()) <= {"result", "error"}


@pytest.mark.parametrize("query", ["broken", "failed"])
def test_failing_search_is_502(client, url, query):
    response = post(client, url, queries=["velmora", query])
    assert response.status_code == 502 and "failed" in response.json()["error"]
    # The others can be sent again without it.
    assert len(post(client, url, queries=["velmora"]).json()["result"][0]) == 2


def test_step_of_released_client_is_answered(client):
    """Search-R1's generation manager sends the queries of all active rollouts, 512 x 5, in one request."""
    queries = [f"x{i}" for i in range(2560)]
    queries[7] = "x" + "long " * 2000
    queries[8] = "x\ud800"
    body = {"queries": queries, "topk": 3, "return_scores": True, "step": 12, "meta": {"split": "train"}}
    with serving(DictionaryEngine()) as url:
        response = client.post(f"{url}/retrieve", content=json.dumps(body))
    assert response.status_code == 200
    queries[7] = queries[7][: RequestLimits().max_query_characters]
    queries[8] = "x?"
    for query, ranking in zip(queries, response.json()["result"], strict=True):
        assert [item["document"]["id"] for item in ranking] == [query]
        assert ranking[0]["score"] == len(query)


@pytest.mark.parametrize("body", [{"query": "velmora"}, {"queries": "velmora"}, {"query": ["velmora"]}])
def test_single_query_gets_one_result(client, url, body):
    response = client.post(f"{url}/retrieve/", json=body | {"topk": "1", "return_scores": "false"})
    assert response.text == f'{{"result":[{BARE.partition(",{")[0]}]]}}'


def test_other_paths_and_methods_are_refused(client, url):
    assert client.get(f"{url}/retrieve").status_code == 405
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "a" * 24}
    assert client.get(f"{url}/retrieve", headers=upgrade).status_code == 405
    for path in ("/", "/search", "/retrieve/x", "/health/.."):
        assert client.post(f"{url}{path}", json={"queries": []}).status_code == 404


def test_api_key_is_required(client):
    with serving(DictionaryEngine(), api_key="secret") as url:
        assert post(client, url, queries=[]).status_code == 401
        for value, status in (
            ("Bearer secret", 200),
            ("bearer secret", 200),
            ("Bearer Secret", 401),
            ("Bearer", 401),
            ("Basic secret", 401),
            ("secret", 401),
            ("Bearer sécret", 401),
        ):
            headers = {"Authorization": value.encode()}
            assert client.post(f"{url}/retrieve", json={"queries": []}, headers=headers).status_code == status


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_api_key_may_contain_other_characters_than_ascii(client, encoding):
    with serving(DictionaryEngine(), api_key="sécret") as url:
        for key, status in (("sécret", 200), ("s?cret", 401), ("secret", 401)):
            headers = {"Authorization": f"Bearer {key}".encode(encoding)}
            assert client.post(f"{url}/retrieve", json={"queries": []}, headers=headers).status_code == status
    with serving(DictionaryEngine(), api_key="ключ") as url:
        for value, status in (("Bearer ключ".encode(), 200), (b"Bearer ????", 401)):
            headers = {"Authorization": value}
            assert client.post(f"{url}/retrieve", json={"queries": []}, headers=headers).status_code == status


def test_slow_search_times_out_without_blocking_health(client):
    with serving(DictionaryEngine(delay=4.0), limits=RequestLimits(timeout_seconds=2)) as url:
        responses = []
        thread = threading.Thread(target=lambda: responses.append(post(client, url, queries=["x1"])))
        thread.start()
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok" and not responses
        thread.join()
        assert responses[0].status_code == 504 and "2 seconds" in responses[0].json()["error"]


def test_incomplete_request_times_out(client):
    with serving(DictionaryEngine(), limits=RequestLimits(timeout_seconds=1.0)) as url:
        with connect(url) as slow:
            # The header announces 100 bytes, but only one follows.
            slow.sendall(HEAD + b"{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert post(client, url, queries=["x1"]).status_code == 200


HEAD = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
COMPLETE = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(url):
    address = httpx.URL(url)
    return socket.create_connection((address.host, address.port), timeout=20)


def until_closed(connection):
    """Return what a server sends until it closes the connection; socket.timeout if it does not."""
    received = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(1000):
            received += data
    return received


@pytest.fixture(params=["httptools", "h11"])
def http_parser(request, monkeypatch):
    """HTTP parser that uvicorn selects: httptools if it is installed, else h11."""
    if request.param == "h11":
        monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["h11"])
    else:
        pytest.importorskip("httptools")


@pytest.mark.parametrize("sent", [b"", b"P", HEAD[:-2], COMPLETE + HEAD[:20]], ids=repr)
def test_connection_without_complete_head_is_closed(http_parser, client, sent):
    with serving(DictionaryEngine(), limits=RequestLimits(timeout_seconds=1.0)) as url:
        with connect(url) as connection:
            connection.sendall(sent[: len(COMPLETE)])
            received = connection.recv(1000) if sent.startswith(COMPLETE) else b""
            connection.sendall(sent[len(COMPLETE) :])
            received += until_closed(connection)
        assert received.count(b"HTTP/1.1 200") == sent.count(COMPLETE)
        assert client.get(f"{url}/health").is_success


def test_head_that_arrives_byte_by_byte_is_closed(http_parser):
    with serving(DictionaryEngine(), limits=RequestLimits(timeout_seconds=1.0)) as url, connect(url) as slow:
        slow.settimeout(0.02)
        slow.sendall(b"GET /health HTTP/1.1\r\nX: ")
        # Each byte would restart a timeout between bytes.
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                slow.sendall(b"x")
                with suppress(TimeoutError):
                    if not slow.recv(1):
                        raise ConnectionError


@pytest.mark.parametrize("start", [b"GET /", b"GET /health HTTP/1.1\r\nX: ", COMPLETE + b"GET /"], ids=repr)
def test_connection_with_huge_head_is_closed(http_parser, client, start):
    with serving(DictionaryEngine()) as url:
        with connect(url) as connection:
            connection.sendall(start)
            with suppress(ConnectionError):
                for _ in range(100):
                    connection.sendall(b"x" * 10_000)
                until_closed(connection)
        assert client.get(f"{url}/health").is_success


def test_idle_connection_stays_open_between_requests(http_parser):
    """Only heads are limited by the timeout: a client that trains for a while keeps its connection."""
    with serving(DictionaryEngine(), limits=RequestLimits(timeout_seconds=1.0)) as url, connect(url) as idle:
        idle.sendall(COMPLETE)
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")
        with connect(url) as other:  # it is closed after the timeout
            until_closed(other)
        idle.sendall(COMPLETE)
        assert idle.recv(1000).startswith(b"HTTP/1.1 200")


def test_disconnect_within_body_is_one_log_line(client, caplog):
    caplog.set_level(logging.INFO, logger="rlkit")
    with serving(DictionaryEngine()) as url:
        for _ in range(3):
            with connect(url) as connection:
                connection.sendall(HEAD + b"{")
        while client.get(f"{url}/health").json()["waiting"] or len(caplog.records) < 3:
            time.sleep(0.01)
        assert post(client, url, queries=["x1"]).status_code == 200
    assert ["disconnected" in record.getMessage() for record in caplog.records] == [True] * 3
    assert not any(record.exc_info for record in caplog.records)


class GatedEngine(DictionaryEngine):
    """Engine that sets the event `started` in each search, and then waits for the event `opened`."""

    def __init__(self):
        super().__init__()
        self.started, self.opened = threading.Event(), threading.Event()

    def search(self, queries, k):
        self.started.set()
        self.opened.wait()
        return super().search(queries, k)


def test_requests_above_max_waiting_get_503_with_retry_after(client):
    engine = GatedEngine()
    with (
        serving(engine, limits=RequestLimits(max_waiting=2)) as url,
        ThreadPoolExecutor(2) as pool,
    ):
        try:
            waiting = [pool.submit(post, client, url, queries=["x1"]) for _ in range(2)]
            wait_until(lambda: client.get(f"{url}/health").json()["waiting"] == 2)
            rejected = post(client, url, queries=["x1"])
        finally:
            engine.opened.set()
        assert rejected.status_code == 503 and rejected.headers["Retry-After"] == "1"
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert post(client, url, queries=["x1"]).status_code == 200


def test_search_of_a_client_that_disconnects_is_cancelled(http_parser, client):
    engine = GatedEngine()
    body = json.dumps({"queries": ["x1"] * 10_000}).encode()
    with serving(engine, limits=RequestLimits(timeout_seconds=600)) as url:
        try:
            with connect(url) as connection:
                connection.sendall(HEAD.replace(b"100", b"%d" % len(body)) + body)
                assert engine.started.wait(60)
            wait_until(lambda: client.get(f"{url}/health").json()["waiting"] == 0)
        finally:
            engine.opened.set()
        assert post(client, url, queries=["x2"]).json()["result"][0][0]["id"] == "x2"
    # Of the request, only the chunks that the threads had taken were searched.
    assert sum(map(len, engine.batches)) < 3000


def test_concurrent_clients_get_their_own_results(url):
    mismatches = []

    def send_requests(i):
        with httpx.Client(trust_env=False, timeout=20) as client:
            for j in range(5):
                response = post(client, url, queries=[f"x{i}-{j}"]).json()
                if response["result"][0][0]["id"] != f"x{i}-{j}":
                    mismatches.append((i, j))

    threads = [threading.Thread(target=send_requests, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mismatches == []
