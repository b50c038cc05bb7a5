"""A real single-node Slurm cluster for tests: munge, controller and node daemon with all files in one folder.

It requires root and Debian's packages slurm-wlm and munge, and leaves the rest of the machine alone: it uses
free ports, clients find it through SLURM_CONF, and it stops only the processes that it started.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=60
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing_requirements() -> list[str]:
    """Return what this machine lacks to run the cluster: names of programs, and "root"."""
    requirements = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if os.geteuid() != 0:
        requirements.append("root")
    return requirements


class Slurm:
    """Context manager that starts and stops the cluster.

    Attributes:
        environment: environment variables that clients need.
    """

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder = folder
        self.cpus = cpus
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        ports = {"controller": _free_port(), "daemon": _free_port()}
        text = CONFIG.format(
            host=socket.gethostname().split(".")[0], folder=self.folder, cpus=self.cpus, **ports
        )
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        key, munge = self.folder / "munge.key", self.folder / "munge"
        self.run("mungekey", "--create", f"--keyfile={key}")
        files = {"key-file": key, "socket": f"{munge}.socket", "pid-file": f"{munge}.pid"}
        files |= {"log-file": f"{munge}.log", "seed-file": f"{munge}.seed"}
        self._start(
            "munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())
        )
        self._wait("munge", lambda: Path(f"{munge}.socket").exists())
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D")
        self._wait("the node", lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False))

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("w")
        self.processes.append(
            subprocess.Popen(
                command, env=os.environ | self.environment, stdout=log, stderr=log, cwd=self.folder
            )
        )

    def _wait(self, name: str, ready) -> None:
        deadline = time.monotonic() + 60
        while not ready():
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                logs = [file.read_text()[-1000:] for file in self.folder.glob("*.out")]
                raise RuntimeError(f"Slurm: {name} did not start: {logs}")
            time.sleep(0.1)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a client command and return its stdout."""
        result = subprocess.run(
            command,
            env=os.environ | self.environment,
            check=check,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return result.stdout

    def __exit__(self, *error) -> None:
        if self.processes[1:]:
            self.run("scancel", "--user=root", check=False)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
