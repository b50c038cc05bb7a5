"""Import rules between files and folders. Lazy imports and those in strings count, too."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.quick import ROOT

# Top to bottom: imports point down. Components in one layer may import each other, but not in cycles.
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
    ("reward", "errors", "files", "logs", "event_loop", "encoding", "words"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ALLOWED_IN_ENVS = {
    "envs",
    "rewards",
    "environment",
    "errors",
    "encoding",
    "files",
    "words",
    "retrieval",
    "rollouts",
}
REGISTRY = "rlkit.registry"  # its tables name environments and rewards, which it imports on demand
REFERENCE = re.compile(r"(?:rlkit|envs|rewards)(?:\.\w+)+(?::\w+)?\.?")
IMPORT_STATEMENT = re.compile(r"\b(?:from|import)\s+((?:rlkit|envs|rewards)(?:\.\w+)*)")


@cache
def sources():
    """Return the path of every module of rlkit by its import name."""
    files = {}
    for package in ("rlkit", "envs", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if relative.parts[:2] in (("rlkit", "envs"), ("rlkit", "rewards")):
                continue  # symbolic links to the top-level folders, which are read on their own
            parts = relative.with_suffix("").parts
            parts = parts if package == "rlkit" else ("rlkit", *parts)
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(node):
    """Return the names that a node imports; the last part of a name may be an object in a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert not node.level, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if REFERENCE.fullmatch(node.value):  # an object reference such as "rlkit.envs.math:MathEnvironment"
            return [node.value.partition(":")[0].rstrip(".")]
        if "\n" in node.value:  # possibly the source of a program
            return IMPORT_STATEMENT.findall(node.value)
    return []


def docstrings(tree):
    """Yield the docstring nodes, which import nothing."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(tree):
    """Yield all nodes except docstrings and `if TYPE_CHECKING` blocks."""
    stack = [tree]
    skipped = {id(node) for node in docstrings(tree)}
    while stack:
        node = stack.pop()
        if id(node) in skipped:
            continue
        yield node
        stack += node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)


@cache
def imports():
    """Return, for each module of rlkit, the modules of rlkit that it imports."""
    graph = {}
    for name, path in sources().items():
        targets = set()
        for node in nodes(ast.parse(path.read_text())):
            if name == REGISTRY and isinstance(node, ast.Constant):
                continue
            for imported in imported_names(node):
                target = imported
                while target and target not in sources():
                    target = target.rpartition(".")[0]
                if target and not name.startswith(f"{target}."):  # importing a module imports its package
                    targets.add(target)
        graph[name] = targets - {name}
    return graph


def component(module):
    """Return the folder or file directly in rlkit that a module belongs to; "" for rlkit itself."""
    return module.split(".")[1] if "." in module else ""


def import_cycles(graph):
    """Return the groups of nodes that import each other (Tarjan's strongly connected components)."""
    index, low, stack, cycles = {}, {}, [], []

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
            if len(group) > 1:
                cycles.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return cycles


def import_edges():
    """Return (importing module, imported module) for every import within rlkit."""
    return [(module, target) for module, targets in imports().items() for target in targets]


def test_every_folder_of_modules_is_a_regular_package():
    """A folder without __init__.py is not found if another folder of the same name is on the path first."""
    folders = {path.parent for path in sources().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_every_component_has_a_layer():
    components = {component(module) for module in sources()} - {"", "envs", "rewards"}
    assert components == set(LEVEL)


def test_files_have_no_import_cycles():
    assert import_cycles(imports()) == []


def test_components_have_no_import_cycles():
    components = {}
    for module, target in import_edges():
        if component(module) and component(target) and component(module) != component(target):
            components.setdefault(component(module), set()).add(component(target))
            components.setdefault(component(target), set())
    assert import_cycles(components) == []


def test_framework_imports_point_down():
    violations = []
    for module, target in import_edges():
        level, target_level = LEVEL.get(component(module)), LEVEL.get(component(target))
        if (module, target) == ("rlkit.scoring.judge", "rlkit.rewards.thinking"):
            continue  # the judge reads the same part of a completion as all verifiers
        if level is not None and (target_level is None or target_level < level):
            violations.append(f"{module} imports {target}")
    assert violations == []


def test_environments_import_only_allowed_components():
    violations = [
        f"{module} imports {target}"
        for module, target in import_edges()
        if component(module) == "envs" and component(target) not in ALLOWED_IN_ENVS
    ]
    assert violations == []


def test_rewards_import_only_rewards_and_words():
    violations = [
        (module, target)
        for module, target in import_edges()
        if component(module) == "rewards" and component(target) not in ("rewards", "words")
    ]
    assert violations == []


def test_rewards_never_import_torch():
    """They must not import it in a function either: each worker process would load it."""
    modules = {name: path for name, path in sources().items() if component(name) == "rewards"}
    assert len(modules) > 10
    violations = []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if any(imported.partition(".")[0] == "torch" for imported in imported_names(node)):
                violations.append(name)
    assert violations == []


def test_only_main_imports_a_command():
    violations = [edge for edge in import_edges() if component(edge[1]) == "commands"]
    # `main` imports the modules of sub-commands by their names, which this test cannot see.
    assert sorted(violations) == [
        ("rlkit.__main__", "rlkit.commands.main"),
        ("rlkit.commands.main", "rlkit.commands.run"),
    ]


def test_no_module_imports_the_public_interface():
    """`from rlkit import Environment` is for users. Within rlkit it would create a cycle with the package."""
    trees = {module: ast.parse(path.read_text()) for module, path in sources().items()}
    violations = [
        module
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "rlkit"
        if any(f"rlkit.{alias.name}" not in sources() for alias in node.names)
    ]
    assert violations == []


def test_envs_and_rewards_are_imported_below_rlkit():
    """In a checkout, `import envs` would also work, but load every class a second time."""
    bare = re.compile(
        r"(?:^\s*(?:from|import)\s+(?:envs|rewards)\b|[\"'](?:envs|rewards)\.\w+[.:\w]*[\"'])", re.M
    )
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.splitlines() if name.endswith((".py", ".md", ".yaml", "Makefile"))]
    texts = {path: path.read_text() for path in files if path.is_file() and path != Path(__file__)}
    assert len(texts) > 300
    assert [f"{path}: {match[0]}" for path, text in texts.items() for match in bare.finditer(text)] == []


def test_imported_names_finds_imports_in_strings():
    tree = ast.parse(
        'load("rlkit.envs.ranking.query"); import_module(f"rlkit.envs.{name}"); x = "rlkit is fast"'
    )
    names = [name for node in ast.walk(tree) for name in imported_names(node)]
    assert names == ["rlkit.envs.ranking.query", "rlkit.envs"]


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_environments_and_rewards_import_without_torch():
    names = [name for name in sources() if component(name) in ("envs", "rewards", "retrieval")]
    code = "import sys, importlib; sys.modules['torch'] = None\n"
    code += f"for name in {names}: importlib.import_module(name)"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name",
    ["rlkit", "rlkit.commands.main", "rlkit.commands.train", "rlkit.commands.sft", "rlkit.scoring.worker"],
)
def test_importing_a_command_does_not_import_torch(name):
    heavy = "('torch', 'transformers', 'trl')"
    result = run_python(f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names_are_imported_on_first_use():
    code = "import sys, rlkit; before = 'datasets' in sys.modules or 'rlkit.registry' in sys.modules\n"
    code += "print(before, [getattr(rlkit, name).__name__ for name in sorted(rlkit.__all__)])"
    result = run_python(code)
    names = [
        "Environment", "Reply", "Rollout", "TrainResult", "Turn", "UserError", "evaluate_model",
        "load_environment", "train",
    ]  # fmt: skip
    assert result.stdout.strip() == f"False {names}", result.stderr


def test_import_rlkit_loads_nothing_heavy_and_dir_lists_the_interface():
    code = "import sys; before = set(sys.modules); import rlkit\n"
    code += "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
    code += "print(sorted(new & {'torch', 'trl', 'transformers', 'datasets', 'pandas', 'numpy', 'yaml'}))\n"
    code += "print(sorted(set(dir(rlkit)) - set(rlkit.__all__)))"
    result = run_python(code)
    assert result.stdout.split("\n")[:2] == ["[]", "['__version__']"], result.stderr
