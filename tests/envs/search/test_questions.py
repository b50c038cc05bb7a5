"""Questions from datasets: row formats, splits, invalid rows, and the datasets of FlashRAG."""

import itertools
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.envs.search.layouts import COLUMNS
from rlkit.envs.search.questions import NAMES, Portion, assign_splits, read_questions
from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.world import World
from rlkit.retrieval.engines.index import build_index
from rlkit.retrieval.reading import read_file, read_hub


def read_all(data):
    """Return the questions of all splits. A small file may have none in some of them."""
    questions = []
    for split in ("train", "dev", "test"):
        try:
            questions += read_questions(data, split)
        except UserError as error:
            if "no questions in the split" not in str(error):
                raise
    return questions


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
        ({"question": "q", "answer": "Rome"}, ("Rome",)),  # HotpotQA
        ({"query": "q", "answers": ["Rome"]}, ("Rome",)),
        ({"problem": "q", "target": 1912}, ("1912",)),
        ({"question": "q", "answers": '["Rome", "Roma"]'}, ("Rome", "Roma")),  # in a CSV file
        ({"question": "q", "answers": ["Rome", None, " Rome", "Roma"]}, ("Rome", "Roma")),
        ({"question": "q", "answers": None, "answer": "[1912]"}, ("[1912]",)),
        # "The" and "!!!" are empty after normalization.
        ({"question": " q ", "answers": ["The", " Rome ", "!!!"]}, ("Rome",)),
    ],
)
def test_read_questions_accepts_the_columns_of_several_datasets(tmp_path, row, answers):
    path = write(tmp_path / "a.jsonl", [row])
    (question,) = read_all(path)
    assert (question.question, question.answers, question.source) == ("q", answers, path)


def test_questions_without_comparable_answer_are_skipped(tmp_path, caplog):
    incomparable = [
        {"question": "q", "answers": ["The", "!"]},
        {"question": "r", "answer": "a b", "answerable": False},
    ]
    path = write(tmp_path / "a.jsonl", [*incomparable, *ROWS[:3]])
    assert len(read_all(path)) == 3
    assert (
        "skipped 2 of 5 rows" in caplog.text
        and "which have no answer that can be compared: row 1, 2" in caplog.text
    )


def test_lone_surrogates_become_question_marks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "who \\ud83d", "answers": ["Rome\\ud83d"], "data_source": "nq\\ud83d"}')
    (question,) = read_all(str(path))
    assert (question.question, question.answers, question.source) == ("who ?", ("Rome?",), "nq?")


def test_csv_file_has_answers_as_json(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answers\nq,"[""Rome"", ""Roma""]"\nr,Paris\n')
    assert {question.answers for question in read_all(str(path))} == {("Rome", "Roma"), ("Paris",)}


def test_parquet_file_is_read(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:30]), path)
    questions = read_all(str(path))
    assert {question.question for question in questions} == {row["question"] for row in ROWS[:30]}


def test_splits_of_a_file_depend_on_the_normalized_questions_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    splits = {}
    for split in ("train", "dev", "test"):
        splits[split] = {question.question for question in read_questions(path, split)}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 400
    assert 20 <= len(splits["dev"]) <= 60 and 20 <= len(splits["test"]) <= 60
    rows = [row | {"question": row["question"].upper()} for row in ROWS[::-1]]
    uppercase = read_questions(write(tmp_path / "b.jsonl", rows), "dev")
    assert {question.question for question in uppercase} == {text.upper() for text in splits["dev"]}


def test_folder_has_one_file_per_split(tmp_path):
    for name, rows in (("train", ROWS[:50]), ("dev", ROWS[50:60]), ("test", ROWS[60:70])):
        write(tmp_path / f"{name}.jsonl", rows)
    assert [len(read_questions(str(tmp_path), split)) for split in ("train", "dev", "test")] == [50, 10, 10]


def test_dev_split_is_the_test_split_if_there_is_none(tmp_path):
    """The test questions of HotpotQA, 2WikiMultiHopQA and MuSiQue have no public answers."""
    write(tmp_path / "train.jsonl", ROWS[:300])
    write(tmp_path / "dev.jsonl", ROWS[300:])
    test = read_questions(str(tmp_path), "test")
    assert {question.question for question in test} == {row["question"] for row in ROWS[300:]}
    train, dev = (read_questions(str(tmp_path), split) for split in ("train", "dev"))
    assert len(train) + len(dev) == 300 and 15 <= len(dev) <= 45


@given(st.sets(st.sampled_from(["train", "dev", "validation", "test", "other"])))
def test_assign_splits_gives_disjoint_portions(stored_names):
    portions = assign_splits(sorted(stored_names)).values()
    for name in {portion.stored_split for portion in portions}:
        ranges = sorted((portion.low, portion.high) for portion in portions if portion.stored_split == name)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))
        assert ranges[0][0] == 0.0 and ranges[-1][1] == 1.0
    assert ("train" in assign_splits(sorted(stored_names))) == ("train" in stored_names)


def test_dataset_with_only_a_test_split(tmp_path):
    """PopQA and Bamboogle have only a test split."""
    assert assign_splits(["test"]) == {"test": Portion("test")}
    assert assign_splits(["validation"]) == {"test": Portion("validation")}
    write(tmp_path / "test.jsonl", ROWS[:5])
    with pytest.raises(UserError, match="no split 'train'; it has test"):
        read_questions(str(tmp_path), "train")


def test_rows_with_equal_ids_in_joined_datasets_are_different_tasks(tmp_path):
    """Trap T2: in Search-R1, row i of NQ and row i of HotpotQA were one group."""
    first = write(tmp_path / "a.jsonl", ROWS[:100])
    second = write(tmp_path / "b.jsonl", [row | {"question": f"And {row['question']}"} for row in ROWS[:100]])
    questions = read_questions(f"{first}+{second}", "train")
    assert len({question.id for question in questions}) == len(questions) > 140
    assert {question.source for question in questions} == {first, second}


def test_duplicate_questions_are_removed(tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], ROWS[0] | {"golden_answers": ["Another"]}])
    assert len(read_all(path)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "q", "answers": ["A"]}\n{"question"', r"a\.jsonl:2: the line is not valid JSON"),
        ('{"question": " ", "answers": ["A"]}', "row 1: the row needs a question"),
        ('{"answers": ["A"]}', "row 1: the row needs a question"),
        ('{"question": "q", "answers": []}', "row 1: the row needs an answer"),
        ('{"question": "q"}', "row 1: the row needs an answer"),
        ('{"question": "q", "answers": [null]}', "row 1: the row needs an answer"),
        (
            '{"question": "q", "answer": {"spans": ["A"]}}',
            "row 1: the answer is an object with the keys 'spans', but none of value, text",
        ),
        ('{"question": "q", "answer": 1912.0}', "row 1: the answer 1912.0 is not a string"),
        ('{"question": "q", "answer": true}', "row 1: the answer True is not a string"),
        ('{"question": "q", "answer": NaN}', "row 1: the row needs an answer"),
        ('{"question": "q", "answer": "[\'A\', B]"}', "row 1: the answers .* not a list in JSON or Python"),
        ('{"question": "q", "answer": "[\'A\' \'B\']"}', "row 1: the answers .* an array printed by NumPy"),
        (
            '{"question": "q", "answers": "{\'text\': array([\'A\'], dtype=object)}"}',
            "row 1: the answers .* not an object in JSON or Python",
        ),
        (
            '{"frage": "q", "answer": "A"}',
            "row 1: the row needs a question .*has the columns 'frage', 'answer'",
        ),
        ('{"question": 1, "answer": "A"}', "row 1: the row needs a question"),
        ("[1]", r"a\.jsonl:1: the line must be a JSON object"),
        ("", "no rows"),
    ],
)
def test_invalid_file_raises(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_all(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hotpot", "no dataset or file 'hotpot' .*'hotpotqa'"),
        ("./a.jsonl", "no file"),
        ("x+nq", "file 'x'"),
        ("+nq", "file ''"),
    ],
)
def test_missing_dataset_raises(name, message):
    with pytest.raises(UserError, match=message):
        read_questions(name, "train")


# Configs and splits of RUC-NLPIR/FlashRAG_datasets according to its dataset card on the Hub.
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
    """A dataset of that layout in a local folder, which `datasets` loads like one on the Hub."""
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


def stored_splits(questions):
    """Return the splits of the fixture that the questions are from, which their last word names."""
    return {question.question.removesuffix("?").split()[-1] for question in questions}


def test_seven_datasets_of_flashrag_have_a_test_split(flashrag):
    assert tuple(FLASHRAG) == NAMES
    for name, splits in FLASHRAG.items():
        test = read_questions(name, "test")
        assert len(test) == 60 and {question.source for question in test} == {name}
        assert stored_splits(test) == ({"test"} if "test" in splits else {"dev"})
        assert test[7].answers == ("Name 7", "No. 7")
    with pytest.raises(UserError, match="popqa has no split 'train'; it has test"):
        read_questions("nq+popqa", "train")


def test_datasets_of_search_r1_join_and_split(flashrag):
    nq, hotpotqa = read_questions("nq", "train"), read_questions("hotpotqa", "train")
    both = read_questions("nq + hotpotqa", "train")
    assert both == nq + hotpotqa and len(nq) == 60 and 45 <= len(hotpotqa) < 60
    assert stored_splits(read_questions("nq", "dev")) == {"dev"}
    held_out = read_questions("hotpotqa", "dev")
    assert stored_splits(held_out) == {"train"} and len(held_out) + len(hotpotqa) == 60
    assert len(read_questions("+".join(FLASHRAG), "test")) == 7 * 60


def test_hub_name_with_config(flashrag):
    questions = read_questions(f"{flashrag}:popqa", "test")
    assert questions[0].source == f"{flashrag}:popqa" and len(questions) == 60
    assert [q.id for q in questions] == [q.id for q in read_questions("popqa", "test")]
    with pytest.raises(UserError, match="nor a dataset that can be loaded"):
        read_questions(f"{flashrag}:pop", "test")


def test_only_question_and_answer_columns_are_loaded(flashrag):
    """Rows of HotpotQA contain articles, which are a hundred times as long as its questions."""
    rows = read_hub(flashrag, "hotpotqa", "dev", columns=COLUMNS)
    assert rows == read_file(Path(flashrag, "hotpotqa/dev.jsonl"), COLUMNS) and len(rows) == 60
    assert set(rows[0]) == {"question", "golden_answers"}
    assert set(read_file(Path(flashrag, "hotpotqa/dev.jsonl"))[0]) > {"question", "golden_answers"}


def test_data_source_of_a_row_is_its_source(tmp_path):
    """PeterJinGo/nq_hotpotqa_train joins two datasets and names them in `data_source`."""
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
    questions = read_questions(str(tmp_path), "test")
    assert [question.source for question in questions] == ["nq"] * 40 + ["hotpotqa"] * 40
    assert len({question.id for question in questions}) == 80
    assert questions[41].answers == ("Name 1",)


def test_environment_with_a_dataset(tmp_path):
    world = World(0, 200)
    index = build_index(world.passages(), tmp_path / "index")
    rows = [world.question("train", i, (1,)) for i in range(80)]
    path = write(tmp_path / "a.jsonl", [{"question": q.text, "answers": list(q.answers)} for q in rows])
    environment = load_environment("search-v3", data=path, engine=str(index), topk=1)
    tasks = environment.tasks("train", 30)
    assert len(tasks) == 30 and environment.breakdown == ("kind",) and set(tasks["kind"]) == {path}
    assert tasks["task_id"] != environment.tasks("train", 30, seed=1)["task_id"]
    assert environment.script(tasks[0]) is None
    assert environment.score(tasks[0], environment.answer(tasks[0]))["f1"] == 1
    with pytest.raises(UserError, match="data requires passages"):
        load_environment("search-v3", data=path)
