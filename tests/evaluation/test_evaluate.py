"""Evaluation of real models: compared with a plain computation on the whole set, on one rank and on two."""

import io
import json
import os
import pickle
import shutil
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform_v2
from PIL import Image

from tests.support import shards, tiny_models
from tests.support.pictures import write_folders
from tests.support.ranks import ranks
from training import predictions
from training.checkpoint.run_folder import RunFolder, choose_folder
from training.config.params import parse
from training.distributed.collectives import on_main
from training.distributed.process_group import World
from training.evaluation.benchmark.sets import read_picture
from training.evaluation.evaluate import open_evaluation, open_sets
from training.logger import open_run
from training.models.build import build_target
from training.models.create import BuiltModel

MAIN = World(0, 0, 1, 1, torch.device("cpu"))
PAIRS, CLASSES, PER_CLASS = 21, 7, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """21 captioned pictures in 3 shards, and the same pictures in 7 class folders."""
    path = tmp_path_factory.mktemp("data")
    val = shards.write_shards(path / "val", PAIRS, per_shard=[9, 5, 7])
    names = [f"{shards.COLORS[c]}_thing" for c in range(CLASSES)]
    zero_shot = write_folders(path / "classes", names, PER_CLASS)
    (path / "classes" / "zeroshot_classification_templates.txt").write_text("a {c}.\nmany {c}s\nthe {c}\n")
    return path, val, zero_shot


def config_of(data, logs, *flags, model="tiny-vit", zero_shot=True):
    path, val, classes = data
    model = tiny_models.path(model, path)
    return parse(
        [
            *("--model", model, "--precision", "fp32", "--workers", "0", "--seed", "3"),
            *("--batch-size", "4", "--epochs", "0", "--logs", str(logs), "--name", "run", "--val-data", val),
            *(("--imagenet-val", classes) if zero_shot else ()),
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A tiny model after some steps on two thirds of the pairs: it knows some of them."""
    built = build_target(config_of(data, tmp_path_factory.mktemp("logs")), MAIN)
    image, text = pairs(built)
    optimizer = torch.optim.AdamW(built.module.parameters(), 1e-3)
    loss = open_clip.ClipLoss()
    for _ in range(12):
        out = built.module(image[:14], text[:14])
        optimizer.zero_grad()
        loss(out["image_features"], out["text_features"], out["logit_scale"]).backward()
        optimizer.step()
    return built


def pairs(built: BuiltModel):
    """All pictures (as the shards hold them, in JPEG) and captions, by open_clip's own transform and tokenizer."""
    transform = image_transform_v2(built.preprocess, is_train=False)
    images = [transform(open_picture(shards.sample(i)["jpg"])) for i in range(PAIRS)]
    return torch.stack(images), built.tokenizer([shards.caption(i) for i in range(PAIRS)])


def open_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def run_evaluation(config, built: BuiltModel, world=MAIN, epoch=0, **options):
    """A whole evaluation, as the trainer does it. Returns the metrics."""
    with open_run(config, world, choose_folder(config, world)) as log:
        sets = on_main(lambda: open_sets(config))
        return open_evaluation(built, config, world, log, sets)(built.module, epoch, **options)


def on_rank(config, weights=None):
    rank = int(os.environ["RANK"])
    world = World(rank, rank, 2, 2, torch.device("cpu"))
    built = build_target(config, world)
    built.module.load_state_dict(torch.load(weights, weights_only=True))
    return run_evaluation(config, built, world)


@torch.no_grad()
def plain(built, classes):
    """Retrieval and zero-shot with whole matrices in float64; no ties occur."""
    model = built.module.eval()
    image, text = pairs(built)
    x = F.normalize(model.encode_image(image).double(), dim=1)
    y = F.normalize(model.encode_text(text).double(), dim=1)
    s, scale = x @ y.T, model.logit_scale.exp().item()
    expected = {"num_samples": PAIRS, "clip_val_loss": float(
        (F.cross_entropy(scale * s, torch.arange(PAIRS)) + F.cross_entropy(scale * s.T, torch.arange(PAIRS))) / 2
    )}  # fmt: skip
    for name, matrix in (("image_to_text", s), ("text_to_image", s.T)):
        order = matrix.argsort(dim=1, descending=True).numpy()
        place = np.array([list(row).index(i) for i, row in enumerate(order)])
        expected[f"{name}_mean_rank"] = place.mean() + 1
        expected[f"{name}_median_rank"] = np.floor(np.median(place)) + 1
        expected |= {f"{name}_R@{k}": np.mean(place < k) for k in (1, 5, 10)}

    names = sorted(p.name for p in classes.iterdir() if p.is_dir())
    columns = []
    for name in (n.replace("_", " ") for n in names):
        prompts = [f"a {name}.", f"many {name}s", f"the {name}"]
        mean = F.normalize(model.encode_text(built.tokenizer(prompts)).double(), dim=1).mean(0)
        columns.append(mean / mean.norm())
    transform = image_transform_v2(built.preprocess, is_train=False)
    right1, right5 = np.zeros(CLASSES), np.zeros(CLASSES)
    for label, name in enumerate(names):
        for file in sorted((classes / name).iterdir()):
            pixels = transform(open_picture(file.read_bytes()))[None]
            logits = F.normalize(model.encode_image(pixels).double(), dim=1) @ torch.stack(columns, 1)
            best = logits[0].argsort(descending=True).tolist()
            right1[label] += best[0] == label
            right5[label] += label in best[:5]
    expected["imagenet-zeroshot-val-num_samples"] = PAIRS
    expected["imagenet-zeroshot-val-top1"] = right1.sum() / PAIRS
    expected["imagenet-zeroshot-val-top5"] = right5.sum() / PAIRS
    expected["imagenet-zeroshot-val-mean_per_class_recall"] = (right1 / PER_CLASS).mean()
    return expected


def picture_of(caption):
    return next(shards.sample(i)["jpg"] for i in range(PAIRS) if shards.caption(i) == caption)


def kept(run, epoch=0, key="imagenet"):
    return predictions.load(run / f"eval_results/predictions/epoch_{epoch}/{key}.npz")


def test_equals_a_plain_computation_and_is_reported(data, trained, tmp_path):
    config = config_of(data, tmp_path, "--report-to", "tensorboard")
    expected = plain(trained, data[0] / "classes")
    found = run_evaluation(config, trained, epoch=5)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert 1 / PAIRS < expected["image_to_text_R@1"] < 1  # the model has learned something, not everything
    found_for = kept(tmp_path / "run", 5, "val-data")
    for direction, right, rank in (
        ("image_to_text", found_for.image_right, found_for.image_rank),
        ("text_to_image", found_for.text_right, found_for.text_rank),
    ):
        assert right.mean() == pytest.approx(expected[f"{direction}_R@1"])
        assert rank.mean() == pytest.approx(expected[f"{direction}_mean_rank"])
    assert found_for.captions == {i: shards.caption(i) for i in range(PAIRS)}
    assert [read_picture(where) for where in found_for.pictures.values()] == [
        shards.sample(i)["jpg"] for i in range(PAIRS)
    ]

    classes = kept(tmp_path / "run", 5)
    assert classes.right.mean() == pytest.approx(expected["imagenet-zeroshot-val-top1"])
    in_five = (classes.top == classes.label[:, None]).any(1)
    assert in_five.mean() == pytest.approx(expected["imagenet-zeroshot-val-top5"])
    files = [path for _, path, _, _ in classes.places]
    assert files == [str(file) for file in sorted((data[0] / "classes").glob("*/*.png"))]

    (line,) = (tmp_path / "run" / "eval_results.jsonl").read_text().splitlines()
    assert json.loads(line) == {"epoch": 5, "step": 0, **found}
    assert "Eval Epoch: 5 " in (tmp_path / "run" / "out.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (event,) = events.Scalars("val/image_to_text_R@1")
    assert (event.step, event.value) == (5, pytest.approx(found["image_to_text_R@1"]))


@pytest.mark.parametrize("limit", [PAIRS, 1])
def test_two_ranks_report_what_one_does(data, trained, tmp_path, limit):
    """21 and 1 samples: shares of the ranks differ, one may be empty."""
    flags = ("--val-num-samples", str(limit))
    alone = run_evaluation(config_of(data, tmp_path / "one", *flags), trained)
    torch.save(trained.module.state_dict(), tmp_path / "weights.bin")
    both = ranks(2).run(on_rank, config_of(data, tmp_path / "two", *flags), tmp_path / "weights.bin")
    assert both[0] == both[1] == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert alone["num_samples"] == limit
    one, two = kept(tmp_path / "one/run"), kept(tmp_path / "two/run")
    assert one.right.tolist() == two.right.tolist() and one.top.tolist() == two.top.tolist()
    one, two = (kept(tmp_path / name / "run", key="val-data") for name in ("one", "two"))
    ranked = ({found.captions[i]: rank for i, rank in enumerate(found.text_rank)} for found in (one, two))
    assert next(ranked) == next(ranked)  # two ranks have them in another order
    assert all(read_picture(two.pictures[i]) == picture_of(text) for i, text in two.captions.items())
    assert len((tmp_path / "two" / "run" / "eval_results.jsonl").read_text().splitlines()) == 1


def test_two_ranks_share_a_folder_without_prompts_of_its_own(data, trained, tmp_path):
    """open_clip's prompts are functions without a name, and rank 0 sends what it has opened to the others."""
    names = [f"{shards.COLORS[c]}_thing" for c in range(CLASSES)]
    plain = (*data[:2], write_folders(tmp_path / "plain", names, PER_CLASS))
    config = config_of(plain, tmp_path / "two")
    opened = open_sets(config)["imagenet"]
    prompts = [template("red thing") for template in pickle.loads(pickle.dumps(opened)).templates]
    assert prompts == [template("red thing") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    alone = run_evaluation(config_of(plain, tmp_path / "one"), trained)
    torch.save(trained.module.state_dict(), tmp_path / "weights.bin")
    both = ranks(2).run(on_rank, config, tmp_path / "weights.bin")
    assert both[0] == both[1] == pytest.approx(alone, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("precision", ["amp_bf16", "pure_bf16"])
def test_low_precision_is_near_float32(data, trained, tmp_path, precision):
    exact = run_evaluation(config_of(data, tmp_path / "fp32"), trained)
    config = config_of(data, tmp_path / "bf16", "--precision", precision)
    built = build_target(config, MAIN)
    built.module.load_state_dict(trained.module.state_dict())
    low = run_evaluation(config, built)
    assert low.keys() == exact.keys()
    assert low["clip_val_loss"] == pytest.approx(exact["clip_val_loss"], rel=0.05)
    assert low["clip_val_loss"] != pytest.approx(exact["clip_val_loss"], rel=1e-6)
    assert low["text_to_image_mean_rank"] == pytest.approx(exact["text_to_image_mean_rank"], abs=1.0)


def test_coca_reports_its_caption_loss(data, tmp_path):
    config = config_of(data, tmp_path, "--coca-caption-loss-weight", "2.0", model="tiny-coca", zero_shot=False)
    built = build_target(config, MAIN)
    image, text = pairs(built)
    with torch.no_grad():
        out = built.module.eval()(image, text)
        loss = open_clip.CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=1.0)
        contrastive, caption = loss(
            out["image_features"], out["text_features"], out["logits"], out["labels"], out["logit_scale"]
        )
    found = run_evaluation(config, built)
    assert found["val_generative_loss"] == pytest.approx(caption.item(), rel=1e-5)
    assert found["clip_val_loss"] == pytest.approx(contrastive.item(), rel=1e-5)
    built.module.forward = partial(built.module.forward, output_labels=False)  # as open_clip 4 puts them out
    again = run_evaluation(config, built)
    assert again["val_generative_loss"] == pytest.approx(caption.item(), rel=1e-5)


@pytest.mark.parametrize(
    "flags, epoch, final, what",
    [
        (("--val-frequency", "1", "--zeroshot-frequency", "2"), 1, False, "retrieval"),
        (("--val-frequency", "1", "--zeroshot-frequency", "2"), 2, False, "both"),
        (("--val-frequency", "3", "--zeroshot-frequency", "2"), 5, False, "both"),  # the last of 5 epochs
        (("--val-frequency", "3", "--zeroshot-frequency", "2"), 1, False, "neither"),
        (("--val-frequency", "3", "--zeroshot-frequency", "2"), 1, True, "both"),  # the run ends early
        (("--val-frequency", "0", "--zeroshot-frequency", "0"), 5, True, "neither"),
        (("--epochs", "0", "--val-frequency", "3", "--zeroshot-frequency", "0"), 1, False, "retrieval"),
    ],
)
def test_what_is_due_when(data, trained, tmp_path, flags, epoch, final, what):
    trains = () if "--epochs" in flags else ("--epochs", "5", "--dataset-type", "synthetic")
    config = config_of(data, tmp_path, *trains, "--train-num-samples", "4", "--val-num-samples", "2", *flags)
    found = run_evaluation(config, trained, epoch=epoch, final=final)
    assert ("clip_val_loss" in found) == (what in ("retrieval", "both"))
    assert ("imagenet-zeroshot-val-top1" in found) == (what == "both")
    assert (tmp_path / "run" / "eval_results.jsonl").exists() == (what != "neither")


def test_training_goes_on_as_if_nothing_had_happened(data, trained, tmp_path):
    """Modes (a locked tower stays in eval mode) and random numbers are as they were."""
    config, model = config_of(data, tmp_path, "--val-num-samples", "4"), trained.module
    model.train()
    model.visual.eval()
    modes = [m.training for m in model.modules()]
    numbers = torch.get_rng_state()
    with open_run(config, MAIN, RunFolder(tmp_path / "run", "run")) as log:
        evaluation = open_evaluation(trained, config, MAIN, log, open_sets(config))
        first = evaluation(model, 0)
        assert evaluation(model, 0) == first
    assert [m.training for m in model.modules()] == modes
    assert True in modes and False in modes
    assert torch.equal(torch.get_rng_state(), numbers)


def test_bad_folders_are_refused(data, tmp_path):
    (tmp_path / "empty").mkdir()
    config = config_of((data[0], data[1], str(tmp_path / "empty")), tmp_path)
    with pytest.raises(ValueError, match="--imagenet-val"):
        open_sets(config)


def test_broken_pictures_are_left_out_and_reported(data, trained, tmp_path):
    """On two ranks too; accuracies are those of a folder without them."""
    sound, spoiled = tmp_path / "sound", tmp_path / "spoiled"
    for path in (sound, spoiled):
        shutil.copytree(data[0] / "classes", path)
    broken = [file for i, file in enumerate(sorted(spoiled.rglob("*.png"))) if i % 4 == 1]
    for file in broken:
        file.write_bytes(b"broken")
        (sound / file.relative_to(spoiled)).unlink()
    limit = ("--val-num-samples", "1")
    expected = run_evaluation(config_of((data[0], data[1], str(sound)), tmp_path / "a", *limit), trained)
    config = config_of((data[0], data[1], str(spoiled)), tmp_path / "b", *limit)
    found = run_evaluation(config, trained)
    assert found == {**expected, "imagenet-zeroshot-val-left_out": len(broken)}
    classes = kept(tmp_path / "b/run")
    assert classes.used.tolist() == [i % 4 != 1 for i in range(PAIRS)]
    assert classes.number.tolist() == [i for i in range(PAIRS) if i % 4 != 1]
    log = (tmp_path / "b" / "run" / "out.log").read_text()
    assert f"imagenet: {len(broken)} of {PAIRS} pictures are left out, accuracies are of the others: " in log
    assert f"{len(broken)} undecodable image (e.g. {broken[0]}" in log
    torch.save(trained.module.state_dict(), tmp_path / "weights.bin")
    config = config_of((data[0], data[1], str(spoiled)), tmp_path / "c", *limit)
    both = ranks(2).run(on_rank, config, tmp_path / "weights.bin")
    assert both[0] == both[1] == pytest.approx(found, rel=1e-5, abs=1e-6)
    assert (tmp_path / "c" / "run" / "out.log").read_text().count(f"{len(broken)} undecodable image") == 1


def test_pictures_that_become_unreadable_end_no_training(data, trained, tmp_path):
    """But a run that only evaluates has nothing else to say."""
    folder = write_folders(tmp_path / "classes", ["ant", "bee"])
    training = ("--epochs", "3", "--dataset-type", "synthetic", "--train-num-samples", "4", "--val-frequency", "0")
    for flags in (training, ("--val-frequency", "0")):
        config = config_of((data[0], data[1], folder), tmp_path / str(len(flags)), *flags)
        with open_run(config, MAIN, choose_folder(config, MAIN)) as log:
            evaluation = open_evaluation(trained, config, MAIN, log, open_sets(config))
            assert "imagenet-zeroshot-val-top1" in evaluation(trained.module, 2)
            shutil.move(folder, tmp_path / "gone")
            if flags is training:
                assert evaluation(trained.module, 2) == {}
            else:
                with pytest.raises(
                    ValueError, match=r"--imagenet-val .*: it contains no usable picture; left out: 2"
                ):
                    evaluation(trained.module, 2)
            shutil.move(tmp_path / "gone", folder)


def test_pairs_none_of_which_can_be_used_end_no_training(data, trained, tmp_path):
    shards.write_tar(tmp_path / "0.tar", [{"__key__": "a", "jpg": b"broken", "txt": "text"}])
    unusable = ("--val-data", str(tmp_path / "0.tar"))
    training = ("--epochs", "3", "--dataset-type", "synthetic", "--train-num-samples", "4")
    config = config_of(data, tmp_path / "a", *unusable, *training, zero_shot=False)
    assert run_evaluation(config, trained, epoch=3) == {}
    log = (tmp_path / "a" / "run" / "out.log").read_text()
    assert "0.tar: it contains no usable sample, no retrieval is computed" in log and "1 undecodable image" in log
    with pytest.raises(ValueError, match=r"--val-data .*0\.tar: it contains no usable sample"):
        run_evaluation(config_of(data, tmp_path / "b", *unusable, zero_shot=False), trained)


def test_interruptions_surface(data, trained, tmp_path):
    """They are not turned into a missing metric."""

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = trained.module.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(config_of(data, tmp_path / "b", zero_shot=False), trained)
    hook.remove()


def test_lines_of_a_text_file_are_captions(data, trained, tmp_path):
    """As are the entries of a list in a json; the loss is that of the first ones. On two ranks, too."""
    samples, captions = [], []
    for i in range(PAIRS):
        some = [shards.caption(i), *(f"{shards.caption(i)} again {j}" for j in range(i % 3))]
        captions.append(some)
        sample = {"__key__": f"{i}", "jpg": shards.sample(i)["jpg"]}
        samples.append(sample | {"txt": "\n".join(some) + "\n\n"})
    val = shards.write_shards(tmp_path / "val", samples, per_shard=8)
    listed = [s | {"json": {"caption": c} if i % 2 else c} for i, (s, c) in enumerate(zip(samples, captions))]
    for sample in listed:
        del sample["txt"]
    in_json = shards.write_shards(tmp_path / "json", listed, per_shard=8)

    found = run_evaluation(config_of((data[0], val, data[2]), tmp_path / "a", zero_shot=False), trained)
    model, (image, _) = trained.module.eval(), pairs(trained)
    texts = [text for some in captions for text in some]
    owner = [i for i, some in enumerate(captions) for _ in some]
    with torch.no_grad():
        x = F.normalize(model.encode_image(image).double(), dim=1)
        y = F.normalize(model.encode_text(trained.tokenizer(texts)).double(), dim=1)
    s = x @ y.T
    for k in (1, 5, 10):
        hits = [any(owner[j] == i for j in row.argsort(descending=True)[:k]) for i, row in enumerate(s)]
        assert found[f"image_to_text_R@{k}"] == pytest.approx(np.mean(hits))
        hits = [owner[j] in row.argsort(descending=True)[:k] for j, row in enumerate(s.T)]
        assert found[f"text_to_image_R@{k}"] == pytest.approx(np.mean(hits))
    assert (found["num_samples"], found["num_captions"]) == (PAIRS, len(texts))
    alone = run_evaluation(config_of(data, tmp_path / "b", zero_shot=False), trained)
    assert found["clip_val_loss"] == pytest.approx(alone["clip_val_loss"])

    config = config_of((data[0], in_json, data[2]), tmp_path / "c", zero_shot=False)
    assert run_evaluation(config, trained) == pytest.approx(found)
    torch.save(trained.module.state_dict(), tmp_path / "weights.bin")
    config = config_of((data[0], val, data[2]), tmp_path / "d", zero_shot=False)
    both = ranks(2).run(on_rank, config, tmp_path / "weights.bin")
    assert both[0] == both[1] == pytest.approx(found, rel=1e-5, abs=1e-6)
    picture = {text: shards.sample(i)["jpg"] for i, some in enumerate(captions) for text in some}
    for name in ("a", "d"):
        held = kept(tmp_path / name / "run", key="val-data")
        assert held.text_right.mean() == pytest.approx(found["text_to_image_R@1"])
        assert held.image_right.mean() == pytest.approx(found["image_to_text_R@1"])
        shown = {held.captions[i]: read_picture(held.pictures[held.text_own[i]]) for i in range(len(texts))}
        assert shown == picture
