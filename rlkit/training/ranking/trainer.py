"""Train a scorer of documents: by policy gradient on its rankings, or by a supervised loss.

Rows have `query`, `passages`, `grades` (of the passages) and `ideal` (grades of all relevant documents,
highest first), as the tasks of `rerank-v1`.
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
from rlkit.training.resume import SinceLog, Stateful

if TYPE_CHECKING:
    from rlkit.training.ranking.scorers import EncoderScorer

# Of listwise distillation (arXiv 2502.19712): the temperature of the teacher, and InfoNCE's weight and how
# much sharper than the divergence it is (0.05 against 0.01).
TEACHER_TEMPERATURE, INFONCE_SHARE, INFONCE_SHARPER = 0.3, 0.1, 5.0


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        name: one of `OBJECTIVES` of `rlkit.arguments.keys`. "plackett_luce" is minus the expected utility of
            a drawn ranking; "distillation" has the grades, as shares of the highest, for its teacher.
        utility: "ndcg" or "rr", of the policy.
        cutoff: ranks that count.
        rankings: drawn for each query.
        estimator: of the policy gradient, one of `rlkit.arguments.presets.ESTIMATORS`.
    """

    name: str = "plackett_luce"
    utility: str = "ndcg"
    cutoff: int = 10
    rankings: int = 16
    estimator: str = "placement_loo"


class RankingTrainer(transformers.Trainer):
    """transformers' Trainer over a scorer.

    Args:
        scorer: an `rlkit.training.ranking.scorers.EncoderScorer`.
        objective: what is minimised.
        arguments: those of transformers' Trainer.
    """

    objective: Objective

    def __init__(self, scorer: EncoderScorer, objective: Objective, **arguments: Any):
        super().__init__(model=scorer, data_collator=collate, **arguments)
        self.objective = objective
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)  # values since the last log

    def stateful(self) -> dict[str, Stateful]:
        """The stateful objects that a checkpoint keeps besides what transformers saves, by name."""
        return {"since the last log": SinceLog(self, self.metrics)}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The mean loss of a batch of queries."""
        losses, metrics = self._losses(model, inputs)
        for name, value in metrics.items():
            self.metrics[name].append(value)
        return losses.mean()

    def _losses(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        if self.objective.name in ("infonce", "distillation", "wasserstein"):
            return self._in_batch(model, inputs), {}
        scores = model(self._asked(model, inputs), inputs["passages"])
        grades, mask = inputs["grades"].to(scores.device), inputs["mask"].to(scores.device)
        if self.objective.name == "ranknet":
            return ranking_losses.ranknet(scores, grades, mask), {}
        return self._policy_gradient(scores, grades, mask, inputs["ideal"].to(scores.device))

    def _asked(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> list[str]:
        return self.accelerator.unwrap_model(model).ask(inputs["queries"], inputs["passages"])

    def _policy_gradient(
        self, scores: Tensor, grades: Tensor, mask: Tensor, ideal: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        policy, objective = PlackettLuce(scores, mask), self.objective
        rankings = policy.sample(objective.rankings, objective.cutoff)
        best = dcg(ideal[:, : objective.cutoff])
        utility = utility_by_position(objective.utility, rankings, grades, best)
        total = utility.sum(-1)
        metrics = {"utility": total.mean().item(), "utility_spread": total.std(1).mean().item()}
        if objective.estimator == "pl_rank":
            weights = dcg_discounts(rankings.shape[-1], scores.device)
            gains = grades / best.clamp(min=1e-12)[:, None]
            return pl_rank_loss(policy, rankings, gains, weights), metrics
        return policy_gradient_loss(policy.log_prob(rankings), utility, objective.estimator), metrics

    def _in_batch(self, model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Losses that compare a query with the documents of the others too."""
        texts = list(dict.fromkeys(text for one in inputs["passages"] for text in one))
        place = {text: i for i, text in enumerate(texts)}
        scores = model(self._asked(model, inputs), [texts] * len(inputs["queries"]))
        grades, mask = inputs["grades"].to(scores.device), inputs["mask"].to(scores.device)
        rows = [torch.tensor([place[text] for text in one]) for one in inputs["passages"]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(scores.device)
        labels = torch.zeros_like(scores).scatter_add(1, ids.clamp(min=0), grades * mask)
        if self.objective.name == "wasserstein":
            return ranking_losses.gaussian_wasserstein(scores, labels)
        # One of the best is the positive; other relevant ones are no negatives.
        best = (labels == labels.max(-1, keepdim=True).values).float()
        positive = torch.multinomial(best, 1)[:, 0]
        if self.objective.name == "infonce":
            return ranking_losses.infonce(scores, positive, labels <= 0)
        teacher = grades / grades.max(-1, keepdim=True).values
        own = scores.gather(1, ids.clamp(min=0))
        divergence = ranking_losses.listwise_distillation(own, teacher / TEACHER_TEMPERATURE, mask)
        out = ranking_losses.false_negatives(teacher, ids, torch.arange(len(texts), device=ids.device))
        return divergence + INFONCE_SHARE * ranking_losses.infonce(INFONCE_SHARPER * scores, positive, ~out)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means of the metrics since the last time, over all processes, too."""
        for name, values in self.metrics.items():
            mean = torch.tensor(sum(values) / len(values), device=self.args.device)
            logs[name] = self.accelerator.gather(mean).mean().item()
        self.metrics.clear()
        super().log(logs, start_time)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Texts as lists, grades with padding: (B, n), its mask, and the ideal's grades, (B, m)."""
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
    """The ranking that scores stand for, as a model would print it; equal ones in the given order."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return " > ".join(f"[{i + 1}]" for i in order)
