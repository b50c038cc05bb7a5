"""`rlkit eval` of retrievers, from the layouts in which data is downloaded to tables of measures."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlkit.commands import main as cli
from rlkit.evaluation import Evaluation

QRELS = "q1 0 fox 2\nq1 0 hen 1\nq1 0 cow 0\nq2 0 cow 1\nq3 0 cow 0\n"
RUN = "q1 Q0 hen 1 9 tag\nq1 Q0 fox 2 8 tag\nq2 Q0 pig 1 9 tag\nq2 Q0 cow 2 9 tag\nq3 Q0 cow 1 1 tag\n"
DOCUMENTS = {"fox": "quick brown fox", "hen": "brown hen", "cow": "lazy cow", "pig": "pig"}
TEXTS = {"q1": "brown fox", "q2": "lazy cow", "q3": "pig"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def command(monkeypatch, capsys):
    """Return a function that runs `rlkit eval` and returns its exit code, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlkit", "eval", *map(str, arguments)])
        code = cli.main()
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


@pytest.fixture
def files(tmp_path):
    """Return a folder with TREC files: qrels.txt and the runs a.run and b.run."""
    (tmp_path / "qrels.txt").write_text(QRELS)
    (tmp_path / "a.run").write_text(RUN)
    (tmp_path / "b.run").write_text(RUN.replace("hen 1 9", "hen 1 7"))
    return tmp_path


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    rows = [json.dumps({"_id": name, "title": "", "text": text}) for name, text in DOCUMENTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    rows = [json.dumps({"_id": name, "text": text}) for name, text in TEXTS.items()]
    (folder / "queries.jsonl").write_text("\n".join(rows))
    lines = [line.split() for line in QRELS.splitlines()]
    qrels = "".join(f"{query}\t{document}\t{grade}\n" for query, _, document, grade in lines)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}q2\tgone\t1\n")
    return folder


def write_t2ranking(folder: Path) -> Path:
    folder.mkdir()
    (folder / "collection.tsv").write_text("pid\ttext\n0\t北京是中国的首都\n1\t上海是中国的城市\n2\t猫和狗\n")
    (folder / "queries.dev.tsv").write_text("qid\ttext\n7\t中国的首都是哪里\n9\t猫和狗\n")
    (folder / "qrels.dev.tsv").write_text("qid\t-\tpid\trel\n7\t0\t0\t3\n7\t0\t1\t1\n9\t0\t2\t2\n")
    (folder / "qrels.retrieval.dev.tsv").write_text("qid\tpid\n7\t0\n9\t2\n")
    return folder


def values(out: str) -> dict[str, float]:
    """Return the value of each measure from the lines of the result of one retriever."""
    rows = (line.split() for line in out.splitlines())
    return {row[0]: float(row[1]) for row in rows if len(row) > 1 and row[1].replace(".", "").isdigit()}


def test_beir_folder_to_measures(command, tmp_path):
    folder = write_beir(tmp_path / "beir")
    code, out, error = command(
        "--collection", folder, "--retriever", "bm25", "--measures", "nDCG@10", "R@100", "MRR@10"
    )
    assert code == 0 and "'gone'" in error and "(3 queries, test)" in out
    # q1 is perfect, q2 has one of its two relevant documents, and q3 has none.
    assert values(out)["recall@100"] == pytest.approx((1 + 0.5 + 0) / 3, abs=5e-4)
    assert values(out)["rr@10"] == pytest.approx(2 / 3, abs=5e-4)
    assert "1 of 3 queries have no relevant document and score 0, as with trec_eval -c" in out


def test_t2ranking_folder_to_measures(command, tmp_path):
    folder = write_t2ranking(tmp_path / "T2Ranking")
    arguments = (
        "--retriever",
        "bm25",
        "--evaluation_split",
        "dev",
        "--measures",
        "mrr@10",
        "recall@1000",
        "ndcg",
    )
    code, out, _ = command("--collection", folder, *arguments)
    assert code == 0 and set(values(out)) == {"rr@10", "recall@1000", "ndcg"}
    assert values(out)["rr@10"] == values(out)["ndcg"] == 1


def test_ir_datasets_id_to_measures(command, tmp_path, monkeypatch):
    ir_datasets = pytest.importorskip("ir_datasets", reason="needs ir-datasets")
    formats = ir_datasets.formats

    class LocalFile:
        """A local file with the interface of the downloads of ir-datasets."""

        def __init__(self, name, text):
            self._path = tmp_path / name
            self._path.write_text(text)

        def path(self, force=True):
            return str(self._path)

        def stream(self):
            return self._path.open("rb")

    dataset = ir_datasets.Dataset(
        formats.TsvDocs(
            LocalFile("docs", "".join(f"{name}\t{text}\n" for name, text in DOCUMENTS.items())), lang="en"
        ),
        formats.TsvQueries(
            LocalFile("queries", "".join(f"{name}\t{text}\n" for name, text in TEXTS.items())), lang="en"
        ),
        formats.TrecQrels(LocalFile("qrels", QRELS), {}),
    )
    monkeypatch.setitem(ir_datasets.registry._registered, "farm", dataset)
    measures = ("--measures", "AP(rel=2)", "MAP", "success@1")
    code, out, _ = command("--collection", "ir_datasets:farm", "--retriever", "bm25", *measures)
    assert code == 0 and "ap(rel=2): grades of 2 and more count as relevant" in out
    assert values(out)["ap"] == pytest.approx(2 / 3, abs=5e-4)
    assert values(out)["ap(rel=2)"] == pytest.approx(1 / 3, abs=5e-4)
    assert "2 of 3 queries have no relevant document for ap(rel=2)" in out


def test_qrels_and_run_to_measures_in_a_process_of_its_own(files):
    arguments = ("--qrels", files / "qrels.txt", "--retriever", f"run:{files / 'a.run'}", "--json")
    command = [sys.executable, "-m", "rlkit", "eval", *map(str, arguments), "--measures", "map", "mrr", "P@1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    # In q2, pig and cow have the same score: trec_eval sorts by id, descending.
    assert summary["rewards"] == pytest.approx({"ap": (1 + 0.5) / 3, "rr": 1.5 / 3, "precision@1": 1 / 3})
    assert summary["environment_args"] == {"qrels": str(files / "qrels.txt")}
    assert summary["counts"]["queries_without_relevant_document"] == 1


def test_run_may_be_a_bare_path_and_results_can_be_compared(command, files):
    qrels = ("--qrels", files / "qrels.txt")
    command(*qrels, "--retriever", files / "a.run", "-o", files / "a.json")
    command(
        *qrels, "--retriever", f"run:{files / 'b.run'}", "-o", files / "b.json", "--run_file", files / "c.run"
    )
    a = Evaluation.load(files / "a.json")
    assert a.model == f"run:{files / 'a.run'}" and a.completions[0]["prompt"] == a.completions[0]["task_id"]
    code, out, _ = command("--compare", files / "a.json", files / "b.json")
    assert code == 0 and " -> " in out and "on 3 tasks" in out
    code, out, _ = command("--compare", files / "a.json", files / "b.json", "--reward", "MRR@10", "--json")
    assert code == 0 and json.loads(out)["difference"] == 0
    sized = replace(
        a,
        breakdown={"size": {"1": a.accuracy, "2": a.accuracy}},
        completions=[record | {"size": 1 + (i > 0)} for i, record in enumerate(a.completions)],
    )
    sized.save(files / "sized.json")
    code, out, _ = command("--compare", files / "a.json", files / "sized.json")
    assert code == 0 and re.search(
        r"size = 1: .* on 1 tasks: difference \+0\.000, p = 1, corrected p = 1", out
    )
    code, out, _ = command("--compare", files / "a.json", files / "sized.json", "--json")
    assert code == 0 and {value: row["n"] for value, row in json.loads(out)["breakdown"]["size"].items()} == {
        "1": 1,
        "2": 2,
    }
    # The order within ties is kept in what is written.
    written = (files / "c.run").read_text()
    assert written.index("q2 Q0 pig 1 ") < written.index("q2 Q0 cow 2 ")


def test_several_retrievers_make_a_table_with_tests(command, files):
    folder = write_beir(files / "beir")
    retrievers = ("--retriever", "bm25", files / "a.run", files / "b.run")
    outputs = ("-o", files / "results", "--run_file", files / "runs")
    measures = ("--measures", "nDCG@10,P@1", "ndcg_cut.10")
    code, out, _ = command("--collection", folder, *retrievers, *outputs, *measures)
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["ndcg@10", "precision@1"]
    names = ["bm25", f"run:{files / 'a.run'}", f"run:{files / 'b.run'}"]
    assert [row.split()[0] for row in rows[:3]] == names
    assert rows[0].count("*") == 2 and "(3 queries, test; * is the highest mean)" in out
    assert "differences from bm25" in out and "Holm's method (tests: 4)" in out
    assert [path.name for path in sorted((files / "results").iterdir())] == ["a.json", "b.json", "bm25.json"]
    assert [path.name for path in sorted((files / "runs").iterdir())] == ["a.run", "b.run", "bm25.run"]
    # The same table comes from the saved results; the first one is the baseline.
    saved = [files / "results" / f"{name}.json" for name in ("bm25", "a", "b")]
    code, table, _ = command("--compare", *saved)
    assert code == 0 and table.splitlines()[:4] == out.splitlines()[:4]
    systems = json.loads(command("--compare", *saved, "--json")[1])
    summaries = json.loads(command("--collection", folder, *retrievers, *measures, "--json")[1])
    assert [summary["model"] for summary in summaries] == names
    assert [test for summary in summaries for test in summary["tests"]] == systems["tests"]
    # The results are one leaderboard.
    code, out, _ = command("--leaderboard", *saved, "--against", *saved)
    assert code == 0 and "Kendall's tau 1.000" in out


def test_one_retriever_may_be_saved_in_a_folder(command, files):
    arguments = ("--qrels", files / "qrels.txt", "--retriever", files / "a.run", "-o", f"{files}/new/")
    assert command(*arguments)[0] == 0
    assert Evaluation.load(files / "new" / "a.json").name == "a"


def test_bm25_is_the_retriever_even_if_a_file_or_folder_has_its_name(command, files, monkeypatch):
    monkeypatch.chdir(files)
    (files / "bm25").write_text("q1 Q0 fox 1 9 t\n")
    arguments = ("--collection", "generated:200:0", "--retriever", "bm25", "-n", "20")
    code, out, _ = command(*arguments)
    assert code == 0 and values(out)["ndcg@10"] > 0
    (files / "bm25").unlink()
    (files / "bm25").mkdir()
    assert command(*arguments)[:2] == (code, out)
    (files / "bm25").rmdir()


@pytest.mark.parametrize(
    "outputs",
    [
        ("--run_file", "a.run"),
        ("-o", "./a.run"),
        ("-o", "qrels.txt"),
        ("b.run", "--run_file", "."),
        ("-o", "same", "--run_file", "same"),
    ],
)
def test_outputs_never_replace_inputs_or_each_other(command, files, monkeypatch, outputs):
    monkeypatch.chdir(files)
    contents = {path: path.read_bytes() for path in files.iterdir()}
    code, _, error = command("--qrels", "qrels.txt", "--retriever", "a.run", *outputs)
    assert code == 2 and "is read or written already" in error
    assert {path: path.read_bytes() for path in files.iterdir()} == contents


def test_drop_query_id_is_an_option_and_is_reported(command, files):
    (files / "own.run").write_text("q1 Q0 q1 1 9 t\nq1 Q0 fox 2 8 t\nq2 Q0 q2 1 9 t\n")
    arguments = ("--qrels", files / "qrels.txt", "--retriever", files / "own.run", "--measures", "MRR")
    code, out, _ = command(*arguments)
    assert code == 0 and values(out)["rr"] == pytest.approx(0.5 / 3, abs=5e-4)
    assert "first document of 2 of 3 rankings has the id of its query" in out
    option = "--environment_args.drop_query_id"
    code, out, _ = command(*arguments, option, "true")
    assert values(out)["rr"] == pytest.approx(1 / 3, abs=5e-4)
    assert "2 documents with the id of their query were removed from the rankings" in out
    assert "id of" not in command(*arguments, option, "false")[1]
    summary = json.loads(command(*arguments, option, "true", "--json")[1])
    assert (
        summary["counts"]["removed_query_ids"] == 2 and summary["environment_args"]["drop_query_id"] is True
    )


def test_missing_split_names_one_that_exists(command, tmp_path):
    folder = tmp_path / "c"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": 1, "text": "fox"}\n')
    (folder / "queries.jsonl").write_text('{"_id": 1, "text": "fox"}\n')
    for split in ("train", "validation"):
        (folder / f"qrels/{split}.tsv").write_text("query-id\tcorpus-id\tscore\n1\t1\t1\n")
    code, _, error = command("--collection", folder, "--retriever", "bm25")
    assert code == 2 and "no split 'test'" in error and "set evaluation_split to dev, or set folds" in error


def test_large_grade_is_evaluated(command, files):
    (files / "large").write_text("q1 0 fox 2147483648\nq1 0 hen 1\n")
    arguments = (
        "--qrels",
        files / "large",
        "--retriever",
        files / "a.run",
        "--measures",
        "nDCG@10",
        "ap",
        "nDCG",
    )
    code, out, _ = command(*arguments)
    assert code == 0 and values(out) == {"ndcg@10": 0.631, "ap": 1, "ndcg": 0.631}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--qrels", "qrels.txt", "--collection", "x", "--retriever", "a.run"), "set one of them"),
        (("--qrels", "qrels.txt"), "--qrels requires --retriever"),
        (("--qrels", "qrels.txt", "--retriever", "bm25"), "must be run files, but there is no file 'bm25'"),
        (("--qrels", "nowhere", "--retriever", "a.run"), "no file nowhere"),
        (
            ("--qrels", "qrels.txt", "--retriever", "other.run"),
            "such as '001', and the judged ids are such as 'q",
        ),
        (("--qrels", "qrels.txt", "--retriever", "a.run", "run:a.run"), "run:a.run is given 2 times"),
        (("--qrels", "qrels.txt", "--retriever", "a.run", "--measures", "nDGC@10"), "mean 'ndcg@10'"),
        (("--qrels", "qrels.txt", "--retriever", "a.run", "b.run", "-o", "x.json"), "--out must be a folder"),
        (
            ("--qrels", "qrels.txt", "--retriever", "a.run", "b.run", "--run_file", "a.run"),
            "must be a folder",
        ),
        (("--qrels", "qrels.txt", "--retriever", "a.run", "--environment_args.fold", "1"), "requires folds"),
        (
            ("--qrels", "qrels.txt", "--retriever", "a.run", "--environment_args.drop_query_id", "maybe"),
            "drop_query_id must be true or false, not 'maybe'",
        ),
        (("--compare", "a.json"), "--compare requires at least 2 saved results, not 1"),
        (("--compare", "a.json", "b.json", "-o", "c.json"), "cannot be combined with out"),
        (("--compare", "a.json", "b.json", "--measures", "MAP"), "cannot be combined with measures"),
        (("--compare", "a.json", "b.json", "c.json"), "cannot read a.json"),
    ],
)
def test_command_rejects_bad_input_in_one_line(command, files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    (files / "other.run").write_text("001 Q0 fox 1 1 t\n")
    code, _, error = command(*arguments)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
