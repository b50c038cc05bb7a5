"""Cross-encoders of two layers with random weights: loading, heads, batches and long pairs."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from rlkit.errors import UserError
from rlkit.retrieval.cross_encoders import load_cross_encoder, pair_scores
from tests.tiny_encoders import WORDS, save_tiny_transformer, tiny_tokenizer

WORD_LIST = WORDS.split()


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    """The folder of a BERT without a head."""
    return save_tiny_transformer(tmp_path_factory.mktemp("body"))


def save_classifier(folder, num_labels):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORD_LIST) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=num_labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    """The folder of a cross-encoder with one score."""
    return save_classifier(tmp_path_factory.mktemp("ranker"), 1)


def test_model_without_a_head_is_refused_unless_it_is_to_be_trained(body):
    with pytest.raises(UserError, match=r"has no head for scores.*--cross_encoder true"):
        load_cross_encoder(body)
    assert load_cross_encoder(body, new_head=True).num_labels == 1


def test_classifier_with_several_labels_is_refused(tmp_path):
    for new_head in (False, True):
        with pytest.raises(UserError, match="a classifier with 3 labels"):
            load_cross_encoder(save_classifier(tmp_path / "classifier", 3), new_head=new_head)


def test_missing_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_cross_encoder(str(tmp_path / "missing" / "model"))
    assert "\n" not in str(error.value)


def test_scores_equal_those_of_sentence_transformers(ranker):
    model = load_cross_encoder(ranker).eval()
    pairs = [("red wine", "a river of wine"), ("stone", "iron castle north of the river"), ("a", "")]
    expected = model.predict(pairs, activation_fn=torch.nn.Identity())
    torch.testing.assert_close(pair_scores(model, pairs, 2).detach(), torch.tensor(expected))


def test_scores_do_not_depend_on_the_batch(ranker):
    model = load_cross_encoder(ranker).eval()
    pairs = [("red wine", " ".join(WORD_LIST[:n])) for n in (1, 30, 7, 2, 19, 11)]
    together = pair_scores(model, pairs, 64).detach()
    alone = torch.cat([pair_scores(model, [pair], 1) for pair in pairs]).detach()
    torch.testing.assert_close(pair_scores(model, pairs, 2).detach(), together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_long_document_never_displaces_the_query(ranker):
    """Two long queries that differ at their end have different scores for a document above the limit."""
    model = load_cross_encoder(ranker, max_seq_length=40).eval()
    document = " ".join(["iron"] * 200)
    start = " ".join(["red"] * 20)
    scores = pair_scores(model, [(f"{start} wine", document), (f"{start} cheese", document)], 2)
    assert abs(scores[0] - scores[1]) > 1e-4


def test_query_above_the_limit_leaves_tokens_for_the_document(ranker):
    model = load_cross_encoder(ranker, max_seq_length=40).eval()
    query = " ".join(["red"] * 100)
    scores = pair_scores(model, [(query, "wine"), (query, "cheese"), (query, "stone " * 90)], 3)
    assert scores.isfinite().all() and len({round(score.item(), 4) for score in scores}) == 3


def test_lone_surrogates_are_scored(ranker):
    scores = pair_scores(load_cross_encoder(ranker).eval(), [("red \ud800", "wine \udfff")], 1)
    assert scores.isfinite().all()


def test_max_seq_length_above_the_positions_is_refused(ranker):
    with pytest.raises(UserError, match="max_seq_length must be at most 64"):
        load_cross_encoder(ranker, max_seq_length=65)
