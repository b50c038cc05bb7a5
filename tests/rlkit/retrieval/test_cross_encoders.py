"""Cross-encoders of two layers with random weights: loading, heads, batches and long pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlkit.errors import UserError
from rlkit.retrieval.cross_encoders import load_cross_encoder, pair_scores
from rlkit.retrieval.encoders import load_encoder
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
    with pytest.raises(UserError, match=r"has no trained classification head.*--cross_encoder true"):
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


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_max_seq_length_without_room_for_a_pair_is_refused(ranker, limit):
    with pytest.raises(UserError, match=rf"max_seq_length must be at least 5 .*, not {limit}"):
        load_cross_encoder(ranker, max_seq_length=limit)
    model = load_cross_encoder(ranker, max_seq_length=5)
    assert pair_scores(model, [("red wine river", "stone castle road"), ("", "")], 2).isfinite().all()


def test_limit_never_exceeds_the_positions_of_roberta(tmp_path):
    """Its tokenizer has no limit, and two of its 65 positions are not for tokens."""
    model = load_cross_encoder(save_tiny_transformer(tmp_path / "roberta", kind="roberta"), new_head=True)
    assert model.max_seq_length == 64
    assert pair_scores(model, [("red", "wine " * 90)], 1).isfinite().all()


def save_language_model(folder, chat_template=None):
    """Save a language model that answers yes or no, with a token per byte, and return its folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<s>", "</s>", *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=80)
    wrapped.add_tokens(["yes", "no"])
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(wrapped),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        max_position_embeddings=80,
        initializer_range=0.3,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


CHAT = (
    "{% for m in messages %}{% if m.role in ('system', 'query', 'document') %}"
    "{{ m.role }}: {{ m.content if m.content is string else m.content[0].text }}\n"
    "{% endif %}{% endfor %}Answer:"
)


@pytest.mark.parametrize("chat_template", [None, CHAT])
def test_language_model_with_a_prompt_scores_as_in_sentence_transformers(tmp_path, chat_template):
    model = load_cross_encoder(save_language_model(tmp_path / "model", chat_template)).eval()
    model.prompts, model.default_prompt_name = {"query": "Judge: "}, "query"
    pairs = [("red wine", "a river of wine"), ("x", "stone")]
    expected = torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))
    torch.testing.assert_close(pair_scores(model, pairs, 2).detach(), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(torch.tensor(model.predict(pairs, prompt="")), expected.sigmoid())


@pytest.mark.parametrize("chat_template", [None, CHAT])
def test_characters_of_several_tokens_leave_tokens_for_the_document(tmp_path, chat_template):
    model = load_cross_encoder(save_language_model(tmp_path / "model", chat_template)).eval()
    query = "\u4e2d" * 60  # 180 tokens, more than the limit of 80
    scores = pair_scores(model, [(query, "a"), (query, "b"), (query, "a" + "z" * 99), ("", "\u4e2d" * 60)], 2)
    assert scores.isfinite().all() and len({round(score.item(), 4) for score in scores}) == 4


def test_encoder_made_of_a_language_model_has_no_head(tmp_path):
    model = save_language_model(tmp_path / "model")
    assert load_cross_encoder(model).num_labels == 1
    encoder = SentenceTransformer(modules=[Transformer(model), Pooling(32, "lasttoken")], device="cpu")
    encoder.save_pretrained(str(tmp_path / "encoder"), create_model_card=False)
    path = tmp_path / "encoder" / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no trained classification head"):
        load_cross_encoder(str(tmp_path / "encoder"))


def test_head_in_a_module_of_its_own_is_a_head(tmp_path, body):
    head = Dense(
        32,
        1,
        activation_function=torch.nn.Identity(),
        module_input_name="sentence_embedding",
        module_output_name="scores",
    )
    modules = [Transformer(body), Pooling(32, "cls"), head]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(tmp_path / "m"), create_model_card=False)
    model = load_cross_encoder(str(tmp_path / "m")).eval()
    pairs = [("red wine", "a river of wine"), ("stone", "")]
    expected = torch.tensor(model.predict(pairs, activation_fn=torch.nn.Identity()))
    torch.testing.assert_close(pair_scores(model, pairs, 2).detach(), expected)


def test_classifier_without_the_weights_of_its_head_is_refused_unless_it_is_to_be_trained(tmp_path):
    """Its config names a classifier, so transformers only warns that the head is random."""
    folder = save_classifier(tmp_path / "model", 1)
    CrossEncoder(folder, device="cpu").save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    for path in (folder, str(tmp_path / "saved")):
        assert load_cross_encoder(path).num_labels == 1
        weights = load_file(f"{path}/model.safetensors")
        body = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
        for changed in (body, weights | {"classifier.weight": torch.zeros(3, 32)}):
            save_file(changed, f"{path}/model.safetensors", metadata={"format": "pt"})
            with pytest.raises(UserError, match="has no trained classification head"):
                load_cross_encoder(path)
        save_file(body, f"{path}/model.safetensors", metadata={"format": "pt"})
        heads = []
        for _ in range(2):
            torch.manual_seed(1)
            heads.append(load_cross_encoder(path, new_head=True).transformers_model.classifier.weight)
        torch.testing.assert_close(*heads)


def test_cross_encoder_is_not_loaded_as_an_encoder(ranker, tmp_path):
    load_cross_encoder(ranker).save_pretrained(str(tmp_path / "saved"))
    for folder in (ranker, str(tmp_path / "saved")):
        with pytest.raises(UserError, match=r"is a cross-encoder, .*rerank:bm25"):
            load_encoder(folder)
