"""A step of Plackett-Luce ranking and of MultipleNegativesRankingLoss on the same batch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from fixed_prompts import random_letters
from transformers import BertConfig, BertModel, TrainingArguments

from gpu_parts.common import Bench, Cases, make_tokenizer, speedup
from rlkit.environment import Candidates
from rlkit.training.ranking.scorers import EncoderScorer
from rlkit.training.ranking.trainer import Objective, RankingTrainer, collate

# Sizes of published encoders, with the tokens of a document; the weights are random.
ENCODERS: dict[str, tuple[dict[str, int], int]] = {
    "MiniLM-L6": (
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        128,
    ),
    "BERT-base": (
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
        64,
    ),
}
TINY_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VOCAB_SIZE = 30_522


def cases(bench: Bench) -> Cases:
    """Return a case per encoder."""
    return {name: partial(measure, bench, name) for name in ENCODERS}


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """Compare loss, gradient and update on queries with one relevant document each.

    Both losses tokenize and embed the same strings. MultipleNegativesRankingLoss gets the relevant document
    as the positive and the others as negatives, and compares a query with the documents of all queries;
    Plackett-Luce draws rankings of the query's own documents. sentence-transformers makes 101 passes of 16
    strings, one for each column of its dataset; rlkit encodes all documents in a few passes.
    """
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    _, real_document_length = ENCODERS[name]
    num_queries, num_documents, query_length, document_length = bench.size(
        (16, 100, 32, real_document_length), (4, 5, 8, 16)
    )
    queries = random_letters(num_queries, query_length)
    documents = random_letters(num_queries * num_documents, document_length)
    passages = [documents[i * num_documents : (i + 1) * num_documents] for i in range(num_queries)]
    scorer = EncoderScorer(make_encoder(bench, name), temperature=0.05)
    grades = [1] + [0] * (num_documents - 1)
    rows = [
        asdict(Candidates(query, of_query, grades, [1]))
        for query, of_query in zip(queries, passages, strict=True)
    ]
    batch = collate(rows)
    baseline = make_encoder(bench, name)
    multiple_negatives = MultipleNegativesRankingLoss(baseline, scale=20.0)
    columns = [queries, *([of_query[i] for of_query in passages] for i in range(num_documents))]

    def policy_gradient() -> torch.Tensor:
        return trainer.compute_loss(scorer, batch)

    def contrastive() -> torch.Tensor:
        features = []
        for column in columns:
            tensors = baseline.preprocess(column)
            features.append({key: tensors[key].to(bench.device) for key in ("input_ids", "attention_mask")})
        return multiple_negatives(features, None)

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=bench.on_cpu, report_to="none")
        trainer = RankingTrainer(scorer, Objective(), args=args)
        sides = {
            "sentence_transformers": stepper(bench, baseline, contrastive),
            "rlkit": stepper(bench, scorer, policy_gradient),
        }
        measured = bench.alternate(sides)
    return {
        "queries": num_queries,
        "documents_per_query": num_documents,
        "query_tokens": query_length,
        "document_tokens": document_length,
        **measured,
        "speedup": speedup(measured, "sentence_transformers", "rlkit"),
    }


def make_encoder(bench: Bench, name: str) -> Any:
    """Return a sentence-transformers model with random weights and mean pooling."""
    from sentence_transformers import SentenceTransformer

    sizes, _ = ENCODERS[name]
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=VOCAB_SIZE, **bench.size(sizes, TINY_ENCODER)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        make_tokenizer(VOCAB_SIZE).save_pretrained(folder)
        return SentenceTransformer(folder, device=str(bench.device)).train()


def stepper(
    bench: Bench, model: torch.nn.Module, compute_loss: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    """Return a function that runs a step with bfloat16 autocast and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = compute_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
