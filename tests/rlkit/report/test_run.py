import json

import pytest

from rlkit.errors import UserError
from rlkit.report import build_report
from rlkit.report.run import read_run


def test_read_run_orders_evaluations_by_training_step(make_run):
    names = ("after", "before", "other", "step-100", "step-40", "warm-start")
    run = read_run(make_run(evaluations=names))
    assert list(run.evaluations) == ["before", "warm-start", "step-40", "step-100", "after", "other"]
    assert [run.step_of(name) for name in run.evaluations] == [0, 0, 40, 100, 40, None]
    assert run.metric == "correct"


def test_read_metrics_keeps_the_last_value_of_a_step(make_run):
    """A run that resumes logs the steps after its checkpoint again."""
    path = make_run(steps=3)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "stage": "train", "seconds": 9, "reward": 7.0}) + "\n")
        file.write(json.dumps({"step": 3, "stage": "train", "seconds": 10, "train_runtime": 10}) + "\n")
    run = read_run(path)
    assert run.training["step"].tolist() == [1, 2, 3]
    assert run.training["reward"].tolist()[1] == 7.0
    assert run.training["reward"].notna().all()  # TRL's final line does not replace the step's metrics


def test_read_metrics_ignores_a_truncated_last_line(make_run):
    path = make_run(steps=3)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')
    run = read_run(path)
    assert len(run.training) == 3 and run.notes == []


def test_read_run_turns_damaged_files_into_notes(make_run):
    path = make_run(steps=3)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(["{", *lines]) + "\n")
    (path / "rollouts" / "step-000002.parquet").write_bytes(b"PAR1 not really")
    (path / "evaluation" / "after.json").write_text("{}")
    (path / "config.yaml").write_text("a: [")
    run = read_run(path)
    assert (
        len(run.training) == 3 and set(run.rollouts["step"]) == {1, 3} and list(run.evaluations) == ["before"]
    )
    for text, note in zip(("config.yaml", "line 1", "step-000002", "after.json"), run.notes, strict=True):
        assert text in note


def test_read_config_masks_secrets(make_run):
    config = read_run(make_run(steps=1)).config
    assert config["hub_token"] == "***" and config["eos_token"] == "</s>"


def test_read_run_notes_missing_parts(make_run):
    path = make_run(steps=1, evaluations=(), rollouts=0)
    notes = ["only one training step", "no held-out evaluation", "no training rollouts"]
    for text, note in zip(notes, read_run(path).notes, strict=True):
        assert text in note
    (path / "metrics.jsonl").unlink()
    assert "no training step" in read_run(path).notes[0]


@pytest.mark.parametrize("name", ["missing", "empty", "file"])
def test_read_run_rejects_other_paths(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a run directory"):
        read_run(tmp_path / name)


def test_rank_run_has_its_own_stage_and_steps(make_run):
    run = read_run(make_run(steps=12, objective="infonce"))
    assert run.stage == "rank" and run.step_of("after") == 12
    assert not any("no training step" in note for note in run.notes)


def test_read_metrics_accepts_earlier_versions(make_run):
    """Earlier versions logged evaluation/accuracy; a run resumed since then has the metric's name, too."""
    path = make_run(steps=3)
    with (path / "metrics.jsonl").open("a") as file:
        for step, name in ((0, "accuracy"), (2, "accuracy"), (3, "correct")):
            file.write(json.dumps({"step": step, "stage": "train", f"evaluation/{name}": 0.25}) + "\n")
    run = read_run(path)
    assert run.training["step"].tolist() == [1, 2, 3] and run.training["reward"].notna().all()
    assert "</html>" in build_report([path]).read_text(encoding="utf-8")
    assert not any("metrics.jsonl" in note for note in run.notes)


def test_run_with_only_a_warm_start_is_an_sft_run(make_run):
    run = read_run(make_run(steps=0, rollouts=0))
    assert run.stage == "sft" and run.step_of("after") == 10
