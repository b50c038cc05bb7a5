"""GRPO with rlkit's parts and a plain PyTorch loop, to be read from top to bottom.

    python scripts/minimal.py --environment tests/toy.py:Vowels --tokens 8 --lr 1e-4

One process, one optimizer step for each batch of rollouts, no KL penalty. `rlkit train` does the same step
and adds what a run needs: several processes, vLLM, checkpoints and resuming, guards, evaluations, a report.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit import load_environment
from rlkit.errors import UserError
from rlkit.models.load import resolve
from rlkit.rollouts.local.engine import TransformersEngine
from rlkit.rollouts.local.generate import position_ids
from rlkit.rollouts.loop import Loop, RolloutLimits
from rlkit.rollouts.tokenize import eos_token_ids, tokenize
from rlkit.rollouts.types import Sampling
from rlkit.scoring import RewardRunner, load_rewards
from rlkit.training.step import (
    Batch,
    collate,
    group_advantages,
    mask_untrainable,
    sampled_tokens,
    weighted_totals,
)


def log_probs_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Log-probability of each completion token, (B, T)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # (B, P+T)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    # The logits at one position are those of the next token.
    T = batch["completion_ids"].size(1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), logits_to_keep=T + 1)
    log_probs = output.logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(2, batch["completion_ids"][:, :, None]).squeeze(2)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="bundled:smollm2-135m", help="Model: hub id, folder or bundled one."
    )
    parser.add_argument("--environment", default="math-v1", help="Environment: id or path/file.py:Class.")
    parser.add_argument("--steps", type=int, default=10, help="Number of optimizer steps.")
    parser.add_argument("--prompts", type=int, default=4, help="Number of tasks of a step.")
    parser.add_argument("--group", type=int, default=8, help="Number of rollouts of a task.")
    parser.add_argument("--tokens", type=int, default=64, help="Maximum number of tokens of a rollout.")
    parser.add_argument("--lr", type=float, default=1e-5, help="Learning rate.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the tasks and of sampling.")
    return parser.parse_args()


def main() -> None:
    """Train, and print the mean reward of each step."""
    options = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)

    environment = load_environment(options.environment)
    tasks = environment.tasks("train", options.prompts * options.steps, options.seed)
    rewards, weights = load_rewards(None, environment)  # those of the environment

    ends = eos_token_ids(model.generation_config.eos_token_id, tokenizer)
    limits = RolloutLimits(options.tokens, turns=environment.max_turns)
    loop = Loop(environment, tokenizer, limits, ends)
    engine = TransformersEngine(model, tokenizer)

    with RewardRunner(rewards, metric=environment.metric) as runner:
        for step in range(options.steps):
            # 1. Answer each task of the step `group` times: B = prompts * group rollouts.
            first = step * options.prompts
            batch_tasks = [tasks[first + i] for i in range(options.prompts) for _ in range(options.group)]
            prompt_ids = tokenize(tokenizer, [task["prompt"] for task in batch_tasks], **loop.template)
            sampling = Sampling(tuple(ends), tuple(environment.stop), key=(options.seed, step))
            model.eval()
            rollouts = loop(engine, sampling, batch_tasks, prompt_ids)

            # 2. Judge the answers. A rollout that cannot be judged is invalid: NaN, not 0.
            limit = {"max_length": options.tokens}
            rows = [
                task | rollout.columns() | limit for task, rollout in zip(batch_tasks, rollouts, strict=True)
            ]
            scores = runner(rows, options.group)
            values = torch.tensor(scores.values, dtype=torch.float32)  # (B, R)
            totals = weighted_totals(values, torch.tensor(weights))  # (B,)

            # 3. Compare the answers of each task with one another, and learn from what the model wrote.
            batch = collate(rollouts, pad_token_id=tokenizer.pad_token_id, device=device)
            invalid = torch.tensor([reason is not None for reason in scores.invalid])
            mask_untrainable(batch, rollouts, invalid, truncated=False)
            advantages = group_advantages(totals, options.group, "group").to(device)  # (B,)
            mask = sampled_tokens(batch)  # (B, T)
            model.train()
            # The policy that sampled is the one that learns: the importance ratio is 1, nothing is clipped.
            # Mean over the tokens of each rollout, then over rollouts, as in the paper.
            per_rollout = (log_probs_of(model, batch) * mask).sum(1) / mask.sum(1).clamp(min=1)  # (B,)
            loss = -(advantages * per_rollout).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            length = mask.sum(1).float().mean()
            print(f"step {step + 1}  reward {totals.nanmean():.3f}  length {length:.1f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"rlkit: {error}")
