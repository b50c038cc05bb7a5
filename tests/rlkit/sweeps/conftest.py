"""A small sweep: what its file says, over runs of the toy environment with the tiny model."""

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
    """Write a sweep's file over a base; keys that are None are left out."""

    def write(changes=None, name="sweep", **keys):
        path = tmp_path / "base.yaml"
        path.write_text(yaml.safe_dump(BASE | {"model_name_or_path": tiny_folder} | (changes or {})))
        text = {"base": str(path), "output_dir": str(tmp_path / name)} | keys
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in text.items() if value is not None}))
        return file

    return write
