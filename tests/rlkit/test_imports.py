"""Who may know whom: rewards nothing of ours, environments no torch, rlkit neither of them by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file):
    """Top-level packages that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(module_name(file).partition(".")[0] if node.level else node.module.partition(".")[0])
    return names


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_environments_and_rewards_import_without_torch():
    names = [module_name(file) for package in ("envs", "rewards") for file in modules(package)]
    code = "import sys, importlib; sys.modules['torch'] = None\n"
    code += f"for name in {names}: importlib.import_module(name)"
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["rlkit", "rlkit.cli", "rlkit.train", "rlkit.sft", "rlkit.rewarding.worker"])
def test_rlkit_starts_without_torch(name):
    heavy = "('torch', 'transformers', 'trl')"
    result = run(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_rlkit_imports_no_environment_and_no_reward():
    guilty = [str(file) for file in modules("rlkit") if imported(file) & {"envs", "rewards", "tests"}]
    assert not guilty


def test_rewards_import_nothing_of_ours():
    guilty = [str(file) for file in modules("rewards") if imported(file) & {"rlkit", "envs", "torch"}]
    assert not guilty


def test_environments_know_only_what_they_may():
    for file in modules("envs"):
        tree = ast.parse(file.read_text())
        from_rlkit = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        from_rlkit = {name for name in from_rlkit if name.partition(".")[0] == "rlkit"}
        # A simulated engine, and what says what a tree's nodes are about, write with the models and engines
        # that sample rollouts.
        writing = {"rlkit.rollouts.writing"} if file.name in ("simulated.py", "summaries.py") else set()
        # A dense engine's encoder may be a bundled one.
        bundled = {"rlkit.bundled"} if file.name == "dense.py" else set()
        assert from_rlkit <= {"rlkit.environment", "rlkit.errors"} | writing | bundled, file
