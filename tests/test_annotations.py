"""Type annotations are specific: few of them are a bare `Any`."""

import ast

import pytest

from tests.quick import ROOT


def annotations(tree):
    """Yield every annotation of a module: of arguments, results and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            all_arguments = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            all_arguments += [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
            yield from (arg.annotation for arg in all_arguments if arg.annotation is not None)
            if node.returns is not None:
                yield node.returns
        elif isinstance(node, ast.AnnAssign):
            yield node.annotation


def is_bare(annotation):
    return ast.unparse(annotation) in {"Any", "Any | None", "typing.Any"}


def test_is_bare_recognizes_any_and_optional_any():
    tree = ast.parse("def f(a: Any, *b: int, c: dict[str, Any]) -> Any | None: ...\nx: Any = 1")
    assert [is_bare(annotation) for annotation in annotations(tree)].count(True) == 3


@pytest.mark.parametrize("package", ["rlkit", "envs", "rewards"])
def test_bare_any_is_at_most_4_percent_of_annotations(package):
    files = sorted((ROOT / package).rglob("*.py"))
    annotations_by_file = {path: list(annotations(ast.parse(path.read_text()))) for path in files}
    bare = {str(path): sum(map(is_bare, nodes)) for path, nodes in annotations_by_file.items()}
    total = sum(map(len, annotations_by_file.values()))
    assert total > 300
    worst = sorted(bare.items(), key=lambda pair: -pair[1])[:5]
    assert sum(bare.values()) <= 0.04 * total, worst
