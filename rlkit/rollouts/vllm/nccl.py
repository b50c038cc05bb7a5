"""Weights from the trainer's GPU to those of vLLM servers, by TRL's `VLLMClient`."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from rlkit.errors import UserError
from rlkit.rollouts.vllm.endpoint import started_with
from rlkit.rollouts.vllm.weights import Weights


class NCCLSender:
    """Sends weights to servers that take them over NCCL. It keeps copies of them."""

    def __init__(self) -> None:
        self._clients: dict[str, Any] = {}
        self._tensors: list[tuple[str, torch.Tensor]] = []

    def reaches(self, urls: Sequence[str]) -> bool:
        """Whether this process has a GPU and vLLM, and all servers were started for it."""
        if not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None:
            return False
        return all(_offers_transfer(url) for url in urls)

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], label: str) -> tuple[Weights, int]:
        """Take tensors; return what they are called and their size in bytes."""
        # Copies: an adapter that is merged for now is unmerged when the last tensor is out.
        self._tensors = [(name, tensor.detach().clone()) for name, tensor in named_tensors]
        return Weights(label, None), sum(tensor.nbytes for _, tensor in self._tensors)

    def send(self, url: str) -> None:
        """Send the tensors to a server; blocks."""
        from trl.generation.vllm_client import VLLMClient

        device = self._tensors[0][1].device
        torch.cuda.set_device(device)  # a thread has its own
        if url not in self._clients:
            client = VLLMClient(base_url=url, group_port=_free_port())
            client.init_communicator(device)
            self._clients[url] = client
        metadata = [(n, str(t.dtype).removeprefix("torch."), list(t.shape)) for n, t in self._tensors]
        self._clients[url].update_named_params(metadata, iter(self._tensors))

    def forget(self, url: str) -> None:
        """Leave the group with a server that is gone."""
        if url in self._clients:
            self._clients.pop(url).close_communicator()


def _offers_transfer(url: str) -> bool:
    try:
        return started_with(url)["weight_transfer_config"] is not None
    except UserError:  # it is down; when it is back it reads files
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
