"""Accuracy of the memory that `rlkit train --dry_run` predicts, compared with the measured peak on a CPU.

The script trains two small models: the bundled one, and one of 18 million parameters with its vocabulary. The
measured value is the peak resident memory minus the resident memory before the model was loaded.

    python benchmarks/memory_plan.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlkit.arguments.parse import parse_train
from rlkit.models.memory import Sharding, estimate_memory
from rlkit.models.names import resolve
from rlkit.rollouts.tokenize import tokenize
from rlkit.training.plan import largest_micro_batch
from rlkit.training.session import make_environment

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "memory_plan.json"
BUNDLED = "bundled:smollm2-135m"
SMALL = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 704}
SMALL |= {"num_key_value_heads": 2, "head_dim": 64}
CASES = {  # name: (model, rollouts, maximum completion length, further options)
    "bundled, 64 rollouts": (BUNDLED, 64, 28, []),
    "bundled, 16 rollouts": (BUNDLED, 16, 28, []),
    "bundled, 16 rollouts, LoRA": (BUNDLED, 16, 28, ["--use_peft", "true"]),
    "bundled, 32 rollouts, checkpointing": (BUNDLED, 32, 28, ["--gradient_checkpointing", "true"]),
    "small, 64 rollouts": ("small", 64, 28, []),
    "small, 16 rollouts": ("small", 16, 28, []),
    "small, 64 rollouts, float32": ("small", 64, 28, ["--bf16", "false"]),
    "small, 32 rollouts of 100 tokens": ("small", 32, 100, []),
}
# Short answers to prompts of one length, so that the script is fast.
TASKS = {"level": "intervention", "num_nodes": 3, "max_in_degree": 1, "prompt_style": "short"}
COMMON = ["--max_steps", "3", "--evaluation_tasks", "0", "--save_strategy", "no", "--report_to", "none"]
COMMON += ["--environment_args", json.dumps(TASKS), "--gradient_accumulation_steps", "1"]
# Trains in a separate process, and prints its peak memory minus the memory before the model was loaded.
TRAIN = """
import sys
import rlkit.training.train as training
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
load = training.load_model
before = []
def load_model(*args, **kwargs):
    before.append(status("VmRSS"))
    return load(*args, **kwargs)
training.load_model = load_model
from rlkit.commands.train import main
main(sys.argv[1:])
print("measured", status("VmHWM") - before[0])
"""


def save_small(folder: Path) -> None:
    config = AutoConfig.from_pretrained(resolve(BUNDLED))
    for key, value in SMALL.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(BUNDLED)).save_pretrained(folder)


def measure(argv: list[str]) -> int:
    """Return the measured peak memory of a training run, in bytes."""
    command = [sys.executable, "-c", TRAIN, *argv]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(process.stdout.split("measured")[1])


def predict(argv: list[str], *, on_cpu: bool = True) -> float:
    """Return the predicted peak memory of a training run, in bytes."""
    run = parse_train(argv)
    tasks = make_environment(run.args).tasks("train", 32, run.trainer_args.seed)
    name = resolve(run.model_args.model_name_or_path)
    lengths = [len(ids) for ids in tokenize(AutoTokenizer.from_pretrained(name), tasks["prompt"])]
    config = AutoConfig.from_pretrained(name)
    shape = largest_micro_batch(run, lengths)
    return estimate_memory(run, config, shape, Sharding(), on_cpu=on_cpu).peak_bytes


def main() -> None:
    config = str(ROOT / "configs" / "causal" / "smollm2.yaml")
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        save_small(Path(temporary) / "small")
        for name, (model, rollouts, length, extra) in CASES.items():
            path = str(Path(temporary) / "small") if model == "small" else model
            paths = ["--model_name_or_path", path, "--output_dir", f"{temporary}/run", "--overwrite", "true"]
            shape = ["--per_device_train_batch_size", str(rollouts), "--max_completion_length", str(length)]
            argv = [config, *COMMON, *paths, *shape, *extra]
            measured, predicted = measure(argv), predict(argv)
            result[name] = {
                "measured_mib": measured >> 20,
                "predicted_mib": int(predicted) >> 20,
                "ratio": round(predicted / measured, 3),
            }
            print(name, result[name], flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
