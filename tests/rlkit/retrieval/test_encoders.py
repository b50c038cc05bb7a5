"""Loading encoders: dtype, revision, attention, token limit, and errors of one line."""

import pytest
import torch

from rlkit.errors import UserError
from rlkit.retrieval.encoders import load_encoder
from tests.tiny_encoders import save_tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoders") / "half", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_weights_are_float32_unless_the_dtype_is_set(folder, options, dtype):
    assert {p.dtype for p in load_encoder(folder, **options).parameters()} == {dtype}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementation_reaches_the_model(folder, implementation):
    encoder = load_encoder(folder, attn_implementation=implementation)
    assert encoder.transformers_model.config._attn_implementation == implementation


def test_strings_are_truncated_at_max_seq_length(folder):
    encoder = load_encoder(folder, max_seq_length=6)
    assert encoder.preprocess(["red wine " * 20])["input_ids"].shape == (1, 6)
    assert load_encoder(folder).preprocess(["red wine " * 20])["input_ids"].shape[1] > 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 65}, "max_seq_length must be at most 64"),
        ({"max_seq_length": 2}, "max_seq_length must be above 2"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"revision": "v2"}, "revision 'v2' is one of the hub"),
        ({"attn_implementation": "flash_attention_9"}, "cannot be loaded"),
    ],
)
def test_settings_that_do_not_fit_are_errors_of_one_line(folder, options, message):
    with pytest.raises(UserError, match=message) as error:
        load_encoder(folder, **options)
    assert "\n" not in str(error.value)


def test_positions_of_roberta_begin_after_the_padding(tmp_path):
    folder = save_tiny_encoder(tmp_path / "roberta", kind="roberta")
    load_encoder(folder, max_seq_length=64).encode(["red wine " * 80])
    with pytest.raises(UserError, match="at most 64"):
        load_encoder(folder, max_seq_length=65)


@pytest.mark.parametrize("name", ["bundled:minilm", "/no/such/folder", "./no/such/folder"])
def test_encoder_that_does_not_exist_is_an_error_of_one_line(name):
    with pytest.raises(UserError, match=r"no encoder|cannot be loaded") as error:
        load_encoder(name)
    assert "\n" not in str(error.value)
