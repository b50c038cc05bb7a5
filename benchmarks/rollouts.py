"""Speed of rollouts: transformers with shared prompts, and vLLM in the same process.

    python benchmarks/rollouts.py            # ten minutes on two CPU cores; needs vLLM
    python benchmarks/rollouts.py --parts transformers

Every ratio compares two sides that are measured in the same run, alternately, `--repeats` times; the best of
each counts. A turn ends at its token limit, so that both sides sample the same number of tokens. Plain
transformers is measured before rlkit applies its CPU settings, and again after it.
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
NEVER_SAMPLED = (0,)  # <|endoftext|> as EOS token: an instruct model does not write it
UNLIMITED = Sampling(NEVER_SAMPLED)
TURNS, TURN_TOKENS = 3, 40
REPLY = "Nothing was found. Go on."


class Talk(Environment):
    """Environment that replies to every turn immediately, with the same sentence."""

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
        return [Reply(REPLY) for _ in turns]


def best(repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Return the minimum seconds of each function, called alternately; the first call is a warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in times]


def sample(engine: Engine, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> int:
    """Sample a turn for each prompt and return the number of sampled tokens."""
    requests = zip(prompts, limits, strict=True)
    engine.submit([Request(i, i, ids, limit, 0) for i, (ids, limit) in enumerate(requests)], UNLIMITED)
    num_running, num_tokens = len(prompts), 0
    while num_running:
        finished = engine.collect(wait=True)
        num_running -= len(finished)
        num_tokens += sum(len(completion.ids) for _, completion in finished)
    return num_tokens


def questions(tokenizer: Any, count: int) -> list[list[int]]:
    chats = [[{"role": "user", "content": f"What is {i} times {i + 3}? Explain."}] for i in range(count)]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return tokenizer.apply_chat_template(chats, **options)["input_ids"]


def plain(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: int, samples: int = 1
) -> None:
    """Sample with `generate` of transformers, without rlkit's engine."""
    ids, mask = left_pad(prompts, tokenizer.pad_token_id)
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, top_k=0, num_return_sequences=samples,
        eos_token_id=NEVER_SAMPLED[0], pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.generate(ids, attention_mask=mask, generation_config=settings)


def long_prompt() -> list[int]:
    return torch.randint(1000, 20000, (900,), generator=torch.Generator().manual_seed(0)).tolist()


def plain_part(model: Any, tokenizer: Any, repeats: int, parts: Sequence[str]) -> dict[str, float]:
    """Return the seconds of plain `generate` for the workload of each part that is compared with it."""
    seconds = {}
    if "transformers" in parts:
        (seconds["transformers"],) = best(repeats, lambda: plain(model, tokenizer, [long_prompt()], 100, 8))
    if "vllm" in parts:
        prompts = questions(tokenizer, 64)
        (seconds["vllm"],) = best(repeats, lambda: plain(model, tokenizer, prompts, 128))
    return seconds


def transformers_part(model: Any, tokenizer: Any, repeats: int, plain_seconds: float) -> dict[str, Any]:
    """Compare the engine with plain `generate` on 8 completions of 100 tokens for a prompt of 900 tokens."""
    engine = TransformersEngine(model, tokenizer)
    tuned, rlkit = best(
        repeats,
        lambda: plain(model, tokenizer, [long_prompt()], 100, 8),
        lambda: sample(engine, [long_prompt()] * 8, [100] * 8),
    )
    return {
        "plain_s": round(plain_seconds, 2),
        "plain_tuned_s": round(tuned, 2),
        "rlkit_s": round(rlkit, 2),
        "ratio": round(plain_seconds / rlkit, 2),
        "ratio_to_tuned": round(tuned / rlkit, 2),
    }


def vllm_part(
    model: Any, tokenizer: Any, repeats: int, plain_seconds: float, engine: Engine
) -> dict[str, Any]:
    """Compare vLLM in process with transformers on 64 prompts with 128 tokens each, in tokens per second."""
    prompts, limits = questions(tokenizer, 64), [128] * 64
    rlkit_seconds, vllm_seconds = best(
        repeats,
        lambda: sample(TransformersEngine(model, tokenizer), prompts, limits),
        lambda: sample(engine, prompts, limits),
    )
    plain_rate, rlkit_rate, vllm_rate = (
        64 * 128 / seconds for seconds in (plain_seconds, rlkit_seconds, vllm_seconds)
    )
    return {
        "transformers": round(plain_rate),
        "rlkit_transformers": round(rlkit_rate),
        "vllm": round(vllm_rate),
        "ratio": round(vllm_rate / plain_rate, 2),
        "ratio_to_rlkit_transformers": round(vllm_rate / rlkit_rate, 2),
    }


def loop_part(tokenizer: Any, repeats: int, engine: Any) -> dict[str, Any]:
    """Compare the rollout loop, on three turns of 40 tokens, with a bare loop without masks or checks."""
    prompts = questions(tokenizer, 32)
    limits = {"min_tokens": TURN_TOKENS, "max_tokens": TURN_TOKENS + 8}
    sampling = Sampling(NEVER_SAMPLED, stop=(" ",), extra=limits)
    loop = Loop(Talk(), tokenizer, RolloutLimits(2000, max_turns=TURNS), NEVER_SAMPLED)
    tasks = [{"prompt": "?"}] * len(prompts)
    loop_counts: list[int] = []
    bare_counts: list[int] = []
    loop_seconds, bare_seconds = best(
        repeats,
        lambda: loop_counts.append(sum(sum(r.mask) for r in loop(engine, sampling, tasks, prompts))),
        lambda: bare_counts.append(bare_loop(tokenizer, engine, sampling, prompts)),
    )
    loop_rate, bare_rate = loop_counts[-1] / loop_seconds, bare_counts[-1] / bare_seconds
    return {"bare": round(bare_rate), "loop": round(loop_rate), "ratio": round(loop_rate / bare_rate, 2)}


def bare_loop(tokenizer: Any, engine: Any, sampling: Sampling, prompts: Sequence[list[int]]) -> int:
    """Sample `TURNS` turns for each prompt and return the number of sampled tokens."""
    reply = tokenizer(REPLY, add_special_tokens=False)["input_ids"]
    contexts = [list(ids) for ids in prompts]
    num_turns_to_sample = [TURNS] * len(prompts)
    engine.submit([Request(i, i, ids, 100, 0) for i, ids in enumerate(contexts)], sampling)
    num_running, num_tokens = len(prompts), 0
    while num_running:
        next_turns = []
        for row, completion in engine.collect(wait=True):
            num_tokens += len(completion.ids)
            contexts[row] += [*completion.ids, *reply]
            num_turns_to_sample[row] -= 1
            if num_turns_to_sample[row]:
                next_turns.append(Request(row, row, contexts[row], 100, 0))
            else:
                num_running -= 1
        engine.submit(next_turns, sampling)
    return num_tokens


def unequal_part(tokenizer: Any, repeats: int, engine: Engine) -> dict[str, Any]:
    """Compare a batch of one completion of 800 tokens and 31 of 16 tokens with the long one alone."""
    prompts = questions(tokenizer, 32)
    alone, batch = best(
        repeats,
        lambda: sample(engine, prompts[:1], [800]),
        lambda: sample(engine, prompts, [800] + [16] * 31),
    )
    return {"alone_s": round(alone, 2), "batch_s": round(batch, 2), "ratio": round(batch / alone, 2)}


def sync_part(repeats: int, sampler: Any) -> dict[str, Any]:
    """Time the transfer of all weights into vLLM in the same process."""
    (seconds,) = best(repeats, sampler.sync_weights)
    return {"seconds": round(seconds, 3), "bytes": sampler.sync_bytes}


def server_sync_part(model: Any, path: str, repeats: int) -> dict[str, Any]:
    """Time the transfer of a LoRA adapter and of all weights to a server on this machine, via /dev/shm."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rlkit", "serve", path, "--port", str(port), "--lora_rank", "16"]
    server = subprocess.Popen(
        [*command, "--max_model_len", "512"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        engine = ServerEngine([f"http://127.0.0.1:{port}"], retry_timeout=600)
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
    plain_seconds = plain_part(model, tokenizer, options.repeats, options.parts)
    tune_for_cpu()
    result: dict[str, Any] = {
        "model": "SmolLM2-135M, bfloat16",
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    if "transformers" in options.parts:
        seconds = plain_seconds["transformers"]
        result["transformers"] = transformers_part(model, tokenizer, options.repeats, seconds)
    if set(options.parts) - {"transformers", "server_sync"}:
        from rlkit.rollouts.vllm.in_process import SyncedVLLM

        sampler = SyncedVLLM(model, Accelerator(cpu=True), tokenizer, max_model_length=1024, max_num_seqs=64)
        with sampler.engine() as engine:
            parts: dict[str, Callable[[], dict[str, Any]]] = {
                "vllm": lambda: vllm_part(model, tokenizer, options.repeats, plain_seconds["vllm"], engine),
                "loop": lambda: loop_part(tokenizer, options.repeats, engine),
                "unequal": lambda: unequal_part(tokenizer, options.repeats, engine),
                "sync": lambda: sync_part(options.repeats, sampler),
            }
            result |= {name: measure() for name, measure in parts.items() if name in options.parts}
        sampler.close()
    if "server_sync" in options.parts:
        result["server_sync"] = server_sync_part(model, path, options.repeats)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
