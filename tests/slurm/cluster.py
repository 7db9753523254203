"""A Slurm of two nodes on this machine: munged, slurmctld, two slurmd, in a folder and on ports of their own.

    with Cluster(tmp_path) as cluster:
        job = cluster.run("sbatch", "--parsable", "script.sh").strip()

A job that is queued again waits until its old credential has expired, and 5 s is the least Slurm takes for that.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
# Names of nodes are what ranks look for rank 0 under: these lead back to this machine.
NODES = ("127.0.0.1", "127.0.0.2")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
KillWait=5
MinJobAge=300
SchedulerParameters=sched_interval=1,sched_min_interval=100000,batch_sched_delay=0,requeue_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN\n"


def missing() -> str | None:
    """Why there can be no cluster here; None: there can."""
    lacking = [program for program in PROGRAMS if _find(program) is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)}): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Cluster:
    """The daemons, ended with the context. ``env``: of commands that are to speak to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # jobs run this Python
        self.env = {**_plain(os.environ), "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self._daemons: list[subprocess.Popen] = []

    def run(self, *command: object, timeout: float = 30, **env: str) -> str:
        """What ``command`` prints; it has to succeed."""
        words = list(map(str, command))
        done = subprocess.run(words, env=self.env | env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", "--user", getpass.getuser(), timeout=5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def processes(self) -> list[int]:
        """Everything that the daemons have started: it has their configuration in its environment."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"SLURM_CONF={self.folder}/".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(NODES))
        conf = CONF.format(host=host, user=getpass.getuser(), folder=self.folder, ctld_port=ports[0])
        for name, port in zip(NODES, ports[1:], strict=True):
            conf += NODE.format(name=name, host=host, port=port)
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        own = {f"{name}-file": self.folder / f"munge.{name}" for name in ("key", "log", "pid", "seed")}
        options = [f"--{name}={path}" for name, path in own.items()]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *options)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        states = ("sinfo", "--noheader", "--Node", "--format=%t")
        self._until(lambda: self.run(*states).split() == ["idle"] * len(NODES), "idle nodes")

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self._daemons)}.out", "wb") as out:
            words = [_find(command[0]), *command[1:]]
            self._daemons.append(subprocess.Popen(words, env=self.env, stdout=out, stderr=out))

    def _until(self, ready, what: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(AssertionError):
                if ready():
                    return
            ended = [d.args[0] for d in self._daemons if d.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(f"{f.name}: {f.read_text()[-1500:]}" for f in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"no {what} after {seconds:.0f} s, ended: {ended}\n{logs}")
            time.sleep(0.2)


def _plain(env) -> dict[str, str]:
    """``env`` without what a launcher that this test itself runs under has put there."""
    own = ("SLURM", "SBATCH", "SRUN", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "PYTHONPATH")
    return {name: value for name, value in env.items() if not name.startswith(own)}


def _find(program: str) -> str | None:
    """Daemons are in folders that are not everybody's."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
