"""The command line, declared as one table: every flag with its type, its default, its range and its help.

This module holds the rules for each flag by itself. The rules for combinations of flags are in the flag's group,
next to the dataclass that has a field of the flag's name: ``data``, ``evaluation``, ``model``, ``objective``,
``reference``, ``cache``, ``optim``, ``run``. A new flag is therefore a row here and a field there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag.

    ``kind``     'str', 'int', 'float', 'switch' (False unless given), 'pairs' (``key=value`` words) or 'sizes' (an
                 integer, or several joined with ``::``). ``nargs`` '+' makes a list of ``kind``.
    ``choices``  the words that argparse accepts and lists in the help; ``words``: the accepted words of a flag
                 whose help text describes them itself.
    ``within``   the interval that numbers must lie in, '(0, 1]'. nan lies in none.
    ``refused``  why a published flag is not supported: printed when its value is not the default.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    within: str | None = None
    words: tuple[str, ...] | None = None
    refused: str | None = None

    @property
    def key(self) -> str:
        """The name as a Python identifier, ``batch_size``."""
        return self.name.removeprefix("--").replace("-", "_")


# Intervals that several flags share.
POSITIVE, AT_LEAST_0, AT_LEAST_1, SHARE, FINITE = "(0, inf)", "[0, inf)", "[1, inf)", "[0, 1)", "(-inf, inf)"
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")

GROUPS: dict[str, tuple[Flag, ...]] = {
    "training data": (
        Flag(
            "--train-data",
            "str",
            None,
            "tar shards (brace patterns, globs, folders, URLs or pipe: commands, several sources joined with ::) "
            "or csv files (paths, patterns or URLs, several joined with ::)",
        ),
        Flag(
            "--train-data-upsampling-factors",
            "str",
            None,
            "sampling weight of each :: source of --train-data, joined with ::; needs --dataset-resampled",
        ),
        Flag("--train-num-samples", "int", None, "number of samples in one epoch", within=AT_LEAST_1),
        Flag(
            "--dataset-type",
            "str",
            "auto",
            "kind of training data; auto decides by the file names",
            choices=("webdataset", "csv", "synthetic", "auto"),
        ),
        Flag(
            "--dataset-resampled",
            "switch",
            False,
            "draw shards with replacement, the same as --epoch_policy resample",
        ),
        Flag(
            "--epoch_policy",
            "str",
            None,
            "which samples make up an epoch: wrap (default) fills the last batch with the next samples of "
            "the order; exact uses no sample twice and leaves out samples that do not fill a batch; "
            "resample draws shards or rows with replacement",
            choices=("wrap", "exact", "resample"),
        ),
        Flag(
            "--lanes",
            "str",
            None,
            "P,Q: number of virtual ranks and of virtual workers, which determine the order of samples "
            "(default: the ranks and workers of the run's first launch)",
        ),
        Flag("--csv-separator", "str", "\t", "column separator of csv files; '\\t' is a tab"),
        Flag("--csv-img-key", "str", "filepath", "name of the csv column with image paths"),
        Flag("--csv-caption-key", "str", "title", "name of the csv column with captions"),
        Flag(
            "--csv_quoting",
            "str",
            "auto",
            "what double quote signs mean in csv files. auto and minimal: a field may stand between two of them, "
            "and may then contain separators and line breaks; auto refuses quoted fields that look as if they had "
            "taken in other rows. none: they are text, and every line is a row",
            choices=("auto", "minimal", "none"),
        ),
        Flag(
            "--csv_encoding",
            "str",
            "utf-8",
            "encoding of csv files, by Python's name for it; a byte-order mark in the file overrides it",
        ),
        Flag("--workers", "int", 4, "number of loader processes per rank", within=AT_LEAST_0),
        Flag(
            "--data_size",
            "sizes",
            -1,
            "number of rows of the sample state; every sample key must be smaller. Several numbers joined "
            "with :: for :: sources whose keys each start at 0",
        ),
        Flag(
            "--sample_index",
            "str",
            "key",
            "what determines a sample's row in the sample state: the key in its json, or its position in "
            "the shard list",
            choices=("key", "position"),
        ),
        Flag(
            "--image_key",
            "str",
            "jpg;jpeg;png;webp",
            "extension of the images in the shards; the first one that a sample has, of several joined with ;",
        ),
        Flag(
            "--text_key",
            "str",
            "txt",
            "extension of the captions in the shards, or a field of a json such as json:caption; the first one "
            "that a sample has, of several joined with ;",
        ),
        Flag(
            "--json_key",
            "str",
            "json:key",
            "json in the shards and its field with the key, such as json:meta.id; the first one that a sample "
            "has, of several joined with ;",
        ),
        Flag(
            "--max_bad_fraction",
            "float",
            0.05,
            "largest share of unusable samples; with more, the run ends with an error",
            within="[0, 1]",
        ),
        Flag(
            "--skip_webdataset_split_by_node",
            "switch",
            False,
            "do not divide the shards among ranks: every rank reads the whole list that its node was given",
        ),
        Flag("--aug-cfg", "pairs", {}, "training augmentation, e.g. scale=(0.4,1.0) color_jitter=0.2", nargs="*"),
        Flag("--rand_augment", "switch", False, "add RandAugment to the training augmentation"),
    ),
    "evaluation": (
        Flag("--val-data", "str", None, "validation shards or csv file, for validation loss and retrieval"),
        Flag(
            "--val-num-samples",
            "int",
            None,
            "number of samples of --val-data to use (default: all)",
            within=AT_LEAST_1,
        ),
        Flag("--val-frequency", "int", 1, "epochs between validations; 0: never", within=AT_LEAST_0),
        Flag(
            "--imagenet-val",
            "str",
            None,
            "folder or shards of the ImageNet validation set, for zero-shot accuracy",
        ),
        Flag("--imagenet-v2", "str", None, "folder or shards of ImageNet-V2, for zero-shot accuracy"),
        Flag(
            "--zeroshot-frequency",
            "int",
            2,
            "epochs between zero-shot evaluations; 0: never",
            within=AT_LEAST_0,
        ),
        Flag(
            "--eval_data_dir",
            "str",
            None,
            "folder of the DataComp benchmark's sets, evaluated as training.evaluate does, every "
            "--zeroshot-frequency epochs",
        ),
        Flag("--eval_tasks", "str", "all", "tasks or folders in --eval_data_dir, joined with commas"),
    ),
    "model": (
        Flag("--model", "str", "RN50", "open_clip model name, or path of a model config JSON file"),
        Flag("--pretrained", "str", "", "weights to start from: open_clip tag or file"),
        Flag("--pretrained-image", "switch", False, "start the image tower from timm's pretrained weights"),
        Flag("--lock-image", "switch", False, "freeze the image tower"),
        Flag(
            "--lock-image-unlocked-groups",
            "int",
            0,
            "number of layer groups at the end of a locked image tower that are trained",
            within=AT_LEAST_0,
        ),
        Flag(
            "--lock-image-freeze-bn-stats",
            "switch",
            False,
            "freeze the running BatchNorm statistics of a locked image tower",
        ),
        Flag("--lock-text", "switch", False, "freeze the text tower"),
        Flag(
            "--lock-text-unlocked-layers",
            "int",
            0,
            "number of layers at the end of a locked text tower that are trained",
            within=AT_LEAST_0,
        ),
        Flag(
            "--lock-text-freeze-layer-norm",
            "switch",
            False,
            "freeze the LayerNorm layers of a locked text tower too",
        ),
        Flag(
            "--image-mean",
            "float",
            None,
            "channel means that normalize the input, instead of the model's own",
            nargs="+",
            within=FINITE,
        ),
        Flag(
            "--image-std",
            "float",
            None,
            "channel standard deviations that normalize the input, instead of the model's own",
            nargs="+",
            within=POSITIVE,
        ),
        Flag(
            "--force-image-size",
            "int",
            None,
            "input image size instead of the model's own: one number, or height and width",
            nargs="+",
            within=AT_LEAST_1,
        ),
        Flag("--force-quick-gelu", "switch", False, "use QuickGELU even if the model config does not ask for it"),
        Flag(
            "--force-patch-dropout",
            "float",
            None,
            "share of ViT patches to drop, instead of the model config's",
            within=SHARE,
        ),
        Flag("--force-custom-text", "switch", False, "build the text tower as a separate module"),
        Flag(
            "--grad-checkpointing", "switch", False, "save memory by recomputing activations in the backward pass"
        ),
        Flag("--torchcompile", "switch", False, "compile the model with torch.compile"),
        Flag(
            "--channels_last",
            "switch",
            False,
            "keep the image towers' weights with the channels innermost, which convolutions are faster with",
        ),
        Flag("--use-bn-sync", "switch", False, "compute BatchNorm statistics over all ranks"),
    ),
    "reference": (
        Flag(
            "--ref_model", "str", "", "frozen reference model: open_clip name, or path of a model config JSON file"
        ),
        Flag(
            "--ref_model_pretrained",
            "str",
            "",
            "weights of --ref_model: open_clip tag or file; beside --ref_model_checkpoint a tag only decides how "
            "the model is built",
        ),
        Flag(
            "--ref_model_checkpoint",
            "str",
            "",
            "weights of --ref_model: a training checkpoint, also where --ref_model_pretrained gives a tag; one "
            "that says of which model it is may stand alone",
        ),
        Flag(
            "--ref_features_usage",
            "str",
            "ref",
            "what the reference is used for, a comma-separated list: ref (subtract its margins), distill "
            "(distillation), select (batch selection)",
        ),
        Flag("--ref_filter_ratio", "float", 0.8, "share of each batch that batch selection drops", within=SHARE),
        Flag(
            "--ref_filter_n_chunks",
            "int",
            2,
            "number of draws in which batch selection picks its samples",
            within=AT_LEAST_1,
        ),
        Flag(
            "--ref_filter_topk",
            "switch",
            False,
            "let batch selection take the samples with the highest scores instead of drawing them at random",
        ),
        Flag(
            "--distill-model",
            "str",
            None,
            "teacher of OpenCLIP's distillation: open_clip name, or path of a model config JSON file",
        ),
        Flag("--distill-pretrained", "str", None, "weights of --distill-model: open_clip tag or file"),
    ),
    "reference features on disk": (
        Flag(
            "--cache_ref_model_features",
            "switch",
            False,
            "write the features that --ref_model computes for --train-data, then end",
        ),
        Flag(
            "--cached_ref_features_dir",
            "str",
            "",
            "train with these features instead of a live reference: a folder, or a pattern of published "
            "files. With --cache_ref_model_features: the folder to write to (default: ref_features in "
            "--logs)",
        ),
        Flag(
            "--ref_features_dtype",
            "str",
            None,
            "type of the features that --cache_ref_model_features writes; int8 has a scale for each vector "
            "(default: float32 if the reference runs in it, else float16)",
            choices=("float32", "float16", "int8"),
        ),
        Flag(
            "--ref_features_error_bound",
            "float",
            None,
            "write features in the fewest bytes for which no component is wrong by more than this, e.g. 0.001",
            within="[5e-5, 0.1]",
        ),
        Flag(
            "--ref_features_views",
            "int",
            0,
            "write features of this many random views of each image, drawn with --aug-cfg; training on them shows "
            "the target the same views. 0: of one fixed view, whatever the target sees",
            within=AT_LEAST_0,
        ),
        Flag(
            "--dataset_reinforcement",
            "switch",
            False,
            "train with what the shards hold beside each sample, as DataCompDR's do: a reference's features (.npz "
            "or .pth.gz), synthetic captions (.syn.json) and the crops of these features (.paug.json)",
        ),
        Flag(
            "--ref_features_cache_mb",
            "int",
            0,
            "keep so much of the features in the memory of each node, in MB of 2^20 bytes; the others are read "
            "from the disk. 0: the kernel decides what stays",
            within=AT_LEAST_0,
        ),
        Flag("--ref_features_offset", "int", 0, "row of this run that belongs to row 0 of the cached features"),
        Flag(
            "--num_samples_per_shard",
            "int",
            10000,
            "rows per file in the published layout of cached features",
            within=AT_LEAST_1,
        ),
        Flag(
            "--cache_group_size",
            "int",
            1,
            "number of independent jobs that share the shards when writing a cache",
            within=AT_LEAST_1,
        ),
        Flag("--cache_rank", "int", 0, "number of this job, from 0 to --cache_group_size - 1", within=AT_LEAST_0),
    ),
    "synthetic captions": (
        Flag(
            "--cache_syn_texts",
            "switch",
            False,
            "write captions that --cap_model generates for --train-data, then end",
        ),
        Flag(
            "--cap_model",
            "str",
            "",
            "captioning model: a CoCa model of open_clip, or path of a model config JSON file",
        ),
        Flag("--cap_model_pretrained", "str", "", "weights of --cap_model: open_clip tag or file"),
        Flag(
            "--cached_syn_texts_dir",
            "str",
            "",
            "train with these captions too: each time a sample is used, its own caption or one of these "
            "is drawn. With --cache_syn_texts: the folder to write to (default: syn_texts in --logs). With "
            "--cache_ref_model_features: captions whose features are written too",
        ),
        Flag("--syn_texts_offset", "int", 0, "row of this run that belongs to row 0 of the cached captions"),
        Flag(
            "--num_syn_texts",
            "int",
            5,
            "number of synthetic captions per sample to write, or to draw from",
            within=AT_LEAST_1,
        ),
        Flag(
            "--syn_texts_ratio",
            "float",
            None,
            "chance that the caption of a sample is a synthetic one (default: its own and the synthetic ones all "
            "have the same chance)",
            within="[0, 1]",
        ),
    ),
    "loss": (
        Flag("--loss", "str", None, "name of the loss (default: decided by the flags below and the model)"),
        Flag("--siglip", "switch", False, "use SigLIP's sigmoid loss"),
        Flag(
            "--fastclip", "switch", False, "use FastCLIP: estimate the loss over all samples instead of one batch"
        ),
        Flag(
            "--temperature_scheme",
            "str",
            "global_learnable",
            "FastCLIP's temperature: global_learnable (v0, v3), global_constant (v1) or individual_learnable (v2)",
            words=("global_learnable", "global_constant", "individual_learnable"),
        ),
        Flag("--multiply_tau", "switch", False, "multiply the objective by the temperature (FastCLIP-v3)"),
        Flag("--temperature", "float", 0.07, "initial temperature, for --fastclip", within=POSITIVE),
        Flag(
            "--tau_gradient",
            "str",
            "paper",
            "gradient of the temperature: as in the paper, or as in the published code, which counts the "
            "pair term twice",
            choices=("paper", "published"),
        ),
        Flag("--rho", "float", 8.0, "weight of the temperature's regularizer", within=AT_LEAST_0),
        Flag(
            "--fastclip_eps",
            "float",
            1e-14,
            "small constant added to the estimate of the inner loss",
            within=POSITIVE,
        ),
        Flag(
            "--gamma",
            "float",
            0.8,
            "final weight of a new estimate of the inner loss against the old one",
            within="(0, 1]",
        ),
        Flag(
            "--gamma_schedule",
            "str",
            "cosine",
            "how gamma moves from 1 in the first epoch to its final value: cosine, or constant from the "
            "second epoch on",
            words=("cosine", "constant"),
        ),
        Flag("--gamma_decay_epochs", "int", 10, "epochs until gamma reaches its final value", within=AT_LEAST_0),
        Flag(
            "--loss_weight",
            "float",
            1.0,
            "factor on the contrastive loss; 2 gives the scale of the published DRRho code, 0 distills only",
            within=AT_LEAST_0,
        ),
        Flag("--logit_scale_bound", "float", 100.0, "upper bound of the inverse temperature", within=AT_LEAST_1),
        Flag(
            "--gather_error_bound",
            "str",
            None,
            "compress the embeddings that ranks exchange, no component being off by more than this, such as 1e-3; "
            "E:E_end goes from one to the other over the run, image=E,text=E,ref=E sets them one by one",
        ),
        Flag(
            "--sample_state_device",
            "str",
            "auto",
            "where the sample state is kept; auto: on the training device",
            choices=("auto", "cpu"),
        ),
        Flag(
            "--sample_state_dtype",
            "str",
            "float32",
            "how log u of each sample is kept: float32, or bound=E for 16 bits with an error of at most E "
            "(bound alone: 1e-3)",
        ),
        Flag(
            "--local-loss",
            "switch",
            False,
            "OpenCLIP's losses: each rank compares its own samples with all, instead of all with all",
        ),
        Flag(
            "--gather-with-grad",
            "switch",
            False,
            "OpenCLIP's losses: gather features together with their gradient",
        ),
        Flag("--coca-caption-loss-weight", "float", 2.0, "weight of CoCa's caption loss", within=AT_LEAST_0),
        Flag(
            "--coca-contrastive-loss-weight", "float", 1.0, "weight of CoCa's contrastive loss", within=AT_LEAST_0
        ),
        Flag("--distill_weight", "float", 1.0, "weight of the distillation loss", within=AT_LEAST_0),
        Flag("--distill_logit_scale", "float", 100.0, "inverse temperature of the teacher", within=POSITIVE),
        Flag(
            "--distill_ref_logit_scale",
            "float",
            0.0,
            "fixed inverse temperature of the margin loss when the reference serves ref and distill "
            "together; 0: learned",
            within=AT_LEAST_0,
        ),
        Flag(
            "--distill_teacher_dimension",
            "int",
            [-1],
            "embedding widths of the teachers, if the reference concatenates the embeddings of several",
            nargs="+",
        ),
        Flag(
            "--distill_average_after_softmax",
            "switch",
            False,
            "average the probabilities of several teachers, not their logits",
        ),
    ),
    "optimizer": (
        Flag(
            "--optimizer",
            "str",
            "adamw",
            "optimizer: adamw, lamb, lion, sgd or nesterov",
            words=("adamw", "lamb", "lion", "sgd", "nesterov"),
        ),
        Flag("--lr", "float", None, "peak learning rate (default: 5e-4)", within=AT_LEAST_0),
        Flag("--beta1", "float", None, "Adam's beta1 (default: 0.9)", within=SHARE),
        Flag("--beta2", "float", None, "Adam's beta2 (default: 0.98 for ViT, else 0.999)", within=SHARE),
        Flag("--eps", "float", None, "Adam's epsilon (default: 1e-6 for ViT, else 1e-8)", within=POSITIVE),
        Flag("--wd", "float", 0.2, "weight decay", within=AT_LEAST_0),
        Flag("--momentum", "float", 0.9, "momentum of sgd and nesterov", within=SHARE),
        Flag(
            "--lr_tau",
            "float",
            -1.0,
            "learning rate of the temperature; negative: the same as --lr",
            within=FINITE,
        ),
        Flag(
            "--grad-clip-norm",
            "float",
            None,
            "clip the gradient to this norm (default: no clipping)",
            within=POSITIVE,
        ),
        Flag(
            "--max_skipped_steps",
            "int",
            20,
            "end the run after this many steps in a row whose loss or gradient is not finite",
            within=AT_LEAST_1,
        ),
    ),
    "schedule": (
        Flag("--epochs", "int", 32, "number of epochs to train; 0: only evaluate", within=AT_LEAST_0),
        Flag(
            "--epochs-cooldown",
            "int",
            None,
            "length in epochs of the cooldown at the end of const-cooldown",
            within=AT_LEAST_1,
        ),
        Flag("--warmup", "int", 10000, "number of steps of linear warm-up", within=AT_LEAST_0),
        Flag("--skip-scheduler", "switch", False, "keep the learning rates constant at their peak"),
        Flag(
            "--lr-scheduler",
            "str",
            "cosine",
            "schedule of the learning rate: cosine, const or const-cooldown",
            words=("cosine", "const", "const-cooldown"),
        ),
        Flag("--lr-cooldown-end", "float", 0.0, "learning rate at the end of the cooldown", within=AT_LEAST_0),
        Flag("--lr-cooldown-power", "float", 1.0, "exponent of the cooldown's polynomial", within=POSITIVE),
        Flag("--lr_min", "float", 0.0, "learning rate at the end of the cosine", within=AT_LEAST_0),
        Flag(
            "--lr_tau_scheduler",
            "str",
            "cosine",
            "schedule of the temperature's learning rate: cosine, const or step_thresh (one third while "
            "the temperature is at most 0.03)",
            words=("cosine", "const", "step_thresh"),
        ),
        Flag(
            "--iters", "int", -1, "train this many steps instead of --epochs; the schedules follow; negative: off"
        ),
        Flag(
            "--stop_epochs",
            "int",
            -1,
            "stop after this many epochs, with schedules laid out for the whole run; negative: off",
        ),
        Flag(
            "--stop_iters",
            "int",
            -1,
            "stop after this many steps, with schedules laid out for the whole run; negative: off",
        ),
    ),
    "run": (
        Flag(
            "--config_file",
            "str",
            None,
            "YAML or JSON file with flags and their values; flags on the command line win",
        ),
        Flag("--dry_run", "switch", False, "print what the run would do, then end"),
        Flag(
            "--batch-size", "int", 64, "number of samples that one rank contributes to a step", within=AT_LEAST_1
        ),
        Flag(
            "--global_batch_size",
            "int",
            None,
            "number of samples in a step over all ranks; --batch-size is then the largest micro-batch of a rank",
            within=AT_LEAST_1,
        ),
        Flag(
            "--accum-freq",
            "int",
            1,
            "number of micro-batches that the --batch-size samples are split into",
            within=AT_LEAST_1,
        ),
        Flag(
            "--precision",
            "str",
            "amp",
            "arithmetic of the models; amp is float16 with a gradient scaler, or float32 on the CPU",
            choices=PRECISIONS,
        ),
        Flag("--seed", "int", 0, "seed of initial weights, order of samples and augmentation", within=AT_LEAST_0),
        Flag("--logs", "str", "./logs/", "folder in which each run has a folder of its own"),
        Flag("--name", "str", None, "name of the run's folder (default: made of the time and the main settings)"),
        Flag("--log-local", "switch", False, "write a log on every node, not only on the first"),
        Flag("--log-every-n-steps", "int", 100, "steps between log lines", within=AT_LEAST_1),
        Flag("--report-to", "str", "", "where to report: tensorboard, wandb, both separated by a comma, or all"),
        Flag("--wandb-notes", "str", "", "notes shown with the run in W&B"),
        Flag("--wandb-project-name", "str", "open-clip", "project of the run in W&B"),
        Flag(
            "--save-frequency", "int", 1, "epochs between checkpoints; 0: only one, at the end", within=AT_LEAST_0
        ),
        Flag(
            "--save_every_n_steps",
            "int",
            None,
            "steps between checkpoints step_S.pt within an epoch (default: none)",
            within=AT_LEAST_1,
        ),
        Flag(
            "--save_every_minutes",
            "float",
            None,
            "minutes between checkpoints step_S.pt within an epoch (default: none)",
            within=POSITIVE,
        ),
        Flag(
            "--keep_last", "int", 2, "number of step_S.pt checkpoints to keep, the newest ones", within=AT_LEAST_1
        ),
        Flag("--save-most-recent", "switch", False, "update epoch_latest.pt after every epoch"),
        Flag(
            "--save_published_state",
            "switch",
            False,
            "store the sample state inside epoch_N.pt too, as the published code does",
        ),
        Flag(
            "--delete-previous-checkpoint",
            "switch",
            False,
            "remove the previous epoch's checkpoint when a new one is complete",
        ),
        Flag(
            "--resume",
            "str",
            None,
            "checkpoint to resume from: a file, a URL, or 'latest' for the newest one of the run --name",
        ),
        Flag(
            "--u_format",
            "str",
            None,
            "how a published checkpoint stores u, if the file does not show it",
            choices=("log", "linear"),
        ),
        Flag(
            "--step_timeout",
            "float",
            900.0,
            "seconds without a new step after which the run is considered hung and ends; 0: never",
            within=AT_LEAST_0,
        ),
        Flag(
            "--requeue_on_preempt",
            "switch",
            False,
            "under Slurm, put the job back into the queue when a signal stops it",
        ),
        Flag("--remote-sync", "str", None, "folder or URL to which the run's folder is copied during the run"),
        Flag("--remote-sync-frequency", "int", 300, "seconds between copies", within=POSITIVE),
        Flag(
            "--remote-sync-protocol",
            "str",
            "s3",
            "how to copy; with s3 the target may be given as BUCKET/PATH",
            choices=("s3", "fsspec"),
        ),
        Flag(
            "--deterministic",
            "switch",
            False,
            "let a GPU compute the same bits in every launch: resumed runs are then bit for bit the same; slower",
        ),
        Flag("--copy-codebase", "switch", False, "copy the source code into the run's folder"),
        Flag(
            "--debug", "switch", False, "write debug messages to the log, and send parameters and gradients to W&B"
        ),
        Flag("--profile", "switch", False, "record a profiler trace of a few training steps"),
    ),
    "ranks": (
        Flag(
            "--dist-url", "str", "env://", "address where the ranks meet: env://, tcp://HOST:PORT or file://PATH"
        ),
        Flag("--dist-backend", "str", "nccl", "nccl or gloo; without GPUs always gloo", words=("nccl", "gloo")),
        Flag("--dist_port", "str", "29500", "port where the ranks meet, if MASTER_PORT is not set"),
        Flag("--world_size", "int", 1, "number of ranks, if no launcher sets it", within=AT_LEAST_1),
        Flag(
            "--ddp-static-graph",
            "switch",
            False,
            "tell DistributedDataParallel that the graph is the same in every step",
        ),
        Flag(
            "--grad_compression",
            "str",
            "none",
            "how ranks send gradients: bf16 and fp16 halve what a float32 model sends, powersgd sends matrices as "
            "products of two thin ones, once the warm-up is over",
            choices=("none", "bf16", "fp16", "powersgd"),
        ),
        Flag(
            "--powersgd_rank",
            "int",
            4,
            "columns of the thin matrices of --grad_compression powersgd",
            within=AT_LEAST_1,
        ),
        Flag(
            "--no-set-device-rank",
            "switch",
            False,
            "use the first visible GPU instead of the one with the number of the local rank",
        ),
    ),
    "published flags that are refused": (
        Flag(
            "--torchscript",
            "switch",
            False,
            "refused: use --torchcompile instead",
            refused="a scripted model cannot be trained with DDP and autocast; use --torchcompile instead",
        ),
        Flag(
            "--trace",
            "switch",
            False,
            "refused: use --torchcompile instead",
            refused="a traced model freezes its batch size and control flow; use --torchcompile instead",
        ),
        Flag(
            "--horovod",
            "switch",
            False,
            "refused: use torchrun or srun instead",
            refused="Horovod is not supported; start one process per GPU with torchrun or srun instead",
        ),
        Flag(
            "--use-bnb-linear",
            "str",
            None,
            "refused: use --precision amp_bf16 instead",
            refused="bitsandbytes layers are not supported; use --precision amp_bf16 to save time and memory",
        ),
    ),
}

ALL: dict[str, Flag] = {flag.key: flag for flags in GROUPS.values() for flag in flags}
