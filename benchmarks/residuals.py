"""Shared code of the benchmarks that compare training rows: train a residual on a frozen encoder, test it.

A run takes seconds, because the strings are embedded once for all runs.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from retrieval import Scores

from rlkit.envs.ranking.pairs.environment import PairsEnvironment
from rlkit.envs.ranking.pairs.rows import PairRow, write_rows
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import passage_text
from rlkit.retrieval.encoders import load_encoder
from rlkit.retrieval.measures import Evaluator
from rlkit.retrieval.retrievers import excluded_ids
from rlkit.training.ranking.rank import candidates_of, training_rows
from rlkit.training.ranking.scorers import AdapterScorer
from rlkit.training.ranking.trainer import IN_BATCH_OBJECTIVES, Objective, RankingTrainer

ENCODER = "bundled:all-minilm-l6-v2"
RANK = 64  # of the residual
DEPTH = 100  # documents in a ranking


class ResidualTraining:
    """Training of residuals of the query embedding of one encoder, which is frozen.

    Args:
        encoder: Name of the encoder.
    """

    def __init__(self, encoder: str = ENCODER):
        self.encoder = load_encoder(encoder)
        self.embeddings: dict[tuple[str, str], torch.Tensor] = {}

    def scorer(self, seed: int = 0, temperature: float = 0.05) -> AdapterScorer:
        """Return an untrained scorer, whose residual is 0."""
        transformers.set_seed(seed)
        scorer = AdapterScorer(self.encoder, temperature, RANK)
        scorer.embeddings = self.embeddings
        return scorer

    def train(
        self,
        rows: Sequence[PairRow],
        *,
        seed: int,
        steps: int,
        learning_rate: float,
        objective: str = "infonce",
        temperature: float = 0.05,
        batch_size: int = 64,
    ) -> AdapterScorer:
        """Return a scorer that is trained on rows, as by `rlkit rank` with `pairs-v1` and `adapter_rank`.

        Args:
            rows: Training rows.
            seed: Seed of the residual and of the order of rows.
            steps: Number of optimizer steps.
            learning_rate: Learning rate, which decreases linearly to 0.
            objective: Key `objective` of `rlkit rank`.
            temperature: Temperature of the scores.
            batch_size: Number of rows per step.
        """
        scorer = self.scorer(seed, temperature)
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder) / "pairs.jsonl", rows)
            environment = PairsEnvironment(pairs=f"{folder}/pairs.jsonl")
            candidates = candidates_of(environment, environment.tasks("train", None, seed))
            arguments = transformers.TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                seed=seed,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = RankingTrainer(
                scorer,
                Objective(objective),
                args=arguments,
                train_dataset=training_rows(environment, candidates, objective in IN_BATCH_OBJECTIVES),
            )
            trainer.train()
        return scorer

    def score(
        self, scorer: AdapterScorer, collection: str, measures: Sequence[str], split: str = "test"
    ) -> Scores:
        """Return the value of each measure for each query of a split, with all documents ranked."""
        loaded = load_collection(collection)
        judged: Mapping[str, Mapping[str, int]] = loaded.judged(split)
        documents = {document.id: passage_text(document) for document in loaded.documents()}
        with torch.no_grad():
            document_vectors = scorer.embed(list(documents.values()), "document")
            query_vectors = scorer.embed([loaded.queries[name] for name in judged], "query")
        ids, evaluator = list(documents), Evaluator(judged, measures)
        scores: dict[str, Mapping[str, float]] = {}
        for name, similarities in zip(judged, query_vectors @ document_vectors.T, strict=True):
            order = similarities.argsort(descending=True, stable=True).tolist()
            excluded = excluded_ids(loaded, name)
            scores[name] = evaluator(name, [ids[i] for i in order if ids[i] not in excluded][:DEPTH])
        return scores
