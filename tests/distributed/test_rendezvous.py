"""Where ranks meet, on real sockets: a port in use, a host that is not there, ranks that do not come."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import torch.distributed as dist

from tests.support.ranks import free_port
from training.distributed import rendezvous
from training.distributed.launcher import LaunchedRank
from training.distributed.rendezvous import OwnRefusal


def rank(number: int, host: str | None = "127.0.0.1") -> LaunchedRank:
    return LaunchedRank(number, 2, number, 2, host)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(rendezvous, "_met", rendezvous._Meeting())
    for name in ("MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def both_meet(url: str, port: str) -> None:
    """Rank 0 and rank 1 meet, in two threads, and each reads what the other has written."""
    stores: dict[int, dist.Store] = {}
    threads = [
        threading.Thread(target=lambda n=n: stores.update({n: rendezvous.meet(url, port, rank(n))}), daemon=True)
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    stores[0].set("word", "of rank 0")
    assert stores[1].get("word") == b"of rank 0"


def test_ranks_meet_at_a_port_a_url_and_a_file(tmp_path, monkeypatch):
    both_meet("env://", str(free_port()))
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    both_meet("env://", "1")  # MASTER_PORT goes first
    both_meet(f"tcp://localhost:{free_port()}", "1")
    for _ in range(2):  # what is left of an earlier run does not matter
        both_meet(f"file://{tmp_path}/store", "1")


def test_a_port_that_is_taken_is_told_at_once(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for name, by_flag, by_variable in (("--dist_port or MASTER_PORT", port, ""), ("MASTER_PORT", "1", port)):
            monkeypatch.setenv("MASTER_PORT", by_variable)
            with pytest.raises(OwnRefusal) as refused:
                rendezvous.meet("env://", by_flag, rank(0))
            assert str(refused.value) == (
                f"rank 0 cannot listen at port {port} ({name}): another program on this machine uses it; choose "
                "another port, the same for all ranks"
            )


@pytest.mark.parametrize(
    ("url", "port", "master_port", "sentence"),
    [
        ("env://", "0", "", "--dist_port is '0': it must be the number of a port"),
        ("env://", "29500", "http", "MASTER_PORT is 'http'"),
        ("env://", "29500", "70000", "MASTER_PORT is '70000'"),
        ("tcp://h", "1", "", "the port in --dist-url tcp://h is 'h'"),
        ("tcp://h1,h2:29500", "1", "", "the host in --dist-url tcp://h1,h2:29500 is 'h1,h2', a list"),
        ("file:///nowhere/store", "1", "", "--dist-url file:///nowhere/store: there is no folder /nowhere"),
    ],
)
def test_addresses_that_are_none(monkeypatch, url, port, master_port, sentence):
    monkeypatch.setenv("MASTER_PORT", master_port)
    with pytest.raises(ValueError) as refused:
        rendezvous.meet(url, port, rank(0))
    assert sentence in str(refused.value)


def test_a_name_that_cannot_be_resolved_is_said_at_once_and_refused_soon(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "_NO_NAME", 0.5)
    with pytest.raises(ValueError, match=r"^MASTER_ADDR is 'no-such-host\.invalid', a host name that cannot be"):
        rendezvous.meet("env://", "29500", rank(1, "no-such-host.invalid"))
    assert capfd.readouterr().err.startswith("MASTER_ADDR is 'no-such-host.invalid', a host name that cannot be")


class Clock:
    """A clock that goes on by what is slept."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_who_waits_says_for_whom(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "WORD", 0.3)
    monkeypatch.setattr(rendezvous, "TIMEOUT", rendezvous.timedelta(seconds=1.2))
    monkeypatch.setattr(rendezvous, "time", Clock())
    port = str(free_port())
    for number, who in ((1, f"rank 0, which should listen at 127.0.0.1:{port}"), (0, "rank 1 of 2")):
        with pytest.raises(ValueError, match=f"still waits for {who}"):
            rendezvous.meet("env://", port, rank(number))
        words = capfd.readouterr().err.splitlines()
        assert [word.startswith(f"waiting for {who}") for word in words] == [True, True]  # after 0.3 and 0.9 s


def test_something_else_that_listens_there_is_told(monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "WORD", 0.5)
    monkeypatch.setattr(rendezvous, "TIMEOUT", rendezvous.timedelta(seconds=6))
    told: list[ValueError] = []

    def meet(port: int) -> None:
        try:
            rendezvous.meet("env://", str(port), rank(1))
        except ValueError as error:
            told.append(error)

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        silent = threading.Thread(target=meet, args=(port,), daemon=True)
        silent.start()
        other.accept()[0].close()  # looks whether somebody listens
        connection = other.accept()[0]
        said, deadline = "", time.monotonic() + 60
        while "waiting for rank 0: what listens at 127.0.0.1" not in said and time.monotonic() < deadline:
            said += capfd.readouterr().err
            time.sleep(0.05)
        assert "waiting for rank 0: what listens at 127.0.0.1" in said
    connection.close()
    silent.join(60)
    assert f"what listens at 127.0.0.1:{port}" in str(told[0]) and "is not the store of rank 0" in str(told[0])


def test_ranks_are_named_but_not_all():
    assert rendezvous._ranks({3}) == "rank 3"
    assert rendezvous._ranks(range(1, 64)) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 55 more"


def test_a_torchrun_store_is_not_kept_by_rank_0(monkeypatch):
    assert rendezvous.ends_with_rank_0()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert not rendezvous.ends_with_rank_0()
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
