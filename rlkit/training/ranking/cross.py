"""Score documents for a query with a cross-encoder, all weights of which are trained, or LoRA adapters.

The result is saved as a cross-encoder of sentence-transformers, with which `rerank:FIRST|FOLDER` reranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlkit.retrieval.cross_encoders import HEAD, pair_scores
from rlkit.training.ranking.lora import enable_checkpointing, has_lora, merged

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

PAIRS_PER_PASS = 64  # sorted by length, so that one long document does not lengthen all of them


class CrossScorer(nn.Module):
    """Scorer with score(q, d) = logit of the cross-encoder for the pair / temperature.

    Args:
        model: Cross-encoder with one score.
        temperature: Temperature of the scores.
    """

    in_batch = False  # the documents of other queries would need a forward pass for each pair

    def __init__(self, model: CrossEncoder, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self,
        queries: Sequence[str],
        passages: Sequence[Sequence[str]],
        documents: None = None,
        passages_are_queries: bool = False,
    ) -> Tensor:
        """Return the scores of each query's passages, (B, n); 0 at padding if a query has fewer than n.

        Args:
            queries: Queries, B strings.
            passages: Passages of each query.
            documents: Always None: there are no scores of all documents of a batch.
            passages_are_queries: Whether a passage comes first in its pair, as the query does otherwise.
        """
        pairs = [(q, passage) for q, of_query in zip(queries, passages, strict=True) for passage in of_query]
        if passages_are_queries:
            pairs = [(passage, query) for query, passage in pairs]
        scores = pair_scores(self.model, pairs, PAIRS_PER_PASS) / self.temperature
        rows = scores.split([len(of_query) for of_query in passages])
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def query_texts(self, queries: Sequence[str], passages: Sequence[Sequence[str]]) -> list[str]:
        """Return the queries, which are paired with each passage unchanged."""
        return list(queries)

    def score(self, query: str, passages: Sequence[str], batch_size: int) -> Tensor:
        """Return the scores of passages for one query, (passages,), as the saved model computes them.

        Args:
            query: Query.
            passages: Passages, at least one.
            batch_size: Number of pairs per forward pass.
        """
        pairs = [(query, passage) for passage in passages]
        with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
            return pair_scores(self.model, pairs, batch_size) / self.temperature

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the activations in the backward pass; called by transformers' Trainer.

        Raises:
            UserError: The model has no layers that support it.
        """
        enable_checkpointing(self.model, gradient_checkpointing_kwargs, **options)

    def save_pretrained(self, folder: str | Path, **_: object) -> None:
        """Save the cross-encoder, with merged LoRA adapters."""
        model = merged(self.model) if has_lora(self.model) else self.model
        model.save_pretrained(str(folder))


def train_head(model: CrossEncoder) -> None:
    """Train the head itself next to LoRA adapters, since it may be new. A language model has no such head."""
    from sentence_transformers.base.modules import Transformer

    for module in model.children():
        if not isinstance(module, Transformer):
            module.requires_grad_(True)
    classifier = model.transformers_model
    if classifier is None or not type(classifier).__name__.endswith(HEAD):
        return
    for name, parameter in classifier.named_parameters():
        if not name.startswith(f"{classifier.base_model_prefix}."):
            parameter.requires_grad_(True)
