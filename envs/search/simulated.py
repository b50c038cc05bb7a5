"""A search engine that a language model plays (ZeroSearch, arXiv 2505.04588).

It writes the documents of a query, useful ones or noise, as it is asked to. Each query draws once: noise with
the probability `noise`, which a curriculum raises. All of its documents share the draw.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit.envs.search.simulator_prompts import STYLES, write_prompt
from rlkit.errors import check_choice
from rlkit.retrieval.documents import Document, Query, Result
from rlkit.retrieval.engines.disk_cache import DiskCache
from rlkit.rewards.simulation import split_documents

if TYPE_CHECKING:
    from rlkit.rollouts.text_generation import Writer


def open_simulated(
    model: str,
    through: str = "transformers",
    prompts: str = "tuned",
    *,
    words: int = 30,
    tokens: int = 600,
    temperature: float = 0.8,
    memory: float = 0.3,
    seed: int = 0,
    cache: str | None = None,
) -> Simulated:
    """Open a simulated engine.

    Args:
        model: that writes documents: hub name, folder, bundled model, or the name that a server knows.
        through: "transformers", "vllm", or the URL of a server (see `open_writer` in
            `rlkit.rollouts.text_generation`).
        prompts: "tuned" for a model that was trained to simulate, "prompted" for any other.
        words: about how long a document is asked to be.
        tokens: most of all documents of a query.
        temperature: of the writing.
        memory: of vLLM in this process: its share of a GPU.
        seed: of the draws and of the writing.
        cache: a folder in which documents are kept, so that a run can be repeated at no cost.

    Raises:
        UserError: arguments that do not fit, or a model that cannot be opened.
    """
    from rlkit.rollouts.text_generation import open_writer

    check_choice("prompts", prompts, STYLES)
    writer = open_writer(model, through, tokens=tokens, temperature=temperature, memory=memory)
    settings = f"{through if '://' not in through else 'server'} {tokens} {temperature}"
    return Simulated(writer, prompts, words=words, seed=seed, cache=cache, settings=settings)


class Simulated:
    """Documents that a writer makes up.

    Args:
        writer: an `rlkit.rollouts.text_generation.Writer`.
        prompts: "tuned" or "prompted".
        words: about how long a document is asked to be.
        seed: of the draws and of the writing.
        cache: a folder; None: nothing is kept.
        settings: of the writer, so that the cache tells texts apart.

    Attributes:
        noise: the probability that a query gets noise; whoever trains sets it.
    """

    def __init__(
        self,
        writer: Writer,
        prompts: str = "tuned",
        *,
        words: int = 30,
        seed: int = 0,
        cache: str | None = None,
        settings: str = "",
    ):
        self.writer, self.prompts, self.words, self.seed = writer, prompts, words, seed
        self.settings = settings
        self.noise = 0.0
        self.cache = None if cache is None else DiskCache(Path(cache).expanduser())

    def search(self, queries: Sequence[Query], k: int) -> list[Result]:
        """Write the documents of each query; what is asked twice with one key is written once."""
        if k < 1:
            raise ValueError(f"k is {k}: at least one document")
        asked = [self._ask(query, k) for query in queries]
        known = self._read({one.key for one in asked})
        new = list({one.key: one for one in asked if one.key not in known}.values())
        texts = self.writer.write([one.prompt for one in new], [one.seed for one in new])
        failed = {one.key: text.error for one, text in zip(new, texts, strict=True) if text.error}
        fresh = {one.key: text.text for one, text in zip(new, texts, strict=True) if not text.error}
        if self.cache is not None:
            self.cache.put(fresh)
        known |= fresh
        return [
            Result(error=failed[one.key], label=one.label)
            if one.key in failed
            else read_documents(known[one.key], one.label, k)
            for one in asked
        ]

    def _ask(self, query: Query, k: int) -> _WriteRequest:
        # One draw for a task and turn: whoever asks there is compared under the same conditions.
        drawn = random.Random(_digest(self.seed, "noise", *query.key)).random()
        label = "noisy" if drawn < self.noise else "useful"
        text = write_prompt(query, label, k, style=self.prompts, words=self.words)
        seed = int(_digest(self.seed, label, query.text, *query.key)[:8], 16)
        key = _digest(self.writer.name, self.settings, text, seed)
        return _WriteRequest(key, label, [{"role": "user", "content": text}], seed)

    def _read(self, keys: set[str]) -> dict[str, str]:
        return {} if self.cache is None else self.cache.get(keys)


@dataclass(frozen=True)
class _WriteRequest:
    """What is asked of the writer for one query: all of it in one record, whatever finishes when."""

    key: str
    label: str
    prompt: list[dict[str, str]]
    seed: int


def read_documents(text: str, label: str, k: int) -> Result:
    """The first `k` documents of what was written; a text without any is a failure, not an empty result."""
    found = [
        Document(f"simulated-{_digest(title, body)[:12]}", title, body)
        for title, body in split_documents(text)
    ]
    if not found:
        return Result(error=f"the simulator wrote no document: {text[:80]!r}", label=label)
    return Result(tuple(found[:k]), label=label)


def _digest(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
