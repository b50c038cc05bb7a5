"""Collections of ir-datasets: its own classes on local files; the download of its sets is not tested."""

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

ir_datasets = pytest.importorskip("ir_datasets", reason="needs ir-datasets")


class File:
    """What ir-datasets calls a cached download, on a local file."""

    def __init__(self, path):
        self._path = path

    def path(self, force=True):
        return str(self._path)

    def stream(self):
        return self._path.open("rb")


@pytest.fixture
def registered(tmp_path, monkeypatch):
    files = {
        "docs": "1\tfirst text\n2\tsecond\n",
        "queries": "q1\tone\nq2\ttwo\n",
        "train": "q1 0 1 3\n",
        "test": "q2 0 2 1\nq2 0 1 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    formats = ir_datasets.formats
    docs = formats.TsvDocs(File(tmp_path / "docs"), lang="en", namespace="small")
    queries = formats.TsvQueries(File(tmp_path / "queries"), lang="en")
    made = {"small": ir_datasets.Dataset(docs)}
    for split in ("train", "test"):
        qrels = formats.TrecQrels(File(tmp_path / split), {0: "no", 1: "yes", 3: "very"})
        made[f"small/{split}"] = ir_datasets.Dataset(docs, queries, qrels)
    monkeypatch.setattr(ir_datasets, "load", made.__getitem__)


def test_a_set_with_its_splits_or_one_of_them(registered):
    found = load_collection("ir_datasets:small")
    assert found.judged("train") == {"q1": {"1": 3}} and found.judged("test") == {"q2": {"2": 1, "1": 0}}
    assert list(found.documents()) == [Document("1", "", "first text"), Document("2", "", "second")]
    assert found.queries == {"q1": "one", "q2": "two"}
    assert set(load_collection("ir_datasets:small/train").qrels) == {"test"}


def test_what_is_none(registered):
    with pytest.raises(UserError, match="no set 'smal'"):
        load_collection("ir_datasets:smal")


def test_the_names_of_the_package_are_known_to_it():
    """As registered there: TREC DL 2023 with judgments, BEIR's SciFact by its splits."""
    assert ir_datasets.load("msmarco-passage-v2/trec-dl-2023").has_qrels()
    assert (
        not ir_datasets.load("beir/scifact").has_qrels() and ir_datasets.load("beir/scifact/test").has_qrels()
    )
