"""Text generation for components that a model powers, such as a simulated search engine.

`load_text_model` runs a model on transformers, on vLLM in this process, or on any server with an
OpenAI-compatible chat completions API. The first two use the engines that also sample rollouts. What goes
wrong with one prompt is an error of its generation alone.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlkit.encoding import encodable
from rlkit.errors import UnavailableError, UserError, nearest, one_line
from rlkit.event_loop import EventLoopThread

if TYPE_CHECKING:
    import openai
    from transformers import PreTrainedTokenizerBase

BACKENDS = ("transformers", "vllm")
CONCURRENCY = 64  # concurrent requests to a server
PROBE_TIMEOUT_SECONDS = 30.0
BATCH_TIMEOUT_SECONDS = 600.0  # of a batch of prompts of a script on a server
RESERVED_FIELDS = ("messages", "model", "n", "stream")  # of a request, which `extra_body` must not contain


@dataclass(frozen=True)
class Generation:
    """Generated text, or the reason why generation failed.

    Attributes:
        text: Text without white space around it.
        error: Reason of a failure.
        truncated: Whether generation stopped at the maximum number of tokens.
    """

    text: str = ""
    error: str | None = None
    truncated: bool = False


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
    timeout: float = 45.0,
    template: Mapping[str, Any] | None = None,
    extra_body: Mapping[str, Any] | None = None,
) -> TextModel:
    """Load a model that generates text.

    With transformers, the model, the prompt and the seed determine the text, up to rounding. With vLLM and
    with servers, seeded requests are only as reproducible as the backend makes them.

    Args:
        model: Hub name, folder or bundled model. With a server, the name under which it serves the model.
        backend: "transformers", "vllm" (in this process), or the URL of a server, e.g. http://host:8000/v1.
            The server's API key is read from `OPENAI_API_KEY`, and one token is generated to check it.
        max_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature; 0 is greedy.
        gpu_memory_utilization: Fraction of a GPU's memory for vLLM in this process.
        timeout: Seconds that one call of `generate` may take on a server, retries included. Prompts that are
            not finished by then get an error.
        template: Arguments of the chat template, e.g. {"enable_thinking": False}.
        extra_body: Fields to add to each request to a server.

    Raises:
        UserError: The backend is unknown, or the model cannot be loaded.
        UnavailableError: The server is down, or does not serve the model.
    """
    for name, value in (("template", template), ("extra_body", extra_body)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"{name} must be a mapping of names to values, not {value!r}")
    if backend.startswith(("http://", "https://")):
        server_model = ServerTextModel(
            backend,
            model,
            max_tokens,
            temperature,
            timeout=timeout,
            template=template or {},
            extra_body=extra_body or {},
        )
        server_model.probe()
        return server_model
    if backend not in BACKENDS:
        hint = nearest(backend, BACKENDS)
        raise UserError(f"unknown backend {backend!r}{hint}: expected {', '.join(BACKENDS)} or a URL")
    if extra_body:
        raise UserError(f"extra_body is for a server; remove it, or set backend to a URL, not {backend!r}")
    return EngineTextModel(
        model,
        backend,
        max_tokens,
        temperature,
        gpu_memory_utilization=gpu_memory_utilization,
        template=template or {},
    )


class EngineTextModel:
    """Generates text with a rollout engine in this process."""

    def __init__(
        self,
        model: str,
        backend: str,
        max_tokens: int,
        temperature: float,
        *,
        gpu_memory_utilization: float,
        template: Mapping[str, Any],
    ):
        from rlkit.models.names import resolve

        self.name, self.template = model, template
        self.max_tokens, self.temperature = max_tokens, temperature
        # vLLM takes a seed with each request. The transformers engine derives its random numbers from
        # `Request.global_index`, so the seed travels there.
        self.seeded = backend == "vllm"
        path = resolve(model)
        opened = _open_vllm(path, gpu_memory_utilization) if self.seeded else _open_transformers(path)
        self.engine, self.tokenizer, self.eos_token_ids = opened
        if template:
            _check_template(self.tokenizer, template)
        # On a CPU, vLLM crashes when it prefills a seeded request in chunks: it rewinds the random number
        # generator, which only works for CUDA generators. So each wave of prompts must fit into one step.
        self.wave_tokens: int | None = None
        if self.seeded and not _has_cuda():
            self.wave_tokens = self.engine.engine.vllm_config.scheduler_config.max_num_batched_tokens

    def fingerprint(self) -> str:
        """Return the SHA-256 of the model's files (`rlkit.models.fingerprint`)."""
        from rlkit.models.fingerprint import model_fingerprint

        return model_fingerprint(self.name)

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        """Generate one reply for each conversation.

        A prompt that cannot be tokenized or that fills the context gets an error.
        """
        generations: dict[int, Generation] = {}
        ids: dict[int, list[int]] = {}
        for i, prompt in enumerate(self._tokenize(prompts)):
            if isinstance(prompt, Generation):
                generations[i] = prompt
            else:
                ids[i] = prompt
        indices = list(ids)
        for wave in split_by_tokens([len(ids[i]) for i in indices], self.wave_tokens):
            wave_indices = [indices[position] for position in wave]
            wave_generations = self._generate_wave(
                [ids[i] for i in wave_indices], [seeds[i] for i in wave_indices]
            )
            generations |= zip(wave_indices, wave_generations, strict=True)
        return [generations[i] for i in range(len(prompts))]

    def _tokenize(self, prompts: Sequence[Any]) -> list[list[int] | Generation]:
        """Return the token ids of each prompt, or its error."""
        from rlkit.rollouts.tokenize import tokenize

        ids: list[list[int] | Generation] = []
        for prompt in prompts:
            # One by one: the tokenizer and the template raise for the whole batch, in ways of their own.
            try:
                if not isinstance(prompt, str | list):
                    raise TypeError(f"it must be a string or a list of messages, not {prompt!r:.80}")
                (prompt_ids,) = tokenize(self.tokenizer, [encodable(prompt)], **self.template)
                ids.append(prompt_ids)
            except Exception as error:
                ids.append(Generation(error=f"the prompt cannot be tokenized: {_describe(error)}"))
        return ids

    def _generate_wave(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Generation]:
        from rlkit.rollouts.tokenize import decode_turn, opens_thought
        from rlkit.rollouts.types import Request, Sampling

        generations: dict[int, Generation] = {}
        num_pending = 0
        for i, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
            limit = self.max_tokens
            if self.engine.context is not None:
                limit = min(limit, self.engine.context - len(ids))
            if limit < 1 or not ids:
                error = f"the prompt has {len(ids)} tokens; the model's context is {self.engine.context}"
                generations[i] = Generation(error=error if ids else "the prompt has no tokens")
                continue
            extra = {"seed": seed} if self.seeded else {}
            sampling = Sampling(self.eos_token_ids, temperature=self.temperature, key=(), extra=extra)
            self.engine.submit([Request(i, seed, ids, limit, 0)], sampling)
            num_pending += 1
        while num_pending:
            for i, sample in self.engine.collect(wait=True):
                text = decode_turn(self.tokenizer, sample.ids, self.eos_token_ids)
                # Without its tag, a thought that does not end could not be told from a reply.
                prefix = "<think>" if opens_thought(self.tokenizer, prompts[i]) else ""
                is_truncated = sample.finish_reason == "length"
                generations[i] = Generation(prefix + text.strip(), truncated=is_truncated)
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


def _check_template(tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]) -> None:
    """Raise UserError if the chat template cannot be rendered with these arguments."""
    from rlkit.rollouts.tokenize import tokenize

    try:
        tokenize(tokenizer, [[{"role": "user", "content": "?"}]], **template)
    except Exception as error:  # a template raises any exception
        arguments = dict(template)
        raise UserError(f"the chat template fails with template {arguments!r}: {_describe(error)}") from error


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _open_transformers(path: str) -> tuple[Any, Any, tuple[int, ...]]:
    import torch
    from trl import ModelConfig

    from rlkit.models.cpu import has_slow_bfloat16
    from rlkit.models.load import load_model
    from rlkit.rollouts.local.engine import TransformersEngine
    from rlkit.rollouts.tokenize import eos_token_ids

    dtype = "float32" if has_slow_bfloat16() and not torch.cuda.is_available() else "bfloat16"
    model, tokenizer = load_model(ModelConfig(model_name_or_path=path, dtype=dtype))
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
    """Generates text on a server; the OpenAI client retries transient errors with exponential backoff.

    Args:
        url: URL of the API, e.g. http://host:8000/v1.
        model: Name under which the server serves the model.
        max_tokens: Maximum number of generated tokens.
        temperature: Sampling temperature.
        timeout: Seconds that one call of `generate` may take.
        template: Arguments of the chat template, which vLLM and SGLang read from `chat_template_kwargs`.
        extra_body: Fields to add to each request.

    Raises:
        UserError: An argument is invalid.
    """

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int,
        temperature: float,
        *,
        timeout: float,
        template: Mapping[str, Any],
        extra_body: Mapping[str, Any],
    ):
        is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
        if not is_number or not 0 < timeout < math.inf:
            raise UserError(f"timeout must be a positive number of seconds, not {timeout!r}")
        for field in RESERVED_FIELDS:
            if field in extra_body:
                raise UserError(f"extra_body must not contain {field!r}")
        self.url, self.name, self.timeout = url, model, timeout
        body = dict(extra_body)
        if template:
            body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **template}
        self.settings: dict[str, Any] = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "extra_body": body,
        }
        self._event_loop = EventLoopThread()
        self._loop_of_client: asyncio.AbstractEventLoop | None = None
        self._client: openai.AsyncOpenAI | None = None

    def generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        """Generate one reply for each conversation, with up to `CONCURRENCY` concurrent requests.

        After `timeout` seconds, the prompts that have no reply yet get an error.
        """
        return self._event_loop.run(self._generate(prompts, seeds))

    def probe(self) -> None:
        """Generate one token, without retries, to check the server before it is needed.

        Raises:
            UnavailableError: The server failed.
        """
        self._event_loop.run(self._probe())

    async def _generate(self, prompts: Sequence[Any], seeds: Sequence[int]) -> list[Generation]:
        deadline = asyncio.get_running_loop().time() + self.timeout
        slots = asyncio.Semaphore(CONCURRENCY)
        requests = [
            self._request(prompt, seed, slots, deadline) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return list(await asyncio.gather(*requests))

    async def _request(self, prompt: Any, seed: int, slots: asyncio.Semaphore, deadline: float) -> Generation:
        try:
            async with asyncio.timeout_at(deadline), slots:
                completion = await self._client_of_loop().chat.completions.create(
                    messages=encodable(prompt), seed=seed, **self.settings
                )
            return read_completion(completion)
        except TimeoutError:
            reason = f"no reply within {self.timeout:g} s"
        except Exception as error:  # also of the JSON decoder, and of the client for a prompt it cannot send
            reason = _describe(error)
        return Generation(error=f"request to {self.name} failed: {reason}")

    async def _probe(self) -> None:
        import openai

        client = self._client_of_loop().with_options(max_retries=0)
        seconds = min(self.timeout, PROBE_TIMEOUT_SECONDS)
        remedy = "start the server, or fix the URL, which usually ends in /v1"
        try:
            async with asyncio.timeout(seconds):
                completion = await client.chat.completions.create(
                    messages=[{"role": "user", "content": "Hi"}], **(self.settings | {"max_tokens": 1})
                )
            if isinstance(getattr(completion, "choices", None), list):
                return  # the content may be missing, since one token may be part of a thought
            reason = _describe_reply(completion)
        except TimeoutError:
            reason = f"no reply within {seconds:g} s"
        except openai.RateLimitError:
            return  # the server is up, and `generate` retries
        except openai.NotFoundError as error:
            reason = _describe(error)
            remedy = "use the name under which the server serves the model, and a URL that ends in /v1"
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            reason, remedy = _describe(error), "set OPENAI_API_KEY to the API key of the server"
        except openai.APIStatusError as error:  # it rejects the request, or fails
            reason, remedy = _describe(error), "check the model and the log of the server"
        except Exception as error:
            reason = _describe(error)
        raise UnavailableError(
            f"the server {self.url} did not generate a test token with {self.name!r}: "
            f"{encodable(one_line(reason))}; {remedy}"
        )

    def _client_of_loop(self) -> openai.AsyncOpenAI:
        """Return the client of the running event loop; its connections are of no use to another loop."""
        import openai

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop_of_client is not loop:
            # The client requires a key, most servers do not.
            key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"
            self._client = openai.AsyncOpenAI(
                base_url=self.url, api_key=key, timeout=self.timeout, max_retries=4
            )
            self._loop_of_client = loop
        return self._client


def read_completion(completion: object) -> Generation:
    """Return the text of a chat completion, or why it has none.

    The OpenAI client does not validate responses, so any field may be missing or of another type.
    """
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list):
        return Generation(error=_describe_reply(completion))
    if not choices:  # how some servers report a refusal
        return Generation(error="the server returned no choices")
    message = getattr(choices[0], "message", None)
    content = getattr(message, "content", None)
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if isinstance(content, str) and (content.strip() or not reasoning):
        is_truncated = getattr(choices[0], "finish_reason", None) == "length"
        return Generation(encodable(content).strip(), truncated=is_truncated)
    if reasoning:
        return Generation(
            error="the model wrote only thoughts (reasoning_content) and no reply: increase the maximum "
            "number of tokens, or disable thinking, e.g. with the template argument enable_thinking: false"
        )
    return Generation(error=_describe_reply(completion))


def _describe_reply(completion: object) -> str:
    reply = encodable(one_line(repr(completion)))
    return f"the server's reply is not a chat completion with text: {reply[:120]}"


def _describe(error: Exception) -> str:
    return encodable(one_line(f"{type(error).__name__}: {error}"))[:300]
