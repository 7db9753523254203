"""The command line, declared as one table: every flag with its type, its default, its range, one line of help.

What a flag may be by itself stands here. What flags mean together stands in the group that they belong to, beside
the dataclass that has a field of the flag's name: ``data``, ``evaluation``, ``model``, ``objective``,
``reference``, ``cache``, ``optim``, ``run``. So a new flag is a row here and a field there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag.

    ``kind``     'str', 'int', 'float', 'switch' (False unless given), 'pairs' (``key=value`` words) or 'sizes' (an
                 integer, or several joined with ``::``). ``nargs`` '+' makes a list of ``kind``.
    ``choices``  the words that argparse lets through and lists in the help; ``words`` those that are known, where
                 the help describes them itself.
    ``within``   the interval that numbers lie in, '(0, 1]'. nan lies in none.
    ``refused``  why a published flag is not supported: what is said where it is not at its default.
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


# Intervals that many numbers lie in.
POSITIVE, AT_LEAST_0, AT_LEAST_1, SHARE, FINITE = "(0, inf)", "[0, inf)", "[1, inf)", "[0, 1)", "(-inf, inf)"
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")

GROUPS: dict[str, tuple[Flag, ...]] = {
    "training data": (
        Flag("--train-data", "str", None, "shards (braces, globs, URLs, pipe:, joined with ::) or a csv file"),
        Flag(
            "--train-data-upsampling-factors",
            "str",
            None,
            "weight of each :: source when resampling, joined with ::",
        ),
        Flag("--train-num-samples", "int", None, "samples that one epoch sees", within=AT_LEAST_1),
        Flag(
            "--dataset-type",
            "str",
            "auto",
            "kind of data; auto goes by the file names",
            choices=("webdataset", "csv", "synthetic", "auto"),
        ),
        Flag("--dataset-resampled", "switch", False, "draw shards with replacement"),
        Flag(
            "--epoch_policy",
            "str",
            None,
            "what an epoch takes: wrap (default: the next samples of the order fill its last batch), exact (none "
            "twice; what fills no batch is left out), resample (shards or rows drawn with replacement)",
            choices=("wrap", "exact", "resample"),
        ),
        Flag(
            "--lanes",
            "str",
            None,
            "P,Q: virtual ranks and workers that fix the order; default: the first launch's",
        ),
        Flag("--csv-separator", "str", "\t", "separator of csv columns"),
        Flag("--csv-img-key", "str", "filepath", "csv column with image paths"),
        Flag("--csv-caption-key", "str", "title", "csv column with captions"),
        Flag("--workers", "int", 4, "loader processes per rank", within=AT_LEAST_0),
        Flag("--data_size", "sizes", -1, "rows of the sample state, all sample keys below it; per source with ::"),
        Flag(
            "--sample_index",
            "str",
            "key",
            "where a sample's row comes from: its json's key, or its place in the shard list",
            choices=("key", "position"),
        ),
        Flag(
            "--max_bad_fraction",
            "float",
            0.05,
            "share of unusable samples that a run goes on with",
            within="[0, 1]",
        ),
        Flag("--skip_webdataset_split_by_node", "switch", False, "each node reads all shards that it is given"),
        Flag("--aug-cfg", "pairs", {}, "train augmentation, e.g. scale=(0.4,1.0) color_jitter=0.2", nargs="*"),
        Flag("--rand_augment", "switch", False, "add RandAugment to the train augmentation"),
    ),
    "evaluation": (
        Flag("--val-data", "str", None, "validation shards or csv file, for loss and retrieval"),
        Flag("--val-num-samples", "int", None, "samples of --val-data to use", within=AT_LEAST_1),
        Flag("--val-frequency", "int", 1, "epochs between validations, 0 for never", within=AT_LEAST_0),
        Flag("--imagenet-val", "str", None, "ImageNet validation folder or shards, for zero-shot accuracy"),
        Flag("--imagenet-v2", "str", None, "ImageNet-V2 folder or shards, for zero-shot accuracy"),
        Flag(
            "--zeroshot-frequency",
            "int",
            2,
            "epochs between zero-shot evaluations, 0 for never",
            within=AT_LEAST_0,
        ),
    ),
    "model": (
        Flag("--model", "str", "RN50", "open_clip model name, or path of a model config JSON"),
        Flag("--pretrained", "str", "", "start from these weights: open_clip tag or file"),
        Flag("--pretrained-image", "switch", False, "start the image tower from timm's pretrained weights"),
        Flag("--lock-image", "switch", False, "freeze the image tower"),
        Flag(
            "--lock-image-unlocked-groups",
            "int",
            0,
            "last layer groups of a locked image tower that train",
            within=AT_LEAST_0,
        ),
        Flag(
            "--lock-image-freeze-bn-stats", "switch", False, "freeze the locked image tower's running statistics"
        ),
        Flag("--lock-text", "switch", False, "freeze the text tower"),
        Flag(
            "--lock-text-unlocked-layers",
            "int",
            0,
            "last layers of a locked text tower that train",
            within=AT_LEAST_0,
        ),
        Flag("--lock-text-freeze-layer-norm", "switch", False, "freeze LayerNorm of the locked text tower too"),
        Flag(
            "--image-mean",
            "float",
            None,
            "channel means of the input instead of the model's",
            nargs="+",
            within=FINITE,
        ),
        Flag(
            "--image-std",
            "float",
            None,
            "channel deviations of the input instead of the model's",
            nargs="+",
            within=POSITIVE,
        ),
        Flag(
            "--force-image-size",
            "int",
            None,
            "image size, one number or height and width",
            nargs="+",
            within=AT_LEAST_1,
        ),
        Flag("--force-quick-gelu", "switch", False, "use QuickGELU in a model whose config does not ask for it"),
        Flag(
            "--force-patch-dropout",
            "float",
            None,
            "share of ViT patches to drop, instead of the config's",
            within=SHARE,
        ),
        Flag("--force-custom-text", "switch", False, "build the text tower as a module of its own"),
        Flag("--grad-checkpointing", "switch", False, "recompute activations in backward to save memory"),
        Flag("--torchcompile", "switch", False, "compile the model with torch.compile"),
        Flag("--use-bn-sync", "switch", False, "compute BatchNorm statistics over all ranks"),
    ),
    "reference": (
        Flag("--ref_model", "str", "", "frozen reference: open_clip model name, or path of a model config JSON"),
        Flag("--ref_model_pretrained", "str", "", "weights of the reference: open_clip tag or file"),
        Flag("--ref_model_checkpoint", "str", "", "weights of the reference: a training checkpoint"),
        Flag(
            "--ref_features_usage",
            "str",
            "ref",
            "what for: comma list of ref (margins), distill, select (batches)",
        ),
        Flag("--ref_filter_ratio", "float", 0.8, "share of each super-batch that selection drops", within=SHARE),
        Flag("--ref_filter_n_chunks", "int", 2, "draws in which selection picks a batch", within=AT_LEAST_1),
        Flag("--ref_filter_topk", "switch", False, "select the best samples instead of drawing"),
        Flag("--distill-model", "str", None, "OpenCLIP's distillation: the teacher, open_clip name or JSON path"),
        Flag("--distill-pretrained", "str", None, "weights of --distill-model: open_clip tag or file"),
    ),
    "reference features on disk": (
        Flag(
            "--cache_ref_model_features",
            "switch",
            False,
            "write the reference's features of --train-data, and end",
        ),
        Flag(
            "--cached_ref_features_dir",
            "str",
            "",
            "train on these features instead of a live reference: folder, or pattern of published files; with "
            "--cache_ref_model_features the folder to write (default: ref_features in --logs)",
        ),
        Flag("--ref_features_offset", "int", 0, "row of this run that row 0 of the cached features belongs to"),
        Flag(
            "--num_samples_per_shard",
            "int",
            10000,
            "rows of a file in the published layout of cached features",
            within=AT_LEAST_1,
        ),
        Flag(
            "--cache_group_size",
            "int",
            1,
            "independent jobs that share the shards when caching",
            within=AT_LEAST_1,
        ),
        Flag("--cache_rank", "int", 0, "number of this job among --cache_group_size", within=AT_LEAST_0),
    ),
    "synthetic captions": (
        Flag("--cache_syn_texts", "switch", False, "write captions of --train-data by --cap_model, and end"),
        Flag("--cap_model", "str", "", "captioning model: a coca name of open_clip, or path of a config JSON"),
        Flag("--cap_model_pretrained", "str", "", "weights of --cap_model: open_clip tag or file"),
        Flag(
            "--cached_syn_texts_dir",
            "str",
            "",
            "train on the own or one of these captions, drawn per sample and epoch; with --cache_syn_texts the "
            "folder to write (default: syn_texts in --logs)",
        ),
        Flag("--syn_texts_offset", "int", 0, "row of this run that row 0 of the cached captions belongs to"),
        Flag(
            "--num_syn_texts",
            "int",
            5,
            "synthetic captions per sample, to write or to draw from",
            within=AT_LEAST_1,
        ),
    ),
    "loss": (
        Flag("--loss", "str", None, "name of the loss; without it the flags below and the model decide"),
        Flag("--siglip", "switch", False, "sigmoid loss"),
        Flag("--fastclip", "switch", False, "FastCLIP: estimate the loss over all samples, not over the batch"),
        Flag(
            "--temperature_scheme",
            "str",
            "global_learnable",
            "FastCLIP temperature: global_learnable (v0, v3), global_constant (v1), individual_learnable (v2)",
            words=("global_learnable", "global_constant", "individual_learnable"),
        ),
        Flag("--multiply_tau", "switch", False, "multiply the objective by the temperature (FastCLIP-v3)"),
        Flag("--temperature", "float", 0.07, "temperature to start from, with --fastclip", within=POSITIVE),
        Flag(
            "--tau_gradient",
            "str",
            "paper",
            "gradient of the temperature: the paper's, or the published code's with its pair term counted twice",
            choices=("paper", "published"),
        ),
        Flag("--rho", "float", 8.0, "weight of the temperature's regularizer", within=AT_LEAST_0),
        Flag("--fastclip_eps", "float", 1e-14, "small constant added to the inner estimate", within=POSITIVE),
        Flag(
            "--gamma", "float", 0.8, "weight of a new inner estimate against the old, in the end", within="(0, 1]"
        ),
        Flag(
            "--gamma_schedule",
            "str",
            "cosine",
            "how gamma comes down from 1: cosine or constant",
            words=("cosine", "constant"),
        ),
        Flag("--gamma_decay_epochs", "int", 10, "epochs until gamma reaches its value", within=AT_LEAST_0),
        Flag(
            "--loss_weight",
            "float",
            1.0,
            "factor on the contrastive loss (2: published DRRho code's scale)",
            within=POSITIVE,
        ),
        Flag("--logit_scale_bound", "float", 100.0, "largest inverse temperature", within=AT_LEAST_1),
        Flag(
            "--sample_state_device",
            "str",
            "auto",
            "where the per-sample estimates live: auto is the training device",
            choices=("auto", "cpu"),
        ),
        Flag("--local-loss", "switch", False, "OpenCLIP's losses: own samples against all, not all against all"),
        Flag("--gather-with-grad", "switch", False, "OpenCLIP's losses: gather features with their gradient"),
        Flag("--coca-caption-loss-weight", "float", 2.0, "weight of CoCa's caption loss", within=AT_LEAST_0),
        Flag(
            "--coca-contrastive-loss-weight", "float", 1.0, "weight of CoCa's contrastive loss", within=AT_LEAST_0
        ),
        Flag("--distill_weight", "float", 1.0, "weight of distillation", within=AT_LEAST_0),
        Flag("--distill_logit_scale", "float", 100.0, "the teacher's inverse temperature", within=POSITIVE),
        Flag(
            "--distill_ref_logit_scale",
            "float",
            0.0,
            "with ref and distill together: fixed inverse temperature of the margin loss; 0: learned",
            within=AT_LEAST_0,
        ),
        Flag(
            "--distill_teacher_dimension",
            "int",
            [-1],
            "widths of the teachers whose embeddings the reference concatenates",
            nargs="+",
        ),
        Flag(
            "--distill_average_after_softmax", "switch", False, "average an ensemble's probabilities, not logits"
        ),
    ),
    "optimizer": (
        Flag(
            "--optimizer",
            "str",
            "adamw",
            "adamw, lamb, lion, sgd or nesterov",
            words=("adamw", "lamb", "lion", "sgd", "nesterov"),
        ),
        Flag("--lr", "float", None, "learning rate (5e-4)", within=AT_LEAST_0),
        Flag("--beta1", "float", None, "Adam's beta1 (0.9)", within=SHARE),
        Flag("--beta2", "float", None, "Adam's beta2 (0.98 for ViT, else 0.999)", within=SHARE),
        Flag("--eps", "float", None, "Adam's epsilon (1e-6 for ViT, else 1e-8)", within=POSITIVE),
        Flag("--wd", "float", 0.2, "weight decay", within=AT_LEAST_0),
        Flag("--momentum", "float", 0.9, "momentum of sgd and nesterov", within=SHARE),
        Flag("--lr_tau", "float", -1.0, "learning rate of the temperature; negative: --lr", within=FINITE),
        Flag("--grad-clip-norm", "float", None, "clip the gradient to this norm", within=POSITIVE),
        Flag("--max_skipped_steps", "int", 20, "steps in a row, not finite, that end the run", within=AT_LEAST_1),
    ),
    "schedule": (
        Flag("--epochs", "int", 32, "epochs to train, 0 to evaluate only", within=AT_LEAST_0),
        Flag(
            "--epochs-cooldown", "int", None, "epochs of cooldown at the end of const-cooldown", within=AT_LEAST_1
        ),
        Flag("--warmup", "int", 10000, "steps of linear warm-up", within=AT_LEAST_0),
        Flag("--skip-scheduler", "switch", False, "keep the learning rates as they are"),
        Flag(
            "--lr-scheduler",
            "str",
            "cosine",
            "cosine, const or const-cooldown",
            words=("cosine", "const", "const-cooldown"),
        ),
        Flag("--lr-cooldown-end", "float", 0.0, "learning rate at the end of the cooldown", within=AT_LEAST_0),
        Flag("--lr-cooldown-power", "float", 1.0, "power of the cooldown's polynomial", within=POSITIVE),
        Flag("--lr_min", "float", 0.0, "where the cosine ends", within=AT_LEAST_0),
        Flag(
            "--lr_tau_scheduler",
            "str",
            "cosine",
            "cosine, const, or step_thresh (a third while tau <= 0.03)",
            words=("cosine", "const", "step_thresh"),
        ),
        Flag("--iters", "int", -1, "end after this many steps, schedules included; negative: off"),
        Flag("--stop_epochs", "int", -1, "stop after this epoch, schedules unchanged; negative: off"),
        Flag("--stop_iters", "int", -1, "stop after this many steps, schedules unchanged; negative: off"),
    ),
    "run": (
        Flag("--config_file", "str", None, "YAML or JSON file with values of flags; the command line wins"),
        Flag("--dry_run", "switch", False, "print what would run, and end"),
        Flag("--batch-size", "int", 64, "samples that one rank contributes to a step", within=AT_LEAST_1),
        Flag(
            "--global_batch_size",
            "int",
            None,
            "samples of a step over all ranks; --batch-size is then the most that a rank holds at once",
            within=AT_LEAST_1,
        ),
        Flag("--accum-freq", "int", 1, "micro-batches that --batch-size is split into", within=AT_LEAST_1),
        Flag("--precision", "str", "amp", "arithmetic; amp is float16 with a gradient scaler", choices=PRECISIONS),
        Flag("--seed", "int", 0, "seed of weights, order and augmentation", within=AT_LEAST_0),
        Flag("--logs", "str", "./logs/", "folder that holds the runs' folders"),
        Flag("--name", "str", None, "name of the run's folder; without it, time and settings"),
        Flag("--log-local", "switch", False, "log on every node, not only on the first"),
        Flag("--log-every-n-steps", "int", 100, "steps between log lines", within=AT_LEAST_1),
        Flag("--report-to", "str", "", "comma list of tensorboard and wandb, or all"),
        Flag("--wandb-notes", "str", "", "notes for W&B"),
        Flag("--wandb-project-name", "str", "open-clip", "project in W&B"),
        Flag(
            "--save-frequency", "int", 1, "epochs between checkpoints, 0 for the last one only", within=AT_LEAST_0
        ),
        Flag(
            "--save_every_n_steps",
            "int",
            None,
            "steps between checkpoints step_S.pt inside epochs",
            within=AT_LEAST_1,
        ),
        Flag(
            "--save_every_minutes",
            "float",
            None,
            "minutes between checkpoints step_S.pt inside epochs",
            within=POSITIVE,
        ),
        Flag("--keep_last", "int", 2, "how many of the step_S.pt to keep, the newest", within=AT_LEAST_1),
        Flag("--save-most-recent", "switch", False, "keep epoch_latest.pt up to date after every epoch"),
        Flag("--save_published_state", "switch", False, "put the sample state into epoch_N.pt, as published"),
        Flag("--delete-previous-checkpoint", "switch", False, "remove the previous checkpoint after a new one"),
        Flag("--resume", "str", None, "continue from this checkpoint, or 'latest' of --name"),
        Flag(
            "--u_format",
            "str",
            None,
            "how a published checkpoint stores u, where the file does not show it",
            choices=("log", "linear"),
        ),
        Flag(
            "--step_timeout",
            "float",
            900.0,
            "seconds without a step after which a run counts as hung; 0: never",
            within=AT_LEAST_0,
        ),
        Flag("--requeue_on_preempt", "switch", False, "under Slurm, queue the job again when a signal stops it"),
        Flag("--remote-sync", "str", None, "copy the run's folder to this place"),
        Flag("--remote-sync-frequency", "int", 300, "seconds between copies", within=POSITIVE),
        Flag("--remote-sync-protocol", "str", "s3", "how to copy", choices=("s3", "fsspec")),
        Flag("--copy-codebase", "switch", False, "keep a copy of the code in the run's folder"),
        Flag("--debug", "switch", False, "log more"),
        Flag("--profile", "switch", False, "record a trace of a few steps"),
    ),
    "ranks": (
        Flag("--dist-url", "str", "env://", "where ranks meet: env://, tcp://HOST:PORT or file://PATH"),
        Flag("--dist-backend", "str", "nccl", "nccl or gloo; on CPU always gloo", words=("nccl", "gloo")),
        Flag("--dist_port", "str", "29500", "port where ranks meet, where MASTER_PORT is not set"),
        Flag("--world_size", "int", 1, "number of ranks, where the launcher does not say it", within=AT_LEAST_1),
        Flag("--ddp-static-graph", "switch", False, "tell DDP that the graph is the same at every step"),
        Flag("--no-set-device-rank", "switch", False, "use the first visible GPU, whatever the local rank"),
    ),
    "published flags that are refused": (
        Flag(
            "--torchscript",
            "switch",
            False,
            "use --torchcompile",
            refused="a scripted model cannot be trained with DDP and autocast; use --torchcompile instead",
        ),
        Flag(
            "--trace",
            "switch",
            False,
            "use --torchcompile",
            refused="a traced model freezes its batch size and control flow; use --torchcompile instead",
        ),
        Flag(
            "--horovod",
            "switch",
            False,
            "use torchrun or srun",
            refused="Horovod is not supported; start one process per GPU with torchrun or srun instead",
        ),
        Flag(
            "--use-bnb-linear",
            "str",
            None,
            "use --precision amp_bf16",
            refused="bitsandbytes layers are not supported; use --precision amp_bf16 to save time and memory",
        ),
    ),
}

ALL: dict[str, Flag] = {flag.key: flag for flags in GROUPS.values() for flag in flags}
