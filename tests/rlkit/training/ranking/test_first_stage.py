"""Tests of the first-stage check on vectors worked out by hand."""

import pytest
import torch
from accelerate import Accelerator

from rlkit.environment import Candidates
from rlkit.training.ranking.first_stage import FirstStage, best_passages


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
