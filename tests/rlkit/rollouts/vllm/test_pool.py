"""The server engine and its pool against fake vLLM servers that fail, restart and hang."""

import http.server
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from rlkit.errors import GuardError, UserError
from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.vllm import pool, weights
from rlkit.rollouts.vllm.server_engine import ServerEngine, check_urls
from tests.waiting import wait_until

SAMPLING = Sampling(eos_token_ids=(2,), stop=("x",), key=(1,))
TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}


class FakeServer(http.server.ThreadingHTTPServer):
    """A fake vLLM server that samples one EOS token. Its log-probability encodes the label of the weights."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.label, self.failures, self.loads, self.bodies = "default", 0, [], []
        self.gate = threading.Event()  # clear it to block completions
        self.gate.set()
        self.up, self.max_running, self.running = True, 0, 0
        self.counter_lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # the client has disconnected

    def restart(self):
        self.label = "default"

    def answer(self, path, body):
        if not self.up:
            return 503, {"error": {"message": "EngineCore died"}}
        name = path.partition("?")[0].strip("/").replace("/", "_")
        return getattr(self, name, lambda body: (200, {}))(body)

    def v1_models(self, body):
        return 200, {"data": [{"id": "model", "max_model_len": 64}]}

    def weight_info(self, body):
        return 200, {"weight_version": self.label}

    def update_weight_version(self, body):
        self.label = body["new_version"]
        return 200, {}

    def reset_prefix_cache(self, body):
        return 200, {"success": True}

    def collective_rpc(self, body):
        self.loads.append(body["kwargs"]["folder"])
        return 200, {}

    def v1_completions(self, body):
        with self.counter_lock:
            self.bodies.append(body)
            self.failures -= 1
            fails = self.failures >= 0
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        version = self.label
        self.gate.wait(30)
        with self.counter_lock:
            self.running -= 1
        if len(body["prompt"]) + body["max_tokens"] > 64:
            return 400, {"error": {"message": "This model's maximum context length is 64 tokens."}}
        if fails:
            return 500, {"error": {"message": "boom"}}
        choice = {"finish_reason": "stop", "stop_reason": 2, "token_ids": [2]}
        return 200, {"choices": [{**choice, "logprobs": {"token_logprobs": [-float(len(version))]}}]}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.server.answer(self.path, json.loads(body) if body else None)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = handle_one

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(pool, "MIN_DELAY", 0.02)
    monkeypatch.setattr(pool, "MAX_DELAY", 0.05)


@pytest.fixture
def servers():
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def engine(servers, tmp_path):
    urls = [server.url for server in servers]
    engine = ServerEngine(urls, weights_dir=tmp_path, retry_timeout=3.0, concurrency=4)
    yield engine
    engine.close()


def sample(engine, count=20, prompt=(5, 6)):
    engine.submit([Request(i, i, list(prompt), 8, 0) for i in range(count)], SAMPLING)
    samples = {}
    while len(samples) < count:
        samples.update(engine.collect(wait=True))
    return [samples[i] for i in range(count)]


def have_current_weights(engine, samples):
    return all(s.log_probs == [-float(len(engine.version))] for s in samples)


def test_pool_distributes_requests_up_to_the_concurrency(engine, servers):
    for server in servers:
        server.gate.clear()
    assert engine.context == 64
    engine.submit([Request(i, i, [5], 8, 0) for i in range(20)], SAMPLING)
    wait_until(lambda: [len(server.bodies) for server in servers] == [4, 4])
    for server in servers:
        server.gate.set()
    samples = {}
    while len(samples) < 20:
        samples.update(engine.collect(wait=True))
    assert all(s.ids == [2] and s.finish_reason == "eos" for s in samples.values())
    assert sum(len(server.bodies) for server in servers) == 20
    assert max(server.max_running for server in servers) <= 4
    assert engine.collect(wait=True) == []


def test_request_body_has_the_sampling_settings(engine, servers):
    sample(engine, 1)
    [body] = servers[0].bodies + servers[1].bodies
    assert (body["prompt"], body["max_tokens"], body["stop"]) == ([5, 6], 8, ["x"])
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([2], True)
    assert body["include_stop_str_in_output"] and body["return_token_ids"]


def test_collect_returns_a_finished_turn_before_the_others(engine, servers):
    servers[0].gate.clear()
    engine.submit([Request(i, i, [5], 8, 0) for i in range(2)], SAMPLING)
    assert len(engine.collect(wait=True)) == 1
    assert engine.collect(wait=False) == []
    servers[0].gate.set()
    assert len(engine.collect(wait=True)) == 1


def test_pool_retries_failed_requests_on_the_other_server(engine, servers):
    servers[0].failures = 3
    assert len(sample(engine)) == 20


def test_pool_reloads_weights_on_a_restarted_server_before_using_it(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    servers[0].restart()
    assert have_current_weights(engine, sample(engine))
    assert [len(server.loads) for server in servers] == [2, 1]


def test_pool_retries_requests_sampled_with_other_weights(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    servers[0].gate.clear()
    engine.submit([Request(i, i, [5], 8, 0) for i in range(4)], SAMPLING)
    wait_until(lambda: servers[0].running == 2)
    servers[0].restart()  # its connections stay open, as if it had restarted between two turns
    servers[0].gate.set()
    samples = {}
    while len(samples) < 4:
        samples.update(engine.collect(wait=True))
    assert have_current_weights(engine, samples.values())
    assert len(servers[0].bodies) + len(servers[1].bodies) > 4


def test_push_raises_if_a_healthy_server_cannot_load_the_weights(engine, monkeypatch):
    response = {"error": {"message": "Worker failed with error 'no space'"}}
    monkeypatch.setattr(FakeServer, "collective_rpc", lambda self, body: (500, response))
    with pytest.raises(GuardError, match=r"http.* cannot load the pushed weights: .*no space"):
        engine.push(TENSORS.items(), "step-1")


def test_engines_of_several_processes_share_pushed_weights(engine, servers):
    second_engine = ServerEngine([s.url for s in servers], retry_timeout=3.0)
    engine.push(TENSORS.items(), "step-1")
    second_engine.weights = engine.weights
    assert have_current_weights(engine, sample(second_engine))
    for server in servers:
        server.restart()
    batches = []
    threads = [
        threading.Thread(target=lambda e=e: batches.append(sample(e))) for e in (engine, second_engine)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(have_current_weights(engine, samples) for samples in batches)
    assert [len(server.loads) for server in servers] == [2, 2]  # one of the engines reloaded, not both
    second_engine.close()


def test_pool_waits_while_all_servers_are_down(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    for server in servers:
        server.up = False
        threading.Timer(0.5, setattr, (server, "up", True)).start()
    assert have_current_weights(engine, sample(engine))


def test_pool_raises_after_the_retry_timeout(engine, servers):
    engine._pool.retry_timeout = 0.3
    for server in servers:
        server.up = False
    with pytest.raises(
        GuardError, match=rf"{servers[0].url} since .*UTC .*503 EngineCore died.*; http"
    ) as error:
        sample(engine)
    assert "\n" not in str(error.value)
    for server in servers:  # the engine is usable again once they are up
        server.up = True
    assert len(sample(engine)) == 20


def test_pool_gives_up_on_a_request_after_max_attempts(engine, servers):
    for server in servers:
        server.failures = 10**6
    with pytest.raises(GuardError, match=r"failed 5 times, most recently on http.* 500 boom"):
        sample(engine, 1)


def test_pool_does_not_retry_a_rejected_request(engine, servers):
    with pytest.raises(UserError, match=r"rejected /v1/completions: 400 .*maximum context length is 64"):
        sample(engine, 1, prompt=[5] * 60)
    assert len(servers[0].bodies) + len(servers[1].bodies) == 1
    assert len(sample(engine)) == 20


def test_engine_raises_if_a_server_is_down_at_the_start(servers):
    servers[1].up = False
    with pytest.raises(UserError, match=rf"vLLM servers are down: {servers[1].url} since .*rlkit serve"):
        ServerEngine([s.url for s in servers], retry_timeout=0.2)


def test_pool_rejects_a_server_with_another_runs_weights(servers):
    servers[0].label = "step-7-abc"
    engine = ServerEngine([servers[0].url], retry_timeout=1.0)
    with pytest.raises(GuardError, match="does not hold the current weights"):
        sample(engine, 1)
    engine.close()


def test_engine_requires_the_development_endpoints(servers, monkeypatch):
    monkeypatch.setattr(FakeServer, "weight_info", lambda self, body: (404, {"detail": "Not Found"}))
    engine = ServerEngine([servers[0].url], retry_timeout=1.0)
    with pytest.raises(UserError, match="start the server with `rlkit serve`"):
        sample(engine, 1)
    engine.close()


def test_push_writes_weights_atomically_and_deletes_the_old_ones(engine, servers, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 1)
    engine.push(iter(TENSORS.items()), "step-1")
    first = engine.weights
    assert {s.label for s in servers} == {engine.version} == {first.label}
    files = sorted(first.folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 2
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert (engine.pushed_bytes, servers[0].loads) == (32, [str(first.folder)])

    def fail_halfway():
        yield "a.weight", torch.ones(2)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.push(fail_halfway(), "step-2")
    assert engine.weights == first
    engine.push(TENSORS.items(), "step-2")
    assert not first.folder.exists()
    assert not list(tmp_path.glob("*/partial-*"))
    engine.close()
    assert not list(tmp_path.iterdir())


def test_weights_folder_removes_folders_of_crashed_processes(tmp_path):
    (tmp_path / "rlkit-weights-dead").mkdir()
    (tmp_path / "rlkit-weights-dead" / "lock").touch()
    first = weights.WeightsFolder([tmp_path])
    first_weights, _ = first.write(TENSORS.items(), "a")
    second = weights.WeightsFolder([tmp_path])
    second.write(TENSORS.items(), "b")
    assert first_weights.folder.is_dir()
    assert len(list(tmp_path.iterdir())) == 2
    first.close()
    second.close()


def test_weights_folder_moves_to_a_directory_with_room(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    monkeypatch.setattr(weights, "SHARD_BYTES", 1)
    free_bytes = iter([10**9, 0])
    monkeypatch.setattr(weights, "_free_bytes", lambda folder: next(free_bytes) if folder == small else 10**9)
    folder = weights.WeightsFolder([small, large])
    pushed, size = folder.write(TENSORS.items(), "a")
    assert pushed.folder.parent.parent == large
    assert (len(list(pushed.folder.glob("*.safetensors"))), size) == (2, 32)
    monkeypatch.setattr(weights, "_free_bytes", lambda folder: 0)
    with pytest.raises(UserError, match="not enough disk space"):
        folder.write(TENSORS.items(), "b")
    folder.close()


def test_push_requires_that_no_request_is_outstanding(engine, servers):
    servers[0].gate.clear()
    servers[1].gate.clear()
    engine.submit([Request(0, 0, [5], 8, 0)], SAMPLING)
    with pytest.raises(AssertionError, match="between batches"):
        engine.push(TENSORS.items(), "step-1")
    servers[0].gate.set()
    servers[1].gate.set()


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "no vLLM server"),
        (["localhost:8000"], "invalid server address"),
        (["ftp://a"], "invalid server address"),
        (["http://"], "invalid server address"),
        (["http://a:1/v1"], "must not contain a path: use http://a:1"),
        (["http://a:1", "http://a:1/"], "duplicate"),
        (["http://a:port"], "invalid server address"),
    ],
)
def test_check_urls_rejects_bad_addresses(urls, message):
    with pytest.raises(UserError, match=message):
        check_urls(urls)


def test_check_urls_removes_trailing_slashes():
    assert check_urls(["http://a:1/", "https://b"]) == ["http://a:1", "https://b"]


def test_push_to_other_machines_requires_weights_dir(engine):
    engine._weights_dir, engine.urls = None, ["http://gpu-7:8000"]
    with pytest.raises(UserError, match="set weights_dir for http://gpu-7:8000"):
        engine.push(TENSORS.items(), "step-1")
