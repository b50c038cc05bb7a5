"""Tiny models for runs in forks of the test process."""

import pytest

from tests.tiny_encoders import save_tiny_encoder


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return the folders of a tiny language model and a tiny encoder, by stage."""
    import rlkit.report
    import rlkit.training.ranking.rank
    import rlkit.training.sft
    import rlkit.training.train  # noqa: F401 (imported before the process is forked)

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny_model("llama", **sizes, num_key_value_heads=1).save_pretrained(folder / "llama")
    tiny_tokenizer.save_pretrained(folder / "llama")
    encoder = save_tiny_encoder(folder / "encoder")
    return {"train": str(folder / "llama"), "sft": str(folder / "llama"), "rank": encoder}
