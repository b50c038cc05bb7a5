"""Rows in the layouts of public datasets, in every file type; the datasets themselves are not downloaded."""

import csv
import gzip
import json

import numpy
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.commands.check import main
from rlkit.envs.search.layouts import ANSWERS, COLUMNS, find_answers, find_question
from rlkit.envs.search.questions import read_questions
from rlkit.errors import UserError
from rlkit.retrieval.collections.corpus import read_corpus
from rlkit.retrieval.engines.index import build_index
from rlkit.retrieval.reading import read_file
from tests.envs.search.test_questions import read_all

SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first.\n"
    "For example, <answer> Beijing </answer>. Question: who wrote it?\n"
)
LAYOUTS = {
    "squad": (
        {"id": "5", "title": "T", "context": "c", "question": "who wrote it?"}
        | {"answers": {"text": ["Ann Lee", "Lee", "Ann Lee"], "answer_start": [5, 9, 5]}},
        ("Ann Lee", "Lee"),
    ),
    "triviaqa": (
        {"question": "who wrote it?", "question_id": "t", "search_results": {"title": ["x"]}}
        | {
            "answer": {
                "aliases": ["Ann B. Lee", "Lee"],
                "normalized_aliases": ["ann b lee", "lee"],
                "matched_wiki_entity_name": "",
                "normalized_matched_wiki_entity_name": "",
                "normalized_value": "ann lee",
                "type": "WikipediaEntity",
                "value": "Ann Lee",
            }
        },
        ("Ann Lee", "Ann B. Lee", "Lee", "ann lee", "ann b lee", "lee"),
    ),
    "triviaqa's own": (
        {"Question": "who wrote it?", "QuestionId": "t"}
        | {"Answer": {"Aliases": ["Lee"], "NormalizedAliases": ["lee"], "Type": "x", "Value": "Ann Lee"}},
        ("Ann Lee", "Lee", "lee"),
    ),
    "popqa": (
        {"id": 1, "subj": "It", "prop": "author", "obj": "Ann Lee", "question": "who wrote it?"}
        | {"s_aliases": '["that"]', "o_aliases": "[]", "possible_answers": '["Ann Lee", "A. Lee"]'},
        ("Ann Lee", "A. Lee"),
    ),
    "nq_open": ({"question": "who wrote it?", "answer": ["Ann Lee", "Lee"]}, ("Ann Lee", "Lee")),
    "nq": (
        {"id": "1", "question": {"text": "who wrote it?", "tokens": ["who", "wrote", "it"]}}
        | {
            "annotations": {
                "id": ["1", "2", "3"],
                "short_answers": [
                    {"text": ["Ann Lee"], "start_token": [3]},
                    {"text": [], "start_token": []},
                    {"text": ["Lee"], "start_token": [4]},
                ],
                "yes_no_answer": [-1, -1, -1],
            }
        },
        ("Ann Lee", "Lee"),
    ),
    "nq, yes or no": (
        {"question": {"text": "is it?"}}
        | {"annotations": {"short_answers": [{"text": []}, {"text": []}], "yes_no_answer": [1, -1]}},
        ("yes",),
    ),
    "nq, one object per annotator": (
        {"question": {"text": "is it?"}}
        | {"annotations": [{"short_answers": [{"text": "Lee"}]}, {"yes_no_answer": "NO"}]},
        ("Lee", "no"),
    ),
    "hotpotqa": (
        {"id": "5a", "question": "who wrote it?", "answer": "Ann Lee", "type": "bridge", "level": "hard"}
        | {"supporting_facts": {"title": ["A", "B"], "sent_id": [0, 1]}, "context": {"title": ["A"]}},
        ("Ann Lee",),
    ),
    "2wikimultihopqa": (
        {"_id": "2", "question": "who wrote it?", "answer": "Ann Lee", "evidences": [["It", "by", "Ann"]]},
        ("Ann Lee",),
    ),
    "musique": (
        {"id": "2hop", "paragraphs": [{"idx": 0, "title": "A"}], "question": "who wrote it?"}
        | {"question_decomposition": [{"id": 1, "answer": "no"}], "answer": "Ann Lee"}
        | {"answer_aliases": ["Lee", "A. Lee"], "answerable": True},
        ("Ann Lee", "Lee", "A. Lee"),
    ),
    "bamboogle": ({"Question": "who wrote it?", "Answer": "Ann Lee"}, ("Ann Lee",)),
    "flashrag": (
        {"id": "t0", "question": "who wrote it?", "golden_answers": ["Ann Lee"], "metadata": {"x": 1}},
        ("Ann Lee",),
    ),
    "search-r1": (
        {"id": "t0", "question": "who wrote it?", "golden_answers": ["Ann Lee", "Lee"], "data_source": "nq"}
        | {"prompt": [{"role": "user", "content": SEARCH_R1_PROMPT}], "ability": "fact-reasoning"}
        | {"reward_model": {"ground_truth": {"target": ["Ann Lee", "Lee"]}, "style": "rule"}},
        ("Ann Lee", "Lee"),
    ),
    "verl, search-r1's prompt": (
        {"data_source": "nq", "prompt": [{"role": "user", "content": SEARCH_R1_PROMPT}]}
        | {"reward_model": {"ground_truth": {"target": ["Ann Lee"]}}, "extra_info": {"index": 1}},
        ("Ann Lee",),
    ),
    "verl, question in extra_info": (
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "Use tools."}]}
        | {"reward_model": {"ground_truth": "Ann Lee"}, "extra_info": {"question": "who wrote it?"}},
        ("Ann Lee",),
    ),
    "verl, plain prompt": (
        {"prompt": [{"role": "user", "content": "who wrote it?"}, {"role": "assistant", "content": ""}]}
        | {"reward_model": {"ground_truth": {"target": "Ann Lee"}}},
        ("Ann Lee",),
    ),
    "prompt as a string": ({"prompt": "Question: who wrote it?", "ground_truth": "Ann Lee"}, ("Ann Lee",)),
    "several columns": (
        {"query": "who wrote it?", "answer": "Ann Lee", "Golden Answers": ["Lee"], "target": "A. Lee"},
        ("Ann Lee", "Lee", "A. Lee"),
    ),
    "integer": ({"problem": "when?", "target": 1912}, ("1912",)),
}  # fmt: skip
NAMES = list(LAYOUTS)


@pytest.mark.parametrize("name", NAMES)
def test_layout_gives_question_and_answers(name):
    row, answers = LAYOUTS[name]
    assert find_question(row, "row").strip() in ("who wrote it?", "is it?", "when?")
    assert tuple(find_answers(row, "row")) == answers


def write_csv(path, row, dialect="excel"):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, row, dialect=dialect)
        writer.writeheader()
        cells = {k: v if isinstance(v, str | int) else json.dumps(v) for k, v in row.items()}
        writer.writerow(cells)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_layout_is_read_from_every_file_type(tmp_path, name, suffix):
    row, answers = LAYOUTS[name]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif suffix in (".csv", ".tsv"):
        write_csv(path, row, "excel" if suffix == ".csv" else "excel-tab")
    else:
        content = (f"{json.dumps(row)}\r\n" if "jsonl" in suffix else json.dumps({"data": [row]})).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else b"\xef\xbb\xbf" + content)
    (question,) = read_all(str(path))
    assert question.question in ("who wrote it?", "is it?", "when?") and question.answers == answers
    assert question.source == row.get("data_source", str(path))


def test_rows_keep_only_the_columns_of_questions(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(LAYOUTS["musique"][0]))
    assert set(read_file(path, COLUMNS)[0]) == {"question", "answer", "answer_aliases", "answerable"}


def test_nested_file_of_squad_2_is_read(tmp_path, caplog):
    path = tmp_path / "dev-v2.0.json"
    questions = [
        {"id": "1", "question": "who wrote it?", "is_impossible": False}
        | {"answers": [{"text": "Ann Lee", "answer_start": 3}, {"text": "Lee", "answer_start": 7}]},
        {"id": "2", "question": "why?", "is_impossible": True, "answers": []}
        | {"plausible_answers": [{"text": "wrong", "answer_start": 1}]},
    ]
    article = {"title": "T", "paragraphs": [{"context": "c", "qas": questions}, {"context": "d", "qas": []}]}
    path.write_text(json.dumps({"version": "v2.0", "data": [article]}))
    (question,) = read_all(str(path))
    assert (question.question, question.answers) == ("who wrote it?", ("Ann Lee", "Lee"))
    assert "skipped 1 of 2 rows" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answers": {"text": [], "answer_start": []}},  # SQuAD 2
        {
            "question": "q",
            "answer": {"value": "<unk>", "aliases": [], "normalized_aliases": []},
        },  # TriviaQA's test
        {"question": {"text": "q"}, "annotations": {"short_answers": [{"text": []}], "yes_no_answer": [-1]}},
        {"question": "q", "answer": "a", "answerable": False},
        {"question": "q", "answer": "a", "answerable": "False"},
        {"question": "q", "answer": "a", "is_impossible": True},
    ],
)
def test_unanswerable_row_has_no_answers(row):
    assert find_answers(row, "row") == []


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['Al', \"O'Neil\"]", ["Al", "O'Neil"]),  # Python, e.g. DPR's files
        ('["Al", "Beta"]', ["Al", "Beta"]),
        ("Al|Beta", ["Al|Beta"]),
        ("[1912]", ["[1912]"]),
        ("{1, 2}", ["{1, 2}"]),
    ],
)
def test_list_in_a_string_is_parsed(cell, answers):
    assert find_answers({"question": "q", "answers": cell}, "row") == answers


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": {"number": "3", "spans": []}}, "an object with the keys 'number', 'spans', but none of"),
        ({"answer": [["a"], {"x": 1}]}, "an object with the keys 'x'"),
        ({"answer": 1912.5}, "the answer 1912.5 is not a string: write it as a string, in quotes"),
        ({"answers": {"text": [True]}}, "the answer True is not a string"),
        ({"answer": "['Al' 'Beta']"}, "an array printed by NumPy"),
        ({"answer": "array(['Al', 'Beta'], dtype=object)"}, "not a list in JSON or Python"),
        ({"answer": "['Al', 'Be"}, "not a list in JSON or Python"),
        ({"answer": "['Al'] + x"}, "not a list in JSON or Python"),
        ({"answer": [[[[[[["a"]]]]]]]}, "nested too deeply"),
        ({"reward_model": {"style": "rule"}}, "the row needs an answer in one of the columns answer"),
        ({"possible_answers": "[]", "o_aliases": "[]"}, "the row needs an answer"),
    ],
)  # fmt: skip
def test_invalid_answers_raise(row, message):
    with pytest.raises(UserError, match=message) as error:
        find_answers(row, "a.jsonl, row 1")
    assert str(error.value).startswith("a.jsonl, row 1: ") and "\n" not in str(error.value)
    if isinstance(row.get("answer"), dict):
        assert "quotes" not in str(error.value)


def test_missing_value_of_pandas_is_no_answer():
    assert find_answers({"answer": "Al", "answer_aliases": float("nan")}, "row") == ["Al"]
    with pytest.raises(UserError, match="the row needs an answer"):
        find_answers({"answer": float("nan")}, "row")


def test_list_in_a_string_of_an_object_is_parsed():
    row = {"question": "q", "reward_model": {"ground_truth": {"target": '["Al", "Beta"]'}}}
    assert find_answers(row, "row") == ["Al", "Beta"]


@pytest.mark.parametrize(
    "prompt",
    [
        # As in a CSV file that pandas has written.
        "[{'content': 'Be brief.', 'role': 'system'}\n {'content': 'Question: who?', 'role': 'user'}]",
        '[{"role": "user", "content": "Question: wh',
    ],
)
def test_chat_that_cannot_be_parsed_is_no_question(prompt):
    with pytest.raises(UserError, match="not a list of messages in JSON or Python") as error:
        find_question({"prompt": prompt}, "row")
    assert "\n" not in str(error.value)


def test_error_names_all_columns_of_the_row(tmp_path):
    (tmp_path / "a.csv").write_text("frage,antwort,answer\nwer?,x,y\n")
    with pytest.raises(UserError, match=r"a\.csv, row 1: .*it has the columns 'frage', 'antwort', 'answer'$"):
        read_questions(str(tmp_path / "a.csv"), "train")


def test_answer_with_bars_is_one_answer_with_one_warning(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n" + "".join(f"q{i},Al|Beta\n" for i in range(50)))
    assert {question.answers for question in read_questions(str(path), "train")} == {("Al|Beta",)}
    assert caplog.text.count("row 1: 'Al|Beta' is one answer") == 1 and caplog.text.count("Al|Beta") == 1


def test_parquet_file_of_pandas_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {
            "Question": pandas.Categorical(["who?", "when?"]),
            "reward_model": [{"ground_truth": {"target": numpy.array(["Ann", "Lee"])}}, None],
            "answer": pandas.array([None, 1912], dtype="Int64"),
        },
        index=[7, 3],
    )
    table.to_parquet(tmp_path / "a.parquet")
    questions = {question.question: question.answers for question in read_all(str(tmp_path / "a.parquet"))}
    assert questions == {"who?": ("Ann", "Lee"), "when?": ("1912",)}


def rows(first, last):
    return [{"question": f"who was {i}?", "answer": f"Name {i}"} for i in range(first, last)]


@pytest.mark.parametrize("folder", ["", "data"])
def test_folder_of_a_checkout_from_the_hub(tmp_path, folder):
    parent = tmp_path / folder
    parent.mkdir(exist_ok=True)
    for i in range(2):
        table = pyarrow.Table.from_pylist(rows(10 * i, 10 * i + 10))
        pyarrow.parquet.write_table(table, parent / f"train-0000{i}-of-00002.parquet")
    (parent / "validation.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, rows(20, 25))).encode())
    )
    (tmp_path / "README.md").write_text("card")
    (parent / "dataset_infos.json").write_text("{}")
    test = read_questions(str(tmp_path), "test")
    assert sorted(question.question for question in test) == [f"who was {i}?" for i in range(20, 25)]
    train, dev = read_questions(str(tmp_path), "train"), read_all(str(tmp_path))
    assert len(train) >= 12 and len(dev) == 25 and {q.source for q in dev} == {str(tmp_path)}
    (parent / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="has 1 of 2 files of the split 'train'"):
        read_questions(str(tmp_path), "train")


@pytest.mark.parametrize(
    ("names", "split", "number"),
    [
        (["train_0.jsonl", "train_1.jsonl"], "train", 20),
        (["hotpot_train_v1.1.jsonl", "hotpot_dev_distractor_v1.jsonl"], "test", 10),
        (["musique_ans_v1.0_train.jsonl", "musique_ans_v1.0_dev.jsonl"], "test", 10),
        (["NQ-open.train.jsonl", "NQ-open.val.jsonl"], "test", 10),
        (["train-v2.0.jsonl", "dev-v2.0.jsonl"], "test", 10),
    ],
)
def test_split_is_read_from_the_file_name(tmp_path, names, split, number):
    for i, name in enumerate(names):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows(10 * i, 10 * i + 10))))
    assert len(read_questions(str(tmp_path), split)) in range(int(number * 0.6), number + 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "train.csv"], r"of the split 'train', such as train\.csv and train\.jsonl"),
        (["train-v1.1.json", "train-v2.0.json"], r"such as train-v1\.1\.json and train-v2\.0\.json"),
        (["dev_distractor.jsonl", "dev_fullwiki.jsonl"], "several files of the split 'dev'"),
        (["train-00000-of-00001.jsonl", "train.jsonl"], "several files of the split 'train'"),
        (["questions.jsonl"], "no split 'train'; it has none"),
    ],
)  # fmt: skip
def test_ambiguous_folder_raises(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text(json.dumps(rows(0, 1)[0]))
    with pytest.raises(UserError, match=message):
        read_questions(str(tmp_path), "train")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "notes").mkdir()
    for i in range(60):
        (folder / "notes" / f"{i}.md").write_text(f"# Book {i}\nIt was written by Name {i}.")
    return str(build_index(read_corpus(str(folder / "notes")), folder / "index"))


def check(capsys, data, index, *options):
    code = main(
        ["search-v3", "--environment_args.data", str(data), "--environment_args.engine", index, *options]
    )
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_check_passes_on_own_questions_of_every_layout(tmp_path, capsys, index, name):
    row, _ = LAYOUTS[name]
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    # In a folder with files of all splits, none is held out of the single row.
    other = {"question": "what else?", "answer": "nothing"}
    for split in ("dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(other | {"question": f"what else in {split}?"}))
    code, out = check(capsys, tmp_path, index)
    assert code == 0 and "FAIL" not in out
    assert (
        "skip  the reference script earns the maximum reward: does not apply because no task has a script"
        in out
    )


@pytest.mark.parametrize("number", [4, 10, 60])
def test_check_passes_on_a_file_of_own_questions(tmp_path, capsys, index, number):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(0, number))))
    code, out = check(capsys, path, index)
    assert code == 0 and "FAIL" not in out
    assert ("skip  the most frequent answer" in out) == (number == 4)


def test_check_fails_on_questions_with_a_frequent_answer(tmp_path, capsys, index):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row | {"answer": "yes"}) for row in rows(0, 60)))
    code, out = check(capsys, path, index)
    assert code == 1 and "FAIL  the most frequent answer is rarely correct" in out


TEXT = st.text(max_size=6)
CELL = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-5, 5), st.floats(), TEXT, st.sampled_from(["['a' 'b']", "{'"])
    ),
    lambda cells: st.one_of(
        st.lists(cells, max_size=3),
        st.dictionaries(
            st.sampled_from(["text", "value", "target", "ground_truth", "role", "content", "x"]), cells
        ),
    ),
    max_leaves=5,
)
COLUMN = st.sampled_from(
    [
        "question",
        "Query",
        "prompt",
        "extra_info",
        *ANSWERS,
        "annotations",
        "reward_model",
        "answerable",
        "data_source",
    ]
)


def strings(cell):
    """Return the strings in a nested cell, and the integers as strings."""
    if isinstance(cell, dict):
        return strings(list(cell.values()))
    if isinstance(cell, list):
        return [string for item in cell for string in strings(item)]
    return [str(cell)] if isinstance(cell, str | int) and not isinstance(cell, bool) else []


@given(st.dictionaries(COLUMN, CELL))
def test_any_row_gives_its_own_answers_or_a_user_error_of_one_line(row):
    try:
        question, answers = find_question(row, "row"), find_answers(row, "row")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("row: ")
        return
    assert question.strip() and len(set(answers)) == len(answers)
    cells = [row.get(name) for name in (*ANSWERS, "reward_model", "annotations")]
    assert {*answers} <= {*strings(cells), "yes", "no"}


@given(
    main=TEXT,
    aliases=st.lists(TEXT),
    layout=st.sampled_from(["musique", "triviaqa", "squad", "verl", "popqa"]),
)
def test_aliases_of_a_layout_are_accepted_after_the_main_answer(main, aliases, layout):
    row = {
        "musique": {"answer": [main], "answer_aliases": aliases},
        "triviaqa": {"answer": {"value": main, "aliases": aliases}},
        "squad": {"answers": {"text": [main, *aliases], "answer_start": [0]}},
        "verl": {"reward_model": {"ground_truth": {"target": [main, *aliases]}}},
        "popqa": {"obj": [main], "possible_answers": json.dumps([main, *aliases])},
    }[layout]
    assert find_answers({"question": "q"} | row, "row") == list(dict.fromkeys([main, *aliases]))
