"""Exports, opened by the libraries that they are for: the embeddings are those of the model that was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file

from tests.support import tiny_models
from tests.support.building import target
from tests.support.lab import Lab
from training import export
from training.checkpoint import pt_file
from training.checkpoint.run_state import RunState
from training.main import main

CAPTIONS = ["a photo of a cat", "Two dogs, running!"]


def train(lab: Lab, folder: Path, *flags: str) -> Path:
    """A run of two steps with ``flags``; its folder."""
    words = (
        f"--train-data {lab.shards} --train-num-samples 8 --batch-size 4 --workers 0 --epochs 1 --precision fp32"
    )
    assert main([*words.split(), "--logs", str(folder), "--name", "run", *flags]) == 0
    return folder / "run"


def trained(run: Path, config: dict) -> torch.nn.Module:
    """open_clip's model of ``config`` with the weights of the run."""
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    kind = open_clip.CoCa if "multimodal_cfg" in config else kind
    model = kind(**config)
    model.load_state_dict(pt_file.read(run / "checkpoints" / "epoch_1.pt")["state_dict"])
    return model.eval()


def embed(model: torch.nn.Module, size: int, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.encode_image(images, normalize=True), model.encode_text(text, normalize=True)


def exported(run: Path, folder: Path, *flags: str) -> Path:
    assert export.main(["--checkpoint", str(run), "--out", str(folder), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def quick_run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose flags make another model than ``--model`` names."""
    flags = "--force-quick-gelu --image-mean 0.1 0.2 0.3 --image-std 0.9"
    flags += " --force-image-size 48 --force-patch-dropout 0.5"
    return train(lab, tmp_path_factory.mktemp("quick"), "--model", lab.vit, *flags.split())


def quick_config() -> dict:
    return tiny_models.config(
        "tiny-vit", quick_gelu=True, vision_cfg={"image_size": 48}, text_cfg={"width": 16, "heads": 1}
    )


def test_open_clip_opens_the_folder_to_the_same_model(quick_run, tmp_path):
    folder = exported(quick_run, tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    text = tokenizer(CAPTIONS)
    assert text.shape == (2, 16)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "all can be read by the same people"
    expected = embed(trained(quick_run, quick_config()), 48, text)
    # Without eval(): what training does to images must not be part of the exported model.
    torch.testing.assert_close(embed(model, 48, text), expected, rtol=0, atol=1e-5)
    normalize = preprocess.transforms[-1]
    assert (list(normalize.mean), list(normalize.std)) == ([0.1, 0.2, 0.3], [0.9] * 3)
    other = tiny_models.build("tiny-vit", vision_cfg={"image_size": 48}, text_cfg={"width": 16, "heads": 1}).eval()
    other.load_state_dict(model.state_dict())
    assert (embed(other, 48, text)[0] - expected[0]).abs().max() > 1e-4  # the activation matters


def client(package: str) -> Any:
    """The package, or the test is skipped: the trainer needs none of them."""
    return pytest.importorskip(package, reason=f"needs {package}: bash scripts/test_clients.sh has it")


@pytest.mark.client
def test_transformers_opens_the_folder_to_the_same_model(quick_run, tmp_path):
    transformers = client("transformers")
    folder = exported(quick_run, tmp_path / "out", "--format", "transformers")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    text = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")[
        "input_ids"
    ]
    ends = text.argmax(1) + 1  # transformers pads with the end of text, and looks at the first one
    assert [row[:end].tolist() for row, end in zip(ids, ends)] == [
        row[:end].tolist() for row, end in zip(text, ends)
    ]
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=images)
    expected = embed(trained(quick_run, quick_config()), 48, text)
    torch.testing.assert_close((found.image_embeds, found.text_embeds), expected, rtol=0, atol=1e-5)


@pytest.mark.client
def test_onnxruntime_computes_the_same_for_any_number_of_samples(quick_run, tmp_path):
    for package in ("onnx", "onnxscript"):
        client(package)
    onnxruntime = client("onnxruntime")
    folder = exported(quick_run, tmp_path / "out", "--format", "onnx")
    model = trained(quick_run, quick_config())
    for n in (1, 3):
        images = torch.rand(n, 3, 48, 48, generator=torch.Generator().manual_seed(n))
        text = open_clip.SimpleTokenizer(context_length=16)(["a photo of a cat", "Two dogs", "three, four"][:n])
        with torch.no_grad():
            expected = model.encode_image(images, normalize=True), model.encode_text(text, normalize=True)
        graphs = {"image": {"pixel_values": images.numpy()}, "text": {"input_ids": text.numpy()}}
        for (name, given), wanted in zip(graphs.items(), expected):
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            (found,) = session.run(None, given)
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)


@pytest.mark.client
def test_a_text_tower_of_transformers_is_trained_and_exported(lab, tmp_path, capsys, caplog):
    """Its config and tokenizer are in a folder here; usually they are named by a repository of the hub."""
    transformers = client("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "two", "dogs", ",", "!"]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(bert / "vocab.txt")).save_pretrained(bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    config = tiny_models.config("tiny-vit") | {
        "text_cfg": {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "context_length": 12}
        | {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler"}
    }
    (tmp_path / "tiny-bert.json").write_text(json.dumps(config))

    run = train(lab, tmp_path, "--model", str(tmp_path / "tiny-bert.json"))
    folder = exported(run, tmp_path / "out")
    assert f"hf_model_name {bert}, a folder of this machine" in caplog.text
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    text = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    ids = transformers.AutoTokenizer.from_pretrained(bert)(
        CAPTIONS, padding="max_length", max_length=12, return_tensors="pt"
    )
    assert torch.equal(text, ids["input_ids"])
    expected = embed(trained(run, config | {"custom_text": True}), 32, text)
    torch.testing.assert_close(embed(model.eval(), 32, text), expected, rtol=0, atol=1e-5)
    assert "CLIPModel has no text_cfg.hf_model_name" in refused(
        capsys, "--checkpoint", run, "--out", tmp_path / "other", "--format", "transformers"
    )


def test_timm_opens_the_image_tower(quick_run, tmp_path):
    folder = exported(quick_run, tmp_path / "out", "--format", "timm")
    tower = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    text = torch.zeros(2, 16, dtype=torch.int64)
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = torch.nn.functional.normalize(tower(images), dim=-1)
    torch.testing.assert_close(found, embed(trained(quick_run, quick_config()), 48, text)[0], rtol=0, atol=1e-5)
    assert timm.data.resolve_model_data_config(tower)["mean"] == [0.1, 0.2, 0.3]


def test_timm_opens_one_of_its_own_towers(lab, tmp_path):
    run = train(lab, tmp_path, "--model", lab.resnet)
    folder = exported(run, tmp_path / "out", "--format", "timm")
    tower = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    model = trained(run, tiny_models.config("tiny-resnet", text_cfg={"width": 16, "heads": 1}))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = tower(images), model.encode_image(images, normalize=True)
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_are_written_in_the_precision_that_is_asked_for(quick_run, tmp_path, precision):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    folder = exported(quick_run, tmp_path / "out", "--precision", precision, "--format", "safetensors")
    written = load_file(folder / "model.safetensors")
    state = pt_file.read(quick_run / "checkpoints" / "epoch_1.pt")["state_dict"]
    assert written.keys() == state.keys()
    for name, tensor in written.items():
        expected = state[name] if name == "logit_scale" else state[name].to(dtype)
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ("--siglip", {"init_logit_bias": 0.0}),
        ("--force-custom-text", {"custom_text": True}),
    ],
)
def test_open_clip_opens_other_forms_of_model(lab, tmp_path, flags, changes):
    run = train(lab, tmp_path, "--model", lab.vit, *flags.split())
    folder = exported(run, tmp_path / "out")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = tiny_models.config("tiny-vit", text_cfg={"width": 16, "heads": 1}, **changes)
    text = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    torch.testing.assert_close(embed(model, 32, text), embed(trained(run, config), 32, text), rtol=0, atol=1e-5)


def test_open_clip_opens_a_coca(lab, tmp_path):
    built = target("--model", lab.coca)
    file = tmp_path / "epoch_1.pt"
    pt_file.write(file, RunState("run", built.module, epoch=1, description=built.description).held())
    folder = exported(file, tmp_path / "out")
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    text = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    built.module.eval()
    torch.testing.assert_close(embed(model.eval(), 32, text), embed(built.module, 32, text), rtol=0, atol=1e-5)


def test_the_card_says_how_the_model_was_trained_and_nothing_of_the_machine(lab, quick_run, tmp_path):
    (quick_run / "eval_results.jsonl").write_text(
        '{"epoch": 1, "step": 2, "imagenet-zeroshot-val-top1": 0.25}\n{"epoch": 0, "step": 0, "old": 0.5}\n{"cut'
    )
    (quick_run / "eval_results").mkdir()
    (quick_run / "eval_results" / "epoch_1_eval_results.jsonl").write_text(
        '{"key": "cifar10", "dataset": "CIFAR-10", "metrics": {"acc1": 0.5, "main_metric": 0.5}}\n'
    )
    card = (exported(quick_run, tmp_path / "out", "--license", "mit") / "README.md").read_text()
    assert "\nlicense: mit\n" in card and "library_name: open_clip" in card
    for row in (
        "| --force-image-size | 48 |",
        "| --train-num-samples | 8 |",
        "| samples seen | 8 |",
        "| imagenet-zeroshot-val-top1 | 0.2500 |",
        "| CIFAR-10 | 0.5000 |",
    ):
        assert row in card, card
    assert (
        str(lab.root) not in card
        and str(quick_run) not in card
        and "| old |" not in card
        and "--distill_teacher" not in card
    )


# Refusals


def refused(capsys, *flags: object) -> str:
    capsys.readouterr()
    assert export.main(list(map(str, flags))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_a_folder_that_is_not_empty_is_left_alone(quick_run, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty" in refused(capsys, "--checkpoint", quick_run, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--checkpoint @/nothing", "--checkpoint .*nothing: there is no such file or folder"),
        ("--checkpoint @run --epoch 7", r"--epoch 7: .* has no epoch_7.pt; it holds epoch_1.pt"),
        ("--checkpoint @run/checkpoints/epoch_1.pt --epoch 1", "--epoch 1 .* is one file: leave it out"),
        (
            "--checkpoint ViT-B-32:no_such",
            "--checkpoint ViT-B-32:no_such: there is no such file, and ViT-B-32 has the tags openai, ",
        ),
        ("--checkpoint ViT-B-32:openai --model RN50", "both name a model"),
        ("--checkpoint @bare", "--checkpoint .*: the file does not say .* --model NAME"),
        ("--checkpoint @bare --model @resnet", "do not fit the model"),
        ("--checkpoint @run --license a/b", "--license a/b: give an identifier"),
        ("--checkpoint @run --model RN50", "--model RN50: checkpoint .* another --model, tiny-vit"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(lab, quick_run, tmp_path, capsys, given, message):
    files = {"@run": str(quick_run), "@bare": lab.weights, "@resnet": lab.resnet, "@": str(tmp_path)}
    for name, file in files.items():
        given = given.replace(name, file)
    assert re.search(message, refused(capsys, *given.split(), "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_files_of_others_are_exported_with_their_name(lab, tmp_path):
    folder = exported(lab.weights, tmp_path / "out", "--model", lab.vit)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    for name, tensor in torch.load(lab.weights).items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("resnet", "transformers", "CLIPModel has no vision_cfg.timm_model_name"),
        ("coca", "transformers", "a CoCa; --format hf is for it"),
        ("siglip", "transformers", "no logit_bias"),
    ],
)
def test_a_format_without_such_a_model_is_refused(lab, tmp_path, capsys, model, kind, message):
    flags = ["--model", lab.vit, "--siglip"] if model == "siglip" else ["--model", lab.path(model)]
    built = target(*flags)
    file = tmp_path / "epoch_1.pt"
    pt_file.write(file, RunState("run", built.module, epoch=1, description=built.description).held())
    error = refused(capsys, "--checkpoint", file, "--out", tmp_path / "out", "--format", kind)
    assert f"--format {kind}: " in error and message in error
    assert not (tmp_path / "out").exists()
