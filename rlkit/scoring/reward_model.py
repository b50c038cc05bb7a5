"""The reward `reward_model`: the logit of a sequence classifier that was trained to judge conversations.

It is imported only if a run uses it, because it imports torch and transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed

from rlkit.errors import UserError, check_choice, check_integer
from rlkit.logs import hide_weight_bars
from rlkit.models.load import loading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]

DTYPES = ("auto", "bfloat16", "float32")
FSDP_VARIABLE = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # accelerate sets it, and transformers reads it
HEAD = "ForSequenceClassification"  # ends the name of every classifier of transformers


class RewardModel:
    """Frozen sequence classifier with one logit, which is the reward of a prompt and a completion.

    The values are those of TRL's GRPOTrainer for the same classifier. The constructor reads the config and
    the tokenizer, which is cheap, since `rlkit check` and `rlkit train --dry_run` construct rewards, too. The
    weights are loaded by the first call, which is that of the evaluation before training or of the first
    batch: only then is the trainer's device certain and the trainer's own model in place.

    Args:
        model: Name on the Hub or folder of the classifier.
        device: Device of the classifier, such as "cpu" or "cuda:1"; None is the device of each process.
        batch_size: Maximum number of rows per forward pass.
        dtype: Data type of the weights; "auto" is that of the checkpoint.
        max_length: Maximum number of tokens of prompt and completion; None is the limit of the model.
        trust_remote_code: Whether to run Python code that comes with the model.

    Raises:
        UserError: An argument is invalid, the model does not exist or is not a classifier with one label.
    """

    in_process = True  # the runner calls it in the trainer's process, on the trainer's device

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        batch_size: int = 16,
        dtype: str = "auto",
        max_length: int | None = None,
        trust_remote_code: bool = False,
    ):
        self.name = _resolve(model)
        self.device = None if device is None else _check_device(device)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.dtype = check_choice("dtype", dtype, DTYPES)
        self.trust_remote_code = trust_remote_code
        with loading(f"the reward model {model!r}"):
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.name, trust_remote_code=trust_remote_code
            )
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=trust_remote_code
            )
        _check_classifier(model, self.config)
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token_id is None:
                raise UserError(f"the tokenizer of {model!r} has neither a padding token nor an EOS token")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        num_positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None:
            self.max_length = check_integer("max_length", max_length, 1, num_positions)
        else:  # a tokenizer without a limit says 1e30
            self.max_length = int(min(num_positions or 1e30, self.tokenizer.model_max_length))
        self._model: PreTrainedModel | None = None

    def __call__(
        self, prompts: Sequence[str | Messages], completions: Sequence[str | Messages]
    ) -> list[float | Exception]:
        """Return the logit of each row, or the reason why the row has none.

        Args:
            prompts: Strings or lists of chat messages.
            completions: Strings, or lists of the messages that follow the prompt.

        Raises:
            UserError: The weights cannot be loaded, or the tokenizer lacks the chat template that the prompts
                need.
        """
        model = self.load()
        scores: list[float | Exception] = [0.0] * len(prompts)
        encodings: dict[int, dict[str, list[int]]] = {}
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                encodings[i] = self._encode(self._format(prompt, completion))
            except UserError:
                raise
            except Exception as error:  # a chat template may raise anything, e.g. for an unexpected role
                scores[i] = error
        # Rows of similar length share a batch, so that little is padded. The longest come first: if memory
        # runs out, it does so at once.
        order = sorted(encodings, key=lambda i: len(encodings[i]["input_ids"]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            logits = self._logits(model, [encodings[i] for i in indices])
            for i, logit in zip(indices, logits, strict=True):
                scores[i] = logit
        return scores

    def load(self) -> PreTrainedModel:
        """Return the model; the first call loads the weights.

        Raises:
            UserError: The weights cannot be loaded, or lack some of the classifier's parameters.
        """
        if self._model is not None:
            return self._model
        device = torch.device(self.device or PartialState().device)
        num_devices = torch.cuda.device_count()
        if device.type == "cuda" and (device.index or 0) >= num_devices:
            raise UserError(
                f"there is no device {self.device!r}: this machine has {num_devices} CUDA devices"
            )
        hide_weight_bars()
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        # A resumed run loads the model at another step than the original run did. So loading must not draw
        # from the generator of the run.
        with (
            loading(f"the reward model {self.name!r}"),
            _unsharded(),
            torch.random.fork_rng(devices=[]),
        ):
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                use_safetensors=True,  # pickled weights can run code
                dtype=dtype,
                trust_remote_code=self.trust_remote_code,
                ignore_mismatched_sizes=True,  # reported below, on one line
                output_loading_info=True,
            )
        # transformers only warns that these would be random.
        not_loaded = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if not_loaded:
            raise UserError(
                f"the weights of the reward model {self.name!r} lack {not_loaded[0]}, or have another shape "
                "than its config: use a model that was trained as a sequence classifier"
            )
        # Causal classifiers read the logit of the last token that is not this one. Without it, they would
        # read that of the padding.
        config = model.config.get_text_config()
        config.pad_token_id = self.tokenizer.pad_token_id
        config.use_cache = False  # nothing is generated, so the cache would only take memory
        self._model = model.eval().requires_grad_(False).to(device)
        return self._model

    def weight_bytes(self) -> int:
        """Return the bytes of the weights, without loading them."""
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                self.config, trust_remote_code=self.trust_remote_code
            )
        if self.dtype != "auto":
            model.to(getattr(torch, self.dtype))
        return sum(weight.nbytes for weight in model.parameters())

    def _format(self, prompt: str | Messages, completion: str | Messages) -> str:
        """Return prompt and completion as one string, as TRL formats them."""
        if isinstance(prompt, str):
            return prompt + completion  # type: ignore[operator]
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"the prompts are chat messages, but the tokenizer of the reward model {self.name!r} has no "
                "chat template"
            )
        messages = [*prompt, *completion]
        return self.tokenizer.apply_chat_template(messages, tokenize=False)  # type: ignore[return-value]

    def _encode(self, text: str) -> dict[str, list[int]]:
        # The chat template contains the special tokens. Without `verbose=False` an over-long input would
        # cause a warning that it is truncated later, which it never is.
        encoding = dict(self.tokenizer(text=text, add_special_tokens=False, verbose=False))
        num_tokens = len(encoding["input_ids"])
        if num_tokens == 0:
            raise ValueError("the input of the reward model is empty")
        if num_tokens > self.max_length:
            raise ValueError(
                f"the input of the reward model has {num_tokens} tokens, more than {self.max_length}"
            )
        return encoding

    @torch.inference_mode()
    def _logits(self, model: PreTrainedModel, encodings: list[dict[str, list[int]]]) -> list[float]:
        batch = self.tokenizer.pad(
            encodings, padding=True, padding_side="right", return_tensors="pt", verbose=False
        )
        return model(**batch.to(model.device)).logits[:, 0].float().tolist()


def _resolve(name: str) -> str:
    """Return the name or the path of a model for `from_pretrained`, with `~` resolved."""
    if not isinstance(name, str) or not name:
        raise UserError(f"model must be the name or the folder of a reward model, not {name!r}")
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~", "runs/")) and not folder.is_dir():
        # Without this check, transformers would look for the path on the Hub.
        raise UserError(f"there is no model folder {name!r}")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(f"{name!r} is an adapter: merge it into its model, and save that")
    return str(folder) if name.startswith("~") else name


def _check_device(name: str) -> str:
    """Return the name of a device if it is valid. Whether the machine has it is checked on loading.

    A run can be planned, or submitted to a cluster, on a machine without its GPUs.
    """
    try:
        is_valid = isinstance(name, str) and torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        is_valid = False
    if not is_valid:
        raise UserError(f"unknown device {name!r}: use cpu, cuda or cuda:1")
    return name


def _check_classifier(name: str, config: PreTrainedConfig) -> None:
    architectures = config.architectures or []
    remote_classes = getattr(config, "auto_map", None) or {}
    is_classifier = any(architecture.endswith(HEAD) for architecture in architectures)
    if architectures and not is_classifier and f"AutoModel{HEAD}" not in remote_classes:
        # A model without a classifier head has num_labels 2, the default, which would be a misleading error.
        raise UserError(
            f"{name!r} is not a sequence classifier: its architecture is {', '.join(architectures)}"
        )
    if config.num_labels != 1:
        raise UserError(
            f"a reward model must have one label, but {name!r} has {config.num_labels} (num_labels)"
        )


@contextmanager
def _unsharded() -> Iterator[None]:
    """Inside the block, `from_pretrained` loads all weights in every process, although the trainer shards.

    Otherwise it would shard the model while a ZeRO-3 config exists. With FSDP it would fill the weights of
    every process but the first with zeros, for the trainer to replace them: all logits would be 0.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    ram_efficient_loading = os.environ.pop(FSDP_VARIABLE, None)
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
        if ram_efficient_loading is not None:
            os.environ[FSDP_VARIABLE] = ram_efficient_loading
