"""The training steps that ``train_step.py`` compares, from a batch in host memory to new weights.

A variant is one of ``VARIANTS`` with any of these behind it: ``+compile``, the same through ``torch.compile``, and
``+channels_last``, the image towers with the channels innermost (``--channels_last``).
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import plain
from drrho_clip.batch import Batch
from drrho_clip.losses.fastclip import COLUMNS
from drrho_clip.normalize import normalize
from drrho_clip.reference import CachedReference, Reference
from training.config.params import Config, parse
from training.data.build import same_tokens
from training.data.loader import prefetch
from training.distributed import process_group
from training.distributed.process_group import World
from training.loop.build import build_loss
from training.loop.flops import forward_flops, step_flops, training_flops
from training.loop.learning_rates import LearningRates
from training.loop.optimizer import create_optimizer
from training.loop.step import Stepper
from training.loop.task import Selection, Task
from training.models import precision
from training.models.build import build_target
from training.models.create import BuiltModel
from training.models.frozen import build_reference
from training.numerics import set_numerics

GAMMA, EPS = 0.5, 1e-14
HOST_BATCHES = 2


@dataclass(frozen=True)
class Options:
    """What is measured: ``repeats`` blocks of ``steps`` steps of each variant.

    ``torchcompile``    of every variant, whatever its name.
    ``ref_checkpoint``  weights of the reference, random ones.
    """

    variants: tuple[str, ...]
    model: str
    ref_model: str
    batch_size: int
    precision: str
    torchcompile: bool
    steps: int
    repeats: int
    data_size: int
    ref_checkpoint: str


@dataclass(frozen=True)
class Setting:
    """A configured run on this process's device, with batches in host memory."""

    config: Config
    world: World
    target: BuiltModel
    reference: BuiltModel
    batches: list[Batch]


def prepare(options: Options, *, channels_last: bool = False) -> Setting:
    """Models from the seed, as the trainer builds them, and batches as its loader hands them over."""
    config = parse(
        [
            *("--dataset-type", "synthetic", "--train-num-samples", str(options.data_size)),
            *("--data_size", str(options.data_size), "--batch-size", str(options.batch_size)),
            *("--model", options.model, "--precision", options.precision),
            *("--ref_model", options.ref_model, "--ref_model_checkpoint", options.ref_checkpoint),
            *("--fastclip", "--multiply_tau", "--temperature_scheme", "global_learnable"),
            *("--fastclip_eps", str(EPS), "--gamma", str(GAMMA), "--gamma_schedule", "constant"),
            *("--lr_tau_scheduler", "step_thresh", "--lr", "1e-4", "--warmup", "0"),
            *(["--torchcompile"] if options.torchcompile else []),
            *(["--channels_last"] if channels_last else []),
        ]
    )
    world = process_group.start(config.distributed)
    set_numerics(world.device, seed=0, deterministic=False)
    target, reference = build_target(config, world), build_reference(config, world)
    return Setting(config, world, target, reference, make_batches(options, target, reference, world))


def make_batches(options: Options, target: BuiltModel, reference: BuiltModel, world: World) -> list[Batch]:
    """Random pixels and captions; a view or tokens of the reference's own where it needs them."""
    generator = torch.Generator().manual_seed(0)

    def pixels(size: int | tuple[int, int]) -> Tensor:
        height, width = (size, size) if isinstance(size, int) else size
        shape = (options.batch_size, 3, height, width)
        values = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return values.contiguous(memory_format=torch.channels_last)  # as the loader hands them over

    same_image = target.preprocess.size == reference.preprocess.size
    same_text = same_tokens(target.tokenizer, reference.tokenizer)
    batches = []
    for _ in range(HOST_BATCHES):
        numbers = torch.randint(10**6, (options.batch_size, 4), generator=generator).tolist()
        captions = [f"a photo of {' and '.join(map(str, row))} things" for row in numbers]
        batch = Batch(
            image=pixels(target.preprocess.size),
            text=target.tokenizer(captions),
            index=torch.randperm(options.data_size, generator=generator)[: options.batch_size],
            ref_image=None if same_image else pixels(reference.preprocess.size),
            ref_text=None if same_text else reference.tokenizer(captions),
        )
        batches.append(batch.pin_memory() if world.device.type == "cuda" else batch)
    return batches


class Ours:
    """The trainer's step, with the trainer's parts."""

    selection: Selection | None = None

    def __init__(self, s: Setting) -> None:
        run_precision = precision.resolve(s.config.run.precision, s.world.device)
        model, frozen = s.target.module, self._reference(s, run_precision.autocast_dtype)
        if s.config.model.torchcompile:
            model, frozen = torch.compile(model, dynamic=False), frozen and frozen.compile()
        self.task = Task(
            model=model,
            bare=s.target.module,
            mean=s.target.preprocess.mean,
            std=s.target.preprocess.std,
            precision=run_precision,
            loss=build_loss(s.config, s.world.device),
            reference=frozen,
            margins=frozen is not None,
            selection=self.selection,
        )
        self.task.model.train()
        self.task.loss.set_epoch(1)  # in epoch 0 gamma is 1 and u is not read
        optimizer = create_optimizer(s.target.module, s.config.optim, s.world.device)
        self.rates = LearningRates(optimizer, s.config.optim, s.config.schedule, total_steps=10**6)
        self.stepper = Stepper(self.task, optimizer, scaler=run_precision.scaler())
        self.arriving = prefetch(itertools.cycle(self._batches(s)), s.world.device)
        self.done = 0

    def _reference(self, s: Setting, dtype: torch.dtype | None) -> Reference | CachedReference | None:
        pixels = s.reference.preprocess
        return Reference(s.reference.module, pixels.mean, pixels.std, dtype)

    def _batches(self, s: Setting) -> list[Batch]:
        return s.batches

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.step()

    def flops_per_sample(self, batch: Batch) -> float:
        return step_flops(self.task, batch)

    def step(self) -> None:
        batch = next(self.arriving)
        self.rates.set(self.done, (-self.task.bare.logit_scale.detach()).exp())
        self.stepper(batch, self.done)
        self.done += 1

    def log_u(self, index: Tensor) -> Tensor:
        """[b, 2] of the samples ``index``."""
        _, values = self.task.loss.state.fetch(index)
        return torch.stack([values[name] for name in COLUMNS], 1)


class Cached(Ours):
    """The trainer's step with the reference's embeddings stored, float16."""

    def _reference(self, s: Setting, dtype: torch.dtype | None) -> CachedReference:
        return CachedReference()

    def _batches(self, s: Setting) -> list[Batch]:
        with torch.no_grad():
            text = s.batches[0].text if s.batches[0].ref_text is None else s.batches[0].ref_text
            width = s.reference.module.encode_text(text[:1].to(s.world.device)).shape[1]
        batches = []
        for batch in s.batches:
            stored = torch.randn(len(batch), 2, width).half()
            batch = replace(batch, ref_image=None, ref_text=None, ref_features=stored)
            batches.append(batch.pin_memory() if s.world.device.type == "cuda" else batch)
        return batches


class NoReference(Ours):
    """The trainer's step of FastCLIP itself: no reference at all."""

    def _reference(self, s: Setting, dtype: torch.dtype | None) -> None:
        return None

    def _batches(self, s: Setting) -> list[Batch]:
        return [replace(batch, ref_image=None, ref_text=None) for batch in s.batches]


class Selecting(Ours):
    """Ours, with batches that are a quarter of the samples that are embedded."""

    selection = Selection(keep_ratio=0.25, n_chunks=2, topk=False)


class SelectingCached(Cached):
    """The same with the reference's embeddings stored."""

    selection = Selecting.selection


class Plain:
    """What the published loop does in a step, in this project's words."""

    def __init__(self, s: Setting) -> None:
        self.device, self.optim = s.world.device, s.config.optim
        self.precision = precision.resolve(s.config.run.precision, self.device)
        self.bare, self.reference = s.target.module, s.reference.module
        self.model = torch.compile(self.bare) if s.config.model.torchcompile else self.bare
        self.model.train()
        groups = create_optimizer(self.bare, self.optim, self.device).param_groups
        self.optimizer = torch.optim.AdamW(
            [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups],
            betas=(self.optim.beta1, self.optim.beta2),
            eps=self.optim.eps,
        )
        self.scaler = self.precision.scaler()
        self.table = plain.ReplicatedTable(s.config.data.data_size, self.device)
        self.rho, self.bound = s.config.loss.rho, s.config.loss.logit_scale_bound
        self.arriving = itertools.cycle([normalized(batch, s) for batch in s.batches])

    def flops_per_sample(self, batch: Batch) -> float:
        image = batch.image if batch.ref_image is None else batch.ref_image
        text = batch.text if batch.ref_text is None else batch.ref_text
        return training_flops(self.bare, batch.image, batch.text) + forward_flops(self.reference, image, text)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.step()

    def step(self) -> None:
        batch = next(self.arriving).to(self.device)
        # Under autocast the published loop hands pixels over in float32, to the reference as well.
        dtype = torch.float32 if self.precision.autocast_dtype else self.precision.pixel_dtype
        image = batch.image.to(dtype)
        ref_image = image if batch.ref_image is None else batch.ref_image.to(dtype)
        ref_text = batch.text if batch.ref_text is None else batch.ref_text
        tau = 1 / self.bare.logit_scale.detach().exp().item()
        self.optimizer.param_groups[-1]["lr"] = self.optim.lr_tau / (3 if tau <= 0.03 else 1)
        self.optimizer.zero_grad()
        with torch.no_grad():
            reference = self.reference(ref_image, ref_text)
        with self.precision.autocast():
            outputs = self.model(image, batch.text)
            loss, log_u = plain.matrix_loss(
                outputs["image_features"],
                outputs["text_features"],
                outputs["logit_scale"],
                reference["image_features"],
                reference["text_features"],
                self.table.read(batch.index),
                gamma=GAMMA,
                eps=EPS,
                rho=self.rho,
            )
            self.table.write(batch.index, log_u)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        with torch.no_grad():
            self.bare.logit_scale.clamp_(0, math.log(self.bound))

    def log_u(self, index: Tensor) -> Tensor:
        """[b, 2] of the samples ``index``."""
        return self.table.read(index)


class OpenClip:
    """OpenCLIP's own loop (``open_clip_train``) with its own loss: no reference, no sample state."""

    def __init__(self, s: Setting) -> None:
        from open_clip import ClipLoss
        from open_clip_train.train import train_one_epoch

        self.bare, device = s.target.module, s.world.device
        self.model = torch.compile(self.bare) if s.config.model.torchcompile else self.bare
        groups = create_optimizer(self.bare, s.config.optim, device).param_groups
        optimizer = torch.optim.AdamW(
            [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups],
            betas=(s.config.optim.beta1, s.config.optim.beta2),
            eps=s.config.optim.eps,
        )
        scaler = precision.resolve(s.config.run.precision, device).scaler()
        batches = [normalized(batch, s) for batch in s.batches]
        self.arriving = itertools.cycle([(batch.image, batch.text) for batch in batches])
        settings = argparse.Namespace(
            device=str(device),
            precision=s.config.run.precision,
            batch_size=len(batches[0]),
            accum_freq=1,
            rank=0,
            local_rank=0,
            world_size=1,
            log_local=False,
            log_every_n_steps=10**9,
            skip_scheduler=True,
            grad_clip_norm=None,
            distill=False,
            horovod=False,
            wandb=False,
        )
        self.epoch = lambda loader: train_one_epoch(
            self.model,
            {"train": argparse.Namespace(set_epoch=lambda epoch: None, dataloader=loader)},
            ClipLoss(cache_labels=True),
            *(0, optimizer, scaler, None, None, settings),
        )

    def steps(self, n: int) -> None:
        self.epoch(Loader(self.arriving, n))

    def step(self) -> None:
        self.steps(1)

    def flops_per_sample(self, batch: Batch) -> float:
        return training_flops(self.bare, batch.image, batch.text)


class Loader:
    """``n`` batches, as OpenCLIP's loop wants them."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], n: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, n, n

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self.batches, self.num_batches)


def normalized(batch: Batch, s: Setting) -> Batch:
    """Pixels as OpenCLIP's loader makes them, float32."""
    pixels, own = s.target.preprocess, s.reference.preprocess
    image = normalize(batch.image, pixels.mean, pixels.std)
    ref_image = None
    if batch.ref_image is not None:
        ref_image = normalize(batch.ref_image, own.mean, own.std)
    elif (pixels.mean, pixels.std) != (own.mean, own.std):
        ref_image = normalize(batch.image, own.mean, own.std)
    batch = replace(batch, image=image, ref_image=ref_image)
    return batch.pin_memory() if s.world.device.type == "cuda" else batch


VARIANTS = {
    "ours": Ours,
    "plain": Plain,
    "cached": Cached,
    "none": NoReference,
    "select": Selecting,
    "select-cached": SelectingCached,
    "openclip": OpenClip,
}
Variant = Ours | Plain | OpenClip
COMPILED, CHANNELS_LAST = "+compile", "+channels_last"


def build(name: str, options: Options) -> Variant:
    """The variant ``name`` with models and batches of its own."""
    kind, *more = name.split("+")
    compiled, channels_last = (word[1:] in more for word in (COMPILED, CHANNELS_LAST))
    setting = prepare(replace(options, torchcompile=options.torchcompile or compiled), channels_last=channels_last)
    return VARIANTS[kind](setting)


def is_known(name: str) -> bool:
    kind, *more = name.split("+")
    return kind in VARIANTS and set(more) <= {COMPILED[1:], CHANNELS_LAST[1:]}
