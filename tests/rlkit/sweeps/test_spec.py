"""Sweep files are checked before anything starts; each mistake is an error of one line with a remedy."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.commands.sweep import check_points, main
from rlkit.errors import UserError
from rlkit.sweeps.spec import Sweep, grid_values, load_sweep
from tests.quick import ROOT, TOY

RATES = {"learning_rate": [0.1, 0.2]}


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")))
def test_shipped_sweeps_are_valid(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    sweep = load_sweep(path)
    assert sweep.size > 1
    check_points(sweep)


def test_grid_has_all_combinations(write):
    sweep = load_sweep(write(keys={"a": [1, 2], "b": {"low": 1, "high": 5, "step": 2}}))
    assert list(sweep.grid()) == [{"a": a, "b": b} for a in (1, 2) for b in (1, 3, 5)]
    assert sweep.size == 6


@given(low=st.integers(-50, 50), steps=st.integers(1, 60), step=st.sampled_from([0.1, 0.05, 0.25, 2, 3]))
def test_grid_values_of_a_range_include_both_ends(low, steps, step):
    values = grid_values("a", {"low": low, "high": low + steps * step, "step": step})
    assert len(values) == steps + 1
    assert values[0] == low and values[-1] == pytest.approx(low + steps * step)


def test_to_argv_round_trips_through_the_parser(write):
    from rlkit.arguments.parse import parse_train

    keys = {
        "learning_rate": 0.5,
        "environment_args.name": "1",
        "environment_args.level": 2,
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "guards": {"length": "stop"},
        "shuffle_dataset": False,
    }
    sweep = load_sweep(write(keys=RATES))
    run = parse_train([sweep.base, *sweep.to_argv(keys)])
    assert run.trainer_args.learning_rate == 0.5 and run.trainer_args.shuffle_dataset is False
    assert run.args.mapping("environment_args") == {"name": "1", "level": 2}
    assert run.model_args.lora_target_modules == ["q_proj", "v_proj"]
    assert run.args.mapping("guards") == {"length": "stop"}


@pytest.mark.parametrize(
    "keys, complaint",
    [
        ({"keys": None}, "'keys' is missing"),
        ({"keys": {}}, "'keys' is missing"),
        ({"keys": {"learning_rate": []}}, "learning_rate has an empty list"),
        ({"keys": {"learning_rate": [None]}}, "null and \\[\\] cannot be passed"),
        ({"keys": {"learning_rate": 0.1}}, "must be a list, or a range"),
        ({"keys": {"learning_rate": {"low": "1e-5", "high": 1}}}, "write 1.0e-5"),
        ({"keys": {"learning_rate": {"low": 1, "hihg": 2}}}, "did you mean 'high'"),
        ({"keys": {"learning_rate": {"low": 2, "high": 2}}}, "low .2. must be less than high .2."),
        ({"keys": {"learning_rate": {"low": 0, "high": 2, "log": True}}}, "low > 0"),
        ({"keys": {"learning_rate": {"low": 1, "high": 2}}}, "a grid needs a list"),
        ({"keys": {"seed": [0, 1]}}, "use seeds"),
        ({"keys": {"output_dir": ["a"]}}, "the sweep sets output_dir itself; remove it"),
        ({"keys": {"a": list(range(101)), "b": list(range(100))}}, "10,100 points"),
        ({"serach": "grid"}, "did you mean 'search'"),
        ({"search": "rnadom"}, "did you mean 'random'"),
        ({"search": "random"}, "needs trials"),
        ({"trials": 3}, "remove trials"),
        ({"seeds": []}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"pruning": True}, "pruning requires `search: optuna`"),
        ({"parallel": 0}, "at least 1"),
        ({"base": "nowhere.yaml"}, "base config nowhere.yaml does not exist"),
    ],
)
def test_load_sweep_rejects_mistakes(write, keys, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load_sweep(write(**({"keys": RATES} | keys)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, keys, complaint",
    [
        ({}, {"learning_rat": [1]}, "learning_rat=1: unknown key .*did you mean 'learning_rate'"),
        ({}, {"environment_arg.level": [1]}, "did you mean 'environment_args'"),
        ({}, {"num_generations": [4, 3]}, "num_generations=3: .*divisible"),
        ({"evaluation_tasks": 0}, RATES, "evaluation_tasks 0"),
    ],
)
def test_command_rejects_mistakes_that_a_run_would_find(write, changes, keys, complaint):
    path = write(changes=changes, keys=keys)
    with pytest.raises(UserError, match=complaint) as caught:
        main([str(path)])
    assert "\n" not in str(caught.value)
    assert not load_sweep(path).folder.exists()


@pytest.mark.parametrize(
    ("objective", "hint"), [("evne", "(did you mean 'even'?)"), ("accuracy", "(choices: even)")]
)
def test_command_rejects_an_unknown_objective_in_one_line(write, objective, hint):
    path = write(keys=RATES, objective=objective)
    with pytest.raises(UserError) as caught:
        main([str(path)])
    assert str(caught.value) == (
        f"learning_rate=0.1: unknown objective {objective!r} {hint}: "
        "name one of the rewards, or remove objective to compare the metric, even"
    )


def test_objective_may_be_a_reward_named_accuracy(write, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from tests.toy import Even, even, variety\n\n\nclass Mine(Even):\n"
        "    rewards = {'even': even, 'accuracy': variety}\n"
        "    reward_weights = {'even': 1.0, 'accuracy': 1.0}\n"
    )
    changes = {"environment": f"{file}:Mine"}
    assert check_points(load_sweep(write(changes=changes, keys=RATES, objective="accuracy"))) == "even"


def test_objective_may_be_a_reward_of_a_file_or_of_the_algorithm(write, tmp_path):
    (tmp_path / "mine.py").write_text("def brief(completion: str) -> float:\n    return 1.0\n")
    changes = {"rewards": ["even", f"{tmp_path / 'mine.py'}:brief"]}
    assert check_points(load_sweep(write(changes=changes, keys=RATES, objective="brief"))) == "even"
    changes = {"algorithm": "hapo"}
    assert check_points(load_sweep(write(changes=changes, keys=RATES, objective="hapo"))) == "even"


def test_points_with_different_metrics_need_an_objective(write):
    keys = {"environment": [f"{TOY}:Even", f"{TOY}:Vowels"]}
    with pytest.raises(UserError, match=r"different metrics \(even, vowels\); set objective"):
        check_points(load_sweep(write(keys=keys)))


def test_corners_cover_both_ends_of_a_range(write):
    sweep = load_sweep(write(keys={"temperature": {"low": 0.5, "high": 2.0}}, search="random", trials=2))
    assert sweep.corners() == [{"temperature": 0.5}, {"temperature": 2.0}]


def test_pruning_requires_evaluations_during_training(write):
    path = write(keys=RATES, search="optuna", trials=3, pruning=True)
    with pytest.raises(UserError, match="set evaluation_steps"):
        main([str(path)])


def test_identity_excludes_what_may_change_on_resume():
    sweep = Sweep("base.yaml", {"a": [1]}, seeds=[0], trials=0)
    assert sweep.identity() == Sweep("base.yaml", {"a": [1]}, seeds=[0, 1], parallel=3).identity()
    assert sweep.identity() != Sweep("base.yaml", {"a": [2]}).identity()
    assert json.loads(sweep.identity())["base"] == "base.yaml"
