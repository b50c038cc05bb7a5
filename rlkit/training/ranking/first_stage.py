"""Check of an encoder as a first stage: does it still find the relevant documents among all of them?

Training on a few candidates per query can improve their order and ruin the retrieval from the entire
collection, since the loss never sees the other documents.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object

from rlkit.environment import Candidates
from rlkit.evaluation import paired_permutation_test
from rlkit.files import atomic_write
from rlkit.retrieval.measures import Evaluator

if TYPE_CHECKING:
    import transformers
    from accelerate import Accelerator
    from torch import Tensor

    from rlkit.runs.directory import RunDirectory
    from rlkit.training.ranking.scorers import EncoderScorer

logger = logging.getLogger(__name__)

MEASURE, DEPTH = "ndcg@10", 10
SIGNIFICANT = 0.05  # p value of the paired permutation test below which a fall is reported


class FirstStage:
    """nDCG@10 of held-out queries when the encoder ranks all documents, before and after training.

    Args:
        candidates: Candidates of each held-out task by id, with the ids of relevant documents.
        documents: All documents as (id, passage).
        max_documents: Maximum number of documents. With more, the relevant ones and a random sample of the
            others are ranked.
        seed: Seed of the sample.
        batch_size: Number of strings per forward pass.
    """

    def __init__(
        self,
        candidates: Mapping[str, Candidates],
        documents: Iterable[tuple[str, str]],
        *,
        max_documents: int,
        seed: int,
        batch_size: int,
    ):
        self.candidates, self.batch_size = candidates, batch_size
        relevant = {document_id for c in candidates.values() for document_id in c.relevant}
        self.documents, self.num_documents = sample_documents(documents, relevant, max_documents, seed)
        qrels = {
            task_id: dict(zip(of_task.relevant, map(int, of_task.ideal), strict=True))
            for task_id, of_task in candidates.items()
        }
        self.evaluator = Evaluator(qrels, [MEASURE])

    def scores(self, scorer: EncoderScorer, accelerator: Accelerator) -> dict[str, float]:
        """Return nDCG@10 by task. All processes take part, each with its share of the documents."""
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        shard = self.documents[rank::num_processes]
        queries = list(self.candidates.values())
        hits: list[list[tuple[float, str]]] = [[] for _ in queries]
        if shard and queries:
            query_vectors = scorer.embed_in_batches([c.query for c in queries], "query", self.batch_size)
            passages = [passage for _, passage in shard]
            similarities = query_vectors @ scorer.embed_in_batches(passages, "document", self.batch_size).T
            ids, similarities = best_passages([document_id for document_id, _ in shard], similarities)
            for i, of_query in enumerate(queries):
                # Excluded documents may be at the top.
                depth = min(DEPTH + len(of_query.excluded), len(ids))
                values, indices = similarities[i].topk(depth)
                hits[i] = [
                    (value, ids[j])
                    for value, j in zip(values.tolist(), indices.tolist(), strict=True)
                    if ids[j] not in of_query.excluded
                ]
        gathered = gather_object([hits])
        scores = {}
        for i, task_id in enumerate(self.candidates):
            merged = sorted((hit for of_process in gathered for hit in of_process[i]), reverse=True)
            # Passages of one document may be in several shards: the evaluator counts the best one.
            ranking = [document_id for _, document_id in merged]
            scores[task_id] = self.evaluator(task_id, ranking)[MEASURE]
        return scores

    def run(self, trainer: transformers.Trainer, directory: RunDirectory, name: str, *, resume: bool) -> None:
        """Evaluate the current weights, and save the scores to `first_stage/<name>.json` and the metrics."""
        path = _path(directory, name)
        if resume and name == "before" and path.exists():
            return
        accelerator = trainer.accelerator
        scores = self.scores(accelerator.unwrap_model(trainer.model), accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            result = {
                "measure": MEASURE,
                "documents": len(self.documents),
                "all_documents": self.num_documents,
                "scores": scores,
            }
            atomic_write(path, json.dumps(result))
            mean = float(np.mean(list(scores.values())))
            directory.log(trainer.state.global_step, {f"first_stage/{MEASURE}": mean})

    def summary(self, directory: RunDirectory, metric_change: float) -> list[str]:
        """Return the change as a line, and warn if the encoder retrieves significantly worse than before."""
        paths = [_path(directory, name) for name in ("before", "after")]
        if not all(path.exists() for path in paths):
            return []
        before, after = (json.loads(path.read_text(encoding="utf-8"))["scores"] for path in paths)
        common = [task for task in before if task in after]
        a, b = (np.array([scores[task] for task in common]) for scores in (before, after))
        p = paired_permutation_test(a, b)
        number = f"all {self.num_documents:,}"
        if len(self.documents) < self.num_documents:
            number = f"{len(self.documents):,} of {self.num_documents:,}"
        change = f"{a.mean():.3f} -> {b.mean():.3f} (p = {p:.2g})"
        if b.mean() < a.mean() and p < SIGNIFICANT:
            logger.warning(
                "the encoder retrieves worse than before training: nDCG@10 over %s documents %s, while the "
                "order of the candidates %s; use it only to rerank, or train with a lower learning_rate, "
                "fewer steps, adapter_rank, use_peft or more candidates",
                number,
                change,
                "improved" if metric_change > 0 else "did not improve either",
            )
        return [f"first stage: nDCG@10 over {number} documents {change}"]


def _path(directory: RunDirectory, name: str) -> Path:
    return directory.path / "first_stage" / f"{name}.json"


def best_passages(ids: Sequence[str], similarities: Tensor) -> tuple[list[str], Tensor]:
    """Return the distinct documents and the similarity of each one's best passage, (queries, documents).

    Args:
        ids: Document of each passage.
        similarities: Similarity of each passage to each query, (queries, passages).
    """
    column = {document_id: i for i, document_id in enumerate(dict.fromkeys(ids))}
    if len(column) == len(ids):
        return list(ids), similarities
    columns = torch.tensor([column[document_id] for document_id in ids], device=similarities.device)
    highest = similarities.new_full((len(similarities), len(column)), -torch.inf)
    return list(column), highest.scatter_reduce(1, columns.expand_as(similarities), similarities, "amax")


def sample_documents(
    documents: Iterable[tuple[str, str]], relevant: set[str], max_documents: int, seed: int
) -> tuple[list[tuple[str, str]], int]:
    """Return the relevant documents and a random sample of the others, in order, and the number of all.

    The documents are read once and only those chosen so far are held in memory. If the relevant ones alone
    exceed the maximum, all of them are returned.
    """
    generator = random.Random(seed)
    chosen: list[tuple[int, str, str]] = []
    others: list[tuple[int, str, str]] = []
    num_others = 0
    num_places = max(max_documents - len(relevant), 0)
    number = -1
    for number, (document_id, passage) in enumerate(documents):
        item = (number, document_id, passage)
        if document_id in relevant:
            chosen.append(item)
            continue
        num_others += 1
        if len(others) < num_places:
            others.append(item)
        elif num_places and (place := generator.randrange(num_others)) < num_places:
            others[place] = item
    return [(document_id, passage) for _, document_id, passage in sorted(chosen + others)], number + 1
