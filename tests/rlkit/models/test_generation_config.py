"""Any generation config loads, and the loaded model can be saved again."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from trl import ModelConfig

from rlkit.errors import UserError
from rlkit.models.generation_config import TOKEN_IDS, generation_options
from rlkit.models.load import load_model

INVALID = [
    {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.0, "top_k": 1},
    {"typical_p": 0.5, "min_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"num_return_sequences": 4},
    {"num_beams": 2, "num_return_sequences": 3},
    {"length_penalty": 2.0, "early_stopping": True},
    {"use_cache": False, "cache_implementation": "static"},
    {"output_scores": True},
    {"pad_token_id": -1},
    {"max_new_tokens": "5"},
    {"cache_implementation": "magic"},
    {"logits_processor": 1},
    {"forced_eos_token_id": 2, "suppress_tokens": [2]},
]
VALUES = st.none() | st.booleans() | st.integers(-2, 60) | st.floats(0, 2) | st.sampled_from(["never", "x"])
NAMES = st.sampled_from(sorted({name for case in INVALID for name in case} | {"do_sample", "num_beams"}))


@pytest.fixture
def folder(tmp_path, tiny_folder):
    """Return a copy of the tiny model's folder."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize("invalid", INVALID, ids=str)
def test_load_model_removes_generation_settings_that_cannot_be_saved(folder, invalid, tmp_path, caplog):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | invalid))
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder)))
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.eos_token_id == 2
    (record,) = (record for record in caplog.records if record.name.startswith("rlkit"))
    assert "could not be saved; removed: " in record.getMessage()


def test_load_model_removes_generation_settings_of_config_json(folder, tmp_path):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"temperature": 0.6, "top_k": 5, "length_penalty": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(ModelConfig(model_name_or_path=str(folder)))
    model.save_pretrained(tmp_path / "saved")
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (None, 2)


@given(settings=st.dictionaries(NAMES.filter(lambda name: name not in TOKEN_IDS), VALUES))
@settings(max_examples=60)
def test_valid_settings_are_kept_and_the_others_removed(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("model")
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = generation_options(str(folder))["generation_config"]
    config.save_pretrained(folder / "saved")
    try:
        expected = GenerationConfig.from_dict(settings)
        expected.validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return
    assert config.to_dict() == expected.to_dict()


def test_generation_config_that_is_no_object_is_a_user_error(folder):
    for text in ("[1]", "{"):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            load_model(ModelConfig(model_name_or_path=str(folder)))


@pytest.mark.parametrize("value", ["x", [2, "x"], 2.0, [[2]], True, {"a": 1}])
def test_invalid_token_id_is_a_user_error(folder, value):
    """Training and evaluation end completions at these tokens."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"eos_token_id in .* must be a token id or a list of them, not "):
        generation_options(str(folder))
