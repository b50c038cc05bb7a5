"""Scores are those of the saved model, for encoders with prompts, dot products, routers and LoRA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Router, StaticEmbedding
from trl import ModelConfig

from rlkit.errors import UserError
from rlkit.retrieval.encoders import load_encoder
from rlkit.training.ranking.lora import add_lora
from rlkit.training.ranking.scorers import AdapterScorer, EncoderScorer, ListwiseScorer
from tests.tiny_encoders import save_tiny_encoder, tiny_tokenizer

QUERIES = ["red wine", "the castle of stone"]
PASSAGES = [["bread and cheese", "red wine", "a river"], ["iron", "castle"]]
DEFAULT_PROMPT = {"prompts": {"q": "query ", "other": "search "}, "default_prompt_name": "other"}
TASK_PROMPTS = {"prompts": {"query": "search ", "document": "passage "}}


def router():
    torch.manual_seed(1)
    return Router({"query": [Dense(32, 32)], "document": [Dense(32, 32)]}, "document")


KINDS = {
    "plain": {},
    "default prompt": DEFAULT_PROMPT,
    "default prompt and a document prompt": {
        "prompts": {"other": "search ", "passage": "passage "},
        "default_prompt_name": "other",
    },
    "prompts per task": TASK_PROMPTS,
    "dot product": {"similarity_fn_name": "dot"} | TASK_PROMPTS,
    "router": {"extra_modules": "router"},
    "dot product and router": {"similarity_fn_name": "dot", "extra_modules": "router"},
    "truncated": {"truncate_dim": 8},
}


@pytest.fixture
def make_encoder(tmp_path):
    def make(kind):
        settings = dict(KINDS[kind])
        if settings.pop("extra_modules", None):
            settings["extra_modules"] = [router()]
        return load_encoder(save_tiny_encoder(tmp_path / "encoder", **settings), max_seq_length=48)

    return make


def train_a_step(scorer):
    """Change all trainable weights."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return scorer.eval()


def scores_of_saved(folder, queries, temperature):
    """Return the similarity that sentence-transformers computes, with its own prompts and routes."""
    model = SentenceTransformer(str(folder), device="cpu")
    similarities = []
    for query, passages in zip(queries, PASSAGES, strict=True):
        vectors = model.encode_query([query], convert_to_tensor=True)
        documents = model.encode_document(passages, convert_to_tensor=True)
        similarities.append(model.similarity(vectors, documents)[0] / temperature)
    return model, similarities


@pytest.mark.parametrize("scorer_class", ["encoder", "query", "document", "both", "listwise", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_the_saved_model(make_encoder, tmp_path, kind, scorer_class):
    encoder = make_encoder(kind)
    has_adapter = scorer_class in ("query", "document", "both")
    if kind == "truncated" and has_adapter:
        with pytest.raises(UserError, match="truncate_dim"):
            AdapterScorer(encoder, 0.5, 4, scorer_class)
        return
    if has_adapter:
        scorer = AdapterScorer(encoder, 0.5, 4, scorer_class)
    elif scorer_class == "listwise":
        scorer = ListwiseScorer(encoder, 0.5, 2)
    else:
        if scorer_class == "lora":
            add_lora(encoder, ModelConfig(use_peft=True, lora_r=4))
        scorer = EncoderScorer(encoder, 0.5)
    train_a_step(scorer).save_pretrained(tmp_path / "saved")
    queries = scorer.query_texts(QUERIES, PASSAGES)
    model, expected = scores_of_saved(tmp_path / "saved", queries, 0.5)
    scores = scorer(queries, PASSAGES).detach()
    for row, of_query, query, passages in zip(scores, expected, queries, PASSAGES, strict=True):
        torch.testing.assert_close(row[: len(of_query)], of_query, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(scorer.score(query, passages, 2), of_query, atol=1e-5, rtol=1e-5)
    original = make_encoder(kind)
    assert model.prompts == original.prompts
    assert model.default_prompt_name == original.default_prompt_name
    assert model.similarity_fn_name == original.similarity_fn_name
    assert model.max_seq_length == 48 and model.truncate_dim == original.truncate_dim
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


STRINGS = st.text(alphabet="red wine castle", min_size=1, max_size=20)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Return an encoder that only scorers with a frozen encoder use."""
    return load_encoder(save_tiny_encoder(tmp_path_factory.mktemp("frozen") / "encoder", **TASK_PROMPTS))


@given(
    side=st.sampled_from(["query", "document", "both"]),
    query=STRINGS,
    passages=st.lists(STRINGS, min_size=1, max_size=4),
    is_swapped=st.booleans(),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_adapter_score_is_the_cosine_of_the_residuals(frozen, side, query, passages, is_swapped):
    """`is_swapped`: the query is embedded as a document and the passages as queries."""
    scorer = train_a_step(AdapterScorer(frozen, 0.5, 3, side))
    vectors = {}
    for task, strings in (("query", [query]), ("document", passages)):
        embedded_as = {"query": "document", "document": "query"}[task] if is_swapped else task
        encode = frozen.encode_query if embedded_as == "query" else frozen.encode_document
        v = encode(strings, convert_to_tensor=True, normalize_embeddings=True)
        if side in (embedded_as, "both"):
            residual = scorer.residuals[embedded_as]
            v = v + v @ residual.down.weight.T @ residual.up.weight.T
        vectors[task] = v / v.norm(dim=-1, keepdim=True)
    expected = (vectors["query"] @ vectors["document"].T)[0] / 0.5
    scores = scorer([query], [passages], passages_are_queries=is_swapped)[0]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scorer.residuals.keys() == ({"query", "document"} if side == "both" else {side})


def test_sides_have_their_own_matrices_and_queries_those_of_query_alone(frozen):
    torch.manual_seed(0)
    both = AdapterScorer(frozen, 0.5, 3, "both")
    torch.manual_seed(0)
    query = AdapterScorer(frozen, 0.5, 3)
    assert torch.equal(both.residuals["query"].down.weight, query.residuals["query"].down.weight)
    assert not torch.equal(both.residuals["query"].down.weight, both.residuals["document"].down.weight)


def test_lora_trains_only_adapter_weights(make_encoder):
    encoder = make_encoder("plain")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    add_lora(encoder, ModelConfig(use_peft=True, lora_r=4))
    scorer = EncoderScorer(encoder, 0.5).train()
    trained = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD([p for p in scorer.parameters() if p.requires_grad], 1.0)
    for _ in range(2):
        scorer(QUERIES, PASSAGES)[0, 0].backward()
        optimizer.step()
    after = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    merged = scorer.to_sentence_transformer().state_dict()
    assert merged.keys() == before.keys() and any(
        not torch.equal(merged[name], value) for name, value in before.items()
    )


def test_lora_modules_to_save_are_trained_and_wrong_modules_are_errors(make_encoder):
    encoder = make_encoder("router")
    config = ModelConfig(use_peft=True, lora_target_modules=["query", "key"], lora_modules_to_save=["linear"])
    add_lora(encoder, config)
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert any("linear" in name for name in trained) and any("key.lora_A" in name for name in trained)
    with pytest.raises(UserError, match="invalid adapter"):
        add_lora(make_encoder("plain"), ModelConfig(use_peft=True, lora_target_modules=["qqq", "kkk"]))
    with pytest.raises(UserError, match="has no module 'head'"):
        add_lora(make_encoder("plain"), ModelConfig(use_peft=True, lora_modules_to_save=["head"]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradient(make_encoder, lora, reentrant):
    gradients = []
    for checkpointing in (False, True):
        encoder = make_encoder("plain")
        torch.manual_seed(0)
        if lora:
            add_lora(encoder, ModelConfig(use_peft=True, lora_dropout=0.0))
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        scorer = EncoderScorer(encoder, 0.5).train()
        if checkpointing:
            scorer.gradient_checkpointing_enable({"use_reentrant": reentrant})
        scorer(QUERIES, PASSAGES)[0, 0].backward()
        gradients.append({n: p.grad for n, p in scorer.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(g.any() for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "dot product"])
def test_scores_under_autocast_are_float32_and_evaluations_ignore_it(make_encoder, dtype, kind):
    scorer = EncoderScorer(make_encoder(kind), 0.01).eval()
    exact = scorer.score(QUERIES[0], PASSAGES[0], 8)
    with torch.autocast("cpu", dtype), torch.no_grad():
        scores = scorer(QUERIES, PASSAGES)
        torch.testing.assert_close(scorer.score(QUERIES[0], PASSAGES[0], 8), exact)
        query, documents = scorer.embed(QUERIES[:1], "query"), scorer.embed(PASSAGES[0], "document")
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[0], (query @ documents.T / 0.01)[0])  # no rounding after the encoder
    assert scores[0].argsort().tolist() == exact.argsort().tolist()


def test_similarities_that_are_distances_are_refused(tmp_path):
    folder = save_tiny_encoder(tmp_path / "distance", similarity_fn_name="euclidean")
    with pytest.raises(UserError, match="'euclidean'; set similarity"):
        EncoderScorer(load_encoder(folder), 0.5)


def test_all_documents_of_a_batch_are_scored_for_every_query(make_encoder):
    scorer = EncoderScorer(make_encoder("plain"), 0.5).eval()
    documents = ["iron", "red wine", "iron"]
    with torch.no_grad():
        scores = scorer(QUERIES, PASSAGES, documents)
        torch.testing.assert_close(scores, scorer.similarities(QUERIES, documents))


def test_strings_embedded_in_several_passes_have_the_vectors_of_one(make_encoder):
    scorer = EncoderScorer(make_encoder("prompts per task"), 0.5).eval()
    texts = [" ".join(["red", "wine", "castle", "river"][: 1 + i % 4] * (1 + i % 7)) for i in range(45)]
    with torch.no_grad():
        one_by_one = torch.cat([scorer.embed([text], "document") for text in texts])
        torch.testing.assert_close(scorer.embed(texts, "document"), one_by_one, atol=1e-5, rtol=1e-4)
        batched = scorer.embed_in_batches(texts, "document", 16)
    torch.testing.assert_close(batched, one_by_one, atol=1e-5, rtol=1e-4)


@pytest.fixture
def static(tmp_path):
    """The folder of static embeddings, saved in half precision."""
    embedding = StaticEmbedding(tiny_tokenizer().backend_tokenizer, embedding_dim=16)
    encoder = SentenceTransformer(modules=[embedding], device="cpu").half()
    encoder.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    return str(tmp_path / "static")


def test_static_embeddings_have_the_dtype_of_the_key_and_no_attention(static):
    assert {parameter.dtype for parameter in load_encoder(static).parameters()} == {torch.float32}
    assert {p.dtype for p in load_encoder(static, dtype="auto").parameters()} == {torch.float16}
    with pytest.raises(UserError, match="attn_implementation must not be set"):
        load_encoder(static, attn_implementation="sdpa")


def test_listwise_query_of_static_embeddings_is_never_too_long(static):
    scorer = ListwiseScorer(load_encoder(static), 1.0, 3)
    (text,) = scorer.query_texts(["red wine"], [["stone " * 50] * 3])
    assert text.endswith("red wine") and text.count("stone") == 150


@pytest.mark.parametrize("kind", ["encoder", "adapter", "listwise"])
def test_lone_surrogates_are_scored(tmp_path, kind):
    encoder = load_encoder(save_tiny_encoder(tmp_path / "encoder"))
    scorer = {
        "encoder": lambda: EncoderScorer(encoder, 1.0),
        "adapter": lambda: AdapterScorer(encoder, 1.0, 2),
        "listwise": lambda: ListwiseScorer(encoder, 1.0, 1),
    }[kind]()
    passages = [["wine \udfff", "stone"]]
    assert scorer(scorer.query_texts(["red \ud800"], passages), passages).isfinite().all()


def test_gradient_checkpointing_is_refused_where_the_layers_do_not_support_it(tmp_path):
    encoder = load_encoder(save_tiny_encoder(tmp_path / "encoder"))
    encoder.transformers_model.supports_gradient_checkpointing = False  # as in MPNet
    with pytest.raises(UserError, match="gradient_checkpointing must be false: BertModel"):
        EncoderScorer(encoder, 1.0).gradient_checkpointing_enable()
