"""Real vLLM servers: what they sample is what transformers says, with the weights that were pushed."""

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
from rlkit.rollouts.text_generation import open_writer
from rlkit.rollouts.vllm.server_engine import ServerEngine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
GREEDY = Sampling(ends=(2,), temperature=0.0)
WARM = Sampling(ends=(2,), temperature=0.7, top_p=0.9, top_k=20, key=(5,))
PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21], [40], [5, 6, 7, 8, 9, 11]]
SIZES = {"head_dim": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
START = 300  # seconds


class ServerProcess:
    """`rlkit serve` on a port of its own."""

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
        for _ in range(2 * START):
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
        """End it as a person does; return the processes that are left."""
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
    started = [ServerProcess(str(folder), folder / f"server-{i}.log") for i in range(2)]
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        left = [server.stop() for server in started]
    assert left == [[], []]


@pytest.fixture
def engine(servers):
    made = ServerEngine([servers[0].url], patience=START)
    yield made
    made.close()


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


def error(model, samples, prompts=PROMPTS):
    """The largest difference of a log-probability from the model's."""
    pairs = zip(prompts, samples, strict=True)
    return max(
        abs(sampled - own)
        for prompt, sample in pairs
        for sampled, own in zip(sample.log_probs, log_probs(model, prompt, sample.ids), strict=True)
    )


def changed(model, seed):
    """A copy of a model with other weights everywhere."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


# First: no weights have been pushed yet.
def test_greedy_turns_are_those_of_transformers(engine, model):
    samples = sample(engine, GREEDY)
    assert [s.ids for s in samples] == [greedy(model, ids) for ids in PROMPTS]
    assert error(model, samples) < 1e-4
    assert engine.version == "default"
    assert engine.context == 512


def test_texts_are_those_of_transformers(servers, model, tiny_tokenizer):
    """Before other weights are pushed."""
    prompts = [[{"role": "user", "content": text}] for text in ("Say a.", "b")]
    writer = open_writer(servers[0].model, f"{servers[0].url}/v1", tokens=12, temperature=0.0)
    asked = [{"model": servers[0].model, "messages": prompt} for prompt in prompts]
    replies = [httpx.post(f"{servers[0].url}/tokenize", json=one, trust_env=False) for one in asked]
    expected = [
        tiny_tokenizer.decode(greedy(model, reply.json()["tokens"]), skip_special_tokens=True).strip()
        for reply in replies
    ]
    assert [one.text for one in writer.write(prompts, [0, 1])] == expected


def test_what_ends_a_turn_is_kept(engine, model, tiny_tokenizer):
    engine.push(model.named_parameters(), "first")
    free = greedy(model, PROMPTS[0])
    end = free[3]
    first = free.index(end) + 1
    for limit in (12, first):  # also where the limit is reached with it
        [taken] = sample(engine, Sampling(ends=(2, end), temperature=0.0), limit, PROMPTS[:1])
        assert (taken.ids, taken.finish) == (free[:first], "end")
    stop = tiny_tokenizer.decode(free[2:4])
    for limit in (12, 4):
        [taken] = sample(engine, Sampling(ends=(2,), stop=(stop,), temperature=0.0), limit, PROMPTS[:1])
        assert (taken.ids, taken.finish) == (free[:4], "stop")
    [taken] = sample(engine, GREEDY, 1, PROMPTS[:1])
    assert (taken.ids, taken.finish) == (free[:1], "length")


def test_log_probabilities_are_those_of_the_distribution_sampled_from(engine, model):
    engine.push(model.named_parameters(), "first")
    for prompt, taken in zip(PROMPTS, sample(engine, WARM, 1), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, -1] / 0.7
        best = logits.topk(20)
        p = best.values.softmax(-1)
        kept = p.cumsum(-1) - p < 0.9
        place = best.indices.tolist().index(taken.ids[0])
        assert kept[place]
        assert taken.log_probs == pytest.approx([(p[place] / p[kept].sum()).log().item()], abs=1e-4)


def test_pushed_weights_are_sampled_with(engine, model):
    for step in (1, 2):  # the second time, prefixes of the first are cached
        other = changed(model, step)
        engine.push(other.named_parameters(), f"step-{step}")
        samples = sample(engine, GREEDY)
        assert [s.ids for s in samples] == [greedy(other, ids) for ids in PROMPTS]
        assert error(other, samples) < 1e-4
        assert error(model, samples) > 0.1
        served = httpx.get(f"{engine.urls[0]}/weight_info", trust_env=False).json()["weight_version"]
        assert served == engine.version
        assert served.startswith(f"step-{step}-")
    assert engine.pushed_bytes == sum(p.nbytes for p in model.parameters())
    assert 0 < engine.push_seconds < 60


def test_two_servers_share_the_work(servers, model):
    engine = ServerEngine([server.url for server in servers], patience=START)
    other = changed(model, 3)
    engine.push(other.named_parameters(), "shared")
    counts = dict.fromkeys(engine.urls, 0)
    for server in engine._pool.servers:

        async def counted(*args, real=server.sample, url=server.url):
            counts[url] += 1
            return await real(*args)

        server.sample = counted
    prompts = PROMPTS * 10
    samples = sample(engine, Sampling(ends=(2,), key=(1,)), prompts=prompts)
    assert error(other, samples, prompts) < 1e-4
    assert min(counts.values()) >= 10
    assert sum(counts.values()) == len(prompts)
    engine.close()


def test_what_a_server_refuses_is_said(engine, model):
    engine.push(model.named_parameters(), "first")
    with pytest.raises(UserError, match=r"400 .*maximum context length is 512"):
        sample(engine, GREEDY, 12, [[5] * 510])
    assert len(sample(engine, GREEDY)) == len(PROMPTS)


def test_a_server_that_is_killed_and_comes_back_has_the_pushed_weights(servers, engine, model):
    other = changed(model, 4)
    engine.push(other.named_parameters(), "pushed")
    prompts = [[5 + i % 90, 7, 9] for i in range(64)]
    never = Sampling(ends=(127,), key=(3,))
    engine.submit([Request(i, i, ids, 400, 0) for i, ids in enumerate(prompts)], never)
    taken = dict(engine.collect(wait=True))
    assert len(taken) < len(prompts)
    servers[0].kill()
    threading.Timer(3.0, servers[0].start).start()
    while len(taken) < len(prompts):
        taken.update(engine.collect(wait=True))
    samples = [taken[i] for i in range(len(prompts))]
    # 10,000 tokens, each up to 400 after the first: float32 rounds off to 1.4e-4 at the worst of them.
    assert error(other, samples, prompts) < 1e-3
    assert error(model, samples, prompts) > 0.1


# Last: this server has its first weights, and an adapter needs them.
def test_an_adapter_is_sampled_with(servers, model, tmp_path):
    from peft import LoraConfig, get_peft_model

    servers[0].stop()
    servers[0].start()
    servers[0].wait()
    engine = ServerEngine([servers[0].url], patience=START)
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
        assert error(adapted.eval(), samples) < 1e-4
        assert [s.ids for s in samples] != [s.ids for s in base]
    listed = httpx.get(f"{engine.urls[0]}/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in listed[1:]] == [engine.version]
    engine.close()
