"""The recipe scripts, run with launchers that only write down what they were called with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.config.params import Config, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))
RECORD = """#!/bin/sh
exec {python} -c 'import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("{record}", "w"))' "$@"
"""

# The published figures. Flags that a recipe does not give are absent.
DFN = {
    "model": "ViT-B-16",
    "batch_size": 640,
    "train_num_samples": 192160462,
    "data_size": 255020000,
    "epochs": 7,
    "warmup": 500,
    "wd": 0.2,
    "seed": 2025,
    "lr": 3.125e-4,
    "lr_min": 0.0,
    "rho": 11.0,
    "gamma": 1.0,
    "gamma_decay_epochs": 7,
    "multiply_tau": True,
}
CC3M = {
    "model": "RN50",
    "batch_size": 128,
    "train_num_samples": 2723840,
    "data_size": 3318333,
    "epochs": 37,
    "warmup": 10000,
    "wd": 0.1,
    "seed": 2024,
    "lr": 1e-3,
    "lr_min": 0.0,
}
CC3M_FASTCLIP = {**CC3M, "fastclip": True, "gamma": 0.2, "gamma_decay_epochs": 18, "gamma_schedule": "cosine"}
V3 = {"temperature_scheme": "global_learnable", "multiply_tau": True, "lr_tau_scheduler": "step_thresh"}
RECIPES = {
    "drrho_clip_dfn192m": {
        **DFN,
        "temperature_scheme": "global_constant",
        "temperature": 0.01,
        "lr_tau": 0.0,
        "lr_tau_scheduler": "const",
        "fastclip_eps": 1e-4,
        "ref_model": "ViT-B-32",
        "ref_model_pretrained": "openai",
    },
    "fastclip_v3_dfn192m": {**DFN, **V3, "lr_tau": 7.8125e-5, "fastclip_eps": 1e-14, "ref_model": ""},
    "openclip_cc3m": {**CC3M, "fastclip": False, "gather_with_grad": True},
    "fastclip_v0_cc3m": {**CC3M_FASTCLIP, "temperature_scheme": "global_learnable", "multiply_tau": False},
    "fastclip_v1_cc3m": {**CC3M_FASTCLIP, "temperature_scheme": "global_constant", "multiply_tau": False},
    "fastclip_v2_cc3m": {
        **CC3M_FASTCLIP,
        "temperature_scheme": "individual_learnable",
        "lr_tau": 0.0133,
        "lr_tau_scheduler": "const",
        "temperature": 0.03,
        "rho": 7.0,
    },
    "fastclip_v3_cc3m": {**CC3M_FASTCLIP, **V3, "lr_tau": 2e-4, "rho": 6.5},
    "fastclip_v3_cc12m": {
        **V3,
        "model": "ViT-B-32",
        "batch_size": 256,
        "train_num_samples": 9187328,
        "data_size": 12423374,
        "epochs": 33,
        "warmup": 10000,
        "wd": 0.1,
        "seed": 2024,
        "lr": 4e-4,
        "lr_tau": 1e-4,
        "rho": 8.5,
        "gamma": 0.2,
        "gamma_decay_epochs": 16,
    },
    "fastclip_v3_laion400m": {
        **V3,
        "model": "ViT-B-16",
        "batch_size": 320,
        "train_num_samples": 315658316,
        "data_size": 414080000,
        "epochs": 30,
        "warmup": 13200,
        "wd": 0.2,
        "seed": 2024,
        "lr": 2e-4,
        "lr_min": 4e-5,
        "lr_tau": 5e-5,
        "rho": 16.0,
        "fastclip_eps": 1e-6,
        "gamma": 0.8,
        "gamma_decay_epochs": 10,
        "stop_epochs": 3,
    },
}
LOSSES = {"openclip_cc3m": "clip", "fastclip_v2_cc3m": "fastclip_individual"}


class Launchers:
    """A copy of the scripts, and stand-ins for what they start that record a call and do nothing."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.record = root, root / "bin", root / "call.json"
        shutil.copytree(ROOT / "scripts", root / "scripts")
        self.bin.mkdir()
        for name in ("srun", "torchrun", "python"):
            self._put(name, RECORD.format(python=sys.executable, record=self.record))
        self._put("scontrol", "#!/bin/sh\necho node7\necho node8\n")
        self._put("nvidia-smi", "#!/bin/sh\necho GPU 0: a\necho GPU 1: b\n")

    def _put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def call(self, script: str, *arguments: str, **env: str) -> tuple[list[str], dict[str, str]]:
        """The arguments and the environment with which ``script`` calls its launcher."""
        done = subprocess.run(
            ["bash", script, *arguments],
            cwd=self.root,
            env={
                **os.environ,
                "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
                "SLURM_JOB_NODELIST": "node[7-8]",
                **env,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(self.record.read_text()))


def program(argv: list[str]) -> list[str]:
    """The flags of the program that srun starts. One rank that fails ends them all."""
    assert argv[:4] == ["--kill-on-bad-exit=1", "python", "-u", "src/training/main.py"]
    return argv[4:]


@pytest.fixture
def launchers(tmp_path: Path) -> Launchers:
    return Launchers(tmp_path)


def flags_of(config: Config, wanted: dict) -> dict:
    return {name: config.flags[name] for name in wanted}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_slurm_script_is_in_the_table() -> None:
    assert {path.stem for path in (ROOT / "scripts" / "slurm").glob("*.sh")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_scripts_carry_the_published_figures(launchers: Launchers, name: str) -> None:
    part = ["3"] if name == "fastclip_v3_laion400m" else []
    argv, env = launchers.call(f"scripts/slurm/{name}.sh", *part, MASTER_PORT="12999")
    config = parse(program(argv))
    common = {"workers": 6, "save_frequency": 1, "local_loss": True, "precision": "amp_bf16", "resume": None}
    common["requeue_on_preempt"] = True
    wanted = {**common, **RECIPES[name]}
    assert flags_of(config, wanted) == wanted
    assert config.loss.name == LOSSES.get(name, "fastclip")
    assert config.reference.usage == ({"ref"} if name.startswith("drrho") else set())
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", "12999")
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(launchers.root / "src")


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_scripts_ask_for_the_published_machines(name: str) -> None:
    header = (ROOT / "scripts" / "slurm" / f"{name}.sh").read_text().split("set -euo")[0].splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in header if line.startswith("#SBATCH")
    )
    nodes = "4" if "laion" in name else "2"
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gres"]) == (nodes, "4", "gpu:4")
    # Warned two minutes before its end, and put back into the queue when a node fails; one log for all its parts.
    assert (asked["signal"], asked["requeue"], asked["open-mode"]) == ("USR1@120", "", "append")


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (0, "", "RUNNING", False),
        (1, "", "RUNNING", False),  # what is wrong with a command stays wrong
        (124, "", "RUNNING", True),
        (143, "", "RUNNING", True),  # one that Slurm ended for another's sake
        (137, "4", "RUNNING", True),
        (137, "5", "RUNNING", False),
        (137, "", "COMPLETING", False),  # cancelled
    ],
)
def test_a_slurm_job_starts_again_after_a_hang_or_a_kill(launchers, code, restarts, state, again):
    launchers._put("srun", f"#!/bin/sh\nexit {code}\n")
    launchers._put("squeue", f"#!/bin/sh\necho {state}\n")
    launchers._put("scontrol", f'#!/bin/sh\necho node7\necho "$@" >>{launchers.root}/asked\n')
    env = {"SLURM_JOB_NODELIST": "node7", "SLURM_JOB_ID": "71", "SLURM_RESTART_COUNT": restarts}
    path = f"{launchers.bin}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "scripts/slurm/openclip_cc3m.sh"],
        cwd=launchers.root,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert ("requeue 71" in (launchers.root / "asked").read_text().splitlines()) == again
    assert ("killed" in done.stdout) == (code > 1 and state == "RUNNING")


def test_data_and_further_flags_are_the_users(launchers: Launchers) -> None:
    argv, _ = launchers.call(
        "scripts/slurm/drrho_clip_dfn192m.sh", "--batch-size", "8", TRAIN_DATA="my data/{0..3}.tar"
    )
    config = parse(program(argv))
    assert (config.data.train_data, config.run.batch_size) == ("my data/{0..3}.tar", 8)


def test_laion400m_goes_on_where_its_last_part_ended(launchers: Launchers) -> None:
    checkpoints = launchers.root / "logs" / "xlarge_fastclipv3" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "epoch_3.pt").touch()
    argv, _ = launchers.call("scripts/slurm/fastclip_v3_laion400m.sh", "6")
    config = parse(program(argv))
    assert (config.run.resume, config.schedule.stop_epochs, config.schedule.epochs) == ("latest", 6, 30)


def test_single_node_starts_a_rank_per_gpu(launchers: Launchers) -> None:
    own = {
        "TRAIN_DATA": "shards/{0..9}.tar",
        "SAMPLES": "1000",
        "DATA_SIZE": "1200",
        "EPOCHS": "20",
        "RESTARTS": "3",
    }
    argv, _ = launchers.call("scripts/single_node.sh", "--seed", "7", **own)
    start = argv.index("training.main")
    assert argv[:start] == ["--standalone", "--nproc_per_node=2", "--max-restarts=3", "-m"]
    config = parse(argv[start + 1 :])
    assert (config.data.train_data, config.data.data_size, config.run.seed) == ("shards/{0..9}.tar", 1200, 7)
    assert (config.loss.name, config.reference.usage) == ("fastclip", {"ref"})
    assert config.loss.gamma == pytest.approx(4.177 * 20**-0.7265, abs=1e-4)
    assert config.loss.gamma_decay_epochs == config.schedule.epochs == 20


def test_single_node_says_what_it_needs(launchers: Launchers) -> None:
    done = subprocess.run(
        ["bash", "scripts/single_node.sh"],
        cwd=launchers.root,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "TRAIN_DATA" in done.stderr


def test_evaluate_only_evaluates(launchers: Launchers) -> None:
    checkpoint = launchers.root / "logs" / "mine" / "checkpoints" / "epoch_7.pt"
    pictures = launchers.root / "val"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    pictures.mkdir()
    argv, _ = launchers.call("scripts/evaluate.sh", str(checkpoint), "ViT-B-16", IMAGENET=str(pictures))
    assert argv[0].endswith("/src/training/main.py")
    config = parse(argv[1:])
    assert not config.trains
    assert config.run.resume == str(checkpoint)
    assert (config.evaluation.imagenet_val, config.evaluation.zeroshot_frequency) == (str(pictures), 1)
    assert config.run.name == "eval_mine_epoch_7"
    argv, _ = launchers.call("scripts/evaluate.sh", str(checkpoint), "ViT-B-16", "--val-data", "pairs.csv")
    assert "--imagenet-val" not in argv and argv[-2:] == ["--val-data", "pairs.csv"]
