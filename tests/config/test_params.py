"""From flags to one frozen configuration: which values follow from which flags."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from pathlib import Path

import pytest
import torch

from tests.support import tiny_models
from tests.support.commands import DATA, FASTCLIP, REFERENCE, config, refusal
from training.config.flags import ALL
from training.config.inputs.csv_files import csv_files
from training.config.params import Config

SRC = Path(__file__).parents[2] / "src"

# -------------------------------------------------------------------------------------- published commands

DRRHO = f"""
    --train-data 'data/{{00000..19999}}.tar' --train-num-samples 192160462 --data_size 255020000
    --model ViT-B-16 --batch-size 640 --epochs 7 --warmup 500 --wd 0.2 --seed 2025 --lr 3.125e-4 --lr_min 0
    --workers 6 --save-frequency 1 --local-loss --fastclip --multiply_tau --temperature_scheme global_constant
    --temperature 0.01 --lr_tau 0.0 --lr_tau_scheduler const --rho 11.0 --fastclip_eps 1e-4 --gamma 1.0
    --gamma_schedule cosine --gamma_decay_epochs 7 {REFERENCE} --precision amp_bf16"""
V2 = """
    --train-data 'data/{0..331}.tar' --train-num-samples 2723840 --data_size 3318333 --model RN50 --batch-size 128
    --epochs 37 --wd 0.1 --seed 2024 --lr 1e-3 --workers 6 --local-loss --fastclip
    --temperature_scheme individual_learnable --lr_tau 0.0133 --lr_tau_scheduler const --temperature 0.03 --rho 7.0
    --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18"""
OPENCLIP = "--train-data 'data/{0..331}.tar' --train-num-samples 2723840 --local-loss --gather-with-grad"


@pytest.fixture
def evaluation(tmp_path) -> str:
    """A published command that only evaluates."""
    torch.save({}, tmp_path / "epoch_1.pt")
    resume = f"--resume {tmp_path}/epoch_1.pt"
    return f"{resume} --imagenet-val {Path(__file__).parent} --epochs 0 --zeroshot-frequency 1"


def test_published_drrho_command():
    c = config(DRRHO)
    assert (c.loss.name, c.loss.decided_by, c.reference.usage) == ("fastclip", "--fastclip", {"ref"})
    assert (c.loss.temperature, c.loss.multiply_tau, c.loss.gamma) == (0.01, True, 1.0)
    assert (c.optim.lr, c.optim.lr_tau, c.optim.beta2, c.optim.eps) == (3.125e-4, 0.0, 0.98, 1e-6)
    assert (c.data.data_size, c.data.dataset_type, c.run.batch_size) == (255020000, "webdataset", 640)
    assert c.remarks == ("--local-loss: no effect with this loss, which has its own exchange between ranks",)


def test_published_individual_command():
    c = config(V2)
    assert (c.loss.name, c.loss.temperature, c.loss.multiply_tau) == ("fastclip_individual", 0.03, False)
    assert (c.optim.lr_tau, c.optim.eps) == (0.0133, 1e-8)


def test_published_openclip_command():
    c = config(OPENCLIP)
    assert (c.loss.name, c.loss.temperature, c.remarks) == ("clip", None, ())
    assert c.optim.lr_tau == c.optim.lr == 5e-4


def test_schedules_without_effect_are_not_refused(evaluation):
    assert config(f"{DATA} --skip-scheduler --lr 1e-4 --lr_min 1e-3").schedule.skip_scheduler
    assert not config(f"{evaluation} --lr-scheduler const-cooldown --epochs-cooldown 3").trains


def test_published_evaluation_command(evaluation):
    c = config(evaluation)
    assert not c.trains
    assert c.data.dataset_type == "none"


# -------------------------------------------------------------------------------------- what follows


@pytest.mark.parametrize(
    "line, name, decided_by",
    [
        (DATA, "clip", "the default"),
        (f"{DATA} --siglip", "siglip", "--siglip"),
        (f"{DATA} --loss siglip", "siglip", "--loss siglip"),
        (f"{DATA} --siglip --loss siglip", "siglip", "--loss siglip"),
        (f"{DATA} --model coca_ViT-B-32", "coca", "--model coca_ViT-B-32"),
        (f"{DATA} --distill-model ViT-B-32 --distill-pretrained openai", "distill", "--distill-model ViT-B-32"),
        (f"{DATA} --loss distill {REFERENCE}", "distill", "--loss distill"),
        (FASTCLIP, "fastclip", "--fastclip"),
        (f"{DATA} --loss fastclip --data_size 9", "fastclip", "--loss fastclip"),
        (f"{FASTCLIP} --temperature_scheme global_constant", "fastclip", "--fastclip"),
        (f"{FASTCLIP} --temperature_scheme individual_learnable", "fastclip_individual", "--fastclip"),
        (f"{FASTCLIP} --loss fastclip_individual", "fastclip_individual", "--loss fastclip_individual"),
    ],
)
def test_loss(line, name, decided_by):
    c = config(line)
    assert (c.loss.name, c.loss.decided_by) == (name, decided_by)
    assert (c.loss.temperature_scheme == "individual_learnable") == (name == "fastclip_individual")


def test_a_config_with_a_caption_decoder_is_coca_whatever_its_name(tmp_path):
    path = tmp_path / "captioner.json"
    path.write_text(json.dumps(tiny_models.config("tiny-coca")))
    assert config(f"{DATA} --model {path}").loss.name == "coca"
    assert config(f"{DATA} --model {tiny_models.path('tiny-vit', tmp_path / 'coca')}").loss.name == "clip"


def test_gamma_1_needs_no_data_size_unless_temperatures_are_kept(capsys):
    assert config(f"{DATA} --fastclip --gamma 1.0").data.data_size == -1
    line = f"{DATA} --fastclip --temperature_scheme individual_learnable --gamma 1.0"
    assert "--data_size is missing" in refusal(line, capsys)


def test_distillation_model_is_a_reference():
    r = config(f"{DATA} --distill-model ViT-B-32 --distill-pretrained openai").reference
    assert (r.ref_model, r.ref_model_pretrained, r.usage) == ("ViT-B-32", "openai", {"distill"})
    assert config(f"{DATA} --loss distill {REFERENCE}").reference.usage == {"distill"}


@pytest.mark.parametrize(
    "teacher", ["--distill-model ViT-B-32 --distill-pretrained openai", f"--loss distill {REFERENCE}"]
)
def test_a_teacher_can_select_too(teacher):
    line = f"{DATA} {teacher} --batch-size 20 --ref_filter_ratio 0.5 --ref_features_usage"
    for usage in ("select", "distill,select"):
        c = config(f"{line} {usage}")
        assert c.reference.usage == {"distill", "select"} and c.remarks == ()


@pytest.mark.parametrize("usage", ["select", "distill", "distill, select"])
def test_every_loss_can_select_and_distill(usage):
    c = config(f"{DATA} --siglip {REFERENCE} --ref_features_usage '{usage}' --batch-size 20")
    assert c.reference.usage == set(usage.replace(" ", "").split(","))


def test_without_a_reference_there_is_no_usage():
    assert config(FASTCLIP).reference.usage == frozenset()


@pytest.mark.parametrize(
    "model, expected",
    [
        ("ViT-B-16", (5e-4, 0.9, 0.98, 1e-6)),
        ("vit_medium_patch16_gap_256", (5e-4, 0.9, 0.98, 1e-6)),
        ("RN50", (5e-4, 0.9, 0.999, 1e-8)),
        ("convnext_base", (5e-4, 0.9, 0.999, 1e-8)),
    ],
)
def test_optimizer_defaults_by_model_name(model, expected):
    o = config(f"{DATA} --model {model}").optim
    assert (o.lr, o.beta1, o.beta2, o.eps) == expected


def test_optimizer_defaults_of_a_config_file_go_by_its_stem(tmp_path):
    folder = tmp_path / "vit"
    assert config(f"{DATA} --model {tiny_models.path('tiny-resnet', folder)}").optim.eps == 1e-8
    assert config(f"{DATA} --model {tiny_models.path('tiny-vit', tmp_path)}").optim.eps == 1e-6


def test_given_optimizer_values_win_zero_included():
    o = config(f"{DATA} --model ViT-B-16 --lr 0 --beta1 0 --eps 1e-3").optim
    assert (o.lr, o.beta1, o.beta2, o.eps) == (0.0, 0.0, 0.98, 1e-3)


def test_negative_temperature_rate_is_the_models():
    assert config(f"{DATA} --lr 3e-3").optim.lr_tau == 3e-3
    assert config(f"{DATA} --lr 3e-3 --lr_tau -7").optim.lr_tau == 3e-3
    assert config(f"{DATA} --lr 3e-3 --lr_tau 0").optim.lr_tau == 0.0


@pytest.mark.parametrize(
    "data, kind",
    [
        ("a/{0..3}.tar", "webdataset"),
        ("pipe:aws s3 cp s3://b/{0..3}.tar -", "webdataset"),
        ("a/*.tar::https://host/b.tar?x=1", "webdataset"),
        (__file__ + ".csv", "csv"),
        (__file__ + ".tsv", "csv"),
    ],
)
def test_kind_of_data(data, kind, tmp_path):
    if kind == "csv":
        data = tmp_path / Path(data).name
        data.write_text("")
    c = config(f"--train-data '{data}' --val-data '{data}' --train-num-samples 5")
    assert (c.data.dataset_type, c.evaluation.val_dataset_type) == (kind, kind)


def test_csv_may_leave_the_number_of_samples_to_its_rows(tmp_path):
    (tmp_path / "data.csv").write_text("")
    assert config(f"--train-data {tmp_path}/data.csv").data.train_num_samples is None


def test_synthetic_data_needs_no_path():
    c = config("--dataset-type synthetic --train-num-samples 10")
    assert (c.data.dataset_type, c.trains, c.evaluation.val_dataset_type) == ("synthetic", True, "none")


def test_data_size_per_source():
    line = "--train-data a.tar?x::b.tar?x --train-num-samples 5 --fastclip --data_size"
    assert (config(f"{line} 30::12").data.data_size, config(f"{line} 30::12").data.data_sizes) == (42, (30, 12))
    assert (config(f"{line} 42").data.data_size, config(f"{line} 42").data.data_sizes) == (42, (42,))


def test_upsampling_factors():
    line = "--train-data a.tar?x::b.tar?x --train-num-samples 5 --dataset-resampled"
    assert config(f"{line} --train-data-upsampling-factors 1::2.5").data.train_data_upsampling_factors == (
        1.0,
        2.5,
    )


def test_without_training_data_the_run_evaluates():
    c = config(f"--imagenet-val {Path(__file__).parent} --epochs 3")
    assert not c.trains
    assert c.remarks == ("no --train-data: this run only evaluates",)


def test_image_values():
    m = config(f"{DATA} --image-mean 0.5 --image-std 0.1 0.2 0.3 --force-image-size 64").model
    assert (m.image_mean, m.image_std, m.force_image_size) == ((0.5, 0.5, 0.5), (0.1, 0.2, 0.3), 64)
    assert config(f"{DATA} --force-image-size 64 32").model.force_image_size == (64, 32)


@pytest.mark.parametrize("text, expected", [("", set()), ("all", {"tensorboard", "wandb"}), ("wandb", {"wandb"})])
def test_report_to(text, expected):
    assert config(f"{DATA} --report-to '{text}'").run.report_to == expected
    assert config(f"{DATA} --report-to 'tensorboard, wandb'").run.report_to == {"tensorboard", "wandb"}


def test_one_spelling_of_bfloat16():
    assert config(f"{DATA} --precision amp_bfloat16").run.precision == "amp_bf16"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\t", "\t"),
        (r"\\t", "\t"),
        ("\t", "\t"),
        (r"\x01", "\x01"),
        (r"\001", "\x01"),
        (r"\u00a6", "¦"),
        (r"\|\|", "||"),
        (", ", ", "),
        ("¦", "¦"),
        ("x", "x"),
    ],
)
def test_separators_as_a_shell_hands_them_over(tmp_path, typed, meant):
    (tmp_path / "data.csv").write_text("")
    assert config(f"--train-data {tmp_path}/data.csv --csv-separator '{typed}'").data.csv_separator == meant


def test_names_of_csv_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("b.csv", "a.csv", "x[1].csv", "y::z.csv", "c.TSV", "d.csv.gz", "{0}.csv"):
        (tmp_path / name).write_text("")
    (tmp_path / "deep" / "1" / "2").mkdir(parents=True)
    for name in ("deep/y.csv", "deep/1/2/z.csv"):
        (tmp_path / name).write_text("")
    for value, files in {
        "*[ab].csv": ["a.csv", "b.csv"],
        "b.csv::a.csv": ["b.csv", "a.csv"],
        "{b,a}.csv::c.TSV": ["b.csv", "a.csv", "c.TSV"],
        "x[1].csv": ["x[1].csv"],
        "x[1].csv::a.csv": ["x[1].csv", "a.csv"],
        "y::z.csv": ["y::z.csv"],
        "{0}.csv": ["{0}.csv"],
        "~/a.csv": [f"{tmp_path}/a.csv"],
        "d.csv.gz": ["d.csv.gz"],
        "deep/**/*.csv": ["deep/1/2/z.csv", "deep/y.csv"],
        "https://host/a.csv::a.csv": ["https://host/a.csv", "a.csv"],
    }.items():
        assert config(f"--train-data '{value}'").data.dataset_type == "csv"
        assert csv_files(value, "--train-data") == files


# -------------------------------------------------------------------------------------- frozen


def groups(c: Config):
    return [getattr(c, field.name) for field in fields(c) if is_dataclass(getattr(c, field.name))]


def test_nothing_can_be_written():
    c = config(f"{FASTCLIP} --aug-cfg scale=(0.5,1.0) --image-mean 0.1 0.2 0.3")
    assert len(groups(c)) == 10
    for group in [c, *groups(c)]:
        for field in fields(group):
            with pytest.raises(FrozenInstanceError):
                setattr(group, field.name, None)
    for mapping in (c.flags, c.data.aug_cfg):
        with pytest.raises(TypeError):
            mapping["scale"] = 1
        with pytest.raises(AttributeError):
            mapping._items = {}


def test_a_config_can_be_copied_and_pickled():
    c = config(f"{FASTCLIP} --aug-cfg scale=(0.5,1.0) use_timm=True")
    for other in (copy.deepcopy(c), copy.copy(c), pickle.loads(pickle.dumps(c))):
        assert other == c
        assert dict(other.data.aug_cfg) == {"scale": (0.5, 1.0), "use_timm": True}
    assert c != config(f"{FASTCLIP} --aug-cfg scale=(0.4,1.0) use_timm=True")


def test_flags_are_kept_as_they_were_given():
    c = config(f"{DATA} --lr_tau -1 --precision amp_bfloat16")
    assert set(c.flags) == set(ALL)
    assert (c.flags["lr_tau"], c.flags["lr"], c.flags["precision"]) == (-1.0, None, "amp_bfloat16")


@pytest.mark.parametrize("model, beta2, eps", [("ViT-B-32", 0.98, 1e-6), ("RN50", 0.999, 1e-8)])
def test_flags_are_recorded_with_the_optimizers_defaults(model, beta2, eps):
    """CLIP's, as OpenCLIP fills them in before it writes params.txt."""
    c = config(f"{DATA} --model {model} --fastclip --data_size 8")
    filled = {"lr": 5e-4, "lr_tau": 5e-4, "beta1": 0.9, "beta2": beta2, "eps": eps}
    assert c.recorded_flags == {**c.flags, **filled}
    given = config(f"{DATA} --model {model} --lr 1e-3 --lr_tau 0 --beta1 0.8 --beta2 0.9 --eps 1e-7")
    assert given.recorded_flags == given.flags
    assert config(f"{DATA} --lr 1e-3").recorded_flags["lr_tau"] == 1e-3


def test_every_flag_reaches_the_configuration():
    # Refused flags reach nothing; these are resolved into other fields.
    resolved = {"loss", "siglip", "fastclip", "config_file", "distill_model", "distill_pretrained"}
    resolved |= {"ref_features_usage", "dataset_resampled", "cache_ref_model_features", "cache_syn_texts"}
    reached = {field.name for group in groups(config(DATA)) for field in fields(group)}
    assert set(ALL) - reached == resolved | {key for key, flag in ALL.items() if flag.refused}


def test_refusals_and_help_import_nothing_heavy():
    code = (
        "import sys; from training.main import main\n"
        "for argv in (['--help'], ['--lr', '-1'], ['--train-data', 'x'], ['--loss', 'x', '--epochs', '0']):\n"
        "    try: main(argv)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'open_clip', 'timm', 'webdataset'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(SRC)}
    )
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("given", "spans"),
    [
        ("1e-3", {"image": (1e-3, 1e-3), "text": (1e-3, 1e-3), "ref": (1e-3, 1e-3)}),
        ("4e-3:1e-3", {"image": (4e-3, 1e-3), "text": (4e-3, 1e-3), "ref": (4e-3, 1e-3)}),
        ("image=1e-3, ref=2e-3:1e-2", {"image": (1e-3, 1e-3), "text": None, "ref": (2e-3, 1e-2)}),
    ],
)
def test_error_bounds_by_kind(given, spans):
    assert vars(config(f"{FASTCLIP} --gather_error_bound '{given}'").loss.gather_error_bound) == spans


SELECT = f"{DATA} {REFERENCE} --ref_features_usage select --ref_filter_ratio 0.75"


@pytest.mark.parametrize(
    ("line", "ranks", "batch", "accum"),
    [
        (f"{DATA} --global_batch_size 96 --batch-size 16", 2, 48, 3),
        (f"{SELECT} --global_batch_size 96 --batch-size 16", 1, 96, 2),  # 24 of 96 are trained on
        (f"{SELECT} --global_batch_size 96 --batch-size 16", 4, 24, 1),
    ],
)
def test_a_global_batch_is_shared_by_the_ranks(line, ranks, batch, accum):
    run = config(line).on_ranks(ranks).run
    assert (run.batch_size, run.accum_freq) == (batch, accum)


@pytest.mark.parametrize(
    ("line", "ranks", "sentence"),
    [
        (f"{DATA} --batch-size 10", 2, "the 48 samples of each of 2 ranks cannot be split into 5 equal"),
        (SELECT, 16, "would keep 1.5 of the 6 samples of a rank, in --ref_filter_n_chunks 2 equal draws"),
        (f"{SELECT} --ref_filter_n_chunks 5", 2, "would keep 12 of the 48 samples of a rank"),
        (f"{SELECT} --batch-size 5", 1, "the 24 samples of each of 1 ranks cannot be split into 5 equal"),
    ],
)
def test_a_global_batch_that_the_ranks_cannot_share_is_refused(line, ranks, sentence):
    with pytest.raises(ValueError, match="--global_batch_size 96") as refused:
        config(f"{line} --global_batch_size 96").on_ranks(ranks)
    assert sentence in str(refused.value)


def test_what_selection_embeds_is_split_like_what_it_keeps():
    line = f"{DATA} {REFERENCE} --ref_features_usage select --ref_filter_ratio 0.2 --batch-size 10"
    with pytest.raises(
        ValueError, match=r"the 25 samples of each of 2 ranks, of which selection keeps 20, .* the 2 equal"
    ) as no:
        config(f"{line} --global_batch_size 50").on_ranks(2)
    assert "--batch-size 20" in str(no.value)
    run = config(f"{line} --batch-size 20 --global_batch_size 50").on_ranks(2).run
    assert (run.batch_size, run.accum_freq) == (25, 1)
