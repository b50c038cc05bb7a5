"""Compare vLLM with transformers on one tiny model, and print the results as JSON.

`test_in_process.py` runs this script in a separate process.
"""

import copy
import json
import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit.rollouts import Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.vllm.in_process import SyncedVLLM, is_repacked

EOS = 2
PROMPTS = [[40, 50, 60, 70] * 5, [41, 51], [42] * 17]
results = {}

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
sampler = SyncedVLLM(model, Accelerator(cpu=True), tokenizer, max_model_length=400, max_num_seqs=16)
greedy = Sampling((EOS,), temperature=0.0)


def sample(engine, prompts=PROMPTS, sampling=greedy, limits=(30, 30, 30)):
    requests = [Request(i, i, ids, n, 0) for i, (ids, n) in enumerate(zip(prompts, limits, strict=True))]
    engine.submit(requests, sampling)
    samples = {}
    while len(samples) < len(requests):
        samples |= dict(engine.collect(wait=True))
    return [samples[i] for i in range(len(requests))]


def gap(prompts, samples, temperature=1.0):
    """Return the mean absolute log-probability difference in nats, for the prompt where it is largest."""
    gaps = []
    for prompt, completion in zip(prompts, samples, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            scores = (model(ids).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
        expected = scores.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append((expected - torch.tensor(completion.log_probs)).abs().mean().item())
    return max(gaps)


def compare_greedy_samples(engine):
    ours, theirs = sample(TransformersEngine(model, tokenizer)), sample(engine)
    results["same greedy"] = [a.ids for a in ours] == [b.ids for b in theirs]
    results["same finish reasons"] = [a.finish_reason for a in ours] == [b.finish_reason for b in theirs]
    stop = tuple(tokenizer.decode(turn.ids, skip_special_tokens=True)[4] for turn in theirs)
    sampling = Sampling((EOS,), stop, temperature=0.0)
    ours, theirs = (sample(e, sampling=sampling) for e in (TransformersEngine(model, tokenizer), engine))
    results["same stops"] = [(a.ids, a.finish_reason) for a in ours] == [
        (b.ids, b.finish_reason) for b in theirs
    ]
    results["stopped"] = [
        turn.finish_reason == "stop" and tokenizer.decode(turn.ids)[-1] in stop for turn in theirs
    ]
    results["limits"] = [len(s.ids) for s in sample(engine, limits=(1, 2, 3))]


def finish_short_turn_first(engine):
    """Sample a long and a short turn; the short one must be returned first."""
    free = Sampling((127,), temperature=1.0)
    engine.submit([Request(0, 0, PROMPTS[0], 60, 0), Request(1, 1, PROMPTS[1], 2, 0)], free)
    results["first finished"] = [row for row, _ in engine.collect(wait=True)]
    results["second finished"] = [row for row, _ in engine.collect(wait=True)]
    results["finished last"] = engine.collect(wait=True)


def sync_weights(engine):
    results["repacked"] = is_repacked(
        sampler.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    )
    hot = Sampling((127,), temperature=1.0)
    results["gap"] = gap(PROMPTS, sample(engine, sampling=hot))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * weight.std())
    results["gap without sync"] = gap(PROMPTS, sample(engine, sampling=hot))
    sampler.sync_weights()
    results["gap after sync"] = gap(PROMPTS, sample(engine, sampling=hot))
    results["bytes"] = sampler.sync_bytes
    results["parameters"] = sum(weight.numel() * 4 for weight in model.parameters())
    cool = Sampling((127,), temperature=0.5)
    results["gap at another temperature"] = gap(PROMPTS, sample(engine, sampling=cool))
    results["gap at the same temperature"] = gap(PROMPTS, sample(engine, sampling=cool), temperature=0.5)
    narrow = Sampling((127,), temperature=1.0, top_p=0.5)
    results["gap with top_p"] = gap(PROMPTS, sample(engine, sampling=narrow))


def skip_cache_reset(engine):
    """Sync weights without resetting the prefix cache: cached keys and values of the old weights are used."""
    long = [[40 + i % 50 for i in range(300)]]
    sample(engine, long, limits=(4,))
    reset, sampler.llm.reset_prefix_cache = sampler.llm.reset_prefix_cache, lambda: None
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight) * weight.std())
    sampler.sync_weights()
    results["gap with a stale prefix"] = gap(long, sample(engine, long, limits=(30,)))
    sampler.llm.reset_prefix_cache = reset
    sampler.llm.reset_prefix_cache()
    results["gap with a fresh prefix"] = gap(long, sample(engine, long, limits=(30,)))


def sync_adapter(engine):
    """Sync models with an adapter. vLLM receives merged weights, and the trainer's stay the same."""
    hot = Sampling((127,), temperature=1.0)
    results["gaps without the adapter"], results["gaps with the adapter"] = [], []
    for options in ({"use_rslora": True}, {"use_dora": True, "modules_to_save": ["norm"]}):
        lora = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, **options)
        sampler.model = get_peft_model(model, lora)  # this adds the adapter to the layers of `model` itself
        before = copy.deepcopy(sampler.model.state_dict())
        results["gaps without the adapter"].append(gap(PROMPTS, sample(engine, sampling=hot)))
        sampler.sync_weights()
        results["gaps with the adapter"].append(gap(PROMPTS, sample(engine, sampling=hot)))
        after = sampler.model.state_dict()
        results["changed"] = [name for name in before if not torch.equal(before[name], after[name])]
        results["trainer is merged"] = any(
            module.merged for module in model.modules() if hasattr(module, "merged")
        )
        sampler.model.unload()


with sampler.engine() as engine:
    for check in (
        compare_greedy_samples,
        finish_short_turn_first,
        sync_weights,
        skip_cache_reset,
        sync_adapter,
    ):
        check(engine)
sampler.close()
print("results: " + json.dumps(results))
