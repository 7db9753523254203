"""What a command does to the parts of a run: stream of samples, models, losses, optimizer, schedules.

An observation takes the lab and the words of a command and returns plain values.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from drrho_clip.losses.interface import LossInputs
from drrho_clip.selection import select
from tests.support.lab import CPU, OTHER_NODE, WORLD, Lab
from tests.support.ranks import ranks
from training.cache.captions import open_captions
from training.cache.features import open_features
from training.config.params import parse
from training.data.build import Model, build_train, steps_per_epoch
from training.data.loader import TrainData
from training.distributed import ddp, process_group
from training.distributed.process_group import World
from training.evaluation.pairs import build_val
from training.loop.build import build_compression, build_distillation, build_loss, build_selection
from training.loop.learning_rates import LearningRates, horizon
from training.loop.optimizer import create_optimizer
from training.models.build import build_target
from training.models.create import BuiltModel
from training.models.frozen import build_captioner, build_reference
from training.models.pretrained import Weights

# -------------------------------------------------------------------------------------------- data


class Pixels:
    """What the data path asks of a model: 32 pixels, 16 tokens."""

    preprocess = PreprocessCfg(size=32)

    @cached_property
    def tokenizer(self) -> open_clip.SimpleTokenizer:
        return open_clip.SimpleTokenizer(context_length=16)


PIXELS = Pixels()


def train_data(words: list[str], world: World = WORLD, reference: Model | None = None) -> TrainData:
    """What a run trains on, with what it would read beside it."""
    config = parse(words)
    return build_train(config, world, PIXELS, reference, open_features(config), open_captions(config))


def stream(lab: Lab, words: list[str], world: World = WORLD) -> list[tuple[list[int], float, int]]:
    """Rows, pixels and tokens of the batches of one epoch."""
    train = train_data(words, world)
    return [(b.index.tolist(), b.image.double().sum().item(), b.text.sum().item()) for b in train.epoch(0)]


def reference_features(lab: Lab, words: list[str]) -> list[float]:
    """What comes with the batches of one epoch."""
    train = train_data(words)
    return [value for batch in train.epoch(0) for value in batch.ref_features.flatten().tolist()]


def rows(lab: Lab, words: list[str]) -> list[int]:
    return [row for batch, _, _ in stream(lab, words) for row in batch]


def stream_of_second_rank(lab: Lab, words: list[str]) -> list[tuple[list[int], float, int]]:
    return stream(lab, words, OTHER_NODE)


@contextlib.contextmanager
def records() -> Iterator[list[str]]:
    """The messages that are logged meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def lanes(lab: Lab, words: list[str]) -> str:
    """How the data is dealt to loader processes, as the log says."""
    with records() as lines:
        train_data(words)
    return next(line for line in lines if "lanes" in line)


def refusal_or(observe: Callable[[Lab, list[str]], Any]) -> Callable[[Lab, list[str]], Any]:
    """The same, where a value may also be one that does not fit the data: then the sentence that says so."""

    def guarded(lab: Lab, words: list[str]) -> Any:
        try:
            return observe(lab, words)
        except ValueError as error:
            return str(error)

    return guarded


def validation(lab: Lab, words: list[str]) -> list[tuple[float, int]]:
    """Pixels and tokens of the validation batches."""
    batches = build_val(parse(words), WORLD, PIXELS)
    return [(image.double().sum().item(), text.sum().item()) for image, text, *_ in batches]


# -------------------------------------------------------------------------------------------- models


def target(words: list[str]) -> BuiltModel:
    return build_target(parse(words), WORLD)


def parameters(lab: Lab, words: list[str]) -> dict[str, tuple[float, bool]]:
    """Every parameter's sum, and whether it is trained."""
    return sums(target(words).module)


def sums(module: nn.Module) -> dict[str, tuple[float, bool]]:
    return {name: (p.detach().double().sum().item(), p.requires_grad) for name, p in module.named_parameters()}


def memory_order(lab: Lab, words: list[str]) -> bool:
    """Whether all 3×3 convolutions have their channels last."""
    weights = [p for p in target(words).module.visual.parameters() if p.ndim == 4 and p.shape[-1] > 1]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights if p.shape[1] > 1)


def trained(lab: Lab, words: list[str]) -> set[str]:
    return {name for name, p in target(words).module.named_parameters() if p.requires_grad}


def reference_parameters(lab: Lab, words: list[str]) -> dict[str, tuple[float, bool]] | None:
    built = build_reference(parse(words), WORLD)
    return built and sums(built.module)


def captioner_parameters(lab: Lab, words: list[str]) -> dict[str, tuple[float, bool]]:
    return sums(build_captioner(parse(words), WORLD).module)


def captioner_size(lab: Lab, words: list[str]) -> int:
    """The captioning model's parameters, whatever its weights."""
    with (
        mock.patch("training.models.create.load"),
        mock.patch("training.models.pretrained.find", return_value=Weights()),
    ):
        return sum(p.numel() for p in build_captioner(parse(words), WORLD).module.parameters())


def reference_size(lab: Lab, words: list[str]) -> int:
    """The reference's parameters, whatever its weights."""
    with (
        mock.patch("training.models.create.load"),
        mock.patch("training.models.pretrained.find", return_value=Weights()),
    ):
        return sum(p.numel() for p in build_reference(parse(words), WORLD).module.parameters())


def preprocessing(lab: Lab, words: list[str]) -> dict[str, Any]:
    return asdict(target(words).preprocess)


def embedding(lab: Lab, words: list[str]) -> list[float]:
    """Of two fixed pictures, in training mode."""
    module = target(words).module.train()
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        return module.encode_image(image).flatten().tolist()


def text_tower(lab: Lab, words: list[str]) -> str:
    return type(target(words).module).__name__


def block_calls(lab: Lab, words: list[str]) -> int:
    """How often forward and backward run a transformer block."""
    module, calls = target(words).module.train(), []
    block = module.visual.transformer.resblocks[0]
    block.attn.register_forward_hook(lambda *_: calls.append(1))
    module.encode_image(torch.randn(2, 3, 32, 32)).sum().backward()
    return len(calls)


def statistics_moved(lab: Lab, words: list[str]) -> bool:
    """Whether a forward pass in training mode moves BatchNorm's running statistics."""
    module = target(words).module.train()

    def snapshot() -> list[float]:
        return [b.double().sum().item() for name, b in module.visual.named_buffers() if "running" in name]

    before = snapshot()
    module.encode_image(torch.randn(2, 3, 32, 32))
    return snapshot() != before


def timm_weights(lab: Lab, words: list[str]) -> list[bool]:
    """Whether timm is asked for pretrained weights."""
    asked, create = [], timm.create_model

    def recorded(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False, **settings)

    with mock.patch("timm.create_model", recorded):
        target(words)
    return asked


def wrapped(lab: Lab, words: list[str]) -> tuple[set[str], dict[str, Any]]:
    """The normalization layers of a model wrapped for two GPUs, and what DDP is told."""
    config, told = parse(words), {}

    def recorded(module: nn.Module, **settings: Any) -> nn.Module:
        told.update(settings)
        module.register_comm_hook = lambda state, hook: told.update(hook=hook.__name__)
        return module

    world = World(0, 0, 2, 2, torch.device("cuda", 0))
    with mock.patch("training.distributed.ddp.DistributedDataParallel", recorded):
        target = build_target(config, WORLD).module
        compression = build_compression(config, target, world)
        module = ddp.wrap(
            target,
            world,
            static_graph=config.distributed.ddp_static_graph,
            sync_bn=config.model.use_bn_sync,
            compression=compression,
        )
    told["rank"] = getattr(compression, "rank", None)
    norms = {type(m).__name__ for m in module.modules() if "Norm" in type(m).__name__}
    return norms, {name: value for name, value in told.items() if name != "device_ids"}


# -------------------------------------------------------------------------------------------- losses


def inputs(seed: int = 0, rows: int = 4) -> LossInputs:
    """Unit-norm embeddings of target and reference with a graph to leaves."""
    generator = torch.Generator().manual_seed(seed)

    def unit(width: int) -> Tensor:
        return nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)

    return LossInputs(
        image=unit(8).requires_grad_(),
        text=unit(8).requires_grad_(),
        logit_scale=torch.tensor(20.0, requires_grad=True),
        logit_bias=torch.tensor(-1.0),
        index=torch.arange(rows),
        ref_image=unit(6),
        ref_text=unit(6),
    )


def gradients(lab: Lab, words: list[str]) -> list[float]:
    """Terms of the loss on fixed embeddings, and its gradients."""
    given = inputs()
    return backward(build_loss(parse(words), CPU)(given).terms, given)


def backward(terms: dict[str, Tensor], given: LossInputs) -> list[float]:
    sum(terms.values()).backward()
    leaves = [given.image, given.text, given.logit_scale]
    grads = [leaf.grad.flatten().tolist() for leaf in leaves if leaf.grad is not None]
    return [*(term.item() for term in terms.values()), *itertools.chain(*grads)]


def second_visit(lab: Lab, words: list[str]) -> list[float]:
    """The loss in epoch 3 on samples that were seen before."""
    loss = build_loss(parse(words), CPU)
    loss.state.commit(loss(inputs(seed=1)).update)
    loss.set_epoch(3)
    given = inputs()
    return backward(loss(given).terms, given)


def table(lab: Lab, words: list[str]) -> list[tuple[str, int, str]]:
    """The columns of the sample state of a run on the meta device, their lengths, and where they are."""
    state = build_loss(parse(words), torch.device("meta")).state
    return [(name, len(column), column.device.type) for name, column in state.state_dict().items()]


def caption_terms(lab: Lab, words: list[str]) -> list[float]:
    loss = build_loss(parse(words), CPU)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[1, 2, 0]])
    local = loss.local_terms({"logits": torch.randn(1, 3, 5, generator=generator), "labels": labels})
    return [*gradients(lab, words), *(value.item() for pair in local.values() for value in pair)]


def distillation(lab: Lab, words: list[str]) -> float:
    return build_distillation(parse(words))(inputs()).item()


def selected(lab: Lab, words: list[str]) -> list[int]:
    """The positions that selection keeps of eight samples, which are equally easy for the reference."""
    chosen, given, same = build_selection(parse(words)), inputs(rows=8), torch.ones(8, 1)
    return select(
        *(given.image, given.text, same, same, torch.tensor(1.0)),
        keep_ratio=chosen.keep_ratio,
        n_chunks=chosen.n_chunks,
        topk=chosen.topk,
        generator=torch.Generator().manual_seed(0),
    ).tolist()


def _gradients_on_a_rank(words: list[str]) -> list[float]:
    given = inputs(seed=process_group.dist.get_rank())
    return backward(build_loss(parse(words), CPU)(given).terms, given)


def gradients_on_two_ranks(lab: Lab, words: list[str]) -> list[list[float]]:
    return ranks(2).run(_gradients_on_a_rank, words)


# -------------------------------------------------------------------------------------------- optimizer


class Toy(nn.Module):
    """A matrix, a bias and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 2), 0.5))
        self.bias = nn.Parameter(torch.full((2,), 0.5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def stepped(lab: Lab, words: list[str]) -> list[float]:
    """Parameters after two steps with fixed, unequal gradients."""
    module = Toy()
    optimizer = create_optimizer(module, parse(words).optim, CPU)
    for gradient in (1e-4, 3e-4):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return [value for p in module.parameters() for value in p.detach().flatten().tolist()]


def rates(lab: Lab, words: list[str]) -> list[tuple[float, float]]:
    """The learning rates of model and temperature at every step that a run takes."""
    config = parse(words)
    length = horizon(config.schedule, steps_per_epoch(config, 1))
    optimizer = create_optimizer(Toy(), config.optim, CPU)
    current = LearningRates(optimizer, config.optim, config.schedule, length.total_steps, length.cooldown_steps)
    found = []
    for step in range(length.end_step):
        current.set(step, torch.tensor(0.02))
        found.append((current.lr, current.lr_tau))
    return found


def rates_without_lr(lab: Lab, words: list[str]) -> list[tuple[float, float]]:
    """The same, with ``--lr`` left to the configuration file."""
    at = words.index("--lr")
    return rates(lab, words[:at] + words[at + 2 :])
