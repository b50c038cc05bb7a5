"""Search engine simulated by a language model (ZeroSearch, arXiv 2505.04588).

The model writes the documents of a query. One random draw per query decides whether the prompt asks for
useful documents or for noise, and it applies to all documents of the query. A curriculum raises the
probability of noise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.envs.search.simulator_prompts import Templates, load_prompts, write_messages
from rlkit.retrieval.documents import Document, Query, Result
from rlkit.retrieval.engines.disk_cache import DiskCache
from rlkit.rewards.simulation import split_documents

if TYPE_CHECKING:
    from rlkit.rollouts.text_generation import TextModel


def open_simulated(
    model: str,
    backend: str = "transformers",
    prompts: str = "tuned",
    *,
    words: int = 30,
    tokens: int = 600,
    temperature: float = 0.8,
    memory: float = 0.3,
    seed: int = 0,
    cache: str | None = None,
    template: Mapping[str, Any] | None = None,
    extra_body: Mapping[str, Any] | None = None,
    timeout: float = 45.0,
) -> SimulatedEngine:
    """Load a model as a simulated search engine.

    Args:
        model: Model that writes the documents: Hub name, folder or bundled model. With a server, the name
            under which it serves the model.
        backend: "transformers", "vllm" (in this process), or the URL of a server, see `load_text_model` in
            `rlkit.rollouts.text_generation`.
        prompts: "tuned" for a model that was trained on our prompt, "prompted" for any other, or the path of
            a YAML file of templates (`rlkit.envs.search.simulator_prompts.read_templates`).
        words: Approximate number of words of a document, which the prompt asks for.
        tokens: Maximum number of tokens of all documents of a query.
        temperature: Sampling temperature; 0 is greedy.
        memory: Fraction of a GPU's memory for vLLM in this process.
        seed: Seed of the noise draws and of the text generation.
        cache: Folder in which documents are cached, so that repeating a run generates nothing again.
        template: Arguments of the model's chat template, such as `{"enable_thinking": False}`.
        extra_body: Additional fields of the requests to a server.
        timeout: Seconds in which a server must write the documents of one batch of queries.

    Raises:
        UserError: An argument is invalid, or the model cannot be loaded.
    """
    from rlkit.rollouts.text_generation import EngineTextModel, load_text_model

    templates = load_prompts(prompts)  # before the model, which takes long to load
    text_model = load_text_model(
        model,
        backend,
        max_tokens=tokens,
        temperature=temperature,
        gpu_memory_utilization=memory,
        timeout=timeout,
        template=template,
        extra_body=extra_body,
    )
    # All servers count as one backend, because a server may move to another address between runs.
    settings = f"{backend if '://' not in backend else 'server'} {tokens} {temperature}"
    if template or extra_body:
        settings += " " + json.dumps([template, extra_body], sort_keys=True, default=str)
    if cache is not None and isinstance(text_model, EngineTextModel):
        # The name of a folder does not change when the model in it is retrained.
        settings += f" {text_model.fingerprint()}"
    return SimulatedEngine(text_model, templates, num_words=words, seed=seed, cache=cache, settings=settings)


class SimulatedEngine:
    """Search engine whose documents a text model generates.

    Args:
        text_model: An `rlkit.rollouts.text_generation.TextModel`.
        prompts: "tuned", "prompted", or templates.
        num_words: Approximate number of words of a document, which the prompt asks for.
        seed: Seed of the noise draws and of the text generation.
        cache: Folder of the document cache; None disables it.
        settings: Generation settings, which are part of the cache key.

    Attributes:
        noise: Probability that a query gets noise. The environment sets it.
    """

    def __init__(
        self,
        text_model: TextModel,
        prompts: str | Templates = "tuned",
        *,
        num_words: int = 30,
        seed: int = 0,
        cache: str | None = None,
        settings: str = "",
    ):
        self.text_model, self.prompts, self.num_words = text_model, prompts, num_words
        self.seed, self.settings = seed, settings
        self.noise = 0.0
        self.cache = None if cache is None else DiskCache(Path(cache).expanduser())

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Generate the documents of each query. Equal queries with equal keys share one generation."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        requests = [self.make_request(query, k) for query in queries]
        texts = {} if self.cache is None else self.cache.get({request.key for request in requests})
        # By key, so that equal requests of a batch are generated once.
        missing = {request.key: request for request in requests if request.key not in texts}
        generations = self.text_model.generate(
            [request.prompt for request in missing.values()], [request.seed for request in missing.values()]
        )
        errors: dict[str, str] = {}
        new_texts: dict[str, str] = {}
        for key, generation in zip(missing, generations, strict=True):
            if generation.error:
                errors[key] = generation.error
            else:
                new_texts[key] = generation.text
        # Errors are not cached, so that the next run retries them.
        if self.cache is not None:
            self.cache.put(new_texts)
        texts |= new_texts
        results = []
        for request in requests:
            if request.key in errors:
                results.append(Result(error=errors[request.key], label=request.label))
            else:
                results.append(parse_documents(texts[request.key], request.label, k))
        return results

    def make_request(self, query: Query, k: int) -> GenerationRequest:
        """Draw whether the query gets noise, and return the request for its documents."""
        # The draw depends on the task and the turn alone, so all rollouts of a group get the same label.
        draw = random.Random(_digest(self.seed, "noise", *query.key)).random()
        label = "noisy" if draw < self.noise else "useful"
        messages = write_messages(query, label, k, prompts=self.prompts, num_words=self.num_words)
        # The label and the query are part of the seed, so different prompts are sampled independently.
        seed = int(_digest(self.seed, label, query.text, *query.key)[:8], 16)
        texts = [message["content"] for message in messages]
        key = _digest(self.text_model.name, self.settings, *texts, seed)
        return GenerationRequest(key, label, messages, seed)


@dataclass(frozen=True)
class GenerationRequest:
    """Request to the text model for the documents of one query.

    One record has all of it, so that a prompt cannot be paired with the question of another rollout, as in
    ZeroSearch's code once some rollouts had finished.

    Attributes:
        key: Cache key.
        label: "useful" or "noisy".
        prompt: Chat messages.
        seed: Seed of the text generation.
    """

    key: str
    label: str
    prompt: list[dict[str, str]]
    seed: int


def parse_documents(text: str, label: str, k: int) -> Result:
    """Parse the first `k` documents from generated text.

    They need no headings, see `split_documents`. A reply that is only a thought (`<think>…</think>`), or that
    ends within one, is an error.
    """
    if "<think>" in text.rpartition("</think>")[2]:
        return Result(error=f"the simulator did not finish its thought: {text[:80]!r}", label=label)
    documents = [
        Document(f"simulated-{_digest(title, body)[:12]}", title, body)
        for title, body in split_documents(text)
    ]
    if not documents:
        return Result(error=f"the simulator wrote no document: {text[:80]!r}", label=label)
    return Result(tuple(documents[:k]), label=label)


def _digest(*parts: object) -> str:
    # A server can return lone surrogates, which plain UTF-8 rejects.
    return hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()
