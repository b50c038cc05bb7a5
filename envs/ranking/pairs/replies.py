"""Generate the replies to many prompts in batches that are saved at once, so that a stopped run resumes.

The file has the settings in its first line, and a reply in each of the others:

    {"settings": {"model": "bundled:smollm2-135m", "seed": 0, …}}
    {"id": "few_shot/sendfile.2/0", "reply": "copy data between two file descriptors"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import track

from rlkit.errors import UserError
from rlkit.files import errors_with_path

if TYPE_CHECKING:
    from rlkit.rollouts.text_generation import TextModel

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


def generate_replies(
    model: TextModel, prompts: Iterable[Prompt], path: Path, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Return the reply to each prompt by its id. Those that the file has are not generated.

    Args:
        model: Model that generates.
        prompts: Prompts.
        path: File to which replies are appended after each batch.
        settings: JSON values that determine the replies.

    Raises:
        UserError: The file is from a run with other settings, or a request fails. The other replies of its
            batch are saved first.
    """
    replies = open_replies(path, settings)
    missing = [prompt for prompt in prompts if prompt.id not in replies]
    starts = range(0, len(missing), BATCH_SIZE)
    for start in track(starts, description="generating", disable=not missing):
        batch = missing[start : start + BATCH_SIZE]
        generations = model.generate([prompt.messages for prompt in batch], [p.seed for p in batch])
        texts = {
            prompt.id: generation.text
            for prompt, generation in zip(batch, generations, strict=True)
            if generation.error is None
        }
        _append(path, [{"id": name, "reply": text} for name, text in texts.items()])
        replies |= texts
        if errors := [generation.error for generation in generations if generation.error is not None]:
            raise UserError(
                f"{model.name} failed to generate {len(errors)} of {len(batch)} replies: {errors[0]}. "
                f"{path} has the {len(replies):,} others: run the same command to resume"
            )
    return replies


def open_replies(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the replies of a stopped run by prompt id, or create its file.

    The last line is dropped if it is incomplete, because the run was killed while it wrote.

    Raises:
        UserError: The file is from a run with other settings.
    """
    if path.exists():
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            path.write_bytes(complete)
        lines = [json.loads(line) for line in complete.decode("utf-8").split("\n") if line]
        if lines:
            _check_settings(path, lines[0]["settings"], settings)
            return {line["id"]: line["reply"] for line in lines[1:]}
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, [{"settings": dict(settings)}])
    return {}


def _check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    # Tuples of the caller are lists in the file.
    current = json.loads(json.dumps(settings))
    changed = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if changed:
        raise UserError(
            f"{path} is from a stopped run with another {' and '.join(changed)}: delete it, or use another -o"
        )


def _append(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    with errors_with_path(path), path.open("a", encoding="utf-8") as file:
        file.write(lines)
