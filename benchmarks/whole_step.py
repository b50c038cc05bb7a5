"""Time of a complete GRPO step on causal queries with vLLM in the trainer's process, compared with TRL.

    python benchmarks/whole_step.py          # 15 minutes on two CPU cores; needs vLLM

All sides train the same model on the same tasks, each in a separate process, one after the other. TRL's
trainer samples with transformers, and then with vLLM. With vLLM on a CPU, rlkit sends TRL's weights, because
TRL's own weight transfer fails there. Completions are forced to one length, so that all sides do the same
work. The first step is a warm-up; the median of the others counts.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from rlkit import load_environment
from rlkit.models.bundled import bundled_path
from rlkit.models.cpu import tune_for_cpu
from rlkit.models.patches import replaced_vllm_generation
from rlkit.reward import as_trl_reward
from rlkit.runs.directory import RunDirectory
from rlkit.scoring import ErrorBudget, RewardRunner, load_rewards
from rlkit.training.grpo import GRPOTrainer
from rlkit.training.timing import PARTS

RESULT = Path(__file__).parent / "results" / "whole_step.json"
SIDES = {
    "trl": "TRL's trainer, transformers",
    "trl_vllm": "TRL's trainer, vLLM",
    "rlkit": "rlkit, transformers",
    "rlkit_vllm": "rlkit, vLLM",
}
CPU = not torch.cuda.is_available()


class Steps(TrainerCallback):
    """Callback that measures the seconds of each step, from its batch to the end of its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def settings(side: str, options: argparse.Namespace, folder: str) -> trl.GRPOConfig:
    vllm = side.endswith("vllm")
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=CPU,
        bf16=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=options.prompts // 2,
        num_generations=8,
        max_completion_length=options.tokens,
        generation_kwargs={"min_tokens" if vllm else "min_new_tokens": options.tokens},
        use_vllm=vllm,
        vllm_mode="colocate",
        vllm_max_model_length=1024,
        vllm_gpu_memory_utilization=0.3,
        max_steps=options.steps + 1,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-6,
        loss_type="dapo",
    )


def synced_vllm(**settings: Any) -> Any:
    """Create rlkit's vLLM for TRL's trainer: TRL's own does not receive the weights on a CPU."""
    from rlkit.rollouts.vllm.in_process import SyncedVLLM

    return SyncedVLLM(**settings)


def make_trainer(side: str, args: trl.GRPOConfig) -> Any:
    path = bundled_path("bundled:smollm2-135m")
    environment = load_environment(
        "causal-v1", level="intervention", num_nodes=3, max_in_degree=1, prompt_style="short"
    )
    rewards, args.reward_weights = load_rewards(None, environment)
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        "args": args,
        "train_dataset": environment.tasks("train", 256),
        "processing_class": AutoTokenizer.from_pretrained(path, padding_side="left"),
    }
    if side.startswith("trl"):
        functions = [as_trl_reward(reward, name) for name, reward in rewards.items()]
        with replaced_vllm_generation(synced_vllm) if CPU else nullcontext():
            return trl.GRPOTrainer(reward_funcs=functions, **common)
    folder = Path(str(args.output_dir))
    (folder / "rollouts").mkdir()
    return GRPOTrainer(
        environment=environment,
        runner=RewardRunner(rewards, metric=environment.metric),
        budget=ErrorBudget(),
        run_dir=RunDirectory(folder, "train"),
        **common,
    )


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds of a step, and for rlkit the median seconds of its parts."""
    if side.startswith("rlkit") and CPU:
        tune_for_cpu()
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(side, settings(side, options, folder))
        trainer.add_callback(steps)
        trainer.train()
        logged = [line for line in trainer.state.log_history if "completions/mean_length" in line]
        if side.startswith("rlkit"):
            trainer.run_dir.flush()
            trainer.runner.close()
        if side.endswith("vllm") and CPU:
            trainer.vllm_generation.close()
    lengths = {line["completions/mean_length"] for line in logged}
    assert lengths == {options.tokens}, f"completions of {lengths} tokens"
    parts = {
        part: round(statistics.median(line[f"time/{part}"] for line in logged[1:]), 3)
        for part in PARTS
        if f"time/{part}" in logged[-1]
    }
    return {"step_s": round(statistics.median(steps.seconds[1:]), 2), **({"parts_s": parts} if parts else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="steps after the warm-up")
    parser.add_argument("--prompts", type=int, default=8, help="prompts per step, with 8 rollouts each")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per completion")
    parser.add_argument("--side", choices=SIDES, help="measure one side only and write it to --out")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.side:
        options.out.write_text(json.dumps(measure(options.side, options)))
        return
    measured = {}
    for side in SIDES:
        with tempfile.NamedTemporaryFile() as file:
            command = [sys.executable, __file__, "--side", side, "--out", file.name, "--steps", options.steps]
            command += ["--prompts", options.prompts, "--tokens", options.tokens]
            subprocess.run(
                list(map(str, command)), check=True, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
            )
            measured[side] = json.loads(Path(file.name).read_text())
        print(side, measured[side], flush=True)
    seconds = {side: result["step_s"] for side, result in measured.items()}
    result = {
        "what": f"causal-v1, short prompts, {options.prompts} x 8 rollouts of {options.tokens} tokens",
        "model": "SmolLM2-135M, float32 weights, bfloat16 arithmetic",
        "device": f"{torch.get_num_threads()} CPU threads" if CPU else torch.cuda.get_device_name(),
        "platform": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl")},
        "sides": {side: {"what": SIDES[side], **side_result} for side, side_result in measured.items()},
        "ratio_to_trl": round(seconds["trl"] / seconds["rlkit_vllm"], 2),
        "ratio_to_trl_vllm": round(seconds["trl_vllm"] / seconds["rlkit_vllm"], 2),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
