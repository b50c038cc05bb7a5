"""`scripts/minimal.py`: the smallest GRPO run, with the parts that `rlkit train` is made of."""

import re
import subprocess
import sys

from tests.quick import ROOT, TOY

SCRIPT = ROOT / "scripts" / "minimal.py"


def test_minimal_run_is_short_and_needs_no_session():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 150
    assert not re.search(r"session|guards|vllm\b|import trl|from trl", text.partition('"""\n\n')[2])


def test_minimal_run_learns_to_write_vowels(tiny_folder):
    """The reward is the share of vowels, 5 of 97 characters for a random model."""
    options = {"model": tiny_folder, "environment": f"{TOY}:Vowels", "tokens": 8, "lr": 1e-2}
    options |= {"steps": 30, "prompts": 4, "group": 8}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rewards = [float(reward) for reward in re.findall(r"^step \d+  reward (\S+)", result.stdout, re.M)]
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8
