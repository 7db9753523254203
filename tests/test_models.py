"""Target and reference as the flags say: names, weights, what a tag declares, precision, temperature, locks."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tiny_models
from ranks import ranks
from training import models, params, pretrained
from training.distributed import World
from training.models import BuiltModel

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
SYNTHETIC = ["--dataset-type", "synthetic", "--train-num-samples", "64", "--batch-size", "8", "--data_size", "64"]


def config(*flags: object) -> params.Config:
    return params.parse([*SYNTHETIC, *map(str, flags)])


def target(*flags: object) -> BuiltModel:
    return models.build_target(config(*flags), ALONE)


def reference(tmp_path: Path, *flags: object) -> BuiltModel | None:
    model = tiny_models.path("tiny-vit", tmp_path)
    return models.build_reference(config("--model", model, "--fastclip", *flags), ALONE)


@pytest.fixture
def vit(tmp_path) -> str:
    return tiny_models.path("tiny-vit", tmp_path)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-6)


@torch.no_grad()
def embed(module: nn.Module, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    text = open_clip.SimpleTokenizer(context_length=module.context_length)(["one", "two words", "and three words"])
    module.eval()
    return module.encode_image(image, normalize=True), module.encode_text(text, normalize=True)


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


# Names and config files


def test_built_model_knows_what_it_expects(vit):
    built = target("--model", vit)
    assert (built.name, built.context_length) == ("tiny-vit", 16)
    assert built.preprocess.size == (32, 32)
    tokens = built.tokenizer(["a cat", "two cats"])
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    out = built.module(torch.zeros(2, 3, 32, 32), tokens)
    assert out["image_features"].shape == out["text_features"].shape == (2, 32)


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
    # nor do the tags of the built-in model apply to it
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


def test_json_that_is_no_model_config_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"embed_dim": 8}')
    with pytest.raises(
        ValueError, match=r"other.json: not an open_clip model config, it has no text_cfg, vision_cfg"
    ):
        pretrained.open_clip_name(str(path), "--model")
    assert "other" not in "".join(open_clip.list_models())


# Initialisation


def test_initialisation_is_the_seeds_alone_and_disturbs_nobody(vit):
    torch.manual_seed(1)
    first = target("--model", vit, "--seed", 5).module
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert same_weights(first, target("--model", vit, "--seed", 5).module)
    assert not same_weights(first, target("--model", vit, "--seed", 6).module)


def _build_on_rank(model: str) -> tuple[float, ...]:
    import torch.distributed as dist

    torch.manual_seed(dist.get_rank())
    world = World(dist.get_rank(), dist.get_rank(), 2, 2, torch.device("cpu"))
    module = models.build_target(config("--model", model), world).module
    return tuple(p.double().sum().item() for p in module.parameters())


def test_every_rank_builds_the_same_model(vit):
    first, second = ranks(2).run(_build_on_rank, vit)
    assert first == second


# Precision


@pytest.mark.parametrize(
    ("precision", "name", "expected"),
    [
        ("fp32", "tiny-vit", torch.float32),
        ("amp", "tiny-vit", torch.float32),
        ("amp_bf16", "tiny-vit", torch.float32),
        ("bf16", "tiny-vit", torch.bfloat16),
        ("fp16", "tiny-vit", torch.float16),
        ("pure_bf16", "tiny-vit", torch.bfloat16),
        ("pure_fp16", "tiny-vit", torch.float16),
        ("bf16", "tiny-resnet", torch.bfloat16),
    ],
)
def test_precision_of_weights_and_of_the_temperature(tmp_path, precision, name, expected):
    weights = tiny_models.build(name, seed=3)
    with torch.no_grad():
        weights.logit_scale.fill_(4.6052)  # not a bfloat16 number
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    model = tiny_models.path(name, tmp_path)
    fresh = target("--model", model, "--precision", precision).module
    loaded = target("--model", model, "--precision", precision, "--pretrained", tmp_path / "weights.pt").module
    for module, logit_scale in ((fresh, math.log(1 / 0.07)), (loaded, 4.6052)):
        weight = next(m.weight for m in module.visual.modules() if isinstance(m, nn.Conv2d))
        assert weight.dtype == expected
        assert module.logit_scale.dtype == torch.float32
        assert module.logit_scale.item() == pytest.approx(logit_scale, abs=1e-6)


# Temperature


@pytest.mark.parametrize(
    ("flags", "logit_scale", "learns"),
    [
        ([], math.log(1 / 0.07), True),
        (["--fastclip"], math.log(1 / 0.07), True),
        (["--fastclip", "--temperature", 0.01], math.log(100), True),
        (["--fastclip", "--temperature_scheme", "global_constant", "--temperature", 0.02], math.log(50), False),
        (
            ["--fastclip", "--temperature_scheme", "individual_learnable", "--temperature", 0.03],
            math.log(1 / 0.03),
            False,
        ),
        (["--siglip"], math.log(10), True),
    ],
)
def test_temperature_starts_and_learns_as_the_scheme_says(vit, flags, logit_scale, learns):
    module = target("--model", vit, *flags).module
    assert module.logit_scale.item() == pytest.approx(logit_scale, rel=1e-6)
    assert ("logit_scale" in trained(module)) == learns
    assert module.logit_scale.shape == ()


@pytest.mark.parametrize(("flags", "tau"), [([], 0.01), (["--temperature", 0.07], 0.07)])
def test_an_explicit_temperature_wins_over_pretrained_weights(vit, tmp_path, flags, tau):
    weights = tiny_models.build("tiny-vit")
    with torch.no_grad():
        weights.logit_scale.fill_(math.log(100))
    torch.save(weights.state_dict(), tmp_path / "weights.pt")
    module = target("--model", vit, "--fastclip", "--pretrained", tmp_path / "weights.pt", *flags).module
    assert module.logit_scale.item() == pytest.approx(math.log(1 / tau), rel=1e-6)


def test_bias_belongs_to_the_sigmoid_loss(vit, tmp_path):
    assert target("--model", vit).module.logit_bias is None
    module = target("--model", vit, "--siglip").module
    assert module.logit_bias.item() == -10 and "logit_bias" in trained(module)
    biased = tiny_models.path("tiny-vit", tmp_path, init_logit_bias=-10)
    assert "logit_bias" not in trained(target("--model", biased).module)


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


# Weights from tags


class Cache:
    """A Hugging Face cache in a folder, with no network beside it."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(self, model: str, tag: str, module: nn.Module) -> None:
        repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
        put(self.folder, repository, module.state_dict())


def put(cache: Path, repository: str, state: dict[str, torch.Tensor]) -> None:
    entry = cache / f"models--{repository.replace('/', '--')}"
    snapshot = entry / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123")
    save_file({k: v.contiguous() for k, v in state.items()}, snapshot / "open_clip_model.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Cache:
    return Cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def shrink(tmp_path):
    """Makes built-in models of open_clip tiny: their names and tags stay, their weights fit a test."""
    folder = tmp_path / "shrunk"
    folder.mkdir()

    def shrink(model: str) -> None:
        (folder / f"{model}.json").write_text(json.dumps(tiny_models.CONFIGS["tiny-vit"]))
        open_clip.add_model_config(folder / f"{model}.json")

    yield shrink
    for file in folder.iterdir():
        file.unlink()
    open_clip.add_model_config(folder)  # scans again, and finds only open_clip's own
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512


def test_tag_that_declares_quick_gelu_is_built_with_it(tmp_path, hub, shrink):
    """ViT-B-32 with the tag openai is the reference of the headline recipe; its config says GELU."""
    shrink("ViT-B-32")
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


def test_tag_decides_normalization_and_interpolation_and_flags_override_it(tmp_path, hub, shrink):
    shrink("ViT-L-14-CLIPA")
    hub.put("ViT-L-14-CLIPA", "datacomp1b", tiny_models.build("tiny-vit"))
    tag = open_clip.get_pretrained_cfg("ViT-L-14-CLIPA", "datacomp1b")
    built = target("--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b").preprocess
    assert (built.mean, built.std) == (tag["mean"], tag["std"]) == (open_clip.constants.IMAGENET_MEAN, tag["std"])
    assert (built.interpolation, built.resize_mode) == ("bilinear", "squash")
    forced = target(
        "--model", "ViT-L-14-CLIPA", "--pretrained", "datacomp1b", "--image-mean", 0.1, 0.2, 0.3
    ).preprocess
    assert (forced.mean, forced.std, forced.interpolation) == ((0.1, 0.2, 0.3), tag["std"], "bilinear")


def test_checkpoint_beside_a_tag_brings_the_weights_and_the_tag_the_architecture(tmp_path, hub, shrink):
    shrink("ViT-B-32")
    source = tiny_models.build("tiny-vit", seed=9)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "epoch_1.pt")
    flags = ["--ref_model", "ViT-B-32", "--ref_model_pretrained", "openai"]
    built = reference(tmp_path, *flags, "--ref_model_checkpoint", tmp_path / "epoch_1.pt")  # the hub is empty
    quick = tiny_models.build("tiny-vit", quick_gelu=True)
    quick.load_state_dict(source.state_dict())
    assert close(embed(built.module)[0], embed(quick)[0])


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


def _find_on_rank(cache: str) -> tuple[str, str, float, float]:
    """What this rank found, what it asked the network for, when its search began and ended."""
    import torch.distributed as dist

    from training.distributed import node_main_first

    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    asked = []

    def download(declared: dict) -> str:
        asked.append(declared["hf_hub"])
        time.sleep(0.3)
        put(Path(cache), declared["hf_hub"].rstrip("/"), {"weight": torch.zeros(1)})
        return pretrained._cached(declared)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
        patch.setattr(open_clip, "download_pretrained", download)
        with node_main_first():
            begun = time.time()
            weights = pretrained.find("ViT-B-32", "openai", "--pretrained", "--model")
            ended = time.time()
    return weights.file, ",".join(asked), begun, ended


def test_one_rank_per_node_downloads_and_the_others_find_it(tmp_path):
    first, second = ranks(2).run(_find_on_rank, str(tmp_path / "hub"))
    assert first[0] == second[0] and Path(first[0]).is_file()
    assert (first[1], second[1]) == ("timm/vit_base_patch32_clip_224.openai/", "")
    assert second[2] >= first[3]


# Towers


@pytest.mark.parametrize("groups", [0, 1, 2])
@pytest.mark.parametrize("custom_text", [False, True])
def test_locked_image_tower(vit, groups, custom_text):
    flags = ["--lock-image", "--lock-image-unlocked-groups", groups]
    module = target("--model", vit, *flags, *(["--force-custom-text"] if custom_text else [])).module
    expected = tiny_models.build("tiny-vit", custom_text=custom_text)
    assert isinstance(module, type(expected))
    expected.lock_image_tower(unlocked_groups=groups)
    assert trained(module) == trained(expected) != set(dict(module.named_parameters()))


@pytest.mark.parametrize("custom_text", [False, True])
def test_locked_text_tower(vit, custom_text):
    layout = ["--force-custom-text"] if custom_text else []
    prefix = "text." if custom_text else ""
    expected = tiny_models.build("tiny-vit", custom_text=custom_text)
    expected.lock_text_tower(1)
    flags = ["--model", vit, *layout, "--lock-text", "--lock-text-unlocked-layers", 1]
    assert trained(target(*flags, "--lock-text-freeze-layer-norm").module) == trained(expected)
    expected.lock_text_tower(0)
    frozen = trained(target("--model", vit, *layout, "--lock-text", "--lock-text-freeze-layer-norm").module)
    assert frozen == trained(expected)
    layers = ("ln_final", "transformer.resblocks.0.ln_1", "transformer.resblocks.0.ln_2")
    norms = {f"{prefix}{layer}.{p}" for layer in layers for p in ("weight", "bias")}
    assert trained(target("--model", vit, *layout, "--lock-text").module) == frozen | norms


def test_locked_towers_of_coca(tmp_path):
    model = tiny_models.path("tiny-coca", tmp_path)
    names = trained(
        target("--model", model, "--lock-image", "--lock-text", "--lock-text-freeze-layer-norm").module
    )
    assert {name.split(".")[0] for name in names} == {"text_decoder", "logit_scale"}


def test_frozen_running_statistics(tmp_path):
    model = tiny_models.path("tiny-resnet", tmp_path)
    image = torch.randn(4, 3, 32, 32)
    for flags, moves in (([], True), (["--lock-image-freeze-bn-stats"], False)):
        module = target("--model", model, "--lock-image", *flags).module.train()
        before = module.visual.trunk.bn1.running_mean.clone()
        module.encode_image(image)
        assert torch.equal(before, module.visual.trunk.bn1.running_mean) != moves
        assert not any(p.requires_grad for p in module.visual.trunk.parameters())


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(vit):
    grads, passes = [], []
    for flags in ([], ["--grad-checkpointing"]):
        module, calls = target("--model", vit, *flags).module, []
        for tower in (module.visual.transformer, module.transformer):
            tower.resblocks[0].ln_1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        out = module(torch.ones(2, 3, 32, 32), torch.ones(2, 16, dtype=torch.long))
        (out["image_features"].sum() + out["text_features"][:, 0].sum()).backward()
        grads.append([p.grad for p in module.parameters()])
        passes.append(len(calls))
    assert passes == [2, 4]
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b)


def test_force_flags(vit):
    plain = target("--model", vit).module
    quick = target("--model", vit, "--force-quick-gelu").module
    assert same_weights(plain, quick) and not close(embed(plain)[0], embed(quick)[0])
    assert isinstance(target("--model", vit, "--force-custom-text").module, open_clip.CustomTextCLIP)
    dropping = target("--model", vit, "--force-patch-dropout", 0.5).module
    assert dropping.visual.patch_dropout.prob == 0.5
    wide = target("--model", vit, "--force-image-size", 32, 48)
    assert wide.preprocess.size == (32, 48)
    assert wide.module.visual.positional_embedding.shape[0] == 1 + 4 * 6
    own = target("--model", vit, "--image-mean", 0.1, 0.2, 0.3, "--image-std", 0.5, 0.6, 0.7).preprocess
    assert (own.mean, own.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("resnet", ["--force-patch-dropout", 0.5], "--force-patch-dropout 0.5: .*no patches|without patches"),
        (
            "resnet",
            ["--lock-image", "--lock-image-unlocked-groups", 2],
            "--lock-image-unlocked-groups 2: .*partial",
        ),
        ("tiny-vit", ["--pretrained-image"], "--pretrained-image: .*not one of timm's"),
    ],
)
def test_flags_that_a_tower_would_ignore_are_refused(tmp_path, name, flags, message):
    if name == "resnet":  # open_clip's own
        vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
        model = tiny_models.path("tiny-vit", tmp_path, vision_cfg=vision)
    else:
        model = tiny_models.path(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        target("--model", model, *flags)


# The reference


def test_reference_is_frozen_and_has_its_own_eyes_and_words(tmp_path):
    path = tiny_models.path("tiny-vit-reference", tmp_path)
    source = tiny_models.build("tiny-vit-reference", seed=4)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "epoch_9.pt")
    built = reference(tmp_path, "--ref_model", path, "--ref_model_checkpoint", tmp_path / "epoch_9.pt")
    assert (built.name, built.context_length) == ("tiny-vit-reference", 24)
    assert built.preprocess.size == (48, 48) and built.tokenizer(["a"]).shape == (1, 24)
    assert not built.module.training and trained(built.module) == set()
    assert same_weights(built.module, source)


def test_reference_under_the_runs_precision(tmp_path):
    path = tiny_models.path("tiny-vit-reference", tmp_path)
    torch.save(tiny_models.build("tiny-vit-reference").state_dict(), tmp_path / "w.pt")
    built = reference(
        tmp_path, "--ref_model", path, "--ref_model_pretrained", tmp_path / "w.pt", "--precision", "bf16"
    )
    assert built.module.visual.conv1.weight.dtype == torch.bfloat16


def test_no_reference(tmp_path):
    assert reference(tmp_path) is None


def test_a_teachers_errors_name_its_own_flags(tmp_path, vit):
    file = tmp_path / "other.pt"
    torch.save(tiny_models.build("tiny-vit").state_dict(), file)
    teacher = tiny_models.path("tiny-vit-reference", tmp_path)
    run = config("--model", vit, "--distill-model", teacher, "--distill-pretrained", file)
    with pytest.raises(ValueError, match=r"--distill-pretrained .*other.pt: these weights do not fit"):
        models.build_reference(run, ALONE)


def test_building_is_one_line_in_the_log(vit, caplog):
    with caplog.at_level("INFO"):
        target("--model", vit)
    assert [r.name for r in caplog.records] == ["training.models"]
    assert "3.3M parameters" in caplog.text and "random weights" in caplog.text
