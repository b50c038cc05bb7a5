"""Weights on their way to vLLM servers: a folder of safetensors that is written whole or not at all.

A folder is in memory (/dev/shm) where the servers are on this machine and there is room, else on a disk that
they share. The last one is kept: a server that starts anew loads it from there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file

from rlkit.errors import UserError

PREFIX = "rlkit-weights-"
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Weights:
    """Weights that servers are to have.

    Attributes:
        label: what a server that has loaded them calls them; no two pushes have the same.
        folder: safetensors, or a LoRA adapter as peft saves it; None: sent from GPU to GPU.
        adapter: they are a LoRA adapter over the weights that the server started with.
    """

    label: str
    folder: Path | None
    adapter: bool = False


class WeightsFolder:
    """Where one process puts weights. Folders that dead processes left behind are removed.

    Args:
        parents: folders to make it in, the next where one has no room.
    """

    def __init__(self, parents: Sequence[Path]):
        self.parents = [parent for parent in parents if parent.is_dir()]
        if not self.parents:
            raise UserError(f"there is no folder {', '.join(map(str, parents))} to put weights in")
        self._made: dict[Path, tuple[Path, FileLock]] = {}

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> tuple[Weights, int]:
        """Write tensors under the names of the checkpoint; return the weights and their size in bytes.

        Raises:
            UserError: no folder has room.
        """
        total, partial = 0, self._fresh(0)
        try:
            for number, shard in enumerate(_shards(named_tensors)):
                size = sum(tensor.nbytes for tensor in shard.values())
                partial = self._with_room(partial, size)
                save_file(shard, partial / f"model-{number:05}.safetensors")
                total += size
            return self._finish(partial, version, adapter=False), total
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def copy_adapter(self, folder: str | Path, version: str) -> tuple[Weights, int]:
        """Copy an adapter that peft has saved; return it and its size in bytes."""
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
        partial = self._with_room(self._fresh(0), size)
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        return self._finish(partial, version, adapter=True), size

    def remove(self, weights: Weights) -> None:
        """Delete weights that no server needs any more."""
        if weights.folder is not None:
            shutil.rmtree(weights.folder, ignore_errors=True)

    def close(self) -> None:
        """Delete everything."""
        for folder, lock in self._made.values():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        self._made.clear()

    def _finish(self, partial: Path, version: str, *, adapter: bool) -> Weights:
        # The random part of the folder's name: a server may still have the weights of another run.
        label = f"{version}-{partial.name.rpartition('-')[2]}"
        folder = partial.rename(partial.parent / label)
        return Weights(label, folder, adapter)

    def _fresh(self, place: int) -> Path:
        return Path(tempfile.mkdtemp(dir=self._root(self.parents[place]), prefix="partial-"))

    def _with_room(self, partial: Path, size: int) -> Path:
        """Return the folder, moved to the next place if `size` bytes more do not fit where it is."""
        place = self.parents.index(partial.parent.parent)
        while _room(self.parents[place]) < size:
            place += 1
            if place == len(self.parents):
                tried = ", ".join(map(str, self.parents))
                raise UserError(f"there is no room for weights in {tried}: name a folder with room for them")
            moved = self._fresh(place)
            shutil.copytree(partial, moved, dirs_exist_ok=True)
            shutil.rmtree(partial)
            partial = moved
        return partial

    def _root(self, parent: Path) -> Path:
        if parent not in self._made:
            _remove_abandoned(parent)
            root = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
            root.chmod(0o755)  # servers may run as somebody else
            lock = FileLock(root / "lock")
            lock.acquire()
            self._made[parent] = root, lock
        return self._made[parent][0]


def _shards(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        # A copy: gathered parameters are gone in the next step, tied ones may not share memory in a file.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _room(folder: Path) -> int:
    """Bytes that may be written; of a folder in memory, half of what the machine has available."""
    free = shutil.disk_usage(folder).free
    meminfo = Path("/proc/meminfo")
    if folder != Path("/dev/shm") or not meminfo.is_file():
        return free
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(free, int(line.split()[1]) * 1024 // 2)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(PREFIX + "*"):
        try:
            if (folder / "lock").is_file():
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder)
        except (Timeout, OSError):  # somebody's who lives, or not ours
            continue
