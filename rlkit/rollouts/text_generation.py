"""Text generation for components that a model powers, such as a simulated search engine.

`load_text_model` runs a model on transformers, on vLLM in this process, or on any server with an
OpenAI-compatible chat completions API. The first two use the engines that also sample rollouts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from rlkit.errors import UserError, nearest

BACKENDS = ("transformers", "vllm")
CONCURRENCY = 64  # concurrent requests to a server


@dataclass(frozen=True)
class Generation:
    """Generated text, or the reason why generation failed."""

    text: str = ""
    error: str | None = None


class TextModel(Protocol):
    """Generates text from chat messages; `name` identifies the model."""

    name: str

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        """Generate one reply for each conversation, with the seed at the same position."""


def load_text_model(
    model: str,
    backend: str = "transformers",
    *,
    max_tokens: int = 600,
    temperature: float = 0.8,
    gpu_memory_utilization: float = 0.3,
    timeout: float = 120.0,
) -> TextModel:
    """Load a model that generates text.

    With transformers, the model, the prompt and the seed determine the text, up to rounding. With vLLM and
    with servers, seeded requests are only as reproducible as the backend makes them.

    Args:
        model: Hub name, folder or bundled model. With a server, the name under which it serves the model.
        backend: "transformers", "vllm" (in this process), or the URL of a server, e.g. http://host:8000/v1.
            The server's API key is read from `OPENAI_API_KEY`.
        max_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature; 0 is greedy.
        gpu_memory_utilization: Fraction of a GPU's memory for vLLM in this process.
        timeout: Seconds to wait for one reply of a server.

    Raises:
        UserError: The backend is unknown, or the model cannot be loaded.
    """
    if backend.startswith(("http://", "https://")):
        return ServerTextModel(backend, model, max_tokens, temperature, timeout=timeout)
    if backend not in BACKENDS:
        hint = nearest(backend, BACKENDS)
        raise UserError(f"unknown backend {backend!r}{hint}: expected {', '.join(BACKENDS)} or a URL")
    return EngineTextModel(
        model, backend, max_tokens, temperature, gpu_memory_utilization=gpu_memory_utilization
    )


class EngineTextModel:
    """Generates text with a rollout engine in this process."""

    def __init__(
        self, model: str, backend: str, max_tokens: int, temperature: float, *, gpu_memory_utilization: float
    ):
        from rlkit.models.load import resolve

        self.name = model
        self.max_tokens, self.temperature = max_tokens, temperature
        # vLLM takes a seed with each request. The transformers engine derives its random numbers from
        # `Request.global_index`, so the seed travels there.
        self.seeded = backend == "vllm"
        path = resolve(model)
        opened = _open_vllm(path, gpu_memory_utilization) if self.seeded else _open_transformers(path)
        self.engine, self.tokenizer, self.eos_token_ids = opened
        # On a CPU, vLLM crashes when it prefills a seeded request in chunks: it rewinds the random number
        # generator, which only works for CUDA generators. So each wave of prompts must fit into one step.
        self.wave_tokens: int | None = None
        if self.seeded and not _has_cuda():
            self.wave_tokens = self.engine.engine.vllm_config.scheduler_config.max_num_batched_tokens

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        """Generate one reply for each conversation; a prompt that fills the context gets an error."""
        from rlkit.rollouts.tokenize import tokenize

        ids = tokenize(self.tokenizer, prompts) if prompts else []
        generations: list[Generation] = []
        for wave in split_by_tokens([len(prompt) for prompt in ids], self.wave_tokens):
            generations += self._generate_wave([ids[i] for i in wave], [seeds[i] for i in wave])
        return generations

    def _generate_wave(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Generation]:
        from rlkit.rollouts.types import Request, Sampling

        generations: dict[int, Generation] = {}
        num_pending = 0
        for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            limit = self.max_tokens
            if self.engine.context is not None:
                limit = min(limit, self.engine.context - len(ids))
            if limit < 1:
                error = f"the prompt has {len(ids)} tokens; the model's context is {self.engine.context}"
                generations[i] = Generation(error=error)
                continue
            extra = {"seed": seed} if self.seeded else {}
            sampling = Sampling(self.eos_token_ids, temperature=self.temperature, key=(), extra=extra)
            self.engine.submit([Request(i, seed, ids, limit, 0)], sampling)
            num_pending += 1
        while num_pending:
            for i, sample in self.engine.collect(wait=True):
                text = self.tokenizer.decode(sample.ids, skip_special_tokens=True)
                generations[i] = Generation(text.strip())
                num_pending -= 1
        return [generations[i] for i in range(len(prompts))]


def split_by_tokens(lengths: Sequence[int], max_tokens: int | None) -> Iterator[range]:
    """Split prompts into consecutive waves of at most `max_tokens` tokens; None gives a single wave.

    A prompt that is longer than `max_tokens` is a wave of its own.
    """
    start, num_tokens = 0, 0
    for i, length in enumerate(lengths):
        if max_tokens is not None and i > start and num_tokens + length > max_tokens:
            yield range(start, i)
            start, num_tokens = i, 0
        num_tokens += length
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


def _open_vllm(path: str, gpu_memory_utilization: float) -> tuple[Any, Any, tuple[int, ...]]:
    import torch

    from rlkit.rollouts.tokenize import eos_token_ids
    from rlkit.rollouts.vllm.installed import check_installed, set_cpu_defaults

    check_installed()
    settings: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization}
    if not torch.cuda.is_available():
        set_cpu_defaults(os.environ, shares_process=True)
        settings = {"enforce_eager": True, "dtype": "bfloat16"}
    from vllm import LLM

    from rlkit.rollouts.vllm.in_process import InProcessEngine

    llm = LLM(path, **settings)
    tokenizer = llm.get_tokenizer()
    declared = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    eos_ids = eos_token_ids(declared, tokenizer)  # type: ignore[arg-type]
    return InProcessEngine(llm.llm_engine), tokenizer, tuple(eos_ids)


class ServerTextModel:
    """Generates text on a server; the OpenAI client retries transient errors with exponential backoff."""

    def __init__(self, url: str, model: str, max_tokens: int, temperature: float, *, timeout: float):
        import openai

        self.name = model
        self.settings: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        key = os.environ.get("OPENAI_API_KEY", "none")  # the client requires a key, most servers do not
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=4)

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        """Generate one reply for each conversation, with up to `CONCURRENCY` concurrent requests."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self._request, prompts, seeds))

    def _request(self, prompt: Sequence[Mapping[str, Any]], seed: int) -> Generation:
        import openai

        try:
            completion = self.client.chat.completions.create(
                messages=prompt,  # type: ignore[arg-type]
                seed=seed,
                **self.settings,
            )
        except openai.OpenAIError as error:
            return Generation(error=f"request to {self.name} failed: {type(error).__name__}: {error}")
        if not completion.choices:  # how some servers report a refusal
            return Generation(error=f"the server returned no choices for {self.name}")
        return Generation((completion.choices[0].message.content or "").strip())
