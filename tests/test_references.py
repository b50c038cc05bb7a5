"""Names and paths in pages, docstrings, comments and messages exist."""

import ast
import re
import subprocess
from functools import cache

from tests.quick import ROOT

TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
).stdout.splitlines()
PAGES = [
    name for name in TRACKED if name.endswith((".py", ".md", ".yaml")) and not name.startswith("CHANGELOG")
]
NAME = re.compile(r"(?<![\w./-])rlkit((?:\.[A-Za-z]\w*)+)")
FOLDERS = "rlkit|envs|rewards|scripts|configs|tests|benchmarks"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|json))`")
IMPORT = re.compile(r"\bfrom (rlkit[.\w]*) import ([\w, ]+)")
# A file, the manifest of a checkpoint.
NOT_NAMES = {"rlkit.json"}


@cache
def defined_names(module):
    """Return the names that a module or its classes define or import; None if there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not path.is_file():
        return None
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def exists(name):
    """Return whether a dotted name is a module, or a name in a module or class."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        names = defined_names(".".join(parts[:i]))
        if names is not None:
            return all(part in names for part in parts[i:])
    return False


def test_dotted_names_exist():
    missing = []
    for page in PAGES:
        names = {f"rlkit{match}" for match in NAME.findall((ROOT / page).read_text())} - NOT_NAMES
        missing += [f"{page}: {name}" for name in sorted(names) if not exists(name)]
    assert missing == []


def test_paths_exist():
    missing = []
    for page in PAGES:
        if page.endswith(".md"):
            paths = set(PATH.findall((ROOT / page).read_text()))
            missing += [f"{page}: {path}" for path in sorted(paths) if not (ROOT / path).exists()]
    assert missing == []


def test_imports_exist():
    """Imports include those in functions and strings, and those of scripts and benchmarks without a test."""
    missing = []
    for page in PAGES:
        if not page.endswith(".py"):
            continue
        tree = ast.parse((ROOT / page).read_text())
        imported = [
            f"{node.module}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for module, names in IMPORT.findall(node.value):
                    imported += [f"{module}.{name.strip()}" for name in names.split(",")]
        missing += [f"{page}: {name}" for name in imported if name.startswith("rlkit.") and not exists(name)]
    assert missing == []
