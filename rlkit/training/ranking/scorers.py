"""Score documents for a query with an encoder of sentence-transformers, fully trained or with an adapter.

All scorers are saved as a sentence-transformers model, which `dense:FOLDER` retrieves with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.words import first_words

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class EncoderScorer(nn.Module):
    """Scorer with score(q, d) = cos(e(q), e(d)) / temperature, which trains all weights of the encoder e.

    Args:
        encoder: Encoder; its own prompts for queries and documents are used.
        temperature: Temperature of the scores. Small ones make the distribution of rankings sharp.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature

    def forward(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> Tensor:
        """Return the scores of each query's passages, (B, n); 0 at padding if a query has fewer than n."""
        # Queries of a batch share passages: each is embedded once.
        documents = list(dict.fromkeys(passage for of_query in passages for passage in of_query))
        column = {document: i for i, document in enumerate(documents)}
        scores = self.similarities(queries, documents)
        index = torch.full((len(queries), max(map(len, passages))), -1)
        for row, of_query in enumerate(passages):
            index[row, : len(of_query)] = torch.tensor([column[passage] for passage in of_query])
        index = index.to(scores.device)
        return scores.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0.0)

    def query_texts(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """Return the string to embed for each query, given its candidate passages."""
        return list(queries)

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """Return the score of every document for every query, (queries, documents)."""
        query_vectors, document_vectors = self.embed(queries, "query"), self.embed(documents, "document")
        # Autocast would round the product to half precision, in which close documents have the same score.
        with torch.autocast(query_vectors.device.type, enabled=False):
            return query_vectors @ document_vectors.T / self.temperature

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Return unit vectors, (texts, dimensions), with a gradient.

        Args:
            texts: Queries or documents.
            task: Kind of `texts`, "query" or "document", which chooses the encoder's prompt.
        """
        features = self.encoder.preprocess(list(texts), prompt=prompt_of(self.encoder, task))
        device = next(self.encoder.parameters()).device
        features = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in features.items()}
        return functional.normalize(self.encoder(features, task=task)["sentence_embedding"].float(), dim=-1)

    def to_sentence_transformer(self) -> SentenceTransformer:
        """Return a sentence-transformers model with the same scores, up to the temperature."""
        return self.encoder

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Save the scorer as a sentence-transformers model."""
        self.to_sentence_transformer().save_pretrained(str(folder))


class ListwiseScorer(EncoderScorer):
    """`EncoderScorer` that embeds a query together with its first candidates (E2Rank, arXiv 2510.22733).

    The documents are embedded alone, as usual. Reranking is thus pseudo-relevance feedback by the encoder.

    Args:
        encoder: Encoder whose context is long enough for the candidates.
        temperature: Temperature of the scores.
        num_candidates: Number of candidates in the string that is embedded for a query.
        max_words: Maximum number of words of a candidate; longer ones are cut.
    """

    def __init__(
        self, encoder: SentenceTransformer, temperature: float, num_candidates: int, max_words: int = 60
    ):
        super().__init__(encoder, temperature)
        self.num_candidates, self.max_words = num_candidates, max_words

    def query_texts(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """Return each query after its candidates, since some encoders pool the last token."""
        return [self._prompt(query, candidates) for query, candidates in zip(queries, passages, strict=True)]

    def _prompt(self, query: str, passages: Sequence[str]) -> str:
        lines = []
        for number, passage in enumerate(passages[: self.num_candidates], 1):
            lines.append(f"[{number}] {first_words(passage, self.max_words)}")
        listing = "\n".join(lines)
        return f"Passages that may be relevant:\n{listing}\nWhich of them answer this? {query}"


class AdapterScorer(EncoderScorer):
    """`EncoderScorer` with a frozen encoder and a trained low-rank residual, e'(q) = e(q) + B A e(q).

    B is 0 at first, so that training starts from the encoder's own ranking (the safe variant of Adder, arXiv
    2310.05380). Embeddings are computed once and cached, so training is cheap. Only queries are changed, so
    an index of the documents stays valid.

    Args:
        encoder: Encoder, which is frozen.
        temperature: Temperature of the scores.
        rank: Rank of the residual.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float, rank: int):
        super().__init__(encoder.eval().requires_grad_(False), temperature)
        size = encoder.encode("one", show_progress_bar=False).shape[0]
        device = next(encoder.parameters()).device
        self.down = nn.Linear(size, rank, bias=False, device=device)
        self.up = nn.Linear(rank, size, bias=False, device=device)
        nn.init.zeros_(self.up.weight)
        self._embeddings: dict[tuple[str, str], Tensor] = {}  # by task and text, on the CPU

    def train(self, mode: bool = True) -> AdapterScorer:
        """Set the mode of the adapter. The encoder stays in eval mode, because its output is cached."""
        super().train(mode)
        self.encoder.eval()
        return self

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Return unit vectors, (texts, dimensions). Those of queries include the trained residual."""
        self._cache_embeddings(texts, task)
        vectors = torch.stack([self._embeddings[task, text] for text in texts]).to(self.up.weight.device)
        if task == "query":
            vectors = functional.normalize(vectors + self.up(self.down(vectors)), dim=-1)
        return vectors

    def _cache_embeddings(self, texts: Sequence[str], task: str) -> None:
        missing = [text for text in dict.fromkeys(texts) if (task, text) not in self._embeddings]
        if missing:
            vectors = self.encoder.encode(
                missing,
                prompt=prompt_of(self.encoder, task),
                task=task,
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            for text, vector in zip(missing, vectors.float().cpu(), strict=True):
                self._embeddings[task, text] = vector

    def to_sentence_transformer(self) -> SentenceTransformer:
        """Return the encoder with a residual layer for queries, B A as one matrix."""
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
        head = Router({"query": [Normalize(), layer, Normalize()], "document": [Normalize()]}, "document")
        model = SentenceTransformer(modules=[*self.encoder, head], device=str(self.up.weight.device))
        model.prompts = dict(self.encoder.prompts)
        return model


def prompt_of(encoder: SentenceTransformer, task: str) -> str | None:
    """Return the prompt that an encoder's config puts before queries or documents, if there is one."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    return next((encoder.prompts[name] for name in names if encoder.prompts.get(name)), None)
