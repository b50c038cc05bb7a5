"""Build a collection of Python functions and their descriptions from the standard library.

    python scripts/build_code_collection.py -o data/code
    rlkit rank --config configs/ranking/heterogeneous.yaml --environment_args.collection data/code
    rlkit eval --collection data/code --retriever bm25 --measures recall@1 recall@3 recall@5

A query is the first sentence of a function's docstring, and a document is its source without docstrings and
comments. Test queries come from modules without training queries; the corpus has the functions of all
modules. The functions are those of the Python that runs the script, so another version has others.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlkit.arguments.command_line import CommandParser, folder_path
from rlkit.commands.run import run_command
from rlkit.envs.ranking.pairs.pages import sentences
from rlkit.errors import UserError
from rlkit.retrieval.collections.write import split_of, write_collection

# Folders of installed packages, of tests and of demonstrations.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
MIN_LINES = 3  # of a function's body; the body of a shorter one says nothing that its name does not
MIN_QUERY_WORDS = 3  # "Deprecated." describes nothing
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each public module in a folder, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not any(part.startswith("_") for part in parts):
            yield ".".join(parts), path


def public_functions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, Function]]:
    """Yield the public functions and methods of a module or class with their qualified names.

    Args:
        body: Statements of the module or class.
        prefix: Qualified name of the module or class.
    """
    for node in body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, name)
        else:
            yield name, node


def description_and_code(function: Function) -> tuple[str, str] | None:
    """Return the first sentence of a function's docstring and its source without docstrings and comments.

    The result is None if the function has no docstring, or if the sentence or the body is too short.
    """
    query = first_sentence(ast.get_docstring(function) or "")
    if len(query.split()) < MIN_QUERY_WORDS:
        return None
    for node in ast.walk(function):
        if isinstance(node, ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    body = ast.unparse(ast.Module(function.body, type_ignores=[]))
    if len(body.splitlines()) < MIN_LINES:
        return None
    return query, ast.unparse(function)


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring in one line; it ends with the paragraph at the latest."""
    paragraph = re.split(r"\n\s*\n", docstring.strip())[0]
    return next(iter(sentences(paragraph)), "")


def main() -> int:
    """Write the collection and print the number of its functions and queries."""
    parser = CommandParser(description="Build a collection of Python functions from the standard library.")
    parser.add_argument(
        "-o", "--out", type=folder_path, required=True, help="folder to write the collection to"
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="maximum number of functions, a random sample (default: all)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder with Python modules (default: that of the standard library)",
    )
    options = parser.parse_args(sys.argv[1:])
    documents: dict[str, str] = {}
    queries: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    num_invalid = 0
    for module, path in modules(options.folder):
        try:
            body = ast.parse(path.read_bytes()).body
        except (SyntaxError, ValueError):  # of another version of Python, or not Python
            num_invalid += 1
            continue
        for name, function in public_functions(body, module):
            pair = description_and_code(function)
            if pair is None or name in documents:  # the setter of a property has the name of its getter
                continue
            query, documents[name] = pair
            queries.setdefault(query, []).append(name)
            splits[name] = split_of(module)
    if not documents:
        raise UserError(f"{options.folder} has no Python module with documented functions")
    num_queries = write_collection(options.out, documents, queries, splits, options.documents)
    num_documents = min(len(documents), options.documents or len(documents))
    print(f"{num_documents:,} functions")
    if num_invalid:
        print(f"{num_invalid:,} files that this version of Python cannot read are left out")
    print(", ".join(f"{number:,} {split} queries" for split, number in num_queries.items()))
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
