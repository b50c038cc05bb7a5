"""A key-value cache with preallocated memory. transformers' own reallocates and copies it for every token."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values of one layer, (B, K, S, D), in buffers that have room for the tokens to come.

    Args:
        layer: Layer of the cache of U distinct prompts, (U, K, P, D).
        rows: (B,) index of each row's prompt.
        room: Number of tokens to reserve memory for.
    """

    def __init__(self, layer: DynamicLayer, rows: torch.Tensor, room: int):
        super().__init__()
        assert layer.keys is not None and layer.values is not None  # the prompts have been computed
        # Store the autocast type. Otherwise attention would convert the whole cache at every token.
        device = layer.values.device.type
        self.dtype = layer.values.dtype
        if torch.is_autocast_enabled(device):
            self.dtype = torch.get_autocast_dtype(device)
        self.device = layer.values.device
        self._key_buffer, self._value_buffer = (
            self._allocate(prompts, rows, room) for prompts in (layer.keys, layer.values)
        )
        self.is_initialized = True
        self._set_length(layer.keys.size(2))

    def _allocate(self, prompts: torch.Tensor, rows: torch.Tensor, room: int) -> torch.Tensor:
        _, heads, length, dim = prompts.shape
        buffer = prompts.new_empty(len(rows), heads, length + room, dim, dtype=self.dtype)
        buffer[:, :, :length] = prompts[rows]
        return buffer

    def _set_length(self, length: int) -> None:
        # `keys` and `values` are transformers' attributes: views of the tokens so far, without a copy.
        self.keys, self.values = self._key_buffer[:, :, :length], self._value_buffer[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, K, T, D) in place; return those of all tokens so far (B, K, S, D)."""
        start = self.get_seq_length()
        end = start + key_states.size(2)
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self._set_length(end)
        return self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]


def has_only_dynamic_layers(cache: Cache) -> bool:
    """Return whether every layer stores plain keys and values, so that its rows can be repeated.

    Sliding-window, linear-attention and quantized layers store other state.
    """
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def preallocate(cache: DynamicCache, rows: torch.Tensor, room: int) -> DynamicCache:
    """Expand a cache of U prompts to B rows in place, each with memory for `room` more tokens.

    Args:
        cache: Cache of the prompts; `has_only_dynamic_layers` must be true of it.
        rows: (B,) index of each row's prompt.
        room: Number of tokens to reserve memory for.
    """
    for i, layer in enumerate(cache.layers):
        cache.layers[i] = PreallocatedCacheLayer(layer, rows, room)  # type: ignore[arg-type]
    return cache
