"""Scorers of documents for a query: an encoder of sentence-transformers, trained whole or with an adapter.

What is saved is a model of sentence-transformers in both cases, so `dense:FOLDER` retrieves with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class EncoderScorer(nn.Module):
    """score(q, d) = cos(e(q), e(d)) / temperature, all of the encoder's weights trained.

    Args:
        encoder: a model of sentence-transformers; its own prompts for queries and documents are used.
        temperature: small ones make sharp rankings.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

    def forward(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> Tensor:
        """Scores of the passages of each query, (B, n); there is 0 where a query has fewer than n."""
        texts = list(dict.fromkeys(text for one in passages for text in one))
        found = self.similarities(queries, texts)
        place = {text: i for i, text in enumerate(texts)}
        index = torch.full((len(queries), max(map(len, passages))), -1)
        for row, one in enumerate(passages):
            index[row, : len(one)] = torch.tensor([place[text] for text in one])
        index = index.to(found.device)
        return found.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0.0)

    def ask(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """The texts that are embedded for queries with these candidates."""
        return list(queries)

    def similarities(self, queries: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Scores of every text for every query, (queries, texts)."""
        return self.embed(queries, "query") @ self.embed(texts, "document").T / self.temperature

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Unit vectors of queries or documents, with a gradient, (texts, dimensions)."""
        features = self.encoder.preprocess(list(texts), prompt=prompt_of(self.encoder, task))
        device = next(self.encoder.parameters()).device
        features = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in features.items()}
        return functional.normalize(self.encoder(features, task=task)["sentence_embedding"].float(), dim=-1)

    def plain(self) -> SentenceTransformer:
        """The model of sentence-transformers that scores the same, up to the temperature."""
        return self.encoder

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Save it as a model of sentence-transformers."""
        self.plain().save_pretrained(str(folder))


class ListwiseScorer(EncoderScorer):
    """The same with a query whose text holds its first candidates (E2Rank, arXiv 2510.22733).

    One vector of query and candidates together is compared with those of all documents, which are the plain
    encoder's: reranking is relevance feedback by the encoder itself.

    Args:
        encoder, temperature: see `EncoderScorer`; of a model whose context holds the candidates.
        members: candidates in the query's text.
        words: of a candidate.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float, members: int, words: int = 60):
        super().__init__(encoder, temperature)
        self.members, self.words = members, words

    def ask(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """Queries with their candidates, the query last: encoders that pool the last token end with it."""
        return [self._asked(query, found) for query, found in zip(queries, passages, strict=True)]

    def _asked(self, query: str, passages: Sequence[str]) -> str:
        cut = (" ".join(text.split()[: self.words]) for text in passages[: self.members])
        lines = "\n".join(f"[{i}] {text}" for i, text in enumerate(cut, 1))
        return f"Passages that may be relevant:\n{lines}\nWhich of them answer this? {query}"


class AdapterScorer(EncoderScorer):
    """The same with a frozen encoder and a low-rank residual on the query, e'(q) = e(q) + B A e(q).

    B is 0 at first, so that training begins at the encoder (the safe variant of Adder, arXiv 2310.05380).
    Embeddings are computed once and kept: training costs next to nothing, and an index stays valid.

    Args:
        encoder: a model of sentence-transformers.
        temperature: see `EncoderScorer`.
        rank: of the residual.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float, rank: int):
        super().__init__(encoder.eval().requires_grad_(False), temperature)
        size = encoder.encode("one", show_progress_bar=False).shape[0]
        device = next(encoder.parameters()).device
        self.down = nn.Linear(size, rank, bias=False, device=device)
        self.up = nn.Linear(rank, size, bias=False, device=device)
        nn.init.zeros_(self.up.weight)
        self._kept: dict[tuple[str, str], Tensor] = {}

    def train(self, mode: bool = True) -> AdapterScorer:
        """The encoder has no dropout in training either: what it gives is kept."""
        super().train(mode)
        self.encoder.eval()
        return self

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Unit vectors; those of queries have the residual and its gradient."""
        self.keep(texts, task)
        vectors = torch.stack([self._kept[task, text] for text in texts]).to(self.up.weight.device)
        if task == "query":
            vectors = functional.normalize(vectors + self.up(self.down(vectors)), dim=-1)
        return vectors

    def keep(self, texts: Sequence[str], task: str) -> None:
        """Compute the encoder's vectors of texts that are not known yet."""
        new = [text for text in dict.fromkeys(texts) if (task, text) not in self._kept]
        if new:
            vectors = self.encoder.encode(
                new,
                prompt=prompt_of(self.encoder, task),
                task=task,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            self._kept |= {(task, text): v for text, v in zip(new, vectors.float().cpu(), strict=True)}

    def plain(self) -> SentenceTransformer:
        """The encoder with one more layer for queries."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Router

        weight = (self.up.weight @ self.down.weight).detach().float()
        layer = Dense(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            activation_function=nn.Identity(),
            init_weight=weight,
            use_residual=True,
        )
        ends = Router({"query": [Normalize(), layer, Normalize()], "document": [Normalize()]}, "document")
        made = SentenceTransformer(modules=[*self.encoder, ends], device=str(self.up.weight.device))
        made.prompts = dict(self.encoder.prompts)
        return made


def prompt_of(encoder: SentenceTransformer, task: str) -> str | None:
    """What an encoder has before its queries or documents, by its own settings; None: nothing."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    return next((encoder.prompts[name] for name in names if encoder.prompts.get(name)), None)
