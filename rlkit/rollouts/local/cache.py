"""A cache for sampling that is written in place: transformers' own is copied for every new token."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer (B, K, S, D) with room for more tokens behind them.

    Args:
        layer: the layer of the prompts' cache, (U, K, P, D).
        rows: (B,) the prompt of each row.
        room: tokens to come.
    """

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor, room: int):
        super().__init__()
        assert layer.keys is not None and layer.values is not None  # the prompts have been computed
        # Under autocast attention would bring both to this type again and again.
        device = layer.values.device.type
        self.dtype = layer.values.dtype
        if torch.is_autocast_enabled(device):
            self.dtype = torch.get_autocast_dtype(device)
        self.device = layer.values.device
        self._keys, self._values = (self._reserve(x, rows, room) for x in (layer.keys, layer.values))
        self.is_initialized = True
        self._show(layer.keys.size(2))

    def _reserve(self, prompts: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
        _, heads, length, dim = prompts.shape
        table = prompts.new_empty(len(rows), heads, length + room, dim, dtype=self.dtype)
        table[:, :, :length] = prompts[rows]
        return table

    def _show(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, K, T, D); return all there is."""
        start = self.get_seq_length()
        end = start + key_states.size(2)
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._show(end)
        return self._keys[:, :, :end], self._values[:, :, :end]


def is_plain(cache: Cache) -> bool:
    """Whether every layer of the cache keeps plain keys and values, so that its rows can be repeated.

    Sliding-window, linear-attention and quantised layers keep something else.
    """
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def with_room(cache: DynamicCache, rows: torch.Tensor, room: int) -> DynamicCache:
    """Turn a plain cache of U prompts into one of B rows with room for `room` tokens each."""
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = RoomyLayer(layer, rows, room)  # type: ignore[arg-type]
    return cache
