"""Collections of ir-datasets, with its own classes on local files; downloads are not tested."""

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document

ir_datasets = pytest.importorskip("ir_datasets", reason="needs ir-datasets")


class LocalFile:
    """Stand-in for the cached downloads of ir-datasets, on a local file."""

    def __init__(self, path):
        self._path = path

    def path(self, force=True):
        return str(self._path)

    def stream(self):
        return self._path.open("rb")


@pytest.fixture
def small_dataset(tmp_path, monkeypatch):
    files = {
        "docs": "1\tfirst text\n2\tsecond\n",
        "queries": "q1\tone\nq2\ttwo\n",
        "train": "q1 0 1 3\n",
        "test": "q2 0 2 1\nq2 0 1 0\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    formats = ir_datasets.formats
    docs = formats.TsvDocs(LocalFile(tmp_path / "docs"), lang="en", namespace="small")
    queries = formats.TsvQueries(LocalFile(tmp_path / "queries"), lang="en")
    datasets = {"small": ir_datasets.Dataset(docs)}
    for split in ("train", "test"):
        qrels = formats.TrecQrels(LocalFile(tmp_path / split), {0: "no", 1: "yes", 3: "very"})
        datasets[f"small/{split}"] = ir_datasets.Dataset(docs, queries, qrels)
    monkeypatch.setattr(ir_datasets, "load", datasets.__getitem__)


def test_load_irds_reads_all_splits_or_one(small_dataset):
    collection = load_collection("ir_datasets:small")
    assert collection.judged("train") == {"q1": {"1": 3}}
    assert collection.judged("test") == {"q2": {"2": 1, "1": 0}}
    assert list(collection.documents()) == [Document("1", "", "first text"), Document("2", "", "second")]
    assert collection.queries == {"q1": "one", "q2": "two"}
    # A split that is named alone is the test split.
    assert set(load_collection("ir_datasets:small/train").qrels) == {"test"}


def test_load_irds_rejects_unknown_dataset(small_dataset):
    with pytest.raises(UserError, match="no dataset 'smal'"):
        load_collection("ir_datasets:smal")


def test_ir_datasets_registry_has_expected_structure():
    """TREC DL 2023 has judgments itself, while BEIR's SciFact has them in its splits."""
    assert ir_datasets.load("msmarco-passage-v2/trec-dl-2023").has_qrels()
    assert not ir_datasets.load("beir/scifact").has_qrels()
    assert ir_datasets.load("beir/scifact/test").has_qrels()
