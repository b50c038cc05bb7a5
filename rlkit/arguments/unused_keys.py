"""Keys of TRL and transformers that a command does not use: setting one is an error, so none is ignored."""

from __future__ import annotations

from collections.abc import Mapping

from rlkit.errors import UserError

TRUE = ("yes", "true", "t", "y", "1")
FALSE = ("no", "false", "f", "n", "0")
# By key: the default, which is the only valid value, and the remedy or the reason.
UnusedKeys = dict[str, tuple[object, str]]

EVALUATION = "set evaluation_tasks and evaluation_steps instead"
# Keys of TrainingArguments that no command uses, because rlkit evaluates and handles preemption itself.
UNUSED_BY_ANY_RUN: UnusedKeys = {
    "batch_eval_metrics": (False, EVALUATION),
    "do_eval": (False, EVALUATION),
    "do_predict": (False, EVALUATION),
    "enable_jit_checkpoint": (False, "rlkit always writes a checkpoint when it is preempted"),
    "eval_accumulation_steps": (None, EVALUATION),
    "eval_delay": (0, EVALUATION),
    "eval_do_concat_batches": (True, EVALUATION),
    "eval_steps": (None, EVALUATION),
    "eval_use_gather_object": (False, EVALUATION),
    "greater_is_better": (None, EVALUATION),
    "include_for_metrics": ([], EVALUATION),
    "load_best_model_at_end": (False, "the last model is saved; checkpoints keep earlier ones"),
    "metric_for_best_model": (None, EVALUATION),
    "per_device_eval_batch_size": (8, "set evaluation_batch_size instead"),
    "prediction_loss_only": (False, EVALUATION),
}
# Keys without an effect unless use_peft is true, and their defaults.
LORA: dict[str, object] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


def check_unused_keys(unused: UnusedKeys, keys: Mapping[str, object], command: str) -> None:
    """Raise UserError for the first key that a command would ignore.

    Args:
        unused: Keys that the command does not use.
        keys: Keys that are set, with values that are valid for their types; a number or a boolean may be a
            string.
        command: "train", "sft" or "rank".
    """
    check_defaults(unused, keys, f"`rlkit {command}`")
    if keys.get("save_strategy") == "best":
        raise UserError(
            "save_strategy must be steps, epoch or no, not best: rlkit's evaluations do not select "
            "checkpoints"
        )
    if not is_true(keys.get("use_peft")):
        for key, value in keys.items():
            if key in LORA and not is_default(value, LORA[key]):
                raise UserError(f"{key} has no effect without LoRA; set use_peft to true or remove {key}")


def check_defaults(unused: UnusedKeys, keys: Mapping[str, object], user: str) -> None:
    """Raise UserError for the first unused key that is set to another value than its default.

    Args:
        unused: Keys that must keep their default.
        keys: Values by key.
        user: Command or class that does not use the keys, for the error message.
    """
    for key, (default, reason) in unused.items():
        if key in keys and not is_default(keys[key], default):
            raise UserError(f"{key} is not supported by {user}: {reason}")


def is_true(value: object) -> bool:
    """Return whether the value of a boolean key, which may be a string, is true."""
    return str(value).lower() in TRUE


def is_default(value: object, default: object) -> bool:
    """Return whether a value, which may be a string, is the default or one of several harmless values."""
    if isinstance(default, tuple):
        return str(value) in default
    if isinstance(default, bool):
        return str(value).lower() in (TRUE if default else FALSE)
    if default is None or default == []:
        return str(value).lower() in ("", "none", "null", "[]", "{}", *FALSE)
    if isinstance(default, int | float):
        return float(str(value)) == default
    return str(value) == default
