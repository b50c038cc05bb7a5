"""Start Python commands as forks of a process that has imported TRL, which saves 10 seconds of imports.

Python imports this file when it starts if its folder is in PYTHONPATH. If FORK_SERVER names the socket of
server.py, and the command can run in a fork, the server forks a process that runs it with this process's
arguments, environment, working directory and file descriptors. This process forwards signals, waits and exits
as the fork did. If it is killed, the server kills the fork.
"""

import os
import sys

MODULES = (
    "rlkit",
    "accelerate.commands.launch",
    "torch.distributed.run",
    "vllm.entrypoints.launchers.api_server.entry",
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")


def can_fork(command, descriptors):
    """Return whether a command can run in a fork: -m, -c or a script, and all that follows.

    Processes of multiprocessing inherit pipes, and so do reward workers, which import little.
    """
    if command[0] == "-m":
        return command[1] in MODULES
    if command[0] == "-c" and "multiprocessing.spawn" in command[1]:
        return True
    return (command[0] == "-c" or command[0].endswith(".py")) and len(descriptors) == 3


def open_descriptors():
    """Return the file descriptors of this process."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # that of the folder itself
            continue
        descriptors.append(int(name))
    return descriptors


def run_in_fork(address, command, descriptors):
    """Run a command in a fork of the server and exit as it did; return if there is no server."""
    import pickle
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(address)
    except OSError:
        return
    numbers = [getattr(signal, name) for name in SIGNALS]
    ignored = {int(number): signal.getsignal(number) is signal.SIG_IGN for number in numbers}
    request = pickle.dumps((command, dict(os.environ), os.getcwd(), ignored, descriptors))
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], descriptors)
    connection.sendall(request)
    pid = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
    # A signal to the process group that this process leads is meant for the children of the fork, too.
    send = os.killpg if os.getpgrp() == os.getpid() else os.kill
    for number in numbers:
        signal.signal(number, lambda number, _: send(pid, number))
    exit_code = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big", signed=True)
    if exit_code < 0:
        if exit_code != -signal.SIGKILL:
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
    os._exit(exit_code)


if "FORK_SERVER" in os.environ:
    command, descriptors = sys.orig_argv[1:], open_descriptors()
    while command and command[0].startswith("-") and command[0] not in ("-m", "-c"):
        del command[0]  # -u and -B
    if command and can_fork(command, descriptors):
        run_in_fork(os.environ["FORK_SERVER"], command, descriptors)
