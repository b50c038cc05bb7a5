"""Keys of a quick run of the toy environment on a CPU, which tests of whole runs build upon."""

from pathlib import Path

TOY = str(Path(__file__).parent / "toy.py")
QUICK = {
    "environment": f"{TOY}:Even",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
