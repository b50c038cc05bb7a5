"""Collections of ir-datasets, with its own classes on local files; downloads are not tested."""

import re

import pytest

from rlkit.errors import UserError
from rlkit.retrieval.collections.irds import KINDS, SPLITS, find_min_grades, official_measures
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
def register(tmp_path, monkeypatch):
    """Return a function that adds a dataset with the given qrels to the registry of ir-datasets."""
    (tmp_path / "docs").write_text("1\tfirst text\n2\tsecond\n")
    (tmp_path / "queries").write_text("q1\tone\nq2\ttwo\n")
    formats = ir_datasets.formats
    docs = formats.TsvDocs(LocalFile(tmp_path / "docs"), lang="en", namespace="small")

    def register(name, qrels, *constituents):
        parts = [docs, *constituents]
        if qrels is not None:
            path = tmp_path / name.replace("/", "-")
            path.write_text(qrels)
            parts += [
                formats.TsvQueries(LocalFile(tmp_path / "queries"), lang="en"),
                formats.TrecQrels(LocalFile(path), {}),
            ]
        dataset = ir_datasets.Dataset(*parts)
        monkeypatch.setitem(ir_datasets.registry._registered, name, dataset)

    return register


@pytest.fixture
def small_dataset(register):
    register("small", None)
    register("small/train", "q1 0 1 3\n")
    register("small/validation", "q1 0 2 1\n")
    register("small/test", "q2 0 2 1\nq2 0 1 0\n")


def test_load_irds_reads_all_splits_or_one(small_dataset):
    collection = load_collection("ir_datasets:small")
    assert collection.judged("train") == {"q1": {"1": 3}}
    assert collection.judged("dev") == {"q1": {"2": 1}}
    assert collection.judged("test") == {"q2": {"2": 1, "1": 0}}
    assert list(collection.documents()) == [Document("1", "", "first text"), Document("2", "", "second")]
    assert collection.queries == {"q1": "one", "q2": "two"}
    # A split that is named alone is the test split.
    assert set(load_collection("ir_datasets:small/train").qrels) == {"test"}


def test_load_irds_prefers_splits_to_their_union(small_dataset, register):
    register("small", "q1 0 1 3\nq2 0 2 1\n")  # as mr-tydi/ar has
    assert set(load_collection("ir_datasets:small").qrels) == {"train", "dev", "test"}


def test_load_irds_rejects_unknown_dataset(small_dataset, register):
    with pytest.raises(UserError, match=r"no dataset 'smal' \(did you mean 'small'"):
        load_collection("ir_datasets:smal")
    register("small/lists", None)
    register("small/lists/one", "q1 0 1 3\n")
    with pytest.raises(UserError, match=r"'small/lists' .*name one of its subsets: small/lists/one$"):
        load_collection("ir_datasets:small/lists")


def test_load_irds_reports_missing_documents_and_conflicting_grades(register):
    register("gaps", "q1 0 1 2\nq1 0 gone 1\nq1 0 1 0\nq9 0 1 1\nq1 0 1 2\n")
    collection = load_collection("ir_datasets:gaps")
    assert collection.qrels == {"test": {"q1": {"1": 2, "gone": 1}}}
    repeats, queries, documents, levels = collection.notes
    assert "1 documents are judged several times" in repeats and "the highest grade" in repeats
    assert "1 of 2 judged queries have no text, for example 'q9'" in queries
    assert "1 of 2 judged documents are not in the corpus, for example 'gone'" in documents
    assert "names no official measure" in levels
    register("mismatch", "q1 0 d1 1\n")
    with pytest.raises(UserError, match=r"none of the 1 judged documents is in the corpus: .*'d1'.*'1'"):
        load_collection("ir_datasets:mismatch")


def test_source_of_local_irds_changes_with_the_documents(small_dataset, tmp_path):
    source = load_collection("ir_datasets:small").source
    assert load_collection("ir_datasets:small").source == source
    path = tmp_path / "docs"
    path.write_text(path.read_text() + "99\tanother\n")
    assert load_collection("ir_datasets:small").source != source


def test_load_irds_reports_failed_download(register):
    class Offline(LocalFile):
        def stream(self):
            raise ConnectionError("no route to host")

    queries = ir_datasets.formats.TsvQueries(Offline("none"), lang="en")
    register("offline", "q1 0 1 1\n", queries)
    with pytest.raises(UserError, match="ir-datasets cannot load 'offline': no route to host"):
        load_collection("ir_datasets:offline")


@pytest.mark.parametrize(
    ("name", "drops"),
    [("beir/arguana", True), ("beir/quora/test", True), ("nano-beir/quora", True), ("beir/nq", False)],
)
def test_load_irds_drops_document_with_id_of_its_query_in_two_datasets(register, name, drops):
    register(name, "q1 0 1 1\n")
    assert load_collection(f"ir_datasets:{name}").drop_query_id is drops


def test_load_irds_excludes_documents_of_bright(register):
    register("bright/pony", "q1 0 1 1\nq1 0 2 -100\n")
    collection = load_collection("ir_datasets:bright/pony")
    assert collection.qrels["test"] == {"q1": {"1": 1}} and collection.excluded == {"q1": {"2"}}


ALL = ("rr", "ap", "recall", "precision", "hit")
MIN_GRADES = {
    "msmarco-passage/trec-dl-2019": dict.fromkeys(ALL, 2),
    "msmarco-passage/trec-dl-2020/judged": dict.fromkeys(ALL, 2),
    "msmarco-passage/trec-dl-hard/fold1": dict.fromkeys(ALL, 2),
    "msmarco-document/trec-dl-2019": {},
    "msmarco-document/trec-dl-2020/judged": {},
    "msmarco-document-v2/trec-dl-2021": {"rr": 2},
    "msmarco-passage-v2/trec-dl-2021/judged": {"rr": 2, "precision": 2},
    "msmarco-passage-v2/trec-dl-2023": {},  # without official measures
    "msmarco-passage/dev/small": {},
}


@pytest.mark.parametrize(("name", "expected"), MIN_GRADES.items())
def test_load_irds_takes_min_grades_from_documentation(register, name, expected):
    dataset, _, subset = name.partition("/")
    documentation = ir_datasets.datasets.base.YamlDocumentation(f"docs/{dataset}.yaml")(subset)
    register(name, "q1 0 1 3\nq1 0 2 1\n", documentation)
    collection = load_collection(f"ir_datasets:{name}")
    assert collection.min_grades == expected
    assert any("minimum relevant grades" in note for note in collection.notes) == bool(expected)


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        (["P(rel=2)@10", "P@5"], {}),  # the lower one of two levels of the same kind
        (["MRR(rel=3)@10", "nDCG(dcg='exp-log2')@10"], dict.fromkeys(ALL, 3)),
        (["MAP", "Success(rel=2)@1"], {"hit": 2}),
        (["P(judged_only=True,rel=2)@5", "R(rel = 2)@1000"], dict.fromkeys(ALL, 2)),
        (["ERR@20", "alpha_nDCG(rel=2)@20"], {}),
        (["Bpref(rel=2)", "Judged@10"], {}),
    ],
)
def test_find_min_grades_reads_levels_by_kind(measures, expected):
    assert find_min_grades(measures, 4)[0] == expected


def test_official_measures_of_all_datasets_are_understood():
    """Every measure of the registry is nDCG or has a kind, and a dataset's splits have the same levels."""
    min_grades = {}
    for name in ir_datasets.registry:
        dataset = ir_datasets.load(name)
        if dataset.has_qrels():
            measures = official_measures(dataset)
            for measure in measures:
                assert measure.startswith("nDCG") or re.match(r"\w+", measure)[0].lower() in KINDS, (
                    name,
                    measure,
                )
            min_grades[name] = find_min_grades(measures, 1)[0]
    assert len(min_grades) > 500
    # Names were once the source of the levels; these differ from what they suggest.
    differing = {name for name, grades in min_grades.items() if ("trec-dl" in name) != bool(grades)}
    assert {"msmarco-document/trec-dl-2019", "msmarco-document/trec-dl-2020"} <= differing
    for name in min_grades:
        splits = [min_grades[f"{name}/{split}"] for split in SPLITS if f"{name}/{split}" in min_grades]
        assert all(grades == splits[0] for grades in splits)


def test_ir_datasets_registry_has_expected_structure():
    """TREC DL 2023 has judgments itself, while BEIR's SciFact has them in its splits."""
    assert ir_datasets.load("msmarco-passage-v2/trec-dl-2023").has_qrels()
    assert not ir_datasets.load("beir/scifact").has_qrels()
    assert ir_datasets.load("beir/scifact/test").has_qrels()
    assert ir_datasets.load("wikir/en1k/training").has_qrels()
    assert ir_datasets.load("mr-tydi/ar").has_qrels() and ir_datasets.load("mr-tydi/ar/test").has_qrels()
