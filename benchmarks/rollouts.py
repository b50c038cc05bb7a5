"""How fast rollouts are sampled: transformers with shared prompts, and vLLM in the same process.

    python benchmarks/rollouts.py            # ten minutes on two CPU cores; needs vLLM
    python benchmarks/rollouts.py --parts transformers

Every ratio compares two sides that were measured in the same run, one after the other, `--repeats` times; the
best of each counts. A turn ends at its limit, so that both sides sample as many tokens. What is compared with
transformers as it comes is measured before rlkit changes anything for the CPU, and again after it.
"""

import argparse
import copy
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlkit.environment import Environment, Reply
from rlkit.models.bundled import bundled_path
from rlkit.models.cpu import tune_for_cpu
from rlkit.rollouts import Engine, Request, Sampling
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.local.generate import left_pad
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.vllm.server_engine import ServerEngine

RESULT = Path(__file__).parent / "results" / "rollouts.json"
NEVER = (0,)  # <|endoftext|>, which an instruct model does not write
FREE = Sampling(NEVER)
TURNS, TURN_TOKENS = 3, 40


class Talk(Environment):
    """Answers every turn at once with the same words."""

    id = "talk-v1"
    metric = "any"
    rewards = {"any": lambda completion: 1.0}  # noqa: RUF012
    reward_weights = {"any": 1.0}  # noqa: RUF012
    max_turns = TURNS

    def tasks(self, split: str, n: int | None = None, seed: int = 0) -> Any:
        raise NotImplementedError

    def answer(self, task: Any) -> str:
        return ""

    def respond(self, turns: Sequence[Any]) -> list[Reply]:
        return [Reply("Nothing was found. Go on.") for _ in turns]


def best(repeats: int, *works: Callable[[], Any]) -> list[float]:
    """The shortest of several times of each, in seconds, taken in turns; a first one is not counted."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats + 1):
        for work, seconds in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
    return [min(seconds[1:]) for seconds in times]


def sample(engine: Engine, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Sample a turn for each prompt; return the tokens sampled."""
    requests = zip(prompts, limits, strict=True)
    engine.submit([Request(i, i, ids, limit, 0) for i, (ids, limit) in enumerate(requests)], FREE)
    waiting, tokens = len(prompts), 0
    while waiting:
        finished = engine.collect(wait=True)
        waiting -= len(finished)
        tokens += sum(len(one.ids) for _, one in finished)
    return tokens


def questions(tokenizer: Any, count: int) -> list[list[int]]:
    chats = [[{"role": "user", "content": f"What is {i} times {i + 3}? Explain."}] for i in range(count)]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(chats, **options)["input_ids"]


def plain(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, each: int = 1) -> None:
    """Transformers' `generate` with nothing of ours."""
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, top_k=0, num_return_sequences=each, eos_token_id=NEVER[0],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.generate(ids, attention_mask=mask, generation_config=settings)


def long_prompt() -> list[int]:
    return torch.randint(1000, 20000, (900,), generator=torch.Generator().manual_seed(0)).tolist()


def plain_part(model: Any, tokenizer: Any, repeats: int, parts: Sequence[str]) -> dict[str, float]:
    """Seconds of plain `generate` for the work of the parts that are compared with it."""
    seconds = {}
    if "transformers" in parts:
        (seconds["transformers"],) = best(repeats, lambda: plain(model, tokenizer, [long_prompt()], 100, 8))
    if "vllm" in parts:
        prompts = questions(tokenizer, 64)
        (seconds["vllm"],) = best(repeats, lambda: plain(model, tokenizer, prompts, 128))
    return seconds


def transformers_part(model: Any, tokenizer: Any, repeats: int, as_it_comes: float) -> dict[str, Any]:
    """A group of 8 on a prompt of 900 tokens, 100 tokens each: against plain `generate`."""
    engine = TransformersEngine(model, tokenizer)
    tuned, ours = best(
        repeats,
        lambda: plain(model, tokenizer, [long_prompt()], 100, 8),
        lambda: sample(engine, [long_prompt()] * 8, [100] * 8),
    )
    return {
        "plain_s": round(as_it_comes, 2),
        "plain_tuned_s": round(tuned, 2),
        "rlkit_s": round(ours, 2),
        "ratio": round(as_it_comes / ours, 2),
        "ratio_to_tuned": round(tuned / ours, 2),
    }


def vllm_part(model: Any, tokenizer: Any, repeats: int, as_it_comes: float, engine: Engine) -> dict[str, Any]:
    """64 prompts, 128 tokens each: vLLM in process against transformers, in tokens a second."""
    prompts, limits = questions(tokenizer, 64), [128] * 64
    seconds = best(
        repeats,
        lambda: sample(TransformersEngine(model, tokenizer), prompts, limits),
        lambda: sample(engine, prompts, limits),
    )
    own, vllm, theirs = (64 * 128 / one for one in (*seconds, as_it_comes))
    return {
        "transformers": round(theirs),
        "rlkit_transformers": round(own),
        "vllm": round(vllm),
        "ratio": round(vllm / theirs, 2),
        "ratio_to_rlkit_transformers": round(vllm / own, 2),
    }


def loop_part(tokenizer: Any, repeats: int, engine: Any) -> dict[str, Any]:
    """Three turns of 40 tokens: the loop against a bare one over vLLM without masks, limits or checks."""
    prompts = questions(tokenizer, 32)
    turns = Sampling(NEVER, stop=(" ",), further={"min_tokens": TURN_TOKENS, "max_tokens": TURN_TOKENS + 8})
    loop = Loop(Talk(), tokenizer, RolloutLimits(2000, turns=TURNS), NEVER)
    tasks = [{"prompt": "?"}] * len(prompts)
    counts: list[int] = []
    bare: list[int] = []
    ours, theirs = best(
        repeats,
        lambda: counts.append(sum(sum(r.mask) for r in loop(engine, turns, tasks, prompts))),
        lambda: bare.append(bare_loop(tokenizer, engine, turns, prompts)),
    )
    rates = counts[-1] / ours, bare[-1] / theirs
    return {"bare": round(rates[1]), "loop": round(rates[0]), "ratio": round(rates[0] / rates[1], 2)}


def bare_loop(tokenizer: Any, engine: Any, sampling: Sampling, prompts: Sequence[list[int]]) -> int:
    reply = tokenizer("Nothing was found. Go on.", add_special_tokens=False)["input_ids"]
    texts, left, tokens = [list(ids) for ids in prompts], [TURNS] * len(prompts), 0
    engine.submit([Request(i, i, ids, 100, 0) for i, ids in enumerate(texts)], sampling)
    running = len(prompts)
    while running:
        again = []
        for row, one in engine.collect(wait=True):
            tokens += len(one.ids)
            texts[row] += [*one.ids, *reply]
            left[row] -= 1
            if left[row]:
                again.append(Request(row, row, texts[row], 100, 0))
            else:
                running -= 1
        engine.submit(again, sampling)
    return tokens


def unequal_part(tokenizer: Any, repeats: int, engine: Engine) -> dict[str, Any]:
    """One answer of 800 tokens beside 31 of 16: the batch against its longest member alone."""
    prompts = questions(tokenizer, 32)
    alone, batch = best(
        repeats,
        lambda: sample(engine, prompts[:1], [800]),
        lambda: sample(engine, prompts, [800] + [16] * 31),
    )
    return {"alone_s": round(alone, 2), "batch_s": round(batch, 2), "ratio": round(batch / alone, 2)}


def sync_part(repeats: int, sampler: Any) -> dict[str, Any]:
    """The full weights into vLLM in the same process."""
    (seconds,) = best(repeats, sampler.sync_weights)
    return {"seconds": round(seconds, 3), "bytes": sampler.sync_bytes}


def server_sync_part(model: Any, path: str, repeats: int) -> dict[str, Any]:
    """A LoRA adapter alone, and the full weights, to a server on this machine by way of /dev/shm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rlkit", "serve", path, "--port", str(port), "--lora_rank", "16"]
    server = subprocess.Popen(
        [*command, "--max_model_len", "512"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        engine = ServerEngine([f"http://127.0.0.1:{port}"], patience=600)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=16, target_modules="all-linear"))
        with tempfile.TemporaryDirectory() as folder:
            adapted.save_pretrained(folder)
            (adapter,) = best(repeats, lambda: engine.push_adapter(folder, "adapter"))
        size = engine.pushed_bytes
        (full,) = best(repeats, lambda: engine.push(model.named_parameters(), "full"))
        return {
            "adapter": {"seconds": round(adapter, 3), "bytes": size},
            "full": {"seconds": round(full, 3), "bytes": engine.pushed_bytes},
        }
    finally:
        engine.close()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ("transformers", "vllm", "loop", "unequal", "sync", "server_sync")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    path = bundled_path("bundled:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    as_it_comes = plain_part(model, tokenizer, options.repeats, options.parts)
    tune_for_cpu()
    result: dict[str, Any] = {
        "model": "SmolLM2-135M, bfloat16",
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    if "transformers" in options.parts:
        seconds = as_it_comes["transformers"]
        result["transformers"] = transformers_part(model, tokenizer, options.repeats, seconds)
    if set(options.parts) - {"transformers", "server_sync"}:
        from rlkit.rollouts.vllm.in_process import SyncedVLLM

        sampler = SyncedVLLM(model, Accelerator(cpu=True), tokenizer, max_model_length=1024, max_num_seqs=64)
        with sampler.engine() as engine:
            makers: dict[str, Callable[[], dict[str, Any]]] = {
                "vllm": lambda: vllm_part(model, tokenizer, options.repeats, as_it_comes["vllm"], engine),
                "loop": lambda: loop_part(tokenizer, options.repeats, engine),
                "unequal": lambda: unequal_part(tokenizer, options.repeats, engine),
                "sync": lambda: sync_part(options.repeats, sampler),
            }
            result |= {name: make() for name, make in makers.items() if name in options.parts}
        sampler.close()
    if "server_sync" in options.parts:
        result["server_sync"] = server_sync_part(model, path, options.repeats)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
