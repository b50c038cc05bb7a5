"""Estimate the memory of a GRPO or SFT step from the model's config alone, without loading a weight.

Weights are counted on the meta device. The activations that the forward pass saves for the backward pass are
counted by running models of one and of two layers on fake tensors, with hooks on what autograd saves. The
difference is the cost of a layer; everything else follows from shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from rlkit.models.attention import MATMUL_KEYS
from rlkit.models.load import without_weights
from rlkit.models.patches import CPU_LOGITS_TILE, GPU_LOGITS_TILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.training_args import OptimizerNames
    from trl import ModelConfig

    from rlkit.arguments.parse import SFTRunConfig, TrainConfig

FLOAT32_BYTES = 4
HALF_BYTES = 2  # bfloat16 or float16
ADAM_BYTES = 2 * FLOAT32_BYTES  # two moments per trained parameter
# Copies of a tile of logits in the backward pass of TRL's fused head, by whether it runs on a CPU: one fused
# kernel on a GPU, ten torch operations on a CPU.
LOGITS_TILE_COPIES = {False: 2, True: 10}
# Memory of a process besides its tensors, by whether it runs on a CPU. On a CPU these are libraries imported
# late, measured with a model of a few kilobytes. On a GPU they are a CUDA context and workspaces, which have
# not been measured.
OVERHEAD_BYTES = {False: 1.5 * 2**30, True: 85 * 2**20}
QUANTIZED_BYTES = {"load_in_4bit": 0.55, "load_in_8bit": 1.05}  # per weight, scales included


@dataclass(frozen=True)
class BatchShape:
    """Sizes of what is in the memory of one device at a time.

    Attributes:
        num_completions: Number of completions of a micro-batch.
        num_prompts: Number of distinct prompts of a micro-batch, which are computed once each.
        prompt_tokens: Number of tokens of a prompt.
        completion_tokens: Number of tokens of a completion.
        num_sampled: Number of completions that are generated at a time.
    """

    num_completions: int
    num_prompts: int
    prompt_tokens: int
    completion_tokens: int
    num_sampled: int


@dataclass(frozen=True)
class Sharding:
    """Number of devices over which weights, gradients and optimizer state are sharded; 1 is not sharded."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    deepspeed: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory on one device by purpose, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    generation: float  # KV cache, and the gathered weights of a sharded model
    reference: float
    optimizer_step: float  # temporary tensors of `optimizer.step()`
    overhead: float  # what is not in tensors
    reward_models: float = 0.0  # weights of reward models on the same device

    @property
    def peak_bytes(self) -> float:
        """Maximum over the phases of a step: sampling, the end of a forward pass, the optimizer's step."""
        busiest = max(self.generation, self.activations, self.gradients + self.optimizer_step)
        frozen = self.reference + self.reward_models
        return self.weights + self.optimizer + frozen + busiest + self.overhead


def estimate_memory(
    run: TrainConfig | SFTRunConfig,
    config: PreTrainedConfig,
    shape: BatchShape,
    sharding: Sharding,
    *,
    on_cpu: bool,
    reward_model_bytes: float = 0.0,
) -> MemoryEstimate:
    """Estimate the memory of a run on one device.

    Args:
        run: Arguments of the run.
        config: Config of the model, from transformers.
        shape: Sizes of a micro-batch.
        sharding: Number of devices that share the model.
        on_cpu: Whether the run is on a CPU, where attention saves its probabilities for short rows (see
            `rlkit.models.attention`).
        reward_model_bytes: Bytes of the weights of reward models on the device.
    """
    trainer_args, model_args = run.trainer_args, run.model_args
    num_parameters, num_trained = count_parameters(config, model_args)
    half = bool(trainer_args.bf16 or trainer_args.fp16)
    bytes_per_weight = _bytes_per_weight(model_args, config)
    master_bytes = 0
    if sharding.deepspeed and half:  # DeepSpeed holds half weights, and float32 copies with the optimizer
        bytes_per_weight, master_bytes = HALF_BYTES, FLOAT32_BYTES
    bytes_per_gradient = HALF_BYTES if sharding.deepspeed and half else FLOAT32_BYTES
    weights = num_parameters * bytes_per_weight / sharding.weights

    autocast_copies = 0  # autocast caches a half copy of each float32 weight
    if half and not sharding.deepspeed and bytes_per_weight > HALF_BYTES:
        autocast_copies = num_parameters * HALF_BYTES
    if on_cpu:
        autocast_copies *= 2  # the CPU's matrix products need each copy in a layout of their own, too
    activations = saved_activation_bytes(
        config,
        model_args,
        shape,
        half=half,
        checkpointing=trainer_args.gradient_checkpointing,
        on_cpu=on_cpu,
    )
    generation = 0.0
    if not getattr(trainer_args, "use_vllm", False):
        generation += kv_cache_bytes(config, shape, half=half) + autocast_copies
    if sharding.weights > 1:  # all weights are gathered to sample
        generation += num_parameters * (HALF_BYTES if half else bytes_per_weight)
    has_reference = getattr(trainer_args, "beta", 0) and not model_args.use_peft
    optimizer_bytes = optimizer_bytes_per_parameter(trainer_args.optim) + master_bytes
    return MemoryEstimate(
        weights=weights,
        gradients=num_trained * bytes_per_gradient / sharding.gradients,
        optimizer=num_trained * optimizer_bytes / sharding.optimizer,
        activations=activations + autocast_copies,
        generation=generation,
        reference=weights if has_reference else 0,
        optimizer_step=num_trained * FLOAT32_BYTES / sharding.optimizer,
        overhead=OVERHEAD_BYTES[on_cpu],
        reward_models=reward_model_bytes,
    )


def count_parameters(config: PreTrainedConfig, model_args: ModelConfig) -> tuple[int, int]:
    """Return the number of parameters of a model and the number of those that are trained."""
    weights = list(without_weights(config, model_args).parameters())
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


def saved_activation_bytes(
    config: PreTrainedConfig,
    model_args: ModelConfig,
    shape: BatchShape,
    *,
    half: bool,
    checkpointing: bool,
    on_cpu: bool,
) -> float:
    """Return the bytes of activations saved for the backward pass of a micro-batch, working space included.

    Args:
        config: Config of the model, from transformers.
        model_args: TRL's arguments of the model; fewer activations are saved with an adapter.
        shape: Sizes of a micro-batch.
        half: Whether autocast computes in half precision.
        checkpointing: Whether gradient checkpointing is on: then each layer's input is saved, and one layer
            is recomputed at a time.
        on_cpu: Whether the model runs on a CPU.
    """
    num_tokens = shape.num_prompts * shape.prompt_tokens + shape.num_completions * shape.completion_tokens
    text_config = config.get_text_config()
    # A model of n layers saves outside + n * layer. Two equations give both.
    bytes_of_1 = _saved_bytes(config, model_args, num_tokens, 1, half)
    bytes_of_2 = _saved_bytes(config, model_args, num_tokens, 2, half)
    layer_bytes, outside_bytes = float(bytes_of_2 - bytes_of_1), 2 * bytes_of_1 - bytes_of_2
    layer_bytes += _shared_prefix_bytes(text_config, shape, half=half, on_cpu=on_cpu)
    num_layers = text_config.num_hidden_layers
    if checkpointing:
        input_bytes = num_tokens * text_config.hidden_size * FLOAT32_BYTES
        body_bytes = num_layers * input_bytes + layer_bytes
    else:
        body_bytes = num_layers * layer_bytes
    # TRL's fused head computes the logits of a tile of tokens and vocabulary at a time.
    max_tokens, max_vocabulary = CPU_LOGITS_TILE if on_cpu else GPU_LOGITS_TILE
    tile_tokens = min(shape.num_completions * shape.completion_tokens, max_tokens)
    tile_bytes = tile_tokens * min(text_config.vocab_size, max_vocabulary) * FLOAT32_BYTES
    return outside_bytes + body_bytes + tile_bytes * LOGITS_TILE_COPIES[on_cpu]


def _shared_prefix_bytes(
    text_config: PreTrainedConfig, shape: BatchShape, *, half: bool, on_cpu: bool
) -> float:
    """Return the bytes that attention with a shared prefix saves per layer beyond plain attention.

    Each completion attends to a copy of its prompt's keys and values (`rlkit.training.shared_prefix`).
    """
    num_keys = shape.prompt_tokens + shape.completion_tokens
    saves_probabilities = on_cpu and half and num_keys <= MATMUL_KEYS
    num_heads = text_config.num_attention_heads
    # torch's attention kernels get keys and values repeated for each query head; matrix products don't.
    num_key_heads = _num_kv_heads(text_config) if saves_probabilities else num_heads
    num_values = 2 * shape.num_completions * num_key_heads * num_keys * _head_dim(text_config)
    num_values += shape.num_completions * num_heads * shape.completion_tokens * _head_dim(text_config)
    if saves_probabilities:
        num_pairs = shape.num_completions * shape.completion_tokens * num_keys
        num_pairs += shape.num_prompts * shape.prompt_tokens**2
        num_values += num_heads * num_pairs
    return num_values * (HALF_BYTES if half else FLOAT32_BYTES)


def _saved_bytes(
    config: PreTrainedConfig, model_args: ModelConfig, num_tokens: int, num_layers: int, half: bool
) -> int:
    """Return the bytes that autograd saves, weights excluded, for a model cut to `num_layers` layers."""
    config = type(config).from_dict(
        {**config.to_dict(), "num_hidden_layers": num_layers, "layer_types": None}
    )
    config.dtype, config._attn_implementation = torch.float32, "sdpa"
    model = without_weights(config, model_args).train()
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with FakeTensorMode():
        _use_fake_tensors(model)
        weight_storages = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
        matrix_shapes = {tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2}
        ids = torch.zeros(1, num_tokens, dtype=torch.long)
        with _count_saved_tensors(weight_storages, matrix_shapes, num_tokens) as saved, autocast:
            causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
            causal_lm.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
    return sum(saved.values())


def _use_fake_tensors(model: torch.nn.Module) -> None:
    """Replace the weights of a model on the meta device by fake CPU tensors; tied weights stay tied."""
    fakes: dict[int, torch.Tensor] = {}  # by the id of the tensor on the meta device
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                table[name] = fakes[id(tensor)]


@contextmanager
def _count_saved_tensors(
    weight_storages: set[Any], matrix_shapes: set[tuple[int, ...]], num_tokens: int
) -> Iterator[dict[Any, int]]:
    """Yield a dict that collects the bytes of what autograd saves inside the block, by storage."""
    saved: dict[Any, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        # `estimate_memory` counts autocast's copies of weights, which sampling needs, too.
        shapes = {tuple(tensor.shape), tuple(tensor.shape[::-1])}
        is_weight_copy = tensor.dtype != torch.float32 and shapes & matrix_shapes
        is_mask = tensor.shape[-2:] == (num_tokens, num_tokens)  # the real forward pass makes none
        if storage not in weight_storages and not is_weight_copy and not is_mask:
            saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved


def kv_cache_bytes(config: PreTrainedConfig, shape: BatchShape, *, half: bool) -> float:
    """Return the bytes of the keys and values of all completions that are generated at a time."""
    text_config = config.get_text_config()
    num_tokens = shape.num_sampled * (shape.prompt_tokens + shape.completion_tokens)
    width = _num_kv_heads(text_config) * _head_dim(text_config)
    return 2 * text_config.num_hidden_layers * width * num_tokens * (HALF_BYTES if half else FLOAT32_BYTES)


def _num_kv_heads(text_config: PreTrainedConfig) -> int:
    return getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads


def _head_dim(text_config: PreTrainedConfig) -> int:
    head_dim = getattr(text_config, "head_dim", None)
    return head_dim or text_config.hidden_size // text_config.num_attention_heads


def _bytes_per_weight(model_args: ModelConfig, config: PreTrainedConfig) -> float:
    for key, size in QUANTIZED_BYTES.items():
        if getattr(model_args, key):
            return size
    dtype = config.dtype
    if model_args.dtype not in (None, "auto"):
        dtype = getattr(torch, str(model_args.dtype))
    return (dtype or torch.float32).itemsize  # type: ignore[union-attr]


def optimizer_bytes_per_parameter(name: OptimizerNames | str) -> float:
    """Return the bytes of an optimizer's state per trained parameter, for float32 parameters."""
    name = str(getattr(name, "value", name))
    if "8bit" in name:
        return 2
    if name.startswith("adam"):
        return ADAM_BYTES
    return 0 if name == "sgd" else FLOAT32_BYTES
