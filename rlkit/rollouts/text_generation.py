"""A model that writes texts, e.g. one that plays a search engine, on the engines that sample rollouts too.

`open_writer` takes a model through transformers, through vLLM in this process, or through any server that
speaks OpenAI's chat completions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from rlkit.errors import UserError, nearest

THROUGH = ("transformers", "vllm")
CONCURRENCY = 64  # requests that a server has at a time


@dataclass(frozen=True)
class Written:
    """A text, or why there is none."""

    text: str = ""
    error: str | None = None


class Writer(Protocol):
    """Writes texts; `name` is the model's."""

    name: str

    def write(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Written]:
        """Answer chat messages, one text for each; `seeds` decide the random numbers of each."""


def open_writer(
    model: str,
    through: str = "transformers",
    *,
    tokens: int = 600,
    temperature: float = 0.8,
    memory: float = 0.3,
    timeout: float = 120.0,
) -> Writer:
    """Open a model that writes.

    Args:
        model: hub name, folder or bundled model; of a server, the name that it knows.
        through: "transformers", "vllm" (in this process), or the URL of a server, e.g. http://host:8000/v1,
            whose key is `OPENAI_API_KEY`.
        tokens: most of a text.
        temperature: 0 is greedy.
        memory: of vLLM in this process: its share of a GPU.
        timeout: of a server: seconds for a text.

    A text is decided by model, prompt and seed with transformers, up to rounding; with vLLM and servers as
    far as they keep their promise of seeds.

    Raises:
        UserError: the model cannot be opened.
    """
    if through.startswith(("http://", "https://")):
        return ServerWriter(through, model, tokens, temperature, timeout=timeout)
    if through not in THROUGH:
        raise UserError(f"a model cannot write through {through!r}{nearest(through, THROUGH)}, or a URL")
    return EngineWriter(model, through, tokens, temperature, memory=memory)


class EngineWriter:
    """Writes with an engine of this process."""

    def __init__(self, model: str, through: str, tokens: int, temperature: float, *, memory: float):
        from rlkit.models.load import resolve

        self.name = model
        self.tokens, self.temperature = tokens, temperature
        self.seeded = through == "vllm"  # its requests bring their seeds; transformers has places
        path = resolve(model)
        opened = _open_vllm(path, memory) if self.seeded else _open_transformers(path)
        self.engine, self.tokenizer, self.ends = opened
        # On a CPU vLLM ends where a request with a seed has its prompt computed in parts: it rewinds the
        # random numbers, which only a GPU's generator can. So prompts come that fit into one step together.
        self.wave = None
        if self.seeded and not _has_cuda():
            self.wave = self.engine.engine.vllm_config.scheduler_config.max_num_batched_tokens

    def write(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Written]:
        """Sample all of them."""
        from rlkit.rollouts.tokenize import tokenize

        ids = tokenize(self.tokenizer, prompts) if prompts else []
        written: list[Written] = []
        for wave in waves([len(one) for one in ids], self.wave):
            written += self._write([ids[i] for i in wave], [seeds[i] for i in wave])
        return written

    def _write(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Written]:
        from rlkit.rollouts.types import Request, Sampling

        written: dict[int, Written] = {}
        waiting = 0
        for row, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            limit = self.tokens
            if self.engine.context is not None:
                limit = min(limit, self.engine.context - len(ids))
            if limit < 1:
                error = f"the prompt has {len(ids)} tokens, the model takes {self.engine.context}"
                written[row] = Written(error=error)
                continue
            further = {"seed": seed} if self.seeded else {}
            sampling = Sampling(self.ends, temperature=self.temperature, key=(), further=further)
            self.engine.submit([Request(row, seed, ids, limit, 0)], sampling)
            waiting += 1
        while waiting:
            for row, sample in self.engine.collect(wait=True):
                text = self.tokenizer.decode(sample.ids, skip_special_tokens=True)
                written[row] = Written(text.strip())
                waiting -= 1
        return [written[row] for row in range(len(prompts))]


def waves(lengths: Sequence[int], most: int | None) -> Iterator[range]:
    """Divide prompts into runs of at most `most` tokens together, or of one prompt; None: all at once."""
    start, tokens = 0, 0
    for i, length in enumerate(lengths):
        if most is not None and i > start and tokens + length > most:
            yield range(start, i)
            start, tokens = i, 0
        tokens += length
    if lengths:
        yield range(start, len(lengths))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _open_transformers(path: str) -> tuple[Any, Any, tuple[int, ...]]:
    import torch
    from trl import ModelConfig

    from rlkit.models.load import load_model
    from rlkit.rollouts.local.engine import TransformersEngine
    from rlkit.rollouts.tokenize import eos_token_ids

    model, tokenizer = load_model(ModelConfig(model_name_or_path=path, dtype="bfloat16"))
    if torch.cuda.is_available():
        model.to("cuda")
    model.eval()
    engine = TransformersEngine(model, tokenizer, batch_size=64)
    return engine, tokenizer, tuple(eos_token_ids(model.generation_config.eos_token_id, tokenizer))


def _open_vllm(path: str, memory: float) -> tuple[Any, Any, tuple[int, ...]]:
    import torch

    from rlkit.rollouts.tokenize import eos_token_ids
    from rlkit.rollouts.vllm.installed import check_installed, set_cpu_defaults

    check_installed()
    settings: dict[str, Any] = {"gpu_memory_utilization": memory}
    if not torch.cuda.is_available():
        set_cpu_defaults(os.environ, shares_process=True)
        settings = {"enforce_eager": True, "dtype": "bfloat16"}
    from vllm import LLM

    from rlkit.rollouts.vllm.in_process import InProcessEngine

    llm = LLM(path, **settings)
    tokenizer = llm.get_tokenizer()
    declared = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    ends = eos_token_ids(declared, tokenizer)  # type: ignore[arg-type]
    return InProcessEngine(llm.llm_engine), tokenizer, tuple(ends)


class ServerWriter:
    """Writes with a server; the client tries again, with growing pauses, where one is worth it."""

    def __init__(self, url: str, model: str, tokens: int, temperature: float, *, timeout: float):
        import openai

        self.name = model
        self.settings: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": temperature}
        key = os.environ.get("OPENAI_API_KEY", "none")  # the client wants one, most servers do not
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=4)

    def write(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Written]:
        """Ask for all of them, `CONCURRENCY` at a time."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self._write, prompts, seeds))

    def _write(self, prompt: Sequence[Mapping[str, Any]], seed: int) -> Written:
        import openai

        try:
            answer = self.client.chat.completions.create(
                messages=prompt,  # type: ignore[arg-type]
                seed=seed,
                **self.settings,
            )
        except openai.OpenAIError as error:
            return Written(error=f"the server of {self.name}: {type(error).__name__}: {error}")
        if not answer.choices:  # some servers say so what they refused
            return Written(error=f"the server of {self.name} gave no text")
        return Written((answer.choices[0].message.content or "").strip())
