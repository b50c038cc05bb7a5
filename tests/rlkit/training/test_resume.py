"""Incomplete checkpoints are skipped, changed settings are reported, and resuming keeps the task order."""

import json
import shutil
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from trl.trainer.utils import RepeatSampler

from rlkit.arguments.parse import parse_sft
from rlkit.errors import UserError
from rlkit.runs.checkpoints import (
    checkpoints,
    delete_checkpoint,
    differences,
    last_checkpoint,
    read_manifest,
    rotate,
    seal,
    step_of,
)
from rlkit.training.resume import EpochSeededSampler, check_plain
from rlkit.training.sft import sft
from tests.interrupting import interrupt_after
from tests.quick import QUICK


def save_checkpoint(run, step, identity=None):
    """Write and seal a checkpoint of two files of 100 and 50 bytes."""
    folder = run / f"checkpoint-{step}"
    (folder / "global").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "global" / "optimizer.pt").write_bytes(b"y" * 50)
    seal(folder, step, identity or {})
    return folder


def test_sealed_checkpoint_is_complete(tmp_path):
    folder = save_checkpoint(tmp_path, 3, {"seed": 1})
    assert read_manifest(folder) == {
        "step": 3,
        "identity": {"seed": 1},
        "files": {"global/optimizer.pt": 50, "model.safetensors": 100},
    }
    assert last_checkpoint(tmp_path) == folder
    assert not list(folder.glob("*.partial"))


def test_checkpoint_that_is_sealed_again_is_complete(tmp_path):
    folder = save_checkpoint(tmp_path, 3, {"seed": 1})
    (folder / "model.safetensors").write_bytes(b"x" * 120)
    seal(folder, 3, {"seed": 2})
    assert read_manifest(folder)["files"] == {"global/optimizer.pt": 50, "model.safetensors": 120}
    assert last_checkpoint(tmp_path) == folder


def truncate_file(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 99)


def delete_file(folder):
    (folder / "global" / "optimizer.pt").unlink()


def unseal(folder):
    (folder / "rlkit.json").unlink()


def truncate_manifest(folder):
    (folder / "rlkit.json").write_text('{"step": 4, "fil')


def replace_manifest(folder):
    (folder / "rlkit.json").write_text("[]")


def remove_the_step(folder):
    (folder / "rlkit.json").write_text('{"files": {}, "identity": {}}')


def empty_the_identity(folder):
    (folder / "rlkit.json").write_text('{"step": 4, "files": {}, "identity": null}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove_the_step, "no valid rlkit.json"),
        (empty_the_identity, "no valid rlkit.json"),
        (truncate_file, "99 of 100 bytes"),
        (delete_file, "is missing"),
        (unseal, "no valid rlkit.json"),
        (truncate_manifest, "no valid rlkit.json"),
        (replace_manifest, "no valid rlkit.json"),
    ],
)
def test_last_checkpoint_skips_an_incomplete_one_with_a_warning(tmp_path, caplog, damage, reason):
    complete, damaged = save_checkpoint(tmp_path, 9), save_checkpoint(tmp_path, 10)
    damage(damaged)
    assert last_checkpoint(tmp_path) == complete
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "checkpoint-10: " in record.message and reason in record.message


@pytest.mark.parametrize("damage", [truncate_file, delete_file, truncate_manifest, replace_manifest])
def test_last_checkpoint_raises_if_the_only_complete_one_is_damaged(tmp_path, damage):
    damage(save_checkpoint(tmp_path, 1))
    unseal(save_checkpoint(tmp_path, 2))
    with pytest.raises(UserError, match=r"checkpoint-1 is damaged: .*restore it from a backup.*--overwrite"):
        last_checkpoint(tmp_path)


def test_last_checkpoint_is_none_if_none_was_completed(tmp_path, caplog):
    unseal(save_checkpoint(tmp_path, 1))
    (tmp_path / "checkpoint-2").mkdir()
    assert last_checkpoint(tmp_path) is None
    assert len(caplog.records) == 2


def test_last_checkpoint_is_none_without_checkpoints(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-²").mkdir()
    (tmp_path / "checkpoint-5").write_text("")
    assert last_checkpoint(tmp_path) is None


def test_renamed_copy_of_a_checkpoint_is_neither_resumed_from_nor_deleted(tmp_path):
    copy = shutil.copytree(save_checkpoint(tmp_path, 4), tmp_path / "checkpoint-4-backup")
    for step in (6, 8):
        save_checkpoint(tmp_path, step)
    rotate(tmp_path, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4-backup", "checkpoint-8"]
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert last_checkpoint(tmp_path) is None
    assert (copy / "rlkit.json").exists()


@pytest.mark.parametrize("num_deleted", range(4))
def test_interrupted_deletion_of_a_checkpoint_leaves_an_incomplete_one(tmp_path, monkeypatch, num_deleted):
    folder = save_checkpoint(tmp_path, 1)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        interrupt_after(patch, num_deleted, "unlink")
        delete_checkpoint(folder)
    if num_deleted == 0:
        assert last_checkpoint(tmp_path) == folder
    else:
        assert last_checkpoint(tmp_path) is None


@given(
    steps=st.sets(st.integers(1, 9), min_size=1),
    unsealed=st.sets(st.integers(1, 9)),
    limit=st.none() | st.integers(0, 4),
    best=st.none() | st.integers(1, 9),
)
def test_rotate_keeps_the_newest_checkpoints_and_the_best(tmp_path_factory, steps, unsealed, limit, best):
    run = tmp_path_factory.mktemp("run")
    newest = max(steps)
    unsealed = {step for step in unsealed if step < newest}
    for step in steps | unsealed:
        (run / f"checkpoint-{step}").mkdir()
        if step not in unsealed:
            (run / f"checkpoint-{step}" / "rlkit.json").write_text("{}")
    complete = sorted(steps - unsealed, reverse=True)
    rotate(run, limit, None if best is None else str(run / f"checkpoint-{best}"))
    remaining = {step_of(folder) for folder in checkpoints(run)}
    if not limit:
        assert remaining == steps | unsealed
        return
    protected = {newest} | ({best} & set(complete))
    assert protected <= remaining <= set(complete)
    assert len(remaining) == min(len(complete), max(limit, len(protected)))
    assert remaining - protected <= set(complete[:limit])


@given(
    saved=st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)),
    now=st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)),
)
def test_differences_are_the_keys_with_different_values(saved, now):
    lines = differences(saved, now)
    assert {line[0] for line in lines} == {k for k in {*saved, *now} if saved.get(k) != now.get(k)}
    assert differences(saved, json.loads(json.dumps(saved))) == []


def test_differences_show_old_and_new_values():
    assert differences({"rewards": ["a", "b"]}, {"rewards": ["b"]}) == ["rewards: a, b -> b"]
    assert differences({"rewards": {"a": 0.5, "b": 1.0}}, {"rewards": {}}) == [
        "rewards: a=0.5, b=1.0 -> none"
    ]
    assert differences({}, {"seed": 0}) == ["seed: none -> 0"]


def test_epoch_seeded_sampler_orders_tasks_by_seed_and_epoch():
    def order(epoch, seed=3):
        sampler = RepeatSampler(range(10), mini_repeat_count=2, batch_size=5, seed=seed)
        return list(EpochSeededSampler(sampler, lambda: epoch))

    assert order(0) == list(RepeatSampler(range(10), mini_repeat_count=2, batch_size=5, seed=3))
    assert order(1) == order(1) != order(0)
    assert sorted(order(1)) == sorted(order(0))
    assert len(EpochSeededSampler(RepeatSampler(range(10), 2), lambda: 0)) == 20


def test_epoch_seeded_sampler_reads_the_epoch_at_each_pass():
    state = SimpleNamespace(epoch=0.0)
    sampler = EpochSeededSampler(RepeatSampler(range(30), 1, seed=0), lambda: int(state.epoch))
    first = list(sampler)
    state.epoch = 1.0
    assert list(sampler) != first
    state.epoch = 0.25
    assert list(sampler) == first


@settings(max_examples=20, deadline=None)  # each example waits for the disk
@given(
    sizes=st.dictionaries(st.sampled_from(["a", "b/c", "b/d"]), st.integers(0, 40), min_size=1),
    data=st.data(),
)
def test_manifest_detects_any_file_of_a_wrong_size(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-1"
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    seal(folder, 1, {})
    assert read_manifest(folder)["files"] == sizes
    name = data.draw(st.sampled_from(sorted(sizes)))
    (folder / name).write_bytes(b"x" * data.draw(st.integers(0, 50).filter(lambda n: n != sizes[name])))
    with pytest.raises(ValueError, match=name):
        read_manifest(folder)


@pytest.mark.parametrize("value", [np.float64(1.0), {"a": [np.int64(1)]}, {1, 2}, object()])
def test_check_plain_rejects_a_state_that_torch_load_could_not_read(value):
    with pytest.raises(UserError, match=r"state_dict\(\) of 'hapo' contains a .*return only"):
        check_plain("hapo", {"lengths": value})


def test_state_loads_with_weights_only(tmp_path):
    """Loading a checkpoint must not run code from the file."""
    torch.save({"reward hapo": {"tasks": [1], "lengths": [2.0]}}, tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True)["reward hapo"]["tasks"] == [1]


@pytest.fixture
def keys(tmp_path, tiny_folder):
    """Return the keys of a run of four steps that saves a checkpoint of every second one."""
    steps = {"max_steps": 4, "save_steps": 2, "num_tasks": 8, "evaluation_tasks": 0, "logging_steps": 1}
    paths = {"model_name_or_path": tiny_folder, "output_dir": str(tmp_path / "run")}
    return QUICK | steps | paths | {"learning_rate": 1e-3}


def learning_rates(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


def param_groups(run):
    return torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)["param_groups"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_resumed_run_trains_with_the_settings_of_its_config(tmp_path, keys, schedule):
    keys |= {"lr_scheduler_type": schedule, "warmup_steps": 3 if "warmup" in schedule else 0}
    run = tmp_path / "run"
    sft(parse_sft([], keys))
    before = learning_rates(run)
    shutil.rmtree(run / "checkpoint-4")
    changes = {"learning_rate": 1e-5, "weight_decay": 0.25, "adam_beta1": 0.5, "resume": True}
    sft(parse_sft([], keys | changes))
    after = learning_rates(run)
    assert after == pytest.approx({step: rate * (0.01 if step > 2 else 1) for step, rate in before.items()})
    decayed, other = param_groups(run)
    assert (decayed["initial_lr"], decayed["weight_decay"], other["weight_decay"]) == (1e-5, 0.25, 0)
    assert decayed["betas"][0] == other["betas"][0] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "cosine"},
        {"optim": "sgd", "optim_args": "weight_decay=0.5,momentum=0.9"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2, "weight_decay": 0.1},
        {"optim": "adafactor"},
    ],
)
def test_resume_with_the_same_settings_changes_nothing(tmp_path, keys, options):
    run = tmp_path / "run"
    sft(parse_sft([], keys | options))
    rates, groups = learning_rates(run), param_groups(run)
    weights = load_file(run / "model" / "model.safetensors")
    shutil.rmtree(run / "checkpoint-4")
    sft(parse_sft([], keys | options | {"resume": True}))
    assert learning_rates(run) == rates
    assert param_groups(run) == groups
    resumed = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(weight, resumed[name]) for name, weight in weights.items())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rlkit_state_0.pt"])
def test_checkpoint_with_damaged_content_is_an_error_of_one_line(tmp_path, keys, name):
    sft(parse_sft([], keys))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    path = tmp_path / "run" / "checkpoint-2" / name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=r"checkpoint-2") as caught:
        sft(parse_sft([], keys | {"resume": True}))
    assert "\n" not in str(caught.value)
