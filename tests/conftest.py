"""Tiny random models and a character tokenizer: real classes of transformers that train in milliseconds."""

import contextlib
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side, and many start processes: threads that spin while they wait would take the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import hypothesis
import pytest

from rlkit.runs.directory import RunDirectory

# The machine may be busy: a slow example is not a failure.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer():
    """One token a printable ASCII character; <|im_end|> ends a turn and pads."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "<|im_start|>", "<|im_end|>", "\n", *(chr(c) for c in range(32, 127))]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer of the tiny models, see `make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model():
    """Return a function that makes a random model: `tiny_model("llama", seed=1, **config)`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind="llama", seed=0, **options):
        sizes = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,  # logits far enough apart that greedy answers have no ties
            "eos_token_id": 2,
            "pad_token_id": 2,
            "bos_token_id": 1,
        }
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **(sizes | options))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A folder with a tiny random model and its tokenizer, as `model_name_or_path` takes it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", max_position_embeddings=2048, initializer_range=0.02).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Like `tiny_folder`, of a shape that vLLM's kernels take."""
    folder = tmp_path_factory.mktemp("tiny-vllm")
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 192, "initializer_range": 0.1}
    sizes |= {"tie_word_embeddings": True}  # vLLM keeps a second copy of them on a CPU
    tiny_model("llama", **sizes).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def open_run():
    """Return a function that opens a run directory for training; at the end of the test all are closed."""
    with contextlib.ExitStack() as opened:

        def open_run(folder):
            run = RunDirectory(folder, "train")
            run.open(resume=True, overwrite=False)
            opened.callback(run.close)
            return run

        yield open_run
