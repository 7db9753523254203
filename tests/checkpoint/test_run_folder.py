"""A run's folder: its name, which runs may use it, and what is written there."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import ranks
from tests.support.small_runs import Run
from tests.support.small_runs import save as save_run
from training.checkpoint.resume import checkpoint_to_resume
from training.checkpoint.run_folder import choose_folder, create_folder, default_name, launch_identity
from training.config.params import parse
from training.distributed.process_group import World

MAIN = World(0, 0, 1, 1, torch.device("cpu"))
LAUNCHERS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def config_of(tmp_path, *flags):
    return parse(["--dataset-type", "synthetic", "--train-num-samples", "8", "--logs", str(tmp_path), *flags])


def start(config, world=MAIN):
    folder = choose_folder(config, world)
    create_folder(folder, config, world)
    return folder


def test_default_name_is_the_published_one(tmp_path):
    config = config_of(
        tmp_path, "--model", "ViT-B-16", "--lr", "3.125e-4", "--batch-size", "640", "--workers", "6"
    )
    name = default_name(config, 0.0)
    assert name[4] == "_" and name.split("-", 2)[2] == "model_ViT-B-16-lr_0.0003125-b_640-j_6-p_amp"


def test_params_are_sorted_names_and_values(tmp_path):
    folder = start(config_of(tmp_path, "--name", "a", "--lr", "0.5"))
    lines = (folder.path / "params.txt").read_text().splitlines()
    assert folder.path == tmp_path / "a" and folder.checkpoints.is_dir()
    assert "lr: 0.5" in lines and "name: a" in lines
    assert lines == sorted(lines) and len(lines) >= 132


@pytest.mark.parametrize("model, beta2, eps", [("ViT-B-32", 0.98, 1e-6), ("RN50", 0.999, 1e-8)])
def test_params_hold_the_optimizers_defaults(tmp_path, model, beta2, eps):
    """As OpenCLIP's do; the published code's rate of the temperature is the model's unless it is given."""
    folder = start(config_of(tmp_path, "--model", model, "--fastclip", "--data_size", "8"))
    held = dict(line.split(": ", 1) for line in (folder.path / "params.txt").read_text().splitlines())
    values = [float(held[key]) for key in ("lr", "lr_tau", "beta1", "beta2", "eps")]
    assert values == [5e-4, 5e-4, 0.9, beta2, eps]


def test_a_second_run_into_the_folder_is_refused_with_the_choices(tmp_path):
    folder = start(config_of(tmp_path, "--name", "a"))
    for mark in (folder.checkpoints / "epoch_1.pt", folder.done):
        mark.write_text("")
        with pytest.raises(ValueError, match=r"--name a: .*--resume latest.*another --name"):
            choose_folder(config_of(tmp_path, "--name", "a"), MAIN)
        mark.unlink()
    resumed = choose_folder(config_of(tmp_path, "--name", "a", "--resume", "latest"), MAIN)
    assert resumed.path == tmp_path / "a" and not resumed.restarted


def test_what_failed_at_its_start_leaves_the_name_free(tmp_path):
    first = start(config_of(tmp_path, "--name", "a", "--lr", "0.25"))
    (first.path / "out.log").write_text("the run ended with an error")
    assert start(config_of(tmp_path, "--name", "a", "--lr", "0.5")) == first
    assert "lr: 0.5\n" in (first.path / "params.txt").read_text()


def test_the_end_of_an_earlier_part_is_forgotten(tmp_path):
    folder = start(config_of(tmp_path, "--name", "a"))
    folder.done.write_text("")
    start(config_of(tmp_path, "--name", "a", "--resume", "latest"))
    assert not folder.done.exists()


def test_a_folder_that_cannot_be_written_is_a_sentence_about_logs(tmp_path):
    (tmp_path / "file").write_text("")
    for logs in ("/proc/nowhere", str(tmp_path / "file")):
        with pytest.raises(ValueError, match=f"--logs {logs}: .*cannot be written"):
            start(config_of(tmp_path, "--name", "a", "--logs", logs))


def save(folder, epoch):
    torch.save({"epoch": epoch, "name": "a", "state_dict": {}}, folder.checkpoints / f"epoch_{epoch}.pt")


def test_which_checkpoint_a_run_goes_on_from(tmp_path, caplog):
    caplog.set_level("INFO")
    latest = config_of(tmp_path, "--name", "a", "--resume", "latest")
    folder = start(config_of(tmp_path, "--name", "a"))
    for place in (folder, replace(folder, path=tmp_path / "new"), replace(folder, restarted=True)):
        assert checkpoint_to_resume(latest, place) is None
        told = f"--resume latest: no checkpoint in {place.checkpoints} yet: the run starts at the beginning"
        assert caplog.messages[-1] == told
    unasked = config_of(tmp_path, "--name", "a")
    assert checkpoint_to_resume(unasked, replace(folder, restarted=True)) is None
    save(folder, 1)
    save(folder, 2)
    assert checkpoint_to_resume(latest, folder) == folder.checkpoints / "epoch_2.pt"
    assert checkpoint_to_resume(unasked, replace(folder, restarted=True)) == folder.checkpoints / "epoch_2.pt"
    assert checkpoint_to_resume(unasked, folder) is None
    given = folder.checkpoints / "epoch_1.pt"
    named = config_of(tmp_path, "--resume", str(given))
    assert checkpoint_to_resume(named, folder) == given
    given.unlink()
    with pytest.raises(ValueError, match=r"--resume .*no such file"):
        checkpoint_to_resume(named, folder)


def test_unnamed_runs_of_one_second_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.run_folder.time.time", lambda: 1e9)
    first, second, third = (start(config_of(tmp_path)).name for _ in range(3))
    assert (second, third) == (f"{first}-2", f"{first}-3")


def test_a_folder_that_holds_no_run_is_used(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "slurm.out").write_text("")
    assert start(config_of(tmp_path, "--name", "a")).path == tmp_path / "a"


def test_resume_latest_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="--name"):
        choose_folder(config_of(tmp_path, "--resume", "latest"), MAIN)


@pytest.mark.parametrize("left", ["half", "weights", "a sample state missing"])
def test_a_run_with_checkpoints_of_which_none_is_complete_does_not_begin_anew(tmp_path, left, caplog):
    """With --resume latest, and where a launcher starts the job again."""
    folder = start(config_of(tmp_path, "--name", "a"))
    file = folder.checkpoints / "epoch_1.pt"
    if left == "a sample state missing":
        saved(folder.checkpoints, "epoch_1", 1)
        (folder.checkpoints / "epoch_1.state/.metadata").unlink()
    else:
        torch.save({"w": torch.ones(9)}, file)
    if left == "half":
        file.write_bytes(file.read_bytes()[:100])
    for flags, place in ((("--resume", "latest"), folder), ((), replace(folder, restarted=True))):
        with pytest.raises(ValueError, match=r"none of the 1 files in .*checkpoints \(epoch_1.pt\) is a complete"):
            checkpoint_to_resume(config_of(tmp_path, "--name", "a", *flags), place)
        assert "skipped: checkpoint" in caplog.text and "epoch_1.pt" in caplog.text
        caplog.clear()


def test_what_a_kill_in_the_first_save_leaves_is_no_checkpoint(tmp_path):
    folder = start(config_of(tmp_path, "--name", "a"))
    (folder.checkpoints / "epoch_1.state").mkdir()
    (folder.checkpoints / ".epoch_1.pt.0123456789ab.tmp").write_bytes(b"half")
    assert checkpoint_to_resume(config_of(tmp_path, "--name", "a", "--resume", "latest"), folder) is None


def begin_on_rank(logs):
    """Rank 1 sees an empty folder, as through a cache of its file system."""
    rank = int(os.environ["RANK"])
    config = config_of(logs, "--name", "a", "--resume", "latest")
    folder = choose_folder(config, World(rank, rank, 2, 2, torch.device("cpu")))
    if rank:
        folder = replace(folder, path=folder.path / "nothing")
    try:
        return checkpoint_to_resume(config, folder)
    except (ValueError, RuntimeError) as error:
        return str(error)


def test_ranks_agree_whether_a_run_begins(tmp_path):
    assert ranks(2).run(begin_on_rank, tmp_path) == [None, None]
    folder = start(config_of(tmp_path, "--name", "a"))
    (folder.checkpoints / "epoch_1.pt").write_bytes(b"half")
    first, second = ranks(2).run(begin_on_rank, tmp_path)
    assert "is a complete checkpoint" in first and second is not None


@pytest.mark.parametrize("name", [(), ("--name", "mine")])
@pytest.mark.parametrize(
    "first, again, other",
    [
        (
            {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"},
            {"SLURM_RESTART_COUNT": "1"},
            {"SLURM_JOB_ID": "72"},
        ),
        (
            {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"},
            {"TORCHELASTIC_RESTART_COUNT": "2"},
            {"TORCHELASTIC_RUN_ID": "9e1f"},
        ),
    ],
)
def test_a_restarted_job_finds_its_folder(tmp_path, monkeypatch, name, first, again, other):
    config = config_of(tmp_path, *name)
    for key, value in first.items():
        monkeypatch.setenv(key, value)
    folder = start(config)
    save(folder, 1)
    os.utime(folder.path / "launch.json", (1, 1))
    start(config_of(tmp_path, "--name", "another"))  # a second run of the same job, with another name
    (tmp_path / "another" / "launch.json").write_text("{}")
    for key, value in again.items():
        monkeypatch.setenv(key, value)
    found = choose_folder(config, MAIN)
    assert found.path == folder.path and found.restarted
    for key, value in other.items():  # another job, which was restarted too
        monkeypatch.setenv(key, value)
    if name:
        with pytest.raises(ValueError, match="already holds a run"):
            choose_folder(config, MAIN)
    else:
        assert not choose_folder(config, MAIN).restarted


def test_torchrun_without_a_run_id_is_known_by_its_agent():
    unnamed = launch_identity({"TORCHELASTIC_RUN_ID": "none"})
    assert unnamed["torchrun"].endswith(f":{os.getppid()}")
    assert launch_identity({"TORCHELASTIC_RUN_ID": "abc"}) == {"torchrun": "abc"}
    assert launch_identity({}) == {}


def test_copy_codebase_holds_this_code(tmp_path):
    import training.checkpoint.run_folder

    flags = ("--name", "a", "--copy-codebase")
    folder = start(config_of(tmp_path, *flags))
    copied = folder.path / "code" / "src" / "training" / "checkpoint" / "run_folder.py"
    with open(training.checkpoint.run_folder.__file__) as file:
        assert copied.read_text() == file.read()
    copied.write_text("what ran first")
    start(config_of(tmp_path, *flags, "--resume", "latest"))
    assert copied.read_text() == "what ran first"
    assert len(list(folder.path.glob("code_*/src/drrho_clip/__init__.py"))) == 1
    assert not list(folder.path.rglob("__pycache__"))


def choose_on_rank(logs, *flags):
    rank = int(os.environ["RANK"])
    world = World(rank, rank, 2, 2, torch.device("cpu"))
    try:
        return choose_folder(config_of(logs, *flags), world).name
    except ValueError as error:
        return error.args[0]


def test_ranks_agree_on_the_name_and_on_the_refusal(tmp_path):
    names = ranks(2).run(choose_on_rank, tmp_path)
    assert names[0] == names[1] and "model_RN50" in names[0]
    save(start(config_of(tmp_path, "--name", "a")), 1)
    refusals = ranks(2).run(choose_on_rank, tmp_path, "--name", "a")
    assert refusals[0] == refusals[1] and "already holds a run" in refusals[0]


def saved(folder, name, steps):
    """A checkpoint in ``folder``, saved later than all others there."""
    run = Run(0).train(steps)
    save_run([folder / f"{name}.pt"], run.state)
    return folder / f"{name}.pt"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_restarted_job_goes_on_from_its_own_checkpoints_and_not_from_the_file_it_began_with(
    tmp_path, monkeypatch, elsewhere
):
    (tmp_path / "old").mkdir()
    old = saved(tmp_path / "old" if elsewhere else tmp_path / "a" / "checkpoints", "epoch_1", 1)
    config = config_of(tmp_path, "--name", "a", "--resume", str(old))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = start(config)
    assert checkpoint_to_resume(config, folder) == old
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoint_to_resume(config, start(config)) == old  # it ended before it saved anything
    own = saved(folder.checkpoints, "step_2", 2)
    for _ in range(2):
        assert checkpoint_to_resume(config, start(config)) == own


def test_a_damaged_launch_file_is_that_of_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    folder = start(config_of(tmp_path, "--name", "a"))
    (folder.path / "launch.json").write_text('{"slurm": "7')
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    unnamed = choose_folder(config_of(tmp_path), MAIN)
    assert not unnamed.restarted and unnamed.path != folder.path
    assert not choose_folder(config_of(tmp_path, "--name", "a"), MAIN).restarted


def restarted_on_one_node(logs: str) -> bool:
    """Each torchrun agent has its own count: that of rank 0 is new, the other has started its ranks before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "job")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1" if dist.get_rank() else "0")
        config = parse(["--dataset-type", "synthetic", "--train-num-samples", "8", "--logs", logs])
        return choose_folder(config, World(dist.get_rank(), 0, 2, 1, torch.device("cpu"))).restarted


def test_a_new_node_does_not_hide_that_the_job_was_restarted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    folder = start(config_of(tmp_path))
    saved(folder.checkpoints, "step_1", 1)
    assert ranks(2).run(restarted_on_one_node, str(tmp_path)) == [True, True]


def test_a_new_agent_of_the_same_torchrun_job_goes_on_in_the_folder_that_the_name_says(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    config = config_of(tmp_path, "--name", "a")
    folder = start(config)
    saved(folder.checkpoints, "step_1", 1)
    assert choose_folder(config, MAIN).restarted
    folder.done.write_text("")
    with pytest.raises(ValueError, match="already holds a run"):
        choose_folder(config, MAIN)


def create_on_node(folder, *flags):
    """Each rank is a node of its own, which has ``logs`` in ``folder`` or in a folder of its own."""
    rank = int(os.environ["RANK"])
    place = folder / f"{rank}" if folder.name == "own" else folder
    place.mkdir(parents=True, exist_ok=True)
    before = os.getcwd()
    os.chdir(place)
    try:
        config = config_of("logs", "--name", "a", "--data_size", "8", *flags)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("training.checkpoint.run_folder._PAUSE", 0.01)
            start(config, World(rank, 0, 2, 1, torch.device("cpu")))
        dist.barrier()  # rank 0 may still be taking its mark away
    except ValueError as error:
        return str(error)
    finally:
        os.chdir(before)
    return sorted(path.name for path in (place / "logs" / "a").glob("*"))


def test_nodes_that_keep_parts_of_checkpoints_must_share_the_folder(tmp_path):
    """Else a run would train to its end, and none of its checkpoints be complete."""
    keeps = "--fastclip", "--gamma", "0.5"
    for refused in ranks(2).run(create_on_node, tmp_path / "own", *keeps):
        assert refused.startswith("--logs logs: what rank 0 has written there is not seen on ")
    first, second = ranks(2).run(create_on_node, tmp_path / "shared", *keeps)
    assert first == second and not any(name.startswith(".shared") for name in first)
    plain = tmp_path / "plain" / "own"
    assert ranks(2).run(create_on_node, plain)[0] == first, "OpenCLIP's checkpoints are rank 0's alone"
