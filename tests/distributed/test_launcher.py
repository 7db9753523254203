"""The rank of a process by the variables of each launcher, in plain dictionaries; and what is refused."""

from __future__ import annotations

import pytest

from training.distributed.launcher import (
    LOCALHOST,
    LaunchedRank,
    check_host,
    check_port,
    find_place,
    local_rank,
    rank,
)

# The variables that a launcher sets for rank 5 of 8, the second of four on the second node.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}  # MPICH and Intel MPI
JSRUN = {
    "JSM_NAMESPACE_RANK": "5",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "4",
    "PMIX_RANK": "5",
}
MVAPICH = {
    f"MV2_COMM_WORLD_{k}": v for k, v in (("RANK", "5"), ("SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "4"))
}
PALS = {"PALS_RANKID": "5", "PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}
CRAY_PMI = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
RANK_5 = LaunchedRank(5, 8, 1, 4, "h")
ALONE = LaunchedRank()
# srun starts one daemon of the MPI per node, and that one the ranks.
IN_A_SLURM_JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


def place(variables: dict[str, str], world_size: int = 1, by_url: bool = False) -> LaunchedRank:
    return find_place(variables, world_size, by_url)


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA, JSRUN, MVAPICH, PALS, CRAY_PMI, SLURM])
def test_each_launchers_variables(variables):
    assert place(variables | {"MASTER_ADDR": "h"}) == RANK_5
    assert (rank(variables), local_rank(variables)) == (5, 1)


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA])
def test_mpirun_in_a_slurm_job_is_asked_before_slurm(variables):
    assert place(IN_A_SLURM_JOB | variables | {"MASTER_ADDR": "h"}) == RANK_5


def test_slurm_is_asked_before_the_pmi_and_pmix_that_srun_itself_sets():
    wrong = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.pmix.7.0"}
    assert place(SLURM | wrong | {"MASTER_ADDR": "h"}) == RANK_5
    alone = IN_A_SLURM_JOB | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
    assert place(alone | wrong) == ALONE


def test_torchrun_in_mpirun_wins():
    one_per_node = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    torchrun = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "TORCHELASTIC_RUN_ID": "x",
    }
    assert place(one_per_node | torchrun | {"MASTER_ADDR": "h"}) == RANK_5


def test_a_wrapper_script_may_translate_the_variables():
    by_hand = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place(OPEN_MPI | by_hand | {"MASTER_ADDR": "h"}) == RANK_5


@pytest.mark.parametrize(
    "stale",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},  # in a container's image
        {"RANK": "0", "WORLD_SIZE": "8"},  # the same for all
    ],
)
@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA, SLURM])
def test_variables_by_which_all_would_be_rank_0_are_refused(stale, variables):
    with pytest.raises(ValueError, match=r"RANK is 0 .* of several of the 8 processes"):
        place(variables | stale | {"MASTER_ADDR": "h"})


def test_on_one_host_the_ranks_meet_there():
    here = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "5"}
    assert place(here) == LaunchedRank(5, 8, 5, 8, LOCALHOST)
    assert place(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0"}).host == LOCALHOST
    assert place(here, by_url=True).host is None


@pytest.mark.parametrize(
    ("variables", "cure"),
    [
        (OPEN_MPI, "mpirun -x MASTER_ADDR="),
        (HYDRA, "mpiexec -genv MASTER_ADDR"),
        (SLURM, "scontrol show hostnames"),
    ],
)
def test_on_several_hosts_the_address_is_the_users_duty(variables, cure):
    with pytest.raises(ValueError, match="8 processes but MASTER_ADDR is not set") as refused:
        place(variables)
    assert cure in str(refused.value)


def test_one_process_of_a_launcher_is_alone():
    for name in ("OMPI_COMM_WORLD_", "JSM_NAMESPACE_", "PMI_"):
        assert place({f"{name}RANK": "0", f"{name}SIZE": "1"}) == ALONE


def test_a_number_of_processes_that_the_launcher_does_not_tell():
    pmix = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-h-1@1", "MASTER_ADDR": "h"}
    with pytest.raises(ValueError, match=r"PMIX_RANK is 1 .* export their number as WORLD_SIZE"):
        place(pmix)
    assert place(pmix | {"WORLD_SIZE": "2"}) == LaunchedRank(1, 2, 1, 2, "h")
    assert place(pmix, world_size=2) == LaunchedRank(1, 2, 1, 2, "h")


BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h"}


def test_a_variable_set_to_nothing_is_not_set():
    empty = dict.fromkeys([*BY_HAND, *OPEN_MPI, *SLURM], "")
    assert place(empty) == ALONE
    assert place(empty | {"WORLD_SIZE": " "}) == ALONE
    assert place(BY_HAND | {"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}) == LaunchedRank(1, 2, 1, 2, "h")
    assert (rank(empty), local_rank(empty)) == (0, 0)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"RANK": "first"}, "RANK is 'first' in the environment: it must be a whole number"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"RANK": "2"}, "RANK is 2, which is not one of the 2 ranks 0..1 of WORLD_SIZE"),
        ({"RANK": ""}, "WORLD_SIZE is 2 in the environment but RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: at least one rank"),
        ({"WORLD_SIZE": ""}, "RANK is 1 in the environment but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "gpu1"}, "LOCAL_RANK is 'gpu1'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, which is not one of the 2 ranks"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "not one of the 1 ranks of a node by LOCAL_WORLD_SIZE"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "node1,node2"}, "MASTER_ADDR is 'node1,node2', a list: give one host"),
    ],
)
def test_variables_that_are_wrong_or_missing(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        place(BY_HAND | changed)


@pytest.mark.parametrize("variables", [OPEN_MPI, HYDRA, JSRUN, SLURM])
def test_a_launchers_own_variables_may_be_wrong_too(variables):
    for name in list(variables)[:2]:
        with pytest.raises(ValueError, match=f"{name} is 'x'"):
            place(variables | {name: "x", "MASTER_ADDR": "h"})


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("node1 node2", "a list: give one host, that of rank 0 ('node1' is the first)"),
        ("node1;node2", "('node1' is the first)"),
        ("node1\nnode2", "('node1' is the first)"),
        ("node[01-04]", "scontrol show hostnames 'node[01-04]'"),
        ("node[01-04,07]", "scontrol show hostnames 'node[01-04,07]'"),
        ("node1:29500", "the port is MASTER_PORT"),
        ("tcp://node1", "the port is MASTER_PORT"),
        ("http://node1/", "give the name or address of a host alone"),
    ],
)
def test_what_is_not_one_host(host, words):
    with pytest.raises(ValueError) as refused:
        check_host(host, "MASTER_ADDR")
    assert words in str(refused.value) and str(refused.value).startswith(f"MASTER_ADDR is {host!r}")


def test_what_is_a_host():
    for host in ("localhost", "10.0.0.1", "node-1.cluster.example", "::1", "fe80::1%eth0"):
        assert check_host(host, "MASTER_ADDR") == host
    assert check_host("[fe80::1]", "MASTER_ADDR") == "fe80::1"


def test_what_is_a_port():
    assert check_port("29500", "MASTER_PORT") == 29500
    for port in ("0", "65536", "-1", "http", "29500 ", "२९"):
        with pytest.raises(ValueError, match=r"MASTER_PORT is .*: it must be the number of a port, 1 to 65535"):
            check_port(port, "MASTER_PORT")
