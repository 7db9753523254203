"""Where the ranks of a run meet: a key-value store at ``--dist-url``, and what is said while some are missing.

``env://`` means ``MASTER_ADDR`` and ``MASTER_PORT`` (``--dist_port`` where the port is unset); ``tcp://host:port``
and ``file://path`` are used as they are. Rank 0 keeps the store, unless it is a file or torchrun keeps it. Rank 0
says for which ranks it waits, and the others say once on each node that they wait for rank 0, after ``WORD``
seconds and now and then after that.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from training.distributed import launcher, once
from training.distributed.launcher import LaunchedRank

TIMEOUT = timedelta(minutes=30)  # of a job some nodes may start late
WORD = 10.0  # seconds after which it is said what is waited for
_AGAIN = 3.0  # the time to the next word, as a multiple of the time to the last one
_NO_NAME = 20.0  # seconds for which a name that cannot be resolved is looked up again: a host may be starting
_PATIENCE = timedelta(seconds=5)
_SHOWN = 8  # ranks named one by one


class OwnRefusal(ValueError):
    """An error of this rank alone, before the ranks have met."""


@dataclass
class _Meeting:
    """Where the ranks have met, and the name that distinguishes this start from earlier ones there."""

    url: str = "env://"
    host: str = ""
    port: int = 0
    start: str = ""


_met = _Meeting()


def meet(url: str, port: str, place: LaunchedRank) -> dist.Store:
    """The store where all ranks have met, with names of this start alone. ``port``: where MASTER_PORT is not set.

    ValueError: an address that is none, a port that is taken; ranks that have not come within ``TIMEOUT``.
    """
    where = _find(url, port, place)
    store = _open(where, place)
    _met.start = _agree_on_start(store, place, where)
    return dist.PrefixStore(_met.start, store)


def reconnect() -> dist.Store:
    """A new connection to the store where the ranks have met.

    RuntimeError, LookupError: it is gone, or the ranks have not met. Waits forever if its process is stopped.
    """
    if not _met.start:
        raise LookupError("the ranks have not met")
    store: dist.Store
    if _met.url.startswith("file:"):
        store = dist.FileStore(_met.url.partition("://")[2], dist.get_world_size())
    else:
        store = dist.TCPStore(_met.host, _met.port, timeout=_PATIENCE, wait_for_workers=False)
    return dist.PrefixStore(f"{_met.start}/failures", store)


def ends_with_rank_0() -> bool:
    """Whether the store where the ranks have met ends with rank 0."""
    return not (_met.url.startswith("file:") or (_met.url == "env://" and _launcher_has_store()))


@dataclass(frozen=True)
class _Where:
    """An address, ``file`` or ``host`` and ``port``, and what gives it, as a user calls it."""

    file: str = ""
    host: str = ""
    port: int = 0
    host_name: str = ""
    port_name: str = ""

    def __str__(self) -> str:
        if self.file:
            return f"the file {self.file} (--dist-url)"
        names = " and ".join(dict.fromkeys((self.host_name, self.port_name)))
        return f"{self.host}:{self.port} ({names})"


def _find(url: str, port: str, place: LaunchedRank) -> _Where:
    _met.url = url
    scheme, _, rest = url.partition("://")
    given = os.environ.pop("MASTER_PORT", "").strip()  # torch reads it too, and fails if it is empty or wrong
    if scheme == "file":
        if not Path(rest).parent.is_dir():
            raise ValueError(f"--dist-url {url}: there is no folder {Path(rest).parent}; create it")
        return _Where(file=rest)
    if scheme == "tcp":
        host, _, last = rest.rpartition(":")
        number = launcher.check_port(last, f"the port in --dist-url {url}")
        host = launcher.check_host(host, f"the host in --dist-url {url}")
        where = _Where(host=host, port=number, host_name="--dist-url", port_name="--dist-url")
    else:
        number = launcher.check_port(given or port, "MASTER_PORT" if given else "--dist_port")
        os.environ["MASTER_PORT"] = str(number)
        assert place.host is not None, "``find_place`` has found it"
        port_name = "MASTER_PORT" if given else "--dist_port or MASTER_PORT"
        where = _Where(host=place.host, port=number, host_name="MASTER_ADDR", port_name=port_name)
    _met.host, _met.port = where.host, where.port
    return where


def _open(where: _Where, place: LaunchedRank) -> dist.Store:
    if where.file:
        try:
            return dist.FileStore(where.file, place.world_size)
        except RuntimeError as error:
            raise ValueError(f"the ranks cannot meet at {where}: {_first_line(error)}") from None
    _resolve(where)
    if place.rank == 0 and ends_with_rank_0():
        return _serve(where)
    return _connect(where)


def _resolve(where: _Where) -> None:
    """ValueError: the host's name cannot be resolved, and is looked up for a while before that."""
    begun = time.monotonic()
    while True:
        try:
            socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        what = f"{where.host_name} is {where.host!r}, a host name that cannot be resolved here ({reason})"
        if time.monotonic() - begun > _NO_NAME:
            raise ValueError(f"{what}: give the name or address of the host of rank 0")
        once.say(f"{what}: tried again for {_NO_NAME:.0f} s")
        time.sleep(1.0)


def _serve(where: _Where) -> dist.Store:
    """The store, kept by this process. OwnRefusal: its port cannot be used."""
    try:
        return dist.TCPStore(
            "localhost", where.port, is_master=True, timeout=TIMEOUT, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        taken = "EADDRINUSE" in str(error)
        why = "another program on this machine uses it" if taken else _first_line(error)
        raise OwnRefusal(
            f"rank 0 cannot listen at port {where.port} ({where.port_name}): {why}; choose another port, the same "
            "for all ranks" + (" (MASTER_PORT=PORT sbatch ...)" if launcher.slurm_job() else "")
        ) from None


def _connect(where: _Where) -> dist.Store:
    """A connection to the store, when it is there. ValueError: it does not come."""
    word = _Word()
    while True:
        try:
            socket.create_connection((where.host, where.port), timeout=5.0).close()
            break
        except OSError as error:
            word.say(f"rank 0, which should listen at {where}: {error.strerror or error}")
        time.sleep(0.2)
    try:
        with word.meanwhile(f"rank 0: what listens at {where} does not answer as rank 0 would"):
            return dist.TCPStore(where.host, where.port, timeout=TIMEOUT, wait_for_workers=False)
    except dist.DistError as error:
        raise ValueError(
            f"what listens at {where} is not the store of rank 0 ({_first_line(error)}): choose another port, the "
            "same for all ranks"
        ) from None


def _launcher_has_store() -> bool:
    """Whether torchrun keeps the store of ``env://``, across restarts of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agree_on_start(store: dist.Store, place: LaunchedRank, where: _Where) -> str:
    """A name for this start of the ranks, which rank 0 chooses and all other ranks receive.

    torchrun may restart ranks with the store of their predecessors, which holds addresses of dead processes
    (pytorch issue 135712), and its count of restarts is not the same on all nodes; a file may be left of an
    earlier run. So each rank asks under a name that has never been used, and rank 0 answers until all have
    confirmed; earlier requests are of dead processes.
    """
    word = _Word()
    if place.rank > 0:
        own = uuid.uuid4().hex
        store.set(f"asks/{place.rank}", own)
        with word.meanwhile(f"rank 0, or for another that rank 0 waits for; the ranks meet at {where}"):
            store.wait([f"answer/{own}"], TIMEOUT)
        start = store.get(f"answer/{own}").decode()
        store.set(f"{start}/has/{place.rank}", "")
        return start
    start, missing = uuid.uuid4().hex, set(range(1, place.world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"{start}/has/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", start)
        word.say(f"{_ranks(missing)} of {place.world_size}; the ranks meet at {where}")
        time.sleep(0.02)
    return start


class _Word:
    """Says what this process waits for: after ``WORD`` seconds, and ever more rarely after that."""

    def __init__(self) -> None:
        self._begun, self._next = time.monotonic(), WORD

    def say(self, what: str) -> None:
        """Say that this process waits for ``what``, if it is time to. ValueError: it has waited long enough."""
        waited = time.monotonic() - self._begun
        if waited > TIMEOUT.total_seconds():
            raise ValueError(f"after {waited / 60:.0f} minutes the run still waits for {what}")
        if waited > self._next:
            once.say(f"waiting for {what} ({self._next:.0f} s so far)")
            self._next *= _AGAIN

    @contextmanager
    def meanwhile(self, what: str) -> Iterator[None]:
        """Say that this process waits for ``what`` during the body, which does not return."""
        done = threading.Event()

        def run() -> None:
            with suppress(ValueError):
                while not done.wait(1.0):
                    self.say(what)

        threading.Thread(target=run, daemon=True).start()
        try:
            yield
        finally:
            done.set()


def _ranks(numbers: Collection[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:_SHOWN]))
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ")
