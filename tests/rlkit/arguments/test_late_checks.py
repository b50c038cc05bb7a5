"""Values that a library would reject only after the model is loaded."""

import inspect
import json

import pytest
from torch.utils.checkpoint import checkpoint
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlkit.arguments import late_checks
from rlkit.arguments.late_checks import CHECKPOINT_ARGUMENTS, TRACKERS, check_late_keys
from rlkit.errors import UserError


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lora_target_modules": ["("]}, "lora_target_modules '(' is not a valid regular expression"),
        ({"optim_args": "a=1,b"}, "not 'b'"),
        ({"optim_args": "a=1=2"}, "not 'a=1=2'"),
        ({"gradient_checkpointing_kwargs": {"use_reentrent": True}}, "did you mean 'use_reentrant'"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": "0"}, "num_workers above 0"),
        ({"dataloader_persistent_workers": True}, "requires a dataloader_num_workers above 0"),
        ({"attn_implementation": "paged|sdpa"}, "'paged|sdpa' is for inference only: use 'sdpa'"),
        ({"deepspeed": {"zero_optimization": 3}}, "zero_optimization must be a mapping, not 3"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "train_micro_batch_size_per_gpu: auto"),
    ],
    ids=str,
)
def test_check_late_keys_names_key_and_remedy(keys, expected):
    with pytest.raises(UserError) as caught:
        check_late_keys(keys)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_check_late_keys_names_the_package_of_a_tracker(monkeypatch, tmp_path):
    monkeypatch.setattr(late_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="report_to comet_ml requires the package comet-ml: pip install comet"
    ):
        check_late_keys({"report_to": ["none", "comet_ml"]})


def test_folder_of_w_and_b_runs_is_not_its_package(monkeypatch, tmp_path):
    (tmp_path / "trackio").mkdir()  # not installed here
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="pip install trackio"):
        check_late_keys({"report_to": "trackio"})


def test_check_late_keys_accepts_valid_values(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    check_late_keys({"deepspeed": str(path), "lora_target_modules": ["a", "("], "optim_args": "a=1, b=2"})
    check_late_keys({"dataloader_persistent_workers": True, "dataloader_num_workers": 1})
    check_late_keys({"report_to": "none", "gradient_checkpointing_kwargs": {"use_reentrant": False}})


def test_tables_match_the_installed_libraries():
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK) - {"azure_ml", "kubeflow", "tensorboard"}
    parameters = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"}
    assert set(CHECKPOINT_ARGUMENTS) == parameters - {"function", "args", "kwargs", "context_fn"}
