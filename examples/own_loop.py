"""DRRho-CLIP in a training loop of your own: the library ``drrho_clip`` and nothing of the trainer.

    python examples/own_loop.py
    torchrun --standalone --nproc_per_node=2 examples/own_loop.py

A small CLIP model learns by FastCLIP which caption belongs to which picture of a coloured shape. Frozen, it is
then the reference of a wider one, whose loss is thereby DRRho-CLIP's. The last line says how often each of them
finds the caption, among 72, of a picture that was in no batch.

Data and models are made on the spot, and all of it takes ten seconds on a CPU. Several ranks share the global
batches of a single process, so that their losses are the same up to rounding.
"""

from __future__ import annotations

import math
import os
from functools import partial

import numpy as np
import open_clip
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from drrho_clip import collectives, schedules
from drrho_clip.batch import Batch
from drrho_clip.losses.fastclip import COLUMNS, FastCLIP
from drrho_clip.losses.interface import LossInputs
from drrho_clip.normalize import normalize
from drrho_clip.reference import Reference
from drrho_clip.sample_state import SampleState

DEVICE = torch.device("cpu")  # on GPUs: torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
GLOBAL_BATCH, EPOCHS = 64, 6
SIZE, TOKENS = 32, 8  # of a picture's side, and of a caption
MEAN = STD = (0.5, 0.5, 0.5)  # of a model of open_clip's: open_clip.get_model_preprocess_cfg(model)


def train(model: nn.Module, data: Dataset, reference: Reference | None = None) -> None:
    """Train ``model`` on samples (uint8 image, token ids, row): FastCLIP-v3, with a ``reference`` DRRho-CLIP."""
    ranks, rank = collectives.world_size(), collectives.rank()

    # A row for each sample of the data set, cut over the ranks: so the process group comes first.
    state = SampleState(len(data), COLUMNS, DEVICE)
    gamma = partial(schedules.gamma, final=0.8, schedule="cosine", decay_epochs=EPOCHS // 2)
    loss = FastCLIP(state=state, gamma=gamma, eps=1e-8, rho=8.0, multiply_tau=True)

    # Any loader will do that gives every sample with its row, 0 ... N - 1, in batches of one size on all ranks.
    sampler = DistributedSampler(data, ranks, rank, drop_last=True)
    loader = DataLoader(data, GLOBAL_BATCH // ranks, sampler=sampler, drop_last=True)

    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98), fused=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        loss.set_epoch(epoch)  # gamma comes down from 1
        model.train()
        for image, tokens, row in loader:
            # A reference of another image size or another tokenizer gets ref_image and ref_text in the batch.
            batch = Batch(image, tokens, row).to(DEVICE)  # all but the row, which is checked on the CPU
            ref_image, ref_text = (None, None) if reference is None else reference.features(batch)
            outputs = wrapped(normalize(batch.image, MEAN, STD), batch.text)
            result = loss(
                LossInputs(
                    image=outputs["image_features"],  # of unit norm; after autocast normalize again, in float32
                    text=outputs["text_features"],
                    logit_scale=outputs["logit_scale"],
                    index=batch.index,
                    ref_image=ref_image,
                    ref_text=ref_text,
                )
            )
            total = sum(result.terms.values())
            optimizer.zero_grad()
            total.backward()  # the losses scale their gradients for DDP's mean over the ranks
            optimizer.step()
            # After the step: where a step is left out (GradScaler), so is this; see the argument ``taken``.
            state.commit(result.update)
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
        # A checkpoint holds state.state_dict() beside model and optimizer. It is sharded by row: with
        # torch.distributed.checkpoint all ranks write it together, and any number of ranks can load it.
        if rank == 0 and (epoch + 1) % 2 == 0:
            tau = 1 / outputs["logit_scale"].item()
            print(f"epoch {epoch + 1}: loss {total.item():.6f}, temperature {tau:.4f}", flush=True)


def main() -> None:
    if "WORLD_SIZE" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")  # on GPUs: torch.cuda.set_device(DEVICE), then "nccl"
    captions = open_clip.tokenize(CAPTIONS, TOKENS)
    image, number = pictures(768, seed=0)
    data = TensorDataset(image, captions[number], torch.arange(len(image)))
    unseen = pictures(512, seed=1)

    # You would take a public one: open_clip.create_model("ViT-B-32", pretrained="openai"), and its mean and std.
    # Where its embeddings come with the data, there is CachedReference, and Batch(..., ref_features=...).
    say("the model that is to be the reference")
    small = build(width=32, seed=0)
    train(small, data)

    say("the target, under this reference")
    target = build(width=64, seed=1)
    train(target, data, Reference(small, MEAN, STD))

    right = [accuracy(model, *unseen, captions) for model in (small, target)]
    say(f"captions found: reference {right[0]:.3f}, target {right[1]:.3f}, by chance {1 / len(CAPTIONS):.3f}")
    if dist.is_initialized():
        dist.destroy_process_group()


def say(line: str) -> None:
    if collectives.rank() == 0:
        print(line, flush=True)


# From here on: what stands for your models and your data.


def build(width: int, seed: int) -> nn.Module:
    """A CLIP model of random weights, the same on all ranks, with an embedding half as wide as its towers."""
    torch.manual_seed(seed)
    tower = {"width": width, "layers": 1}
    image = {"image_size": SIZE, "patch_size": 8, "head_width": 16, **tower}
    text = {"context_length": TOKENS, "vocab_size": 49408, "heads": width // 16, **tower}
    return open_clip.CLIP(width // 2, image, text, output_dict=True).to(DEVICE)


@torch.no_grad()
def accuracy(model: nn.Module, image: Tensor, number: Tensor, captions: Tensor) -> float:
    """The share of the pictures, uint8 [n, 3, H, W], whose nearest of ``captions`` [C, L] is ``number`` [n]."""
    model.eval()
    image_features = model.encode_image(normalize(image.to(DEVICE), MEAN, STD), normalize=True)
    text_features = model.encode_text(captions.to(DEVICE), normalize=True)
    return ((image_features @ text_features.T).argmax(1).cpu() == number).float().mean().item()


COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "ring")
GROUNDS = ("black", "gray", "brown")
CAPTIONS = [f"a {colour} {shape} on {ground}" for colour in COLOURS for shape in SHAPES for ground in GROUNDS]


def pictures(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures, uint8 [n, 3, SIZE, SIZE], of captions drawn at random, and the captions' numbers, int64 [n]."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(len(CAPTIONS), size=samples)
    return torch.from_numpy(np.stack([draw(CAPTIONS[i], rng) for i in numbers])), torch.from_numpy(numbers)


def draw(caption: str, rng: np.random.Generator) -> np.ndarray:
    """The shape that ``caption`` names, somewhere, in some size and under some noise: uint8 [3, SIZE, SIZE]."""
    _, colour, shape, _, ground = caption.split()
    picture = Image.new("RGB", (SIZE, SIZE), ground)
    radius = rng.integers(9, 13)
    x, y = rng.integers(radius, SIZE - radius, 2)
    box, pen = (x - radius, y - radius, x + radius, y + radius), ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=3)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    noisy = np.asarray(picture) + rng.normal(0, 10, (SIZE, SIZE, 3))
    return noisy.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)


if __name__ == "__main__":
    main()
