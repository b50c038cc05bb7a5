"""Train a scorer of documents with the policy gradient of its rankings or with a supervised loss.

The rows of the training data have the fields of `rlkit.environment.Candidates`. The in-batch objectives
compare a query with the documents of all queries in the batch of one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from rlkit.training.ranking import losses as ranking_losses
from rlkit.training.ranking.plackett_luce import (
    PlackettLuce,
    dcg,
    dcg_discounts,
    pl_rank_loss,
    policy_gradient_loss,
    utility_by_position,
)
from rlkit.training.resume import RunningMetrics, Stateful

if TYPE_CHECKING:
    from rlkit.training.ranking.cross import CrossScorer
    from rlkit.training.ranking.scorers import EncoderScorer

# Listwise distillation (arXiv 2502.19712) has a temperature of 0.05 for the divergence and 0.01 for InfoNCE,
# which thus gets 5 times the scores.
TEACHER_TEMPERATURE, INFONCE_SCALE = 0.3, 5.0
# Objectives whose negatives are the documents of the batch, and not only the query's own candidates.
IN_BATCH_OBJECTIVES = ("infonce", "distillation", "wasserstein")  # of scorers with `in_batch`


@dataclass(frozen=True)
class Objective:
    """The loss to minimize, and its settings.

    Attributes:
        name: One of `rlkit.arguments.keys.OBJECTIVES`. "plackett_luce" is minus the expected utility
            of a drawn ranking. "distillation" uses grade / highest grade as the teacher's score, or the
            grades themselves if none is above 1.
        utility: Utility of a ranking, "ndcg" or "rr".
        cutoff: Number of top ranks that count for the utility.
        rankings: Number of rankings drawn per query.
        estimator: Estimator of the policy gradient, one of `rlkit.arguments.presets.ESTIMATORS`.
        infonce_weight: Weight of InfoNCE, which "distillation" adds to the divergence; 0 for none.
    """

    name: str = "plackett_luce"
    utility: str = "ndcg"
    cutoff: int = 10
    rankings: int = 16
    estimator: str = "placement_loo"
    infonce_weight: float = 0.1


class LogLastStep(transformers.TrainerCallback):
    """Callback that logs the last step, so that guards see runs shorter than `logging_steps`."""

    def on_step_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: object,
    ) -> None:
        """Ask the trainer to log if training ends with this step."""
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class RankingTrainer(transformers.Trainer):
    """Trainer of a scorer.

    Args:
        scorer: Scorer to train.
        objective: Loss to minimize.
        arguments: Arguments of transformers' Trainer.
    """

    objective: Objective

    def __init__(self, scorer: EncoderScorer | CrossScorer, objective: Objective, **arguments: Any):
        super().__init__(model=scorer, data_collator=collate, **arguments)
        self.add_callback(LogLastStep())
        self.objective = objective
        # A pair has nothing to rank but the documents of the batch.
        rows = arguments.get("train_dataset") or ()
        self.ranks_batch = any(len(row["passages"]) < 2 for row in rows)
        batch_size = self.args.train_batch_size
        # The Wasserstein loss of a single query is undefined. With several processes, accelerate fills up
        # the last batches.
        if objective.name == "wasserstein" and self.args.world_size == 1 and len(rows) > batch_size:
            self.args.dataloader_drop_last |= len(rows) % batch_size == 1
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)  # values since the last log

    def stateful(self) -> dict[str, Stateful]:
        """Return the stateful objects, by name, that a checkpoint holds besides what transformers saves."""
        return {"since the last log": RunningMetrics(self, self.metrics)}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save a checkpoint, with copies of tied weights, because safetensors rejects shared memory."""
        assert self.model is not None
        weights = self.model.state_dict() if state_dict is None else state_dict
        pointers: set[int] = set()
        for name, weight in weights.items():
            if weight.data_ptr() in pointers:
                weights[name] = weight.clone()
            pointers.add(weight.data_ptr())
        super()._save(output_dir, weights)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of a batch of queries, and collect its metrics for the next log."""
        losses, metrics = self._losses(model, inputs)
        for name, value in metrics.items():
            self.metrics[name].append(value)
        return losses.mean()

    def _losses(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        scorer = self.accelerator.unwrap_model(model)
        if self.objective.name in IN_BATCH_OBJECTIVES and scorer.in_batch:
            return self._in_batch_losses(model, inputs)
        scores = model(
            self._query_texts(model, inputs),
            inputs["passages"],
            passages_are_queries=inputs["passages_are_queries"],
        )
        grades, mask = inputs["grades"].to(scores.device), inputs["mask"].to(scores.device)
        ideal = inputs["ideal"].to(scores.device)
        metrics = ranking_metrics(self.objective, scores.detach(), grades, mask, ideal)
        if self.objective.name != "plackett_luce":
            return LIST_LOSSES[self.objective.name](scores, grades, mask), metrics
        losses, sampled = self._policy_gradient_losses(scores, grades, mask, ideal)
        return losses, metrics | sampled

    def _query_texts(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> list[str]:
        return self.accelerator.unwrap_model(model).query_texts(inputs["queries"], inputs["passages"])

    def _policy_gradient_losses(
        self, scores: Tensor, grades: Tensor, mask: Tensor, ideal: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        policy, objective = PlackettLuce(scores, mask), self.objective
        rankings = policy.sample(objective.rankings, objective.cutoff)
        ideal_dcg = dcg(ideal[:, : objective.cutoff])
        utility = utility_by_position(objective.utility, rankings, grades, ideal_dcg)
        total = utility.sum(-1)  # (B, N)
        # A standard deviation of rounding errors must not hide that all rankings have the same utility.
        spread = torch.where(total.amax(1) - total.amin(1) > 1e-6, total.std(1, correction=0), 0.0)
        metrics = {"utility": total.mean().item(), "utility_spread": spread.mean().item()}
        if objective.estimator == "pl_rank":
            weights = dcg_discounts(rankings.shape[-1], scores.device)
            gains = grades / ideal_dcg.clamp(min=1e-12)[:, None]
            return pl_rank_loss(policy, rankings, gains, weights), metrics
        return policy_gradient_loss(policy.log_prob(rankings), utility, objective.estimator), metrics

    def _in_batch_losses(
        self, model: torch.nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the losses, (B,) or a scalar, that compare a query with all M documents of the batch."""
        batch = BatchDocuments.of(inputs)
        scores = model(
            self._query_texts(model, inputs),
            inputs["passages"],
            batch.texts,
            passages_are_queries=inputs["passages_are_queries"],
        )  # (B, M)
        device = scores.device
        grades, mask = inputs["grades"].to(device), inputs["mask"].to(device)  # (B, n)
        columns, labels, rankable = (x.to(device) for x in (batch.columns, batch.labels, batch.rankable))
        own_scores = scores.gather(1, columns.clamp(min=0))  # (B, n): of each query's own passages
        if self.ranks_batch:
            ranked = rankable & batch.is_first.to(device)
            ideal = labels.masked_fill(~ranked, 0.0).sort(-1, descending=True).values
            metrics = ranking_metrics(self.objective, scores.detach(), labels, ranked, ideal)
        else:
            ideal = inputs["ideal"].to(device)
            metrics = ranking_metrics(self.objective, own_scores.detach(), grades, mask, ideal)
        if self.objective.name == "wasserstein":
            return ranking_losses.gaussian_wasserstein(scores, labels, rankable), metrics
        # The positives are the query's own documents of the highest grade. Other relevant documents of the
        # batch are excluded from the negatives.
        is_best = best_candidates(grades, mask).float()
        positive = torch.zeros_like(labels).scatter_reduce(1, columns.clamp(min=0), is_best, "amax") > 0
        negatives = (labels <= 0) & rankable
        if self.objective.name == "infonce":
            return ranking_losses.infonce(scores, positive, negatives), metrics
        divergence = list_distillation(own_scores, grades, mask)
        infonce = ranking_losses.infonce(INFONCE_SCALE * scores, positive, negatives)
        return divergence + self.objective.infonce_weight * infonce, metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` and the means over all processes of the metrics since the last log."""
        for name, values in self.metrics.items():
            mean = torch.tensor(sum(values) / len(values), device=self.args.device)
            logs[name] = self.accelerator.gather(mean).mean().item()
        self.metrics.clear()
        super().log(logs, start_time)


def best_candidates(grades: Tensor, mask: Tensor) -> Tensor:
    """Return which candidates of each query have its highest grade, (B, n)."""
    return (grades == grades.masked_fill(~mask, -1.0).amax(-1, keepdim=True)) & mask


def list_infonce(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return InfoNCE, (B,), with the query's own candidates that are not relevant as negatives."""
    return ranking_losses.infonce(scores, best_candidates(grades, mask), (grades <= 0) & mask)


def list_distillation(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """Return the divergence, (B,), from the softmax of the teacher's scores over the own candidates.

    Scores up to 1 are those of a teacher; grades become scores when they are divided by the highest one.
    """
    teacher = grades / grades.max(-1, keepdim=True).values.clamp(min=1)
    return ranking_losses.listwise_distillation(scores, teacher / TEACHER_TEMPERATURE, mask)


# Losses (B,) of scores, grades and mask (B, n) that compare a query with its own candidates.
LIST_LOSSES = {
    "ranknet": ranking_losses.ranknet,
    "softmax_margin": ranking_losses.softmax_margin,
    "pointwise": ranking_losses.pointwise,
    "infonce": list_infonce,
    "distillation": list_distillation,
}


@dataclass(frozen=True)
class BatchDocuments:
    """The M distinct documents of a batch, and what is known about them for each of its B queries.

    Attributes:
        texts: Text of each document, M strings. Documents are distinct by id and text.
        columns: Index of the document of each query's candidates, (B, n), -1 for padding.
        labels: Grades (B, M). A document is relevant to a query if the query's candidates or judgments say
            so, or if it has the same text as a relevant candidate.
        rankable: Whether the query may rank the document, (B, M).
        is_first: Whether no document before this one has the same text, (M,).
    """

    texts: list[str]
    columns: Tensor
    labels: Tensor
    rankable: Tensor
    is_first: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> BatchDocuments:
        """Return the documents of a batch from `collate`."""
        # One id may have several texts: a document that is ranked by its passages has the best of each query.
        keys_by_query = [
            list(zip(ids or [None] * len(passages), passages, strict=True))
            for ids, passages in zip(inputs["ids"], inputs["passages"], strict=True)
        ]
        index = {key: i for i, key in enumerate(dict.fromkeys(chain.from_iterable(keys_by_query)))}
        columns_by_id: defaultdict[str, list[int]] = defaultdict(list)
        columns_by_text: defaultdict[str, list[int]] = defaultdict(list)
        for (document_id, text), i in index.items():
            columns_by_text[text].append(i)
            if document_id is not None:
                columns_by_id[document_id].append(i)
        texts = [text for _, text in index]
        labels = torch.zeros(len(keys_by_query), len(index))
        rankable = torch.ones_like(labels, dtype=torch.bool)
        # Rows of one query may have different answers, such as a sentence with a passage from each source.
        possible_answers: defaultdict[str, set[str]] = defaultdict(set)
        for query, names in zip(inputs["queries"], inputs["possible_answers"], strict=True):
            possible_answers[query].update(names)
        for b, passages in enumerate(inputs["passages"]):
            grades_by_text: dict[str, float] = {}
            judged = zip(inputs["relevant"][b], inputs["ideal"][b].tolist(), strict=False)
            in_batch = [(texts[i], grade) for name, grade in judged for i in columns_by_id.get(name, ())]
            for text, grade in (*in_batch, *zip(passages, inputs["grades"][b].tolist(), strict=False)):
                # The highest grade counts if two documents have the same text.
                grades_by_text[text] = max(grades_by_text.get(text, 0.0), grade)
            for text, grade in grades_by_text.items():
                if grade > 0:
                    labels[b, columns_by_text[text]] = grade
            for document_id in inputs["excluded"][b]:
                rankable[b, columns_by_id.get(document_id, [])] = False
            candidates = {index[key] for key in keys_by_query[b]}
            for document_id in possible_answers[inputs["queries"][b]]:
                others = [i for i in columns_by_id.get(document_id, ()) if i not in candidates]
                rankable[b, others] = False
        rows = [torch.tensor([index[key] for key in keys]) for keys in keys_by_query]
        columns = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        is_first = torch.zeros(len(index), dtype=torch.bool)
        is_first[[of_text[0] for of_text in columns_by_text.values()]] = True
        return cls(texts, columns, labels, rankable, is_first)


def ranking_metrics(
    objective: Objective, scores: Tensor, grades: Tensor, mask: Tensor, ideal: Tensor
) -> dict[str, float]:
    """Return means over the queries of what the scores of their own candidates, (B, n), rank.

    `utility` is that of the ranking by score, and `score_spread` the standard deviation of the scores.
    """
    ranking = scores.masked_fill(~mask, -torch.inf).argsort(-1, descending=True)
    ranking = ranking.masked_fill(~mask.gather(-1, ranking), -1)[:, None, : objective.cutoff]
    utility = utility_by_position(objective.utility, ranking, grades, dcg(ideal[:, : objective.cutoff]))
    count = mask.sum(-1)
    means = torch.where(mask, scores, 0.0).sum(-1) / count
    deviations = torch.where(mask, scores - means[:, None], 0.0)
    spread = (deviations.square().sum(-1) / count).sqrt()
    return {"utility": utility.sum(-1).mean().item(), "score_spread": spread.mean().item()}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch: lists of strings, `grades` and their `mask` (B, n), and `ideal` (B, m), padded."""
    grades = [torch.tensor(row["grades"], dtype=torch.float32) for row in rows]
    ideal = [torch.tensor(row["ideal"], dtype=torch.float32) for row in rows]
    exists = [torch.ones_like(of_query, dtype=torch.bool) for of_query in grades]
    return {
        "queries": [row["query"] for row in rows],
        "passages": [row["passages"] for row in rows],
        "ids": [row["ids"] for row in rows],
        "relevant": [row["relevant"] for row in rows],
        "excluded": [row["excluded"] for row in rows],
        "possible_answers": [row["possible_answers"] for row in rows],
        # All rows of an environment are alike in this.
        "passages_are_queries": rows[0]["passages_are_queries"],
        # A negative grade, as in some judgments, means not relevant.
        "grades": torch.nn.utils.rnn.pad_sequence(grades, batch_first=True).clamp(min=0),
        "mask": torch.nn.utils.rnn.pad_sequence(exists, batch_first=True),
        "ideal": torch.nn.utils.rnn.pad_sequence(ideal, batch_first=True),
    }


def permutation(scores: Sequence[float]) -> str:
    """Return the ranking of scores as a language model would write it: "[2] > [1]". Ties keep their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return " > ".join(f"[{i + 1}]" for i in order)
