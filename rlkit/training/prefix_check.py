"""Comparison, at the start of training, of the shared prefix with TRL's padded forward pass.

A config does not say everything about a model's code: a block may drop keyword arguments, a position may be
the index in the row, a convolution may mix neighboring tokens. So two prompts with two completions each are
scored on the user's own model both ways, once per layout of `rlkit.training.shared_prefix.make_layout`.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainerCallback

from rlkit.errors import first_line
from rlkit.rollouts.local.generate import position_ids
from rlkit.training.probe import (
    CheckBatch,
    can_upcast,
    check_batch,
    in_float32,
    lowest_precision,
    module_names,
    recorded_tensors,
    undisturbed,
    upcast,
)
from rlkit.training.shared_prefix import (
    AttentionRecord,
    Scores,
    add_shared_prefix,
    completion_log_probs,
    expand_router_logits,
    needs_last_token,
    recorded_attention,
    supports_shared_prefix,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

    from rlkit.training.grpo import GRPOTrainer

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Maximum difference of log-probabilities, entropies and auxiliary losses in float32. The order of sums
# changes the log-probabilities of random tokens by at most 5e-5 nats in SmolLM2-135M (30 layers), and by 9e-6
# in models of two layers.
FLOAT32_TOLERANCE = 1e-4
# If padding alone changes TRL's log-probabilities by more than a third of that, three times the change is
# tolerated, up to this maximum. Otherwise rounding in a deep model would turn the shared prefix off.
MAX_FLOAT32_TOLERANCE = 1e-3
# Maximum of the same differences relative to the range of the log-probabilities, which is the wider the
# larger the logits are. Measured: at most 0.06 in bfloat16 (0.07 if a router selects another expert), and
# 0.01 in float16.
RELATIVE_TOLERANCES = {torch.float16: 0.05, torch.bfloat16: 0.15}
# Maximum difference of a layer's output, relative to its largest element, to name the first wrong layer.
LAYER_TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}

# Prompt lengths and completion lengths of two groups of two rollouts, and whether attention has a mask.
SHAPES = (
    ((5, 9), (6, 3, 4, 6), True),
    ((4, 4), (12, 10, 9, 12), False),
)


class SharedPrefix(TrainerCallback):
    """The forward pass of a trainer that computes each prompt once, if a check on its model passes.

    Args:
        trainer: Trainer of the model, of which `shared_prefix` is set when the check passes.
    """

    def __init__(self, trainer: GRPOTrainer):
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        self.trainer = trainer
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model: PreTrainedModel = base
        self._is_candidate = False
        self._needs_last_token = needs_last_token(base)
        self._takes_position_ids = "position_ids" in inspect.signature(type(base).forward).parameters

    def enable(self, *, share: bool) -> None:
        """Check the model, at once or, if it is sharded, when training begins.

        Args:
            share: Whether prompts are shared if the check passes.
        """
        trainer = self.trainer
        reason = supports_shared_prefix(self.model) if share else None
        self._is_candidate = share and reason is None
        if reason is not None:
            self._warn(reason)
        if self._is_candidate:
            add_shared_prefix()
            if trainer.aux_loss_enabled:
                expand_router_logits(self.model)
        elif not trainer.aux_loss_enabled:
            return
        # Weights that are sharded, or not on their device yet, are complete only in the prepared model.
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        if is_sharded or self.model.device != trainer.accelerator.device:
            trainer.add_callback(self)
        else:
            self._check(trainer.model, is_prepared=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Check the prepared model."""
        self._check(self.trainer.model_wrapped, is_prepared=True)

    def _warn(self, reason: str) -> None:
        if self.trainer.accelerator.is_main_process:
            logger.warning("shared_prefix is off for this model: %s", reason)

    @property
    def with_last_token(self) -> bool:
        """Whether rows contain the last token of each completion, which predicts nothing.

        Old log-probabilities and the loss come from the same computation, so both have the token, even if
        only the loss needs it for its auxiliary loss.
        """
        return self._needs_last_token or self.trainer.aux_loss_enabled

    def score(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_length: int,
        batch_size: int | None = None,
        *,
        compute_aux_loss: bool = False,
        masks_short_rows: bool = True,
    ) -> Scores:
        """Return what `completion_log_probs` does, for `batch_size` rows at a time."""
        size = batch_size or len(input_ids)
        chunks = []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            with self.trainer.accelerator.autocast():
                scores = completion_log_probs(
                    model,
                    ids,
                    mask,
                    completion_length,
                    with_last_token=self.with_last_token,
                    compute_aux_loss=compute_aux_loss,
                    masks_short_rows=masks_short_rows,
                )
            chunks.append(scores)
        log_probs, entropies, aux_losses = zip(*chunks, strict=True)
        return Scores(
            torch.cat(log_probs),
            None if entropies[0] is None else torch.cat(entropies),
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def with_position_ids(self, model: torch.nn.Module) -> Callable[..., Any]:
        """Return a function that calls a model with position ids that skip padding, as sampling does.

        TRL passes none. With absolute positions (GPT-2), or a norm after the rotary embedding (Hunyuan), a
        prompt's padding would then change its log-probabilities.
        """
        if not self._takes_position_ids:
            return model

        def forward(*, attention_mask: torch.Tensor, **inputs: object) -> object:
            positions = position_ids(attention_mask)
            return model(attention_mask=attention_mask, position_ids=positions, **inputs)

        return forward

    # --- The check ------------------------------------------------------------------------------------------

    def _check(self, model: torch.nn.Module, *, is_prepared: bool) -> None:
        """Turn the shared prefix on, or warn why not. All processes must call this together.

        Nothing is raised, and the model, its buffers and the random states are as before.

        Args:
            model: Model inside the wrappers that training uses.
            is_prepared: Whether wrappers shard the model. Its weights cannot be converted to float32 then,
                and forward passes in grad mode would wait for a backward pass.
        """
        trainer = self.trainer
        precision = lowest_precision(self.model, trainer.accelerator.mixed_precision)
        with undisturbed(model, trainer.accelerator.device):
            self._check_aux_loss(model)
            if not self._is_candidate:
                return
            fault = self._compare_shapes(model, precision)
            fault = fault or self._compare_training(model, precision, with_gradients=not is_prepared)
            # The processes must agree, because the check gathers, and their GPUs differ in free memory.
            may_upcast = not is_prepared and all(gather_object([can_upcast(model)]))
            if fault is None and may_upcast and precision != torch.float32:
                with upcast(model):
                    exact = in_float32(model)
                    fault = self._compare_shapes(exact, torch.float32)
                    fault = fault or self._compare_training(exact, torch.float32, with_gradients=True)
                if fault is not None and fault.kind == "padded_fails":
                    fault = None  # the model's code does not support float32
        trainer.shared_prefix = fault is None
        if fault is not None:
            self._warn(fault.message)
        elif trainer.accelerator.is_main_process:
            logger.debug("shared_prefix gives the log-probabilities of TRL's forward pass")

    def _check_aux_loss(self, model: torch.nn.Module) -> None:
        """Turn off an auxiliary loss that TRL cannot compute, for example because there are no experts."""
        trainer = self.trainer
        if not trainer.aux_loss_enabled:
            return
        batch = check_batch(self.model, *SHAPES[0][:2], trainer.accelerator.device)
        padded = partial(trainer.padded_scores, model)
        error = _first(_error_of(padded, batch))
        if error is None:
            return
        trainer.aux_loss_enabled = False
        if _first(_error_of(padded, batch)) is not None:
            trainer.aux_loss_enabled = True  # the auxiliary loss is not the cause
        elif trainer.accelerator.is_main_process:
            name = self.model.config.model_type
            logger.warning("the auxiliary loss is off: TRL cannot compute it for %s (%s)", name, error)

    def _compare_training(self, model: Any, precision: torch.dtype, *, with_gradients: bool) -> Fault | None:
        """Compare in training mode, in which a model may limit the capacity of experts or use batch norms.

        Gradient checkpointing, which may call the layers with other arguments, is on if training uses it.
        Dropout is off. Other randomness, such as noise in a router, leaves nothing to compare.
        """
        for module in self.model.modules():
            module.training = not isinstance(module, torch.nn.modules.dropout._DropoutNd)
        padded = partial(self.trainer.padded_scores, model)
        batch = check_batch(self.model, *SHAPES[0][:2], self.trainer.accelerator.device)
        with self._grad_enabled() if with_gradients else nullcontext():
            cannot_compare = _first(_randomness(padded, batch))
            fault = None if cannot_compare else self._compare_shapes(model, precision, SHAPES[:1])
        self.model.eval()
        return fault and fault._replace(message=f"in training mode, {fault.message}")

    @contextmanager
    def _grad_enabled(self) -> Iterator[None]:
        """Enable grad mode in the block, and gradient checkpointing if training uses it."""
        args = self.trainer.args
        with torch.enable_grad():
            if not args.gradient_checkpointing or self.model.is_gradient_checkpointing:
                yield
                return
            hooks = getattr(self.model, "_require_grads_hooks", [])
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
            try:
                yield
            finally:
                self.model.gradient_checkpointing_disable()
                self.model.disable_input_require_grads()  # removes the hooks that enabling has added
                self.model._require_grads_hooks = hooks

    def _compare_shapes(
        self, model: Any, precision: torch.dtype, shapes: Sequence[tuple[Any, ...]] = SHAPES
    ) -> Fault | None:
        """Return the first fault with batches of the given shapes, the same in all processes, or None."""
        padded = partial(self.trainer.padded_scores, model)
        device = self.trainer.accelerator.device
        batches = [
            check_batch(self.model, prompts, completions, device) for prompts, completions, _ in shapes
        ]
        for batch, (*_, has_mask) in zip(batches, shapes, strict=True):
            shared = partial(
                self.score,
                model,
                compute_aux_loss=self.trainer.aux_loss_enabled,
                masks_short_rows=has_mask,
            )
            fault = _first(_compare(self.model, padded, shared, batch, precision))
            if fault is not None and fault.kind == "difference" and precision == torch.float32:
                # Rows of equal length have no padding, so the other shape may show more of the rounding.
                noise = max(gather_object([_padding_noise(padded, each) for each in batches]))
                tolerance = min(3 * noise, MAX_FLOAT32_TOLERANCE)
                if tolerance > FLOAT32_TOLERANCE:
                    inputs = self.model, padded, shared, batch, precision
                    fault = _first(_compare(*inputs, float32_tolerance=tolerance))
            if fault is not None and fault.kind == "difference":
                # The processes agree, so that all of them run these forward passes, too.
                tolerance = LAYER_TOLERANCES[precision]
                layer = _first(_first_wrong_layer(self.model, padded, shared, batch, tolerance))
                if layer is not None:
                    fault = fault._replace(message=f"{fault.message}; the first that differs is {layer}")
            if fault is not None:
                return fault
        return None


class Scorer(Protocol):
    """Function that scores the completions (T tokens) of a batch with either forward pass."""

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_length: int
    ) -> Scores:
        """Return the scores for ids and mask (B, P+T)."""
        ...


class Fault(NamedTuple):
    """Why the forward pass with a shared prefix cannot be used.

    Attributes:
        kind: "padded_fails" if TRL's own forward pass raises, "difference" if the two passes give other
            numbers, or "module" if a module raises, or computes attention without the layout.
        message: Reason for the log.
    """

    kind: Literal["padded_fails", "difference", "module"]
    message: str


def _first(value: T | None) -> T | None:
    """Return the first value that is not None, in the order of the processes."""
    return next((each for each in gather_object([value]) if each is not None), None)


def _compare(
    model: PreTrainedModel,
    padded: Scorer,
    shared: Scorer,
    batch: CheckBatch,
    precision: torch.dtype,
    *,
    float32_tolerance: float = FLOAT32_TOLERANCE,
) -> Fault | None:
    """Return why the forward pass with a shared prefix cannot be used for a batch, or None."""
    # Any exception means that this forward pass cannot be used, whatever a custom model raises.
    try:
        with recorded_attention(shared=False) as expected_calls:
            expected = padded(*batch)
    except Exception as error:
        return Fault("padded_fails", f"TRL's forward pass raises {_describe(error)}")
    try:
        with recorded_attention(shared=True) as calls:
            actual = shared(*batch)
    except Exception as error:
        reason = _fault_of_modules(model, expected_calls, calls, is_complete=False)
        return Fault("module", reason or f"{_raising_module(model, error)} raises {_describe(error)}")
    reason = _fault_of_modules(model, expected_calls, calls, is_complete=True)
    if reason is not None:
        return Fault("module", reason)
    is_scored = batch.attention_mask[:, -batch.completion_length :].bool()
    tolerance = float32_tolerance
    if precision != torch.float32:
        log_probs = expected.log_probs.detach()[is_scored]
        tolerance = RELATIVE_TOLERANCES[precision] * float(log_probs.max() - log_probs.min())
    for name, before, after in zip(
        ("log-probabilities", "entropies", "the auxiliary loss"), expected, actual, strict=True
    ):
        if before is None or after is None:
            continue
        difference = (after - before).detach().abs()
        largest = float(difference[is_scored].max() if difference.dim() else difference)
        if not largest <= tolerance:  # a NaN is a difference, too
            change = f"it changes {name} by up to {largest:.2g} (tolerance {tolerance:.2g})"
            return Fault("difference", change)
    return None


def _padding_noise(padded: Scorer, batch: CheckBatch) -> float:
    """Return how much TRL's log-probabilities of a batch differ from those of its rows without padding.

    0 if the model cannot score a single row.
    """
    log_probs = padded(*batch).log_probs
    differences = []
    for ids, mask, row in zip(batch.input_ids, batch.attention_mask.bool(), log_probs, strict=True):
        length = int(mask[-batch.completion_length :].sum())
        unpadded = ids[mask][None]
        try:
            alone = padded(unpadded, torch.ones_like(unpadded), length).log_probs[0]
        except Exception:
            return 0.0
        differences.append(float((alone - row[:length]).detach().abs().max()))
    return max(differences)


def _randomness(scorer: Scorer, batch: CheckBatch) -> str | None:
    """Return why the scores of a batch cannot be compared: they differ from call to call, or raise."""
    error = _error_of(scorer, batch)
    if error is not None:
        return error
    first, second = (scorer(*batch).log_probs for _ in range(2))
    return None if torch.equal(first, second) else "it is random"


def _error_of(scorer: Scorer, batch: CheckBatch) -> str | None:
    try:
        scorer(*batch)
    except Exception as error:
        return _describe(error)
    return None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _raising_module(model: PreTrainedModel, error: Exception) -> str:
    """Return the name of the innermost module in whose forward pass an exception was raised."""
    names = module_names(model)
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self", frame.f_locals.get("module"))
        if isinstance(module, torch.nn.Module):
            name = names.get(module) or name
    return name or "it"


def _fault_of_modules(
    model: PreTrainedModel, expected: AttentionRecord, actual: AttentionRecord, *, is_complete: bool
) -> str | None:
    """Return the fault of the first attention module that has one, or None.

    Args:
        model: Model with the modules.
        expected: Record of TRL's forward pass.
        actual: Record of the forward pass with a shared prefix.
        is_complete: Whether that forward pass has reached all modules.
    """
    names = module_names(model)
    without_layout = [
        names.get(module, type(module).__name__)
        for module in expected.has_layout
        if not actual.has_layout.get(module, not is_complete)
    ]
    if without_layout:
        more = f" (and {len(without_layout) - 1} more)" if len(without_layout) > 1 else ""
        return f"{without_layout[0]}{more} computes attention without the layout of the shared row"
    for module, fault in actual.faults.items():
        return f"{names.get(module, type(module).__name__)} {fault}"
    return None


def _first_wrong_layer(
    model: PreTrainedModel, padded: Scorer, shared: Scorer, batch: CheckBatch, tolerance: float
) -> str | None:
    """Return the name of the first layer or part of a layer whose output differs, or None if none does."""
    with recorded_tensors(model) as expected:
        padded(*batch)
    with recorded_tensors(model) as actual:
        shared(*batch)
    B, width = batch.input_ids.shape
    for before, after in zip(expected, actual, strict=False):
        indices = _padded_indices(batch, after.tensor.size(1))
        is_comparable = before.tensor.shape[:2] == (B, width) and len(after.tensor) == 1
        if before.name != after.name or not is_comparable or indices is None:
            continue
        row = before.tensor.flatten(0, 1)[indices].float()
        difference = (after.tensor[0].float() - row).abs().max()
        if not difference <= tolerance * row.abs().max():
            return after.name
    return None


def _padded_indices(batch: CheckBatch, num_tokens: int) -> torch.Tensor | None:
    """Return the index in the flattened batch of each token of the shared row, or None if sizes differ."""
    mask = batch.attention_mask.bool().cpu()
    start = mask.size(1) - batch.completion_length
    is_new = torch.tensor([True, False]).repeat(len(mask) // 2)[:, None]
    columns = torch.arange(mask.size(1))
    is_prompt = mask & is_new & (columns < start - 1)
    prompts, is_completion = is_prompt.flatten().nonzero(), mask & (columns >= start - 1)
    has_next = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    # Without the last token of each completion, and with it.
    for inputs in (is_completion & has_next, is_completion):
        indices = torch.cat([prompts, inputs.flatten().nonzero()]).squeeze(1)
        if len(indices) == num_tokens:
            return indices.to(batch.input_ids.device)
    return None
