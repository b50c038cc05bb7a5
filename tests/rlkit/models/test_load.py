"""Damaged models are rejected in one line; saving a merged adapter leaves the trained model unchanged."""

import json
import shutil

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from rlkit.errors import UserError
from rlkit.models.load import load_model, loading, save_model


class RecordCopies(TorchDispatchMode):
    """Records the sizes of the tensors that are cloned on their own device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_save_model_merges_the_adapter_in_a_copy_on_the_cpu(tiny_model, tmp_path):
    """`to` copies weights from a GPU to the CPU; `deepcopy` alone would clone them on the GPU."""
    base = tiny_model("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    largest = max(weight.numel() for weight in model.parameters())
    with RecordCopies() as copies:
        save_model(model, None, tmp_path)
    assert all(size < largest for size in copies.sizes)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(saved(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "x"}, "Validation error for field 'hidden_size': .*expected int"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"vocab_size": 50}, r"its weights have other shapes than config\.json says"),
        ({"hidden_act": "zzz"}, "KeyError: 'zzz'"),
        ({"rope_parameters": {"rope_type": "zzz"}}, "KeyError: 'zzz'"),
        ({"dtype": "float8"}, "AttributeError"),
        ("model.safetensors", "SafetensorError"),
        ("tokenizer.json", "KeyError: 'added_tokens'"),
    ],
)
def test_damaged_model_is_a_user_error_of_one_line(tmp_path, tiny_folder, change, message):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if isinstance(change, str):
        (folder / change).write_text("{}")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=f"cannot load '{folder}': .*{message}") as caught:
        load_model(ModelConfig(model_name_or_path=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_not_json_is_named(tmp_path, tiny_folder, name):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / name).write_text("{a: 1}")
    with pytest.raises(UserError, match=f"cannot load .*: {name} is not valid JSON: Expecting property name"):
        load_model(ModelConfig(model_name_or_path=str(folder)))


def test_adapter_of_parameters_names_the_key_that_must_be_zero(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(
        model_name_or_path=str(tmp_path), use_peft=True, lora_target_parameters=["mlp.experts.gate_up_proj"]
    )
    with pytest.raises(UserError, match=r"invalid adapter .*lora_dropout.*; set lora_dropout: 0$"):
        load_model(config)


def test_model_without_a_tokenizer_gets_the_whole_reason(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"Couldn't instantiate the backend tokenizer from one of: .*slow"):
        load_model(ModelConfig(model_name_or_path=str(folder)))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(), UserError("as it is")])
def test_errors_that_are_not_the_models_fault_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, loading("'a model'"):
        raise error
    assert caught.value is error
