"""Score documents for a query with an encoder of sentence-transformers, fully trained or with an adapter.

All scorers are saved as a sentence-transformers model, which `dense:FOLDER` retrieves with. The vectors are
those of its methods `encode_query` and `encode_document`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlkit.encoding import encodable
from rlkit.errors import UserError
from rlkit.retrieval.documents import without_markers
from rlkit.retrieval.encoders import first_tokens, is_dot_product
from rlkit.training.ranking.lora import enable_checkpointing, has_lora, merged
from rlkit.words import first_words

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

MIN_STRINGS_PER_PASS, MAX_PASSES = 8, 4  # of one batch through the encoder
MIN_CANDIDATE_TOKENS = 8  # of a candidate in the text of a listwise query; with fewer, it says nothing


class EncoderScorer(nn.Module):
    """Scorer with score(q, d) = e(q) e(d) / temperature, which trains the weights of the encoder e.

    The product is the encoder's own similarity: the cosine or, for encoders trained with it, the dot product.

    Args:
        encoder: Encoder; its own prompts for queries and documents are used. With LoRA, only the adapter is
            trained (`rlkit.training.ranking.lora`).
        temperature: Temperature of the scores. Small ones make the distribution of rankings sharp.

    Raises:
        UserError: The encoder's similarity is another one, such as a distance.
    """

    in_batch = True  # all documents of a batch are compared with all queries at no additional cost

    def __init__(self, encoder: SentenceTransformer, temperature: float):
        super().__init__()
        if encoder.similarity_fn_name not in ("cosine", "dot"):
            raise UserError(
                f"the encoder's similarity is {encoder.similarity_fn_name!r}; set similarity to cosine or dot"
            )
        self.encoder, self.temperature = encoder, temperature
        self.normalize = not is_dot_product(encoder)

    def forward(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[str]],
        documents: Sequence[str] | None = None,
        passages_are_queries: bool = False,
    ) -> Tensor:
        """Return the scores of each query's passages, (B, n); 0 at padding if a query has fewer than n.

        Args:
            queries: Queries, B strings.
            passages: Passages of each query.
            documents: Documents of the batch. If given, return the scores of all of them for every query
                instead, (B, documents).
            passages_are_queries: Whether to embed `queries` as documents, and the other strings as queries.
        """
        if documents is not None:
            unique = list(dict.fromkeys(documents))
        else:
            # Queries of a batch share passages: each is embedded once.
            unique = list(dict.fromkeys(passage for of_query in passages for passage in of_query))
        column = {document: i for i, document in enumerate(unique)}
        if passages_are_queries:
            scores = self.similarities(unique, queries).T
        else:
            scores = self.similarities(queries, unique)
        if documents is not None:
            return scores[:, torch.tensor([column[text] for text in documents], device=scores.device)]
        rows = [torch.tensor([column[passage] for passage in of_query]) for of_query in passages]
        index = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(scores.device)
        return scores.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0.0)

    def query_texts(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """Return the string to embed for each query, given its candidate passages."""
        return list(queries)

    def similarities(self, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """Return the score of every document for every query, (queries, documents), in float32."""
        query_vectors, document_vectors = self.embed(queries, "query"), self.embed(documents, "document")
        # Autocast would round the product to half precision, in which close documents have the same score.
        with torch.autocast(query_vectors.device.type, enabled=False):
            return query_vectors @ document_vectors.T / self.temperature

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Return float32 vectors, (texts, dimensions), with a gradient. For the cosine, their length is 1.

        Args:
            texts: Queries or documents.
            task: Kind of `texts`, "query" or "document", which chooses the encoder's prompt.
        """
        # Strings of similar length need less padding together. More passes would cost more than they save.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = max(MIN_STRINGS_PER_PASS, -(-len(texts) // MAX_PASSES))
        passes = [order[start : start + size] for start in range(0, len(order), size)]
        vectors = torch.cat([self._encode([texts[i] for i in indices], task) for indices in passes])
        return vectors[torch.tensor(order, device=vectors.device).argsort()]

    def _encode(self, texts: list[str], task: str) -> Tensor:
        """Return the vectors of one forward pass; see `embed`."""
        texts = [encodable(text) for text in texts]  # tokenizers raise on lone surrogates
        features = self.encoder.preprocess(texts, prompt=prompt_of(self.encoder, task), task=task)
        device = self.encoder.device
        features = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in features.items()}
        vectors = self.encoder(features, task=task)["sentence_embedding"]
        if self.encoder.truncate_dim is not None:
            vectors = vectors[..., : self.encoder.truncate_dim]
        with torch.autocast(vectors.device.type, enabled=False):
            return functional.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()

    def score(self, query: str, passages: Sequence[str], batch_size: int) -> Tensor:
        """Return the scores of passages for the string of one query, (passages,), as the saved model would.

        Training computes embeddings under autocast, if it is on; an evaluation must not, since the saved
        model is used without it.
        """
        query_vectors = self.embed_in_batches([query], "query", batch_size)
        passage_vectors = self.embed_in_batches(passages, "document", batch_size)
        with torch.autocast(query_vectors.device.type, enabled=False):
            return (query_vectors @ passage_vectors.T / self.temperature)[0]

    def embed_in_batches(self, texts: Sequence[str], task: str, batch_size: int) -> Tensor:
        """Return the vectors of any number of strings without a gradient, as the saved model computes them.

        Arguments are those of `embed`, and `batch_size`, the number of strings per forward pass. Autocast is
        off.
        """
        # Strings of similar length in one batch need less padding.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = []
        with torch.no_grad(), torch.autocast(self.encoder.device.type, enabled=False):
            for start in range(0, len(order), batch_size):
                vectors.append(self.embed([texts[i] for i in order[start : start + batch_size]], task))
        return torch.cat(vectors)[torch.tensor(order).argsort().to(vectors[0].device)]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the encoder's activations in the backward pass; called by transformers' Trainer.

        Raises:
            UserError: The encoder has no layers that support it.
        """
        enable_checkpointing(self.encoder, gradient_checkpointing_kwargs, **options)

    def to_sentence_transformer(self) -> SentenceTransformer:
        """Return a sentence-transformers model with the same scores, up to the temperature."""
        return merged(self.encoder) if has_lora(self.encoder) else self.encoder

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Save the scorer as a sentence-transformers model."""
        self.to_sentence_transformer().save_pretrained(str(folder))


class ListwiseScorer(EncoderScorer):
    """`EncoderScorer` that embeds a query together with its first candidates (E2Rank, arXiv 2510.22733).

    The documents are embedded alone, as usual. Reranking is thus pseudo-relevance feedback by the encoder.
    The query is last, since some encoders pool the last token, and is never truncated: the candidates share
    the tokens that remain.

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
        """Return each query after its candidates, with markers such as [3] in either replaced by (3).

        Raises:
            UserError: A query leaves fewer than `MIN_CANDIDATE_TOKENS` tokens for each candidate.
        """
        return [self._prompt(query, candidates) for query, candidates in zip(queries, passages, strict=True)]

    def _prompt(self, query: str, passages: Sequence[str]) -> str:
        query = without_markers(encodable(query))
        candidates = [
            without_markers(first_words(encodable(passage), self.max_words))
            for passage in passages[: self.num_candidates]
        ]
        limit, tokenizer = self.encoder.max_seq_length, self.encoder.tokenizer
        prompt = _listing(query, candidates)
        # Static embeddings have an infinite limit.
        if limit is None or math.isinf(limit) or not candidates or self._num_tokens(prompt) <= limit:
            return prompt
        budget = (limit - self._num_tokens(_listing(query, [""] * len(candidates)))) // len(candidates)
        # Tokens of the parts may add up to a few more in the prompt, where words meet.
        while budget >= MIN_CANDIDATE_TOKENS:
            prompt = _listing(query, [first_tokens(tokenizer, candidate, budget) for candidate in candidates])
            if self._num_tokens(prompt) <= limit:
                return prompt
            budget -= 1
        raise UserError(
            f"listwise: the query {query[:40]!r} leaves fewer than {MIN_CANDIDATE_TOKENS} of the encoder's "
            f"{limit} tokens for each of {len(candidates)} candidates; set listwise to fewer candidates or "
            "increase max_seq_length"
        )

    def _num_tokens(self, text: str) -> int:
        prompt = prompt_of(self.encoder, "query") or ""
        return len(self.encoder.tokenizer(prompt + text, truncation=False, verbose=False)["input_ids"])


def _listing(query: str, candidates: Sequence[str]) -> str:
    """Return the string that a listwise query is embedded as."""
    lines = "\n".join(f"[{number}] {candidate}" for number, candidate in enumerate(candidates, 1))
    return f"Passages that may be relevant:\n{lines}\nWhich of them answer this? {query}"


class Residual(nn.Module):
    """Low-rank residual of a vector, v + B A v. B is 0 at first, so that it starts as the identity.

    Args:
        size: Size of the vectors.
        rank: Rank of B A.
        device: Device of the weights.
    """

    def __init__(self, size: int, rank: int, device: torch.device):
        super().__init__()
        self.down = nn.Linear(size, rank, bias=False, device=device)
        self.up = nn.Linear(rank, size, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the vectors with their residual, (B, size)."""
        return vectors + self.up(self.down(vectors))

    def to_dense(self) -> Dense:
        """Return a layer of sentence-transformers with the same output, B A as one matrix."""
        from sentence_transformers.sentence_transformer.modules import Dense

        weight = (self.up.weight @ self.down.weight).detach().float()
        return Dense(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            activation_function=nn.Identity(),
            init_weight=weight,
            use_residual=True,
        )


class AdapterScorer(EncoderScorer):
    """`EncoderScorer` with a frozen encoder and a trained low-rank residual, e'(q) = e(q) + B A e(q).

    Training starts from the encoder's own ranking (the safe variant of Adder, arXiv 2310.05380). Embeddings
    are computed once and cached, so training is cheap. With a residual for queries only, an index of the
    documents stays valid.

    Args:
        encoder: Encoder, which is frozen.
        temperature: Temperature of the scores.
        rank: Rank of the residual.
        side: Strings with a residual: "query", "document", or "both", each with its own matrices.

    Raises:
        UserError: The encoder truncates its vectors, to which no layer can be added.
    """

    def __init__(self, encoder: SentenceTransformer, temperature: float, rank: int, side: str = "query"):
        super().__init__(encoder.eval().requires_grad_(False), temperature)
        if encoder.truncate_dim is not None:
            raise UserError("adapter_rank must be 0 for an encoder with truncate_dim, which cuts its vectors")
        size = encoder.encode_query("one", show_progress_bar=False).shape[0]
        tasks = ("query", "document") if side == "both" else (side,)
        self.residuals = nn.ModuleDict({task: Residual(size, rank, encoder.device) for task in tasks})
        # By task and text, on the CPU. Scorers of the same encoder may share them.
        self.embeddings: dict[tuple[str, str], Tensor] = {}

    def train(self, mode: bool = True) -> AdapterScorer:
        """Set the mode of the adapter. The encoder stays in eval mode, because its output is cached."""
        super().train(mode)
        self.encoder.eval()
        return self

    def embed(self, texts: Sequence[str], task: str) -> Tensor:
        """Return vectors, (texts, dimensions), with the trained residual if `task` has one."""
        self._cache_embeddings(texts, task)
        vectors = torch.stack([self.embeddings[task, text] for text in texts]).to(self.encoder.device)
        if task in self.residuals:
            with torch.autocast(vectors.device.type, enabled=False):
                vectors = self.residuals[task](vectors)
                vectors = functional.normalize(vectors, dim=-1) if self.normalize else vectors
        return vectors

    def _cache_embeddings(self, texts: Sequence[str], task: str) -> None:
        missing = [text for text in dict.fromkeys(texts) if (task, text) not in self.embeddings]
        if missing:
            encode = self.encoder.encode_query if task == "query" else self.encoder.encode_document
            with torch.autocast(self.encoder.device.type, enabled=False):
                vectors = encode(
                    [encodable(text) for text in missing],
                    normalize_embeddings=self.normalize,
                    convert_to_tensor=True,
                    show_progress_bar=False,
                )
            for text, vector in zip(missing, vectors.float().cpu(), strict=True):
                self.embeddings[task, text] = vector

    def to_sentence_transformer(self) -> SentenceTransformer:
        """Return the encoder with a route for queries and one for documents, which have the residuals."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dropout, Module, Normalize, Router

        routes: dict[str, list[Module]] = {}
        for task in ("query", "document"):
            layers: list[Module] = []
            if task in self.residuals:
                layers.append(cast(Residual, self.residuals[task]).to_dense())
            if self.normalize:
                # The residual is of the vector of length 1.
                layers = [Normalize(), *layers, Normalize()] if layers else [Normalize()]
            routes[task] = layers or [Dropout(0.0)]  # a route needs a module
        encoder = self.encoder
        children = list(encoder.named_children())
        # The encoder may have an adapter already, from an earlier run.
        name = f"adapter_{len(children)}"
        modules: Any = OrderedDict([*children, (name, Router(routes, "document"))])
        model = SentenceTransformer(
            modules=modules,
            device=str(encoder.device),
            prompts={name: prompt or "" for name, prompt in encoder.prompts.items()},
            default_prompt_name=encoder.default_prompt_name,
            similarity_fn_name=encoder.similarity_fn_name,
        )
        model.module_kwargs = encoder.module_kwargs
        return model


def prompt_of(encoder: SentenceTransformer, task: str) -> str | None:
    """Return the prompt that `encode_query` or `encode_document` put before each string, or None."""
    names = ("query",) if task == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in encoder.prompts), encoder.default_prompt_name)
    return None if name is None else encoder.prompts.get(name)
