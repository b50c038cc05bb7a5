import subprocess
import sys

from rlkit.envs.ranking.pairs.rows import PairRow, read_rows, write_rows
from rlkit.retrieval.cross_encoders import load_cross_encoder
from tests.envs.ranking.folders import write_beir
from tests.tiny_encoders import save_tiny_transformer


def test_script_writes_lists_with_the_scores_of_a_teacher(tmp_path):
    documents = {"w": "red wine", "r": "red river", "c": "green castle", "b": "blue horse"}
    collection = write_beir(tmp_path / "c", documents, {"q": "red"}, {"test": {"q": {"w": 1}}})
    write_rows(
        tmp_path / "pairs.jsonl", [PairRow("title/c/0", "red river", ("green castle",), (1.0,), "title", "c")]
    )
    load_cross_encoder(save_tiny_transformer(tmp_path / "body"), new_head=True).save(
        str(tmp_path / "teacher")
    )
    command = [sys.executable, "scripts/score_pairs.py", collection, str(tmp_path / "pairs.jsonl"),
               "--teacher", str(tmp_path / "teacher"), "--retrievers", "bm25", "--list_length", "3",
               "-o", str(tmp_path / "scored.jsonl")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (row,) = read_rows(tmp_path / "scored.jsonl")
    assert sorted(row.passage_documents) == ["c", "r", "w"] and row.document == "c" and row.source == "title"
    assert min(row.targets) == 0 and max(row.targets) == 1
    assert (
        "1 lists of 3.0 passages" in result.stdout and "the teacher ranks the source first" in result.stdout
    )
