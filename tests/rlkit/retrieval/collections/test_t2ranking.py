"""Folders in T2Ranking's layout, whose two files of judgments are for different measures."""

import gzip
from math import log2

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document
from rlkit.retrieval.evaluate import score_rankings

FILES = {
    "collection.tsv": 'pid\ttext\n0\t一个 "段落\n1\tb\n3\tc\n',
    "queries.train.tsv": "qid\ttext\n8\t问题\n",
    "queries.dev.tsv": "qid\ttext\n7\tq\n9\tr\n",
    "queries.test.tsv": "qid\ttext\n100\thidden\n",
    "qrels.train.tsv": "qid\t-\tpid\trel\n8\t0\t0\t3\n8\t0\t1\t0\n",
    "qrels.dev.tsv": "qid\t-\tpid\trel\n7\t0\t1\t3\n7\t0\t3\t1\n9\t0\t3\t1\n",
    "qrels.retrieval.train.tsv": "qid\tpid\n8\t0\n",
    "qrels.retrieval.dev.tsv": "qid\tpid\n7\t1\n",
    "train.bm25.tsv": "qid\tpid\tindex\n8\t1\t1\n",
}


def write_t2ranking(folder, **changes):
    """Write a small collection and return its folder; None omits a file."""
    folder.mkdir(parents=True)
    for name, text in (FILES | changes).items():
        if text is not None:
            (folder / name).write_text(text)
    return str(folder)


@pytest.mark.parametrize("subfolder", ["", "data"])
def test_load_t2ranking_reads_both_files_of_judgments(tmp_path, subfolder):
    write_t2ranking(tmp_path / "T2Ranking" / subfolder)
    collection = load_collection(str(tmp_path / "T2Ranking"))
    assert collection.name == "T2Ranking" and set(collection.qrels) == {"train", "dev"}
    assert next(collection.documents()) == Document("0", "", '一个 "段落')
    assert collection.queries["8"] == "问题"
    assert collection.judged("train") == {"8": {"0": 3, "1": 0}}
    assert collection.judged("dev") == {"7": {"1": 3, "3": 1}, "9": {"3": 1}}
    # Passages of grade 1 are not relevant in the measures other than nDCG.
    assert collection.binary["dev"] == {"7": {"1": 1, "3": 0}, "9": {"3": 0}}
    assert collection.binary["train"] == {"8": {"0": 1, "1": 0}}
    [note] = collection.notes
    assert "1 of 2 queries of qrels.dev.tsv have no relevant passage" in note and "'9'" in note


def test_passage_of_grade_1_counts_in_ndcg_only(tmp_path):
    collection = load_collection(write_t2ranking(tmp_path / "t2"))
    scores = score_rankings(collection, "dev", {"7": ["3", "1"], "9": ["3"]}, ["rr@10", "ndcg@10"])
    assert scores["7"]["rr@10"] == 0.5
    assert scores["7"]["ndcg@10"] == pytest.approx((1 + 3 / log2(3)) / (3 + 1 / log2(3)))
    assert scores["9"] == {"rr@10": 0.0, "ndcg@10": 1.0}


def test_load_t2ranking_derives_binary_judgments_from_grades(tmp_path):
    changes = {name: None for name in FILES if name.startswith("qrels.retrieval")}
    collection = load_collection(write_t2ranking(tmp_path / "t2", **changes))
    assert collection.binary["dev"] == {"7": {"1": 1, "3": 0}, "9": {"3": 0}}
    assert any(
        "dev has no qrels.retrieval.dev.tsv" in note and "grades of 2" in note for note in collection.notes
    )


def test_load_t2ranking_uses_binary_judgments_without_grades(tmp_path):
    changes = {"qrels.dev.tsv": None}
    collection = load_collection(write_t2ranking(tmp_path / "t2", **changes))
    assert collection.judged("dev") == collection.binary["dev"] == {"7": {"1": 1}}
    assert any("nDCG uses the judgments of qrels.retrieval.dev.tsv" in note for note in collection.notes)


def test_load_t2ranking_reports_queries_and_documents_that_are_missing(tmp_path):
    changes = {
        "queries.train.tsv": "qid\ttext\n5\tx\n",
        "qrels.retrieval.dev.tsv": "qid\tpid\n7\t1\n7\t44\n9\t3\n100\t1\n",
    }
    collection = load_collection(write_t2ranking(tmp_path / "t2", **changes))
    assert set(collection.qrels) == set(collection.binary) == {"dev"}
    assert collection.binary["dev"]["7"] == {"1": 1, "3": 0, "44": 1}
    assert collection.judged("dev")["100"] == {"1": 1}
    notes = "\n".join(collection.notes)
    assert "'100': their nDCG uses binary judgments" in notes
    assert "1 of 4 judged queries have no text, for example '8'" in notes


def test_load_t2ranking_reads_msmarco_files_without_headers(tmp_path):
    files = {
        "collection.tsv": "0\tfirst\n1\tsecond\n",
        "queries.dev.small.tsv": "5\ta\n",
        "queries.dev.tsv": "5\ta\n6\tb\n",
        "qrels.dev.tsv": "5\t0\t1\t1\n6\t0\t0\t1\n",
        "qrels.dev.small.tsv": "5\t0\t1\t1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    collection = load_collection(str(tmp_path))
    assert [document.id for document in collection.documents()] == ["0", "1"]
    assert collection.qrels == {
        "dev": {"5": {"1": 1}, "6": {"0": 1}},
        "dev.small": {"5": {"1": 1}},
    }
    assert collection.binary == collection.qrels and collection.notes == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("collection.tsv", "pid\ttext\n0\n", r"collection\.tsv:2: 1 fields, expected 2; is it truncated"),
        ("collection.tsv", "pid\ttext\n1\ta\n1\ta\n", r"collection\.tsv:3: the id '1' is a duplicate"),
        ("collection.tsv", "pid\ttext\n", r"collection\.tsv has no documents"),
        ("collection.tsv", "pid\ttext\nx\ta\n", r"none of the 3 judged documents is in the corpus"),
        ("queries.dev.tsv", "qid\ttext\n8\tother\n", r"queries\.train\.tsv:2: the id '8' is a duplicate"),
        ("qrels.dev.tsv", "qid\t-\tpid\trel\n7\t0\t1\n", r"qrels\.dev\.tsv:2: 3 fields, expected 4"),
    ],
)
def test_load_t2ranking_names_file_and_line_of_error(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        load_collection(write_t2ranking(tmp_path / "t2", **{name: text}))


def test_load_t2ranking_rejects_folder_without_qrels(tmp_path):
    changes = {name: None for name in FILES if name.startswith("qrels")}
    with pytest.raises(UserError, match=r"has no queries\.SPLIT\.tsv with a qrels\.SPLIT\.tsv"):
        load_collection(write_t2ranking(tmp_path / "t2", **changes))


def test_source_of_t2ranking_changes_with_the_documents(tmp_path):
    folder = write_t2ranking(tmp_path / "t2")
    source = load_collection(folder).source
    table = tmp_path / "t2/collection.tsv"
    table.write_text(table.read_text() + "99\tanother\n")
    assert load_collection(folder).source != source
    (tmp_path / "t2/collection.tsv.gz").write_bytes(gzip.compress(table.read_bytes()))
    table.unlink()
    assert len(list(load_collection(folder).documents())) == 4
