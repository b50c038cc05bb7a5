"""`CausalEnvironment`: arguments, tasks, rewards and solutions."""

import pickle
import re
import subprocess
import sys

import pytest

from rlkit.environment import SPLITS
from rlkit.envs.causal import CausalEnvironment
from rlkit.envs.causal.model import LEVELS
from rlkit.envs.causal.problem import from_json, to_json
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.rewards.distribution import parse_distribution

COLUMNS = {
    *("prompt", "task_id", "truth", "kind", "level", "relevant_size", "is_core", "is_semicore"),
    *("sums", "products", "graph_id", "question", "problem"),
}


def score(environment, task, completion):
    """Return all rewards of a completion."""
    columns = {"truth": task["truth"]}
    return {
        name: reward(completion, **(columns if name != "parsed" else {}))
        for name, reward in environment.rewards.items()
    }


@pytest.mark.parametrize("style", ["official", "short"])
@pytest.mark.parametrize("cardinality", [2, 3])
@pytest.mark.parametrize("truth_from", ["printed", "exact"])
def test_rewards_are_1_for_correct_answers_only(style, cardinality, truth_from):
    environment = CausalEnvironment(
        level=LEVELS, num_nodes=5, cardinality=cardinality, prompt_style=style, truth_from=truth_from
    )
    for task in environment.tasks("train", 60):
        assert set(score(environment, task, environment.answer(task)).values()) == {1.0}
        wrong = [*task["truth"][1:], task["truth"][0]]
        if max(task["truth"]) - min(task["truth"]) > 0.05:
            assert score(environment, task, f"ANSWER {wrong}")["correct"] == 0.0
        assert set(score(environment, task, "no idea").values()) == {0.0}


@pytest.mark.parametrize("style", ["official", "short"])
@pytest.mark.parametrize("cardinality", [2, 3])
def test_solution_derives_the_correct_answer(style, cardinality):
    environment = CausalEnvironment(level=LEVELS, num_nodes=7, cardinality=cardinality, prompt_style=style)
    solved = 0
    for task in environment.tasks("train", 300):
        solution = environment.solution(task)
        if solution is None:
            assert task["level"] == "counterfactual"
            continue
        assert set(score(environment, task, solution).values()) == {1.0}
        steps = solution.split("ANSWER")[0]
        if "known to be" in steps:
            assert sorted(task["truth"])[-1] == 1.0
        else:
            derived = parse_distribution(steps.rpartition("] = ")[2] if "] = " in steps else steps)
            assert derived == pytest.approx(task["truth"], abs=0.0051 + 1e-9)
        solved += 1
    assert solved > 220


def test_solution_writes_each_step():
    environment = CausalEnvironment(level="association", prompt_style="short")
    tables = '"tables":[[0.4,0.6],[[0.2,0.8],[0.5,0.5]],[[0.9,0.1],[0.3,0.7]]]'
    head = '{"names":["v0","v1","v2"],"parents":[[],[0],[1]],' + tables
    task = {"truth": [0.42, 0.58], "problem": head + ',"target":2,"observed":[0,0],"intervened":null}'}
    assert environment.solution(task) == "\n".join(
        [
            "Relevant variables: a, b, c.",
            "a=0 is given.",
            "P(b) = [0.2, 0.8]",
            "P(c=0) = 0.2*0.9 + 0.8*0.3 = 0.18 + 0.24 = 0.42",
            "P(c=1) = 0.2*0.1 + 0.8*0.7 = 0.02 + 0.56 = 0.58",
            "P(c) = [0.42, 0.58]",
            "ANSWER [0.42, 0.58]",
        ]
    )
    task = {"truth": [0.49, 0.51], "problem": head + ',"target":0,"observed":[2,1],"intervened":null}'}
    lines = environment.solution(task).splitlines()
    assert lines[1:3] == ["P(a) = [0.4, 0.6]", "P(a=0,b=0) = 0.4*0.2 = 0.08"]
    assert "P(a=0,c=1) = 0.08*0.1 + 0.32*0.7 = 0.008 + 0.224 = 0.232" in lines
    assert "P(c=1) = 0.232 + 0.24 = 0.472" in lines
    assert "P(a|c=1) = [0.232/0.472, 0.24/0.472] = [0.4915, 0.5085]" in lines


def test_steps_are_what_decides_and_the_arithmetic():
    environment = CausalEnvironment(
        level="association", prompt_style="short", solution_style="steps", decimals=1
    )
    tables = '"tables":[[0.4,0.6],[[0.2,0.8],[0.5,0.5]],[[0.9,0.1],[0.3,0.7]]]'
    head = '{"names":["v0","v1","v2"],"parents":[[],[0],[1]],' + tables
    one_sum = {"truth": [0.42, 0.58], "problem": head + ',"target":2,"observed":[0,0],"intervened":null}'}
    assert environment.solution(one_sum).splitlines() == [
        "c, parents b, seen a=0",
        "P(b|a=0)=[0.2, 0.8]",
        "P(c=0)=0.2*0.9+0.8*0.3=0.18+0.24=0.42",
        "ANSWER [0.42, 0.58]",
    ]
    two_sums = {"truth": [0.53, 0.47], "problem": head + ',"target":2,"observed":null,"intervened":null}'}
    assert environment.solution(two_sums).splitlines() == [
        "c, parents b",
        "P(a)=[0.4, 0.6]",
        "P(b=0)=0.4*0.2+0.6*0.5=0.08+0.30=0.38",
        "P(b)=[0.38, 0.62]",
        "P(c=0)=0.38*0.9+0.62*0.3=0.342+0.186=0.528",
        "ANSWER [0.53, 0.47]",
    ]
    row = {"truth": [0.2, 0.8], "problem": head + ',"target":1,"observed":[0,0],"intervened":null}'}
    assert environment.solution(row) == "b, parents a, seen a=0\nP(b|a=0)=[0.20, 0.80]"
    known = {"truth": [1.0, 0.0], "problem": head + ',"target":0,"observed":null,"intervened":[0,0]}'}
    assert environment.solution(known) == "a, no parents, do a=0\na is known to be 0.\nANSWER [1.00, 0.00]"


def without_padding(line):
    """Return a line of a solution without spaces, and its numbers without zeros at the end."""
    return re.sub(r"\.(\d*?)0+\b", lambda m: f".{m[1]}" if m[1] else "", line.replace(" ", ""))


@pytest.mark.parametrize("style", ["official", "short"])
@pytest.mark.parametrize(("cardinality", "decimals"), [(2, 1), (2, 2), (3, 2)])
def test_steps_are_part_of_the_verbose_solution(style, cardinality, decimals):
    verbose, brief = (
        CausalEnvironment(
            level=LEVELS,
            num_nodes=5,
            cardinality=cardinality,
            decimals=decimals,
            prompt_style=style,
            solution_style=solution_style,
        )
        for solution_style in ("verbose", "steps")
    )
    sums = 0
    for task in brief.tasks("train", 200):
        solution = brief.solution(task)
        if solution is None:
            assert task["level"] == "counterfactual"
            continue
        assert set(score(brief, task, solution).values()) == {1.0}
        lines = [without_padding(line) for line in solution.splitlines()]
        verbose_lines = [without_padding(line) for line in verbose.solution(task).splitlines()]
        prompt = [without_padding(line) for line in str(task["prompt"][-1]["content"]).splitlines()]
        for line in lines:
            if "*" in line or "/" in line:
                assert line in verbose_lines
                sums += 1
            elif "=[" in line and "|" in line:
                assert line in prompt  # a row of a table
            elif "=[" in line:
                name = line.split(")")[0]
                cells = [v.rpartition("=")[2] for v in verbose_lines if v.startswith(f"{name}=")]
                assert line in prompt or line == f"{name})=[{','.join(cells)}]"
    assert sums > 100


def test_mixed_solutions_are_verbose_or_steps_by_task():
    verbose, steps, mixed = (
        CausalEnvironment(num_nodes=3, questions_per_graph=1, prompt_style="short", solution_style=style)
        for style in ("verbose", "steps", "mixed")
    )
    tasks = [task for task in verbose.tasks("train", 200) if verbose.solution(task) != steps.solution(task)]
    brief = [mixed.solution(task) == steps.solution(task) for task in tasks]
    assert 0.15 < sum(brief) / len(tasks) < 0.35
    assert all(
        mixed.solution(task) == (steps if is_brief else verbose).solution(task)
        for task, is_brief in zip(tasks, brief, strict=True)
    )


def test_solution_omits_irrelevant_variables():
    environment = CausalEnvironment(level="association", prompt_style="short")
    head = (
        '{"names":["v0","v1","v2"],"parents":[[],[],[1]],"tables":[[0.4,0.6],[0.5,0.5],[[0.9,0.1],[0.3,0.7]]]'
    )
    task = {"truth": [0.4, 0.6], "problem": head + ',"target":0,"observed":[2,1],"intervened":null}'}
    assert environment.solution(task) == "P(a)=[0.40, 0.60]"


def test_short_solution_quotes_the_row_that_is_the_answer():
    environment = CausalEnvironment(prompt_style="short")
    head = (
        '{"names":["v0","v1","v2"],"parents":[[],[0],[1]],'
        '"tables":[[0.4,0.6],[[0.5,0.5],[0.2,0.8]],[[0.9,0.1],[0.3,0.7]]]'
    )
    child = {"truth": [0.2, 0.8], "problem": head + ',"target":1,"observed":null,"intervened":[0,1]}'}
    assert environment.solution(child) == "P(b|a=1)=[0.20, 0.80]"
    root = {"truth": [0.4, 0.6], "problem": head + ',"target":0,"observed":null,"intervened":[1,0]}'}
    assert environment.solution(root) == "P(a)=[0.40, 0.60]"
    observed = {"truth": [0.25, 0.75], "problem": head + ',"target":0,"observed":[1,1],"intervened":null}'}
    assert environment.solution(observed).splitlines()[-1] == "ANSWER [0.25, 0.75]"  # needs Bayes' rule


def test_tasks_have_the_same_columns_for_every_level():
    features = {str(CausalEnvironment(level=level).tasks("dev", 12).features) for level in LEVELS}
    assert len(features) == 1
    tasks = CausalEnvironment(level=LEVELS).tasks("dev", 200)
    assert set(tasks.column_names) == COLUMNS
    assert set(tasks["level"]) == set(LEVELS)
    for task in tasks:
        assert abs(sum(task["truth"]) - 1) < 1e-9
        assert task["is_core"] <= task["is_semicore"]
        assert task["question"] in task["prompt"][-1]["content"]


@pytest.mark.parametrize("split", SPLITS)
def test_task_i_depends_on_split_seed_and_i_alone(split):
    environment = CausalEnvironment(level=LEVELS, questions_per_graph=4)
    tasks = list(environment.tasks(split, 30, seed=3))
    assert list(environment.tasks(split, 13, seed=3)) == tasks[:13]
    assert list(CausalEnvironment(level=LEVELS, questions_per_graph=4).tasks(split, 30, seed=3)) == tasks
    assert list(environment.tasks(split, 30, seed=4)) != tasks
    ids = [task["task_id"] for task in tasks]
    assert len(set(ids)) == len({str(task["prompt"]) for task in tasks})


def test_task_id_is_stable():
    # If this id changes, every task does, and the environment needs a new version.
    task = CausalEnvironment(num_nodes=4, prompt_style="short").tasks("train", 1)[0]
    assert task["task_id"] == "0b650c54e77e8a04"


def test_splits_have_no_common_graph():
    for num_nodes in (4, 10):
        environment = CausalEnvironment(num_nodes=num_nodes, questions_per_graph=2)
        graphs = [
            {graph for seed in (0, 1) for graph in environment.tasks(split, 100, seed)["graph_id"]}
            for split in SPLITS
        ]
        assert sum(map(len, graphs)) == len(set.union(*graphs))


def test_questions_per_graph_sets_the_number_of_graphs():
    assert len(set(CausalEnvironment().tasks("train", 250)["graph_id"])) == 3
    assert len(set(CausalEnvironment().tasks("dev", 250)["graph_id"])) == 25
    assert len(set(CausalEnvironment().tasks("test", 250)["graph_id"])) == 7
    assert len(set(CausalEnvironment(questions_per_graph=125).tasks("test", 250)["graph_id"])) == 2


@pytest.mark.slow
def test_tasks_returns_the_default_number():
    sizes = {split: len(CausalEnvironment().tasks(split)) for split in SPLITS}
    assert sizes == {"train": 8000, "dev": 2000, "test": 8000}


def test_level_mapping_sets_the_probabilities():
    tasks = CausalEnvironment(level={"association": 3, "counterfactual": 1}).tasks("train", 400)
    levels = list(tasks["level"])
    assert levels.count("association") / 400 == pytest.approx(0.75, abs=0.08)
    assert "intervention" not in levels


def test_kinds_mapping_sets_the_probabilities():
    kinds = {"arithmetic": 2, "given": 1, "row": 1}
    for options in ({}, {"level": "association"}, {"num_nodes": 3, "max_in_degree": 1}):
        tasks = CausalEnvironment(kinds=kinds, **options).tasks("train", 400)
        counts = {kind: list(tasks["kind"]).count(kind) / 400 for kind in kinds}
        assert counts == pytest.approx({"arithmetic": 0.5, "given": 0.25, "row": 0.25}, abs=0.08)


def test_kind_that_a_graph_lacks_is_replaced_by_the_others_with_a_weight():
    arguments = {"num_nodes": 2, "max_in_degree": 1}  # there is no variable whose parent could be summed out
    weights = {"given": 0, "row": 1, "arithmetic": 5}
    assert set(CausalEnvironment(kinds=weights, **arguments).tasks("train", 40)["kind"]) == {"row"}
    with pytest.raises(UserError, match="no graph has a question of the kinds arithmetic"):
        CausalEnvironment(kinds="arithmetic", **arguments).tasks("train", 1)


@pytest.mark.parametrize("kind", ["given", "row", "arithmetic"])
def test_rare_kinds_are_found_in_large_graphs(kind):
    environment = CausalEnvironment(level=LEVELS, num_nodes=60, kinds=[kind])
    assert set(environment.tasks("train", 12)["kind"]) == {kind}
    few, many = environment.tasks("train", 3), environment.tasks("train", 12)
    assert few["task_id"][:] == many["task_id"][:3]


@pytest.mark.parametrize("cardinality", [2, 3])
def test_worked_sums_are_exact_to_the_last_digit(cardinality):
    environment = CausalEnvironment(level="association", num_nodes=4, cardinality=cardinality)
    num_sums = 0
    for task in environment.tasks("train", 150):
        for line in environment.solution(task).splitlines():
            steps = line.split(" = ")[1:] if "*" in line else []
            for step in steps[1:-1]:  # the products
                assert sum(map(float, step.split(" + "))) == pytest.approx(float(steps[-1]), abs=1e-9)
                num_sums += 1
    assert num_sums > 30


def test_short_solution_of_a_counterfactual_quotes_the_row_of_the_intervention():
    environment = CausalEnvironment(level="counterfactual", prompt_style="short")
    head = '{"names":["v0","v1"],"parents":[[],[0]],"tables":[[0.4,0.6],[[0.5,0.5],[0.2,0.8]]]'
    task = {"truth": [0.2, 0.8], "problem": head + ',"target":1,"observed":[0,0],"intervened":[0,1]}'}
    assert environment.solution(task) == "P(b|a=1)=[0.20, 0.80]"


@pytest.mark.parametrize("style", ["official", "short"])
def test_tables_of_one_decimal_are_printed_as_such(style):
    environment = CausalEnvironment(num_nodes=3, decimals=1, prompt_style=style)
    for task in environment.tasks("train", 50):
        tables = from_json(task["problem"])[0].tables
        assert all((table == table.round(1)).all() for table in tables)
        text = task["prompt"][-1]["content"].split("= ?")[0].split("Question")[0]
        assert {len(number) for number in re.findall(r"\d\.\d+", text)} == {3}
        if style == "official":
            assert environment.solve_prompt(task["prompt"]) == task["truth"]


def test_truth_from_exact_uses_unrounded_tables():
    exact = CausalEnvironment(level="association", truth_from="exact").tasks("test", 200)
    printed = CausalEnvironment(level="association").tasks("test", 200)
    num_equal = sum(a == b for a, b in zip(exact["truth"], printed["truth"], strict=True))
    assert 100 < num_equal < 200
    tables = from_json(exact[0]["problem"])[0].tables
    assert any((table != table.round(2)).any() for table in tables)
    assert not any((table != table.round(2)).any() for table in from_json(printed[0]["problem"])[0].tables)


def test_problem_round_trips_through_json():
    for task in CausalEnvironment(level=LEVELS).tasks("dev", 20):
        assert to_json(*from_json(task["problem"])) == task["problem"]


def test_tolerance_strict_parser_and_which_reach_the_rewards():
    task = {"truth": [0.4, 0.6]}
    off = "ANSWER [0.41, 0.59]"
    assert score(CausalEnvironment(), task, off)["distribution"] == 1.0
    strict = score(CausalEnvironment(strict=True), task, off)
    assert (strict["distribution"], strict["correct"]) == (0.0, 1.0)
    assert score(CausalEnvironment(tolerance=0.0), task, off)["distribution"] == 0.0
    official = CausalEnvironment(parser="official")
    assert score(official, task, "ANSWER: [0.4, 0.6]")["parsed"] == 0.0
    assert score(official, task, "ANSWER [0.4, 0.6] ANSWER [0.0, 1.0]")["correct"] == 1.0
    first = CausalEnvironment(which="first")
    assert score(first, task, "ANSWER: [0.4, 0.6] ANSWER: [0.0, 1.0]")["correct"] == 1.0
    assert CausalEnvironment().reward_weights == {"parsed": 0.1, "right_length": 0.1, "distribution": 0.8}


def test_environment_pickles():
    environment = pickle.loads(pickle.dumps(CausalEnvironment(level=LEVELS)))
    task = environment.tasks("dev", 1)[0]
    assert score(environment, task, environment.answer(task))["correct"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"level": "interventoin"}, "did you mean 'intervention'"),
        ({"level": []}, "no level"),
        ({"level": {"association": 0}}, "no level has a positive weight"),
        ({"level": {"association": -1}}, "weight of level 'association'"),
        ({"level": {"association": float("nan")}}, "weight of level 'association'"),
        ({"num_nodes": 1}, "num_nodes must be an integer from 2 to 200, not 1"),
        ({"num_nodes": 10.0}, "must be an integer from 2 to 200"),
        ({"num_nodes": 10**6}, "from 2 to 200"),
        ({"decimals": 3}, "decimals must be an integer from 1 to 2, not 3"),
        ({"decimals": 1, "truth_from": "exact"}, "truth_from 'exact' requires decimals 2"),
        ({"kinds": {"sum": 1}}, "unknown kind 'sum'"),
        ({"kinds": 3}, "kinds must be a name, a list of names or a mapping to weights, not 3"),
        ({"kinds": {"row": -1}}, "weight of kind 'row'"),
        ({"level": 2}, "level must be a name, a list of names or a mapping"),
        ({"cardinality": 1}, "cardinality must be an integer from 2 to 64, not 1"),
        ({"roots": 0}, "roots must be an integer from 1 to 9, not 0"),
        ({"roots": 10}, "from 1 to 9"),
        ({"max_in_degree": 0}, "max_in_degree must be an integer of at least 1, not 0"),
        ({"max_in_degree": 10}, "at most 9 parents"),
        ({"num_nodes": 20, "max_in_degree": 15}, "more than 4096 cells"),
        ({"concentration": 0}, "concentration must be between 0.01 and 1e6, not 0"),
        ({"concentration": float("nan")}, "concentration must be between 0.01 and 1e6, not nan"),
        ({"questions_per_graph": 0}, "questions_per_graph must be an integer of at least 1, not 0"),
        ({"truth_from": "prnted"}, "did you mean 'printed'"),
        ({"prompt_style": "long"}, "unknown prompt_style 'long'"),
        ({"solution_style": "long"}, "unknown solution_style 'long'"),
        ({"tolerance": -0.1}, "at least 0 and below 1, such as 0.01, not -0.1"),
        ({"tolerance": 1}, "at least 0 and below 1, such as 0.01, not 1"),
        ({"parser": "loose"}, "unknown parser 'loose'"),
        ({"which": "best"}, "unknown which 'best'"),
        ({"parser": "official", "prompt_style": "short"}, "set prompt_style to 'official'"),
        ({"nodes": 3}, "no argument 'nodes'"),
    ],
)
def test_invalid_arguments_raise_one_line(arguments, reason):
    with pytest.raises(UserError, match=reason) as error:
        load_environment("causal-v1", **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "n", "seed"), [("tset", 1, 0), ("test", 0, 0), ("test", -1, 0), ("test", 1, -1)]
)
def test_tasks_rejects_invalid_split_n_and_seed(split, n, seed):
    with pytest.raises(UserError):
        CausalEnvironment().tasks(split, n, seed)


def test_import_does_not_need_torch():
    code = "import sys; sys.modules['torch'] = None; import rlkit.envs.causal"
    code += "; assert 'datasets' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
