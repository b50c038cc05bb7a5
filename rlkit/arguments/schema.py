"""The config keys of each command with their types, parsed from the installed source files with `ast`.

Importing TRL and transformers takes seconds; parsing four of their files takes 50 ms. This is how a
misspelled key is rejected before anything heavy is imported.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from rlkit.arguments.keys import RankArguments, SFTArguments, TaskArguments, TrainArguments
from rlkit.errors import UserError

ARGUMENT_CLASSES: dict[str, type[TaskArguments]] = {
    "train": TrainArguments,
    "sft": SFTArguments,
    "rank": RankArguments,
}

_TRAINING = ("transformers", "training_args.py", "TrainingArguments")
_BASE = ("trl", "trainer/base_config.py", "_BaseConfig")
_MODEL = ("trl", "trainer/model_config.py", "ModelConfig")
# Package, file and name of the dataclasses with a command's other keys; later ones override earlier ones.
INSTALLED = {
    "train": (_MODEL, _TRAINING, _BASE, ("trl", "trainer/grpo_config.py", "GRPOConfig")),
    "sft": (_MODEL, _TRAINING, _BASE, ("trl", "trainer/sft_config.py", "SFTConfig")),
    "rank": (_MODEL, _TRAINING),
}


def rlkit_keys(command: str) -> dict[str, str]:
    """Return rlkit's own keys of a command with their type annotations as strings."""
    # Not from dataclasses.fields: HfArgumentParser overwrites Field.type.
    bases = reversed(ARGUMENT_CLASSES[command].__mro__)
    return {name: kind for base in bases for name, kind in vars(base).get("__annotations__", {}).items()}


@cache
def all_keys(command: str) -> dict[str, str]:
    """Return all keys of a command with their type annotations as strings, e.g. `int | None`."""
    keys: dict[str, str] = {}
    for package, file, name in INSTALLED[command]:
        keys |= class_fields(package, file, name)
    return keys | rlkit_keys(command)


@cache
def class_fields(package: str, file: str, name: str) -> dict[str, str]:
    """Return the annotated attributes of a class without importing its package.

    Args:
        package: Name of the installed package.
        file: Path of the source file within the package.
        name: Name of the class.

    Returns:
        The type annotation of each attribute, as a string.

    Raises:
        UserError: The package is not installed, or the file does not define the class.
    """
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in _class_body(package, file, name)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


@cache
def enum_values(package: str, file: str, name: str) -> tuple[str, ...]:
    """Return the values of a string enumeration without importing its package.

    Arguments and errors are those of `class_fields`.
    """
    return tuple(
        str(statement.value.value)
        for statement in _class_body(package, file, name)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    )


def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    for node in _parse_file(package, file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node.body
    raise UserError(f"the installed {package} has no class {name} in {file}: install the pinned version")


@cache
def _parse_file(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed: pip install {package}")
    path = Path(spec.submodule_search_locations[0]) / file
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
