"""Estimate the disk space that a run needs for its checkpoints and its model.

Sizes follow from the shapes of the weights alone, so that `--dry_run` can compute them on the meta device.
Rollouts, metrics and the state of rewards are not counted; their size is not known in advance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from rlkit.errors import UserError
from rlkit.models.adapters import is_adapter_weight, weights_by_module
from rlkit.models.memory import optimizer_bytes_per_parameter
from rlkit.runs.checkpoints import checkpoints, step_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

GIB = 2**30
STATE_BYTES = 20_000  # schedule, random states, state of the trainer and of rlkit, manifest
RECORD_BYTES = 300  # of a tensor in a file of torch.save in addition to its values
# Bytes per parameter that DeepSpeed adds: half weights for its own format, and float32 copies of those that
# are trained. The moments of the optimizer are counted separately, in float32.
DEEPSPEED_WEIGHT_BYTES, DEEPSPEED_MASTER_BYTES = 2, 4


@dataclass(frozen=True)
class DiskEstimate:
    """Disk space of a run.

    Attributes:
        checkpoint_bytes: Size of a checkpoint.
        model_bytes: Size of the folder `model/`.
        num_steps: Number of optimizer steps of the run.
        num_saved: Number of checkpoints that the run writes.
        limit: Maximum number of checkpoints that are kept, or None.
    """

    checkpoint_bytes: float
    model_bytes: float
    num_steps: int
    num_saved: int
    limit: int | None

    @property
    def num_kept(self) -> int:
        """Number of checkpoints when the run ends."""
        return min(self.num_saved, self.limit or self.num_saved)

    @property
    def minimum_bytes(self) -> float:
        """Space without which the run cannot end: that of one checkpoint, if it writes any, and the model."""
        return self.checkpoint_bytes * min(self.num_saved, 1) + self.model_bytes

    @property
    def peak_bytes(self) -> float:
        """Maximum space in use: an old checkpoint is deleted when the new one is complete."""
        num_existing = min(self.num_saved, self.num_kept + 1)
        return max(
            num_existing * self.checkpoint_bytes, self.num_kept * self.checkpoint_bytes + self.model_bytes
        )


def estimate_disk(
    model: nn.Module,
    trainer_args: TrainingArguments,
    num_steps: int,
    *,
    deepspeed: bool = False,
    processing_bytes: float = 0.0,
) -> DiskEstimate:
    """Estimate the disk space of a run.

    Args:
        model: Model, adapters included; the weights may be on the meta device.
        trainer_args: Arguments of the trainer.
        num_steps: Number of optimizer steps of the run.
        deepspeed: Whether DeepSpeed writes the checkpoints.
        processing_bytes: Size of the configs and the tokenizer, which are in the checkpoints and in `model/`.
    """
    weights = {id(weight): (path, weight) for path, weight in weights_by_module(model)}.values()
    model_bytes = _num_bytes(weight for path, weight in weights if not is_adapter_weight(path))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    checkpoint_bytes: float = _num_bytes(model.parameters())
    if isinstance(model, PeftModel):
        checkpoint_bytes = _adapter_bytes(model, trained)
    elif not isinstance(model, PreTrainedModel):  # a scorer of documents, saved with copies of tied weights
        checkpoint_bytes = _num_bytes(model.state_dict().values())
    if getattr(trainer_args, "sync_ref_model", False):  # the reference model is part of the state
        checkpoint_bytes += model_bytes
    if not trainer_args.save_only_model:
        checkpoint_bytes += optimizer_state_bytes(trained, trainer_args, deepspeed=deepspeed)
        if deepspeed:
            num_trained = sum(map(_num_elements, trained))
            checkpoint_bytes += DEEPSPEED_WEIGHT_BYTES * sum(map(_num_elements, model.parameters()))
            checkpoint_bytes += DEEPSPEED_MASTER_BYTES * num_trained
    return DiskEstimate(
        checkpoint_bytes + processing_bytes + STATE_BYTES,
        model_bytes + processing_bytes,
        num_steps,
        num_checkpoints(trainer_args, num_steps),
        trainer_args.save_total_limit or None,
    )


def optimizer_state_bytes(
    weights: Iterable[nn.Parameter], trainer_args: TrainingArguments, *, deepspeed: bool = False
) -> float:
    """Return the size of the optimizer's state in a checkpoint.

    The optimizer takes one step on weights without memory, which gives its state the right shapes. Optimizers
    that need a device, such as 8-bit ones, are estimated by their number of bytes per parameter.
    """
    meta = []
    for weight in weights:
        shape = getattr(weight, "ds_shape", weight.shape)
        dtype = torch.float32 if deepspeed else weight.dtype
        meta.append(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
        meta[-1].grad = torch.empty_like(meta[-1])
    try:
        cls, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(trainer_args)
        optimizer = cls(meta, **{key: value for key, value in kwargs.items() if key != "fused"})
        optimizer.step()
    except Exception:  # an optimizer may need anything, and an estimate must not stop a run
        return sum(map(_num_elements, meta)) * optimizer_bytes_per_parameter(trainer_args.optim)
    tensors: list[torch.Tensor] = []
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes + RECORD_BYTES for tensor in tensors)


def num_checkpoints(trainer_args: TrainingArguments, num_steps: int) -> int:
    """Return the number of checkpoints that a run of `num_steps` optimizer steps writes."""
    if trainer_args.save_strategy == "no":
        return 0
    if trainer_args.save_strategy == "epoch":
        return max(math.ceil(trainer_args.num_train_epochs), 1)
    interval = trainer_args.save_steps
    if interval < 1:  # a fraction of the run
        interval = math.ceil(num_steps * interval)
    return math.ceil(num_steps / interval)  # transformers also saves after the last step


def count_steps(trainer_args: TrainingArguments, num_rows: int, num_processes: int) -> int:
    """Return the number of optimizer steps of a run, estimated from the number of its training rows."""
    if trainer_args.max_steps > 0:
        return trainer_args.max_steps
    repeats = getattr(trainer_args, "num_generations", 1) * getattr(trainer_args, "num_iterations", 1)
    batch = trainer_args.per_device_train_batch_size * trainer_args.gradient_accumulation_steps
    steps_per_epoch = max(math.ceil(num_rows * repeats / (batch * num_processes)), 1)
    return math.ceil(trainer_args.num_train_epochs * steps_per_epoch)


def free_bytes(folder: Path, *, overwrite: bool = False) -> int:
    """Return the free disk space for a run in a folder, which need not exist.

    Args:
        folder: Run directory.
        overwrite: Whether the run in the folder is deleted first.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    freed = sum(path.lstat().st_size for path in folder.rglob("*")) if overwrite else 0
    return disk_usage(existing).free + freed


def check_room(estimate: DiskEstimate, folder: Path, *, resume: bool, overwrite: bool) -> str | None:
    """Return a warning if there is too little disk space for all checkpoints that a run keeps, else None.

    Args:
        estimate: Estimated disk space of the run.
        folder: Run directory.
        resume: Whether the run in the folder is resumed; its checkpoints already take space.
        overwrite: Whether the run in the folder is deleted first.

    Raises:
        UserError: There is no space for one checkpoint and the model.
    """
    free, minimum, peak = free_bytes(folder, overwrite=overwrite), estimate.minimum_bytes, estimate.peak_bytes
    if resume and (steps := [step_of(path) for path in checkpoints(folder)]):
        peak = max(peak - len(steps) * estimate.checkpoint_bytes, 0.0)
        # A finished run only saves its model.
        minimum = estimate.model_bytes if max(steps) >= estimate.num_steps else min(minimum, peak)
    if free < minimum:
        raise UserError(
            f"not enough disk space for {folder}: a checkpoint and the model need {minimum / GIB:.2g} GiB, "
            f"and {free / GIB:.2g} GiB are free; free space, or set output_dir to another disk"
        )
    if free < peak:
        return (
            f"the disk of {folder} will be full: {estimate.num_kept} checkpoints and the model need "
            f"{peak / GIB:.2g} GiB, and {free / GIB:.2g} GiB are free; set save_total_limit"
        )
    return None


def format_disk(estimate: DiskEstimate) -> str:
    """Return the size of a checkpoint and of the model, and the number of checkpoints kept."""
    checkpoints = "1 checkpoint" if estimate.num_kept == 1 else f"{estimate.num_kept} checkpoints"
    return (
        f"{checkpoints} of {estimate.checkpoint_bytes / GIB:.2g} GiB, model {estimate.model_bytes / GIB:.2g} "
        "GiB, besides rollouts"
    )


def _adapter_bytes(model: PeftModel, trained: Iterable[nn.Parameter]) -> int:
    """Return the size of the adapter's file, to which PEFT adds embeddings that the adapter is on."""
    weights: Iterable[torch.Tensor] = trained
    if not any(hasattr(weight, "ds_numel") for weight in model.parameters()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: dict[str, Any] = get_peft_model_state_dict(model)
        weights = state.values()
    return _num_bytes(weights)


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(_num_elements(tensor) * tensor.element_size() for tensor in tensors)


def _num_elements(tensor: torch.Tensor) -> int:
    """Return the number of elements of a weight, also if DeepSpeed has sharded it."""
    return getattr(tensor, "ds_numel", tensor.numel())
