"""Small tasks to take steps on: models, losses, batches by the loss's name."""

import torch
from torch import nn

from drrho_clip.batch import Batch
from drrho_clip.losses import baselines, fastclip, individual
from drrho_clip.reference import Reference
from drrho_clip.sample_state import SampleState
from tests.support import tiny_models
from training.config.optim import OptimConfig
from training.loop.task import Task
from training.models.precision import resolve

HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")
FCCO = {"gamma": lambda epoch: 0.7, "eps": 1e-8, "rho": 6.5}

WITH_GRADIENT = {"local_loss": True, "gather_with_grad": True}  # through other ranks' pairs too


def make_loss(name, device=CPU, kind=SampleState):
    if name in ("fastclip", "drrho"):
        return fastclip.FastCLIP(state=kind(64, fastclip.COLUMNS, device), multiply_tau=True, **FCCO)
    if name == "fastclip_individual":
        state = kind(64, individual.COLUMNS, device)
        adam = {"temperature": 0.05, "betas": (0.9, 0.98), "adam_eps": 1e-8, "lr_tau": 0.01}
        return individual.IndividualFastCLIP(state=state, **FCCO, **adam)
    return {
        "clip": lambda: baselines.Clip(**WITH_GRADIENT),
        "siglip": baselines.SigLip,
        "coca": lambda: baselines.CoCa(contrastive_weight=1.0, caption_weight=2.0, **WITH_GRADIENT),
        "distill": lambda: baselines.Distill(weight=0.7, teacher_scale=50.0, **WITH_GRADIENT),
    }[name]()


WORDS = 512  # a small vocabulary: the full one would be most of the work


def build(name, kind=None):
    kind = kind or ("tiny-coca" if name == "coca" else "tiny-vit")
    vocabulary = {"text_cfg": {"vocab_size": WORDS}}
    if kind == "tiny-coca":
        vocabulary["multimodal_cfg"] = {"vocab_size": WORDS}
    model = tiny_models.build(kind, **vocabulary)
    if kind == "tiny-coca":
        # open_clip leaves it uninitialized; training.models does this too.
        nn.init.normal_(model.text_decoder.text_projection, std=0.1, generator=torch.Generator().manual_seed(1))
    if name == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    if name == "fastclip_individual":
        model.logit_scale.requires_grad_(False)
    return model


def make_task(model, loss, name, wrapped=None, device=CPU, precision="fp32", **extra):
    kind, frozen = resolve(precision, device), None
    if name in ("drrho", "distill") or extra:
        frozen = Reference(build("reference").to(device), HALF, HALF, kind.autocast_dtype)
    return Task(
        model=wrapped or model, bare=model, mean=HALF, std=HALF, precision=kind, loss=loss,
        reference=frozen, margins=name in ("drrho", "distill"), **extra,
    )  # fmt: skip


def make_batch(n=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, WORDS - 1, (n, 16), generator=generator)
    lengths = torch.randint(4, 15, (n, 1), generator=generator)  # captions of different lengths, for CoCa
    place = torch.arange(16)
    text = torch.where(place == lengths, WORDS - 1, torch.where(place > lengths, 0, text))
    image = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(image, text, torch.randint(0, 64, (n,), generator=generator))


OPTIM = OptimConfig(
    optimizer="adamw",
    lr=1e-2,
    beta1=0.9,
    beta2=0.98,
    eps=1e-6,
    wd=0.2,
    momentum=0.9,
    lr_tau=3e-3,
    grad_clip_norm=None,
)
