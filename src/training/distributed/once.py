"""Messages that the processes of a launch give once per node, before the ranks have met, without torch."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from training.distributed import launcher

_KEPT = 24 * 3600  # seconds for which a launch's file is kept


def say(line: str, env: Mapping[str, str] = os.environ) -> None:
    """Print ``line`` on stderr, unless another process of this launch on this node has printed it."""
    do(line, lambda: print(line, file=sys.stderr, flush=True), env)


def do(line: str, say: Callable[[], None], env: Mapping[str, str] = os.environ) -> None:
    """Call ``say()``, unless another process of this launch on this node has said ``line``.

    A launcher ends all of its processes when one of them ends. So the first process that gets here speaks, and the
    others wait for it: what has been said is kept in a file, which they lock.
    """
    env = launcher.present(env)
    launch = _launch(env)
    if launch is None:
        say()
        return
    name, since = launch
    entry = hashlib.sha256(line.encode(errors="backslashreplace")).hexdigest()
    try:
        folder = Path(tempfile.gettempdir(), f"drrho-clip-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.lstat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to somebody else")
        for old in folder.iterdir():
            with suppress(FileNotFoundError):  # another launch may do the same
                if time.time() - old.stat().st_mtime > _KEPT:
                    old.unlink()
        with (folder / hashlib.sha256(name.encode()).hexdigest()[:16]).open("a+") as said:
            fcntl.flock(said, fcntl.LOCK_EX)
            said.seek(0)
            entries = [text.split() for text in said]
            if not any(other == entry and float(when) >= since for when, other in entries):
                say()
                said.write(f"{_now()} {entry}\n")
    except (OSError, ValueError):  # better twice than never
        say()


def _launch(env: Mapping[str, str]) -> tuple[str, float] | None:
    """What the processes of a launch on one node have in common, and since when; None: nothing is known.

    Processes started by hand have their shell's session in common, with those that it has started before: what was
    said before this process began does not count.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        agent = _ancestor("TORCHELASTIC_RUN_ID")
        return None if agent is None else (f"{agent} {env.get('TORCHELASTIC_RESTART_COUNT')}", 0.0)
    started_by = next(launcher.launchers(env), None)
    if "SLURM_STEP_ID" in env and started_by in (launcher.SLURM, None):
        return " ".join(env.get(f"SLURM_{key}", "") for key in ("JOB_ID", "STEP_ID", "RESTART_COUNT")), 0.0
    if started_by is not None:
        agent = _ancestor(started_by.rank)
        return None if agent is None else (agent, 0.0)
    begun = _begun(os.getpid()) if "RANK" in env else None
    return None if begun is None else (f"session {os.getsid(0)}", begun)


def _ancestor(variable: str) -> str | None:
    """The closest ancestor that was started without ``variable``, so the one that has set it; None: not known."""
    process = os.getppid()
    try:
        while process > 1:
            with suppress(PermissionError):  # a daemon of another user: it is no copy of this program
                entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                if any(entry.startswith(f"{variable}=".encode()) for entry in entries):
                    process = int(_stat(process)[1])
                    continue
            break
        return f"{process} {_stat(process)[19]}"
    except OSError:
        return None


def _begun(process: int) -> float | None:
    """When ``process`` began, in seconds of the clock of ``_now``, at most a tick too late; None: not known."""
    try:
        return (int(_stat(process)[19]) + 1) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _stat(process: int) -> list[str]:
    """What /proc knows of ``process``, from its state on."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
