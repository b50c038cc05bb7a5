"""Who may import whom: layers of files and of folders, with lazy imports and those written as strings."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.quick import ROOT

# Top to bottom; an import points down. What stands on one line may import one another, but not in circles.
LAYERS = (
    ("__main__", "api"),
    ("commands",),
    ("training", "sweeps"),
    ("report",),
    ("evaluation", "check"),
    ("scoring", "runs", "arguments"),
    ("rollouts", "registry"),
    ("retrieval", "models", "view"),
    ("environment",),
    ("reward", "errors", "files", "logs"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
OF_ENVIRONMENTS = {"envs", "rewards", "environment", "errors", "retrieval", "rollouts"}
NAMES_OBJECTS = "rlkit.registry"  # its tables name environments and rewards, which it imports on demand
REFERENCE = re.compile(r"(?:rlkit|envs|rewards)(?:\.\w+)+(?::\w+)?\.?")
IMPORT_STATEMENT = re.compile(r"\b(?:from|import)\s+((?:rlkit|envs|rewards)(?:\.\w+)*)")


@cache
def sources():
    """Our modules by their import name."""
    files = {}
    for package in ("rlkit", "envs", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] in (("rlkit", "envs"), ("rlkit", "rewards")):
                continue  # links to the top-level folders, where they are read
            parts = relative.with_suffix("").parts
            parts = parts if package == "rlkit" else ("rlkit", *parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def written_names(node):
    """What a node imports, as it is written; the last part may be an object of a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        whole = [node.value.partition(":")[0].rstrip(".")] if REFERENCE.fullmatch(node.value) else []
        return whole + IMPORT_STATEMENT.findall(node.value if "\n" in node.value or whole else "")
    return []


def docstrings(tree):
    """The constants that are documentation and import nothing."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(tree):
    """All nodes but documentation and what only a type checker reads."""
    left = [tree]
    skipped = {id(node) for node in docstrings(tree)}
    while left:
        node = left.pop()
        if id(node) in skipped:
            continue
        yield node
        left += node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)


@cache
def imports():
    """For each module of ours the modules of ours that it imports."""
    graph = {}
    for name, path in sources().items():
        targets = set()
        for node in nodes(ast.parse(path.read_text())):
            if name == NAMES_OBJECTS and isinstance(node, ast.Constant):
                continue
            for written in written_names(node):
                target = written
                while target and target not in sources():
                    target = target.rpartition(".")[0]
                if target and not name.startswith(f"{target}."):  # a package comes with each of its modules
                    targets.add(target)
        graph[name] = targets - {name}
    return graph


def room(module):
    """The folder or file below rlkit that a module belongs to; of rlkit itself, ""."""
    return module.split(".")[1] if "." in module else ""


def circles(graph):
    """Groups of nodes that reach one another (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.extend([sorted(group)] if len(group) > 1 else [])

    for node in graph:
        if node not in index:
            visit(node)
    return found


def arrows():
    return [(module, target) for module, targets in imports().items() for target in targets]


def test_every_room_has_a_layer():
    rooms = {room(module) for module in sources()} - {"", "envs", "rewards"}
    assert rooms == set(LEVEL)


def test_no_file_is_in_an_import_circle():
    assert circles(imports()) == []


def test_no_room_is_in_an_import_circle():
    rooms = {}
    for module, target in arrows():
        if room(module) and room(target) and room(module) != room(target):
            rooms.setdefault(room(module), set()).add(room(target))
            rooms.setdefault(room(target), set())
    assert circles(rooms) == []


def test_imports_of_the_framework_point_down():
    guilty = [
        f"{module} imports {target}"
        for module, target in arrows()
        if room(module) in LEVEL and (room(target) not in LEVEL or LEVEL[room(target)] < LEVEL[room(module)])
    ]
    assert guilty == []


def test_environments_import_only_what_they_may():
    guilty = [
        f"{module} imports {target}"
        for module, target in arrows()
        if room(module) == "envs" and room(target) not in OF_ENVIRONMENTS
    ]
    assert guilty == []


def test_rewards_import_nothing_of_ours_but_one_another():
    guilty = [(m, target) for m, target in arrows() if room(m) == "rewards" and room(target) != "rewards"]
    assert guilty == []


def test_rewards_never_import_torch():
    """Not inside a function either: a worker process would load it for each rank."""
    trees = {name: ast.parse(path.read_text()) for name, path in sources().items() if room(name) == "rewards"}
    written = {name: [w for n in ast.walk(tree) for w in written_names(n)] for name, tree in trees.items()}
    assert len(written) > 10
    assert [n for n, names in written.items() if any(w.partition(".")[0] == "torch" for w in names)] == []


def test_nothing_imports_a_command():
    guilty = [arrow for arrow in arrows() if room(arrow[1]) == "commands"]
    # `main` also finds the module of a sub-command, by its name.
    assert sorted(guilty) == [
        ("rlkit.__main__", "rlkit.commands.main"),
        ("rlkit.commands.main", "rlkit.commands.run"),
    ]


def test_no_module_imports_the_public_names():
    """`from rlkit import Environment` is for users: within rlkit it would be a circle through the package."""
    trees = {module: ast.parse(path.read_text()) for module, path in sources().items()}
    guilty = [
        module
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "rlkit"
        if any(f"rlkit.{alias.name}" not in sources() for alias in node.names)
    ]
    assert guilty == []


def test_envs_and_rewards_are_imported_below_rlkit():
    """From the checkout `import envs` would work, and load every class a second time."""
    bare = re.compile(
        r"(?:^\s*(?:from|import)\s+(?:envs|rewards)\b|[\"'](?:envs|rewards)\.\w+[.:\w]*[\"'])", re.M
    )
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.splitlines() if name.endswith((".py", ".md", ".yaml", "Makefile"))]
    texts = {path: path.read_text() for path in files if path.is_file() and path != Path(__file__)}
    assert len(texts) > 300
    assert [f"{path}: {match[0]}" for path, text in texts.items() for match in bare.finditer(text)] == []


def test_the_string_search_finds_imports_in_strings():
    tree = ast.parse(
        'load("rlkit.envs.ranking.query"); import_module(f"rlkit.envs.{name}"); x = "rlkit is fast"'
    )
    found = [name for node in ast.walk(tree) for name in written_names(node)]
    assert found == ["rlkit.envs.ranking.query", "rlkit.envs"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_environments_and_rewards_import_without_torch():
    names = [name for name in sources() if room(name) in ("envs", "rewards", "retrieval")]
    code = "import sys, importlib; sys.modules['torch'] = None\n"
    code += f"for name in {names}: importlib.import_module(name)"
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name",
    ["rlkit", "rlkit.commands.main", "rlkit.commands.train", "rlkit.commands.sft", "rlkit.scoring.worker"],
)
def test_rlkit_starts_without_torch(name):
    heavy = "('torch', 'transformers', 'trl')"
    result = run(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_the_names_of_the_package_are_imported_on_first_use():
    code = "import sys, rlkit; before = 'datasets' in sys.modules or 'rlkit.registry' in sys.modules\n"
    code += "print(before, [getattr(rlkit, name).__name__ for name in sorted(rlkit.__all__)])"
    result = run(code)
    names = [
        "Environment", "Reply", "Rollout", "TrainResult", "Turn", "UserError", "evaluate_model",
        "load_environment", "train",
    ]  # fmt: skip
    assert result.stdout.strip() == f"False {names}", result.stderr


def test_import_loads_nothing_and_dir_shows_the_interface():
    code = "import sys; before = set(sys.modules); import rlkit\n"
    code += "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
    code += "print(sorted(new & {'torch', 'trl', 'transformers', 'datasets', 'pandas', 'numpy', 'yaml'}))\n"
    code += "print(sorted(set(dir(rlkit)) - set(rlkit.__all__)))"
    result = run(code)
    assert result.stdout.split("\n")[:2] == ["[]", "['__version__']"], result.stderr
