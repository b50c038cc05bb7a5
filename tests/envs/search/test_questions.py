"""Questions of data sets: what is read, which split it is in, and what is wrong with a file."""

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.search.questions import COLUMNS, NAMES, Part, plan, read_questions
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.engines.index import build_index
from rlkit.retrieval.reading import read_file, read_hub


def every(data):
    """The questions of all splits; a small file has none in some."""
    found = []
    for split in ("train", "dev", "test"):
        try:
            found += read_questions(data, split)
        except UserError as error:
            if "no questions in the split" not in str(error):
                raise
    return found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"id": f"{i}", "question": f"Who was number {i}?", "golden_answers": [f"Name {i}"]} for i in range(400)
]


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"question": "q", "golden_answers": ["Rome", "Roma"]}, ("Rome", "Roma")),  # FlashRAG, Search-R1
        ({"question": "q", "answer": "Rome"}, ("Rome",)),  # HotpotQA's own
        ({"query": "q", "answers": ["Rome"]}, ("Rome",)),
        ({"problem": "q", "target": 1912}, ("1912",)),
        ({"question": "q", "answers": '["Rome", "Roma"]'}, ("Rome", "Roma")),  # as a cell of CSV has it
        ({"question": "q", "answers": ["Rome", None, " Rome", "Roma"]}, ("Rome", "Roma")),
        ({"question": "q", "answers": None, "answer": "[1912]"}, ("[1912]",)),
        (
            {"question": " q ", "answers": ["The", " Rome ", "!!!"]},
            ("Rome",),
        ),  # nothing is left of two of them
    ],
)
def test_rows_of_several_shapes(tmp_path, row, answers):
    path = write(tmp_path / "a.jsonl", [row])
    (one,) = every(path)
    assert (one.question, one.answers, one.source) == ("q", answers, path)


def test_what_cannot_be_compared_is_left_out(tmp_path, caplog):
    bad = [
        {"question": "q", "answers": ["The", "!"]},
        {"question": "r", "answer": "a b", "answerable": False},
    ]
    path = write(tmp_path / "a.jsonl", [*bad, *ROWS[:3]])
    assert len(every(path)) == 3
    for row in ("row 1", "row 2"):
        assert caplog.text.count(f"{row} has no answer that can be compared") == 1


def test_half_a_character_is_no_failure(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "who \\ud83d", "answers": ["Rome\\ud83d"]}')
    (one,) = every(str(path))
    assert (one.question, one.answers) == ("who ?", ("Rome?",))


def test_a_csv_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answers\nq,"[""Rome"", ""Roma""]"\nr,Paris\n')
    assert {one.answers for one in every(str(path))} == {("Rome", "Roma"), ("Paris",)}


def test_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:30]), path)
    found = every(str(path))
    assert {one.question for one in found} == {row["question"] for row in ROWS[:30]}


def test_a_file_is_divided_by_its_questions(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    parts = {
        split: {one.question for one in read_questions(path, split)} for split in ("train", "dev", "test")
    }
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 400
    assert 20 <= len(parts["dev"]) <= 60 and 20 <= len(parts["test"]) <= 60
    other = write(tmp_path / "b.jsonl", [row | {"question": row["question"].upper()} for row in ROWS[::-1]])
    assert {one.question.lower() for one in read_questions(other, "dev")} == {q.lower() for q in parts["dev"]}


def test_a_folder_has_a_file_for_each_split(tmp_path):
    for name, rows in (("train", ROWS[:50]), ("dev", ROWS[50:60]), ("test", ROWS[60:70])):
        write(tmp_path / f"{name}.jsonl", rows)
    assert [len(read_questions(str(tmp_path), split)) for split in ("train", "dev", "test")] == [50, 10, 10]


def test_without_a_test_the_dev_split_is_the_test(tmp_path):
    """HotpotQA, 2WikiMultiHopQA and MuSiQue have no answers to their test questions."""
    write(tmp_path / "train.jsonl", ROWS[:300])
    write(tmp_path / "dev.jsonl", ROWS[300:])
    test = read_questions(str(tmp_path), "test")
    assert {one.question for one in test} == {row["question"] for row in ROWS[300:]}
    train, dev = (read_questions(str(tmp_path), split) for split in ("train", "dev"))
    assert len(train) + len(dev) == 300 and 15 <= len(dev) <= 45


@given(st.sets(st.sampled_from(["train", "dev", "validation", "test", "other"])))
def test_no_row_is_in_two_splits(parts):
    found = plan(sorted(parts))
    for name in {part.name for part in found.values()}:
        shares = sorted((part.low, part.high) for part in found.values() if part.name == name)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(shares))
        assert shares[0][0] == 0.0 and shares[-1][1] == 1.0
    assert ("train" in found) == ("train" in parts)


def test_only_a_test_split(tmp_path):
    """PopQA and Bamboogle."""
    assert plan(["test"]) == {"test": Part("test")}
    assert plan(["validation"]) == {"test": Part("validation")}
    write(tmp_path / "test.jsonl", ROWS[:5])
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        read_questions(str(tmp_path), "train")


def test_sets_are_joined_and_rows_of_one_number_stay_apart(tmp_path):
    """Trap T2: row i of NQ and row i of HotpotQA were one group."""
    first = write(tmp_path / "a.jsonl", ROWS[:100])
    second = write(tmp_path / "b.jsonl", [row | {"question": f"And {row['question']}"} for row in ROWS[:100]])
    found = read_questions(f"{first}+{second}", "train")
    assert len({one.id for one in found}) == len(found) > 140
    assert {one.source for one in found} == {first, second}


def test_a_question_stands_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], ROWS[0] | {"golden_answers": ["Another"]}])
    assert len(every(path)) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "q", "answers": ["A"]}\n{"question"', "line 2"),
        ('{"question": " ", "answers": ["A"]}', "row 1: no question"),
        ('{"answers": ["A"]}', "row 1: no question"),
        ('{"question": "q", "answers": []}', "row 1: no answer"),
        ('{"question": "q"}', "row 1: no answer"),
        ('{"question": "q", "answers": [null]}', "row 1: no answer"),
        ('{"question": "q", "answer": {"value": "A", "aliases": []}}', "row 1: the answer .*is no text"),
        ('{"question": "q", "answer": 1912.0}', "row 1: the answer 1912.0 is no text"),
        ('{"question": "q", "answer": true}', "row 1: the answer True is no text"),
        ('{"question": "q", "answer": NaN}', "row 1: the answer nan is no text"),
        ('{"question": "q", "answer": "[\'A\', \'B\']"}', "row 1: the answers .* not a list in JSON"),
        ('{"question": 1, "answer": "A"}', "row 1: no question"),
        ("[1]", "objects"),
        ("", "no rows"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        every(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hotpot", "no data set or file 'hotpot' .*'hotpotqa'"),
        ("./a.jsonl", "no file"),
        ("x+nq", "file 'x'"),
        ("+nq", "file ''"),
    ],
)
def test_what_is_not_there(name, words):
    with pytest.raises(UserError, match=words):
        read_questions(name, "train")


# Configs and splits of RUC-NLPIR/FlashRAG_datasets, as its card on the hub lists them.
FLASHRAG = {
    "nq": ("train", "dev", "test"),
    "triviaqa": ("train", "dev", "test"),
    "popqa": ("test",),
    "hotpotqa": ("train", "dev"),
    "2wikimultihopqa": ("train", "dev"),
    "musique": ("train", "dev"),
    "bamboogle": ("test",),
}


@pytest.fixture
def flashrag(tmp_path, monkeypatch):
    """A data set of that layout in a folder, which `datasets` loads as it loads one of the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "flashrag"
    card = ["---", "configs:"]
    for name, splits in FLASHRAG.items():
        (folder / name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split in splits:
            rows = [
                {
                    "id": f"{split}_{i}",
                    "question": f"{name}: who was number {i} of {split}?",
                    "golden_answers": [f"Name {i}", f"No. {i}"],
                    "metadata": {"type": "bridge", "context": {"title": ["T"], "content": [["an article"]]}},
                }
                for i in range(60)
            ]
            write(folder / name / f"{split}.jsonl", rows)
            card += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    monkeypatch.setattr("rlkit.envs.search.questions.HUB", str(folder))
    return str(folder)


def own_splits(questions):
    return {one.question.removesuffix("?").split()[-1] for one in questions}


def test_the_seven_sets_as_flashrag_has_them(flashrag):
    assert tuple(FLASHRAG) == NAMES
    for name, splits in FLASHRAG.items():
        test = read_questions(name, "test")
        assert len(test) == 60 and {one.source for one in test} == {name}
        assert own_splits(test) == ({"test"} if "test" in splits else {"dev"})
        assert test[7].answers == ("Name 7", "No. 7")
    with pytest.raises(UserError, match="popqa has no split 'train'; it has test"):
        read_questions("nq+popqa", "train")


def test_what_search_r1_trains_and_tests_on(flashrag):
    nq, hotpotqa = read_questions("nq", "train"), read_questions("hotpotqa", "train")
    both = read_questions("nq + hotpotqa", "train")
    assert both == nq + hotpotqa and len(nq) == 60 and 45 <= len(hotpotqa) < 60
    assert own_splits(read_questions("nq", "dev")) == {"dev"}
    held_out = read_questions("hotpotqa", "dev")
    assert own_splits(held_out) == {"train"} and len(held_out) + len(hotpotqa) == 60
    assert len(read_questions("+".join(FLASHRAG), "test")) == 7 * 60


def test_a_config_of_any_set_of_the_hub(flashrag):
    found = read_questions(f"{flashrag}:popqa", "test")
    assert [one.id for one in found] == [one.id for one in read_questions("popqa", "test")]
    with pytest.raises(UserError, match="cannot load the data set"):
        read_questions(f"{flashrag}:pop", "test")


def test_only_what_is_needed_of_a_row_is_kept(flashrag):
    """The articles in the rows of HotpotQA are a hundred times as long as its questions."""
    rows = read_hub(flashrag, "hotpotqa", "dev", columns=COLUMNS)
    assert rows == read_file(Path(flashrag, "hotpotqa/dev.jsonl"), COLUMNS) and len(rows) == 60
    assert set(rows[0]) == {"question", "golden_answers"}
    assert set(read_file(Path(flashrag, "hotpotqa/dev.jsonl"))[0]) > {"question", "golden_answers"}


def test_the_file_of_search_r1(tmp_path):
    """PeterJinGo/nq_hotpotqa_train: several sets in one, each row says which."""
    rows = [
        {
            "id": f"test_{i}",
            "question": f"who was number {i} of {source}?",
            "golden_answers": [f"Name {i}"],
            "data_source": source,
            "prompt": [{"role": "user", "content": "Answer the given question. …"}],
            "ability": "fact-reasoning",
            "reward_model": {"ground_truth": {"target": [f"Name {i}"]}, "style": "rule"},
            "extra_info": {"index": i, "split": "test"},
        }
        for source in ("nq", "hotpotqa")
        for i in range(40)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    found = read_questions(str(tmp_path), "test")
    assert [one.source for one in found] == ["nq"] * 40 + ["hotpotqa"] * 40
    assert len({one.id for one in found}) == 80
    assert found[41].answers == ("Name 1",)


def test_search_v1_asks_them(tmp_path):
    world = World(0, 200)
    index = build_index(world.passages(), tmp_path / "index")
    rows = [world.question("train", i, (1,)) for i in range(80)]
    path = write(tmp_path / "a.jsonl", [{"question": q.text, "answers": list(q.answers)} for q in rows])
    environment = load_environment("search-v2", data=path, engine=str(index), topk=1)
    tasks = environment.tasks("train", 30)
    assert len(tasks) == 30 and environment.breakdown == ("kind",) and set(tasks["kind"]) == {path}
    assert tasks["task_id"] != environment.tasks("train", 30, seed=1)["task_id"]
    assert environment.script(tasks[0]) is None
    assert environment.score(tasks[0], environment.answer(tasks[0]))["f1"] == 1
    with pytest.raises(UserError, match="data needs passages"):
        load_environment("search-v2", data=path)
