"""`rlkit export RUN -o FOLDER`: save the model of a run with adapters merged, or the adapter alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError, first_line
from rlkit.files import atomic_folder
from rlkit.logs import hide_weight_bars
from rlkit.runs.directory import write_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt")
ADAPTER_FILES = ("adapter_*", *TOKENIZER_FILES)


def main(argv: Sequence[str]) -> int:
    """Export a model, print its folder, and return the exit code."""
    parser = CommandParser(
        prog="rlkit export",
        description="Save the model of a run or checkpoint as safetensors, with LoRA adapters merged.",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="run directory, checkpoint or adapter")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="new output folder")
    parser.add_argument("--adapter", action="store_true", help="save the LoRA adapter alone, without merging")
    options = parser.parse_args(argv)
    hide_weight_bars()
    export(options.source, options.out, adapter=options.adapter)
    print(options.out)
    return 0


def export(source: Path, out: Path, *, adapter: bool = False) -> None:
    """Save a model as safetensors together with its tokenizer.

    Args:
        source: Model folder, checkpoint or run directory. Of a run, the trained model is saved if there is
            one, else the newest complete checkpoint.
        out: Output folder, which must not exist.
        adapter: Whether to save the LoRA adapter as it was trained instead of merging it.

    Raises:
        UserError: `source` has no model or adapter, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists; choose another output folder")
    folder = _weights_folder(source, adapter=adapter)
    is_adapter = (folder / ADAPTER).exists()
    if adapter and not is_adapter:
        raise UserError(f"{folder} has no adapter; it was not trained with use_peft")
    if adapter:
        with _new_folder(out) as partial:
            for pattern in ADAPTER_FILES:
                for file in folder.glob(pattern):
                    shutil.copy2(file, partial)
        return
    from transformers import AutoTokenizer

    from rlkit.models.load import loading

    with loading(f"a model from {folder}"):
        model = _load_merged(folder) if is_adapter else _load_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    with _new_folder(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `out` if the block succeeds; raise UserError if the disk fails."""
    try:
        with atomic_folder(out) as partial:
            yield partial
    except Exception as error:
        failure = write_error(error)
        if failure is None:
            raise
        reason, remedy = failure
        raise UserError(f"cannot write {reason}; {remedy}") from error


def _weights_folder(source: Path, *, adapter: bool) -> Path:
    """Return the folder with the weights: the trained model of a run, else its newest checkpoint."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    if (source / "config.json").exists() or (source / ADAPTER).exists():
        return source
    # The model of a finished run is already merged; only its checkpoints have the adapter.
    if (source / "model").is_dir() and not adapter:
        return source / "model"
    from rlkit.runs.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(source)
    if checkpoint is None:
        raise UserError(f"{source} has neither a trained model nor a checkpoint")
    return checkpoint


def _load_merged(folder: Path) -> PreTrainedModel:
    """Load an adapter's base model and merge the adapter into it.

    The base model is loaded unquantized, even if training quantized it: merging into quantized weights would
    lose precision.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    from rlkit.models.adapters import check_mergeable
    from rlkit.models.generation_config import fix_generation_config, generation_options

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", use_safetensors=True, **generation_options(base)
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"the adapter's base model {base!r} cannot be loaded: {reason}") from error
    fix_generation_config(model)
    adapted: Any = PeftModel.from_pretrained(model, str(folder))
    check_mergeable(adapted, "save the adapter alone with --adapter")
    return adapted.merge_and_unload()


def _load_model(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    from rlkit.models.generation_config import fix_generation_config, generation_options

    if (folder / "latest").exists() and not any(folder.glob("*.safetensors")):
        return _load_deepspeed(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, **generation_options(str(folder))
    )
    fix_generation_config(model)
    return model


def _load_deepspeed(folder: Path) -> PreTrainedModel:
    """Load a checkpoint of ZeRO-3 whose weights are in DeepSpeed's files only.

    DeepSpeed writes no safetensors if `stage3_gather_16bit_weights_on_model_save` is false.

    Raises:
        UserError: DeepSpeed is not installed, or its files do not contain all weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise UserError(f"the weights in {folder} are sharded: pip install deepspeed to join them") from error
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    with redirect_stdout(sys.stderr):  # DeepSpeed prints its progress
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name not in model.all_tied_weights_keys]
    if missing or unexpected:
        wrong = ", ".join([*missing, *unexpected])
        raise UserError(f"the weights in {folder} do not fit its config.json: {wrong:.100}")
    return model
