"""The batch scripts on a real Slurm of two nodes: preempted, killed, in the end the same weights."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import Cluster, missing
from tests.support import shards, tiny_models
from tests.support.ranks import free_port
from training.checkpoint.pt_file import load_weights, read

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
SAMPLES, EPOCHS = 96, 6
pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(tmp_path_factory.mktemp("slurm")))
        except RuntimeError as error:  # its daemons need more of a machine than every container gives
            pytest.skip(f"Slurm does not start here: {error}")
        yield cluster


class Jobs:
    """Jobs of a recipe with small values, as a user gives them: options of sbatch, TRAIN_DATA, further flags."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.shards = shards.write_shards(folder / "shards", SAMPLES, per_shard=13)
        reference = tiny_models.build("tiny-vit-reference", seed=7)
        torch.save(reference.state_dict(), folder / "reference.pt")

    def submit(self, name: str, script: str, *arguments: str) -> str:
        options = "--nodes=2 --ntasks-per-node=1 --gres=none --cpus-per-task=1 --mem=100"
        flags = f"""
            --name {name} --logs {self.folder}/logs --log-local --log-every-n-steps 1
            --train-num-samples {SAMPLES} --data_size 100 --batch-size 4 --workers 1 --epochs {EPOCHS} --warmup 2
            --gamma_decay_epochs 2 --precision fp32 --model {tiny_models.path("tiny-vit", self.folder)}
            --ref_model {tiny_models.path("tiny-vit-reference", self.folder)} --ref_model_pretrained=
            --ref_model_checkpoint {self.folder}/reference.pt
        """
        command = [
            "sbatch",
            "--parsable",
            *options.split(),
            f"--output={self.folder}/{name}.log",
            f"--chdir={ROOT}",
        ]
        env = {"TRAIN_DATA": self.shards, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        return self.cluster.run(*command, SCRIPTS / script, *arguments, *flags.split(), **env).strip()

    def printed(self, name: str) -> str:
        file = self.folder / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def steps(self, name: str) -> list[int]:
        """The samples seen so far in their epochs, a number for each step that the run has logged."""
        file = self.folder / "logs" / name / "out-0.log"
        return (
            [int(seen) for seen in re.findall(r"Train Epoch: \d+ \[ *(\d+)/", file.read_text())]
            if file.exists()
            else []
        )

    def rank(self, job: str, number: int) -> int:
        """The process of that rank: of those with its variables, the first, which has started the others."""
        of_rank = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={number}".encode()}
        found = []
        for process in self.cluster.processes():
            with contextlib.suppress(OSError):  # it has ended
                given, words = (
                    set(Path(f"/proc/{process}/{name}").read_bytes().split(b"\0"))
                    for name in ("environ", "cmdline")
                )
                if of_rank <= given and b"src/training/main.py" in words:
                    found.append(process)
        return min(found)

    def until(self, ready: Callable[[], bool], name: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline and "Traceback" not in self.printed(name), self.printed(name)[
                -6000:
            ]
            time.sleep(0.1)

    def ends(self, job: str, name: str) -> dict[str, str]:
        self.until(lambda: self.cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), name)
        assert self.cluster.job(job)["JobState"] == "COMPLETED", self.printed(name)[-6000:]
        return self.cluster.job(job)


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


def test_a_job_that_is_preempted_and_then_loses_a_rank_ends_with_the_undisturbed_ones_weights(jobs):
    whole = jobs.submit("whole", "train.sh", "drrho_clip_dfn192m")
    cut = jobs.submit("cut", "drrho_clip_dfn192m.sh")
    for job, name in ((whole, "train"), (cut, "drrho_clip")):  # what #SBATCH lines say and no option overrides
        asked = jobs.cluster.job(job)
        assert (asked["JobName"], asked["TimeLimit"], asked["Requeue"]) == (name, "2-00:00:00", "1")
    jobs.until(lambda: len(jobs.steps("cut")) >= 5, "cut")
    jobs.cluster.run("scancel", "--signal=USR1", cut)
    jobs.until(lambda: jobs.cluster.job(cut)["Restarts"] == "1", "cut")
    before = len(jobs.steps("cut"))
    jobs.until(lambda: len(jobs.steps("cut")) >= max(26, before + 1), "cut")  # past the second epoch's checkpoint
    os.kill(jobs.rank(cut, 1), signal.SIGKILL)
    jobs.until(lambda: jobs.cluster.job(cut)["Restarts"] == "2", "cut")
    ends = {name: jobs.ends(job, name) for name, job in (("whole", whole), ("cut", cut))}
    assert {name: end["Restarts"] for name, end in ends.items()} == {"whole": "0", "cut": "2"}

    epoch = [8 * (step + 1) for step in range(SAMPLES // 8)]  # samples seen: 4 on each of two ranks in a step
    assert jobs.steps("whole") == epoch * EPOCHS and jobs.steps("cut")[-24:] == epoch * 2
    for name in ends:
        run = jobs.folder / "logs" / name
        assert (run / "job.done").exists()
        assert (run / "out-0.log").exists() and (run / "out-1.log").exists()  # one per node
    printed = jobs.printed("cut")
    stopped = re.findall(r"stopped by SIGUSR1 after (\d+) steps", printed)  # said on each node
    assert len(stopped) == 2 and stopped[0] == stopped[1] and 5 <= int(stopped[0]) < 48
    assert printed.count("the job goes back into the queue") == 1 and "Traceback" not in printed

    saved = [jobs.folder / "logs" / name / "checkpoints" / f"epoch_{EPOCHS}.pt" for name in ("whole", "cut")]
    undisturbed, requeued = map(load_weights, saved)
    assert all(torch.equal(undisturbed[key], requeued[key]) for key in undisturbed)
    assert [read(path)["step"] for path in saved] == [EPOCHS * len(epoch)] * 2
