"""The server of Search-R1's protocol: responses, limits, and robustness against malformed requests."""

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
from tests.rlkit.retrieval.serving import DictionaryEngine, free_port, serving

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
        limits=RequestLimits(max_body_bytes=20_000, max_queries=8, max_query_characters=300),
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
    (b'{"queries": "velmora"}', 400, "list of strings"),
    (b'{"queries": [1]}', 400, "list of strings"),
    (b'{"queries": ["a", "\\ud800"]}', 400, "surrogate"),
    (b'{"queries": [], "query": 1}', 400, "'query'"),
    (b'{"queries": [], "topk": "3"}', 400, "an integer"),
    (b'{"queries": [], "topk": true}', 400, "an integer"),
    (b'{"queries": [], "topk": -1}', 400, "from 1 to 100"),
    (b'{"queries": [], "topk": 101}', 400, "from 1 to 100"),
    (b'{"queries": [], "return_scores": 1}', 400, "true or false"),
    (json.dumps({"queries": ["a"] * 9}).encode(), 413, "at most 8"),
    (json.dumps({"queries": ["a" * 301]}).encode(), 413, "longer than 300"),
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
fields = st.sampled_from(["queries", "topk", "return_scores", "query"])


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


def test_api_key_is_required(client):
    with serving(DictionaryEngine(), api_key="secret") as url:
        assert post(client, url, queries=[]).status_code == 401
        for value, status in (
            ("Bearer secret", 200),
            ("Bearer Secret", 401),
            ("secret", 401),
            ("Bearer sécret", 401),
        ):
            headers = {"Authorization": value.encode()}
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
    with serving(DictionaryEngine(), limits=RequestLimits(timeout_seconds=0.3)) as url:
        address = httpx.URL(url)
        with socket.create_connection((address.host, address.port), timeout=10) as slow:
            # The header announces 100 bytes, but only one follows.
            slow.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert post(client, url, queries=["x1"]).status_code == 200


def test_requests_above_max_waiting_get_503_with_retry_after(client):
    with serving(DictionaryEngine(delay=0.4), limits=RequestLimits(max_waiting=2, num_threads=1)) as url:
        responses = []
        threads = [
            threading.Thread(target=lambda: responses.append(post(client, url, queries=["x1"])))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(response.status_code for response in responses)
        assert set(statuses) == {200, 503} and statuses.count(200) >= 2
        assert all(r.headers["Retry-After"] == "1" for r in responses if r.status_code == 503)


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


def test_command_serves_world_until_sigterm(tmp_path, client):
    port = free_port()
    command = [sys.executable, "-m", "rlkit", "serve-search", "world:200:0", "--port", str(port)]
    variables = os.environ | {"RLKIT_CACHE": str(tmp_path)}
    process = subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/retrieve" in process.stderr.readline()
        url = f"http://127.0.0.1:{port}"
        # The address is logged just before the server listens, so the first connection may fail.
        transport = httpx.HTTPTransport(retries=9)
        with httpx.Client(trust_env=False, transport=transport, timeout=20) as retrying_client:
            assert retrying_client.get(f"{url}/health").json()["documents"] == 200
        hits = post(client, url, queries=["lawyer"], topk=2, return_scores=True).json()["result"][0]
        assert len(hits) == 2 and hits[0]["score"] >= hits[1]["score"] > 0
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        process.stderr.close()


def test_public_host_requires_api_key(monkeypatch):
    monkeypatch.delenv("RLKIT_SEARCH_KEY", raising=False)
    for host in ("0.0.0.0", "example.com", "::"):
        with pytest.raises(UserError, match="RLKIT_SEARCH_KEY"):
            main(["world:200:0", "--host", host])
    with pytest.raises(UserError, match="world:SIZE:SEED"):
        main(["world:x:0"])
