"""Models and weights are found by name, config file, weight file and tag; what tags declare is built."""

from __future__ import annotations

import json
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support import tiny_models
from tests.support.building import close, embed, reference, same_weights, shrunk, target
from tests.support.ranks import ranks
from training.models import pretrained


@pytest.fixture
def vit(tmp_path) -> str:
    return tiny_models.path("tiny-vit", tmp_path)


# Names and config files


def test_config_files_of_one_name_are_two_models(tmp_path):
    first = tiny_models.path("tiny-vit", tmp_path / "a")
    second = tiny_models.path("tiny-vit", tmp_path / "b", embed_dim=8)
    assert target("--model", first).module.text_projection.shape[1] == 32
    assert target("--model", second).module.text_projection.shape[1] == 8
    assert target("--model", first).module.text_projection.shape[1] == 32


def test_config_file_called_like_a_built_in_model_stays_apart_from_it(tmp_path):
    before = open_clip.get_model_config("ViT-B-32")
    path = tmp_path / "ViT-B-32.json"
    path.write_text(json.dumps(tiny_models.CONFIGS["tiny-vit"]))
    assert target("--model", path).module.visual.image_size == (32, 32)
    assert open_clip.get_model_config("ViT-B-32") == before
    # The tags of the built-in model do not apply to it either.
    name = pretrained.open_clip_name(str(path), "--model")
    with pytest.raises(ValueError, match=r"--pretrained openai.* neither a file nor a tag \(it has none\)"):
        pretrained.find(name, "openai", "--pretrained", "--model")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-23", r"--model ViT-B-23: .*did you mean .*ViT-B-32"),
        ("nowhere.json", r"--model nowhere.json: .*cannot be read"),
    ],
)
def test_models_that_do_not_exist_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        pretrained.open_clip_name(model, "--model")


def test_json_that_is_not_a_model_config_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"embed_dim": 8}')
    with pytest.raises(
        ValueError, match=r"other.json: this is not an open_clip model config, it has no text_cfg, vision_cfg"
    ):
        pretrained.open_clip_name(str(path), "--model")
    assert "other" not in "".join(open_clip.list_models())


# Weights from files


def test_published_checkpoint_with_prefixes_and_numpy_scalars(vit, tmp_path):
    source = tiny_models.build("tiny-vit", seed=7)
    file = tmp_path / "epoch_3.pt"
    state = {f"module._orig_mod.{k}": v for k, v in source.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "best": np.float64(0.5)}, file)
    built = target("--model", vit, "--pretrained", file)
    assert same_weights(built.module, source)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_of_another_resolution_are_resized_as_open_clip_does(vit, tmp_path, kind):
    source, file = tiny_models.build("tiny-vit", seed=7), str(tmp_path / f"weights.{kind}")
    if kind == "pt":
        torch.save(source.state_dict(), file)
    else:
        save_file({k: v.contiguous() for k, v in source.state_dict().items()}, file)
    built = target("--model", vit, "--pretrained", file, "--force-image-size", 48)
    assert built.preprocess.size == (48, 48)
    name = pretrained.open_clip_name(vit, "--model")
    assert same_weights(built.module, open_clip.create_model(name, pretrained=file, force_image_size=48))


def test_timm_tower_is_resized_after_its_weights_are_loaded(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 160}
    model = tiny_models.path("tiny-resnet", tmp_path, vision_cfg=vision)
    torch.save(target("--model", model).module.state_dict(), tmp_path / "weights.pt")
    built = target("--model", model, "--pretrained", tmp_path / "weights.pt", "--force-image-size", 96)
    assert built.preprocess.size == (96, 96)
    name = pretrained.open_clip_name(model, "--model")
    theirs = open_clip.create_model(name, pretrained=str(tmp_path / "weights.pt"), force_image_size=96)
    assert same_weights(built.module, theirs)
    for ours, expected in zip(embed(built.module, 96), embed(theirs, 96), strict=True):
        assert close(ours, expected)


def test_weights_of_another_model_are_refused_by_flag_and_file(vit, tmp_path):
    file = tmp_path / "other.pt"
    torch.save(tiny_models.build("tiny-vit", embed_dim=8).state_dict(), file)
    with pytest.raises(
        ValueError, match=r"--pretrained .*other.pt: these weights do not fit the model .*size mismatch"
    ):
        target("--model", vit, "--pretrained", file)


def test_folder_in_open_clips_format_brings_architecture_weights_and_normalization(tmp_path):
    folder, source = tmp_path / "model", tiny_models.build("tiny-vit", seed=7)
    folder.mkdir()
    settings = {"model_cfg": tiny_models.CONFIGS["tiny-vit"], "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"--model local-dir:.*weights.* could not be loaded"):
        target("--model", f"local-dir:{folder}")
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, folder / "open_clip_model.safetensors")
    built = target("--model", f"local-dir:{folder}")
    assert same_weights(built.module, source)
    assert tuple(built.preprocess.mean) == (0.1, 0.2, 0.3) and built.context_length == 16
    other = tiny_models.build("tiny-vit", seed=8)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    built = target("--model", f"local-dir:{folder}", "--pretrained", tmp_path / "other.pt")
    assert same_weights(built.module, other) and tuple(built.preprocess.mean) == (0.1, 0.2, 0.3)


def test_a_hub_model_that_cannot_be_loaded_is_reported_in_one_sentence(hub):
    with pytest.raises(
        ValueError, match=r"--model hf-hub:nobody/nothing: its open_clip_config.json cannot be loaded"
    ):
        target("--model", "hf-hub:nobody/nothing")


# Weights from tags


class Cache:
    """A Hugging Face cache in a folder, without a network."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(self, model: str, tag: str, module: nn.Module) -> None:
        repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
        put(self.folder, repository, module.state_dict())


def put(cache: Path, repository: str, state: dict[str, torch.Tensor]) -> Path:
    """Store ``state`` in ``cache`` as the hub's client does. Returns the file."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123")
    file = snapshot / "open_clip_model.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    return file


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Cache:
    return Cache(tmp_path / "hub", monkeypatch)


@shrunk("ViT-B-32")
def test_tag_that_declares_quick_gelu_is_built_with_it(tmp_path, hub):
    """ViT-B-32 with the tag openai is the reference of the headline recipe; its config says GELU."""
    source = tiny_models.build("tiny-vit", seed=7)
    hub.put("ViT-B-32", "openai", source)
    built = reference(tmp_path, "--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai")
    quick = tiny_models.build("tiny-vit", seed=0, quick_gelu=True)
    quick.load_state_dict(source.state_dict())
    for ours, with_quick_gelu, with_gelu in zip(embed(built.module), embed(quick), embed(source), strict=True):
        assert close(ours, with_quick_gelu)
        assert (ours - with_gelu).abs().max() > 1e-4
    as_target = target("--model", "ViT-B-32", "--pretrained", "openai")
    assert close(embed(as_target.module)[0], embed(quick)[0])
    # A tag that does not declare it is built as the config says.
    hub.put("ViT-B-32", "laion2b_s34b_b79k", source)
    plain = target("--model", "ViT-B-32", "--pretrained", "laion2b_s34b_b79k")
    assert close(embed(plain.module)[0], embed(source)[0])


@shrunk("ViT-L-14-CLIPA")
def test_tag_decides_normalization_and_interpolation_and_flags_override_it(tmp_path, hub):
    hub.put("ViT-L-14-CLIPA", "datacomp1b", tiny_models.build("tiny-vit"))
    tag = open_clip.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b")
    built = target("--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b").preprocess
    assert (built.mean, built.std) == (tag["mean"], tag["std"]) == (open_clip.constants.IMAGENET_MEAN, tag["std"])
    assert (built.interpolation, built.resize_mode) == ("bilinear", "squash")
    forced = target(
        "--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b", "--image-mean", 0.1, 0.2, 0.3
    ).preprocess
    assert (forced.mean, forced.std, forced.interpolation) == ((0.1, 0.2, 0.3), tag["std"], "bilinear")


@shrunk("ViT-B-32")
def test_checkpoint_beside_a_tag_brings_the_weights_and_the_tag_the_architecture(tmp_path, hub):
    source = tiny_models.build("tiny-vit", seed=9)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "epoch_1.pt")
    flags = ["--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai"]
    built = reference(tmp_path, *flags, "--ref_model_checkpoint", tmp_path / "epoch_1.pt")  # the hub is empty
    quick = tiny_models.build("tiny-vit", quick_gelu=True)
    quick.load_state_dict(source.state_dict())
    assert close(embed(built.module)[0], embed(quick)[0])


def test_a_checkpoint_and_a_file_are_weights_given_twice(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(tiny_models.build("tiny-vit").state_dict(), file)
    flags = ["--ref_model", "ViT-B-32", "--ref_model_pretrained", file, "--ref_model_checkpoint", file]
    with pytest.raises(ValueError, match=r"--ref_model_checkpoint .* and --ref_model_pretrained .* give one"):
        reference(tmp_path, *flags)


def test_missing_weights_without_a_network_say_what_is_expected_where(tmp_path, hub):
    with pytest.raises(ValueError) as error:
        reference(tmp_path, "--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai")
    message = str(error.value)
    assert message.startswith("--ref_model_pretrained openai: the weights of ViT-B-32 are not on this machine")
    assert "open_clip_model.safetensors" in message and "timm/vit_base_patch32_clip_224.openai" in message
    assert str(hub.folder) in message
    assert "--ref_model ViT-B-32-quickgelu --ref_model_pretrained FILE" in message
    assert "\n" not in message


def test_unknown_tag_lists_the_known_ones(vit):
    with pytest.raises(ValueError, match=r"--pretrained opennai: for --model ViT-B-32 .*openai, .*laion2b"):
        pretrained.find("ViT-B-32", "opennai", "--pretrained", "--model")


@shrunk("ViT-B-32")
def _build_on_rank(folder: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The repositories that this rank downloaded, and the weights of its model."""
    asked = []

    def download(declared: dict) -> str:
        asked.append(declared["hf_hub"])
        time.sleep(0.3)
        repository = declared["hf_hub"].rstrip("/")
        return str(put(Path(folder, "hub"), repository, tiny_models.build("tiny-vit", seed=7).state_dict()))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(Path(folder, "hub")))
        monkeypatch.setattr(open_clip, "download_pretrained", download)
        built = reference(Path(folder), "--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai")
    return asked, built.module.state_dict()


def test_one_rank_per_node_downloads_and_the_others_find_it(tmp_path):
    (first, weights), (second, others) = ranks(2).run(_build_on_rank, str(tmp_path))
    assert first == ["timm/vit_base_patch32_clip_224.openai/"] and second == []
    source = tiny_models.build("tiny-vit", seed=7).state_dict()
    assert all(torch.equal(source[k], weights[k]) and torch.equal(source[k], others[k]) for k in source)
