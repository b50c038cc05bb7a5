"""The server engine on real vLLM servers: samples match transformers with the pushed weights."""

import copy
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import psutil
import pytest
import torch

from rlkit.errors import UserError
from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.text_generation import load_text_model
from rlkit.rollouts.vllm.server_engine import ServerEngine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forked_commands"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
GREEDY = Sampling(eos_token_ids=(2,), temperature=0.0)
WARM = Sampling(eos_token_ids=(2,), temperature=0.7, top_p=0.9, top_k=20, key=(5,))
PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21], [40], [5, 6, 7, 8, 9, 11]]
SIZES = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
START_TIMEOUT = 300  # seconds


class ServerProcess:
    """A process of `rlkit serve` on a free port."""

    def __init__(self, model, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.log = model, log
        self.start()

    def start(self):
        command = [sys.executable, "-m", "rlkit", "serve", self.model, "--port", str(self.port)]
        options = ["--dtype", "float32", "--lora_rank", "8", "--max-num-seqs", "32"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
            )

    def wait(self):
        for _ in range(2 * START_TIMEOUT):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """Stop the server with SIGTERM; return the names of processes that are alive 20 seconds later."""
        processes = [self.process.pid, *(p.pid for p in psutil.Process(self.process.pid).children(True))]
        self.process.terminate()
        self.process.wait(60)
        _, alive = psutil.wait_procs([psutil.Process(p) for p in processes if psutil.pid_exists(p)], 20)
        return [process.name() for process in alive]


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen2", seed=1, tie_word_embeddings=True, **SIZES)


@pytest.fixture(scope="module")
def servers(model, tiny_tokenizer, tmp_path_factory):
    """Two servers of the same model."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    servers = [ServerProcess(str(folder), folder / f"server-{i}.log") for i in range(2)]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        alive = [server.stop() for server in servers]
    assert alive == [[], []]


@pytest.fixture
def engine(servers):
    engine = ServerEngine([servers[0].url], retry_timeout=START_TIMEOUT)
    yield engine
    engine.close()


def sample(engine, sampling, limit=12, prompts=PROMPTS):
    engine.submit([Request(i, i, ids, limit, 0) for i, ids in enumerate(prompts)], sampling)
    samples = {}
    while len(samples) < len(prompts):
        samples.update(engine.collect(wait=True))
    return [samples[i] for i in range(len(prompts))]


def greedy(model, ids, limit=12):
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=limit, do_sample=False, eos_token_id=[2], pad_token_id=2
    )
    return output[0, len(ids) :].tolist()


def log_probs(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids].tolist()


def max_error(model, samples, prompts=PROMPTS):
    """Return the largest difference between a sample's log-probabilities and the model's."""
    errors = []
    for prompt, turn in zip(prompts, samples, strict=True):
        expected = log_probs(model, prompt, turn.ids)
        errors += [abs(a - b) for a, b in zip(turn.log_probs, expected, strict=True)]
    return max(errors)


def perturbed(model, seed):
    """Return a copy of a model with noise added to all weights."""
    copied = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return copied


# This test runs first, because no weights may have been pushed yet.
def test_server_samples_the_greedy_tokens_of_transformers(engine, model):
    samples = sample(engine, GREEDY)
    assert [s.ids for s in samples] == [greedy(model, ids) for ids in PROMPTS]
    assert max_error(model, samples) < 1e-4
    assert engine.version == "default"
    assert engine.context == 512


# This test, too, must run before other weights are pushed.
def test_server_text_model_generates_the_text_of_transformers(servers, model, tiny_tokenizer):
    prompts = [[{"role": "user", "content": text}] for text in ("Say a.", "b")]
    text_model = load_text_model(servers[0].model, f"{servers[0].url}/v1", max_tokens=12, temperature=0.0)
    expected = []
    for prompt in prompts:
        body = {"model": servers[0].model, "messages": prompt}
        ids = httpx.post(f"{servers[0].url}/tokenize", json=body, trust_env=False).json()["tokens"]
        expected.append(tiny_tokenizer.decode(greedy(model, ids), skip_special_tokens=True).strip())
    assert [generation.text for generation in text_model.generate(prompts, [0, 1])] == expected


def test_server_keeps_the_eos_token_and_the_stop_string(engine, model, tiny_tokenizer):
    engine.push(model.named_parameters(), "first")
    free = greedy(model, PROMPTS[0])
    eos = free[3]
    length = free.index(eos) + 1
    for limit in (12, length):  # the EOS token may be the last one within the limit
        [turn] = sample(engine, Sampling(eos_token_ids=(2, eos), temperature=0.0), limit, PROMPTS[:1])
        assert (turn.ids, turn.finish_reason) == (free[:length], "eos")
    stop = tiny_tokenizer.decode(free[2:4])
    for limit in (12, 4):
        [turn] = sample(
            engine, Sampling(eos_token_ids=(2,), stop=(stop,), temperature=0.0), limit, PROMPTS[:1]
        )
        assert (turn.ids, turn.finish_reason) == (free[:4], "stop")
    [turn] = sample(engine, GREEDY, 1, PROMPTS[:1])
    assert (turn.ids, turn.finish_reason) == (free[:1], "length")


def test_server_returns_log_probs_of_the_truncated_distribution(engine, model):
    engine.push(model.named_parameters(), "first")
    for prompt, turn in zip(PROMPTS, sample(engine, WARM, 1), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1] / 0.7
        best = logits.topk(20)
        p = best.values.softmax(-1)
        nucleus = p.cumsum(-1) - p < 0.9
        rank = best.indices.tolist().index(turn.ids[0])
        assert nucleus[rank]
        assert turn.log_probs == pytest.approx([(p[rank] / p[nucleus].sum()).log().item()], abs=1e-4)


def test_server_samples_with_pushed_weights(engine, model):
    for step in (1, 2):  # in the second step, prefixes of the first step are cached
        pushed = perturbed(model, step)
        engine.push(pushed.named_parameters(), f"step-{step}")
        samples = sample(engine, GREEDY)
        assert [s.ids for s in samples] == [greedy(pushed, ids) for ids in PROMPTS]
        assert max_error(pushed, samples) < 1e-4
        assert max_error(model, samples) > 0.1
        label = httpx.get(f"{engine.urls[0]}/weight_info", trust_env=False).json()["weight_version"]
        assert label == engine.version
        assert label.startswith(f"step-{step}-")
    assert engine.pushed_bytes == sum(p.nbytes for p in model.parameters())
    assert 0 < engine.push_seconds < 60


def test_engine_distributes_requests_over_two_servers(servers, model):
    engine = ServerEngine([server.url for server in servers], retry_timeout=START_TIMEOUT)
    pushed = perturbed(model, 3)
    engine.push(pushed.named_parameters(), "shared")
    counts = dict.fromkeys(engine.urls, 0)
    for server in engine._pool.servers:

        async def counting_sample(*args, original=server.sample, url=server.url):
            counts[url] += 1
            return await original(*args)

        server.sample = counting_sample
    prompts = PROMPTS * 10
    samples = sample(engine, Sampling(eos_token_ids=(2,), key=(1,)), prompts=prompts)
    assert max_error(pushed, samples, prompts) < 1e-4
    assert min(counts.values()) >= 10
    assert sum(counts.values()) == len(prompts)
    engine.close()


def test_engine_raises_if_a_server_rejects_a_request(engine, model):
    engine.push(model.named_parameters(), "first")
    with pytest.raises(UserError, match=r"400 .*maximum context length is 512"):
        sample(engine, GREEDY, 12, [[5] * 510])
    assert len(sample(engine, GREEDY)) == len(PROMPTS)


def test_restarted_server_gets_the_pushed_weights(servers, engine, model):
    pushed = perturbed(model, 4)
    engine.push(pushed.named_parameters(), "pushed")
    prompts = [[5 + i % 90, 7, 9] for i in range(64)]
    without_eos = Sampling(eos_token_ids=(127,), key=(3,))
    engine.submit([Request(i, i, ids, 400, 0) for i, ids in enumerate(prompts)], without_eos)
    finished = dict(engine.collect(wait=True))
    assert len(finished) < len(prompts)
    servers[0].kill()
    threading.Timer(3.0, servers[0].start).start()
    while len(finished) < len(prompts):
        finished.update(engine.collect(wait=True))
    samples = [finished[i] for i in range(len(prompts))]
    # Over 10,000 tokens, up to 400 in a row, the largest rounding error of float32 is 1.4e-4.
    assert max_error(pushed, samples, prompts) < 1e-3
    assert max_error(model, samples, prompts) > 0.1


# This test runs last: it restarts the server, because an adapter requires the initial weights.
def test_server_samples_with_a_pushed_adapter(servers, model, tmp_path):
    from peft import LoraConfig, get_peft_model

    servers[0].stop()
    servers[0].start()
    servers[0].wait()
    engine = ServerEngine([servers[0].url], retry_timeout=START_TIMEOUT)
    base = sample(engine, GREEDY)
    for step in (1, 2):
        torch.manual_seed(step)
        config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"])
        adapted = get_peft_model(copy.deepcopy(model), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        engine.push_adapter(tmp_path / "adapter", f"step-{step}")
        samples = sample(engine, GREEDY)
        assert max_error(adapted.eval(), samples) < 1e-4
        assert [s.ids for s in samples] != [s.ids for s in base]
    models = httpx.get(f"{engine.urls[0]}/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in models[1:]] == [engine.version]
    engine.close()
