"""`rlkit export`: adapters are merged or copied, plain models are copied, and errors are one line."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlkit.commands.export import export, main
from rlkit.errors import UserError
from rlkit.runs.checkpoints import MANIFEST


@pytest.fixture
def run(tmp_path, tiny_folder, tiny_tokenizer):
    """Return a run directory with a LoRA checkpoint of step 2, and the model with the adapter."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), config).eval()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    model.save_pretrained(checkpoint)
    tiny_tokenizer.save_pretrained(checkpoint)
    sizes = {file.name: file.stat().st_size for file in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(json.dumps({"step": 2, "files": sizes, "identity": {}}))
    return tmp_path / "run", model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(5, 15)[None]).logits


def test_export_merges_the_adapter_of_the_newest_checkpoint(run, tmp_path, tiny_folder, capsys):
    path, model = run
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip().endswith("out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == weight_names(tiny_folder)
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    assert (logits(base) - logits(model)).abs().max() > 1e-3


def weight_names(folder):
    return load_file(f"{folder}/model.safetensors").keys()


def test_export_adapter_copies_the_adapter_unchanged(run, tmp_path):
    path, _ = run
    export(path, tmp_path / "out", adapter=True)
    a, b = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "out", path / "checkpoint-2"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_export_copies_a_model_without_adapter(tmp_path, tiny_folder):
    export(Path(tiny_folder), tmp_path / "out")
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "out", tiny_folder))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_export_raises_one_line_errors(tmp_path, tiny_folder, run):
    with pytest.raises(UserError, match="there is no folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a trained model nor a checkpoint"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="exists; choose another"):
        export(run[0], tmp_path / "empty")
    with pytest.raises(UserError, match="has no adapter"):
        export(Path(tiny_folder), tmp_path / "out", adapter=True)


@pytest.mark.parametrize("adapter", [False, True])
def test_export_that_fails_leaves_no_folder(tmp_path, run, adapter, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokenizer.json")

    monkeypatch.setattr(shutil, "copy2", fail)
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    message = r"cannot write tokenizer\.json: No space left on device; free disk space"
    with pytest.raises(UserError, match=message):
        export(run[0], tmp_path / "out", adapter=adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_export_refuses_to_merge_an_adapter_on_tied_embeddings(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"LoRA must not adapt .*; save the adapter alone with --adapter"):
        export(tmp_path / "adapter", tmp_path / "out")
    export(tmp_path / "adapter", tmp_path / "out", adapter=True)


def test_export_removes_generation_settings_that_cannot_be_saved(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "num_return_sequences": 2}')
    export(folder, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_export_of_a_damaged_model_is_a_one_line_error(tmp_path, tiny_folder, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_bytes(b'{"a"')
    with pytest.raises(UserError, match=r"cannot load a model from .*model"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_incomplete_shards_of_deepspeed_is_a_one_line_error(tmp_path, tiny_folder):
    (tmp_path / "latest").write_text("global_step2")
    (tmp_path / "config.json").write_bytes((Path(tiny_folder) / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"cannot load a model from .*global_step2"):
        export(tmp_path, tmp_path / "out")
