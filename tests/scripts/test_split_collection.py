import subprocess
import sys

from rlkit.retrieval.collections.load import load_collection
from tests.envs.ranking.folders import write_beir


def test_collection_is_split_by_document_and_keeps_all_documents(tmp_path):
    documents = {f"d{i}": f"text {i}" for i in range(6)}
    qrels = {"test": {f"q{i}": {f"d{i % 4}": 1} for i in range(8)} | {"all": dict.fromkeys(documents, 1)}}
    source = write_beir(
        tmp_path / "source", documents, {name: f"ask {name}" for name in qrels["test"]}, qrels
    )
    out = tmp_path / "out"
    command = [sys.executable, "scripts/split_collection.py", source, "--folds", "2", "--fold", "0"]
    result = subprocess.run([*command, "-o", out], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "dropped: 1 queries with relevant documents in several splits, 0 without" in result.stdout
    collection = load_collection(str(out))
    assert {document.id for document in collection.documents()} == set(documents)
    train, test = (collection.judged(split) for split in ("train", "test"))
    assert set(collection.queries) == train.keys() | test.keys() == {f"q{i}" for i in range(8)}
    train_documents, test_documents = (
        {name for grades in judged.values() for name in grades} for judged in (train, test)
    )
    assert not train_documents & test_documents
