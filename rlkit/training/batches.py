"""Select, join, shuffle and split batches in the form of TRL's trainer.

A batch is a dict of tensors whose first dimension is `B` rollouts, and of scalars such as
`num_items_in_batch`. `prompt_*` tensors are padded on the left, all others on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

Batch = dict[str, torch.Tensor]


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """Return the rows of a batch with these indices, in that order; scalars are kept."""
    index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
    return {k: v[index.to(v.device)] if _has_rows(v) else v for k, v in batch.items()}


def concatenate(batches: Sequence[Batch], pad_id: int) -> Batch:
    """Join batches along the first dimension; scalars are those of the first batch.

    Shorter sequences are padded to the widest batch, `*_ids` with `pad_id` and all other tensors with 0.
    """
    joined = dict(batches[0])
    for key, value in batches[0].items():
        if _has_rows(value):
            parts = [batch[key] for batch in batches]
            if value.ndim > 1:
                parts = _pad_to_same_width(parts, key, pad_id)
            joined[key] = torch.cat(parts)
    return joined


def _pad_to_same_width(parts: Sequence[torch.Tensor], key: str, pad_id: int) -> list[torch.Tensor]:
    width = max(part.size(1) for part in parts)
    fill = pad_id if key.endswith("_ids") else 0
    missing = [width - part.size(1) for part in parts]
    sides = [(n, 0) if key.startswith("prompt_") else (0, n) for n in missing]
    return [pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)]


def shuffle_groups(batch: Batch, group_size: int, key: Sequence[int]) -> Batch:
    """Permute groups without permuting their rollouts, so that a prompt's forward pass can be shared.

    If a process holds parts of groups, blocks of gcd(rows, group_size) rollouts are permuted: all rollouts of
    a block have the same prompt.

    Args:
        batch: Batch to permute.
        group_size: Number of rollouts of a group.
        key: Random seed, such as the run's seed and the sampling step.
    """
    rows = len(batch["prompt_ids"])
    size = math.gcd(rows, group_size)
    order = np.random.default_rng(list(key)).permutation(rows // size)
    return take(batch, [group * size + i for group in order for i in range(size)])


def split(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch into `parts` batches of equal size."""
    size = len(batch["prompt_ids"]) // parts
    return [take(batch, range(i * size, (i + 1) * size)) for i in range(parts)]


def _has_rows(value: torch.Tensor) -> bool:
    return value.ndim > 0
