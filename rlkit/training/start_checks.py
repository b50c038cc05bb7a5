"""Checks, before a run starts, of what it needs at its end: a model that can be saved, and disk space.

Without these checks, the configs and the tokenizer would be saved for the first time in the first checkpoint,
after hours of training.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rlkit.errors import UserError, one_line
from rlkit.logs import hide_weight_bars
from rlkit.models.adapters import check_mergeable
from rlkit.models.load import UNTIE
from rlkit.runs.directory import DISK_ERRORS
from rlkit.training.disk import check_room, count_steps, estimate_disk
from rlkit.training.resume import check_plain

if TYPE_CHECKING:
    from transformers import Trainer

    from rlkit.environment import Environment
    from rlkit.scoring import RewardRunner


logger = logging.getLogger(__name__)

MODEL_REMEDY = "fix config.json and generation_config.json in the model's folder"
TOKENIZER_REMEDY = "fix the tokenizer's files in the model's folder"


def check_trainer(trainer: Trainer, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Check on the main process, before anything is written, that a run can be saved.

    Args:
        trainer: Trainer of the run.
        folder: Run directory.
        resume: Whether to resume the run in the folder.
        overwrite: Whether to delete the run in the folder.

    Raises:
        UserError: The model or the tokenizer cannot be saved or loaded again, the weights have a dtype that
            cannot be trained, or there is not enough disk space.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    check_dtypes(model, deepspeed=trainer.is_deepspeed_enabled)
    if isinstance(model, PeftModel):
        check_mergeable(model, UNTIE)
    size = check_saving(
        model,
        getattr(trainer, "processing_class", None),
        trainer.args,
        trust_remote_code=bool(getattr(trainer.args, "trust_remote_code", False)),
    )
    num_rows = len(trainer.train_dataset)  # type: ignore[arg-type]
    num_steps = count_steps(trainer.args, num_rows, trainer.accelerator.num_processes)
    estimate = estimate_disk(
        model, trainer.args, num_steps, deepspeed=trainer.is_deepspeed_enabled, processing_bytes=size
    )
    warning = check_room(estimate, folder, resume=resume, overwrite=overwrite)
    if warning is not None:
        logger.warning(warning)


def check_dtypes(model: nn.Module, *, deepspeed: bool) -> None:
    """Raise UserError if float16 weights are trained.

    The gradient scaler of `fp16` rejects them in the first step. Without it, Adam divides by 0, because its
    epsilon and the squares of small gradients are 0 in float16. DeepSpeed trains float32 copies instead.
    """
    if deepspeed:
        return
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype == torch.float16:
            raise UserError(
                f"dtype must be float32 or bfloat16 to train, but {name} is float16: set the key `dtype`"
            )


def check_states(runner: RewardRunner, environment: Environment) -> None:
    """Raise UserError if the state of a reward or of the environment could not be saved in a checkpoint."""
    states: dict[str, Any] = {f"reward {name}": reward for name, reward in runner.stateful.items()}
    if hasattr(environment, "state_dict"):
        states["environment"] = environment
    for name, part in states.items():
        check_plain(name, part.state_dict())


def check_saving(model: Any, tokenizer: Any, trainer_args: object, *, trust_remote_code: bool = False) -> int:
    """Save everything but the weights to a temporary folder, as checkpoints and `model/` will be.

    Args:
        model: Model, with or without an adapter, or scorer of documents.
        tokenizer: Tokenizer, or None for a scorer, which saves its own.
        trainer_args: Arguments of the trainer, which checkpoints contain.
        trust_remote_code: Whether to run Python code that comes with the model.

    Returns:
        Size in bytes of what was saved.

    Raises:
        UserError: Something cannot be saved or loaded again.
    """
    hide_weight_bars()
    with (
        _one_line_errors("create a temporary folder", "set TMPDIR to a writable folder"),
        tempfile.TemporaryDirectory(prefix="rlkit-") as scratch,
    ):
        folder = Path(scratch) / "model"
        folder.mkdir()
        with _one_line_errors("save the arguments of the trainer", "set plain values only"):
            torch.save(trainer_args, folder / "training_args.bin")
        if isinstance(model, PreTrainedModel | PeftModel):
            _save_language_model(model, folder)
        else:
            with _one_line_errors("save the model", MODEL_REMEDY), _no_weights(model):
                model.save_pretrained(str(folder))
        if tokenizer is not None:
            with _one_line_errors("save the tokenizer", TOKENIZER_REMEDY):
                tokenizer.save_pretrained(str(folder))
        if isinstance(model, PreTrainedModel | PeftModel):
            _load_again(folder, tokenizer, trust_remote_code=trust_remote_code)
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_language_model(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Save the configs of a model and of its adapter."""
    base: Any = model
    if isinstance(model, PeftModel):
        with _one_line_errors("save the adapter's config", "check the lora_* keys"):
            for config in model.peft_config.values():
                config.save_pretrained(str(folder / "adapter"))
        base = model.get_base_model()
    with _one_line_errors("save the model's configs", MODEL_REMEDY):
        base.save_pretrained(str(folder), state_dict={})
        is_sharded = any(hasattr(weight, "ds_numel") for weight in base.parameters())
        if not isinstance(model, PeftModel) and not is_sharded:
            # Raises if weights share memory without being declared as tied, which safetensors does not allow.
            remove_tied_weights_from_state_dict(base.state_dict(), base)


def _load_again(folder: Path, tokenizer: Any, *, trust_remote_code: bool) -> None:
    """Check that the config and the tokenizer of a folder can be loaded, and the vocabulary is the same."""
    with _one_line_errors("load the saved config again", MODEL_REMEDY):
        AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    with _one_line_errors("load the saved tokenizer again", TOKENIZER_REMEDY):
        saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if saved.get_vocab() != tokenizer.get_vocab():
            raise ValueError("its vocabulary has changed")
        # The file is read with universal newlines.
        templates = [str(t.chat_template).replace("\r\n", "\n") for t in (saved, tokenizer)]
        if templates[0] != templates[1]:
            raise ValueError("its chat template has changed")


@contextmanager
def _one_line_errors(action: str, remedy: str) -> Iterator[None]:
    """Convert any exception to a UserError: without the block, the same would be raised after training."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        logger.debug("cannot %s", action, exc_info=True)
        reason = one_line(error)
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            reason, remedy = f"{error.strerror}: {error.filename}", "set TMPDIR to a folder with free space"
        raise UserError(f"cannot {action}: {reason}; {remedy}") from error


@contextmanager
def _no_weights(model: nn.Module) -> Iterator[None]:
    """Let the models of transformers inside a scorer save everything but their weights."""

    def clear(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        state.clear()

    handles: list[Any] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            handles.append(module.register_state_dict_post_hook(clear))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
