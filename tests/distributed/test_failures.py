"""What several ranks print when they end: one line for an error of all, no tracebacks of the other ranks."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.support import tiny_models
from tests.support.ranks import free_port, ranks
from training import main
from training.distributed import collectives, failures, rendezvous

ROOT = Path(__file__).parents[2]
DATA = ["--dataset-type", "synthetic", "--train-num-samples", "8", "--batch-size", "2", "--workers", "0"]


def environment(**variables: str) -> dict[str, str]:
    launched = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    plain = {name: value for name, value in os.environ.items() if name not in launched}
    return plain | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")} | variables


def torchrun(*words: object, program: bool = False) -> tuple[int, list[str]]:
    """Exit code, and the lines of the ranks that are errors or begin a traceback.

    ``program``: the first word is a file to run in place of our program.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = [words[0], "--", *words[1:]] if program else ["-m", "training.main", "--", *words]
    command = [*launcher, *map(str, start)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    ours = done.stderr.partition("torch/distributed/elastic")[0]  # the launcher's own report comes last
    return done.returncode, [line for line in ours.splitlines() if line.startswith(("error", "Traceback"))]


def test_an_unknown_flag_under_torchrun(tmp_path):
    code, lines = torchrun(*DATA, "--logs", tmp_path, "--nonsense", 3)
    assert code != 0
    assert lines == ["error: --nonsense: not a flag of this program; see --help"]


@pytest.mark.parametrize("there", [False, True])
def test_a_bad_checkpoint_under_torchrun(tmp_path, there):
    """A file that is missing is refused by the parser; one that is not a checkpoint, when the ranks have met."""
    bad = tmp_path / "bad.pt"
    if there:
        bad.write_bytes(b"bad")
    model = tiny_models.path("tiny-vit", tmp_path)
    code, lines = torchrun(*DATA, "--logs", tmp_path, "--model", model, "--resume", bad)
    assert code != 0
    assert len(lines) == 1 and lines[0].startswith("error: ") and str(bad) in lines[0]


ONE_RANK_REFUSES = """
import os, sys
from training import main, preflight
if os.environ["RANK"] == "1":
    def check(config, world):
        raise ValueError("--train-data: this node does not see /data")
    preflight.check = check
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_refusal_that_only_one_rank_reaches_under_torchrun(tmp_path):
    (tmp_path / "program.py").write_text(ONE_RANK_REFUSES)
    model = tiny_models.path("tiny-vit", tmp_path)
    code, lines = torchrun(tmp_path / "program.py", *DATA, "--logs", tmp_path, "--model", model, program=True)
    assert code != 0
    assert lines == ["error (rank 1): --train-data: this node does not see /data"]


def test_what_nobody_has_foreseen_before_the_ranks_meet_is_told_with_its_traceback(monkeypatch, capfd):
    def launch(config) -> None:
        raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr("training.run.launch", launch)
    with pytest.raises(ImportError):  # alone
        main.main(DATA)
    monkeypatch.setenv("RANK", "0")
    assert main.main(DATA) == 1
    told = capfd.readouterr().err
    assert told.startswith("Traceback") and told.endswith(
        "ImportError: libcudart.so: cannot open shared object file\n"
    )


def told(messages: list[str], call: int) -> str:
    at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rendezvous._met = rendezvous._Meeting("env://", *at, f"start {call}")  # an empty board
    dist.barrier()  # a rank waits for the word of the other a few seconds only
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        failures.tell(ValueError(messages[int(os.environ["RANK"])]))
    return printed.getvalue()


def test_ranks_compare_what_they_end_with():
    assert ranks(2).run(told, ["same", "same"], 100) == ["error: same\n", ""]
    assert ranks(2).run(told, ["ours", "mine"], 101) == ["error: ours\n", "error (rank 1): mine\n"]


ONE_RANK_FAILS = """
import os, sys
from training import main
from training.loop import trainer
if os.environ["RANK"] == "1":
    def fail(self, *_):
        raise ValueError("row 7 is bad")
    trainer.Trainer.train_epoch = fail
sys.exit(main.main(sys.argv[1:]))
"""


def test_one_rank_says_what_is_wrong_and_its_peers_end_quietly(tmp_path):
    words = [*DATA, "--logs", str(tmp_path), "--name", "a", "--model", tiny_models.path("tiny-vit", tmp_path)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_RANK_FAILS, *words],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    (_, bystander), (_, culprit) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [1, 2]
    assert culprit.splitlines()[-1] == "error (rank 1): row 7 is bad"
    assert bystander.splitlines()[-1] == "rank 0 ends because another rank has ended: that rank's message says why"
    assert "Traceback" not in bystander + culprit


def test_an_interruption_is_one_line(monkeypatch, capfd, tmp_path):
    """What a second Ctrl-C does, wherever the program is."""

    def launch(config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.launch", launch)
    assert main.main([*DATA, "--logs", str(tmp_path)]) == 130
    assert capfd.readouterr().err == "interrupted: nothing more is saved\n"


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:35051: Connection reset by peer", True),
        ("Application timeout caused pair closure", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("shape mismatch", False),
    ],
)
def test_errors_of_a_lost_rank_are_told_from_others(monkeypatch, message, lost):
    assert not collectives.lost_peer(RuntimeError(message))  # a single process has no peer to lose
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert collectives.lost_peer(RuntimeError(message)) == lost
    assert not collectives.lost_peer(BrokenPipeError(32, "Broken pipe"))  # of standard output, for instance
