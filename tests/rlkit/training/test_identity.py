"""Whether a run may resume from a checkpoint with other settings."""

from pathlib import Path

import pytest

from rlkit.errors import UserError
from rlkit.training.identity import check_unchanged

FOLDER = Path("checkpoint-1")
LORA = {"lora_r": 2, "lora_alpha": 32, "use_dora": False}


def check(saved, now, *, resume_anyway=False):
    check_unchanged(saved, now, FOLDER, resume_anyway=resume_anyway)


def test_checkpoints_of_earlier_versions_lack_settings_of_the_weights(caplog):
    check({"seed": 1}, {"seed": 1, "lora": LORA, "optim": "sgd"})
    check({"lora": {"lora_r": 2}}, {"lora": LORA})
    check({"lora": None}, {"lora": None})
    assert not caplog.records  # nothing counts as a change


def test_adapter_of_earlier_versions_is_refused_because_its_weights_have_other_names():
    check({"adapter_rank": None}, {"adapter_rank": None, "adapter_side": None})
    with pytest.raises(UserError, match="saved by a version of rlkit without adapter_side"):
        check({"adapter_rank": 4}, {"adapter_rank": 4, "adapter_side": "query"}, resume_anyway=True)


@pytest.mark.parametrize("lora", [None, LORA | {"lora_r": 4}, LORA | {"lora_alpha": 64}])
def test_changed_adapter_is_refused_even_with_resume_anyway(lora):
    with pytest.raises(UserError, match="restore the settings"):
        check({"lora": LORA}, {"lora": lora}, resume_anyway=True)


def test_resume_anyway_accepts_another_seed():
    with pytest.raises(UserError, match="--resume_anyway resumes with the new settings"):
        check({"seed": 1}, {"seed": 2})
    check({"seed": 1}, {"seed": 2}, resume_anyway=True)
