"""DataCompDR's layout: the target sees the stored crop; crop, caption and embeddings belong together."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import random
from collections import Counter
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torchvision import transforms as tv
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as tvf

from tests.cache.test_features import assert_same, fails, trained
from tests.support import shards, tiny_models
from tests.support.flag_parts import PIXELS, train_data
from tests.support.lab import Lab
from training.check_data import main as check_data
from training.data.samples import RawSample, Unusable
from training.data.sources.reinforcement import EXTENSIONS, Reinforcement
from training.data.transforms import OPERATIONS, PreprocessCfg, TrainView, random_box
from training.main import main
from training.rng import sample_seed

SYNTHETIC = ["one", "two"]
LINE = "--dataset_reinforcement --ref_features_usage distill"


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def torch_file(held: object) -> bytes:
    file = io.BytesIO()
    torch.save(held, file)
    return file.getvalue()


def pth_gz(**arrays: np.ndarray) -> bytes:
    """As the writer of the -bf16 data set makes it."""
    held = {name: torch.tensor(array, dtype=torch.bfloat16) for name, array in arrays.items()}
    return gzip.compress(torch_file(held))


def vectors(i: int, width: int = 6) -> dict[str, np.ndarray]:
    """Embeddings of sample ``i``: three views, and captions, its own first. Each has numbers of its own."""
    numbers = np.arange(6 * width, dtype=np.float32).reshape(6, width) + 100 * i + 1
    return {"image_emb": numbers[:3], "text_emb": numbers[3:]}


def views(i: int) -> list:
    """Crops inside 48 x 40, with two operations each, the last view without."""
    crops = [[top + i % 3, 2, 20 + top, 30] for top in (1, 4, 7)]
    return [[crops[0], [[1, 0.3], [8, -0.27]]], [crops[1], [[5, 9.0], [13, 0.0]]], [crops[2], None]]


def sample(i: int, **changes: object) -> dict:
    """The files of a sample by extension."""
    beside = {
        "syn.json": {"syn_text": [f"{text} {i}" for text in SYNTHETIC]},
        "paug.json": {"param_aug": json.dumps(views(i))},
        "npz": npz(**vectors(i)),
        "json": {"uid": f"{i:032x}", "sha256": ""},
    }
    files = shards.sample(i) | beside | changes
    return {extension: held for extension, held in files.items() if held is not None}


def raw(i: int, **changes: object) -> RawSample:
    """The same as the loader has it."""
    files = sample(i, **changes)
    extras = {
        extension: held if isinstance(held, bytes) else json.dumps(held).encode()
        for extension, held in files.items()
        if extension in EXTENSIONS
    }
    return RawSample(files["jpg"], files["txt"], i, 0, str(i), extras=extras)


@pytest.fixture(scope="module")
def lab(one_thread, tmp_path_factory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


# ------------------------------------------------------------ one sample


def test_the_operations_are_torchvisions():
    space = tv.RandAugment()._augmentation_space(31, (32, 32))
    assert tuple(space) == OPERATIONS


@pytest.mark.parametrize("seed", range(4))
def test_a_view_is_what_torchvision_draws(seed):
    """A crop and RandAugment on Pillow images, with their draws written down, then the same from these."""
    picture = shards.picture(3, (90, 60))
    torch.manual_seed(seed)
    box = tv.RandomResizedCrop.get_params(picture, (0.08, 1.0), (0.75, 4 / 3))
    drawn: list = []
    apply = autoaugment._apply_op

    def noted(image: Image.Image, name: str, magnitude: float, **settings: object) -> Image.Image:
        drawn.append([OPERATIONS.index(name), magnitude])
        return apply(image, name, magnitude, **settings)

    with mock.patch.object(autoaugment, "_apply_op", noted):
        seen = tvf.resized_crop(picture, *box, [32, 32], tv.InterpolationMode.BICUBIC)
        seen = tv.RandAugment()(seen)
    given = raw(3, **{"paug.json": {"param_aug": [[list(box), drawn]] * 3}})
    found = Reinforcement(None, None)(given, 0, 0, 0)
    view = TrainView(PreprocessCfg(size=32))
    file = io.BytesIO()
    picture.save(file, "png")
    ours = view.replay(view.decode(file.getvalue()), found.view)
    difference = (ours.int() - tvf.pil_to_tensor(seen).int()).abs()
    assert len(drawn) == 2
    # Both resize with Pillow's filter; where rounding differs, an operation such as equalize makes it larger.
    assert (difference > 1).float().mean() < 0.02


@pytest.mark.parametrize("form", ["npz", "pth.gz", "apart", "lists"])
def test_view_caption_and_embeddings_belong_together(form):
    held, changes = vectors(2), {}
    if form == "pth.gz":
        changes = {"npz": None, "pth.gz": pth_gz(**held)}
    if form in ("apart", "lists"):  # as the newer writer keeps them
        names = ["syn_text"] if form == "apart" else ["syn_text", "syn_text_dfn"]
        changes["syn.json"] = {name: [f"{text} 2"] for name, text in zip(names, SYNTHETIC)}
        if form == "apart":
            changes["syn.json"] = {"syn_text": [f"{text} 2" for text in SYNTHETIC]}
        cut = np.split(held["text_emb"], [1] if form == "apart" else [1, 2])
        parts = dict(zip(["text_emb", *(f"{name}_emb" for name in names)], cut))
        changes["npz"] = npz(image_emb=held["image_emb"], **parts)
    given = raw(2, **changes)
    counts: Counter = Counter()
    for epoch in range(3):
        for seed in range(40):
            found = Reinforcement(None, None)(given, 7, epoch, seed)
            texts = [given.text, *(f"{text} 2" for text in SYNTHETIC)]
            caption, view = texts.index(found.text), [list(v[0]) for v in views(2)].index(list(found.view.box))
            expected = np.stack([held["image_emb"][view], held["text_emb"][caption]])
            np.testing.assert_allclose(found.features.numpy(), expected, rtol=2**-8 if form == "pth.gz" else 0)
            assert found.features.dtype == torch.float32
            counts[view, caption] += 1
    assert len({view for view, _ in counts}) == 3 and sum(counts.values()) == 120
    for caption in range(3):
        assert 20 <= sum(counts[view, caption] for view in range(3)) <= 60  # of 120; the deviation is 5


def test_the_share_of_synthetic_captions():
    def drawn(captions: int | None, ratio: float | None) -> Counter:
        uses = (Reinforcement(captions, ratio)(raw(1), 0, 0, seed) for seed in range(300))
        return Counter(use.text for use in uses)

    own = shards.caption(1)
    assert set(drawn(None, 0.0)) == {own}
    assert set(drawn(None, 1.0)) == {"one 1", "two 1"}
    half = drawn(None, 0.5)
    assert 120 <= half[own] <= 180 and 50 <= half["one 1"] <= 100 and 50 <= half["two 1"] <= 100
    assert set(drawn(1, None)) == {own, "one 1"}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"npz": None}, "missing embeddings"),
        ({"npz": b"PK"}, "embeddings cannot be read"),
        ({"npz": npz(image_emb=np.array([object()]))}, "embeddings cannot be read"),
        ({"npz": None, "pth.gz": b"\x1f\x8b"}, "embeddings cannot be read"),
        ({"npz": None, "pth.gz": gzip.compress(pickle.dumps(Reinforcement))}, "embeddings cannot be read"),
        ({"npz": None, "pth.gz": gzip.compress(torch_file({0: torch.ones(3, 6)}))}, "embeddings cannot be read"),
        ({"npz": npz(image_emb=np.ones((3, 6), np.float32))}, "embeddings are incomplete"),
        ({"npz": npz(image_emb=np.ones((3, 6)), text_emb=np.ones((4, 6)))}, "do not fit the captions"),
        ({"npz": npz(image_emb=np.ones((3, 6)), text_emb=np.ones((3, 5)))}, "do not fit the captions"),
        ({"npz": npz(image_emb=np.ones((2, 6)), text_emb=np.ones((3, 6)))}, "do not fit the views"),
        ({"npz": npz(image_emb=np.zeros((3, 6)), text_emb=np.ones((3, 6)))}, "zero or not finite"),
        (
            {"npz": npz(image_emb=np.ones((3, 6)), text_emb=np.ones((1, 6)), syn_text_emb=np.ones((2, 5)))},
            "do not fit the captions",
        ),
        ({"syn.json": {"syn_text": "one"}}, "no list of texts"),
        ({"syn.json": {"syn_text": ["\ud800", "two"]}}, "text is not utf-8"),
        ({"syn.json": [1]}, "json is not valid"),
        ({"paug.json": {"param_aug": "[["}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3], None]] * 3}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3, 3], [[14, 1.0]]]] * 3}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3, 3], [[-1, 1.0]]]] * 3}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3, 3], [[10, 9.0]]]] * 3}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3, math.inf], None]] * 3}}, "views are not of the known form"),
        ({"paug.json": {"param_aug": [[[0, 0, 3, 3], [[1, 10**400]]]] * 3}}, "views are not of the known form"),
    ],
)
def test_what_is_not_of_the_layout_is_left_out(changes, reason):
    with pytest.raises(Unusable, match=reason):
        Reinforcement(None, None)(raw(1, **changes), 0, 0, 0)


# ------------------------------------------------------------ training


def test_batches_have_what_belongs_together(lab):
    """Through the loader."""
    data = shards.write_shards(lab.root / "reinforced", [sample(i) for i in range(8)], per_shard=4)
    train = train_data(lab.words(f"{LINE} --train-data {data} --train-num-samples 8 --data_size -1 --workers 1"))
    epochs = [[batch.clone() for batch in train.epoch(epoch)] for epoch in range(3)]
    train.close()
    seen: dict[int, set[int]] = {}
    for batch in (batch for of in epochs for batch in of):
        for image, text, (image_emb, text_emb) in zip(batch.image, batch.text, batch.ref_features):
            (i, view), (same, caption) = (divmod(int(of[0]) - 1, 100) for of in (image_emb, text_emb))
            view, caption = view // 6, caption // 6 - 3
            assert same == i
            texts = [shards.caption(i), *(f"{synthetic} {i}" for synthetic in SYNTHETIC)]
            assert torch.equal(text, PIXELS.tokenizer([texts[caption]])[0])
            if view == 2:  # the one without operations
                crop = tvf.resized_crop(shards.picture(i), *views(i)[2][0], [32, 32], tv.InterpolationMode.BICUBIC)
                assert (image.int() - tvf.pil_to_tensor(crop).int()).abs().float().mean() < 3  # JPEG
            seen.setdefault(i, set()).add(view)
    assert seen == {i: {0, 1, 2} for i in range(8)}


def test_as_a_live_teacher_on_the_same_crops(lab):
    """One view per sample, which is the crop that a live run draws, and the teacher's own embeddings of it."""
    teacher = tiny_models.build("tiny-vit-reference").eval()
    see, samples = TrainView(PreprocessCfg(size=48), aug_cfg={"scale": (0.3, 1.0)}), []
    words = open_clip.SimpleTokenizer(context_length=24)
    for i in range(8):
        seed = sample_seed(1, 0, 0, i)
        image = see.decode(shards.sample(i)["jpg"])
        box = random_box(*image.shape[1:], (0.3, 1.0), (0.75, 4 / 3), random.Random(seed))
        pixels = tvf.normalize(see(image, seed).target / 255, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
        with torch.no_grad():
            embedded = teacher.encode_image(pixels[None], normalize=True)
            text = teacher.encode_text(words([shards.caption(i)]), normalize=True)
        beside = {"paug.json": {"param_aug": [[list(box), None]]}, "syn.json": {}}
        held = npz(image_emb=embedded.numpy(), text_emb=text.numpy())
        samples.append(sample(i, **beside, npz=held, json={"key": i}))
    data = shards.write_shards(lab.root / "live", samples, per_shard=4)
    line = (
        f"--train-data {data} --train-num-samples 8 --epochs 1 --seed 1 --aug-cfg scale=(0.3,1.0) --optimizer sgd"
    )
    live = "--ref_model @reference --ref_model_pretrained @reference_weights --ref_features_usage distill"
    assert_same(trained(lab, f"{line} {LINE}"), trained(lab, f"{line} {live}"))


def test_two_teachers_are_averaged(lab):
    """The recipe's flags, on embeddings that are two teachers' one behind the other."""
    data = shards.write_shards(lab.root / "two", [sample(i, json={"key": i}) for i in range(8)], per_shard=4)
    line = f"--train-data {data} --train-num-samples 8 --epochs 1 {LINE} --loss_weight 0"
    run = lab.run(lab.words(f"{line} --distill_teacher_dimension 4 2 --distill_average_after_softmax"))
    assert run.code == 0
    assert "features, synthetic captions and crops are those beside each sample of the shards" in run.log
    assert run.logged("Contrastive_loss") == [0.0] * len(run.logged("Contrastive_loss"))
    one = lab.run(lab.words(line))
    assert run.logged("Distill_loss") != one.logged("Distill_loss")


def test_widths_of_other_teachers_are_refused(lab, capsys):
    sentence = fails(lab, f"--train-data @reinforced {LINE} --distill_teacher_dimension 4 5", capsys)
    assert "the teachers' widths 4, 5 add up to 9, but the reference's embeddings are 8 wide" in sentence


def test_unusable_samples_are_counted_and_named(lab, capsys):
    samples = [sample(i, json={"key": i}) for i in range(8)]
    samples[5]["paug.json"] = {"param_aug": [[[0, 0, 41, 10], None]] * 3}
    del samples[2]["npz"]
    data = shards.write_shards(lab.root / "bad", samples, per_shard=4)
    line = f"--train-data {data} --train-num-samples 6 --epochs 1 {LINE}"
    run = lab.run(lab.words(f"{line} --max_bad_fraction 1"))
    assert run.code == 0
    assert "missing embeddings" in run.log and "crop is outside the image" in run.log
    capsys.readouterr()
    checked = ["--train-data", data, "--sample_index", "none", "--workers", "1", "--max_bad_fraction", "0.5"]
    assert check_data([*checked, "--dataset_reinforcement"]) == 0
    said = capsys.readouterr().out
    assert "8, of which 6 can be used" in said and "missing embeddings" in said and "crop is outside" in said
    assert check_data(checked) == 0
    assert "8, of which 8 can be used" in capsys.readouterr().out
    wide = [sample(i, npz=npz(**vectors(i, 6 + i % 2))) for i in range(8)]
    data = shards.write_shards(lab.root / "wide", wide, per_shard=4)
    sentence = fails(lab, f"--train-data {data} --data_size -1 {LINE} --workers 1", capsys)
    assert "--dataset_reinforcement: the embeddings of " in sentence and "same teachers" in sentence


def test_the_plan_of_a_run(lab, capsys):
    assert main([*lab.words(LINE), "--dry_run"]) == 0
    assert "not built, its features are in the shards" in capsys.readouterr().out
