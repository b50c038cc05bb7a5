"""CPU time until rlkit rejects a misspelled key, compared with the imports that used to come first.

Both sides run in fresh Python processes, alternately, `REPEATS` times; the minimum counts.

    python benchmarks/fast_mistakes.py
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "fast_mistakes.json"
REPEATS = 5
CONFIG = "configs/causal/smollm2.yaml"
MISTAKES = {
    "misspelt key": ["train", CONFIG, "--learning_rat", "1e-5"],
    "number out of range": ["train", CONFIG, "--num_generations", "0"],
    "unknown choice": ["train", CONFIG, "--vllm_mode", "colocat"],
    "misspelt key before several processes": ["train", CONFIG, "--accelerate", "ddp", "--learning_rat", "1"],
}


def cpu_seconds(command: list[str], code: int) -> float:
    """Run a command, check its exit code, and return its CPU seconds, including its children's."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(command, check=False, capture_output=True, env={**os.environ, "COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == code, process.stderr.decode()
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    """Measure both sides and write the result."""
    rlkit = [sys.executable, "-m", "rlkit"]
    commands = {name: ([*rlkit, *argv], 2) for name, argv in MISTAKES.items()}
    commands["rlkit train --help"] = ([*rlkit, "train", "--help"], 0)
    imports = "the imports of TRL and transformers"
    commands[imports] = ([sys.executable, "-c", "import rlkit.arguments.parse"], 0)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPEATS):  # alternately, so that other load on the machine affects all commands alike
        for name, (command, code) in commands.items():
            seconds[name].append(cpu_seconds(command, code))
    minimum = {name: round(min(values), 3) for name, values in seconds.items()}
    result = {
        "cpu_seconds": minimum,
        "share_of_the_imports": {
            name: round(value / minimum[imports], 4) for name, value in minimum.items() if name != imports
        },
        "repeats": REPEATS,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
