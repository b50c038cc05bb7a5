"""Types say what a value is: bare `Any` is rare."""

import ast

import pytest

from tests.quick import ROOT


def annotations(tree):
    """Every annotation of a module: of arguments, of results, and of names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
            yield from (arg.annotation for arg in every if arg.annotation is not None)
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def is_bare(annotation):
    return ast.unparse(annotation) in {"Any", "Any | None", "typing.Any"}


def test_bare_any_is_found():
    tree = ast.parse("def f(a: Any, *b: int, c: dict[str, Any]) -> Any | None: ...\nx: Any = 1")
    assert [is_bare(annotation) for annotation in annotations(tree)].count(True) == 3


@pytest.mark.parametrize("package", ["rlkit", "envs", "rewards"])
def test_bare_any_is_at_most_4_percent_of_annotations(package):
    files = sorted((ROOT / package).rglob("*.py"))
    found = {path: list(annotations(ast.parse(path.read_text()))) for path in files}
    bare = {str(path): sum(map(is_bare, nodes)) for path, nodes in found.items()}
    total = sum(map(len, found.values()))
    assert total > 300
    worst = sorted(bare.items(), key=lambda pair: -pair[1])[:5]
    assert sum(bare.values()) <= 0.04 * total, worst
