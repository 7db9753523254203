"""The rank of this process, from the variables of its launcher, without torch.

A process takes its rank, in this order, from

1. ``RANK`` and ``WORLD_SIZE`` (or ``--world_size``), which torchrun sets, or a user who starts processes by hand;
2. the first of ``LAUNCHERS`` whose rank is set. Those come before Slurm, because mpirun in a Slurm job starts its
   processes among Slurm's variables, while srun sets none of theirs but ``PMI_...`` and ``PMIX_...``;
3. otherwise it is the only process.

A variable that is set to nothing counts as unset.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

LOCALHOST = "127.0.0.1"


@dataclass(frozen=True)
class LaunchedRank:
    """The rank of a process among all and on its node, and the number of ranks in both.

    ``host``: where rank 0 is; None where there is no other rank, or the ranks meet at a URL.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str | None = None


@dataclass(frozen=True)
class Launcher:
    """The names of the variables that a launcher sets, '' for none. ``cure``: how it passes MASTER_ADDR on."""

    name: str
    rank: str
    size: str = ""
    local_rank: str = ""
    local_size: str = ""
    cure: str = "export MASTER_ADDR, the host of rank 0"


BY_HAND = Launcher("RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # torchrun's, too
SLURM = Launcher(
    "Slurm",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    cure="export MASTER_ADDR, the host of rank 0 (scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
)
_MPIRUN = "give mpirun -x MASTER_ADDR=HOST, the host of rank 0 ($(hostname) where mpirun is started on it)"
_MPIEXEC = "give mpiexec -genv MASTER_ADDR HOST, the host of rank 0"


def _named_alike(name: str, prefix: str, cure: str = BY_HAND.cure) -> Launcher:
    rank, size, local_rank, local_size = (prefix + word for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return Launcher(name, rank, size, local_rank, local_size, cure)


LAUNCHERS = (
    _named_alike("Open MPI's mpirun", "OMPI_COMM_WORLD_", _MPIRUN),
    _named_alike("MVAPICH2's mpirun_rsh", "MV2_COMM_WORLD_"),
    _named_alike("MVAPICH's mpirun_rsh", "MVP_COMM_WORLD_"),
    _named_alike("jsrun", "JSM_NAMESPACE_"),
    _named_alike("horovodrun", "HOROVOD_"),
    Launcher("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    Launcher("PALS' mpiexec", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    # srun may set PMI_RANK and PMI_SIZE, but never MPI_LOCALRANKID.
    Launcher("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", _MPIEXEC),
    SLURM,
    Launcher("a PMI launcher", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    Launcher("a PMIx launcher", "PMIX_RANK"),
)
_HYDRA = "MPI_LOCALRANKID"


def rank(env: Mapping[str, str] = os.environ) -> int:
    """The rank of this process; 0 where no launcher has set one."""
    env = present(env)
    for launcher in (BY_HAND, *launchers(env)):
        value = env.get(launcher.rank, "")
        if value.isdecimal():
            return int(value)
    return 0


def launched(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has started this process, or a user by hand as one of several."""
    env = present(env)
    return "RANK" in env or any(True for _ in launchers(env))


def local_rank(env: Mapping[str, str] = os.environ) -> int:
    """Its rank on its node; processes started by hand are assumed to be on one node."""
    env = present(env)
    for launcher in (BY_HAND, *launchers(env)):
        value = env.get(launcher.local_rank, "")
        if value.isdecimal():
            return int(value)
    return rank(env)


def slurm_job(env: Mapping[str, str] = os.environ) -> str | None:
    """The number of the Slurm job that this process belongs to."""
    return env.get("SLURM_JOB_ID")


def slurm_job_alone(env: Mapping[str, str] = os.environ) -> str | None:
    """The name of this job for Slurm's commands: the number of one job of an array may be that of them all."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else slurm_job(env)


# ------------------------------------------------------------------------------------------------------- the rank


def find_place(env: Mapping[str, str], world_size: int, by_url: bool) -> LaunchedRank:
    """The rank of this process. ``world_size``: of the flag. ``by_url``: the ranks meet at a URL.

    ValueError: a variable is wrong or missing, variables contradict each other, or the address at which the ranks
    meet is missing.
    """
    env = present(env)
    other = next(_starting(env), None)
    if "RANK" in env and ("WORLD_SIZE" in env or world_size > 1):
        place = _place(BY_HAND, env, world_size)
        if other is not None and "TORCHELASTIC_RUN_ID" not in env:
            _check_agreement(env, place, other, world_size)
        launcher = BY_HAND
    elif other is not None:
        launcher, place = other, _place(other, env, world_size)
    elif "RANK" in env:
        raise ValueError(
            f"RANK is {env['RANK']} in the environment but WORLD_SIZE is not set: export the number of ranks as "
            "WORLD_SIZE, or unset RANK to run a single process"
        )
    elif world_size > 1:
        raise ValueError(
            f"--world_size {world_size}: it is not known which of the {world_size} ranks this process is; start "
            "it with torchrun or srun, or set RANK in its environment"
        )
    elif "WORLD_SIZE" in env and (size := _number(env, "WORLD_SIZE")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {size} in the environment but RANK is not set: start the ranks with torchrun or srun, "
            "export RANK for each, or unset WORLD_SIZE to run a single process"
        )
    else:
        return LaunchedRank()
    if place.world_size == 1 or by_url:
        return place
    return replace(place, host=_host(env, launcher, place))


def present(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that are set to something."""
    return {name: value.strip() for name, value in env.items() if value.strip()}


def launchers(env: Mapping[str, str]) -> Iterator[Launcher]:
    """The launchers that have given this process a rank."""
    for launcher in LAUNCHERS:
        if launcher.rank not in env:
            continue
        if launcher.local_rank == _HYDRA and _HYDRA not in env:
            continue
        if launcher.name == "a PMI launcher" and "SLURM_STEP_ID" in env:
            continue  # srun's
        if launcher.name == "a PMIx launcher" and env.get("PMIX_NAMESPACE", "").startswith("slurm."):
            continue
        yield launcher


def _starting(env: Mapping[str, str]) -> Iterator[Launcher]:
    """The launchers, other than torchrun, that have started this program and not only something around it."""
    for launcher in launchers(env):
        if launcher is not SLURM or (_slurm_tasks(env) > 1 and _is_srun_step(env)):
            yield launcher


def _place(launcher: Launcher, env: Mapping[str, str], world_size: int) -> LaunchedRank:
    """The place that ``launcher`` gives this process. ``world_size``: of the flag, if it does not say how many."""
    rank = _number(env, launcher.rank)
    if launcher is SLURM:
        size, size_name = _slurm_tasks(env), "SLURM_NTASKS"
    elif launcher.size in env:
        size, size_name = _number(env, launcher.size), launcher.size
    elif "WORLD_SIZE" in env:
        size, size_name = _number(env, "WORLD_SIZE"), "WORLD_SIZE"
    elif world_size > 1:
        size, size_name = world_size, "--world_size"
    else:
        raise ValueError(
            f"{launcher.rank} is {rank} in the environment: {launcher.name} has started this process as one of "
            "several, but not said of how many; export their number as WORLD_SIZE (1: it is alone)"
        )
    if size < 1:
        raise ValueError(f"{size_name} is {size}: at least one rank is needed")
    if rank >= size:
        raise ValueError(
            f"{launcher.rank} is {rank}, which is not one of the {size} ranks 0..{size - 1} of {size_name}"
        )
    if launcher is SLURM:
        local_size = _slurm_tasks_here(env, size)
    elif launcher.local_size in env:
        local_size = _number(env, launcher.local_size)
    else:
        local_size = size
    if launcher.local_rank in env:
        local = _number(env, launcher.local_rank)
    elif "LOCAL_RANK" in env:
        local = _number(env, "LOCAL_RANK")
    else:
        local = rank % max(local_size, 1)
    if launcher is not BY_HAND:
        local_size = max(local_size, local + 1)
    elif local >= local_size:
        name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else size_name
        raise ValueError(f"LOCAL_RANK is {local}, which is not one of the {local_size} ranks of a node by {name}")
    return LaunchedRank(rank, size, local, local_size)


def _number(env: Mapping[str, str], name: str) -> int:
    """ValueError: the variable is not a whole number."""
    if not re.fullmatch(r"[0-9]{1,9}", env[name]):
        raise ValueError(f"{name} is {env[name]!r} in the environment: it must be a whole number, 0 or more")
    return int(env[name])


def _check_agreement(env: Mapping[str, str], place: LaunchedRank, other: Launcher, world_size: int) -> None:
    """ValueError: with these ``RANK`` and ``WORLD_SIZE``, several processes that ``other`` started are rank 0."""
    theirs = _place(other, env, world_size)
    if theirs.world_size > place.world_size or (
        theirs.world_size == place.world_size and place.rank == 0 and theirs.rank > 0
    ):
        raise ValueError(
            f"RANK is {place.rank} and WORLD_SIZE is {place.world_size} in the environment of several of the "
            f"{theirs.world_size} processes that {other.name} has started: unset both or give each process its own"
        )


def _host(env: Mapping[str, str], launcher: Launcher, place: LaunchedRank) -> str:
    """Where rank 0 is. ValueError: nobody says it, or MASTER_ADDR is no host."""
    if "MASTER_ADDR" in env:
        return check_host(env["MASTER_ADDR"], "MASTER_ADDR")
    if launcher is BY_HAND:
        raise ValueError(
            f"WORLD_SIZE is {place.world_size} but MASTER_ADDR is not set: export the host of rank 0, start with "
            "torchrun, or give --dist-url tcp://HOST:PORT"
        )
    here = launcher.local_size in env or (launcher is SLURM and _slurm_counts(env))
    if here and place.local_world_size == place.world_size:
        return LOCALHOST
    alone = ", or set SLURM_NTASKS=1 to run one process" if launcher is SLURM else ""
    raise ValueError(
        f"{launcher.name} has started {place.world_size} processes but MASTER_ADDR is not set: "
        f"{launcher.cure}{alone}"
    )


def check_host(host: str, name: str) -> str:
    """``host``, which ``name`` gives. ValueError: it is a list, has a port, or is something else than one host."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    with suppress(ValueError):
        ipaddress.ip_address(bare.partition("%")[0])
        return bare
    if re.search(r"[][{}*]", host):
        raise ValueError(
            f"{name} is {host!r}, a list of hosts: give one host, that of rank 0 (scontrol show hostnames "
            f"{host!r} | head -n 1 prints the first of a Slurm list)"
        )
    first = re.split(r"[\s,;]", host)[0]
    if first != host:
        raise ValueError(f"{name} is {host!r}, a list: give one host, that of rank 0 ({first!r} is the first)")
    if ":" in host or "/" in host:
        raise ValueError(f"{name} is {host!r}: give the name or address of a host alone; the port is MASTER_PORT")
    return host


def check_port(port: str, name: str) -> int:
    """``port``, which ``name`` gives. ValueError: it is none."""
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{name} is {port!r}: it must be the number of a port, 1 to 65535")
    return int(port)


# ----------------------------------------------------------------------------------------------------------- Slurm


def _slurm_tasks(env: Mapping[str, str]) -> int:
    """The tasks of this step. In a shell inside an allocation, the count of the allocation would be wrong."""
    name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in env), None)
    return 1 if name is None else _number(env, name)


def _is_srun_step(env: Mapping[str, str]) -> bool:
    """Whether the other tasks of this Slurm step run this program too.

    They do not in an interactive shell (``srun --pty``) and in a batch script that calls Python without ``srun``
    (a job, but no step), where waiting for them would hang.
    """
    alone = "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env
    alone = alone or ("SLURM_PTY_PORT" in env and "MASTER_ADDR" not in env)
    if alone and "RANK" not in env:
        logging.getLogger(__name__).warning(
            "inside a Slurm allocation, but not started by srun: running as a single process"
        )
    return not alone


def _slurm_tasks_here(env: Mapping[str, str], tasks: int) -> int:
    """How many tasks of this step are on this node."""
    counts = _slurm_counts(env)
    node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    return counts[node] if node < len(counts) else tasks


def _slurm_counts(env: Mapping[str, str]) -> list[int]:
    """The tasks of each node, from Slurm's compressed counts: ``4(x2),3`` -> [4, 4, 3]."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    counts = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    return counts
