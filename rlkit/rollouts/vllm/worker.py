"""The extension of vLLM's workers in `rlkit serve`: it loads new weights on every platform, CPUs included."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EXTENSION = f"{__name__}.WorkerExtension"


class WorkerExtension:
    """Methods that `/collective_rpc` can call; vLLM adds this class as a base of its worker class."""

    def rlkit_load(self: Any, folder: str) -> None:
        """Replace the weights with the safetensors in a folder.

        Raises:
            FileNotFoundError: The folder does not exist on this machine.
        """
        if not Path(folder).is_dir():  # vLLM would take the path for a model name on the hub
            raise FileNotFoundError(f"folder {folder} does not exist on {socket.gethostname()}")
        self.reload_weights(weights_path=folder, is_checkpoint_format=True)
        repack_tied(self.model_runner.get_model())


def repack_tied(model: torch.nn.Module) -> None:
    """Repack the output layer of a vLLM model whose output layer and embedding share their weights.

    On a CPU, vLLM keeps a repacked copy of the shared weights for the output layer. A reload updates the
    embedding but not that copy (seen with vLLM 0.31), so the logits would mix new and old weights.
    """
    for layer in model.modules():
        if type(layer).__name__ == "ParallelLMHead" and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
