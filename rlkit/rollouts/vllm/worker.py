"""What `rlkit serve` adds to vLLM's workers: new weights that arrive everywhere, also on a CPU."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXTENSION = f"{__name__}.WorkerExtension"


class WorkerExtension:
    """Methods for `/collective_rpc`; vLLM mixes them into its worker."""

    def rlkit_load(self: Any, folder: str) -> None:
        """Load safetensors over the weights; raises FileNotFoundError where the folder is not seen."""
        if not Path(folder).is_dir():  # vLLM would look for it on the hub
            raise FileNotFoundError(f"there is no folder {folder} on {socket.gethostname()}")
        self.reload_weights(weights_path=folder, is_checkpoint_format=True)
        repack_tied(self.model_runner.get_model())


def repack_tied(model: torch.nn.Module) -> None:
    """Finish loading weights into a vLLM model whose output layer shares those of its embedding.

    On a CPU vLLM keeps a repacked copy of them for the output layer. A reload gives the embedding its new
    weights and leaves that copy as it was (seen with vLLM 0.31), so that logits come from both old and new.
    """
    for layer in model.modules():
        if type(layer).__name__ == "ParallelLMHead" and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
