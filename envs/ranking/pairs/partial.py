"""Results that take long to compute, in batches that are saved as they complete: a stopped run resumes.

The file has the settings in its first line, and a result in each of the others:

    {"settings": {"model": "bundled:smollm2-135m", "seed": 0, …}}
    {"id": "few_shot/sendfile.2/0", "result": {"text": "copy data between two files", "truncated": false}}

A result is a JSON value: the reply of a language model, or the scores of a list.
"""

from __future__ import annotations

import hashlib
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from rlkit.errors import UserError
from rlkit.files import errors_with_path
from rlkit.rollouts.text_generation import Generation

if TYPE_CHECKING:
    from rlkit.rollouts.text_generation import TextModel

logger = logging.getLogger(__name__)

BATCH_SIZE = 64  # prompts between two writes of replies


@dataclass(frozen=True)
class Prompt:
    """A prompt and its identifier.

    Attributes:
        id: Identifier, unique in a run.
        messages: Chat messages.
        seed: Random seed of the reply.
    """

    id: str
    messages: list[dict[str, str]]
    seed: int


def prompt_seed(seed: int, prompt_id: str) -> int:
    """Return the seed of a prompt's reply, below 2^31, from the seed of the run and the prompt's id."""
    digest = hashlib.sha256(f"{seed} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def partial_path(out: Path) -> Path:
    """Return the path of the file that holds results until all of them are in `out`."""
    return out.with_name(f"{out.name}.partial")


def settings_of(options: Namespace) -> dict[str, Any]:
    """Return the options of a script that determine its results, as JSON values.

    The backend is not among them: a server that is restarted may have another URL.
    """
    unused = ("out", "backend", "allow_failures")
    settings = {name: value for name, value in vars(options).items() if name not in unused}
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def generate_replies(
    model: TextModel,
    prompts: Iterable[Prompt],
    path: Path,
    settings: Mapping[str, Any],
    *,
    allow_failures: bool = False,
) -> dict[str, Generation]:
    """Return the reply to each prompt by its id. Those that the file has are not generated.

    Args:
        model: Model that generates.
        prompts: Prompts.
        path: File to which replies are appended after each batch.
        settings: JSON values that determine the replies. A hash of the prompts, and one of the model's files
            if it is on this machine, are added.
        allow_failures: Whether to leave out the prompts that fail.

    Raises:
        UserError: The file is from a run with other settings, all prompts fail, or one fails without
            `allow_failures`. All other replies are saved first.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    messages = json.dumps([[prompt.id, prompt.messages] for prompt in by_id.values()])
    settings = {**settings, "prompts": hashlib.sha256(messages.encode()).hexdigest()}
    if (fingerprint := getattr(model, "fingerprint", None)) is not None:
        settings["model_files"] = fingerprint()
    errors: list[str] = []

    def generate(ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        batch = [by_id[name] for name in ids]
        generations = model.generate([prompt.messages for prompt in batch], [p.seed for p in batch])
        errors.extend(generation.error for generation in generations if generation.error is not None)
        return {
            name: {"text": generation.text, "truncated": generation.truncated}
            for name, generation in zip(ids, generations, strict=True)
            if generation.error is None
        }

    replies = resume(path, settings, list(by_id), generate, batch_size=BATCH_SIZE, description="generating")
    if errors:
        message = (
            f"{model.name} failed to generate {len(errors):,} of {len(by_id):,} replies: {errors[0]}. {path} "
            f"has the {len(replies):,} others"
        )
        if not (allow_failures and replies):
            raise UserError(f"{message}: run the same command to resume")
        logger.warning("%s: to try again, delete the output and run the same command", message)
    return {name: Generation(**reply) for name, reply in replies.items()}


def finish(path: Path, num_failed: int) -> None:
    """Delete the file of a run whose output is written, unless prompts failed and can be retried."""
    if not num_failed:
        path.unlink()


def resume(
    path: Path,
    settings: Mapping[str, Any],
    ids: Sequence[str],
    compute: Callable[[Sequence[str]], Mapping[str, Any]],
    *,
    batch_size: int,
    description: str,
) -> dict[str, Any]:
    """Return the result for each id. Those that the file has are not computed.

    Args:
        path: File to which results are appended after each batch.
        settings: JSON values that determine the results.
        ids: Ids of the results.
        compute: Function that returns the results for some ids as JSON values. An id that is missing from
            what it returns has no result.
        batch_size: Number of ids per call of `compute`.
        description: Title of the progress bar.

    Raises:
        UserError: The file is from a run with other settings.
    """
    results = open_results(path, settings)
    missing = [name for name in ids if name not in results]
    for start in track(range(0, len(missing), batch_size), description=description, disable=not missing):
        batch = compute(missing[start : start + batch_size])
        _append(path, [{"id": name, "result": result} for name, result in batch.items()])
        results |= batch
    return results


def open_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of a stopped run by id, or create its file.

    The last line is dropped if it is incomplete, because the run was killed while it wrote.

    Raises:
        UserError: The file is from a run with other settings.
    """
    if path.exists():
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(complete))
        lines = [json.loads(line) for line in complete.decode("utf-8").split("\n") if line]
        if len(lines) > 1:
            _check_settings(path, lines[0]["settings"], settings)
            return {line["id"]: line["result"] for line in lines[1:]}
        path.unlink()  # it has no results, whatever its settings are
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, [{"settings": dict(settings)}])
    return {}


def _check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # Tuples of the caller are lists in the file.
    current = json.loads(json.dumps(settings))
    changed = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if changed:
        raise UserError(
            f"{path} is from a stopped run with different settings ({', '.join(changed)}): delete it, or use "
            "another -o"
        )


def _append(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with errors_with_path(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)
