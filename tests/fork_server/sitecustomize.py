"""Start Python commands as forks of a process that has imported TRL, which saves 10 seconds of imports.

Python imports this file when it starts if its folder is in PYTHONPATH. If FORK_SERVER names the socket of
server.py, and the command can run in a fork, the server forks a process that runs it with this process's
arguments, environment, working directory and standard streams. This process forwards signals, waits and exits
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


def can_fork(command):
    """Return whether a command can run in a fork: -m, -c or a script, and all that follows."""
    if command[0] == "-m":
        is_heavy = command[1] in MODULES
    else:
        is_heavy = command[0] == "-c" or command[0].endswith(".py")
    # A fork would not inherit the pipes of a process of multiprocessing, or of a reward worker.
    descriptors = os.listdir("/proc/self/fd")  # with the one that lists the folder
    return is_heavy and len(descriptors) == 4 and {"0", "1", "2"} < set(descriptors)


def run_in_fork(address, command):
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
    request = pickle.dumps((command, dict(os.environ), os.getcwd(), ignored))
    socket.send_fds(connection, [len(request).to_bytes(4, "big")], [0, 1, 2])
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
    start = 2 if sys.orig_argv[1:2] == ["-u"] else 1
    if sys.orig_argv[start:] and can_fork(sys.orig_argv[start:]):
        run_in_fork(os.environ["FORK_SERVER"], sys.orig_argv[start:])
