"""Weight transfer over NCCL from the trainer's GPU to those of vLLM servers, with TRL's `VLLMClient`."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlkit.errors import UserError
from rlkit.rollouts.vllm.endpoint import server_settings
from rlkit.rollouts.vllm.weights import Weights


class NCCLSender:
    """Sends weights to servers over NCCL. It keeps a copy of them, for servers that restart."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._tensors: list[tuple[str, torch.Tensor]] = []

    def reaches(self, urls: Sequence[str]) -> bool:
        """Return whether NCCL is available here (a GPU, and vLLM installed) and on all servers."""
        if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
            return False
        return all(_accepts_nccl(url) for url in urls)

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], label: str) -> tuple[Weights, int]:
        """Copy the tensors to send; return their `Weights` and their size in bytes."""
        # TRL merges a LoRA adapter only while it yields the tensors, so references would not do.
        self._tensors = [(name, tensor.detach().clone()) for name, tensor in named_tensors]
        return Weights(label, None), sum(tensor.nbytes for _, tensor in self._tensors)

    def send(self, url: str) -> None:
        """Send the tensors to a server, and block until it has them."""
        from trl.generation.vllm_client import VLLMClient

        device = self._tensors[0][1].device
        torch.cuda.set_device(device)  # the current device is per thread
        if url not in self._clients:
            client = VLLMClient(base_url=url, group_port=_free_port())
            client.init_communicator(device)
            self._clients[url] = client
        metadata = [
            (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in self._tensors
        ]
        self._clients[url].update_named_params(metadata, iter(self._tensors))

    def forget(self, url: str) -> None:
        """Close the communicator of a server that is down."""
        if url in self._clients:
            self._clients.pop(url).close_communicator()


def _accepts_nccl(url: str) -> bool:
    try:
        return server_settings(url)["weight_transfer_config"] is not None
    except UserError:  # the server is down; files will reach it when it is up again
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
