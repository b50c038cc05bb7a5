"""The estimator of the policy gradient against a loop over rankings and ranks, as it is written down.

1,000 documents, the first 10 ranks, 32 rankings: drawing them, the loss, and the gradient of the scores, for
a batch of queries as in training, and for a single one. The loop takes one query after the other.

    python benchmarks/plackett_luce.py
"""

import json
import time
from pathlib import Path

import torch

from rlkit.training.ranking.plackett_luce import PlackettLuce, policy_gradient_loss, utility_by_position

RESULT = Path(__file__).parent / "results" / "plackett_luce.json"
QUERIES, DOCUMENTS, CUTOFF, RANKINGS, REPEATS = 16, 1000, 10, 32, 20


def ours(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    policy = PlackettLuce(scores)
    rankings = policy.sample(RANKINGS, CUTOFF)
    utility = utility_by_position("ndcg", rankings, grades)
    return policy_gradient_loss(policy.log_prob(rankings), utility).sum()


def loop(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    return torch.stack([loop_over_ranks(*one) for one in zip(scores, grades, strict=True)]).sum()


def loop_over_ranks(scores: torch.Tensor, grades: torch.Tensor) -> torch.Tensor:
    """Draw one document after the other; the same estimate, placement with leave-one-out."""
    best = grades.sort(descending=True).values[:CUTOFF]
    ideal = sum(grade / torch.log2(torch.tensor(rank + 2.0)) for rank, grade in enumerate(best))
    log_probs, gained = [], []
    for _ in range(RANKINGS):
        left = torch.ones(DOCUMENTS, dtype=torch.bool)
        chosen_log_probs, rewards = [], []
        for rank in range(CUTOFF):
            log_softmax = scores.masked_fill(~left, -torch.inf).log_softmax(-1)
            chosen = torch.multinomial(log_softmax.detach().exp(), 1)[0]
            chosen_log_probs.append(log_softmax[chosen])
            rewards.append(grades[chosen] / torch.log2(torch.tensor(rank + 2.0)) / ideal)
            left[chosen] = False
        log_probs.append(torch.stack(chosen_log_probs))
        gained.append(torch.stack([sum(rewards[rank:]) for rank in range(CUTOFF)]))
    all_gained = torch.stack(gained)
    advantages = (all_gained - all_gained.mean(0)) * RANKINGS / (RANKINGS - 1)
    return -(torch.stack(log_probs) * advantages).sum(-1).mean()


def seconds(estimate, scores: torch.Tensor, grades: torch.Tensor, repeats: int) -> float:
    """Of one estimate with its gradient, the median."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        estimate(scores.detach().requires_grad_(), grades).backward()
        found.append(time.perf_counter() - start)
    return sorted(found)[repeats // 2]


def measure(queries: int) -> dict[str, float]:
    """Milliseconds a query, and the ratio."""
    scores = torch.randn(queries, DOCUMENTS)
    grades = (torch.rand(queries, DOCUMENTS) < 0.02).float()
    seconds(ours, scores, grades, 3)
    times = {name: seconds(f, scores, grades, REPEATS) for name, f in (("ours", ours), ("loop", loop))}
    found = {f"{name}_ms_a_query": round(1000 * value / queries, 2) for name, value in times.items()}
    return found | {"ratio": round(times["loop"] / times["ours"], 1)}


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
