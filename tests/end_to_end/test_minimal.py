"""`scripts/minimal.py`: the smallest GRPO run, assembled from the parts of `rlkit train`."""

import re
import subprocess
import sys

from tests.quick import ROOT, TOY

SCRIPT = ROOT / "scripts" / "minimal.py"


def test_minimal_script_is_short_and_does_not_use_the_session():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 150
    assert not re.search(r"session|guards|vllm\b|import trl|from trl", text.partition('"""\n\n')[2])


def test_minimal_script_learns_to_write_vowels(tiny_folder):
    """The reward is the fraction of vowels, for a random model 5 of 97 characters."""
    options = {"model": tiny_folder, "environment": f"{TOY}:Vowels", "tokens": 8, "lr": 1e-2}
    options |= {"steps": 30, "prompts": 4, "group": 8}
    argv = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rewards = [float(reward) for reward in re.findall(r"^step \d+  reward (\S+)", result.stdout, re.M)]
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8
