"""Run by test_in_process.py in a process of its own: vLLM beside transformers on one tiny model.

Prints what was found as JSON.
"""

import json
import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.vllm.in_process import SyncedVLLM, is_repacked

END = 2
PROMPTS = [[40, 50, 60, 70] * 5, [41, 51], [42] * 17]
found = {}

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
sampler = SyncedVLLM(model, Accelerator(cpu=True), tokenizer, max_model_length=400, max_num_seqs=16)
greedy = Sampling((END,), temperature=0.0)


def sample(engine, prompts=PROMPTS, sampling=greedy, limits=(30, 30, 30)):
    requests = [Request(i, i, ids, n, 0) for i, (ids, n) in enumerate(zip(prompts, limits, strict=True))]
    engine.submit(requests, sampling)
    samples = {}
    while len(samples) < len(requests):
        samples |= dict(engine.collect(wait=True))
    return [samples[i] for i in range(len(requests))]


def gap(prompts, samples, temperature=1.0):
    """Mean absolute difference of the sampler's log-probabilities and those of the model here, in nats."""
    gaps = []
    for ids, one in zip(prompts, samples, strict=True):
        whole = torch.tensor([[*ids, *one.ids]])
        with torch.no_grad():
            scores = (model(whole).logits[0, len(ids) - 1 : -1] / temperature).log_softmax(-1)
        ours = scores.gather(1, whole[0, len(ids) :, None])[:, 0]
        gaps.append((ours - torch.tensor(one.log_probs)).abs().mean().item())
    return max(gaps)


def greedy_and_stops(engine):
    ours, theirs = sample(TransformersEngine(model, tokenizer)), sample(engine)
    found["same greedy"] = [a.ids for a in ours] == [b.ids for b in theirs]
    found["same ends"] = [a.finish for a in ours] == [b.finish for b in theirs]
    words = [tokenizer.decode(one.ids, skip_special_tokens=True)[4] for one in theirs]
    stop = Sampling((END,), tuple(words), temperature=0.0)
    ours, theirs = (sample(e, sampling=stop) for e in (TransformersEngine(model, tokenizer), engine))
    found["same stops"] = [(a.ids, a.finish) for a in ours] == [(b.ids, b.finish) for b in theirs]
    found["stopped"] = [one.finish == "stop" and tokenizer.decode(one.ids)[-1] in words for one in theirs]
    found["limits"] = [len(s.ids) for s in sample(engine, limits=(1, 2, 3))]


def unequal(engine):
    """The short one comes back while the long one is being sampled."""
    free = Sampling((127,), temperature=1.0)
    engine.submit([Request(0, 0, PROMPTS[0], 60, 0), Request(1, 1, PROMPTS[1], 2, 0)], free)
    found["first finished"] = [row for row, _ in engine.collect(wait=True)]
    found["then"] = [row for row, _ in engine.collect(wait=True)]
    found["nothing left"] = engine.collect(wait=True)


def syncs(engine):
    found["repacked"] = is_repacked(
        sampler.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    )
    hot = Sampling((127,), temperature=1.0)
    found["gap"] = gap(PROMPTS, sample(engine, sampling=hot))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * weight.std())
    found["gap without sync"] = gap(PROMPTS, sample(engine, sampling=hot))
    sampler.sync_weights()
    found["gap after sync"] = gap(PROMPTS, sample(engine, sampling=hot))
    found["bytes"] = sampler.sync_bytes
    found["parameters"] = sum(weight.numel() * 4 for weight in model.parameters())
    cool = Sampling((127,), temperature=0.5)
    found["gap at another temperature"] = gap(PROMPTS, sample(engine, sampling=cool))
    found["gap at its own"] = gap(PROMPTS, sample(engine, sampling=cool), temperature=0.5)
    narrow = Sampling((127,), temperature=1.0, top_p=0.5)
    found["gap with top_p"] = gap(PROMPTS, sample(engine, sampling=narrow))


def stale_prefix(engine):
    """Weights that arrive without the prefix cache being emptied: old keys and values are used again."""
    long = [[40 + i % 50 for i in range(300)]]
    sample(engine, long, limits=(4,))
    reset, sampler.llm.reset_prefix_cache = sampler.llm.reset_prefix_cache, lambda: None
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * weight.std())
    sampler.sync_weights()
    found["gap with a stale prefix"] = gap(long, sample(engine, long, limits=(30,)))
    sampler.llm.reset_prefix_cache = reset
    sampler.llm.reset_prefix_cache()
    found["gap with a fresh prefix"] = gap(long, sample(engine, long, limits=(30,)))


def adapter(engine):
    """A LoRA model's weights arrive with its adapter merged; here it stays apart."""
    hot = Sampling((127,), temperature=1.0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    sampler.model = get_peft_model(model, lora)  # the layers of `model` itself now have the adapter
    found["gap without the adapter"] = gap(PROMPTS, sample(engine, sampling=hot))
    sampler.sync_weights()
    found["gap with the adapter"] = gap(PROMPTS, sample(engine, sampling=hot))
    found["merged here"] = any(module.merged for module in model.modules() if hasattr(module, "merged"))


with sampler.engine() as engine:
    for check in (greedy_and_stops, unequal, syncs, stale_prefix, adapter):
        check(engine)
sampler.close()
print("found: " + json.dumps(found))
