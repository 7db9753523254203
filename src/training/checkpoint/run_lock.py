"""The lock of a run's folder: while one run writes there, another one is refused.

The file ``run.lock`` names its holder: host, process, since when. It is removed at the end of the run. A holder
that was killed leaves it behind, and the next run takes it over as soon as it knows that the holder is dead:

* **On the same machine**, the process is looked up: at once. It is known by machine (its boot), space of process
  ids (containers number theirs anew) and time of its start (process ids are used again). Every rank looks, so that
  a run which torchrun has restarted elsewhere finds its predecessor's process if one rank is on that machine.
* **After a requeue by Slurm**, an earlier start of the same job is dead: at once.
* **Elsewhere**, the holder shows that it lives: a thread counts up in the file every ``BEAT`` seconds. If the
  count stands still for ``PATIENCE`` seconds, it is dead. No clocks are compared: those of two hosts may differ.

A holder that could not write for so long, because it was stopped or its file system hung, may find its lock taken
over when it goes on. It then ends at once, as two runs must not write into one folder.

Reading and taking the lock is one step where the file system can lock files (``fcntl``). Elsewhere two runs that
start in the same instant may both believe that they have it; a second later the one that wrote first finds the
other's name.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO

from training.distributed import failures, launcher, once, process_group
from training.distributed.board import FAILED, Board, Unreachable
from training.distributed.collectives import gather_object, on_main, rank_in

_log = logging.getLogger(__name__)

NAME = "run.lock"
BEAT = 5.0  # seconds between two signs of life
PATIENCE = 45.0  # seconds without one after which a holder counts as dead
_FIRST_BEAT = 1.0  # the first one comes early: it shows whether another run has taken the lock in the same instant
_POLL = 0.5  # seconds between two looks at another holder's count
_EXITING = 4  # the kernel's flag PF_EXITING: the process runs no more code of its own
_TURN = 2.0  # seconds to wait for the file, which others hold for an instant


@dataclass(frozen=True)
class Holder:
    """The run that holds a lock.

    ``process``   its process id, in the space of process ids ``pids`` of the machine that was booted as ``boot``.
    ``started``   when the process began, in ticks since the boot.
    ``since``     when it took the lock, by its clock, for people.
    ``job``       its Slurm job; '' outside of Slurm. ``restarts``: how often Slurm had started that job before.
    """

    token: str = ""
    host: str = "unknown"
    process: int = 0
    started: int = 0
    boot: str = ""
    pids: str = ""
    since: str = "an unknown time"
    job: str = ""
    restarts: int = 0

    @classmethod
    def this_process(cls, env: Mapping[str, str] = os.environ) -> Holder:
        """This process as the holder of a new lock."""
        job = launcher.slurm_job(env)
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            process=os.getpid(),
            started=_started(os.getpid()) or 0,
            boot=_boot(),
            pids=_pids(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            job=f"{env.get('SLURM_CLUSTER_NAME', '')}/{job}" if job else "",
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
        )

    @classmethod
    def named_in(cls, content: bytes) -> Holder:
        """The holder that the ``content`` of a lock names; an unknown one if it is not complete."""
        try:
            held = json.loads(content)
            return cls(**{name: type(getattr(cls, name))(held[name]) for name in cls.__dataclass_fields__})
        except (ValueError, LookupError, TypeError):
            return cls()

    def lives(self) -> bool | None:
        """Whether its process is alive; None: this cannot be seen from here."""
        if not self.boot or (self.boot, self.pids) != (_boot(), _pids()):
            return None
        started = _started(self.process)
        if started is not None:
            return started == self.started
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):  # it exists, but /proc does not show other users' processes
            return None
        return None

    def precedes(self, other: Holder) -> bool:
        """Whether it is an earlier start of the Slurm job ``other``, all of which Slurm has ended before that."""
        return bool(self.job) and self.job == other.job and self.restarts < other.restarts

    def __str__(self) -> str:
        return f"process {self.process} on host {self.host}, since {self.since}"


class Held(Exception):
    """Another run, ``holder``, holds the lock and is alive."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(holder)
        self.holder = holder


class RunLock:
    """The lock of one folder, which this run holds. A context manager, which gives it up at its end.

    Rank 0 has it for all ranks. Where the file system does not allow it, there is a warning and no lock.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._own = Holder.this_process()
        self._beats = 0
        self._held = False
        self._created: list[Path] = []  # folders that did not exist before, the innermost first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run lock", daemon=True)

    @classmethod
    def take(cls, folder: Path) -> RunLock:
        """The lock of ``folder``, which is created if need be. Collective. Held, on every rank: it is taken."""
        lock = cls(folder)
        dead: bytes | None = None
        while (found := on_main(partial(lock._try, dead))) is not None:
            holder = Holder.named_in(found)
            seen = gather_object(holder.lives())
            alive = on_main(partial(lock._judge, found, seen))
            if alive:
                raise Held(holder)
            dead = found if alive is False else None
        return lock

    def __enter__(self) -> RunLock:
        if self._held:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held:
            self._ended.set()
            self._thread.join()
            with suppress(OSError):
                self._give_up()
        for folder in self._created:  # of a run that was refused later on, nothing stays
            with suppress(OSError):
                folder.rmdir()

    def _try(self, dead: bytes | None) -> bytes | None:
        """Take the lock if it is free, or reads ``dead``. None: it is taken; else what it reads. On rank 0."""
        while True:
            try:
                self._create_folder()
                found = _read(self._path)
                if found is not None and found != dead:
                    return found
                if self._exchange(found):
                    self._held = True
                    if found:
                        _log.info(
                            "%s is taken over: its holder has ended (%s)", self._path, Holder.named_in(found)
                        )
                    return None
                time.sleep(0.05)
            except OSError as error:
                if not self._path.parent.is_dir() or _read_only(self._path.parent):
                    return None  # the folder cannot be written at all, which ``create_folder`` reports
                _log.warning(
                    "%s: the run's folder cannot be locked (%s); a second run in it would not be noticed",
                    self._path,
                    error,
                )
                return None

    def _judge(self, found: bytes, seen: Sequence[bool | None]) -> bool | None:
        """Whether the holder in ``found`` is alive; None: the lock has changed hands. ``seen``: by each rank."""
        holder = Holder.named_in(found)
        if holder.precedes(self._own):
            return False
        if any(lives is not None for lives in seen):
            return any(seen)
        once.say(
            f"{self._path}: held by {holder}; this run waits up to {PATIENCE:.0f} s to see whether it is alive"
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(_POLL)
            with suppress(OSError):
                now = _read(self._path)
                if now != found:
                    return True if now and Holder.named_in(now) == holder else None
        return False

    def _create_folder(self) -> None:
        new = [folder for folder in (self._path.parent, *self._path.parent.parents) if not folder.exists()]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._created = new or self._created

    def _exchange(self, found: bytes | None) -> bool:
        """Write this run's name if the lock still reads ``found`` (None: there is none); whether it did."""
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if found is None else 0)
        try:
            descriptor = os.open(self._path, flags, 0o666)
        except (FileExistsError, FileNotFoundError):
            return False
        with os.fdopen(descriptor, "r+b", buffering=0) as file:
            _wait_for_turn(file)
            if not _is_at(file, self._path) or (found is not None and file.read() != found):
                return False
            self._write(file)
        return True

    def _write(self, file: IO[bytes]) -> None:
        content = json.dumps({**asdict(self._own), "beats": f"{self._beats:012}"}).encode() + b"\n"
        file.seek(0)
        file.write(content)
        file.truncate(len(content))

    def _keep(self) -> None:
        wait = _FIRST_BEAT
        while not self._ended.wait(wait):
            wait = BEAT
            # Errors of the file system pass, or the run has greater trouble than its lock.
            with suppress(OSError):
                other = self._beat()
                if other is not None:
                    self._lose(other)

    def _beat(self) -> Holder | None:
        """Give a sign of life. Returns another run that has taken the lock over."""
        self._beats += 1
        try:
            file = self._path.open("r+b", buffering=0)
        except FileNotFoundError:  # removed by hand
            self._exchange(None)
            return None
        with file:
            _wait_for_turn(file)
            other = Holder.named_in(file.read())
            if other.token not in ("", self._own.token):
                return other
            if _is_at(file, self._path):
                self._write(file)
        return None

    def _lose(self, other: Holder) -> None:
        reason = (
            f"{self._path}: another run ({other}) has taken over this run's folder, because it saw no sign of "
            f"life from here for {PATIENCE:.0f} s (was this process stopped?); this run ends and saves no more"
        )
        _log.error(reason)
        if process_group.met():
            with suppress(Unreachable):
                Board().first(FAILED, f"rank {rank_in()}: {reason}")
        failures.end(1)

    def _give_up(self) -> None:
        with self._path.open("r+b", buffering=0) as file:
            _wait_for_turn(file)
            if Holder.named_in(file.read()).token == self._own.token and _is_at(file, self._path):
                self._path.unlink()


def living_holder(folder: Path) -> Holder | None:
    """The run that holds the lock of ``folder``, if its process is known to be alive on this machine."""
    with suppress(OSError):
        found = _read(folder / NAME)
        holder = Holder.named_in(found or b"")
        return holder if holder.lives() else None
    return None


def _read(path: Path) -> bytes | None:
    """The content of a lock; None: there is none. One that is being written is waited for."""
    content = b""
    for _ in range(10):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if Holder.named_in(content).token:
            break
        time.sleep(0.05)
    return content


def _read_only(folder: Path) -> bool:
    return not os.access(folder, os.W_OK)


def _wait_for_turn(file: IO[bytes]) -> None:
    """Lock ``file`` against other processes until it is closed, where the file system can do that."""
    end = time.monotonic() + _TURN
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        except OSError:
            return


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether the open ``file`` is still the one called ``path``."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _boot() -> str:
    """What distinguishes this machine, since it was booted, from all others; '': unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pids() -> str:
    """The space in which this process sees process ids; every container has its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(process: int) -> int | None:
    """When ``process`` began, in ticks since the boot; -1: it has ended; None: it cannot be seen."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ended = fields[0] in "ZX" or int(fields[6]) & _EXITING
        return -1 if ended else int(fields[19])
    except (OSError, LookupError, ValueError):
        return None
