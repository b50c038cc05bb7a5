"""How much memory a step of GRPO or SFT needs, from the model's shape alone: no weight is loaded.

Weights are counted on the meta device. What the forward keeps for the backward is counted on fake tensors, as
PyTorch's autograd hands it over, on one and on two layers; the rest follows.
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
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from rlkit.models.attention import MATMUL_KEYS
from rlkit.models.load import without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.training_args import OptimizerNames
    from trl import ModelConfig

    from rlkit.arguments.parse import SFTRunConfig, TrainConfig

FLOAT = 4  # bytes
HALF = 2
ADAM = 2 * FLOAT  # bytes of state for a trained parameter
# Copies of a tile of logits in the head's backward: one kernel on a GPU, ten torch operations on a CPU.
TILES = {False: 2, True: 10}
# What a process takes besides tensors: on a CPU libraries that are loaded later, measured with a model of a
# few kilobytes; on a GPU a CUDA context and workspaces, which is not measured.
BESIDES = {False: 1.5 * 2**30, True: 85 * 2**20}
QUANTIZED = {"load_in_4bit": 0.55, "load_in_8bit": 1.05}  # bytes a weight, with scales


@dataclass(frozen=True)
class Shape:
    """What is in memory at a time on one device.

    Attributes:
        rows: completions of a micro-batch.
        prompts: different prompts among them.
        prompt, completion: tokens of one.
        sampled: completions that are generated at a time.
    """

    rows: int
    prompts: int
    prompt: int
    completion: int
    sampled: int


@dataclass(frozen=True)
class Sharding:
    """Over how many devices weights, gradients and optimizer are shared out, and whether by DeepSpeed."""

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    deepspeed: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    generation: float  # KV cache, and the gathered weights of a model in shards
    reference: float
    step: float  # what the optimizer's step makes and drops
    besides: float  # what is no tensor

    @property
    def peak(self) -> float:
        """The most at a time: while sampling, at the end of a forward, or in the optimizer's step."""
        busiest = max(self.generation, self.activations, self.gradients + self.step)
        return self.weights + self.optimizer + self.reference + busiest + self.besides


def estimate(
    run: TrainConfig | SFTRunConfig,
    config: PreTrainedConfig,
    shape: Shape,
    sharding: Sharding,
    *,
    on_cpu: bool,
) -> Memory:
    """Estimate the memory of a run.

    Args:
        run: the parsed keys.
        config: the model's, from transformers.
        on_cpu: attention keeps its probabilities there for short rows (`rlkit.models.attention`).
    """
    trainer_args, model = run.trainer_args, run.model_args
    total, trained = parameters(config, run.model_args)
    half = bool(trainer_args.bf16 or trainer_args.fp16)
    stored = next(
        (size for key, size in QUANTIZED.items() if getattr(model, key)), _bytes(model.dtype, config)
    )
    master = 0
    if sharding.deepspeed and half:  # it keeps half weights, and whole ones with the optimizer
        stored, master = HALF, FLOAT
    gradient = HALF if sharding.deepspeed and half else FLOAT
    weights = total * stored / sharding.weights
    copies = total * HALF if half and not sharding.deepspeed and stored > HALF else 0  # autocast's
    copies *= 1 + on_cpu  # and once more as the CPU's matrix products want them
    kept = kept_for_backward(
        config, model, shape, half=half, checkpointing=trainer_args.gradient_checkpointing, on_cpu=on_cpu
    )
    gathered = total * (HALF if half else stored) if sharding.weights > 1 else 0
    return Memory(
        weights=weights,
        gradients=trained * gradient / sharding.gradients,
        optimizer=trained * (_optimizer_bytes(trainer_args.optim) + master) / sharding.optimizer,
        activations=kept + copies,
        generation=(
            0 if getattr(trainer_args, "use_vllm", False) else cache(config, shape, half=half) + copies
        )
        + gathered,
        reference=weights if getattr(trainer_args, "beta", 0) and not model.use_peft else 0,
        step=trained * FLOAT / sharding.optimizer,
        besides=BESIDES[on_cpu],
    )


def parameters(config: PreTrainedConfig, model: ModelConfig) -> tuple[int, int]:
    """All parameters of a model, and those that are trained."""
    weights = list(without_weights(config, model).parameters())
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


def kept_for_backward(
    config: PreTrainedConfig,
    model: ModelConfig,
    shape: Shape,
    *,
    half: bool,
    checkpointing: bool,
    on_cpu: bool,
) -> float:
    """Bytes that a forward of a micro-batch keeps, with the head's working space.

    Args:
        config: the model's, from transformers.
        model: TRL's keys of it; with an adapter less is kept.
    """
    tokens = shape.prompts * shape.prompt + shape.rows * shape.completion
    text = config.get_text_config()
    one, two = (_kept(config, model, tokens, layers, half) for layers in (1, 2))
    layer, rest = float(two - one), 2 * one - two
    layer += _kept_by_attention(text, shape, half=half, on_cpu=on_cpu)
    layers = text.num_hidden_layers
    inputs = tokens * text.hidden_size * FLOAT
    body = layers * inputs + layer if checkpointing else layers * layer
    scored = min(shape.rows * shape.completion, TOKEN_CHUNK_SIZE)
    tile = scored * min(text.vocab_size, _CHUNKED_LOGPROB_CHUNK_SIZE) * FLOAT
    return rest + body + tile * TILES[on_cpu]


def _kept_by_attention(text: PreTrainedConfig, shape: Shape, *, half: bool, on_cpu: bool) -> float:
    """Bytes of a layer beyond those of plain attention: a completion has its prompt's keys and values."""
    keys = shape.prompt + shape.completion
    probabilities = on_cpu and half and keys <= MATMUL_KEYS
    heads = _kv_heads(text) if probabilities else text.num_attention_heads
    kept = 2 * shape.rows * heads * keys * _head_size(text)
    kept += shape.rows * text.num_attention_heads * shape.completion * _head_size(text)
    if probabilities:
        scores = shape.rows * shape.completion * keys + shape.prompts * shape.prompt**2
        kept += text.num_attention_heads * scores
    return kept * (HALF if half else FLOAT)


def _kept(config: PreTrainedConfig, keys: ModelConfig, tokens: int, layers: int, half: bool) -> int:
    """Bytes that autograd keeps of a model with so many layers, weights left out, on fake tensors."""
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    config.dtype, config._attn_implementation = torch.float32, "sdpa"
    model = without_weights(config, keys).train()
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with FakeTensorMode():
        _fake(model)
        own = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
        sizes = {tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        with _counting(own, sizes, tokens) as found, autocast:
            causal = model.get_base_model() if isinstance(model, PeftModel) else model
            causal.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
    return sum(found.values())


def _fake(model: torch.nn.Module) -> None:
    """Put fake tensors of a CPU in place of a model's, which are on the meta device."""
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors, name, tensor in [(some, *item) for some in own for item in some.items()]:
            if tensor is None:
                continue
            if id(tensor) not in made:
                fake = torch.zeros(tensor.shape, dtype=tensor.dtype)
                weight = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if weight else fake
            tensors[name] = made[id(tensor)]


@contextmanager
def _counting(own: set[Any], sizes: set[tuple[int, ...]], tokens: int) -> Iterator[dict[Any, int]]:
    found: dict[Any, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = StorageWeakRef(tensor.untyped_storage())
        # Autocast's copies of the weights are counted apart: they are there in sampling too.
        copied = tensor.dtype != torch.float32 and {tuple(tensor.shape), tuple(tensor.shape[::-1])} & sizes
        mask = tensor.shape[-2:] == (tokens, tokens)  # which the real forward does not make
        if storage not in own and not copied and not mask:
            found[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def cache(config: PreTrainedConfig, shape: Shape, *, half: bool) -> float:
    """Bytes of the keys and values of the completions that are sampled at a time."""
    text = config.get_text_config()
    tokens = shape.sampled * (shape.prompt + shape.completion)
    width = _kv_heads(text) * _head_size(text)
    return 2 * text.num_hidden_layers * width * tokens * (HALF if half else FLOAT)


def _kv_heads(text: PreTrainedConfig) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _head_size(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _bytes(dtype: str | None, config: PreTrainedConfig) -> float:
    named = config.dtype if dtype in (None, "auto") else getattr(torch, str(dtype))
    return (named or torch.float32).itemsize  # type: ignore[union-attr]


def _optimizer_bytes(name: OptimizerNames | str) -> float:
    name = str(getattr(name, "value", name))
    if "8bit" in name:
        return 2
    if name.startswith("adam"):
        return ADAM
    return 0 if name == "sgd" else FLOAT
