"""What rlkit changes in libraries is still there to be changed, and only where it says so."""

import ast
import inspect
import sys

import pytest
import trl
from accelerate import DistributedType, PartialState
from transformers import modeling_gguf_pytorch_utils
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from rlkit.models.patches import (
    gguf_bar_hidden,
    replaced,
    replaced_vllm_generation,
    shard_on_cpu,
    vllm_settings,
)
from tests.quick import ROOT

OURS = "rlkit/models/patches.py"


def test_trl_asks_use_triton_in_one_place_of_its_utils():
    moved = "TRL has moved what rlkit.models.patches sets; look where the fused head decides"
    source = inspect.getsource(trl.trainer.utils)
    assert hasattr(trl.trainer.utils, "_use_triton"), moved
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_use_triton"
    ]
    assert len(calls) == 1, moved
    assert "compact = _use_triton(" in inspect.getsource(trl.trainer.utils.add_fused_lm_head), moved


def test_trl_makes_its_vllm_by_the_name_that_is_replaced():
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert "self.vllm_generation = VLLMGeneration(" in source, (
        "TRL's GRPOTrainer no longer makes a VLLMGeneration: rlkit.models.patches replaces nothing"
    )
    original, made = grpo_trainer.VLLMGeneration, object()
    with replaced_vllm_generation(lambda: made):
        assert grpo_trainer.VLLMGeneration() is made
    assert grpo_trainer.VLLMGeneration is original


def test_trl_starts_vllm_by_the_name_that_gets_settings(monkeypatch):
    assert "LLM(" in inspect.getsource(vllm_generation.VLLMGeneration._init_vllm), (
        "TRL no longer starts vLLM with LLM(…): rlkit.models.patches.vllm_settings has no effect"
    )
    monkeypatch.setattr(vllm_generation, "LLM", dict, raising=False)  # without vLLM it is not there
    with vllm_settings(dtype="float32"):
        assert vllm_generation.LLM(model="m") == {"model": "m", "dtype": "float32"}
    assert vllm_generation.LLM is dict


def test_transformers_draws_the_gguf_bar_by_the_name_that_is_replaced(capsys):
    source = inspect.getsource(modeling_gguf_pytorch_utils)
    assert "in tqdm(reader.tensors" in source, (
        "transformers no longer draws its bar for GGUF by `tqdm`: rlkit.models.patches replaces nothing"
    )
    with gguf_bar_hidden():
        list(modeling_gguf_pytorch_utils.tqdm(range(2), desc="Converting"))
    assert capsys.readouterr().err == ""
    list(modeling_gguf_pytorch_utils.tqdm(range(2), desc="Converting"))
    assert "Converting" in capsys.readouterr().err


def test_accelerate_still_keeps_how_processes_share_the_work(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    before = dict(PartialState._shared_state)
    try:
        shard_on_cpu()
        assert PartialState().distributed_type == DistributedType.MULTI_GPU
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)


def test_a_replaced_name_is_put_back_after_an_error():
    with pytest.raises(KeyError), replaced(sys, "maxsize", 3):
        assert sys.maxsize == 3
        raise KeyError
    assert sys.maxsize > 3


def names(tree):
    """The names that a module imports."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}


def patches(tree):
    """Assignments to an attribute of something imported, calls of setattr on it, and unittest.mock."""
    imported = names(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in imported:
                yield ast.unparse(target)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            root = node.args[0]
            if isinstance(root, ast.Name) and root.id in imported:
                yield ast.unparse(node)
        if isinstance(node, ast.Import | ast.ImportFrom) and "mock" in ast.unparse(node):
            yield ast.unparse(node)


def test_libraries_are_patched_in_one_module():
    found = {}
    for package in ("rlkit", "envs", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if patched := list(patches(ast.parse(path.read_text()))):
                found[name] = patched
    assert found.pop(OURS), "the search finds what is patched there"
    # What belongs to the process is no library.
    found = {n: [p for p in ps if not p.startswith(("os.environ", "sys.modules"))] for n, ps in found.items()}
    assert {n: ps for n, ps in found.items() if ps} == {}
