"""Speed of the vectorized policy gradient estimator, compared with a literal loop over rankings and ranks.

The script times sampling, the loss and the gradient of the scores, for 32 rankings of 1,000 documents with
ten ranks each. It does so for a batch of queries, as in training, and for a single query.

    python benchmarks/plackett_luce.py
"""

import json
import time
from pathlib import Path

import torch

from rlkit.training.ranking.plackett_luce import PlackettLuce, policy_gradient_loss, utility_by_position

RESULT = Path(__file__).parent / "results" / "plackett_luce.json"
QUERIES, DOCUMENTS, CUTOFF, RANKINGS, REPEATS = 16, 1000, 10, 32, 20


def vectorized(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    policy = PlackettLuce(scores)
    rankings = policy.sample(RANKINGS, CUTOFF)
    utility = utility_by_position("ndcg", rankings, grades)
    return policy_gradient_loss(policy.log_prob(rankings), utility).sum()


def loop(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    losses = []
    for query_scores, query_grades in zip(scores, grades, strict=True):
        losses.append(loop_over_ranks(query_scores, query_grades))
    return torch.stack(losses).sum()


def loop_over_ranks(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Return the same loss for one query, with leave-one-out baselines, from documents drawn one by one."""
    best = grades.sort(descending=True).values[:CUTOFF]
    ideal = sum(grade / torch.log2(torch.tensor(rank + 2.0)) for rank, grade in enumerate(best))
    log_probs, returns = [], []
    for _ in range(RANKINGS):
        available = torch.ones(DOCUMENTS, dtype=torch.bool)
        chosen_log_probs, rewards = [], []
        for rank in range(CUTOFF):
            log_softmax = scores.masked_fill(~available, -torch.inf).log_softmax(-1)
            chosen = torch.multinomial(log_softmax.detach().exp(), 1)[0]
            chosen_log_probs.append(log_softmax[chosen])
            rewards.append(grades[chosen] / torch.log2(torch.tensor(rank + 2.0)) / ideal)
            available[chosen] = False
        log_probs.append(torch.stack(chosen_log_probs))
        returns.append(torch.stack([sum(rewards[rank:]) for rank in range(CUTOFF)]))
    all_returns = torch.stack(returns)
    # Leave-one-out: x_i - mean of the others = (x_i - mean of all R) * R / (R - 1).
    advantages = (all_returns - all_returns.mean(0)) * RANKINGS / (RANKINGS - 1)
    return -(torch.stack(log_probs) * advantages).sum(-1).mean()


def seconds(estimate, scores: torch.Tensor, grades: torch.Tensor, repeats: int) -> float:
    """Return the median seconds of an estimate with its gradient."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        estimate(scores.detach().requires_grad_(), grades).backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def measure(queries: int) -> dict[str, float]:
    """Return milliseconds per query of both estimators, and their ratio."""
    scores = torch.randn(queries, DOCUMENTS)
    grades = (torch.rand(queries, DOCUMENTS) < 0.02).float()
    seconds(vectorized, scores, grades, 3)  # warm-up
    estimators = {"ours": vectorized, "loop": loop}
    times = {name: seconds(estimate, scores, grades, REPEATS) for name, estimate in estimators.items()}
    result = {f"{name}_ms_a_query": round(1000 * value / queries, 2) for name, value in times.items()}
    return result | {"ratio": round(times["loop"] / times["ours"], 1)}


def main() -> None:
    torch.manual_seed(0)
    result = {
        "documents": DOCUMENTS,
        "cutoff": CUTOFF,
        "rankings": RANKINGS,
        "target_ratio": 20,
        f"batch of {QUERIES}": measure(QUERIES),
        "one query": measure(1),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
