"""Servers that fail, against stand-ins for vLLM: see `rlkit.rollouts.vllm.endpoint`."""

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

SAMPLING = Sampling(ends=(2,), stop=("x",), key=(1,))
TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4, dtype=torch.bfloat16)}


class StandIn(http.server.ThreadingHTTPServer):
    """Answers as vLLM does; the log-probability of its one token tells which weights it was sampled with."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.label, self.failures, self.loads, self.bodies = "default", 0, [], []
        self.gate = threading.Event()  # turns wait here until it is set
        self.gate.set()
        self.up, self.most, self.running = True, 0, 0
        self.guard = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that went away

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
        with self.guard:
            self.bodies.append(body)
            self.failures -= 1
            fails = self.failures >= 0
            self.running += 1
            self.most = max(self.most, self.running)
        version = self.label
        self.gate.wait(30)
        with self.guard:
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

    do_GET = do_POST = handle_one  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
    monkeypatch.setattr(pool, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(pool, "LONGEST_DELAY", 0.05)


@pytest.fixture
def servers():
    made = [StandIn(), StandIn()]
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.fixture
def engine(servers, tmp_path):
    made = ServerEngine([s.url for s in servers], weights_dir=tmp_path, patience=3.0, concurrency=4)
    yield made
    made.close()


def sample(engine, count=20, prompt=(5, 6)):
    engine.submit([Request(i, i, list(prompt), 8, 0) for i in range(count)], SAMPLING)
    samples = {}
    while len(samples) < count:
        samples.update(engine.collect(wait=True))
    return [samples[i] for i in range(count)]


def under_current(engine, samples):
    return all(s.log_probs == [-float(len(engine.version))] for s in samples)


def test_turns_are_spread_and_capped(engine, servers):
    for server in servers:
        server.gate.clear()
    assert engine.context == 64
    engine.submit([Request(i, i, [5], 8, 0) for i in range(20)], SAMPLING)
    wait_until(lambda: [len(server.bodies) for server in servers] == [4, 4])
    for server in servers:
        server.gate.set()
    taken = {}
    while len(taken) < 20:
        taken.update(engine.collect(wait=True))
    assert all(s.ids == [2] and s.finish == "end" for s in taken.values())
    assert sum(len(server.bodies) for server in servers) == 20
    assert max(server.most for server in servers) <= 4
    assert engine.collect(wait=True) == []


def test_what_a_request_says(engine, servers):
    sample(engine, 1)
    [body] = servers[0].bodies + servers[1].bodies
    assert (body["prompt"], body["max_tokens"], body["stop"]) == ([5, 6], 8, ["x"])
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([2], True)
    assert body["include_stop_str_in_output"] and body["return_token_ids"]


def test_a_finished_turn_does_not_wait_for_the_others(engine, servers):
    servers[0].gate.clear()
    engine.submit([Request(i, i, [5], 8, 0) for i in range(2)], SAMPLING)
    assert len(engine.collect(wait=True)) == 1
    assert engine.collect(wait=False) == []
    servers[0].gate.set()
    assert len(engine.collect(wait=True)) == 1


def test_failures_go_to_the_other_server(engine, servers):
    servers[0].failures = 3
    assert len(sample(engine)) == 20


def test_a_server_that_started_anew_gets_the_weights_before_it_is_used(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    servers[0].restart()
    assert under_current(engine, sample(engine))
    assert [len(server.loads) for server in servers] == [2, 1]


def test_samples_under_other_weights_are_taken_again(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    servers[0].gate.clear()
    engine.submit([Request(i, i, [5], 8, 0) for i in range(4)], SAMPLING)
    wait_until(lambda: servers[0].running == 2)
    servers[0].restart()  # between two turns, say: no connection breaks
    servers[0].gate.set()
    taken = {}
    while len(taken) < 4:
        taken.update(engine.collect(wait=True))
    assert under_current(engine, taken.values())
    assert len(servers[0].bodies) + len(servers[1].bodies) > 4


def test_weights_that_cannot_be_loaded(engine, monkeypatch):
    said = {"error": {"message": "Worker failed with error 'no space'"}}
    monkeypatch.setattr(StandIn, "collective_rpc", lambda self, body: (500, said))
    with pytest.raises(GuardError, match=r"http.* cannot load what was pushed: .*no space"):
        engine.push(TENSORS.items(), "step-1")


def test_several_processes_sample_and_one_pushes(engine, servers):
    other = ServerEngine([s.url for s in servers], patience=3.0)
    engine.push(TENSORS.items(), "step-1")
    other.weights = engine.weights
    assert under_current(engine, sample(other))
    for server in servers:
        server.restart()
    sampled = []
    threads = [threading.Thread(target=lambda e=e: sampled.append(sample(e))) for e in (engine, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert all(under_current(engine, samples) for samples in sampled)
    assert [len(server.loads) for server in servers] == [2, 2]  # either of them, not both
    other.close()


def test_it_waits_for_servers_to_come_back(engine, servers):
    engine.push(TENSORS.items(), "step-1")
    for server in servers:
        server.up = False
        threading.Timer(0.5, setattr, (server, "up", True)).start()
    assert under_current(engine, sample(engine))


def test_no_server_for_longer_than_patience(engine, servers):
    engine._pool.patience = 0.3
    for server in servers:
        server.up = False
    with pytest.raises(
        GuardError, match=rf"{servers[0].url} since .*UTC .*503 EngineCore died.*; http"
    ) as error:
        sample(engine)
    assert "\n" not in str(error.value)
    for server in servers:  # the caller may go on when they are back
        server.up = True
    assert len(sample(engine)) == 20


def test_a_request_that_fails_everywhere_is_not_tried_for_ever(engine, servers):
    for server in servers:
        server.failures = 10**6
    with pytest.raises(GuardError, match=r"failed 5 times, at last at http.* 500 boom"):
        sample(engine, 1)


def test_a_refused_request_is_not_tried_again(engine, servers):
    with pytest.raises(UserError, match=r"refused /v1/completions: 400 .*maximum context length is 64"):
        sample(engine, 1, prompt=[5] * 60)
    assert len(servers[0].bodies) + len(servers[1].bodies) == 1
    assert len(sample(engine)) == 20


def test_a_server_that_was_never_up(servers):
    servers[1].up = False
    with pytest.raises(UserError, match=rf"no vLLM server answers: {servers[1].url} since .*rlkit serve"):
        ServerEngine([s.url for s in servers], patience=0.2)


def test_weights_of_another_run_are_not_sampled_with(servers):
    servers[0].label = "step-7-abc"
    engine = ServerEngine([servers[0].url], patience=1.0)
    with pytest.raises(GuardError, match="other weights than it should have"):
        sample(engine, 1)
    engine.close()


def test_a_server_without_the_development_endpoints(servers, monkeypatch):
    monkeypatch.setattr(StandIn, "weight_info", lambda self, body: (404, {"detail": "Not Found"}))
    engine = ServerEngine([servers[0].url], patience=1.0)
    with pytest.raises(UserError, match="start it with `rlkit serve`"):
        sample(engine, 1)
    engine.close()


def test_weights_are_written_whole_and_deleted(engine, servers, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 1)
    engine.push(iter(TENSORS.items()), "step-1")
    first = engine.weights
    assert {s.label for s in servers} == {engine.version} == {first.label}
    files = sorted(first.folder.glob("*.safetensors"))
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) == 2
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert (engine.pushed_bytes, servers[0].loads) == (32, [str(first.folder)])

    def half():
        yield "a.weight", torch.ones(2)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        engine.push(half(), "step-2")
    assert engine.weights == first
    engine.push(TENSORS.items(), "step-2")
    assert not first.folder.exists()
    assert not list(tmp_path.glob("*/partial-*"))
    engine.close()
    assert not list(tmp_path.iterdir())


def test_an_abandoned_folder_is_removed(tmp_path):
    (tmp_path / "rlkit-weights-dead").mkdir()
    (tmp_path / "rlkit-weights-dead" / "lock").touch()
    living = weights.WeightsFolder([tmp_path])
    kept, _ = living.write(TENSORS.items(), "a")
    other = weights.WeightsFolder([tmp_path])
    other.write(TENSORS.items(), "b")
    assert kept.folder.is_dir()
    assert len(list(tmp_path.iterdir())) == 2
    living.close()
    other.close()


def test_a_folder_without_room(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    monkeypatch.setattr(weights, "SHARD_BYTES", 1)
    room = iter([10**9, 0])
    monkeypatch.setattr(weights, "_room", lambda folder: next(room) if folder == small else 10**9)
    folder = weights.WeightsFolder([small, large])
    written, size = folder.write(TENSORS.items(), "a")
    assert written.folder.parent.parent == large
    assert (len(list(written.folder.glob("*.safetensors"))), size) == (2, 32)
    monkeypatch.setattr(weights, "_room", lambda folder: 0)
    with pytest.raises(UserError, match="no room"):
        folder.write(TENSORS.items(), "b")
    folder.close()


def test_nothing_may_be_sampled_during_a_push(engine, servers):
    servers[0].gate.clear()
    servers[1].gate.clear()
    engine.submit([Request(0, 0, [5], 8, 0)], SAMPLING)
    with pytest.raises(AssertionError, match="between batches"):
        engine.push(TENSORS.items(), "step-1")
    servers[0].gate.set()
    servers[1].gate.set()


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        ([], "no vLLM server"),
        (["localhost:8000"], "no address"),
        (["ftp://a"], "no address"),
        (["http://"], "no address"),
        (["http://a:1/v1"], "address alone, http://a:1"),
        (["http://a:1", "http://a:1/"], "twice"),
        (["http://a:port"], "no address"),
    ],
)
def test_addresses(urls, said):
    with pytest.raises(UserError, match=said):
        check_urls(urls)


def test_an_address_may_end_in_a_slash():
    assert check_urls(["http://a:1/", "https://b"]) == ["http://a:1", "https://b"]


def test_servers_elsewhere_need_a_shared_folder(engine):
    engine._weights_dir, engine.urls = None, ["http://gpu-7:8000"]
    with pytest.raises(UserError, match=r"http://gpu-7:8000: .*share"):
        engine.push(TENSORS.items(), "step-1")
