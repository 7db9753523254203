"""Recipes and the scripts that start them, run with launchers that only write down what they were called with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training import evaluate
from training.config.flags import ALL
from training.config.given import frozen
from training.config.params import Config, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))
RECORD = """#!/bin/sh
exec {python} -c 'import json, os, sys
json.dump([sys.argv[1:], dict(os.environ)], open("{record}", "w"))' "$@"
"""

# The published command lines, flag by flag. A flag that is absent here has its default.
PUBLISHED = {"workers": 6, "save_frequency": 1, "local_loss": True}
ADDED = {"precision": "amp_bf16", "save_every_minutes": 30.0, "requeue_on_preempt": True}
DFN = {
    "train_data": "./datasets/dfn2b/large/shards/000{00000..19245}.tar"
    "::./datasets/dfn2b/large_disjoint/shards/000{19246..29794}.tar",
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
    "fastclip": True,
    "gamma": 1.0,
    "gamma_schedule": "cosine",
    "gamma_decay_epochs": 7,
    "multiply_tau": True,
}
CC3M = {
    "train_data": "./datasets/cc3m_webdataset/cc3m_train/{00000..00331}.tar",
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
V3 = {
    "fastclip": True,
    "temperature_scheme": "global_learnable",
    "multiply_tau": True,
    "lr_tau_scheduler": "step_thresh",
    "gamma_schedule": "cosine",
}
RECIPES = {
    "drrho_clip_dfn192m": {
        **DFN,
        "name": "drrho_clip",
        "temperature_scheme": "global_constant",
        "temperature": 0.01,
        "lr_tau": 0.0,
        "lr_tau_scheduler": "const",
        "fastclip_eps": 1e-4,
        "ref_model": "ViT-B-32",
        "ref_model_pretrained": "openai",
    },
    "fastclip_v3_dfn192m": {
        **DFN,
        **V3,
        "name": "fastclip",
        "lr_tau": 7.8125e-5,
        "fastclip_eps": 1e-14,
        "ref_model": "",
    },
    "openclip_cc3m": {**CC3M, "name": "medium_openclip", "fastclip": False, "gather_with_grad": True},
    "fastclip_v0_cc3m": {
        **CC3M_FASTCLIP,
        "name": "medium_fastclipv0",
        "temperature_scheme": "global_learnable",
        "multiply_tau": False,
    },
    "fastclip_v1_cc3m": {
        **CC3M_FASTCLIP,
        "name": "medium_fastclipv1",
        "temperature_scheme": "global_constant",
        "multiply_tau": False,
    },
    "fastclip_v2_cc3m": {
        **CC3M_FASTCLIP,
        "name": "medium_fastclipv2",
        "temperature_scheme": "individual_learnable",
        "lr_tau": 0.0133,
        "lr_tau_scheduler": "const",
        "temperature": 0.03,
        "rho": 7.0,
    },
    "fastclip_v3_cc3m": {**CC3M_FASTCLIP, **V3, "name": "medium_fastclipv3", "lr_tau": 2e-4, "rho": 6.5},
    "fastclip_v3_cc12m": {
        **V3,
        "name": "large_fastclipv3",
        "train_data": "./datasets/cc12m_webdataset/cc12m/{00000..01242}.tar",
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
        "name": "xlarge_fastclipv3",
        "train_data": "./datasets/laion400m/laion400m-data/{00000..41407}.tar",
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
    },
}
OTHERS = ("drrho_clip", "mobileclip_datacompdr12m")  # not among the authors' runs
LAION = "fastclip_v3_laion400m"
LOSSES = {"openclip_cc3m": "clip", "fastclip_v2_cc3m": "fastclip_individual"}


class Launchers:
    """A copy of scripts and recipes, and stand-ins for what they start that record a call and do nothing."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin, self.record = root, root / "bin", root / "call.json"
        for name in ("scripts", "recipes"):
            shutil.copytree(ROOT / name, root / name)
        self.bin.mkdir()
        for name in ("srun", "torchrun", "python"):
            self._put(name, RECORD.format(python=sys.executable, record=self.record))
        self._put("scontrol", "#!/bin/sh\necho node7\necho node8\n")
        self._put("nvidia-smi", "#!/bin/sh\necho GPU 0: a\necho GPU 1: b\n")

    def _put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
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

    def call(self, script: str, *arguments: str, **env: str) -> tuple[list[str], dict[str, str]]:
        """The arguments and the environment with which ``script`` calls its launcher."""
        done = self.run(script, *arguments, **env)
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(self.record.read_text()))


def program(argv: list[str]) -> list[str]:
    """The flags of the program that srun starts. One rank that fails ends them all."""
    task = ["bash", "scripts/lib/task.sh"]
    assert argv[:6] == ["--kill-on-bad-exit=1", *task, "python", "-u", "src/training/main.py"]
    return argv[6:]


@pytest.fixture
def launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launchers:
    monkeypatch.chdir(tmp_path)  # the scripts name a recipe by its path from where they run
    return Launchers(tmp_path)


def flags_of(config: Config) -> dict:
    """All flags but the recipe's own."""
    return {name: value for name, value in config.flags.items() if name != "config_file"}


def flags_with(wanted: dict) -> dict:
    """All flags but the recipe's own, where a command gives those in ``wanted``."""
    return {name: frozen(flag.default) for name, flag in ALL.items() if name != "config_file"} | wanted


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_recipe_and_slurm_script_is_in_the_table() -> None:
    assert {path.stem for path in (ROOT / "recipes").iterdir()} == {*RECIPES, *OTHERS}
    assert {path.stem for path in (ROOT / "scripts" / "slurm").iterdir()} == {*RECIPES, "train"}


@pytest.mark.parametrize("name", RECIPES)
def test_slurm_scripts_give_the_published_flags_and_no_others(launchers: Launchers, name: str) -> None:
    part, stop = (["3"], {"stop_epochs": 3}) if name == LAION else ([], {})
    argv, env = launchers.call(f"scripts/slurm/{name}.sh", *part, MASTER_PORT="12999")
    config = parse(program(argv))
    assert flags_of(config) == flags_with({**PUBLISHED, **ADDED, **RECIPES[name], **stop})
    assert config.loss.name == LOSSES.get(name, "fastclip")
    assert config.reference.usage == ({"ref"} if name.startswith("drrho") else set())
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node7", "12999")
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(launchers.root / "src")


def test_the_baseline_of_mobileclip_has_its_published_settings() -> None:
    """Those of run_datacompdr12m.sh that are not about its machines; its loss is twice a mean of captions."""
    config = parse(["--config_file", str(ROOT / "recipes/mobileclip_datacompdr12m.yaml")])
    assert config.run.batch_size * 32 == 8192
    assert config.schedule.epochs * config.data.train_num_samples == 30_000 * 8192
    assert (config.optim.lr, config.optim.beta2, config.optim.wd, config.optim.grad_clip_norm) == (
        1e-3,
        0.95,
        0.2,
        1,
    )
    assert (config.schedule.warmup, config.data.epoch_policy, config.model.model) == (1000, "resample", "ViT-B-16")
    assert (config.loss.loss_weight, config.loss.distill_weight, config.cache.syn_texts_ratio) == (0.0, 2.0, 0.5)
    assert (config.loss.distill_logit_scale, config.loss.distill_teacher_dimension) == (100.0, (768, 768))
    assert config.loss.distill_average_after_softmax and config.reads_features
    assert config.reference.usage == {"distill"} and not config.remarks


@pytest.mark.parametrize("name", [*RECIPES, "train"])
def test_slurm_scripts_ask_for_the_published_machines(name: str) -> None:
    lines = (ROOT / "scripts" / "slurm" / f"{name}.sh").read_text().splitlines()
    options = [word for line in lines if line.startswith("#SBATCH ") for word in line.split()[1:]]
    asked = dict(option.removeprefix("--").partition("=")[::2] for option in options)
    nodes = "4" if name == LAION else "2"
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gres"]) == (nodes, "4", "gpu:4")
    assert asked["job-name"] == RECIPES.get(name, {"name": "train"})["name"]
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
    done = launchers.run("scripts/slurm/openclip_cc3m.sh", **env)
    assert done.returncode == code
    assert ("requeue 71" in (launchers.root / "asked").read_text().splitlines()) == again
    assert ("killed" in done.stdout) == (code > 1 and state == "RUNNING")


def test_one_job_of_an_array_starts_again_alone(launchers):
    launchers._put("srun", "#!/bin/sh\nexit 137\n")
    launchers._put("squeue", f'#!/bin/sh\necho "$@" >>{launchers.root}/asked\necho RUNNING\n')
    launchers._put("scontrol", f'#!/bin/sh\necho node7\necho "$@" >>{launchers.root}/asked\n')
    env = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}
    assert launchers.run("scripts/slurm/openclip_cc3m.sh", **env).returncode == 137
    asked = (launchers.root / "asked").read_text().splitlines()
    assert "requeue 70_3" in asked and "--noheader --jobs 70_3 --format %T" in asked


def test_tasks_have_the_cores_that_the_job_asked_for(launchers):
    _, env = launchers.call("scripts/slurm/openclip_cc3m.sh", SLURM_JOB_ID="71", SLURM_CPUS_PER_TASK="7")
    assert env["SRUN_CPUS_PER_TASK"] == "7"


def test_wrong_flags_end_a_job_before_its_ranks_start(launchers):
    """Of ranks that end together Slurm may report one that it killed, and the job would start again."""
    launchers._put("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (launchers.root / "src").symlink_to(ROOT / "src")
    done = launchers.run("scripts/slurm/openclip_cc3m.sh", "--batch-size", "0", SLURM_JOB_ID="71")
    assert done.returncode == 2 and done.stderr.startswith("error: --batch-size 0")
    assert not launchers.record.exists()
    assert launchers.run("scripts/slurm/openclip_cc3m.sh", SLURM_JOB_ID="71").returncode == 0
    assert launchers.record.exists()


ROUTES = {
    "node7": "10.1.0.7 dev eth1 src 10.1.0.8 uid 0",  # as node8 sees it
    "node8": "local 10.1.0.8 dev lo src 10.1.0.8 uid 0",  # itself, by its address
    "myself": "local 127.0.1.1 dev lo src 127.0.0.1 uid 0",  # itself, by the address in /etc/hosts
}


@pytest.mark.parametrize(
    ("master", "given", "chosen"),
    [
        ("node7", {}, "eth1"),
        ("node8", {}, "eth1"),
        ("myself", {}, "ib0"),
        ("unknown", {}, "ib0"),
        ("node7", {"SLURM_NNODES": "1"}, ""),
        ("node7", {"GLOO_SOCKET_IFNAME": "mine"}, "mine"),
    ],
)
def test_each_task_names_the_interface_that_leads_to_the_master(launchers, master, given, chosen):
    routes = "".join(f'*"{name}") echo "{route}" ;;\n' for name, route in ROUTES.items())
    launchers._put("getent", '#!/bin/sh\n[ "$2" = unknown ] || echo "$2 STREAM"\n')
    launchers._put(
        "ip",
        f"""#!/bin/sh
case "$*" in
{routes}
*"route show default") echo "default via 10.9.0.1 dev ib0 proto dhcp" ;;
*"address show") printf '1: lo inet 127.0.0.1/8 scope host lo\\n3: eth1 inet 10.1.0.8/24 brd 10.1.0.255\\n' ;;
esac
""",
    )
    env = {"MASTER_ADDR": master, "SLURM_NNODES": "2", **given}
    done = launchers.run("scripts/lib/task.sh", "printenv", "GLOO_SOCKET_IFNAME", **env)
    assert (done.stdout.strip(), done.stderr) == (chosen, "")


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [(None, 2), ("1", 1), ("0,1,3", 3), ("GPU-a,GPU-b", 2), ("", 1), ("-1", 1), ("0,-1,2", 1)],
)
def test_one_node_has_a_rank_for_each_visible_gpu(launchers, monkeypatch, visible, ranks):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    argv, _ = launchers.call("scripts/single_node.sh", TRAIN_DATA="x.tar", SAMPLES="8", **env)
    assert f"--nproc_per_node={ranks}" in argv


@pytest.mark.parametrize(
    "command",
    [
        ["drrho_clip_dfn192m.sh"],
        ["train.sh", "drrho_clip_dfn192m"],
        ["train.sh", "recipes/drrho_clip_dfn192m.yaml"],
    ],
    ids=" ".join,
)
def test_the_line_wins_over_train_data_and_that_over_the_recipe(launchers: Launchers, command: list[str]) -> None:
    script, data = f"scripts/slurm/{command[0]}", "my data/{0..3}.tar"
    wanted = {**PUBLISHED, **ADDED, **RECIPES["drrho_clip_dfn192m"]}
    further = [*command[1:], "--batch_size", "8", "--name=mine"]
    argv, _ = launchers.call(script, *further, TRAIN_DATA=data)
    given = {"train_data": data, "batch_size": 8, "name": "mine"}
    assert flags_of(parse(program(argv))) == flags_with({**wanted, **given})
    argv, _ = launchers.call(script, *further, "--train-data", "other{0..1}.tar", TRAIN_DATA=data)
    assert parse(program(argv)).data.train_data == "other{0..1}.tar"


def test_a_recipe_may_be_a_file_of_ones_own(launchers: Launchers) -> None:
    recipe = launchers.root / "my recipe.yaml"
    recipe.write_text("train-data: my{0..1}.tar\ntrain-num-samples: 8\nmodel: RN50\n")
    argv, _ = launchers.call("scripts/slurm/train.sh", str(recipe))
    wanted = {"train_data": "my{0..1}.tar", "train_num_samples": 8, "model": "RN50", "requeue_on_preempt": True}
    assert flags_of(parse(program(argv))) == flags_with(wanted)


@pytest.mark.parametrize("arguments", [[], ["drrho_clip_dfn"], ["recipes"], ["--batch-size", "8"]], ids=" ".join)
def test_without_a_known_recipe_the_known_ones_are_told(launchers: Launchers, arguments: list[str]) -> None:
    done = launchers.run("scripts/slurm/train.sh", *arguments)
    names = ", ".join(sorted([*RECIPES, *OTHERS]))
    said = f"recipe '{(arguments or [''])[0]}': not found, give the path of a YAML file or one of {names}\n"
    assert (done.returncode, done.stderr, launchers.record.exists()) == (2, said, False)


@pytest.mark.parametrize("further", [["--config_file", "mine.yaml"], ["--config-file=mine.yaml"]], ids=" ".join)
def test_a_second_file_is_refused_before_it_replaces_the_recipe(launchers: Launchers, further: list[str]) -> None:
    done = launchers.run("scripts/slurm/openclip_cc3m.sh", *further)
    assert (done.returncode, launchers.record.exists()) == (2, False)
    assert done.stderr.startswith(f"{further[0]}: would replace the whole recipe openclip_cc3m")


def test_laion400m_goes_on_where_its_last_part_ended(launchers: Launchers) -> None:
    checkpoints = launchers.root / "logs" / "xlarge_fastclipv3" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "epoch_3.pt").touch()
    argv, _ = launchers.call("scripts/slurm/fastclip_v3_laion400m.sh", "6")
    config = parse(program(argv))
    assert (config.run.resume, config.schedule.stop_epochs, config.schedule.epochs) == ("latest", 6, 30)


OWN_DATA = {"TRAIN_DATA": "shards/{0..9}.tar", "SAMPLES": "1000", "DATA_SIZE": "1200"}
OWN_FLAGS = {"train_data": "shards/{0..9}.tar", "train_num_samples": 1000, "data_size": 1200}


def test_single_node_is_the_published_recipe_on_own_data(launchers: Launchers) -> None:
    argv, _ = launchers.call("scripts/single_node.sh", **OWN_DATA)
    start = argv.index("training.main")
    assert argv[: start + 2] == [
        "--standalone",
        "--nproc_per_node=2",  # one for each GPU
        "--max-restarts=0",
        "-m",
        "training.main",
        "--",
    ]
    found = flags_of(parse(argv[start + 1 :]))
    gamma = pytest.approx(4.177 * 10**-0.7265, abs=1e-4)
    own = {"workers": 6, "epochs": 10, "gamma": gamma, "gamma_decay_epochs": 10, "requeue_on_preempt": False}
    assert found == flags_with({**ADDED, **RECIPES["drrho_clip_dfn192m"], **OWN_FLAGS, **own})


def test_single_node_takes_its_settings_from_the_environment(launchers: Launchers) -> None:
    settings = {
        "EPOCHS": "20",
        "RESTARTS": "3",
        "RANKS": "4",
        "MODEL": "RN50",
        "REFERENCE": "RN101",
        "REFERENCE_WEIGHTS": "yfcc15m",
        "NAME": "mine",
        "LOGS": "my logs",
    }
    argv, _ = launchers.call("scripts/single_node.sh", "--seed", "7", **OWN_DATA, **settings)
    start = argv.index("training.main")
    assert argv[1:3] == ["--nproc_per_node=4", "--max-restarts=3"]
    config = parse(argv[start + 1 :])
    assert config.loss.gamma == pytest.approx(4.177 * 20**-0.7265, abs=1e-4)
    assert config.loss.gamma_decay_epochs == config.schedule.epochs == 20
    assert (config.model.model, config.run.name, config.run.logs) == ("RN50", "mine", "my logs")
    assert (config.reference.ref_model, config.reference.ref_model_pretrained) == ("RN101", "yfcc15m")
    assert (config.run.seed, config.run.batch_size) == (7, 640)


def test_single_node_takes_another_recipe(launchers: Launchers) -> None:
    argv, _ = launchers.call("scripts/single_node.sh", **OWN_DATA, RECIPE="fastclip_v3_cc3m")
    config = parse(argv[argv.index("training.main") + 1 :])
    wanted = {**PUBLISHED, **ADDED, **RECIPES["fastclip_v3_cc3m"], **OWN_FLAGS, "requeue_on_preempt": False}
    assert flags_of(config) == flags_with(wanted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "TRAIN_DATA"),
        ({"TRAIN_DATA": "a"}, "SAMPLES"),
        ({**OWN_DATA, "RECIPE": "v3"}, "recipe 'v3': not found"),
    ],
)
def test_single_node_says_what_it_needs(launchers: Launchers, settings: dict[str, str], said: str) -> None:
    done = launchers.run("scripts/single_node.sh", **settings)
    assert done.returncode != 0 and said in done.stderr and not launchers.record.exists()


def test_evaluate_is_a_call_of_the_program(launchers: Launchers) -> None:
    argv, env = launchers.call("scripts/evaluate.sh", "logs/mine", DATA_DIR="sets", WORKERS="3")
    given = ["--checkpoint", "logs/mine", "--data_dir", "sets", "--workers", "3"]
    assert argv == ["-m", "training.evaluate", *given]
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(launchers.root / "src")
    argv, _ = launchers.call("scripts/evaluate.sh", "a.pt", "ViT-B-16", "--out", "o.jsonl", GPUS="2")
    assert argv[:4] == ["--standalone", "--nproc_per_node=2", "-m", "training.evaluate"]
    assert argv[-4:] == ["--model", "ViT-B-16", "--out", "o.jsonl"]
    assert evaluate.parser().parse_args(argv[4:]).model == "ViT-B-16"
    done = launchers.run("scripts/evaluate.sh", "a.pt", "ViT-B-16", IMAGENET="val")
    assert done.returncode == 2 and "training.main --epochs 0 --resume CHECKPOINT" in done.stderr
