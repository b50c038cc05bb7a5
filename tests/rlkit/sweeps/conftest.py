"""Sweep files over runs of the toy environment with a tiny model."""

import pytest
import yaml

from tests.quick import QUICK

BASE = QUICK | {
    "num_tasks": 20,
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 2,
    "max_completion_length": 4,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "evaluation_tasks": 8,
}


@pytest.fixture
def write(tmp_path, tiny_folder):
    """Write a sweep file and its base config; keys that are None are omitted from the sweep file."""

    def write(changes=None, name="sweep", **keys):
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump(BASE | {"model_name_or_path": tiny_folder} | (changes or {})))
        content = {"base": str(path), "output_dir": str(tmp_path / name)} | keys
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return write
