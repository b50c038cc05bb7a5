"""Names and paths that documentation mentions exist: pages, docstrings, comments and messages."""

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
# The manifest of a checkpoint, a file.
NOT_NAMES = {"rlkit.json"}


@cache
def defined(module):
    """The names that a module defines or imports, and the attributes of its classes; None for no module."""
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
    """Whether a dotted name is a module, or what its module or class has."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        names = defined(".".join(parts[:i]))
        if names is not None:
            return all(part in names for part in parts[i:])
    return False


def test_names_of_ours_exist():
    guilty = []
    for page in PAGES:
        names = {f"rlkit{match}" for match in NAME.findall((ROOT / page).read_text())} - NOT_NAMES
        guilty += [f"{page}: {name}" for name in sorted(names) if not exists(name)]
    assert guilty == []


def test_paths_of_ours_exist():
    guilty = []
    for page in PAGES:
        if page.endswith(".md"):
            paths = set(PATH.findall((ROOT / page).read_text()))
            guilty += [f"{page}: {path}" for path in sorted(paths) if not (ROOT / path).exists()]
    assert guilty == []


def test_imports_of_ours_exist():
    """Also those inside functions and strings, and of scripts and benchmarks that no test runs."""
    guilty = []
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
        texts = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
        for module, names in (found for text in texts for found in IMPORT.findall(text)):
            imported += [f"{module}.{name.strip()}" for name in names.split(",")]
        guilty += [f"{page}: {name}" for name in imported if name.startswith("rlkit.") and not exists(name)]
    assert guilty == []
