"""Generation configs that transformers refuses to save, such as a temperature without sampling.

transformers loads many of them with a warning and raises only when it saves them, at the first checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from rlkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Training reads these. A wrong EOS token would silently change where completions end.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The settings that other settings depend on. They are kept, and what contradicts them is removed.
MODES = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate", "suppress_tokens")


def generation_options(name: str, revision: str | None = None) -> dict[str, GenerationConfig]:
    """Return arguments of `from_pretrained` that replace generation_config.json by its valid settings.

    There are none if the model has no such file.

    Args:
        name: Folder or Hub name of the model.
        revision: Revision on the Hub.

    Raises:
        UserError: The file is not a JSON object, or has an invalid id of a special token.
    """
    path = cached_file(
        name,
        GENERATION_CONFIG_NAME,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} must contain a JSON object, not {settings!r:.60}")
    return {"generation_config": _valid_generation_config(settings, str(path))}


def fix_generation_config(model: PreTrainedModel) -> None:
    """Remove the settings that cannot be saved from the generation config of a loaded model.

    They are from config.json, in which older models have generation settings.
    """
    generation_config = getattr(model, "generation_config", None)
    if generation_config is not None:
        settings = {key: value for key, value in generation_config.to_dict().items() if value is not None}
        model.generation_config = _valid_generation_config(settings, "config.json")


def _valid_generation_config(settings: Mapping[str, Any], source: str) -> GenerationConfig:
    """Return a generation config with the settings, except for those that transformers would not save.

    rlkit does not sample from it: its keys, such as `temperature`, set the sampling of a run. It needs the
    EOS tokens.

    Args:
        settings: Settings by name.
        source: File of the settings, which the log names.

    Raises:
        UserError: The id of a special token is not an integer, or a list of them.
    """
    for key in TOKEN_IDS:
        value = settings.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in ids):
            raise UserError(f"{key} in {source} must be a token id or a list of them, not {value!r:.60}")
    with _no_warnings():
        if (config := _saveable(settings)) is not None:
            return config
        valid: dict[str, Any] = {}
        for key in sorted(settings, key=lambda key: key not in MODES):  # stable: the modes are first
            if _saveable(valid | {key: settings[key]}) is not None:
                valid[key] = settings[key]
        config = GenerationConfig.from_dict(valid)
    removed = ", ".join(f"{key}={settings[key]!r:.40}" for key in settings if key not in valid)
    logger.warning(
        "%s has settings that contradict the others, with which the model could not be saved; removed: %s",
        source,
        removed,
    )
    return config


def _saveable(settings: Mapping[str, Any]) -> GenerationConfig | None:
    """Return the generation config with these settings, or None if transformers would not save it."""
    try:
        config = GenerationConfig.from_dict(dict(settings))
        config.validate(strict=True)
        json.dumps(config.to_dict(), default=vars)
    except (ValueError, TypeError, AttributeError):
        return None
    return config


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide transformers' warnings about settings that are about to be removed."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
