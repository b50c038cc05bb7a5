"""Train a scorer of documents with the policy gradient of its rankings or with a supervised loss.

The rows of the training data have the fields of `rlkit.environment.Candidates`: `query`, `passages`, `grades`
of the passages, and `ideal`, the grades of all relevant documents, highest first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    from rlkit.training.ranking.scorers import EncoderScorer

# Listwise distillation (arXiv 2502.19712) adds InfoNCE with a weight of 0.1. Its temperature there is 0.01,
# that of the divergence 0.05: InfoNCE gets 5 times the scores.
TEACHER_TEMPERATURE, INFONCE_WEIGHT, INFONCE_SCALE = 0.3, 0.1, 5.0


@dataclass(frozen=True)
class Objective:
    """The loss to minimize, and its settings.

    Attributes:
        name: One of `rlkit.arguments.keys.OBJECTIVES`. "plackett_luce" is minus the expected utility
            of a drawn ranking. "distillation" uses grade / highest grade as the teacher's score.
        utility: Utility of a ranking, "ndcg" or "rr".
        cutoff: Number of top ranks that count for the utility.
        rankings: Number of rankings drawn per query.
        estimator: Estimator of the policy gradient, one of `rlkit.arguments.presets.ESTIMATORS`.
    """

    name: str = "plackett_luce"
    utility: str = "ndcg"
    cutoff: int = 10
    rankings: int = 16
    estimator: str = "placement_loo"


class RankingTrainer(transformers.Trainer):
    """Trainer of a scorer.

    Args:
        scorer: Scorer to train.
        objective: Loss to minimize.
        arguments: Arguments of transformers' Trainer.
    """

    objective: Objective

    def __init__(self, scorer: EncoderScorer, objective: Objective, **arguments: Any):
        super().__init__(model=scorer, data_collator=collate, **arguments)
        self.objective = objective
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)  # values since the last log

    def stateful(self) -> dict[str, Stateful]:
        """Return the stateful objects, by name, that a checkpoint holds besides what transformers saves."""
        return {"since the last log": RunningMetrics(self, self.metrics)}

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
        if self.objective.name in ("infonce", "distillation", "wasserstein"):
            return self._in_batch_losses(model, inputs), {}
        scores = model(self._query_texts(model, inputs), inputs["passages"])
        grades, mask = inputs["grades"].to(scores.device), inputs["mask"].to(scores.device)
        if self.objective.name == "ranknet":
            return ranking_losses.ranknet(scores, grades, mask), {}
        return self._policy_gradient_losses(scores, grades, mask, inputs["ideal"].to(scores.device))

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
        metrics = {"utility": total.mean().item(), "utility_spread": total.std(1).mean().item()}
        if objective.estimator == "pl_rank":
            weights = dcg_discounts(rankings.shape[-1], scores.device)
            gains = grades / ideal_dcg.clamp(min=1e-12)[:, None]
            return pl_rank_loss(policy, rankings, gains, weights), metrics
        return policy_gradient_loss(policy.log_prob(rankings), utility, objective.estimator), metrics

    def _in_batch_losses(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Return the losses, (B,) or a scalar, that compare a query with all M documents of the batch."""
        documents = list(dict.fromkeys(passage for of_query in inputs["passages"] for passage in of_query))
        document_ids = {document: i for i, document in enumerate(documents)}
        scores = model(self._query_texts(model, inputs), [documents] * len(inputs["queries"]))  # (B, M)
        grades, mask = inputs["grades"].to(scores.device), inputs["mask"].to(scores.device)  # (B, n)
        rows = [
            torch.tensor([document_ids[passage] for passage in of_query]) for of_query in inputs["passages"]
        ]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(scores.device)
        labels = torch.zeros_like(scores).scatter_add(1, ids.clamp(min=0), grades * mask)
        if self.objective.name == "wasserstein":
            return ranking_losses.gaussian_wasserstein(scores, labels)
        # The positive is drawn from the documents of the highest grade. Other relevant documents are excluded
        # from the negatives.
        is_best = (labels == labels.max(-1, keepdim=True).values).float()
        positive = torch.multinomial(is_best, 1)[:, 0]
        if self.objective.name == "infonce":
            return ranking_losses.infonce(scores, positive, labels <= 0)
        teacher = grades / grades.max(-1, keepdim=True).values
        own_scores = scores.gather(1, ids.clamp(min=0))  # (B, n): of each query's own passages
        divergence = ranking_losses.listwise_distillation(own_scores, teacher / TEACHER_TEMPERATURE, mask)
        all_ids = torch.arange(len(documents), device=ids.device)
        negatives = ~ranking_losses.false_negatives(teacher, ids, all_ids)
        infonce = ranking_losses.infonce(INFONCE_SCALE * scores, positive, negatives)
        return divergence + INFONCE_WEIGHT * infonce

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log `logs` and the means over all processes of the metrics since the last log."""
        for name, values in self.metrics.items():
            mean = torch.tensor(sum(values) / len(values), device=self.args.device)
            logs[name] = self.accelerator.gather(mean).mean().item()
        self.metrics.clear()
        super().log(logs, start_time)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch: lists of strings, `grades` and their `mask` (B, n), and `ideal` (B, m), padded."""
    grades = [torch.tensor(row["grades"], dtype=torch.float32) for row in rows]
    ideal = [torch.tensor(row["ideal"], dtype=torch.float32) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(grades, batch_first=True, padding_value=-1.0)
    return {
        "queries": [row["query"] for row in rows],
        "passages": [row["passages"] for row in rows],
        "grades": padded.clamp(min=0),
        "mask": padded >= 0,
        "ideal": torch.nn.utils.rnn.pad_sequence(ideal, batch_first=True),
    }


def permutation(scores: Sequence[float]) -> str:
    """Return the ranking of scores as a language model would write it: "[2] > [1]". Ties keep their order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return " > ".join(f"[{i + 1}]" for i in order)
