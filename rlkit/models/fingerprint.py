"""Fingerprints of models by content, so that what one model computed is never used with another.

A path, a hub name and the time of a file do not identify a model: a folder is retrained in place, a branch on
the hub moves, and a copy has new times. Therefore every file that loading may read is hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from rlkit.errors import UserError, first_line
from rlkit.models.bundled import ENCODERS, PREFIX, bundled_path, encoder_path

# Documentation, what training writes next to a model, and exports to other frameworks. Any other file counts:
# one too many only rebuilds an index, but one too few would score a model with the vectors of another.
IGNORED = (
    *("readme*", "license*", "notice*", "*.md", ".*", "__pycache__", "*.lock", "*.partial"),
    *("checkpoint-*", "global_step*", "optimizer*.pt", "optimizer*.bin", "optimizer_*", "scheduler*.pt"),
    *("rng_state*", "scaler.pt", "trainer_state.json", "training_args.bin", "*_results.json"),
    *("runs", "logs", "wandb", "eval", "events.out.tfevents*", "*.log", "*.jsonl", "*.csv", "*.png"),
    *("onnx", "openvino", "coreml", "*.onnx", "*.h5", "*.msgpack", "*.ot"),
)
ADAPTER = "adapter_config.json"
ORGANIZATIONS = ("sentence-transformers", "cross-encoder")
TOP_FILES = ("modules.json", "config.json", ADAPTER)  # one of them is in every model on the hub


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """Return the SHA-256 of a model's files: weights, settings, tokenizer, modules and code.

    Copies of a folder have the same fingerprint. The base model of an adapter counts, too.

    Args:
        name: Folder, hub name, or bundled model.
        revision: Branch, tag or commit on the hub; None is the main branch. A model in the hub's cache is
            read from there, without a request. Any other one is downloaded.

    Raises:
        UserError: There is no such model, or its files cannot be read.
    """
    return _folder_fingerprint(_model_folder(name, revision), ())


def _folder_fingerprint(folder: Path, adapters: tuple[Path, ...]) -> str:
    """Return the fingerprint of a folder, which is the base model of these adapters."""
    digest = hashlib.sha256()
    try:
        for file in _model_files(folder, ()):
            with file.open("rb") as content:
                file_digest = hashlib.file_digest(content, "sha256").hexdigest()
            digest.update(f"{json.dumps(file.relative_to(folder).as_posix())} {file_digest}\n".encode())
            base = _base_model(file) if file.name == ADAPTER else None
            if base is not None and base not in (*adapters, folder):
                digest.update(_folder_fingerprint(base, (*adapters, folder)).encode())
    except OSError as error:
        raise UserError(f"the model {str(folder)!r} cannot be read: {first_line(error)}") from error
    return digest.hexdigest()


def _model_files(folder: Path, ancestors: tuple[Path, ...]) -> Iterator[Path]:
    """Yield the files of a model in the order of their paths, without `IGNORED` ones."""
    resolved = folder.resolve()
    if resolved in ancestors:  # a link to a folder that contains it
        return
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name.lower(), pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from _model_files(path, (*ancestors, resolved))
        elif path.is_file():
            yield path


def _base_model(adapter: Path) -> Path | None:
    """Return the folder of the base model that an adapter's settings name, or None if they name none."""
    try:
        settings = json.loads(adapter.read_text(encoding="utf-8"))
        name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{adapter} is not the configuration of an adapter: {first_line(error)}") from error
    return _model_folder(name, revision) if name else None


def _model_folder(name: str, revision: str | None) -> Path:
    if name.removeprefix(PREFIX) in ENCODERS:
        return Path(encoder_path(name))
    if name.startswith(PREFIX):
        return bundled_path(name)
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else _hub_snapshot(name, revision)


def _hub_snapshot(name: str, revision: str | None) -> Path:
    """Return the folder of a model in the hub's cache, to which it is downloaded if it is not there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    # sentence-transformers prepends an organization to a name without one, and may have its own cache folder,
    # which it prefers.
    names = [name] if "/" in name else [f"{organization}/{name}" for organization in ORGANIZATIONS] + [name]
    caches = (os.environ.get("SENTENCE_TRANSFORMERS_HOME"), None)
    failure: Exception | None = None
    try:
        for repository, cache, file in product(names, caches, TOP_FILES):
            path = try_to_load_from_cache(repository, file, cache_dir=cache, revision=revision)
            # Without weights, only the settings have been downloaded.
            if isinstance(path, str) and any(map(_is_weights, Path(path).parent.rglob("*"))):
                return Path(path).parent
    except ValueError as error:  # not the form of a name
        failure, names = error, []
    for repository in names:
        try:
            return Path(snapshot_download(repository, revision=revision, ignore_patterns=_ignored_paths()))
        except (OSError, ValueError) as error:
            failure = error
    raise UserError(f"the model {name!r} cannot be loaded: {first_line(failure or name)}") from failure


def _is_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")


def _ignored_paths() -> list[str]:
    """Return the patterns of the paths that contain an ignored name."""
    return [f"{parent}{name}{child}" for name in IGNORED for parent in ("", "*/") for child in ("", "/*")]
