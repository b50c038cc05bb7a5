"""Atomic writes: a reader sees either the old or the new content."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from rlkit import files
from rlkit.files import atomic_folder, atomic_write, cache_directory
from tests.interrupting import interrupt_after


def test_atomic_write_creates_the_folder_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "ä")
    atomic_write(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_atomic_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def fail(partial, target):
        raise OSError("disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_write_syncs_before_and_after_the_replacement(tmp_path, monkeypatch):
    calls = []
    sync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (calls.append(("sync", path.suffix)), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", b.suffix)), replace(a, b)))
    atomic_write(tmp_path / "file.txt", "text")
    assert calls == [("sync", ".partial"), ("replace", ".txt"), ("sync", "")]


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv("RLKIT_CACHE", raising=False)
    assert cache_directory() == Path("/somewhere/rlkit")
    monkeypatch.setenv("RLKIT_CACHE", "/else")
    assert cache_directory() == Path("/else")


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("is_replaced", [False, True])
def test_atomic_folder_is_complete_or_absent_whenever_it_is_interrupted(
    tmp_path, monkeypatch, number, is_replaced
):
    folder = tmp_path / "model"

    def fill(content):
        with atomic_folder(folder) as partial:
            for name in ("config.json", "weights"):
                (partial / name).write_text(content)

    def contents():
        return sorted(path.read_text() for path in folder.iterdir()) if folder.exists() else None

    if is_replaced:
        fill("old")
    interrupt_after(monkeypatch, number, "fsync", "rename", "unlink", "rmdir")
    with suppress(KeyboardInterrupt):
        fill("new")
    monkeypatch.undo()
    assert contents() in (["new"] * 2, ["old"] * 2 if is_replaced else None, None)
    fill("last")
    assert contents() == ["last"] * 2 and list(tmp_path.iterdir()) == [folder]
