"""Weights that others have written become those of the model, or a sentence says why they cannot."""

from __future__ import annotations

import json
import logging
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support import tiny_models
from tests.support.building import close, reference, same_weights, shrunk, target
from training.models import pretrained
from training.models.weights import declared_at, files_of, load

Weights = dict[str, Tensor]
SMALL = {"vocab_size": 512}  # smaller still, as no text is read here


def build(**changes) -> nn.Module:
    return tiny_models.build("tiny-vit", text_cfg=SMALL, **changes)


def loaded(file: Path, **changes) -> nn.Module:
    """A model with the weights in ``file``."""
    model = build(**changes)
    load(model, str(file), f"--pretrained {file}", "--model tiny-vit")
    return model


@torch.no_grad()
def image(module: nn.Module) -> Tensor:
    """The embeddings of three images."""
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return module.eval().encode_image(pixels, normalize=True)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    return build(seed=7)


@pytest.fixture(scope="module")
def weights(source) -> Weights:
    return {name: value.detach().clone().contiguous() for name, value in source.state_dict().items()}


@pytest.fixture
def vit(tmp_path) -> str:
    return tiny_models.path("tiny-vit", tmp_path / "vit", text_cfg=SMALL)


def under(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def zeros(weights: Weights) -> Weights:
    return {name: torch.zeros_like(value) for name, value in weights.items()}


# Where trainers keep the weights

LAYOUTS = {
    "bare": lambda w: w,
    "ordered": lambda w: OrderedDict(w),
    "openclip": lambda w: {"epoch": 3, "name": "x", "state_dict": under("module.", w), "optimizer": {"state": {}}},
    "compiled": lambda w: {"state_dict": under("module._orig_mod.", w)},
    "sharded by fsdp": lambda w: {"state_dict": under("_fsdp_wrapped_module.", w)},
    "model": lambda w: {"model": w, "epoch": 3},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "loss": 0.1},
    "deepspeed": lambda w: {"module": w, "ds_config": {}, "optimizer": None},
    "lightning": lambda w: {"state_dict": under("model.", w), "pytorch-lightning_version": "2.1", "epoch": 3},
    "lightning with a loss": lambda w: {"state_dict": {**under("clip.", w), "loss.scale": torch.ones(1)}},
    "average alone": lambda w: {"model_ema": w, "epoch": 3},
    "average of torch": lambda w: {"n_averaged": torch.tensor(5), **under("module.", w)},
    "average, nested": lambda w: {"ema": {"module": w, "decay": 0.99, "updates": 7}},
    "average by another name": lambda w: {"epoch": 3, "avg_model": w},
    "an entry that nobody knows": lambda w: {"clip": w, "epoch": 3, "optimizer": {"state": {}}},
    "average beside": lambda w: {"state_dict_ema": zeros(w), "state_dict": w},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_wherever_a_trainer_keeps_them(source, weights, tmp_path, layout):
    torch.save(LAYOUTS[layout](weights), tmp_path / "x.pt")
    assert same_weights(loaded(tmp_path / "x.pt"), source)


def test_the_log_says_which_weights_were_taken_where_there_is_an_average(weights, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save({"state_dict_ema": zeros(weights), "state_dict": weights}, tmp_path / "x.pt")
    loaded(tmp_path / "x.pt")
    assert "those of 'state_dict'; it has an average over the steps too, 'state_dict_ema'" in caplog.text
    torch.save({"model_ema": weights}, tmp_path / "x.pt")
    loaded(tmp_path / "x.pt")
    assert "those of 'model_ema', an average over the steps; it has no others" in caplog.text


@pytest.mark.parametrize("version", ["one number", "a vector"])
def test_temperatures_of_all_versions_of_open_clip(source, weights, tmp_path, version):
    shape = () if version == "one number" else (1,)
    torch.save({**weights, "logit_scale": weights["logit_scale"].reshape(shape)}, tmp_path / "x.pt")
    assert same_weights(loaded(tmp_path / "x.pt"), source)


def test_half_precision_becomes_that_of_the_model(weights, tmp_path):
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "x.pt")
    found = loaded(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(found[name], value.half().float()) for name, value in weights.items())


def test_custom_text_and_plain_names_are_one_model(vit, weights, tmp_path):
    custom = tiny_models.path("tiny-vit", tmp_path / "custom", custom_text=True, text_cfg=SMALL)
    torch.save(weights, tmp_path / "plain.pt")
    loaded = target("--model", custom, "--pretrained", tmp_path / "plain.pt").module
    assert "text.token_embedding.weight" in loaded.state_dict()
    assert torch.equal(loaded.state_dict()["text.text_projection"], weights["text_projection"])
    torch.save(loaded.state_dict(), tmp_path / "custom.pt")
    back = target("--model", vit, "--pretrained", tmp_path / "custom.pt").module.state_dict()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_the_bias_of_the_sigmoid_loss_comes_and_goes(vit, weights, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save({**weights, "logit_bias": torch.tensor(-10.0)}, tmp_path / "x.pt")
    assert target("--model", vit, "--pretrained", tmp_path / "x.pt").module.logit_bias is None
    assert "its logit_bias is left out" in caplog.text
    siglip = target("--model", vit, "--pretrained", tmp_path / "x.pt", "--siglip").module
    assert siglip.logit_bias.item() == -10
    torch.save(weights, tmp_path / "x.pt")  # open_clip begins at 0 with weights that have none
    assert target("--model", vit, "--pretrained", tmp_path / "x.pt", "--siglip").module.logit_bias.item() == 0


# OpenAI's files


class Node(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def write_script(file: Path, weights: Weights) -> None:
    """A TorchScript archive with these tensors, nested as their names say, as OpenAI's files are."""
    root = Node()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = node.get_submodule(part)
        if value.is_floating_point():
            node.register_parameter(leaf, nn.Parameter(value.clone()))
        else:
            node.register_buffer(leaf, value.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(root).save(file)


def as_openais(weights: Weights) -> Weights:
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 512}
    halves = {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}
    return halves | {name: torch.tensor(size) for name, size in sizes.items()}


def test_openais_torchscript_is_read_and_brings_quick_gelu(vit, source, weights, tmp_path):
    write_script(tmp_path / "ViT-B-32.pt", as_openais(weights))
    built = target("--model", vit, "--pretrained", tmp_path / "ViT-B-32.pt").module
    loaded = built.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[n], v.half().float() if v.ndim > 1 else v) for n, v in weights.items())
    quick = build(quick_gelu=True)
    quick.load_state_dict(loaded)
    assert close(image(built), image(quick))
    assert not close(image(built), image(source))


def test_torchscript_of_other_models_is_read_without_quick_gelu(source, weights, tmp_path):
    write_script(tmp_path / "x.pt", weights)
    built = loaded(tmp_path / "x.pt")
    assert same_weights(built, source) and close(image(built), image(source))


def test_openais_weights_in_another_format_are_noticed_by_their_sizes(vit, weights, tmp_path, caplog):
    torch.save(as_openais(weights), tmp_path / "x.pt")
    target("--model", vit, "--pretrained", tmp_path / "x.pt")
    assert "OpenAI's by their names" in caplog.text and "--force-quick-gelu" in caplog.text
    caplog.clear()
    target("--model", vit, "--pretrained", tmp_path / "x.pt", "--force-quick-gelu")
    assert "OpenAI's" not in caplog.text


# Files of Hugging Face


def write_parts(folder: Path, weights: Weights, kind: str = "safetensors") -> Path:
    """A model divided among two files, with the list of them."""
    folder.mkdir()
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    files = [f"{stem}-0000{i}-of-00002.{kind}" for i in (1, 2)]
    names = list(weights)
    shares = dict(zip(files, (names[:9], names[9:]), strict=True))
    for file, share in shares.items():
        held = {name: weights[name] for name in share}
        save_file(held, folder / file) if kind == "safetensors" else torch.save(held, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, share in shares.items() for name in share}}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder / f"{stem}.{kind}.index.json"


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_in_parts_is_read_by_its_folder_or_its_list(vit, source, weights, tmp_path, kind):
    index = write_parts(tmp_path / "m", weights, kind)
    for given in (index, tmp_path / "m"):
        assert same_weights(target("--model", vit, "--pretrained", given).module, source)
    names = {"--ref_model": vit, "--ref_model_checkpoint": index}
    flags = [word for pair in names.items() for word in pair]
    assert same_weights(reference(tmp_path, *flags).module, source)


def test_a_part_that_is_missing_or_spoiled_or_given_alone(vit, weights, tmp_path):
    index = write_parts(tmp_path / "m", weights)
    second = tmp_path / "m/model-00002-of-00002.safetensors"
    with pytest.raises(ValueError, match=r"is part 2 of 2: give its folder, or the \.index\.json there"):
        target("--model", vit, "--pretrained", second)
    second.write_bytes(second.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00002.safetensors, one of the 2 parts .*: it is cut short"
    ):
        target("--model", vit, "--pretrained", index)
    second.unlink()
    with pytest.raises(ValueError, match=r"its model.safetensors.index.json: model-00002-of-00002.* is missing"):
        target("--model", vit, "--pretrained", tmp_path / "m")


def test_the_list_of_parts_reads_no_other_folder(weights, tmp_path):
    index = write_parts(tmp_path / "m", weights)
    held = json.loads(index.read_text())
    save_file(weights, tmp_path / "other.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(held["weight_map"], "../other.safetensors")}))
    with pytest.raises(ValueError, match=r"other\.safetensors, one of the 1 parts .* is missing"):
        files_of(index)


def test_a_folder_brings_its_config(vit, source, weights, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"this folder has no weights, such as open_clip_model.safetensors"):
        target("--model", vit, "--pretrained", folder)
    save_file(weights, folder / "open_clip_model.safetensors")
    settings = {
        "model_cfg": {**tiny_models.CONFIGS["tiny-vit"], "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    built = target("--model", vit, "--pretrained", folder)
    assert same_weights(built.module, source) and tuple(built.preprocess.mean) == (0.1, 0.1, 0.1)
    assert not close(image(built.module), image(source))  # QuickGELU


def test_a_file_out_of_such_a_folder_says_what_it_leaves_behind(weights, tmp_path, caplog):
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    settings = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    loaded(tmp_path / "open_clip_model.safetensors")
    assert "says mean [0.5, 0.5, 0.5], quick_gelu True, which a file alone does not bring" in caplog.text


def test_folders_that_leave_a_choice(vit, weights, tmp_path):
    for name in ("epoch_1.pt", "epoch_2.pt"):
        torch.save(weights, tmp_path / name)
    with pytest.raises(ValueError, match=r"several files of weights \(epoch_1.pt, epoch_2.pt\): give one of them"):
        target("--model", vit, "--pretrained", tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "run/checkpoints/epoch_3.pt")
    with pytest.raises(ValueError, match=r"the folder of a run: give a file in it, such as .*epoch_3.pt"):
        target("--model", vit, "--pretrained", tmp_path / "run")


def as_transformers(weights: Weights) -> Weights:
    """The weights as transformers' ``CLIPModel`` has them (compared with those of version 5.24)."""
    names = {
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
    }
    parts = [
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
        ("visual.transformer.resblocks", "vision_model.encoder.layers"),
        ("transformer.resblocks", "text_model.encoder.layers"),
        ("attn.out_proj", "self_attn.out_proj"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ]
    found = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    for name, value in weights.items():
        theirs = names.get(name, name)
        for ours, their in parts if theirs == name else ():
            theirs = theirs.replace(ours, their)
        if "attn.in_proj_" in theirs:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                found[theirs.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = third.clone()
        else:
            found[theirs] = value.T.contiguous() if theirs.endswith("projection.weight") else value
    return found


def transformers_folder(folder: Path, weights: Weights, activation: str) -> Path:
    write_parts(folder, as_transformers(weights))
    tower = {"hidden_act": activation}
    config = {"model_type": "clip", "text_config": tower, "vision_config": tower}
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_clip_model_of_transformers_is_the_same_model(vit, source, weights, tmp_path, activation):
    folder = transformers_folder(tmp_path / "m", weights, activation)
    built = target("--model", vit, "--pretrained", folder)
    assert same_weights(built.module, source)
    assert close(image(built.module), image(source)) == (activation == "gelu")
    pixels = built.preprocess
    assert (pixels.mean, pixels.std, pixels.interpolation) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear")


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_a_folder_of_a_model_with_gelu_turns_quick_gelu_off(source, weights, tmp_path, form, caplog):
    if form == "open_clip":
        folder = tmp_path / "m"
        folder.mkdir()
        save_file(weights, folder / "open_clip_model.safetensors")
        settings = {"model_cfg": tiny_models.CONFIGS["tiny-vit"]}  # which leaves quick_gelu at open_clip's False
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
        file = folder / "open_clip_model.safetensors"
    else:
        folder = transformers_folder(tmp_path / "m", weights, "gelu")
        file = folder / "model.safetensors.index.json"
    quick = tiny_models.path("tiny-vit", tmp_path / "quick", text_cfg=SMALL, quick_gelu=True)
    built = target("--model", quick, "--pretrained", folder)
    assert same_weights(built.module, source) and close(image(built.module), image(source))
    assert not built.description.model_cfg["quick_gelu"]
    assert f"--model {quick}: built as {folder} says: quick_gelu False, not True" in caplog.text
    forced = target("--model", quick, "--pretrained", folder, "--force-quick-gelu")
    assert not close(image(forced.module), image(source)) and forced.description.model_cfg["quick_gelu"]
    caplog.clear()
    alone = target("--model", quick, "--pretrained", file)
    assert not close(image(alone.module), image(source))
    assert "quick_gelu False" in caplog.text and "which a file alone does not bring" in caplog.text


def test_an_activation_that_open_clip_does_not_have_says_nothing_of_quick_gelu(weights, tmp_path):
    folder = transformers_folder(tmp_path / "m", weights, "gelu_new")
    assert "quick_gelu" not in declared_at(folder)


def test_weights_of_transformers_without_their_config(vit, source, weights, tmp_path, caplog):
    torch.save({"state_dict": under("clip.", as_transformers(weights))}, tmp_path / "x.pt")
    assert same_weights(target("--model", vit, "--pretrained", tmp_path / "x.pt").module, source)
    assert "QuickGELU unless their config.json says another hidden_act" in caplog.text
    caplog.clear()
    target("--model", vit, "--pretrained", tmp_path / "x.pt", "--force-quick-gelu")
    assert "QuickGELU" not in caplog.text.replace("--force-quick-gelu", "")
    folder = transformers_folder(tmp_path / "m", weights, "quick_gelu")
    target("--model", vit, "--pretrained", folder / "model.safetensors.index.json")
    assert "config.json beside the file says quick_gelu True, mean (0.1, 0.2, 0.3)" in caplog.text


def test_weights_of_transformers_with_a_part_missing(weights, tmp_path):
    held = as_transformers(weights)
    del held["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"they lack transformer.resblocks.0.attn.in_proj_weight"):
        loaded(tmp_path / "x.pt")


# Other sizes


def longer(folder: Path, context_length: int) -> str:
    text = {**SMALL, "context_length": context_length}
    return tiny_models.path("tiny-vit", folder / str(context_length), text_cfg=text)


@pytest.mark.parametrize("context_length", [8, 24])
@pytest.mark.parametrize("form", ["torch", "torchscript", "parts"])
def test_another_context_length_is_interpolated_as_open_clip_does(weights, tmp_path, context_length, form, caplog):
    caplog.set_level(logging.INFO)
    torch.save(weights, tmp_path / "x.pt")
    given = tmp_path / "x.pt"
    if form == "torchscript":
        given = tmp_path / "script.pt"
        write_script(given, weights)
    elif form == "parts":
        given = write_parts(tmp_path / "m", weights)
    model = longer(tmp_path, context_length)
    built = target("--model", model, "--pretrained", given)
    assert f"of its texts, [16, 64], are interpolated to [{context_length}, 64]" in caplog.text
    name = pretrained.open_clip_name(model, "--model")
    assert same_weights(built.module, open_clip.create_model(name, pretrained=str(tmp_path / "x.pt")))


@pytest.mark.parametrize("size", [(48,), (32, 64)])
def test_another_image_size_is_interpolated_as_open_clip_does(vit, weights, tmp_path, size):
    torch.save(weights, tmp_path / "x.pt")
    write_script(tmp_path / "script.pt", weights)
    built = target("--model", vit, "--pretrained", tmp_path / "script.pt", "--force-image-size", *size)
    name = pretrained.open_clip_name(vit, "--model")
    theirs = open_clip.create_model(
        name, pretrained=str(tmp_path / "x.pt"), force_image_size=size[0] if len(size) == 1 else size
    )
    assert same_weights(built.module, theirs)


def test_a_resnets_positions_are_interpolated_too(tmp_path):
    """open_clip does not. What is the same at every place stays so, beside the first, which has no place."""
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    small = tiny_models.config("tiny-vit", text_cfg=SMALL) | {"vision_cfg": vision}
    model = open_clip.CLIP(**small, output_dict=True)
    table = model.visual.attnpool.positional_embedding  # [1 + 2 x 2, width]
    with torch.no_grad():
        table[1:] = table[1]
    torch.save(model.state_dict(), tmp_path / "x.pt")
    large = open_clip.CLIP(**(small | {"vision_cfg": vision | {"image_size": 128}}), output_dict=True)
    load(large, str(tmp_path / "x.pt"), "--pretrained x.pt", "--model r")
    found = large.visual.attnpool.positional_embedding
    assert len(found) == 17
    torch.testing.assert_close(found[0], table[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1:], table[1].expand(16, -1), rtol=1e-5, atol=1e-6)


# What does not fit


@pytest.mark.parametrize(
    "held, said",
    [
        ({"optimizer": {"state": {}}, "epoch": 3}, "a state_dict nor bare weights; its entries are 'epoch'"),
        ({}, "its entries are none"),
        ([torch.ones(2, 2)], "holds a list, not a dict of weights"),
        (torch.ones(2, 2), "holds a Tensor, not a dict of weights"),
        ({"conv1.weight": torch.ones(2, 2), "layer1.0.w": torch.ones(2, 2)}, "they are of an image tower alone"),
        ({"encoder.w": torch.ones(2, 2)}, "none of their names is one of the model's"),
        ({"vision_model.head.probe": torch.ones(2, 2), "text_model.head.w": torch.ones(2, 2)}, "transformers"),
    ],
)  # fmt: skip
def test_what_is_no_model_of_this_kind_is_named(tmp_path, held, said):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"^--pretrained .*x\.pt: ") as refused:
        loaded(tmp_path / "x.pt")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_two_models_in_one_file_are_a_choice_for_the_user(weights, tmp_path):
    torch.save({"student": weights, "teacher": weights}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds weights under student and teacher; save those of one of them"):
        loaded(tmp_path / "x.pt")
    torch.save({**under("student.", weights), **under("teacher.", weights)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds several models, under student and teacher"):
        loaded(tmp_path / "x.pt")


@pytest.mark.parametrize("names", ["student first", "teacher first", "custom text"])
def test_a_whole_model_with_another_inside_is_a_choice_too(source, weights, tmp_path, names):
    """A teacher or an average that is a submodule is not taken for the model itself."""
    outer = convert_to_custom_text_state_dict(weights) if names == "custom text" else weights
    both = [outer, under("teacher.", zeros(weights))]
    first, second = reversed(both) if names == "teacher first" else both
    torch.save({"state_dict": first | second}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds several models, under no prefix and teacher; save the weights"):
        loaded(tmp_path / "x.pt")
    torch.save(outer, tmp_path / "x.pt")
    assert same_weights(loaded(tmp_path / "x.pt"), source)


@pytest.mark.parametrize("outer", ["open_clip", "transformers"])
def test_a_teacher_of_transformers_does_not_become_the_model(weights, tmp_path, outer):
    model = weights if outer == "open_clip" else as_transformers(weights)
    torch.save(under("teacher.", as_transformers(zeros(weights))) | model, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"they have in addition teacher\."):
        loaded(tmp_path / "x.pt")


def test_a_deep_text_tower_is_no_whole_model(tmp_path):
    deep = {"text_cfg": SMALL | {"layers": 6}}
    plain = tiny_models.build("tiny-vit", seed=7, **deep)
    custom = convert_to_custom_text_state_dict(plain.state_dict())
    assert sum(name.startswith("text.") for name in custom) > len(custom) / 2
    torch.save(custom, tmp_path / "custom.pt")
    back = tiny_models.build("tiny-vit", **deep)
    load(back, str(tmp_path / "custom.pt"), "--pretrained custom.pt", "--model tiny-vit")
    assert same_weights(back, plain)


def test_weights_of_a_known_model_name_it(tmp_path):
    with torch.device("meta"):
        large = open_clip.create_model("ViT-B-16", load_weights=False, device="meta")
    held = {name: torch.zeros(()).expand(value.shape) for name, value in large.state_dict().items()}
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"size mismatch: .*; give --model ViT-B-16\b"):
        loaded(tmp_path / "x.pt")


def test_a_file_cut_where_only_its_reader_can_see_it(weights, tmp_path):
    torch.save(weights, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.pt: cannot be read \(it is cut short .*get the file again\)$"):
        loaded(tmp_path / "x.pt")


def test_arrays_for_another_model_and_of_objects(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(
        ValueError, match=r"a \.npz is read as big_vision's SigLIP, for .* --model ViT-B-16-SigLIP"
    ):
        loaded(tmp_path / "x.npz")


@shrunk("ViT-B-32")
def test_a_wrong_tag_and_a_missing_file_are_known_before_a_model_is_built(tmp_path):
    with pytest.raises(
        ValueError, match=r"--pretrained laion3b: for --model ViT-B-32 .*neither a file nor one of"
    ):
        pretrained.look("ViT-B-32", "laion3b", "--pretrained", "--model")
