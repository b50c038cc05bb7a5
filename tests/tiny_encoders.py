"""Encoders of two layers with random weights, for tests that need another kind than the bundled one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

WORDS = """red blue green wine river castle iron stone bread cheese north south king queen horse road query
passage search what is the a of and document answer which them this that may be relevant Passages Which"""
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per known word, and [CLS] and [SEP] around a string."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save_tiny_transformer(
    folder: Path, *, kind: str = "bert", dtype: torch.dtype = torch.float32, seed: int = 0
) -> str:
    """Save a BERT or RoBERTa of two layers, 32 dimensions and 64 positions, and return its folder."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS.split()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "initializer_range": 0.3,  # with less, all strings have nearly the same vector
        "pad_token_id": 0,
    }
    if kind == "bert":
        model = BertModel(BertConfig(**sizes, max_position_embeddings=64))
    else:
        model = RobertaModel(RobertaConfig(**sizes, max_position_embeddings=65, type_vocab_size=1))
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def save_tiny_encoder(
    folder: Path,
    *,
    kind: str = "bert",
    dtype: torch.dtype = torch.float32,
    normalize: bool = False,
    extra_modules: Sequence[torch.nn.Module] = (),
    **settings: object,
) -> str:
    """Save a sentence-transformers model with mean pooling and return its folder.

    Args:
        folder: Folder to write to.
        kind: "bert" or "roberta".
        dtype: Dtype of the checkpoint.
        normalize: Whether vectors have length 1.
        extra_modules: Modules at the end.
        settings: Arguments of SentenceTransformer, such as `prompts` and `similarity_fn_name`.
    """
    transformer = Transformer(
        save_tiny_transformer(folder.with_name(f"{folder.name}_transformer"), kind=kind)
    )
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    modules = [transformer, pooling, *([Normalize()] if normalize else []), *extra_modules]
    encoder = SentenceTransformer(modules=modules, device="cpu", **settings)
    encoder.to(dtype).save_pretrained(str(folder), create_model_card=False)
    return str(folder)
