"""Rollouts as TRL's trainer holds them: a dict of tensors whose first dimension is `B` rollouts, or scalars.

`prompt_*` tensors are padded on the left, all others on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import pad

Batch = dict[str, torch.Tensor]


def take(batch: Batch, rows: Sequence[int]) -> Batch:
    """The given rows of a batch, in that order."""
    index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
    return {k: v[index.to(v.device)] if _has_rows(v) else v for k, v in batch.items()}


def concatenate(batches: Sequence[Batch], pad_id: int) -> Batch:
    """One batch of several; what is shorter is padded, ids with `pad_id` and all else with 0."""
    joined = dict(batches[0])
    for key, value in batches[0].items():
        if _has_rows(value):
            parts = [batch[key] for batch in batches]
            joined[key] = torch.cat(_same_width(parts, key, pad_id) if value.ndim > 1 else parts)
    return joined


def _same_width(parts: Sequence[torch.Tensor], key: str, pad_id: int) -> list[torch.Tensor]:
    width = max(part.size(1) for part in parts)
    fill = pad_id if key.endswith("_ids") else 0
    missing = [width - part.size(1) for part in parts]
    sides = [(n, 0) if key.startswith("prompt_") else (0, n) for n in missing]
    return [pad(part, side, value=fill) for part, side in zip(parts, sides, strict=True)]


def shuffle_groups(batch: Batch, group_size: int, key: Sequence[int]) -> Batch:
    """Permute whole groups; a group stays together, so that its prompt can be computed once.

    Where a process has parts of groups, blocks of the largest size that divides both are permuted.
    """
    rows = len(batch["prompt_ids"])
    size = math.gcd(rows, group_size)
    order = np.random.default_rng(list(key)).permutation(rows // size)
    return take(batch, [group * size + i for group in order for i in range(size)])


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into equal parts."""
    size = len(batch["prompt_ids"]) // parts
    return [take(batch, range(i * size, (i + 1) * size)) for i in range(parts)]


def _has_rows(value: torch.Tensor) -> bool:
    return value.ndim > 0
