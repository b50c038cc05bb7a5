"""How fast rollouts are sampled: transformers with shared prompts, and vLLM in the same process.

    python benchmarks/rollouts.py            # ten minutes on two CPU cores; needs vLLM
    python benchmarks/rollouts.py --parts transformers

Every ratio compares two sides that were measured in the same run, one after the other, `--repeats` times; the
best of each counts. A turn ends at its limit, so that both sides sample as many tokens.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlkit.bundled import bundled_path
from rlkit.cpu import tune_for_cpu
from rlkit.environment import Environment, Reply
from rlkit.rollouts import Engine, Request, Sampling
from rlkit.rollouts.generate import left_pad
from rlkit.rollouts.local import TransformersEngine
from rlkit.rollouts.loop import Limits, Loop

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


def best(work: Callable[[], Any], repeats: int) -> float:
    """The shortest of several times, in seconds; a first one is not counted."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


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


def transformers_part(model: Any, tokenizer: Any, repeats: int) -> dict[str, Any]:
    """A group of 8 on a prompt of 900 tokens, 100 tokens each: against plain `generate`."""
    prompt = torch.randint(1000, 20000, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, mask = left_pad([prompt], tokenizer.pad_token_id)
    settings = GenerationConfig(
        max_new_tokens=100, do_sample=True, top_k=0, num_return_sequences=8, eos_token_id=NEVER[0],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    plain = best(lambda: model.generate(ids, attention_mask=mask, generation_config=settings), repeats)
    engine = TransformersEngine(model, tokenizer)
    ours = best(lambda: sample(engine, [prompt] * 8, [100] * 8), repeats)
    return {"plain_s": round(plain, 2), "rlkit_s": round(ours, 2), "ratio": round(plain / ours, 2)}


def vllm_part(model: Any, tokenizer: Any, repeats: int, engine: Engine) -> dict[str, Any]:
    """64 prompts, 128 tokens each: vLLM in process against transformers, in tokens a second."""
    prompts, limits = questions(tokenizer, 64), [128] * 64
    theirs = 64 * 128 / best(lambda: sample(TransformersEngine(model, tokenizer), prompts, limits), repeats)
    ours = 64 * 128 / best(lambda: sample(engine, prompts, limits), repeats)
    return {"transformers": round(theirs), "vllm": round(ours), "ratio": round(ours / theirs, 2)}


def loop_part(tokenizer: Any, repeats: int, engine: Any) -> dict[str, Any]:
    """Three turns of 40 tokens: the loop against a bare one over vLLM without masks, limits or checks."""
    prompts = questions(tokenizer, 32)
    turns = Sampling(NEVER, stop=(" ",), further={"min_tokens": TURN_TOKENS, "max_tokens": TURN_TOKENS + 8})
    loop = Loop(Talk(), tokenizer, Limits(2000, turns=TURNS), NEVER)
    tasks = [{"prompt": "?"}] * len(prompts)
    counts: list[int] = []
    ours = best(lambda: counts.append(sum(sum(r.mask) for r in loop(engine, turns, tasks, prompts))), repeats)
    bare: list[int] = []
    theirs = best(lambda: bare.append(bare_loop(tokenizer, engine, turns, prompts)), repeats)
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
    alone = best(lambda: sample(engine, prompts[:1], [800]), repeats)
    batch = best(lambda: sample(engine, prompts, [800] + [16] * 31), repeats)
    return {"alone_s": round(alone, 2), "batch_s": round(batch, 2), "ratio": round(batch / alone, 2)}


def sync_part(repeats: int, sampler: Any) -> dict[str, Any]:
    """The full weights into vLLM in the same process."""
    seconds = best(sampler.sync_weights, repeats)
    return {"seconds": round(seconds, 3), "bytes": sampler.sync_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = ("transformers", "vllm", "loop", "unequal", "sync")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    path = bundled_path("bundled:smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tune_for_cpu()
    result: dict[str, Any] = {
        "model": "SmolLM2-135M, bfloat16",
        "device": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
    }
    if "transformers" in options.parts:
        result["transformers"] = transformers_part(model, tokenizer, options.repeats)
    if set(options.parts) - {"transformers"}:
        from rlkit.rollouts.vllm import SyncedVLLM

        sampler = SyncedVLLM(model, Accelerator(cpu=True), tokenizer, max_model_length=1024, max_num_seqs=64)
        with sampler.engine() as engine:
            makers: dict[str, Callable[[], dict[str, Any]]] = {
                "vllm": lambda: vllm_part(model, tokenizer, options.repeats, engine),
                "loop": lambda: loop_part(tokenizer, options.repeats, engine),
                "unequal": lambda: unequal_part(tokenizer, options.repeats, engine),
                "sync": lambda: sync_part(options.repeats, sampler),
            }
            result |= {name: make() for name, make in makers.items() if name in options.parts}
        sampler.close()
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
