"""Commands print what rlkit has to say, and warnings to act on; bars and notices of libraries are hidden."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.quick import QUICK, ROOT

OURS = (
    r"rlkit: .+",
    r"evaluating (before|after) .*100% \d:\d\d:\d\d",
    r"step \d+/\d+  .+  ETA \d+:\d\d",
    r"even on 4 held-out test tasks: .+ \(paired permutation p = .+\)",
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
def lines(tmp_path, tiny_folder):
    """Run a training command in a process of its own and return its lines on stdout and stderr."""

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


def foreign(lines):
    """The lines that are not rlkit's."""
    return [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in OURS)]


def test_sft_prints_only_lines_of_rlkit(lines, tmp_path):
    assert foreign(lines("sft", {})) == []
    assert (tmp_path / "sft" / "checkpoint-1").is_dir()
    assert not (tmp_path / "sft" / "README.md").exists()


def test_train_prints_only_lines_of_rlkit_and_its_warning(lines, tmp_path):
    printed = lines("train", {}, **GRPO)
    assert foreign(printed) == []
    assert [line for line in printed if line.startswith("rlkit: with num_generations 2")]
    assert not (tmp_path / "train" / "README.md").exists()


def test_debug_shows_bars_and_notices_of_libraries(lines):
    text = "\n".join(foreign(lines("sft", {"RLKIT_LOG_LEVEL": "debug"})))
    for shown in ("Loading weights", "Writing model shards", "Tokenizing train dataset", "PAD/BOS/EOS"):
        assert shown in text
