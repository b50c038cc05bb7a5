"""A command in a fork of the fork server is like any other process: arguments, streams, signals, exit."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("forked_commands")
SLEEP = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(7))
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(300)
"""


def test_fork_has_the_arguments_environment_folder_and_streams_of_its_command(tmp_path):
    script = tmp_path / "script.py"
    values = "sys.argv, os.environ['A'], os.getcwd(), sys.path[0], input(), 'trl' in sys.modules"
    script.write_text(f"import json, os, sys\nprint(json.dumps([{values}]))")
    result = subprocess.run(
        [sys.executable, str(script), "x", "--y"],
        input="line\n",
        env=os.environ | {"A": "b"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = str(tmp_path)
    assert json.loads(result.stdout) == [[str(script), "x", "--y"], "b", folder, folder, "line", True]


@pytest.mark.parametrize(
    ("code", "exit_code", "stderr"),
    [
        ("", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('a message')", 1, "a message\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM, ""),
        ("import atexit, sys; atexit.register(lambda: print('end', file=sys.stderr))", 0, "end\n"),
    ],
)
def test_command_exits_like_its_fork(code, exit_code, stderr):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (exit_code, stderr)


def test_exception_in_a_fork_is_printed():
    result = subprocess.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGUSR1, 7), (signal.SIGKILL, -signal.SIGKILL)])
def test_signal_to_a_command_reaches_its_fork(tmp_path, number, exit_code):
    path = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", SLEEP, str(path)], start_new_session=True)
    wait_until(lambda: path.exists() and path.read_text(), process=process)
    process.send_signal(number)
    assert process.wait() == exit_code
    wait_until(lambda: not psutil.pid_exists(int(path.read_text())))


def test_signal_that_a_command_ignores_is_ignored_until_its_fork_handles_it(tmp_path):
    """Pytest's process ignores SIGUSR1 after a run in it, and its children inherit that."""
    path = tmp_path / "pid"
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        code = "import signal; print(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN)"
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        process = subprocess.Popen([sys.executable, "-c", SLEEP, str(path)])
    finally:
        signal.signal(signal.SIGUSR1, previous)
    wait_until(lambda: path.exists() and path.read_text(), process=process)
    process.send_signal(signal.SIGUSR1)
    assert (output, process.wait()) == ("True\n", 7)


def test_process_of_multiprocessing_is_a_fork_with_its_pipes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, sys\n\n\ndef is_fork(x):\n    return x, 'trl' in sys.modules\n\n\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(2) as pool:\n"
        "        print(pool.map(is_fork, [1, 2, 3]))\n"
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert result.stdout == "[(1, True), (2, True), (3, True)]\n"


def test_killed_command_takes_its_children_with_it(tmp_path):
    """As `killpg` does without forks."""
    path = tmp_path / "pid"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}, sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], start_new_session=True)
    wait_until(lambda: path.exists() and path.read_text(), process=process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(int(path.read_text())))


def test_process_that_inherits_another_pipe_is_not_a_fork():
    reader, writer = os.pipe()
    code = f"import os, sys; os.write({writer}, str('trl' in sys.modules).encode())"
    subprocess.run([sys.executable, "-c", code], pass_fds=[writer], check=True)
    assert os.read(reader, 10) == b"False"
    os.close(reader)
    os.close(writer)
