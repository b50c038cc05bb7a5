"""`benchmarks/gpu.py` runs all of its parts on a CPU, and what it compares computes the same.

FlexAttention is not compiled here, and varlen attention is a loop: the part `attention` checks the kernels.
"""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quick import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_parts import attention, common, long, memory, trainers  # noqa: E402

from rlkit.training import shared_prefix  # noqa: E402

CPU = common.Bench(torch.device("cpu"), repeats=1, deadline=float("inf"))
# Cases that a part measures; on a CPU, they have the same names.
NUM_CASES = {"smoke": 5, "step": 12, "attention": 8, "long": 4, "generate": 2, "memory": 6, "rank": 2}


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
@pytest.mark.parametrize("part", gpu.PARTS)
def test_part_measures_all_cases_on_a_cpu(part, tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--cpu", "--part", part, "--repeats", "1"]
    process = subprocess.run(
        [*command, "--out", out], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(out.read_text())
    assert list(result) == [part]
    cases = result[part]["cases"]
    assert len(cases) == NUM_CASES[part]
    # Some cases record the error of one side, so that the others are still measured.
    assert '"error":' not in json.dumps(cases)
    if part == "attention":
        for name, case in cases.items():
            # FlexAttention has no backward pass on a CPU.
            sides = set(attention.IMPLEMENTATIONS) - ({"flex"} if name.endswith("model") else set())
            assert sides < case.keys()
    assert result[part]["machine"]["versions"]["torch"] == torch.__version__


def run_cases(monkeypatch, out, cases, *options):
    """Run the script in this process with a part that has the given cases; return exit code and result."""
    part = type(sys)("gpu_parts.fake")
    part.cases = lambda bench: cases
    monkeypatch.setitem(sys.modules, "gpu_parts.fake", part)
    monkeypatch.setitem(gpu.PARTS, "fake", "a part of this test")
    for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # restores what the script sets
    argv = ["gpu.py", "--cpu", "--part", "fake", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return gpu.main(), json.loads(out.read_text())["fake"]["cases"]


def failing_case():
    raise ValueError("no such kernel")


def test_failing_case_is_recorded_and_does_not_stop_the_others(monkeypatch, tmp_path):
    cases = {"bad": failing_case, "good": lambda: {"median_s": 1.0}}
    exit_code, result = run_cases(monkeypatch, tmp_path / "gpu.json", cases)
    assert exit_code == 1
    assert result == {"bad": {"error": "ValueError: no such kernel"}, "good": {"median_s": 1.0}}


def test_other_parts_of_the_result_are_kept(monkeypatch, tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"smoke": {"cases": {}}}))
    run_cases(monkeypatch, out, {"good": dict})
    assert list(json.loads(out.read_text())) == ["smoke", "fake"]


def test_missing_measures_only_new_and_failed_cases(monkeypatch, tmp_path):
    out = tmp_path / "gpu.json"
    run_cases(monkeypatch, out, {"good": lambda: {"run": 1}, "bad": failing_case})
    cases = {"good": lambda: {"run": 2}, "bad": lambda: {"run": 2}, "new": lambda: {"run": 2}}
    exit_code, result = run_cases(monkeypatch, out, cases, "--missing")
    assert exit_code == 0
    assert result == {"good": {"run": 1}, "bad": {"run": 2}, "new": {"run": 2}}


def test_missing_measures_cases_again_in_which_one_side_failed(monkeypatch, tmp_path):
    out = tmp_path / "gpu.json"
    exit_code, _ = run_cases(monkeypatch, out, {"case": lambda: {"sdpa": {}, "flex": {"error": "no"}}})
    assert exit_code == 1
    exit_code, result = run_cases(monkeypatch, out, {"case": lambda: {"flex": {}}}, "--missing")
    assert (exit_code, result) == (0, {"case": {"flex": {}}})


@pytest.mark.parametrize("changed", ["repeats", "source", "card"])
def test_missing_does_not_mix_measurements_of_other_settings_code_or_cards(monkeypatch, tmp_path, changed):
    out = tmp_path / "gpu.json"
    run_cases(monkeypatch, out, {"good": dict})
    result = json.loads(out.read_text())
    section = result["fake"] if changed == "repeats" else result["fake"]["machine"]
    section[changed] = "other"
    out.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=f"fake was measured with {changed} 'other', now"):
        run_cases(monkeypatch, out, {"good": dict}, "--missing")
    assert json.loads(out.read_text()) == result


def test_case_that_outlasts_its_part_is_interrupted(tmp_path):
    """Also if it catches all exceptions. The script sets signal handlers, so it gets a process of its own."""
    code = """
import sys
import gpu
part = type(sys)("gpu_parts.fake")
def endless():
    while True:
        try:
            while True:
                pass
        except Exception:
            pass
part.cases = lambda bench: {"endless": endless, "next": dict}
sys.modules["gpu_parts.fake"] = part
gpu.PARTS["fake"] = ""
raise SystemExit(gpu.main())
"""
    out = tmp_path / "gpu.json"
    options = ["--cpu", "--part", "fake", "--out", str(out), "--minutes", "0.02"]
    process = subprocess.run([sys.executable, "-c", code, *options], cwd=BENCHMARKS, check=False)
    assert process.returncode == 1
    outcomes = json.loads(out.read_text())["fake"]["cases"]
    assert list(outcomes) == ["endless", "next"]
    assert all(outcome["error"].startswith("out of time") for outcome in outcomes.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpu"], "set --out to another file"),
        (["--cpu", "--out", "results/../results/gpu.json"], "set --out to another file"),
        (["--out", "OUT"], "there is no GPU; --cpu tries the parts"),
        (["--cpu", "--out", "OUT", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--cpu", "--out", "OUT", "--minutes", "0"], "--minutes must be positive and finite, not 0"),
        (["--cpu", "--out", "OUT", "--minutes", "nan"], "--minutes must be positive and finite, not nan"),
        (["--cpu", "--out", "/proc/nowhere/gpu.json"], "cannot write /proc/nowhere/gpu.json"),
        (["--cpu", "--out", "BROKEN"], "cannot read the result file"),
        (["--cpu", "--out", "LIST"], "it is not a JSON object"),
    ],
)
def test_wrong_options_are_one_line_errors(monkeypatch, tmp_path, capsys, options, message):
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.json").write_text("{")
    names = {"OUT": "gpu.json", "BROKEN": "broken.json", "LIST": "list.json"}
    monkeypatch.chdir(BENCHMARKS)
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", *(str(tmp_path / names[o]) if o in names else o for o in options)]
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the test must pass on a GPU machine, too
    for name in ("PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as error:
        gpu.main()
    assert message in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "gpu.json").exists()


def test_part_without_its_packages_names_the_script_that_collects_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(gpu.PARTS, "not_there", "a part whose import fails")
    out = tmp_path / "gpu.json"
    exit_code, result = run_cases(monkeypatch, out, {"good": dict}, "--part", "not_there", "fake")
    assert (exit_code, result) == (1, {"good": {}})
    assert "benchmarks/gpu_wheels.sh" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "millions"),
    [("qwen3-0.6b", 596), ("qwen3-4b", 4022), ("llama-3.2-1b", 1236), ("gemma-2b", 2506)],
)
def test_models_have_the_published_number_of_parameters(name, millions):
    bench = common.Bench(torch.device("meta"), repeats=1, deadline=float("inf"))
    assert round(bench.model(name).num_parameters() / 1e6) == millions


def test_long_rows_have_16k_tokens():
    for (prompts, completions), _ in long.ROWS.values():
        assert sum(prompts) + sum(completions) == 16_384


@pytest.mark.parametrize("model", trainers.MODELS)
@pytest.mark.parametrize("side", ["trl", "rlkit"])
def test_stepped_trainer_recomputes_activations(tmp_path, side, model):
    """Trainers turn gradient checkpointing on in `train`, which a stepped trainer does not call."""
    trainer = trainers.SteppedTrainer(
        CPU, side, model, (8, 4, 4), tmp_path / "run", gradient_checkpointing=True
    )
    calls = []
    layer = next(m for name, m in trainer.model.named_modules() if name.endswith("layers.0"))
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        trainer.forward_backward(trainers.random_batch(CPU, [8], [4] * 4, 4))
    finally:
        trainer.close()
    assert len(calls) == 2


def test_code_that_measures_memory_on_a_gpu_calls_functions_that_exist():
    """It cannot run here: its numbers are those of a GPU."""
    compile(memory.TRAIN, "TRAIN", "exec")
    functions = re.findall(r"torch\.cuda\.(\w+)\(", memory.TRAIN)
    assert [name for name in functions if not callable(getattr(torch.cuda, name, None))] == []
    assert "mem_get_info" in functions


def test_tokenizer_has_one_token_per_ascii_character_and_decodes_every_id():
    tokenizer = common.make_tokenizer(512)
    text = "Count to 7, please.\n"
    assert len(tokenizer(text)["input_ids"]) == len(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len({tokenizer.decode([i]) for i in range(257, 512)}) == 512 - 257


@st.composite
def batches(draw):
    """Return a batch of one to three prompts, and the number of completions per prompt."""
    group = draw(st.integers(1, 3))
    prompts = draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    lengths = st.integers(1, 12)
    completions = draw(st.lists(lengths, min_size=group * len(prompts), max_size=group * len(prompts)))
    return trainers.random_batch(CPU, prompts, completions, group), group


@settings(max_examples=25, deadline=None)
@given(batch_and_group=batches())
def test_implementations_of_attention_agree(batch_and_group):
    layout = attention.layout_of(*batch_and_group)
    num_tokens = len(layout.prompts) + len(layout.completions)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, num_tokens, 8, generator=generator) for heads in (4, 2, 2)]
    expected = shared_prefix.attend(*inputs, layout, scale=0.3)
    for name, implementation in attention.IMPLEMENTATIONS.items():
        torch.testing.assert_close(implementation(*inputs, layout, scale=0.3), expected, msg=name)


def test_every_wheel_is_pinned():
    script = (BENCHMARKS / "gpu_wheels.sh").read_text()
    listed = re.search(r"packages=\(\n(.*?)\n\)", script, re.S).group(1)
    packages = re.sub("#.*", "", listed).split()
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert "trl" in packages
    assert [package for package in packages if package.lower() not in pinned] == []


def test_wheel_script_without_a_folder_prints_its_usage():
    process = subprocess.run([BENCHMARKS / "gpu_wheels.sh"], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (2, "usage: benchmarks/gpu_wheels.sh FOLDER\n")
