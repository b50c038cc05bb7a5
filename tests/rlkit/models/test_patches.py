"""Libraries still have the names that rlkit patches, and only `rlkit.models.patches` patches any."""

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

PATCHES = "rlkit/models/patches.py"


def test_trl_calls_use_triton_only_in_the_fused_head():
    moved = "TRL has moved _use_triton, which rlkit.models.patches sets: see how its fused head skips tokens"
    source = inspect.getsource(trl.trainer.utils)
    assert hasattr(trl.trainer.utils, "_use_triton"), moved
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_use_triton"
    ]
    assert len(calls) == 1, moved
    assert "compact = _use_triton(" in inspect.getsource(trl.trainer.utils.add_fused_lm_head), moved


def test_trl_creates_vllm_generation_by_the_patched_name():
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert "self.vllm_generation = VLLMGeneration(" in source, (
        "TRL's GRPOTrainer no longer creates a VLLMGeneration: replaced_vllm_generation has no effect"
    )
    original, replacement = grpo_trainer.VLLMGeneration, object()
    with replaced_vllm_generation(lambda: replacement):
        assert grpo_trainer.VLLMGeneration() is replacement
    assert grpo_trainer.VLLMGeneration is original


def test_trl_starts_vllm_by_the_patched_name(monkeypatch):
    assert "LLM(" in inspect.getsource(vllm_generation.VLLMGeneration._init_vllm), (
        "TRL no longer starts vLLM with LLM(…): vllm_settings has no effect"
    )
    monkeypatch.setattr(vllm_generation, "LLM", dict, raising=False)  # not defined if vLLM is not installed
    with vllm_settings(dtype="float32"):
        assert vllm_generation.LLM(model="m") == {"model": "m", "dtype": "float32"}
    assert vllm_generation.LLM is dict


def test_transformers_shows_the_gguf_bar_with_the_patched_tqdm(capsys):
    source = inspect.getsource(modeling_gguf_pytorch_utils)
    assert "in tqdm(reader.tensors" in source, (
        "transformers no longer shows its GGUF progress bar with `tqdm`: gguf_bar_hidden has no effect"
    )
    with gguf_bar_hidden():
        list(modeling_gguf_pytorch_utils.tqdm(range(2), desc="Converting"))
    assert capsys.readouterr().err == ""
    list(modeling_gguf_pytorch_utils.tqdm(range(2), desc="Converting"))
    assert "Converting" in capsys.readouterr().err


def test_accelerate_still_stores_its_distributed_type_in_shared_state(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    shared_state = dict(PartialState._shared_state)
    try:
        shard_on_cpu()
        assert PartialState().distributed_type == DistributedType.MULTI_GPU
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(shared_state)


def test_replaced_restores_the_name_after_an_error():
    with pytest.raises(KeyError), replaced(sys, "maxsize", 3):
        assert sys.maxsize == 3
        raise KeyError
    assert sys.maxsize > 3


def imported_names(tree):
    """Return the names that a module imports."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}


def patches(tree):
    """Yield the source of assignments to attributes of imports, of setattr on them, and of mock imports."""
    imported = imported_names(tree)
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
    patches_by_file = {}
    for package in ("rlkit", "envs", "rewards"):
        for path in sorted((ROOT / package).rglob("*.py")):
            # These belong to the process, not to a library.
            of_process = ("os.environ", "sys.modules")
            sources = [s for s in patches(ast.parse(path.read_text())) if not s.startswith(of_process)]
            if sources:
                patches_by_file[str(path.relative_to(ROOT))] = sources
    assert patches_by_file.pop(PATCHES), "the search must find the known patches"
    assert patches_by_file == {}
