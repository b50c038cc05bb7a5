"""Commands print rlkit's own lines, and hide the progress bars and notices of libraries."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.quick import QUICK, ROOT

RLKIT_LINES = (
    r"rlkit: .+",
    r"evaluating (before|after) .*100% \d:\d\d:\d\d",
    r"step \d+/\d+  .+  ETA \d+:\d\d",
    r"even on 4 held-out test tasks: .+ \(paired permutation p = .+\)",
    r"even by vowel: training did not measurably change False \(.+, n = 3\), True \(.+, n = 1\)\.",
    r"(model: |report:) \S+",
)
KEYS = QUICK | {
    "model_name_or_path": None,
    "num_tasks": 8,
    "evaluation_tasks": 4,
    "max_completion_length": 4,
    "per_device_train_batch_size": 2,
    "gradient_checkpointing": False,
    "max_steps": 1,
    "save_steps": 1,
}
GRPO = {"num_generations": 2}


@pytest.fixture
def run_lines(tmp_path, tiny_folder):
    """Return a function that runs a training command in a process and returns its stdout and stderr lines."""

    def run(command, variables, **keys):
        path = tmp_path / f"{command}.yaml"
        folder = str(tmp_path / command)
        path.write_text(
            yaml.safe_dump(KEYS | keys | {"model_name_or_path": tiny_folder, "output_dir": folder})
        )
        environment = {name: value for name, value in os.environ.items() if name != "RLKIT_LOG_LEVEL"}
        result = subprocess.run(
            [sys.executable, "-m", "rlkit", command, str(path)],
            cwd=ROOT,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return re.split(r"[\r\n]+", (result.stdout + result.stderr).strip())

    return run


def library_lines(lines):
    """Return the lines that rlkit did not print."""
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in RLKIT_LINES)]


def test_sft_prints_only_lines_of_rlkit(run_lines, tmp_path):
    assert library_lines(run_lines("sft", {})) == []
    assert (tmp_path / "sft" / "checkpoint-1").is_dir()
    assert not (tmp_path / "sft" / "README.md").exists()


def test_train_prints_only_lines_of_rlkit_and_its_warning(run_lines, tmp_path):
    lines = run_lines("train", {}, **GRPO)
    assert library_lines(lines) == []
    assert [line for line in lines if line.startswith("rlkit: with num_generations 2")]
    assert not (tmp_path / "train" / "README.md").exists()


def test_debug_level_shows_output_of_libraries(run_lines):
    text = "\n".join(library_lines(run_lines("sft", {"RLKIT_LOG_LEVEL": "debug"})))
    for message in ("Loading weights", "Writing model shards", "Tokenizing train dataset", "PAD/BOS/EOS"):
        assert message in text
