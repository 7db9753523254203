"""``python -m training.evaluate`` on sets made on the spot, beside plain computations with open_clip alone."""

import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform_v2
from PIL import Image

import training.main
from tests.support import evalsets, shards, tiny_models
from tests.support.building import ALONE, known_to_open_clip, shrunk
from tests.support.ranks import run_program
from training import predictions
from training.evaluate import main, parser
from training.evaluation.benchmark import program
from training.evaluation.benchmark.sets import read_picture
from training.models.saved import find_checkpoint
from training.run_report.history import read_run

NAMES = [f"{color} {shape}" for color, shape in zip(shards.COLORS, shards.SHAPES * 2)][:7]
FLICKR = "retrieval/flickr_1k_test_image_text_retrieval"
N = 23


class Plain:
    """The model and its inputs by open_clip's own functions, in float64 after the towers."""

    def __init__(self, weights):
        self.model = tiny_models.build("tiny-vit").eval()
        self.model.load_state_dict(weights)
        self.tokenizer = open_clip.get_tokenizer(known_to_open_clip())
        self.transform = image_transform_v2(open_clip.transform.PreprocessCfg(size=32), is_train=False)

    @torch.no_grad()
    def images(self, files):
        pixels = [self.transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return F.normalize(self.model.encode_image(torch.stack(pixels)).double(), dim=1)

    @torch.no_grad()
    def texts(self, texts):
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts))).double(), dim=1)

    def classifier(self, names, templates):
        means = torch.stack([self.texts([t.replace("{c}", n) for t in templates]).mean(0) for n in names])
        return F.normalize(means, dim=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with a checkpoint, and a folder with sets of all kinds."""
    root = tmp_path_factory.mktemp("benchmark")
    model = tiny_models.path("tiny-vit", root)
    weights = tiny_models.build("tiny-vit", seed=5).state_dict()
    (root / "run/checkpoints").mkdir(parents=True)
    torch.save({"epoch": 3, "name": "run", "state_dict": weights}, root / "run/checkpoints/epoch_3.pt")
    (root / "run/params.txt").write_text(f"model: {model}\npretrained: \n")
    rng = np.random.default_rng(0)
    data = root / "data"
    labels = rng.integers(0, 7, N)
    columns = np.stack([rng.integers(0, 3, N), rng.integers(0, 2, N), labels], 1)
    evalsets.write_classification(data / "wds_cifar10_test", labels, NAMES)
    evalsets.write_classification(data / "wds_wilds-fmow_test", labels, NAMES, columns)
    evalsets.write_classification(data / "wds_vtab-pcam_test", labels % 2, NAMES[:2])
    faces = {
        "race": NAMES,
        "gender": NAMES[:2],
        "age": NAMES[:4],
        "toxic": [*NAMES, *(f"thing {i}" for i in range(14))],
    }
    truth = np.stack([rng.integers(0, n, N) for n in (4, 2, 7, 2)], 1)
    evalsets.write_wds(
        data / "wds_utkface_test",
        [
            {"__key__": f"f{i}", "webp": evalsets.encoded(i, "webp"), "npy": evalsets.npy(truth[i])}
            for i in range(N)
        ],
        [f"{kind}:{name}" for kind, names in faces.items() for name in names],
        [f"{kind}:a face of {{c}}" for kind in faces],
    )
    captions = [[f"{shards.caption(i)} {j}" for j in range(1 + i % 3)] for i in range(N)]
    pictures = {f"{i}.jpg": evalsets.encoded(i, "jpg") for i in range(N)}
    rows = [{"filename": f"{i}.jpg", "raw": captions[i], "split": "test"} for i in range(N)]
    rows.append({"filename": "none.jpg", "raw": ["of another split"], "split": "train"})
    evalsets.write_csv_and_zip(data / "nlphuji" / FLICKR.split("/")[1], "test_1k_flickr", rows, pictures)
    puzzles = [("Apple", 0, 5), ("stone", 3, 6), ("Owl", 2, 10), ("ice", 8, 12), ("Tree", 11, 10)]
    rows = [
        {"cue": cue, "candidates": [f"{i}" for i in range(at, at + n)], "associations": [f"{at + 1}", f"{at + 3}"]}
        for cue, at, n in puzzles
    ]
    evalsets.write_csv_and_zip(data / "nlphuji/winogavil", "winogavil_dataset", rows, pictures)
    samples = [{"__key__": f"{i}", "jpg": pictures[f"{i}.jpg"], "txt": "\n".join(captions[i])} for i in range(N)]
    evalsets.write_wds(data / "wds_mine_test", samples, kind="retrieval")
    plain = Plain(weights)
    made = {"labels": labels, "columns": columns, "truth": truth, "captions": captions, "faces": faces}
    return root, plain, made | {"pictures": list(pictures.values()), "puzzles": puzzles}


def words(root, *more, run="run", data="data"):
    common = ("--workers", "0", "--batch_size", "5")
    return ["--checkpoint", str(root / run), "--data_dir", str(root / data), *common, *more]


def lines_of(file):
    return {line["key"]: line for line in map(json.loads, file.read_text().splitlines())}


@pytest.fixture(scope="module")
def results(place, one_thread):
    """The lines of an evaluation of everything."""
    root = place[0]
    assert main(words(root)) == 0
    return lines_of(root / "run/eval_results/epoch_3_eval_results.jsonl")


def formats(n=N):
    return [evalsets.encoded(i, ("jpg", "png", "webp")[i % 3]) for i in range(n)]


def test_classification(place, results):
    _, plain, made = place
    similarity = plain.images(formats()) @ plain.classifier(NAMES, evalsets.TEMPLATES).T
    order, labels = similarity.argsort(1, descending=True).numpy(), made["labels"]
    line = results["cifar10"]
    assert (line["dataset"], line["key"]) == ("CIFAR-10", "cifar10")
    acc1 = np.mean(order[:, 0] == labels)
    assert line["metrics"]["acc1"] == line["metrics"]["main_metric"] == pytest.approx(acc1)
    assert line["metrics"]["acc5"] == pytest.approx(np.mean([y in o[:5] for o, y in zip(order, labels)]))
    recalls = [np.mean(order[labels == c, 0] == c) for c in set(labels)]
    assert line["metrics"]["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert 0 < acc1 < 1
    regions = [
        np.mean(order[made["columns"][:, 0] == g, 0] == labels[made["columns"][:, 0] == g]) for g in range(3)
    ]
    assert results["wilds/fmow"]["metrics"]["main_metric"] == pytest.approx(min(regions))
    assert results["vtab/pcam"]["metrics"]["acc5"] is None


def test_faces_have_a_classifier_for_each_kind(place, results):
    _, plain, made = place
    image = plain.images([evalsets.encoded(i, "webp") for i in range(N)])
    best = {
        kind: (image @ plain.classifier(names, ["a face of {c}"]).T).argmax(1).numpy()
        for kind, names in made["faces"].items()
    }
    metrics, truth = results["fairness/utkface"]["metrics"], made["truth"]
    assert metrics["main_metric"] is None
    assert metrics["acc_age_avg"] == pytest.approx(np.mean(best["age"] == truth[:, 0]))
    assert metrics["acc_gender_avg"] == pytest.approx(np.mean(best["gender"] == truth[:, 1]))
    assert metrics["acc_race_avg"] == pytest.approx(np.mean((best["race"] != 1) == truth[:, 3]))
    assert metrics["toxicity_crime_avg"] == pytest.approx(np.mean(best["toxic"] >= 18))


def recalls(similarity, owner):
    """Recall of pictures and of captions at 1, 5, 10, one query at a time; no ties occur."""
    expected = {}
    for k in (1, 5, 10):
        hits = [any(owner[j] == i for j in row.argsort(descending=True)[:k]) for i, row in enumerate(similarity)]
        expected[f"text_retrieval_recall@{k}"] = np.mean(hits)
        hits = [owner[j] in row.argsort(descending=True)[:k] for j, row in enumerate(similarity.T)]
        expected[f"image_retrieval_recall@{k}"] = np.mean(hits)
    return expected


def test_retrieval_with_several_captions(place, results):
    _, plain, made = place
    texts = [caption for some in made["captions"] for caption in some]
    owner = [i for i, some in enumerate(made["captions"]) for _ in some]
    expected = recalls(plain.images(made["pictures"]) @ plain.texts(texts).T, owner)
    metrics = dict(results[FLICKR]["metrics"])
    main_metric = metrics.pop("main_metric")
    assert main_metric == metrics.pop("mean_recall@1")
    assert metrics == pytest.approx(expected)
    both = expected["text_retrieval_recall@1"] + expected["image_retrieval_recall@1"]
    assert main_metric == pytest.approx(both / 2)
    further = results["mine"]["metrics"]  # the same pictures and captions in tar files
    assert further == {**metrics, "mean_recall@1": main_metric, "main_metric": None}


def kept_of(root, key):
    return predictions.load(root / f"run/eval_results/predictions/epoch_3/{key.replace('/', '-')}.npz")


def test_what_is_kept_of_a_classification(place, results):
    """And each picture can be found again."""
    root, plain, made = place
    similarity = plain.images(formats()) @ plain.classifier(NAMES, evalsets.TEMPLATES).T
    order, labels = similarity.argsort(1, descending=True).numpy(), made["labels"]
    kept = kept_of(root, "cifar10")
    assert (kept.key, kept.name, kept.classes) == ("cifar10", "CIFAR-10", NAMES)
    assert kept.right.tolist() == (order[:, 0] == labels).tolist() and kept.used.all()
    assert kept.class_pictures.tolist() == [sum(labels == c) for c in range(7)]
    assert kept.class_right.tolist() == [sum((labels == c) & (order[:, 0] == c)) for c in range(7)]
    wrong = Counter((y, p) for y, p in zip(labels.tolist(), order[:, 0].tolist()) if y != p)
    assert {(y, p): n for y, p, n in kept.confused.tolist()} == dict(wrong)
    assert kept.confused[:, 2].tolist() == sorted(wrong.values(), reverse=True)
    assert kept.number.tolist() == list(range(N)) and kept.label.tolist() == labels.tolist()
    assert kept.top.tolist() == order[:, :5].tolist()
    scale = plain.model.logit_scale.exp().item()
    probability = (scale * similarity).softmax(1).sort(1, descending=True).values[:, :5].detach()
    assert kept.probability == pytest.approx(probability.numpy(), abs=1e-3)  # float16
    assert [read_picture(where) for where in kept.places] == formats()
    assert results["cifar10"]["num_samples"] == N and "num_captions" not in results["cifar10"]


def test_what_is_kept_of_retrieval(place, results):
    root, plain, made = place
    texts = [caption for some in made["captions"] for caption in some]
    owner = np.array([i for i, some in enumerate(made["captions"]) for _ in some])
    similarity = (plain.images(made["pictures"]) @ plain.texts(texts).T).numpy()
    kept = kept_of(root, FLICKR)
    order = (-similarity).argsort(1)
    assert kept.image_right.tolist() == (owner[order[:, 0]] == np.arange(N)).tolist()
    assert kept.image_query.tolist() == list(range(N)) and kept.image_top.tolist() == order[:, :5].tolist()
    assert kept.image_hits.tolist() == (owner[order[:, :5]] == np.arange(N)[:, None]).tolist()
    places = [[owner[j] for j in row].index(i) for i, row in enumerate(order)]
    assert kept.image_rank.tolist() == [place + 1 for place in places]
    assert kept.image_own.tolist() == [row[place] for row, place in zip(order, places)]
    order = (-similarity.T).argsort(1)
    assert kept.text_right.tolist() == (order[:, 0] == owner).tolist()
    assert kept.text_top.tolist() == order[:, :5].tolist() and kept.text_own.tolist() == owner.tolist()
    assert kept.text_rank.tolist() == [row.tolist().index(i) + 1 for i, row in zip(owner, order)]
    assert kept.text_score == pytest.approx(-np.sort(-similarity.T)[:, :5], abs=1e-3)
    assert kept.captions == dict(enumerate(texts))
    assert {i: read_picture(where) for i, where in kept.pictures.items()} == dict(enumerate(made["pictures"]))
    assert (results[FLICKR]["num_samples"], results[FLICKR]["num_captions"]) == (N, len(texts))


def test_winogavil(place, results):
    _, plain, made = place
    image = plain.images(made["pictures"])
    scores = []
    for cue, at, n in made["puzzles"]:
        word = cue.lower()
        text = plain.texts([f"{'An' if word[0] in 'aeiou' else 'A'} {word}"])[0]
        chosen = set((image[at : at + n] @ text).argsort(descending=True)[:2].tolist())
        scores.append(len(chosen & {1, 3}) / len(chosen | {1, 3}))
    metrics = results["misc/winogavil"]["metrics"]
    assert metrics["avg_jaccard_score"] == pytest.approx(np.mean(scores))
    assert metrics["main_metric"] == metrics["jaccard_score_10-12"] == pytest.approx(np.mean(scores[2:]))


def test_all_lines_carry_the_same_digest(results):
    assert len({line["digest"] for line in results.values()}) == 1
    assert len(results) == 7


def test_two_ranks_write_what_one_does(place, results, tmp_path):
    root, out = place[0], tmp_path / "two.jsonl"
    codes = run_program(2, words(root, "--out", str(out)), program="training.evaluate")
    assert [code for code, _ in codes] == [0, 0]
    two = lines_of(out)
    assert two.keys() == results.keys()
    for key, line in two.items():
        assert line["metrics"] == pytest.approx(results[key]["metrics"], abs=1e-6, nan_ok=True), key
        assert line["digest"] == results[key]["digest"]


# ------------------------------------------------------------------------------------------- goes on, and fails


def lines_in(file):
    return file.read_text().splitlines()


def test_an_interrupted_evaluation_goes_on(place, results, tmp_path, capsys):
    """Half of a line, as after a crash, is evaluated again; what is done is not."""
    root, out = place[0], tmp_path / "out.jsonl"
    texts = lines_in(root / "run/eval_results/epoch_3_eval_results.jsonl")
    out.write_text("\n".join(texts[:3]) + "\n" + texts[3][:40])
    assert main(words(root, "--out", str(out))) == 0
    assert "3 of 7 sets have results of these weights already" in capsys.readouterr().err
    assert lines_in(out)[:3] == texts[:3]
    assert lines_of(out) == results


def test_lines_of_other_weights_are_moved_aside(place, results, tmp_path, capsys):
    root, out = place[0], tmp_path / "out.jsonl"
    foreign = '{"key": "cifar10", "dataset": "CIFAR-10", "metrics": {"acc1": 1.0, "main_metric": 1.0}}'
    out.write_text(foreign + "\n")
    assert main(words(root, "--out", str(out), "--tasks", "CIFAR-10")) == 0
    assert lines_of(out) == {"cifar10": results["cifar10"]}
    assert lines_in(tmp_path / "out.others.jsonl") == [foreign]
    assert "1 line is of other weights or of another program" in capsys.readouterr().err


def test_a_set_that_fails_ends_no_other(place, results, tmp_path, capsys):
    root = place[0]
    data = tmp_path / "data"
    shutil.copytree(root / "data/wds_cifar10_test", data / "wds_cifar10_test")
    evalsets.write_classification(data / "wds_mnist_test", [0, 9], ["one", "two"])
    shutil.copytree(root / "data/wds_wilds-fmow_test", data / "wds_wilds-fmow_test")
    assert main(words(tmp_path, "--out", str(tmp_path / "o"), run=root / "run")) == 1
    assert lines_of(tmp_path / "o").keys() == {"cifar10", "wilds/fmow"}
    told = capsys.readouterr()
    why = f"MNIST: --data_dir {data}/wds_mnist_test: s00001.cls holds '9', not a class number 0..1"
    assert f"not evaluated:\n  {why}" in told.out
    assert f"{why.replace('MNIST: ', 'MNIST: not evaluated: ')}" in told.err


def test_the_table_says_what_is_there_and_what_is_missing(place, results, capsys):
    """All has been evaluated already, so nothing is done."""
    assert main(words(place[0])) == 0
    out = capsys.readouterr().out
    values = [line["metrics"]["main_metric"] for line in results.values()]
    average = np.mean([value for value in values if value is not None])
    assert re.search(rf"\nAverage of what was there .* {average:.4f}\n", out)
    assert "of 5 of 38: incomplete" in out
    assert "ImageNet 1k: it needs wds_imagenet1k_test/" in out
    assert "mine" in out and "(not of the benchmark)" in out


@pytest.mark.parametrize(
    "given, says",
    [
        (
            ["--tasks", "cifar10,nmist"],
            "--tasks cifar10,nmist: nmist is neither a task of the benchmark nor in .*mnist",
        ),
        (["--tasks", "mnist"], "--tasks mnist: mnist is not in .*; it needs wds_mnist_test/"),
        (["--data_dir", "@nowhere"], "--data_dir .*nowhere"),
        (["--data_dir", "@run"], "--data_dir .*run: it holds no set"),
        (["--epoch", "4"], "--epoch 4: --checkpoint .*run has no epoch_4.pt; its epochs are 3"),
        (["--checkpoint", "nothing.pt"], "--checkpoint nothing.pt: there is no such file or folder"),
        (["--checkpoint", "@data"], "--checkpoint .*data: it has no checkpoint"),
        (
            ["--checkpoint", "@alone.pt"],
            "--checkpoint .*alone.pt: it does not say of which model it is; give --model",
        ),
        (["--checkpoint", "@alone.pt", "--model", "@tiny-vit.json"], "--out is missing"),
        (
            ["--checkpoint", "ViT-B-32:openai", "--model", "RN50"],
            "--model RN50: --checkpoint ViT-B-32:openai names",
        ),
        (["--checkpoint", "ViT-B-33:openai", "--out", "@o"], "--model ViT-B-33: open_clip has no such model"),
        (["--checkpoint", "ViT-B-32:opening", "--out", "@o"], "--checkpoint ViT-B-32:opening: "),
        (["--model", "@tiny-resnet.json"], "--checkpoint .*epoch_3.pt: these weights do not fit"),
    ],
)
def test_refusals(place, given, says, capsys):
    root = place[0]
    (root / "alone.pt").write_bytes((root / "run/checkpoints/epoch_3.pt").read_bytes())
    tiny_models.path("tiny-resnet", root)
    code = main(words(root, *(str(root / word[1:]) if word.startswith("@") else word for word in given)))
    assert code == 2
    assert re.search(f"error: {says}", capsys.readouterr().err)


def test_pictures_that_cannot_be_decoded_are_left_out_and_told(place, tmp_path, capsys):
    root = place[0]
    labels = place[2]["labels"][:8]
    for data, broken in (("sound", ()), ("spoiled", (3, 5))):
        samples = [
            {
                "__key__": f"s{i}",
                "jpg": b"broken" if i in broken else evalsets.encoded(i, "jpg"),
                "cls": f"{label}",
            }
            for i, label in enumerate(labels)
            if data == "spoiled" or i not in (3, 5)
        ]
        evalsets.write_wds(tmp_path / data / "wds_mnist_test", samples, NAMES)
        out = tmp_path / f"{data}.jsonl"
        assert main(words(tmp_path, "--out", str(out), run=root / "run", data=data)) == 0
    sound, spoiled = (lines_of(tmp_path / f"{data}.jsonl")["mnist"]["metrics"] for data in ("sound", "spoiled"))
    assert spoiled == {**sound, "left_out": 2}
    assert "MNIST: 2 pictures are left out: 2 undecodable image" in capsys.readouterr().err


def test_a_run_evaluates_the_same_sets(place, results, tmp_path):
    """With ``--eval_data_dir``: the same lines, and the main metrics among the run's own results."""
    root = place[0]
    line = ["--model", str(root / "tiny-vit.json"), "--pretrained", str(root / "run/checkpoints/epoch_3.pt")]
    line += [
        "--eval_data_dir",
        str(root / "data"),
        "--eval_tasks",
        f"cifar10,wilds/fmow,{FLICKR}",
        "--epochs",
        "0",
    ]
    line += ["--precision", "fp32", "--workers", "0", "--batch-size", "4", "--logs", str(tmp_path), "--name", "in"]
    assert training.main.main(line) == 0
    lines = lines_of(tmp_path / "in/eval_results/epoch_0_eval_results.jsonl")
    assert lines == {key: results[key] for key in ("cifar10", "wilds/fmow", FLICKR)}
    kept = (tmp_path / "in/eval_results/predictions/epoch_0").glob("*.npz")
    assert sorted(file.stem for file in kept) == sorted(key.replace("/", "-") for key in lines)
    (own,) = map(json.loads, lines_in(tmp_path / "in/eval_results.jsonl"))
    assert own["cifar10-acc1"] == results["cifar10"]["metrics"]["acc1"]
    assert own["wilds/fmow-acc_worst_region"] == results["wilds/fmow"]["metrics"]["main_metric"]
    mean = np.mean([line["metrics"]["main_metric"] for line in lines.values()])
    assert (own["datacomp-average"], own["datacomp-num_sets"]) == (pytest.approx(mean), 3)


def test_a_checkpoint_that_says_what_it_is_needs_no_name(place, results, tmp_path):
    """Whatever the run's flags or ``--model`` are called; the architecture of a trainer's checkpoint counts."""
    root = place[0]
    line = ["--model", tiny_models.path("tiny-vit", tmp_path), "--dataset-type", "synthetic", "--batch-size", "2"]
    line += ["--train-num-samples", "2", "--epochs", "1", "--warmup", "0", "--workers", "0", "--precision", "fp32"]
    line += [
        "--force-quick-gelu",
        "--image-mean",
        "0.1",
        "0.2",
        "0.3",
        "--logs",
        str(tmp_path),
        "--name",
        "trained",
    ]
    assert training.main.main(line) == 0
    alone = tmp_path / "alone.pt"
    shutil.copy(tmp_path / "trained/checkpoints/epoch_1.pt", alone)
    outs = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for file, out in zip((tmp_path / "trained", alone), outs):
        assert main(words(root, "--checkpoint", str(file), "--out", str(out), "--tasks", "cifar10")) == 0
    digests = [lines_of(out)["cifar10"]["digest"] for out in outs]
    assert digests[0] == digests[1] != results["cifar10"]["digest"]


def built_of(folder, params, context_length=16):
    """The model that is evaluated of a checkpoint that does not say what it is, in a run with these flags."""
    (folder / "checkpoints").mkdir(parents=True)
    weights = tiny_models.build("tiny-vit", text_cfg={"context_length": context_length}).state_dict()
    torch.save({"epoch": 1, "name": "run", "state_dict": weights}, folder / "checkpoints/epoch_1.pt")
    (folder / "params.txt").write_text("".join(f"{name}: {value}\n" for name, value in params.items()))
    given = parser().parse_args(["--checkpoint", str(folder), "--data_dir", str(folder), "--workers", "0"])
    chosen = program.choose(given.checkpoint, "", None)
    return weights, program.build(chosen, program.configuration(chosen, given), ALONE)


@pytest.mark.parametrize(
    "params, interpolation, resize_mode",
    [
        ({}, "bicubic", "shortest"),
        ({"pretrained": "datacompdr"}, "bilinear", "shortest"),
        ({"pretrained": "datacompdr", "image_resize_mode": "squash"}, "bilinear", "squash"),
        ({"pretrained": "datacompdr", "image_interpolation": "bicubic"}, "bicubic", "shortest"),
        ({"image_interpolation": "bilinear", "image_resize_mode": "longest"}, "bilinear", "longest"),
        ({"image_interpolation": "None", "image_resize_mode": "None"}, "bicubic", "shortest"),
    ],
)
def test_images_are_resized_as_the_run_did(tmp_path, params, interpolation, resize_mode):
    """As OpenCLIP's flags say in params.txt, else as the tag does with whose weights the run began."""
    with shrunk("MobileCLIP-S1"):
        _, built = built_of(tmp_path / "run", {"model": "MobileCLIP-S1", **params})
    assert (built.preprocess.interpolation, built.preprocess.resize_mode) == (interpolation, resize_mode)
    mean = 0.0 if "pretrained" in params else open_clip.OPENAI_DATASET_MEAN[0]
    assert built.preprocess.mean[0] == pytest.approx(mean)


def test_captions_are_as_long_as_they_were_in_the_run(tmp_path):
    """With OpenCLIP's --force-context-length: the position embeddings are taken as they are."""
    params = {"model": tiny_models.path("tiny-vit", tmp_path), "force_context_length": 24}
    weights, built = built_of(tmp_path / "run", params, context_length=24)
    assert built.context_length == 24 and built.tokenizer(["a"]).shape == (1, 24)
    assert built.description.model_cfg["text_cfg"]["context_length"] == 24
    assert torch.equal(built.module.positional_embedding, weights["positional_embedding"])


@pytest.fixture(scope="module")
def inside(place, one_thread, tmp_path_factory):
    """``--iters`` -> the folder of a run of 5 steps per epoch, evaluated after each epoch and at its end."""
    logs, sets = tmp_path_factory.mktemp("inside"), place[0] / "data"
    line = f"--model {tiny_models.path('tiny-vit', logs)} --dataset-type synthetic --train-num-samples 10"
    line += " --lr 1e-3 --batch-size 2 --epochs 4 --warmup 0 --workers 0 --precision fp32 --zeroshot-frequency 1"
    line += f" --eval_data_dir {sets} --eval_tasks cifar10 --logs {logs}"
    for iters in (3, 13):
        assert training.main.main([*line.split(), "--iters", str(iters), "--name", str(iters)]) == 0
    return {iters: logs / str(iters) for iters in (3, 13)}


def test_an_evaluation_inside_an_epoch_is_called_after_its_step(place, inside, tmp_path, capsys):
    run = inside[13]
    files = {file.name for file in (run / "eval_results").glob("*.jsonl")}
    assert files == {f"{stem}_eval_results.jsonl" for stem in ("epoch_1", "epoch_2", "step_13")}
    kept = {file.parent.name for file in (run / "eval_results/predictions").glob("*/cifar10.npz")}
    assert kept == {"epoch_1", "epoch_2", "step_13"}
    own = [json.loads(text) for text in lines_in(run / "eval_results.jsonl")]
    assert [(line["epoch"], line["step"]) for line in own] == [(1, 5), (2, 10), (2, 13)]
    digests = set()
    for stem in ("epoch_2", "step_13"):
        given = ("--checkpoint", str(run / f"checkpoints/{stem}.pt"), "--tasks", "cifar10")
        alone = tmp_path / f"{stem}.jsonl"
        assert main(words(place[0], *given, "--out", str(alone))) == 0
        assert lines_of(alone) == lines_of(run / f"eval_results/{stem}_eval_results.jsonl")
        digests.add(lines_of(alone)["cifar10"]["digest"])
        capsys.readouterr()
        assert main(words(place[0], *given)) == 0
        assert "1 of 1 sets have results of these weights already" in capsys.readouterr().err
    assert len(digests) == 2

    history = read_run(run)
    assert [history.place(line) for line in history.evaluations] == [1, 2, 2.6]
    assert (history.tasks_file, history.kept_at) == ("step_13_eval_results.jsonl", {"cifar10": "step_13"})


def test_a_complete_run_is_evaluated_where_it_ended(place, inside, tmp_path, capsys):
    """Inside an epoch too; of a run that is to go on it is the last epoch."""

    def taken(run, *more):
        given = ("--checkpoint", str(run), "--tasks", "cifar10", "--out", str(tmp_path / "o"), *more)
        code = main(words(place[0], *given))
        said = capsys.readouterr().err
        return re.findall(r"the checkpoint is .*/(\w+\.pt)\n", said) if code == 0 else said

    early, late = inside[3], inside[13]
    assert taken(early) == taken(early / "checkpoints") == ["step_3.pt"]
    assert find_checkpoint(str(early), None) == str(early / "checkpoints/step_3.pt")
    assert taken(late) == ["step_13.pt"]
    assert taken(late, "--epoch", "1") == ["epoch_1.pt"]
    for run in (early, late):
        (run / "job.done").unlink()
    assert "it has no checkpoint, checkpoints/epoch_N.pt" in taken(early)
    assert taken(late) == ["epoch_2.pt"]
