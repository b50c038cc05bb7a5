"""Run rlkit in forks of this process, which kill themselves at a given operation on their files.

An audit hook sees each file that Python opens, renames or deletes. Libraries that write files in C++ or Rust
are wrapped. Nothing is killed by a clock, so a seed determines where a run is killed.
"""

import gc
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import safetensors.torch
import torch
import yaml

from rlkit.commands import main as cli

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
KILLED = -signal.SIGKILL


def run_in_fork(argv, log, at_start=lambda: None):
    """Run a command in a fork and return its exit code; its output is appended to a file."""
    gc.freeze()  # a collection in the child would copy the memory of the libraries
    # A pipe, because the child may be unable to write files.
    output, end = os.pipe()
    pid = os.fork()
    if pid:
        os.close(end)
        with open(output, "rb") as stream, open(log, "ab") as file:
            file.write(stream.read())
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 70
    try:
        os.dup2(end, 1)
        os.dup2(end, 2)
        os.close(end)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        torch.set_num_threads(1)
        sys.argv = ["rlkit", *argv]
        at_start()
        code = cli.main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Operations:
    """The operations on the files of a run directory, recorded by the process of the run.

    Args:
        run: Run directory.
        record: File to record the operations in, one per line: kind, path, and the size of a file that was
            flushed to disk or the new path of one that is renamed.
    """

    def __init__(self, run, record):
        self.run, self.record = Path(run), Path(record)

    def recorded(self):
        """Return all operations as (kind, path, size or new path)."""
        return [tuple(line.split("\t")) for line in self.record.read_text().splitlines()]

    def install(self, call=lambda kind, path: None):
        """Record the operations of this process, and call `call` before each of them."""
        stream = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        prefix = str(self.run)

        def note(kind, path, value=""):
            path = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            if path.startswith(prefix):
                os.write(stream, f"{kind}\t{path}\t{value}\n".encode())
                call(kind, path)

        def audit(event, args):
            if event == "os.rename":
                note(event, args[0], os.fsdecode(args[1]))
            elif event in FILE_EVENTS and not (event == "open" and is_read(*args)):
                note(event, args[0])

        save, save_tensors, fsync = torch.save, safetensors.torch.save_file, os.fsync

        def noted_save(state, file, *args, **kwargs):
            note("torch.save", file)
            save(state, file, *args, **kwargs)
            note("saved", file)

        def noted_save_tensors(tensors, file, *args, **kwargs):
            note("save_file", file)
            save_tensors(tensors, file, *args, **kwargs)
            note("saved", file)

        def noted_fsync(descriptor):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            note("fsync", path)
            fsync(descriptor)
            note("synced", path, os.fstat(descriptor).st_size)

        torch.save, os.fsync = noted_save, noted_fsync
        for module in list(sys.modules.values()):
            for name in ("save_file", "safe_save_file"):
                if vars(module).get(name) is save_tensors:
                    setattr(module, name, noted_save_tensors)
        sys.addaudithook(audit)

    def kill_before(self, number, part=""):
        """Kill this process before its `number`-th operation on a path that contains `part`."""
        count = 0

        def call(kind, path):
            nonlocal count
            count += part in path
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

        self.install(call)

    def signal_before(self, numbers, part):
        """Send signals to this process before its first operations on paths that contain `part`."""
        numbers = list(numbers)

        def call(kind, path):
            if part in path and numbers:
                os.kill(os.getpid(), numbers.pop(0))

        self.install(call)


class Run:
    """A run of one kind, which may be killed.

    Args:
        folder: Folder for the run directory, the config and the output.
        name: Name of the run.
        stage: Command of the run.
        keys: Keys of the config.
    """

    def __init__(self, folder, name, stage, keys):
        self.path, self.log = folder / name, folder / f"{name}.log"
        self.operations = Operations(self.path, folder / f"{name}.operations")
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(keys | {"output_dir": str(self.path)}))
        self.argv = [stage, "--config", str(config)]

    def __call__(self, at_start):
        """Start or resume the run in a fork, and return its exit code."""
        resume = ["--resume"] if self.path.exists() else []
        return run_in_fork([*self.argv, *resume], self.log, at_start)


def is_read(path, mode, flags):
    """Return whether `open` only reads, except to flush a file to disk (`os.open`, which has no mode)."""
    return mode is not None and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def files_of(run):
    """Return the inode and the size of each file and folder of a run by path."""
    return {str(path): (path.stat().st_ino, path.stat().st_size) for path in Path(run).rglob("*")}


def truncate_file_being_written(operations, rng):
    """Truncate the file that a killed process wrote last, as if it had been killed in the middle."""
    kind, path, _ = operations[-1]
    if kind == "saved":
        os.truncate(path, rng.randint(0, os.path.getsize(path)))


def lose_power(run, operations, before, rng):
    """Damage what a killed process did not flush to disk, as a power failure may.

    A file has any part of the bytes written since it was last flushed. One that was created since its folder
    was last flushed may not exist.

    Args:
        run: Run directory.
        operations: Operations of the process. It was killed before the last one.
        before: Files before the process started, which are on disk (`files_of`).
        rng: Generator of random numbers.
    """
    sizes, entries = on_disk(operations, before)
    for name, (inode, size) in files_of(run).items():
        if name.endswith(".lock") or before.get(name) == (inode, size):
            continue
        if os.path.isdir(name):
            if name not in entries and rng.random() < 0.3:
                shutil.rmtree(name)
        elif os.path.exists(name):  # its folder may be deleted by now
            if name not in entries and rng.random() < 0.3:
                os.remove(name)
            elif rng.random() < 0.5:
                os.truncate(name, rng.randint(min(sizes.get(name, 0), size), size))


def on_disk(operations, before):
    """Return the flushed size of each file, and the paths whose entries in their folders are flushed."""
    sizes = {path: size for path, (_, size) in before.items()}
    entries = set(before)
    is_done = operations[-1][0] in ("saved", "synced")
    for kind, path, value in operations if is_done else operations[:-1]:
        if kind == "synced" and os.path.isdir(path):
            entries |= {name for name in files_of(path) if os.path.dirname(name) == path}
        elif kind == "synced":
            sizes[path] = int(value)
        elif kind == "os.rename":
            for name in [name for name in sizes if name == path or name.startswith(f"{path}/")]:
                sizes[value + name.removeprefix(path)] = sizes.pop(name)
            entries |= {value + name.removeprefix(path) for name in entries if name.startswith(f"{path}/")}
            if value in before:  # the old file or the new one
                entries.add(value)
        elif kind in ("torch.save", "save_file", "os.remove"):
            sizes.pop(path, None)
    return sizes, entries
