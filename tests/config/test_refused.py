"""Every combination of flags that is refused: one sentence, exit code 2."""

from __future__ import annotations

import pytest

from tests.support.commands import DATA, FASTCLIP, REFERENCE, refusal
from training.config.params import parse

ONE_OF_TWO = "keep one of them"
REFUSALS = {
    f"{FASTCLIP} --loss_weight 0": "--loss_weight 0.0 leaves nothing to train on",
    f"{DATA} --precision bf16 --grad_compression fp16": "the gradients of --precision bf16 have 16 bits already",
    f"{DATA} --precision pure_fp16 --grad_compression bf16": "--grad_compression bf16: the gradients of",
    f"{DATA} --precision amp --grad_compression powersgd": "does not go with --precision amp, whose scale of the",
    f"{DATA} --precision bf16 --grad_compression powersgd": "and it needs float32 gradients: use fp32 or amp_bf16",
    f"{DATA} --grad_compression powersgd --powersgd_rank 0": "--powersgd_rank 0: the value must lie in [1, inf)",
    f"{FASTCLIP} --gather_error_bound tight": "'tight' is not a bound: give a number such as 1e-3",
    f"{FASTCLIP} --gather_error_bound 1e-6": "a bound must be in [2e-05, 0.1]",
    f"{FASTCLIP} --gather_error_bound 1e-3:0": "a bound must be in [2e-05, 0.1]",
    f"{FASTCLIP} --gather_error_bound nan": "a bound must be in [2e-05, 0.1]",
    f"{FASTCLIP} --gather_error_bound picture=1e-3": "give one bound for all, or one each for image, text, ref",
    f"{FASTCLIP} --gather_error_bound 1e-3,ref=1e-3": "give one bound for all, or one each for image, text, ref",
    f"{FASTCLIP} --sample_state_dtype float16": "--sample_state_dtype float16: give float32, bound, or",
    f"{FASTCLIP} --sample_state_dtype bound=": "--sample_state_dtype bound=: give float32, bound, or",
    f"{FASTCLIP} --sample_state_dtype bound=nan": "--sample_state_dtype bound=nan: give float32, bound, or",
    f"{FASTCLIP} --sample_state_dtype bound=-1": "--sample_state_dtype bound=-1: give float32, bound, or",
    f"{FASTCLIP} --sample_state_dtype bound=1e-4": "1e-14; give at least bound=0.000974, or float32",
    f"{FASTCLIP} --sample_state_dtype bound --fastclip_eps 1e-40": "--fastclip_eps 1e-40; give at least",
    f"{FASTCLIP} --sample_state_dtype bound=0.3 --gamma 0.2": "--gamma 0.2 log u falls by at most 0.223",
    # nothing to do, data
    "": "--train-data is missing: give data to train on",
    f"{DATA} --epochs 0": "only evaluates: give --val-data, --imagenet-val, --imagenet-v2 or --eval_data_dir",
    "--train-data shards/{0..3}.tar": "--train-num-samples is missing: webdataset data has no known length",
    "--dataset-type synthetic": "--train-num-samples is missing: synthetic data",
    "--train-data shards/{0..3} --train-num-samples 5": "--train-data shards/{0..3}: it is neither .tar nor .csv",
    "--train-data {0..3}.tar::x.csv --train-num-samples 5": "it mixes shards and csv files; give --dataset-type",
    "--train-data 0.tar:: --train-num-samples 5": "'' is not on this machine; take out the :: that",
    "--train-data nowhere --train-num-samples 5": "nowhere: it is not on this machine; check the path",
    "--train-data $HOME/x.tar --train-num-samples 5": "write the variable out, as no shell has replaced it",
    "--train-data 0..3.tar --train-num-samples 5": "write a range as {00000..00099}",
    "--train-data 0.tar,1.tar --train-num-samples 5": "no such file on this machine; join several with ::",
    f"{DATA} --image_key jpg;": "--image_key 'jpg;': a name is missing; expected extensions joined with ;",
    f"{DATA} --image_key jpg,png": "--image_key 'jpg,png': 'jpg,png' is no extension; expected extensions joined",
    f"{DATA} --image_key json:image": "--image_key 'json:image': an image cannot be a field of a json",
    f"{DATA} --text_key json": "name the field of the json that is the caption, as in json:caption",
    f"{DATA} --text_key json:": "--text_key 'json:': a name is missing; expected extensions or fields of a json",
    f"{DATA} --json_key json:meta..id": "--json_key 'json:meta..id': a name is missing; expected jsons",
    "--train-data nowhere.csv": "--train-data nowhere.csv: there is no such file on this machine; check the path",
    "--train-data run[1]/nowhere.tsv": "there is no such file on this machine, and none matches the pattern",
    "--train-data nowhere.tsv::nowhere.csv": "there is no file 'nowhere.tsv' on this machine; check the path",
    "--train-data nowhere{0..1}.tsv": "there is no file 'nowhere0.tsv' on this machine; check the path",
    f"--train-data {__file__}:: --dataset-type csv": "there is nothing before or behind a '::'; remove it",
    "--train-data http://h/x.csv --epochs 1 --csv-separator ''": "--csv-separator '': a separator is one or more",
    "--train-data http://h/x.csv --csv-separator '\"'": "a separator is one or more characters, but no quote sign",
    "--train-data http://h/x.csv --csv_encoding utf8000": "--csv_encoding utf8000: there is no such encoding",
    "--train-data http://h/x.csv --csv_encoding base64": "--csv_encoding base64: there is no such encoding",
    "--train-data http://h/x.csv --csv_encoding punycode": "--csv_encoding punycode: there is no such encoding",
    "--train-data 'pipe:cat x' --dataset-type csv": "csv files are not read from commands; write its output into",
    "--train-data http://h/x.csv --train-data-upsampling-factors 2": "--dataset-resampled; leave it out",
    "--train-data nowhere.tar --train-num-samples 5": "--train-data nowhere.tar: there is no such file",
    "--imagenet-val nowhere": "--imagenet-val nowhere: there is no such file",
    f"{DATA} --resume nowhere.pt": "--resume nowhere.pt: there is no such file",
    f"{DATA} --pretrained nowhere.pt": "--pretrained nowhere.pt: there is no such file",
    f"{DATA} --train-data-upsampling-factors 2": "drawn with --dataset-resampled; add that flag",
    f"{DATA} --dataset-resampled --train-data-upsampling-factors 1::2": "2 weights for 1 --train-data sources",
    f"{DATA} --dataset-resampled --train-data-upsampling-factors a": "expected numbers joined with ::",
    f"{DATA} --dataset-resampled --train-data-upsampling-factors 0": "every weight must be above 0",
    f"{DATA} --data_size 0": "--data_size 0: each size must be at least 1",
    f"{DATA} --data_size 3::0": "--data_size 3::0: each size must be at least 1",
    f"{DATA} --data_size 3::4": "--data_size 3::4: 2 sizes for 1 --train-data sources",
    # model
    f"{DATA} --model ViT-B-61": "--model ViT-B-61: open_clip has no such model; did you mean ViT-B-16",
    f"{DATA} --model nowhere.json": "--model nowhere.json: the model config cannot be read",
    f"{DATA} --image-mean 0.1 0.2": "--image-mean 0.1 0.2: give one number per channel (3), or one for all",
    f"{DATA} --force-image-size 1 2 3": "--force-image-size 1 2 3: give one size, or height and width",
    # loss
    f"{DATA} --loss mse": "--loss mse: unknown, choose one of clip, coca, distill, fastclip, fastclip_individual",
    f"{FASTCLIP} --siglip": ONE_OF_TWO,
    f"{FASTCLIP} --model coca_ViT-B-32": ONE_OF_TWO,
    f"{FASTCLIP} --distill-model RN50 --distill-pretrained openai": ONE_OF_TWO,
    f"{DATA} --siglip --loss clip": "--loss clip contradicts --siglip, which asks for 'siglip'",
    f"{FASTCLIP} --loss clip": "--loss clip contradicts --fastclip",
    f"{DATA} --model coca_ViT-B-32 --loss clip": "--loss clip contradicts --model coca_ViT-B-32",
    f"{DATA} --loss coca": "--loss coca: --model RN50 has no caption decoder",
    f"{DATA} --loss distill": "--loss distill needs a teacher: give --distill-model",
    f"{DATA} --loss fastclip_individual --temperature_scheme global_constant": "which contradicts",
    f"{DATA} --loss fastclip --temperature_scheme individual_learnable": "use --loss fastclip_individual",
    f"{DATA} --fastclip": "--data_size is missing: the loss 'fastclip' keeps values per sample",
    f"{FASTCLIP} --temperature 0.005": "--temperature 0.005: --logit_scale_bound keeps it in [0.01, 1]",
    f"{FASTCLIP} --temperature_scheme individual_learnable --temperature 2": "individual temperatures are kept in",
    f"{FASTCLIP} --temperature_scheme free": "--temperature_scheme free: unknown, choose one of global_learnable",
    f"{FASTCLIP} --gamma_schedule step": "--gamma_schedule step: unknown, choose one of cosine, constant",
    # reference
    f"{DATA} {REFERENCE}": "--ref_model ViT-B-32: the loss 'clip' does not use a reference's margins",
    f"{DATA} --siglip {REFERENCE} --ref_features_usage ref,select": "--ref_model ViT-B-32: the loss 'siglip'",
    f"{FASTCLIP} --ref_model ViT-B-32": "--ref_model ViT-B-32 has no weights: give --ref_model_pretrained",
    f"{FASTCLIP} --ref_model ViT-B-23 --ref_model_pretrained x": "--ref_model ViT-B-23: open_clip has no such",
    f"{FASTCLIP} --ref_model RN50 --ref_model_checkpoint x": "--ref_model_checkpoint x: there is no such file",
    f"{FASTCLIP} --ref_model_pretrained openai": "--ref_model_pretrained openai has no effect without --ref_model",
    f"{FASTCLIP} --ref_features_usage ref": "--ref_features_usage ref has no effect without --ref_model",
    f"{FASTCLIP} {REFERENCE} --ref_features_usage rev": "--ref_features_usage rev: expected a comma-separated",
    f"{FASTCLIP} {REFERENCE} --ref_features_usage ''": "--ref_features_usage '': expected a comma-separated",
    f"{DATA} --distill-model RN50": "--distill-model RN50 needs --distill-pretrained",
    f"{DATA} --distill-pretrained openai": "--distill-pretrained openai needs --distill-model",
    f"{DATA} --distill-model RN50 --distill-pretrained openai {REFERENCE}": "are two references: give one",
    f"{DATA} --distill-model RN50 --distill-pretrained openai --distill_weight 2": "give at most 1",
    f"{DATA} --distill-model RN50 --distill-pretrained openai --ref_model_pretrained yfcc15m": (
        "--ref_model_pretrained yfcc15m has no effect without --ref_model: the teacher's are --distill-pretrained"
    ),
    f"{DATA} --distill-model RN50 --distill-pretrained openai --ref_features_usage select": (
        "--ref_filter_ratio 0.8 would keep 12.8 samples"
    ),
    f"{DATA} --distill_teacher_dimension 512 0": "--distill_teacher_dimension 512 0: every width must be",
    # batch
    f"{DATA} --accum-freq 3": "--accum-freq 3 does not divide --batch-size 64: choose a divisor of 64",
    f"{DATA} --accum-freq 2 --ddp-static-graph": "--ddp-static-graph does not work with --accum-freq 2",
    f"{DATA} {REFERENCE} --ref_features_usage select": "--ref_filter_ratio 0.8 would keep 12.8 samples",
    f"{DATA} {REFERENCE} --ref_features_usage select --batch-size 10 --ref_filter_n_chunks 3": "the 2 samples",
    f"{DATA} {REFERENCE} --ref_features_usage select --batch-size 10 --accum-freq 4": "divide --batch-size 10",
    f"{DATA} {REFERENCE} --ref_features_usage select --batch-size 20 --accum-freq 4 --ref_filter_n_chunks 1"
    " --ref_filter_ratio 0.5": "--accum-freq 4 does not divide the 10 samples",
    # optimizer and schedule
    f"{DATA} --optimizer adam": "--optimizer adam: unknown, choose one of adamw, lamb, lion, sgd, nesterov",
    f"{DATA} --optimizer nesterov --momentum 0": "--optimizer nesterov needs a momentum above 0",
    f"{DATA} --lr-scheduler linear": "--lr-scheduler linear: unknown, choose one of cosine",
    f"{DATA} --lr_tau_scheduler linear": "--lr_tau_scheduler linear: unknown",
    f"{DATA} --lr-scheduler const-cooldown": "--lr-scheduler const-cooldown needs --epochs-cooldown",
    f"{DATA} --lr-scheduler const-cooldown --epochs-cooldown 9 --epochs 4": "--epochs-cooldown 9 is longer than",
    f"{DATA} --lr_min 1e-4 --lr_tau 1e-5": "--lr_tau 1e-05 is below --lr_min 0.0001",
    f"{DATA} --lr 1e-4 --lr_min 1e-3": "--lr_min 0.001 is above the learning rate 0.0001",
    f"{DATA} --iters 0": "--iters 0: give at least 1, or -1 to switch it off",
    f"{DATA} --stop_epochs 0": "--stop_epochs 0: give at least 1, or -1 to switch it off",
    f"{DATA} --stop_iters 0": "--stop_iters 0: give at least 1, or -1 to switch it off",
    # run
    f"{DATA} --report-to mlflow": "--report-to mlflow: expected tensorboard, wandb, both separated by a comma",
    f"{DATA} --name ''": "--name '': the name is empty",
    f"{DATA} --name '  '": "--name '  ': the name is empty",
    f"{DATA} --name {'n' * 300}": f"--name '{'n' * 80}': it has 300 bytes, and names of folders may have 255",
    f"{DATA} --name a/{'ü' * 128}": "it has 256 bytes, and names of folders may have 255",
    f"{DATA} --name ../a": "--name ../a: the run's folder would be outside of --logs",
    f"{DATA} --name a/../../b": "--name a/../../b: the run's folder would be outside of --logs",
    f"{DATA} --name /data/a": "--name /data/a: the run's folder would be outside of --logs",
    f"{DATA} --name ~/a": "--name ~/a: the run's folder would be outside of --logs",
    f"{DATA} --name a//b": "--name a//b: a folder between its slashes has no name",
    f"{DATA} --name ./": "--name ./: a folder between its slashes has no name",
    f"{DATA} --name 'a\nb'": "--name 'a\\nb': it contains characters that cannot be printed",
    f"{DATA} --name 'a\udcff'": "--name 'a\\udcff': it contains characters that cannot be printed",
    f"{DATA} --name -a": "--name: expected one argument",
    f"{DATA} --resume {'r' * 300}": f"--resume {'r' * 300}: it cannot be used (File name too long)",
    f"--train-data {'r' * 300}.tar --train-num-samples 8": "it cannot be used (File name too long)",
    f"{DATA} --config_file {'r' * 300}": "the file cannot be read ([Errno 36] File name too long",
    f"{DATA} --dist-backend mpi": "--dist-backend mpi: unknown, choose one of nccl, gloo",
    f"{DATA} --epoch 3": "--epoch: not a flag of this program; did you mean --epochs?",
    f"{DATA} --config_file nowhere.yaml": "--config_file nowhere.yaml: the file cannot be read",
}


@pytest.mark.parametrize("line, expected", REFUSALS.items(), ids=range(len(REFUSALS)))
def test_refusal(line, expected, capsys):
    sentence = refusal(line, capsys)
    assert expected in sentence
    assert "--" in sentence  # names the flag


def test_a_model_config_that_is_none(tmp_path, capsys):
    (tmp_path / "half.json").write_text('{"embed_dim": 3}')
    assert "lacks vision_cfg, text_cfg" in refusal(f"{DATA} --model {tmp_path}/half.json", capsys)
    (tmp_path / "broken.json").write_text("{")
    assert "cannot be read" in refusal(f"{DATA} --model {tmp_path}/broken.json", capsys)
    (tmp_path / "list.json").write_text("[]")
    assert "cannot be read (it holds a list)" in refusal(f"{DATA} --model {tmp_path}/list.json", capsys)


@pytest.mark.parametrize("reference", ["hf-hub:org/clip", "local-dir:folder"])
def test_a_reference_that_brings_its_weights_needs_no_others(reference):
    assert parse(f"{FASTCLIP} --ref_model {reference}".split()).reference.ref_model == reference
