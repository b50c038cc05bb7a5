"""GRPO in a plain PyTorch loop with rlkit's components, to read from top to bottom.

    python scripts/minimal.py --environment tests/toy.py:Vowels --tokens 8 --lr 1e-4

It runs in one process, with one optimizer step per batch of rollouts and no KL penalty. `rlkit train` does
the same step and adds multiple processes, vLLM, checkpoints and resuming, guards, evaluations and a report.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkit import load_environment
from rlkit.errors import UserError
from rlkit.models.names import resolve
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
    loss_mask,
    mask_untrainable,
    weighted_totals,
)


def log_probs_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the log-probability of each completion token, (B, T)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # (B, P+T)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    # The logits at a position predict the next token, so keep one more position and drop the last logits.
    T = batch["completion_ids"].size(1)
    output = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), logits_to_keep=T + 1)
    log_probs = output.logits[:, :-1].float().log_softmax(-1)
    return log_probs.gather(2, batch["completion_ids"][:, :, None]).squeeze(2)


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="bundled:smollm2-135m", help="Model: hub id, folder or bundled:NAME."
    )
    parser.add_argument("--environment", default="math-v1", help="Environment: id or path/file.py:Class.")
    parser.add_argument("--steps", type=int, default=10, help="Number of optimizer steps.")
    parser.add_argument("--prompts", type=int, default=4, help="Number of tasks per step.")
    parser.add_argument("--group", type=int, default=8, help="Number of rollouts per task.")
    parser.add_argument("--tokens", type=int, default=64, help="Maximum number of tokens per rollout.")
    parser.add_argument("--lr", type=float, default=1e-5, help="Learning rate.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the tasks and of sampling.")
    return parser.parse_args()


def main() -> None:
    """Train, and print the mean reward and completion length of each step."""
    options = parse_options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)

    environment = load_environment(options.environment)
    tasks = environment.tasks("train", options.prompts * options.steps, options.seed)
    rewards, weights = load_rewards(None, environment)  # None: the environment's defaults

    eos_ids = eos_token_ids(model.generation_config.eos_token_id, tokenizer)
    limits = RolloutLimits(options.tokens, max_turns=environment.max_turns)
    loop = Loop(environment, tokenizer, limits, eos_ids)
    engine = TransformersEngine(model, tokenizer)

    with RewardRunner(rewards, metric=environment.metric) as runner:
        for step in range(options.steps):
            # 1. Sample `group` rollouts for each task of the step: B = prompts * group rollouts.
            first = step * options.prompts
            batch_tasks = [tasks[first + i] for i in range(options.prompts) for _ in range(options.group)]
            prompt_ids = tokenize(tokenizer, [task["prompt"] for task in batch_tasks], **loop.template)
            sampling = Sampling(tuple(eos_ids), tuple(environment.stop), key=(options.seed, step))
            model.eval()
            rollouts = loop(engine, sampling, batch_tasks, prompt_ids)

            # 2. Score the rollouts. If a reward fails, the rollout is invalid: its reward is NaN, not 0.
            limits_column = {"max_length": options.tokens}  # some length rewards read it
            rows = []
            for task, rollout in zip(batch_tasks, rollouts, strict=True):
                rows.append(task | rollout.columns() | limits_column)
            scores = runner(rows, options.group)
            values = torch.tensor(scores.values, dtype=torch.float32)  # (B, R)
            totals = weighted_totals(values, torch.tensor(weights))  # (B,)

            # 3. Compare the rollouts of each task, and train on the tokens that the model sampled.
            batch = collate(rollouts, pad_token_id=tokenizer.pad_token_id, device=device)
            invalid = torch.tensor([reason is not None for reason in scores.invalid])
            mask_untrainable(batch, rollouts, invalid, mask_truncated=False)
            advantages = group_advantages(totals, options.group, "group").to(device)  # (B,)
            mask = loss_mask(batch)  # (B, T)
            model.train()
            # One optimizer step per batch is on-policy: the importance ratio is 1, and nothing is clipped.
            # GRPO's loss is a mean over the tokens of each rollout, then over rollouts.
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
