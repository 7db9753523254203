"""What is refused once the ranks are known."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.support import tiny_models
from tests.support.commands import REFERENCE, config
from tests.support.pictures import write_folders
from tests.support.ranks import ranks
from tests.support.shards import write_csv, write_tar
from training import preflight
from training.config.params import parse
from training.data.sources.webdataset import open_shards
from training.distributed.process_group import World
from training.machine.gpus import without_gpu

SYNTHETIC = "--dataset-type synthetic --train-num-samples 8"
FASTCLIP = f"{SYNTHETIC} --data_size 8 --fastclip"
PUBLISHED = "--fastclip --cached_ref_features_dir @published_features --num_samples_per_shard 4"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    """Remarks on few cores would depend on the machine that runs the tests."""
    monkeypatch.setattr(preflight, "cores", lambda: 64)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def check(line: str, ranks: int = 1, device: torch.device = CPU) -> list[str]:
    """The remarks on a run that is not refused."""
    return list(preflight.check(config(line), World(0, 0, ranks, ranks, device)).remarks)


def test_a_batch_without_negatives():
    with pytest.raises(ValueError, match=r"--batch-size 1 on 1 rank: the loss 'fastclip' .* at least 2"):
        check(f"{FASTCLIP} --batch-size 1")
    check(f"{FASTCLIP} --batch-size 1", ranks=2)
    check(f"{SYNTHETIC} --batch-size 1 --siglip")


@pytest.mark.parametrize("scheme", ["global_learnable", "individual_learnable"])
def test_a_selected_batch_without_negatives(scheme):
    select = f"--temperature_scheme {scheme} {REFERENCE} --ref_features_usage ref,select --ref_filter_n_chunks 1"
    line = f"{FASTCLIP} {select}"
    refused = r"^--ref_filter_ratio 0\.8 keeps 1 sample of --batch-size 5 on 1 rank: .* at least 2; give a lower"
    for size in ("--batch-size 5", "--global_batch_size 5"):
        with pytest.raises(ValueError, match=refused):
            preflight.check_batch(config(f"{line} {size}").on_ranks(1), 1)
    preflight.check_batch(config(f"{line} --batch-size 5"), 2)
    preflight.check_batch(config(f"{line} --batch-size 10"), 1)
    preflight.check_batch(config(f"{line} --batch-size 5 --ref_filter_ratio 0.6"), 1)


def test_shared_memory_that_cannot_hold_the_batches(monkeypatch, tmp_path):
    monkeypatch.setattr("training.distributed.loader_processes.shared_memory", lambda: 64 * 2**20)
    monkeypatch.setattr(preflight, "shared_memory", lambda: 64 * 2**20)  # what Docker gives
    own = f"{SYNTHETIC} --model {tiny_models.path('tiny-vit', tmp_path)}"
    small, large = f"{own} --batch-size 8", f"{own} --batch-size 64 --force-image-size 256"
    refused = (
        r"^--workers 2: /dev/shm \(64 MB\) has too little room .* at least 72 MB: .*--shm-size=.*--workers 0$"
    )
    with pytest.raises(ValueError, match=refused):
        check(f"{large} --workers 2")
    check(f"{large} --workers 1")
    check(f"{large} --workers 0")
    check(f"{small} --workers 2")
    with pytest.raises(ValueError, match="at least 144 MB"):  # two ranks on the node
        preflight.check(config(f"{large} --workers 2"), World(0, 0, 4, 2, CPU))
    with pytest.raises(ValueError, match=r"--workers 4: .* at least 110 MB"):  # 64 pictures of 224 x 224
        check(f"{SYNTHETIC} --model ViT-B-32 --batch-size 64 --workers 4")


def test_sync_bn_without_gpus():
    line = f"{FASTCLIP} --batch-size 2 --use-bn-sync"
    with pytest.raises(ValueError, match="--use-bn-sync needs GPUs"):
        check(line, ranks=2)
    assert check(line, ranks=2, device=GPU) == []


def test_sync_bn_alone():
    line = f"{FASTCLIP} --batch-size 2 --use-bn-sync"
    assert check(line) == ["--use-bn-sync: no effect in a single process, whose BatchNorm sees the whole batch"]


def test_a_single_process_has_nothing_to_compress():
    told = ["--gather_error_bound: no effect in a single process, which sends nothing"]
    assert check(f"{FASTCLIP} --batch-size 2 --gather_error_bound 1e-3") == told


def test_teachers_of_the_distillation_loss_whose_widths_do_not_add_up(tmp_path):
    torch.save({}, tmp_path / "weights.pt")
    teacher = tiny_models.path("tiny-vit-reference", tmp_path)
    line = f"{SYNTHETIC} --distill-model {teacher} --distill-pretrained {tmp_path}/weights.pt"
    check(line)
    check(f"{line} --distill_teacher_dimension 8 16")
    with pytest.raises(ValueError, match=r"dimension 8 8: .*add up to 16, .* --distill-model .* are 24 wide"):
        check(f"{line} --distill_teacher_dimension 8 8")


@pytest.mark.parametrize("usage", ["distill", "ref,distill"])
def test_teachers_whose_widths_do_not_add_up(tmp_path, usage):
    torch.save({}, tmp_path / "weights.pt")
    own = f"--ref_model {tiny_models.path('tiny-vit-reference', tmp_path)}"
    own += f" --ref_model_checkpoint {tmp_path}/weights.pt"
    for reference, right in ((own, "8 16"), (REFERENCE, "256 256")):
        line = f"{FASTCLIP} --batch-size 2 {reference} --ref_features_usage {usage}"
        check(f"{line} --distill_teacher_dimension {right}")
        check(line)
        with pytest.raises(ValueError, match=r"dimension 8 8: .*add up to 16, .* --ref_model .* are \d+ wide"):
            check(f"{line} --distill_teacher_dimension 8 8")


def test_shards_that_are_not_there(tmp_path):
    train = f"--train-data {tmp_path}/{{0..3}}.tar --train-num-samples 8"
    with pytest.raises(ValueError, match=rf"--train-data .*: there is no {tmp_path}/0\.tar"):
        check(train)
    with pytest.raises(ValueError, match=rf"--val-data .*: there is no {tmp_path}/5\.tar"):
        check(f"--epochs 0 --val-data {tmp_path}/{{5..7}}.tar")
    write_tar(tmp_path / "2.tar", [])
    with pytest.raises(
        ValueError, match=r"3 of 4 shards are missing, the first is .*0\.tar; that is more than .* 0\.05 allows"
    ):
        check(train)
    assert check(f"{train} --max_bad_fraction 0.8") == [
        f"--train-data: 3 of 4 shards are missing, the first is {tmp_path}/0.tar"
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vision_cfg": {"widht": 64}}, "unexpected keyword argument 'widht'"),
        ({"text_cfg": {"heads": 3}}, "divisible"),
        ({"embed_dim": "wide"}, "unpack"),
    ],
)
def test_a_model_config_with_an_error_is_a_sentence(tmp_path, change, says):
    model = tiny_models.path("tiny-vit", tmp_path, **change)
    weights = tmp_path / "weights.pt"
    torch.save({}, weights)
    lines = {
        "--model": f"{SYNTHETIC} --model {model}",
        "--ref_model": f"{FASTCLIP} --ref_model {model} --ref_model_pretrained {weights}",
        "--distill-model": f"{SYNTHETIC} --distill-model {model} --distill-pretrained {weights}",
    }
    for flag, line in lines.items():
        with pytest.raises(ValueError, match=rf"^{flag} .*tiny-vit\.json: open_clip cannot build .*{says}"):
            check(line)


def test_csv_files_are_read_once_before_anything_is_built(tmp_path):
    data = write_csv(tmp_path, 4)
    opened = preflight.check(
        config(f"--train-data {data} --val-data {data} --data_size 4"), World(0, 0, 1, 1, CPU)
    )
    assert opened.table.count() == opened.val_table.count() == 4 and opened.remarks == ()
    with pytest.raises(ValueError, match=r"--data_size 3: .*data\.csv has 4 rows"):
        check(f"--train-data {data} --data_size 3")
    (tmp_path / "000000.jpg").unlink()
    assert check(f"--train-data {data}") == []
    (tmp_path / "000001.jpg").unlink()
    (tmp_path / "000002.jpg").unlink()
    for line in (f"--train-data {data}", f"--epochs 0 --val-data {data}"):
        (remark,) = check(line)
        assert "of 4 pictures that were looked for, 3 do not exist" in remark
    (tmp_path / "000003.jpg").unlink()
    for line in (f"--train-data {data}", f"--epochs 0 --val-data {data}", f"{SYNTHETIC} --val-data {data}"):
        with pytest.raises(ValueError, match=r"(train|val)-data .*data\.csv: of 4 pictures .*, 4 do not exist"):
            check(line)
    (tmp_path / "data.csv").write_text("filepath\ttitle\na")
    for line in (f"--train-data {data}", f"--epochs 0 --val-data {data}"):
        with pytest.raises(ValueError, match=r"(train|val)-data .*data\.csv, line 2: 1 field, but"):
            check(line)


def test_what_is_not_used_of_a_folder_of_pictures_is_remarked(tmp_path):
    folder = write_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "empty").mkdir()
    assert check(f"--imagenet-val {folder}") == [
        f"--imagenet-val {folder}: folders without pictures are not taken as classes: empty",
    ]


def _listings(words: list[str]) -> tuple[int, list[str], int]:
    """How many folders of this run's data this rank lists, the sets, and the samples' shards."""
    given, rank, listed = parse(words), dist.get_rank(), []

    def counted(name: str):
        listing = getattr(os, name)

        def count(path=".", *args, **kwargs):
            listed.append(path)
            return listing(path, *args, **kwargs)

        return count

    world = World(rank, rank, 2, 2, CPU)
    with (
        mock.patch.object(os, "listdir", counted("listdir")),
        mock.patch.object(os, "scandir", counted("scandir")),
    ):
        opened = preflight.check(given, world)
        source = open_shards(given.data, given.run.seed, world, steps=4)
    return len([path for path in listed if "/lab" in str(path)]), list(opened.sets), len(source.shards)


def test_one_rank_lists_folders_for_all(lab):
    root = lab.path("shards").rsplit("/", 1)[0]
    line = f"--train-data {root}/*.tar --val-data {root}/*.tar --imagenet-val @pictures {PUBLISHED}"
    first, second = ranks(2).run(_listings, lab.words(line))
    assert first[0] > 4 and second[0] == 0
    assert first[1:] == second[1:] == (["imagenet"], 4)


# --------------------------------------------------------------------------------------------- the machine


def test_more_loader_processes_than_cores_are_a_remark(monkeypatch):
    monkeypatch.setattr(preflight, "cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    many = "--workers 5: 10 loader processes on this machine share 8 cores; more than 4 per rank"
    assert [line for line in check(f"{SYNTHETIC} --workers 5", ranks=2) if line.startswith(many)]
    assert check(f"{SYNTHETIC} --workers 4", ranks=2) == []  # each rank may have cores of its own
    assert len(check(f"{SYNTHETIC} --workers 5")) == 1


def test_torchcompile_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="--torchcompile needs a compiler, and"):
        check(f"{SYNTHETIC} --torchcompile")


def test_a_run_beside_gpus_that_it_cannot_use(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(
        preflight, "without_gpu", lambda **_: without_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path)
    )
    (remark,) = check(SYNTHETIC)
    assert "hides the 1 GPU" in remark


def test_bfloat16_on_a_gpu_that_has_no_units_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    (remark,) = check(f"{SYNTHETIC} --precision amp_bfloat16", device=GPU)
    assert remark.startswith("--precision amp_bf16: Tesla V100 has no bfloat16 units")
    assert check(f"{SYNTHETIC} --precision amp", device=GPU) == []
