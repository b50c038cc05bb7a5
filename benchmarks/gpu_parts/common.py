"""What the parts of `benchmarks/gpu.py` share: models with random weights, a tokenizer, and measurements."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

GIB = 2**30
EOS = "<|endoftext|>"

# What a part returns: the function that measures each of its cases, by the name of the case.
Cases = dict[str, Callable[[], dict[str, Any]]]

# Sizes of published models; the weights are random.
MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "tie_word_embeddings": True,
    },
    "gemma-2b": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256_000,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
# Sizes that replace those of MODEL_CONFIGS on a CPU; the share of key heads stays.
TINY_MODEL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


class OutOfTime(BaseException):
    """A case does not finish within the time of its part.

    Not an Exception, because libraries and cases catch those, and the signal handler may raise this anywhere.
    """


@dataclass
class Bench:
    """Device to measure on, number of measurements, and time limit of a part.

    Attributes:
        device: Device of the models. On a CPU, all sizes are tiny.
        repeats: Number of measurements of each side; a case may take fewer, and says so.
        deadline: Time at which the part must have ended, as `time.monotonic()` counts.
    """

    device: torch.device
    repeats: int
    deadline: float

    @property
    def on_cpu(self) -> bool:
        """Whether the parts run with tiny sizes on a CPU."""
        return self.device.type == "cpu"

    def size(self, real: Any, tiny: Any) -> Any:
        """Return the size to measure with: a tiny one on a CPU."""
        return tiny if self.on_cpu else real

    def require_seconds(self, seconds: float) -> None:
        """Raise OutOfTime if less time than `seconds` is left."""
        remaining = max(self.deadline - time.monotonic(), 0.0)
        if seconds > remaining:
            raise OutOfTime(f"needs about {seconds:.0f} s, but the part has {remaining:.0f} s left")

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if not self.on_cpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Return unused memory to the device."""
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds that a call takes on the device."""
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def alternate(
        self,
        sides: Mapping[str, Callable[[], object]],
        repeats: int | None = None,
        *,
        calls: int = 1,
        warm_up: bool = True,
    ) -> dict[str, dict[str, float]]:
        """Call the sides in turn; return the seconds of a call of each and, on a GPU, its peak tensor memory.

        Alternation spreads a change of the machine's speed over all sides. `peak_gib` is the peak, and
        `added_gib` the peak minus what was allocated before, both of the last measurement.

        Args:
            sides: Functions to measure, by name.
            repeats: Number of measurements of each, or None for the bench's.
            calls: Number of calls per measurement.
            warm_up: Whether to call each side once before it is measured.
        """
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        memory: dict[str, dict[str, float]] = {name: {} for name in sides}

        def measurement(function: Callable[[], object]) -> None:
            for _ in range(calls):
                function()

        for function in sides.values() if warm_up else ():
            function()
        for _ in range(repeats or self.repeats):
            for name, function in sides.items():
                if not self.on_cpu:  # torch does not count the memory of tensors on a CPU
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                seconds[name].append(self.seconds(partial(measurement, function)) / calls)
                if not self.on_cpu:
                    peak = torch.cuda.max_memory_allocated()
                    memory[name] = {
                        "peak_gib": round(peak / GIB, 2),
                        "added_gib": round((peak - before) / GIB, 2),
                    }
        return {name: summary(values) | memory[name] for name, values in seconds.items()}

    def model(self, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        """Return a model of an entry of `MODEL_CONFIGS` with random weights, tiny on a CPU."""
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(
                self.config(name, **options), dtype=torch.float32, attn_implementation="sdpa"
            )
        # Rounded afterwards: drawn in bfloat16, the weights could be entirely different ones.
        model = model.to(dtype)
        self.free()
        return model

    def config(self, name: str, **options: Any) -> Any:
        """Return the config of an entry of `MODEL_CONFIGS`, with tiny sizes on a CPU."""
        sizes = MODEL_CONFIGS[name] | {
            "max_position_embeddings": 40_960,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        if self.on_cpu:
            # Few heads, and as many query heads per key head as the real model, up to four.
            heads = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
            sizes |= TINY_MODEL | {"num_attention_heads": 4, "num_key_value_heads": max(4 // heads, 1)}
        return AutoConfig.for_model(**(sizes | options))


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Turn off cuDNN's attention kernel inside the block; PyTorch prefers it on Hopper GPUs."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the minimum and the maximum."""
    return {
        "median_s": round(statistics.median(seconds), 5),
        "min_s": round(min(seconds), 5),
        "max_s": round(max(seconds), 5),
    }


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a chat template.

    A string of n ASCII characters has n tokens. All other ids decode to a number, so that what a model with
    random weights samples is a string.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {EOS: 0} | {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    vocabulary |= {f"Ġ{i}": i for i in range(len(vocabulary), vocab_size)}  # Ġ is the byte-level space
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=EOS, pad_token=EOS, padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


def speedup(measured: Mapping[str, Mapping[str, float]], baseline: str, candidate: str) -> float:
    """Return the baseline's median seconds divided by the candidate's."""
    return round(measured[baseline]["median_s"] / measured[candidate]["median_s"], 3)


def gradient_error(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """Return |g - r| / |r| of the gradients g and r of two models of the same shape."""
    difference = norm = 0.0
    for parameter, expected in zip(model.parameters(), reference.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None
            continue
        difference += (parameter.grad.float() - expected.grad.float()).square().sum().item()
        norm += expected.grad.float().square().sum().item()
    return (difference / norm) ** 0.5
