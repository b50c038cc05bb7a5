"""Checkpoints are whole or skipped, and a resumed run knows whose they are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import RepeatSampler

from rlkit.errors import UserError
from rlkit.runs.checkpoints import differences, last_checkpoint, manifest, seal
from rlkit.training.resume import InEpoch, check_plain


def checkpoint(run, step, identity=None):
    folder = run / f"checkpoint-{step}"
    (folder / "global").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    (folder / "global" / "optimizer.pt").write_bytes(b"y" * 50)
    seal(folder, step, identity or {})
    return folder


def test_a_sealed_checkpoint_is_whole(tmp_path):
    folder = checkpoint(tmp_path, 3, {"seed": 1})
    assert manifest(folder) == {
        "step": 3,
        "identity": {"seed": 1},
        "files": {"global/optimizer.pt": 50, "model.safetensors": 100},
    }
    assert last_checkpoint(tmp_path) == folder
    assert not list(folder.glob("*.partial"))


def test_a_checkpoint_that_is_sealed_again_is_whole(tmp_path):
    folder = checkpoint(tmp_path, 3, {"seed": 1})
    (folder / "model.safetensors").write_bytes(b"x" * 120)
    seal(folder, 3, {"seed": 2})
    assert manifest(folder)["files"] == {"global/optimizer.pt": 50, "model.safetensors": 120}
    assert last_checkpoint(tmp_path) == folder


def cut(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 99)


def lose(folder):
    (folder / "global" / "optimizer.pt").unlink()


def unseal(folder):
    (folder / "rlkit.json").unlink()


def half(folder):
    (folder / "rlkit.json").write_text('{"step": 4, "fil')


def foreign(folder):
    (folder / "rlkit.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "99 of 100 bytes"),
        (lose, "is missing"),
        (unseal, "not finished"),
        (half, "not finished"),
        (foreign, "not finished"),
    ],
)
def test_a_checkpoint_cut_short_is_skipped_with_a_warning(tmp_path, caplog, damage, reason):
    before, broken = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    damage(broken)
    assert last_checkpoint(tmp_path) == before
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "checkpoint-10 is cut short and skipped" in record.message and reason in record.message


def test_no_whole_checkpoint_is_an_error_and_no_silent_start(tmp_path):
    unseal(checkpoint(tmp_path, 1))
    with pytest.raises(UserError, match=r"no whole checkpoint.*--overwrite"):
        last_checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_checkpoint(tmp_path) is None


@given(
    saved=st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)),
    now=st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)),
)
def test_differences(saved, now):
    lines = differences(saved, now)
    assert {line[0] for line in lines} == {k for k in {*saved, *now} if saved.get(k) != now.get(k)}
    assert differences(saved, json.loads(json.dumps(saved))) == []


def test_what_differs_is_said():
    assert differences({"rewards": ["a", "b"]}, {"rewards": ["b"]}) == ["rewards: a, b -> b"]
    assert differences({"rewards": {"a": 0.5, "b": 1.0}}, {"rewards": {}}) == [
        "rewards: a=0.5, b=1.0 -> none"
    ]
    assert differences({}, {"seed": 0}) == ["seed: none -> 0"]


def test_the_order_of_tasks_depends_on_seed_and_epoch():
    def order(epoch, seed=3):
        sampler = RepeatSampler(range(10), mini_repeat_count=2, batch_size=5, seed=seed)
        return list(InEpoch(sampler, lambda: epoch))

    assert order(0) == list(RepeatSampler(range(10), mini_repeat_count=2, batch_size=5, seed=3))
    assert order(1) == order(1) != order(0)
    assert sorted(order(1)) == sorted(order(0))
    assert len(InEpoch(RepeatSampler(range(10), 2), lambda: 0)) == 20


def test_the_epoch_is_asked_for_at_each_pass():
    state = SimpleNamespace(epoch=0.0)
    sampler = InEpoch(RepeatSampler(range(30), 1, seed=0), lambda: int(state.epoch))
    first = list(sampler)
    state.epoch = 1.0
    assert list(sampler) != first
    state.epoch = 0.25
    assert list(sampler) == first


@settings(max_examples=20, deadline=None)  # each waits for the disk
@given(
    sizes=st.dictionaries(st.sampled_from(["a", "b/c", "b/d"]), st.integers(0, 40), min_size=1),
    data=st.data(),
)
def test_any_file_cut_short_is_noticed(tmp_path_factory, sizes, data):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-1"
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    seal(folder, 1, {})
    assert manifest(folder)["files"] == sizes
    name = data.draw(st.sampled_from(sorted(sizes)))
    (folder / name).write_bytes(b"x" * data.draw(st.integers(0, 50).filter(lambda n: n != sizes[name])))
    with pytest.raises(ValueError, match=name):
        manifest(folder)


@pytest.mark.parametrize("value", [np.float64(1.0), {"a": [np.int64(1)]}, {1, 2}, object()])
def test_a_state_that_could_not_be_read_again_is_refused(value):
    with pytest.raises(UserError, match=r"the state of 'hapo' has a .*plain values"):
        check_plain("hapo", {"lengths": value})


def test_a_state_is_plain(tmp_path):
    """What `stateful()` gives is read without running code from the file."""
    torch.save({"reward hapo": {"tasks": [1], "lengths": [2.0]}}, tmp_path / "s.pt")
    assert torch.load(tmp_path / "s.pt", weights_only=True)["reward hapo"]["tasks"] == [1]
