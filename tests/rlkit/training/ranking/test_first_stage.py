"""Tests of the first-stage check on vectors worked out by hand."""

import json
import logging
import math

import pytest
import torch
from accelerate import Accelerator

from rlkit.environment import Candidates
from rlkit.training.ranking.first_stage import FirstStage, best_passages, sample_documents


class Encoder:
    """Embed "x y" as the vector (x, y)."""

    def embed_in_batches(self, texts, task, batch_size):
        """Return the vectors of the strings, (texts, 2)."""
        return torch.tensor([[float(number) for number in text.split()] for text in texts])


def ndcg_of(documents, **judgments):
    candidates = Candidates("1 0", [], [], **judgments)
    check = FirstStage({"task": candidates}, documents, max_documents=100, seed=0, batch_size=4)
    return check.scores(Encoder(), Accelerator(cpu=True))["task"]


def test_document_takes_the_rank_of_its_best_passage():
    """The 20 best passages are of one document, so the relevant document is at rank 2."""
    documents = [("long", f"{100 - i} 0") for i in range(20)] + [("b", "1 0"), ("b", "7 0"), ("c", "3 0")]
    assert ndcg_of(documents, ideal=[1], relevant=["b"]) == pytest.approx(0.6309, abs=1e-4)
    assert ndcg_of(documents, ideal=[1], relevant=["b"], excluded=["long"]) == 1


def test_excluded_documents_do_not_take_ranks():
    documents = [(f"x{i}", "9 0") for i in range(15)] + [("a", "2 0"), ("b", "1 0")]
    assert ndcg_of(documents, ideal=[1], relevant=["b"]) == 0
    excluded = [f"x{i}" for i in range(15)]
    assert ndcg_of(documents, ideal=[1], relevant=["b"], excluded=excluded) == pytest.approx(0.6309, abs=1e-4)


def test_best_passages_returns_the_highest_similarity_of_each_document():
    similarities = torch.tensor([[0.1, -0.5, 0.3], [-0.2, -0.4, -0.3]])
    ids, highest = best_passages(["a", "b", "a"], similarities)
    assert ids == ["a", "b"]
    assert torch.equal(highest, torch.tensor([[0.3, -0.5], [-0.2, -0.4]]))


def test_missing_relevant_documents_stay_in_the_ideal_ranking():
    expected = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    documents = [("a", "3 0"), ("b", "1 0")]
    assert ndcg_of(documents, ideal=[1, 1], relevant=["b", "gone"]) == pytest.approx(expected)


@pytest.mark.parametrize("max_documents", [2, 10])
def test_sample_keeps_every_relevant_document_in_order(max_documents):
    documents = [(str(i), f"text {i}") for i in range(50)]
    sample, num_documents = sample_documents(documents, {"49", "0", "7"}, max_documents, 1)
    assert num_documents == 50 and len(sample) == max(max_documents, 3)
    assert sample == sorted(sample, key=documents.index)
    assert {documents[i] for i in (0, 7, 49)} <= set(sample)


class Directory:
    """A run directory with the results of two checks."""

    def __init__(self, path, before, after):
        self.path = path
        for name, scores in (("before", before), ("after", after)):
            (path / "first_stage").mkdir(exist_ok=True)
            result = {"scores": {str(i): score for i, score in enumerate(scores)}}
            (path / "first_stage" / f"{name}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(("metric_change", "words"), [(0.015, "improved"), (-0.1, "did not improve either")])
def test_significant_fall_is_a_warning(tmp_path, caplog, metric_change, words):
    """As in a run whose reranking rises from 97.8% to 99.3% while retrieval falls from 0.852 to 0.190."""
    check = FirstStage({}, [("a", "1 0")] * 3, max_documents=100, seed=0, batch_size=4)
    directory = Directory(tmp_path, [0.852] * 40, [0.190] * 40)
    (line,) = check.summary(directory, metric_change)
    assert line == "first stage: nDCG@10 over all 3 documents 0.852 -> 0.190 (p = 0.0002)"
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "retrieves worse than before training" in record.message and words in record.message


def test_rise_and_insignificant_fall_are_no_warning(tmp_path, caplog):
    check = FirstStage({}, [("a", "1 0")], max_documents=100, seed=0, batch_size=4)
    for before, after in (([0.2] * 40, [0.4] * 40), ([0.5] * 40, [0.5] * 39 + [0.1])):
        (line,) = check.summary(Directory(tmp_path, before, after), 0.1)
        assert line.startswith("first stage: ")
    assert not caplog.records
