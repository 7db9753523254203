"""Target and reference are built as the flags ask: initial weights, precision, temperature, towers."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support import tiny_models
from tests.support.building import ALONE, close, config, embed, reference, same_weights, target, trained
from tests.support.ranks import ranks
from training.distributed.process_group import World
from training.models.build import build_target
from training.models.frozen import build_reference


@pytest.fixture
def vit(tmp_path) -> str:
    return tiny_models.path("tiny-vit", tmp_path)


def test_built_model_knows_what_it_expects(vit):
    built = target("--model", vit)
    assert (built.name, built.context_length) == ("tiny-vit", 16)
    assert built.preprocess.size == (32, 32)
    tokens = built.tokenizer(["a cat", "two cats"])
    assert tokens.shape == (2, 16) and tokens.dtype == torch.int64
    out = built.module(torch.zeros(2, 3, 32, 32), tokens)
    assert out["image_features"].shape == out["text_features"].shape == (2, 32)


# Initialisation


def test_initial_weights_depend_on_the_seed_and_building_changes_no_generator(vit):
    torch.manual_seed(1)
    first = target("--model", vit, "--seed", 5).module
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    assert same_weights(first, target("--model", vit, "--seed", 5).module)
    assert not same_weights(first, target("--model", vit, "--seed", 6).module)


def _build_on_rank(model: str) -> tuple[float, ...]:
    torch.manual_seed(dist.get_rank())
    world = World(dist.get_rank(), dist.get_rank(), 2, 2, torch.device("cpu"))
    module = build_target(config("--model", model), world).module
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


def test_reference_is_frozen_and_has_its_own_image_size_and_tokens(tmp_path):
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
        build_reference(run, ALONE)


def test_building_logs_one_line(vit, caplog):
    with caplog.at_level("INFO"):
        target("--model", vit)
    assert [r.name for r in caplog.records] == ["training.models.create"]
    assert "3.3M parameters" in caplog.text and "random weights" in caplog.text
