"""`rlkit export RUN -o FOLDER`: the model of a run or checkpoint, adapters merged; or an adapter alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit.arguments.command_line import CommandParser
from rlkit.errors import UserError, first_line
from rlkit.logs import hide_weight_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"
KEPT = ("adapter_*", "tokenizer*", "chat_template*", "special_tokens_map.json", "vocab*", "merges.txt")


def main(argv: Sequence[str]) -> int:
    """Export and print where the model is."""
    parser = CommandParser(
        prog="rlkit export", description="Write the model of a run or a checkpoint as plain safetensors."
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN", help="a run directory, a checkpoint or an adapter"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, not merged")
    options = parser.parse_args(argv)
    hide_weight_bars()
    export(options.source, options.out, adapter=options.adapter)
    print(options.out)
    return 0


def export(source: Path, out: Path, *, adapter: bool = False) -> None:
    """Write the model of a run, its newest checkpoint, or one that is named.

    Args:
        adapter: write the LoRA adapter as it was trained instead of merging it.

    Raises:
        UserError: there is nothing of that kind, or `out` exists.
    """
    if out.exists():
        raise UserError(f"{out} exists: name another folder")
    folder = _folder(source, adapter)
    is_adapter = (folder / ADAPTER).exists()
    if adapter and not is_adapter:
        raise UserError(f"{folder} holds no adapter: it was not trained with use_peft")
    if adapter:
        out.mkdir(parents=True)
        for pattern in KEPT:
            for file in folder.glob(pattern):
                shutil.copy2(file, out)
        return
    model = _merged(folder) if is_adapter else _plain(folder)
    model.save_pretrained(out)
    _tokenizer(folder).save_pretrained(out)


def _folder(source: Path, adapter: bool) -> Path:
    """The folder with the weights: the trained model of a run, else its newest checkpoint."""
    if not source.is_dir():
        raise UserError(f"there is no folder {source}")
    if (source / "config.json").exists() or (source / ADAPTER).exists():
        return source
    if (source / "model").is_dir() and not adapter:  # merged already
        return source / "model"
    from rlkit.runs.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(source)
    if checkpoint is None:
        raise UserError(f"{source} has neither a trained model nor a checkpoint")
    return checkpoint


def _merged(folder: Path) -> PreTrainedModel:
    """An adapter in its base model, which is loaded plain also where training quantized it."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"the adapter's base model {base!r} cannot be loaded: {reason}") from error
    return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()


def _plain(folder: Path) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    except (OSError, ValueError) as error:
        sharded = (folder / "latest").exists()
        hint = ": its weights are in shards, which its own zero_to_fp32.py joins" if sharded else ""
        raise UserError(f"{folder} holds no whole model{hint} ({first_line(error)})") from error


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
