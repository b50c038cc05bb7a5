"""Weights for vLLM servers: folders of safetensors that are written atomically.

A folder is in shared memory (/dev/shm) if the servers are on this machine and there is room, otherwise on a
disk that they share. The latest folder is kept, so that a server that restarts can load it.
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
    """Weights that have been pushed to servers.

    Attributes:
        label: Name that a server reports after loading them. It is unique to the push.
        folder: Folder of safetensors, or of a LoRA adapter as peft saves it. None: sent from GPU to GPU.
        adapter: Whether they are a LoRA adapter, on top of the server's initial weights.
    """

    label: str
    folder: Path | None
    adapter: bool = False


class WeightsFolder:
    """The folder in which one process writes weights. It removes the folders of processes that crashed.

    Args:
        parents: Directories to create it in. If one is full, the next is used.
    """

    def __init__(self, parents: Sequence[Path]):
        self.parents = [parent for parent in parents if parent.is_dir()]
        if not self.parents:
            raise UserError(
                f"no directory for weights: none of {', '.join(map(str, parents))} exists; set weights_dir"
            )
        self._roots: dict[Path, tuple[Path, FileLock]] = {}

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: str) -> tuple[Weights, int]:
        """Write tensors with their names in the checkpoint; return the weights and their size in bytes.

        Raises:
            UserError: No directory has enough room.
        """
        total, partial = 0, self._create_partial(0)
        try:
            for number, shard in enumerate(_shards(named_tensors)):
                size = sum(tensor.nbytes for tensor in shard.values())
                partial = self._ensure_room(partial, size)
                save_file(shard, partial / f"model-{number:05}.safetensors")
                total += size
            return self._finish(partial, version, adapter=False), total
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def copy_adapter(self, folder: str | Path, version: str) -> tuple[Weights, int]:
        """Copy an adapter that peft has saved; return the weights and their size in bytes."""
        size = sum(file.stat().st_size for file in Path(folder).iterdir() if file.is_file())
        partial = self._ensure_room(self._create_partial(0), size)
        shutil.copytree(folder, partial, dirs_exist_ok=True)
        return self._finish(partial, version, adapter=True), size

    def remove(self, weights: Weights) -> None:
        """Delete weights that no server needs anymore."""
        if weights.folder is not None:
            shutil.rmtree(weights.folder, ignore_errors=True)

    def close(self) -> None:
        """Delete all weights of this process."""
        for folder, lock in self._roots.values():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        self._roots.clear()

    def _finish(self, partial: Path, version: str, *, adapter: bool) -> Weights:
        # The folder's random suffix makes the label unique: a server may still hold another run's weights.
        label = f"{version}-{partial.name.rpartition('-')[2]}"
        folder = partial.rename(partial.parent / label)  # atomic: servers never see a partial folder
        return Weights(label, folder, adapter)

    def _create_partial(self, index: int) -> Path:
        return Path(tempfile.mkdtemp(dir=self._root(self.parents[index]), prefix="partial-"))

    def _ensure_room(self, partial: Path, size: int) -> Path:
        """Return the folder, moved to the next parent if `size` more bytes do not fit where it is."""
        index = self.parents.index(partial.parent.parent)
        while _free_bytes(self.parents[index]) < size:
            index += 1
            if index == len(self.parents):
                tried = ", ".join(map(str, self.parents))
                raise UserError(
                    f"not enough disk space for weights in {tried}: set weights_dir to a larger directory"
                )
            moved = self._create_partial(index)
            shutil.copytree(partial, moved, dirs_exist_ok=True)
            shutil.rmtree(partial)
            partial = moved
        return partial

    def _root(self, parent: Path) -> Path:
        if parent not in self._roots:
            _remove_abandoned(parent)
            root = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX))
            root.chmod(0o755)  # servers may run as another user
            # Held until `close`. The operating system releases it if the process crashes.
            lock = FileLock(root / "lock")
            lock.acquire()
            self._roots[parent] = root, lock
        return self._roots[parent][0]


def _shards(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[dict[str, torch.Tensor]]:
    """Yield CPU copies of the tensors in shards of about `SHARD_BYTES`, so that few are in memory at once."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named_tensors:
        # Copy: gathered parameters are freed when the iterator advances, and safetensors rejects tied weights
        # that share memory.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _free_bytes(folder: Path) -> int:
    """Return the number of bytes that may be written; in shared memory, at most half of available memory."""
    free = shutil.disk_usage(folder).free
    # /dev/shm reports its own limit, but what it holds takes memory from all processes.
    meminfo = Path("/proc/meminfo")
    if folder != Path("/dev/shm") or not meminfo.is_file():
        return free
    line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return min(free, int(line.split()[1]) * 1024 // 2)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that crashed: a running process holds the lock of its folder."""
    for folder in parent.glob(PREFIX + "*"):
        try:
            if (folder / "lock").is_file():
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder)
        except (Timeout, OSError):  # the lock of a running process, or another user's folder
            continue
