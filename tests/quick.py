"""Where things are, and the keys of a quick run of the toy environment on a CPU."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"  # real data, in some checkouts
TOY = str(ROOT / "tests" / "toy.py")
QUICK = {
    "environment": f"{TOY}:Even",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
QUICK_GRPO = QUICK | {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "evaluation_tasks": 4,
}
