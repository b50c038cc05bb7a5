"""Fixtures of reports: run directories with synthetic numbers like a real run's, and a browser."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright

from rlkit.evaluation import Evaluation, accuracy_interval

LEVELS = ("association", "intervention", "counterfactual")
SIZES = (3, 4, 5, 6, 8)


def write_run(
    path: Path,
    *,
    steps: int = 40,
    evaluations: tuple[str, ...] = ("before", "after"),
    rollouts: int = 4,
    tasks: int = 60,
    gain: float = 0.5,
    completion: str = "So the answer is {}.",
    seed: int = 0,
    metric: str = "correct",
    objective: str | None = None,
) -> Path:
    """Write a run directory.

    Args:
        path: Path of the directory.
        steps: Number of training steps.
        evaluations: Names of the evaluations.
        rollouts: Number of rollouts per step.
        tasks: Number of held-out tasks.
        gain: Increase of the metric over training.
        completion: Template of the completion of every rollout.
        seed: Seed of the numbers.
        metric: Name of the environment's metric.
        objective: Objective of `rlkit rank`; None writes a run of `rlkit train` after a warm start.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        "environment: causal-v1\nenvironment_args: {num_nodes: 10}\nalgorithm: grpo\n"
        "model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct\nlearning_rate: 1.0e-6\nnum_generations: 8\n"
        "hub_token: hf_very_secret\neos_token: </s>\n"
    )
    if objective is not None:
        config = (path / "config.yaml").read_text()
        (path / "config.yaml").write_text(config.replace("algorithm: grpo", f"objective: {objective}"))
        lines = [ranking_line(step) for step in range(1, steps + 1)]
        rollouts = 0
    else:
        lines = [
            {"step": i, "stage": "sft", "seconds": 3.0 * i, "loss": 2 * 0.8**i + 0.3} for i in range(1, 11)
        ]
        lines += [training_line(step, steps, gain, metric, rng) for step in range(1, steps + 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in evaluations:
        rate = 0.15 + gain * {"before": 0, "warm-start": 0.3, "after": 1}.get(name, 0.7)
        write_evaluation(
            path / "evaluation" / f"{name}.json", rate, tasks, completion, metric=metric, rng=rng
        )
    if rollouts:
        chances = 0.15 + gain * np.linspace(0, 1, steps)
        write_rollouts(path / "rollouts", chances, rollouts, completion, metric=metric, rng=rng)
    return path


def ranking_line(step):
    numbers = {"loss": -0.1, "grad_norm": 1.0, "learning_rate": 1e-3, "utility": 0.5 + step / 1000}
    return {"step": step, "stage": "rank", "seconds": 2.0 * step, **numbers}


def training_line(step, steps, gain, metric, rng):
    progress = 1 - np.exp(-3 * step / steps)
    noise = rng.normal(0, 0.04, 8)
    correct = float(np.clip(0.15 + gain * progress + noise[0], 0, 1))
    layout = float(np.clip(0.5 + 0.48 * progress + noise[1], 0, 1))
    return {
        "step": step,
        "stage": "train",
        "seconds": 40 + 31.0 * step,
        "reward": 0.8 * correct + 0.2 * layout,
        "reward_std": 0.3,
        f"rewards/{metric}/mean": correct,
        f"rewards/{metric}/std": 0.4,
        f"rewards/{metric}/error_rate": 0.01 if step % 17 == 0 else 0.0,
        "rewards/format/mean": layout,
        "completions/mean_length": 400 - 150 * progress + 300 * noise[2],
        "completions/clipped_ratio": max(0, 0.2 - 0.2 * progress + noise[3] / 4),
        "frac_reward_zero_std": float(np.clip(0.1 + 0.4 * progress + noise[4], 0, 1)),
        "entropy": 1.1 * np.exp(-2 * step / steps) + 0.1 + noise[5] / 5,
        "loss": noise[6] / 10,
        "grad_norm": 0.4 + abs(noise[7]) * 4,
        "learning_rate": 1e-6 * (1 - step / steps),
    }


def write_evaluation(path, rate, tasks, completion, *, metric, rng):
    level = [LEVELS[i % len(LEVELS)] for i in range(tasks)]
    size = [SIZES[i % len(SIZES)] for i in range(tasks)]
    chance = [np.clip(rate + 0.1 * (1 - i % 3) - 0.03 * (i % 5 - 2), 0.02, 0.98) for i in range(tasks)]
    score = (rng.random(tasks) < chance).astype(float)
    frame = pd.DataFrame({"level": level, "relevant_size": size, "score": score})
    Evaluation(
        name=path.stem,
        model="Qwen/Qwen2.5-0.5B-Instruct",
        environment="causal-v1",
        environment_args={"num_nodes": 10},
        split="test",
        seed=0,
        temperature=0.0,
        samples=1,
        metric=metric,
        accuracy=accuracy_interval(score),
        pass_at={},
        avg_at={},
        rewards={metric: float(score.mean()), "format": 0.9},
        length=310.0,
        truncated=0.02,
        invalid=0,
        breakdown={
            column: {str(v): accuracy_interval(part["score"]) for v, part in frame.groupby(column)}
            for column in ("level", "relevant_size")
        },
        scores={f"task-{i}": [float(s)] for i, s in enumerate(score)},
        completions=[
            {
                "task_id": f"task-{i}",
                "prompt": f"Given the network, what is P(X{i} | do(X2 = 1))? "
                + "Node X1 has two parents. " * 20,
                "completion": completion.format(i),
                "answer": f"0.{i}",
                "score": float(score[i]),
                "invalid": None,
                "length": 300,
                "level": level[i],
                "relevant_size": size[i],
            }
            for i in range(tasks)
        ],
    ).save(path)


def write_rollouts(folder, chances, per_step, completion, *, metric, rng):
    folder.mkdir()
    for step, chance in enumerate(chances, start=1):
        correct = (rng.random(per_step) < chance).astype(float)
        pd.DataFrame(
            {
                "step": step,
                "task_id": [f"train-{step}-{i // 2}" for i in range(per_step)],
                "prompt": f"Question of step {step}: what is P(X3 | X1 = 0)?",
                "completion": [completion.format(i) for i in range(per_step)],
                "answer": "0.25",
                "reward": correct,
                "advantage": correct - correct.mean(),
                "length": rng.integers(50, 500, per_step),
                "truncated": [False] * (per_step - 1) + [step == 2],
                "invalid": [None] * (per_step - 1) + ["reward timed out" if step == 3 else None],
                f"rewards/{metric}": correct,
                "rewards/format": 1.0,
                "level": "association",
            }
        ).to_parquet(folder / f"step-{step:06}.parquet")


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a named run directory with the options of `write_run`."""
    return lambda name="causal-grpo", **options: write_run(tmp_path / name, **options)


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens a file offline; at teardown, any error of the page fails the test."""
    context = browser.new_context(offline=True)
    errors = []

    def open_file(path):
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request", lambda request: errors.append(request.url) if "file://" not in request.url else None
        )
        page.goto(path.as_uri())
        return page

    yield open_file
    context.close()
    assert errors == []
