"""BRIGHT and CRUMB from local folders in the layout of their Hub datasets, without network access."""

import pytest
import yaml
from datasets import Dataset

from rlkit.errors import UserError
from rlkit.registry import load_environment
from rlkit.retrieval.collections.load import load_collection
from rlkit.retrieval.documents import Document, Result
from rlkit.retrieval.retrievers import open_retriever, retrieve, top_documents


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RLKIT_CACHE", str(tmp_path / "cache"))
    # datasets reads the variable at import, so setting it here would have no effect.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")


def write_dataset(folder, split, **configs):
    """Write a dataset with one split in each config, as `load_dataset` reads it from the Hub."""
    entries = []
    for config, rows in configs.items():
        path = folder / config / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(path)
        files = [{"split": split, "path": f"{config}/{split}.parquet"}]
        entries.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n")
    return str(folder)


DOCUMENTS = [
    {"id": f"d{i}", "content": text} for i, text in enumerate(("red wine", "red red", "river", "wine"))
]


def bright_row(name, gold, excluded=("N/A",), query="red"):
    return {"id": name, "query": query, "gold_ids": list(gold), "excluded_ids": list(excluded)}


def test_load_bright_reads_gold_and_excluded_ids(tmp_path):
    rows = [bright_row("0", ["d0"], ["d1"]), bright_row("1", ["d2"])]
    folder = write_dataset(tmp_path / "bright", "pony", documents=DOCUMENTS, examples=rows)
    collection = load_collection(f"bright:pony:{folder}")
    assert collection.judged("test") == {"0": {"d0": 1}, "1": {"d2": 1}}
    assert collection.excluded == {"0": {"d1"}, "1": frozenset()}
    assert next(iter(collection.documents())) == Document("d0", "", "red wine")
    run = retrieve(open_retriever("bm25", collection), collection, collection.queries, 2)
    # d1 is excluded for query 0 only.
    assert "d1" not in run["0"] and run["1"][0] == "d1"
    task = load_environment("rerank-v3", collection=f"bright:pony:{folder}").tasks("test")[0]
    assert "d1" not in task["candidates"] or task["query_id"] == "1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([bright_row("0", ["d0"], ["d0"])], "'d0' is listed both as relevant and as excluded"),
        (
            [bright_row("0", ["d9"])],
            "bright:pony: none of the 1 judged documents is in the corpus: .*'d9'.*'d0'",
        ),
        ([bright_row("0", ["d0"]), bright_row("0", ["d1"])], "row 1: the id '0' is a duplicate"),
        ([{"id": "0", "query": "x", "gold_ids": ["d0"]}], "row 0 has no excluded_ids"),
    ],
)
def test_load_bright_names_invalid_row(tmp_path, rows, message):
    folder = write_dataset(tmp_path / "bright", "pony", documents=DOCUMENTS, examples=rows)
    with pytest.raises(UserError, match=message):
        load_collection(f"bright:pony:{folder}")


def test_load_bright_reports_gold_ids_missing_from_documents(tmp_path):
    rows = [bright_row("0", ["d0", "d9"]), bright_row("1", ["d2"])]
    folder = write_dataset(tmp_path / "bright", "pony", documents=DOCUMENTS, examples=rows)
    collection = load_collection(f"bright:pony:{folder}")
    assert collection.judged("test") == {"0": {"d0": 1, "d9": 1}, "1": {"d2": 1}}
    assert "1 of 3 judged documents are not in the corpus, for example 'd9'" in collection.notes[0]


def test_source_of_bright_changes_with_the_documents(tmp_path):
    rows = [bright_row("0", ["d0"])]
    folder = write_dataset(tmp_path / "bright", "pony", documents=DOCUMENTS, examples=rows)
    source = load_collection(f"bright:pony:{folder}").source
    assert load_collection(f"bright:pony:{folder}").source == source
    changed = [*DOCUMENTS[:-1], {"id": "d3", "content": "beer"}]
    write_dataset(tmp_path / "bright", "pony", documents=changed, examples=rows)
    assert load_collection(f"bright:pony:{folder}").source != source


PASSAGES = [
    {"document_id": name, "document_content": text}
    for name, text in (("a:0", "red wine"), ("a:1", "red red"), ("b:0", "red river"), ("c:0", "sea"))
]


def crumb_row(name, full=(), passage=(), binary=()):
    labels = {"full_document_qrels": full, "passage_qrels": passage, "passage_binary_qrels": binary}
    columns = {}
    for column, pairs in labels.items():
        columns[column] = [{"id": document, "label": label} for document, label in pairs]
    return {"query_id": name, "query_content": "red", **columns}


def test_load_crumb_ranks_documents_by_best_passage(tmp_path):
    rows = [crumb_row("q", full=[("a", 1.0), ("c", 0.0)], passage=[("a:0", 1.0)])]
    task = "tip_of_the_tongue"
    configs = {"evaluation_queries": rows, "validation_queries": [crumb_row("v", full=[("b", 2.0)])]}
    folder = write_dataset(tmp_path / "crumb", task, passage_corpus=PASSAGES, **configs)
    collection = load_collection(f"crumb:{task}:{folder}")
    assert collection.judged("test") == {"q": {"a": 1, "c": 0}}
    assert collection.judged("dev") == {"v": {"b": 2}}
    result = Result(tuple(Document(p["document_id"], "", p["document_content"]) for p in PASSAGES))
    assert [d.id for d in top_documents(collection, "q", result, 2)] == ["a", "b"]
    run = retrieve(open_retriever("bm25", collection), collection, collection.queries, 10)
    assert sorted(run["q"]) == ["a", "b"]  # judged ids, once per document
    tasks = load_environment("rerank-v3", collection=f"crumb:{task}:{folder}").tasks("test")
    assert sorted(tasks[0]["candidates"]) == ["a", "b"]
    turn = load_environment("query-v4", collection=f"crumb:{task}:{folder}", measure="rr").script(
        {"judged": ["a"], "grades": [1], "query_id": "q", "query": "red"}
    )
    assert turn == ["<query> red wine</query>"]


def test_load_crumb_reads_binary_judgments_of_passages(tmp_path):
    row = crumb_row("q", passage=[("a:0", 2.5), ("b:0", 1.0)], binary=[("a:0", 1.0), ("b:0", 0.0)])
    configs = {"evaluation_queries": [row], "validation_queries": [row | {"query_id": "v"}]}
    folder = write_dataset(tmp_path / "crumb", "paper_retrieval", passage_corpus=PASSAGES, **configs)
    collection = load_collection(f"crumb:paper_retrieval:{folder}")
    assert collection.judged("test") == {"q": {"a:0": 2, "b:0": 1}}
    assert collection.binary["test"] == {"q": {"a:0": 1, "b:0": 0}} and collection.document_of is None
    folded = collection.folds(2, 0)
    assert folded.binary.keys() == folded.qrels.keys()
    for split, judged in folded.qrels.items():
        assert set(folded.binary[split]) == set(judged)


def test_load_crumb_reports_missing_documents_and_rejects_grades_that_are_not_numbers(tmp_path):
    task = "tip_of_the_tongue"
    rows = [crumb_row("q", full=[("a", 1.0), ("gone", 2.0)])]
    configs = {"evaluation_queries": rows, "validation_queries": [crumb_row("v", full=[("b", 1.0)])]}
    folder = write_dataset(tmp_path / "crumb", task, passage_corpus=PASSAGES, **configs)
    collection = load_collection(f"crumb:{task}:{folder}")
    assert "1 of 3 judged documents are not in the corpus, for example 'gone'" in collection.notes[0]
    configs["evaluation_queries"] = [crumb_row("q", full=[("a", float("nan"))])]
    write_dataset(tmp_path / "crumb", task, passage_corpus=PASSAGES, **configs)
    with pytest.raises(UserError, match="row 0: the grade nan is not a number"):
        load_collection(f"crumb:{task}:{folder}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bright:bio", "BRIGHT has no subset 'bio'"),
        ("crumb:legal", "CRUMB has no subset 'legal'"),
        ("bright:biology:/nowhere", "'/nowhere' is neither a file"),
    ],
)
def test_load_collection_rejects_unknown_subset_or_folder(name, message):
    with pytest.raises(UserError, match=message):
        load_collection(name)
