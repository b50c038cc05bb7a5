"""Import what training needs, then fork for each request of sitecustomize.py: `python server.py SOCKET`.

The server exits when its stdin is closed, which happens at the latest when the test process ends.
"""

import atexit
import fcntl
import gc
import importlib
import os
import pickle
import runpy
import selectors
import signal
import socket
import sys
import threading
from contextlib import suppress

PRELOADED = (
    "accelerate.commands.launch",
    "torch.distributed.run",
    "rlkit.arguments.parse",
    "rlkit.training.grpo",
    "rlkit.training.ranking.rank",
    "rlkit.training.sft",
    "rlkit.training.train",
    "transformers.models.llama.modeling_llama",
)


def serve(path):
    """Fork for each request; return it and its open files in the fork. The server does not return."""
    wakeup, signaled = socket.socketpair()
    signaled.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(signaled.fileno())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    selector = selectors.DefaultSelector()
    for source in (listener, wakeup, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    connections = {}  # by the process id of the fork
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request, files = receive(connection)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.setsid()
                    connection.sendall(os.getpid().to_bytes(4, "big"))
                    for source in (connection, *connections.values(), listener, wakeup, signaled, selector):
                        source.close()
                    return request, files
                for file in files:
                    os.close(file)
                connections[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj is wakeup:
                wakeup.recv(1024)
                report_exits(connections, selector)
            elif key.fileobj is sys.stdin:
                for pid in connections:
                    os.killpg(pid, signal.SIGKILL)
                os._exit(0)
            else:  # the process that sent the request was killed
                selector.unregister(key.fileobj)
                os.killpg(key.data, signal.SIGKILL)


def receive(connection):
    """Return a request, and the descriptors that its open files have here."""
    header, files, _, _ = socket.recv_fds(connection, 4, 250)
    request = connection.recv(int.from_bytes(header, "big"), socket.MSG_WAITALL)
    return pickle.loads(request), files


def report_exits(connections, selector):
    """Send the exit codes of the forks that have exited."""
    while connections:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        connection = connections.pop(pid)
        with suppress(KeyError, OSError):  # the process that sent the request was killed
            selector.unregister(connection)
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        connection.close()


def run(request, files):
    """Run a command as Python does, and exit."""
    command, environment, folder, ignored, descriptors = request
    for number, is_ignored in ignored.items():
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if is_ignored else default)
    # Out of the way first: a file can have the descriptor here that another must get.
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD, 500) for file in files]
    for file in files:
        os.close(file)
    for copy, descriptor in zip(copies, descriptors, strict=True):
        os.dup2(copy, descriptor)
        os.close(copy)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    exit_code = 0
    try:
        execute(command, folder)
    except SystemExit as error:
        exit_code = error.code or 0
        if not isinstance(exit_code, int):
            print(exit_code, file=sys.stderr)
            exit_code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    # What Python does at its end, without the destruction of all objects, which takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def execute(command, folder):
    """Execute a module (-m), code (-c) or a script as `__main__`."""
    if command[0] == "-m":
        sys.path[0] = folder
        sys.argv = command[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.path[0] = ""
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(command[0]))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    for name in ("accelerate.commands.launch", "torch.distributed.run"):
        del sys.modules[name]  # runpy warns about a module that is imported before it is executed
    gc.collect()
    gc.freeze()  # garbage collection in a fork would copy the memory that it shares with this process
    run(*serve(sys.argv[1]))
