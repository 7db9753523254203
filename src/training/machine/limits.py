"""How many processes a run can start here and how much memory it can have, and whether its processes can talk."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Listener
from pathlib import Path

from training.machine.prepare import Unfit, temporary_folder


def check_sockets() -> None:
    """Unfit: the temporary folder takes no sockets, over which loader processes hand on their batches."""
    try:
        with Listener(family="AF_UNIX"):
            pass
    except OSError as error:
        raise Unfit(
            f"--workers: loader processes need sockets in the temporary folder {temporary_folder()}, and none can "
            f"be made there ({error.strerror or error}): set TMPDIR to a folder with a short name on this "
            "machine's own disk, such as /tmp, or give --workers 0"
        ) from error


def check_open_files(workers: int) -> None:
    """Unfit: this process may not open as many files as ``workers`` loader processes need, by measurement."""
    needed, limit = 16 + 8 * workers, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise Unfit(
            f"--workers {workers}: as many loader processes need at least {needed} open files, and the limit is "
            f"{limit}: raise it (ulimit -n), or give fewer --workers"
        )


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process can keep busy: those that it may run on, or fewer by the CPU time that it gets.

    A container's limit (``docker --cpus``, Kubernetes) is one on time: the process sees all cores, and is stopped
    for a while when it has used up its share of them. ``groups``, ``own``: where Linux shows control groups.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(groups, own))]))


def memory(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process and the others of its control group can have: the machine's, or fewer.

    ``groups``, ``own``: as for ``cores``.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = []
    for folder, first in _control_groups("memory", groups, own):
        for name in ("memory.limit_in_bytes",) if first else ("memory.max", "memory.high"):
            with suppress(OSError, ValueError):  # ValueError: "max", no limit
                limits.append(int((folder / name).read_text()))
    return min([machine, *limits])


def available_memory(told: Path = Path("/proc/meminfo")) -> float:
    """Bytes of memory of the machine that are free or could be. Infinity where Linux does not tell it."""
    with suppress(OSError, ValueError, IndexError):
        return 1024 * int(told.read_text().split("MemAvailable:")[1].split()[0])
    return math.inf


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """The limits on CPU time, in cores, of this process's control group and of those around it."""
    for folder, first in _control_groups("cpu", groups, own):
        with suppress(OSError, ValueError):  # ValueError: "max", no limit
            if first:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0:
                yield int(quota) / int(period)


def _control_groups(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control group for ``controller`` and of those around it, from the inside.

    And whether each is of version 1 of control groups; else of version 2.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = groups / controller if controllers else groups
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            yield folder, bool(controllers)
