"""Generative retrieval: beam search over a trie of identifiers against exact log-probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from rlkit.errors import UserError
from rlkit.retrieval.collections.base import Collection
from rlkit.retrieval.documents import Document, EngineError, Query
from rlkit.retrieval.engines.identify import MIN_WIDTH, GenerativeRetriever, build_trie, identify_prompt
from rlkit.retrieval.evaluate import evaluate_retriever
from rlkit.retrieval.retrievers import open_retriever
from tests.conftest import TEMPLATE, make_tokenizer

PREFIXES = ["a", "ab", "abc", "b", "ba", "aa", "a b"]


def documents_of(names):
    return {name: Document(name, "", f"About {name}.") for name in names}


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Return a tokenizer of bytes, which can write every identifier."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>", "</s>")
    return tokenizer


@pytest.fixture(scope="module")
def model(tiny_model, byte_tokenizer):
    return tiny_model("llama", vocab_size=len(byte_tokenizer), initializer_range=0.3)


def exact_scores(engine, query):
    """Return log p(identifier | prompt) of each document from forward passes without a cache."""
    prompt = engine.tokenizer.apply_chat_template(
        identify_prompt(query), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    scores = {}
    for document in engine.documents:
        tokens = [
            *engine.tokenizer.encode(document.id, add_special_tokens=False),
            engine.tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            logits = engine.model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        scores[document.id] = logits.log_softmax(-1)[range(len(tokens)), tokens].sum().item()
    return scores


def assert_exact(engine, query, result, k):
    expected = exact_scores(engine, query)
    order = sorted(expected, key=lambda name: -expected[name])[:k]
    assert [document.id for document in result.documents] == order
    assert result.scores == pytest.approx([expected[name] for name in order], abs=1e-3)
    assert result.error is None


names = st.lists(
    st.text("ab.é信 -", min_size=1, max_size=6).filter(lambda name: name == name.strip()), unique=True
)


@settings(max_examples=40)
@given(names.filter(bool), st.integers(1, 30))
def test_beam_as_wide_as_the_collection_is_exact(model, byte_tokenizer, identifiers, k):
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(identifiers[:MIN_WIDTH]))
    (result,) = engine.search([Query("red bridge")], k)
    assert_exact(engine, "red bridge", result, k)


@pytest.mark.parametrize("options", [{}, {"kind": "gpt2"}, {"kind": "gemma2", "sliding_window": 16}])
def test_models_with_other_positions_and_caches_are_exact(tiny_model, byte_tokenizer, options):
    """GPT-2 has learned positions, Gemma 2 a window; padding on the left must not shift them."""
    model = tiny_model(vocab_size=len(byte_tokenizer), initializer_range=0.3, **options)
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(PREFIXES))
    queries = ["", "red", "a bridge of red stone over a wide river"]
    for query, result in zip(queries, engine.search([Query(query) for query in queries], 7), strict=True):
        assert_exact(engine, query, result, 7)


@settings(max_examples=20)
@given(
    st.sets(st.text("abc", min_size=1, max_size=5), min_size=MIN_WIDTH + 1, max_size=60), st.integers(1, 80)
)
def test_narrow_beam_returns_different_documents_with_exact_scores(model, byte_tokenizer, identifiers, k):
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(sorted(identifiers)))
    (result,) = engine.search([Query("red bridge")], k)
    found = [document.id for document in result.documents]
    assert len(found) == len(set(found)) == min(k, len(identifiers)) and set(found) <= identifiers
    expected = exact_scores(engine, "red bridge")
    assert result.scores == pytest.approx([expected[name] for name in found], abs=1e-3)
    assert list(result.scores) == sorted(result.scores, reverse=True)


@given(st.sets(st.lists(st.integers(1, 3), max_size=4).map(tuple), min_size=1))
def test_trie_has_the_sequences_and_no_others(sequences):
    sequences = [(*tokens, 0) for tokens in sorted(sequences)]

    def leaves(node, path):
        if node.leaf is not None:
            yield path, node.leaf
        for token, child in node.children.items():
            yield from leaves(child, (*path, token))

    assert sorted(leaves(build_trie(sequences), ())) == [(tokens, i) for i, tokens in enumerate(sequences)]


def path_of(node):
    """Return the tokens of a trie of one sequence."""
    tokens = []
    while node.leaf is None:
        ((token, node),) = node.children.items()
        tokens.append(token)
    return tokens


def test_identifier_has_the_tokens_that_a_demonstration_has(tiny_model, tiny_tokenizer):
    """The model is trained on the chat template's rendering of an answer (`rlkit sft`)."""
    engine = GenerativeRetriever(tiny_model(), tiny_tokenizer, documents_of(["read.2"]))
    messages = identify_prompt("bridge")
    answer = {"role": "assistant", "content": "read.2"}
    rendered = tiny_tokenizer.apply_chat_template([*messages, answer], tokenize=True, return_dict=True)[
        "input_ids"
    ]
    prompt = tiny_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    tokens = [*tiny_tokenizer.encode("read.2", add_special_tokens=False), tiny_tokenizer.eos_token_id]
    assert path_of(engine.trie) == tokens
    assert rendered[: len(prompt) + len(tokens)] == prompt + tokens


def test_identifier_ends_as_the_chat_template_ends_a_turn(tiny_model):
    """Some models end a turn with another token than EOS, or begin an answer with an empty thought."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    turn = "<think>\n</think>\n{{ m['content'] }}"
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}" + turn + "{% else %}{{ m['content'] }}{% endif %}",
    )
    engine = GenerativeRetriever(tiny_model(), tokenizer, documents_of(["read.2"]))
    assert tokenizer.decode(path_of(engine.trie)) == "<think>\n</think>\nread.2<|im_end|>"


def test_one_document_is_always_found(model, byte_tokenizer):
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(["é/信.1"]))
    for result in engine.search([Query(""), Query("lone \ud800 surrogate")], 10):
        assert [document.id for document in result.documents] == ["é/信.1"]


def test_queries_of_several_batches_are_ranked_as_alone(model, byte_tokenizer, monkeypatch):
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(PREFIXES))
    monkeypatch.setattr("rlkit.retrieval.engines.identify.MAX_ROWS", 2 * len(PREFIXES))
    queries = [Query("red " * n) for n in (5, 0, 9, 2, 7)]
    for query, result in zip(queries, engine.search(queries, 7), strict=True):
        assert_exact(engine, query.text, result, 7)
    assert engine.search([], 7) == []


def test_query_without_room_has_an_error_and_the_others_results(tiny_model, byte_tokenizer):
    model = tiny_model("llama", vocab_size=len(byte_tokenizer), max_position_embeddings=200)
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(PREFIXES))
    long, short = engine.search([Query("bridge " * 40), Query("bridge")], 3)
    assert "tokens, and the maximum that leaves room" in long.error and not long.documents
    assert len(short.documents) == 3


def test_logits_that_are_not_finite_are_an_engine_error(tiny_model, byte_tokenizer):
    model = tiny_model("llama", vocab_size=len(byte_tokenizer))
    model.lm_head.weight.data[5] = float("nan")
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(PREFIXES))
    with pytest.raises(EngineError, match="NaN or infinite"):
        engine.search([Query("bridge")], 3)


def test_failure_of_the_model_is_an_engine_error(tiny_model, byte_tokenizer):
    model = tiny_model("llama", vocab_size=len(byte_tokenizer) // 2)
    engine = GenerativeRetriever(model, byte_tokenizer, documents_of(["é"]))
    model.forward = _out_of_memory
    with pytest.raises(EngineError, match="the language model failed: out of memory"):
        engine.search([Query("bridge")], 3)


def _out_of_memory(**arguments):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("identifiers", "message"),
    [
        (["é", "è"], "'è': it has the tokens of 'é'"),
        (["a<|im_end|>b"], "it has a token that ends the answer"),
    ],
)
def test_identifiers_that_the_tokenizer_cannot_tell_apart_are_refused(
    tiny_model, tiny_tokenizer, identifiers, message
):
    with pytest.raises(UserError, match=message):
        GenerativeRetriever(tiny_model(), tiny_tokenizer, documents_of(identifiers))


def test_models_without_what_is_needed_are_refused(tiny_model, byte_tokenizer):
    with pytest.raises(UserError, match="not MambaForCausalLM"):
        GenerativeRetriever(tiny_model("mamba"), byte_tokenizer, documents_of(["a"]))
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        GenerativeRetriever(tiny_model(), ByT5Tokenizer(), documents_of(["a"]))


def test_retriever_ranks_a_collection_by_the_ids_that_are_judged(tiny_folder):
    """Passages of one document have one identifier; an excluded document is removed from the ranking."""
    documents = [Document(f"{name}/{part}", "", "About it.") for name in PREFIXES for part in (0, 1)]
    collection = Collection(
        "passages",
        lambda: iter(documents),
        {"q": "red bridge"},
        {"test": {"q": {"ab": 1}}},
        excluded={"q": frozenset({"a"})},
        document_of=lambda name: name.partition("/")[0],
    )
    result = evaluate_retriever(collection, f"docid:{tiny_folder}", measures=["rr@10"], depth=10)
    assert sorted(result["rankings"]["q"]) == sorted(set(PREFIXES) - {"a"})
    assert result["scores"]["q"]["rr@10"] == 1 / (result["rankings"]["q"].index("ab") + 1)


def test_missing_model_is_a_user_error(tmp_path):
    collection = Collection("one", lambda: iter([Document("a", "", "A.")]), {}, {})
    with pytest.raises(UserError, match="there is no model folder"):
        open_retriever(f"docid:{tmp_path / 'missing'}", collection)
    with pytest.raises(UserError, match="there is no retriever 'docid:'"):
        open_retriever("docid:", collection)
