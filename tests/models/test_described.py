"""A checkpoint says of which model it is, and that model is built from it, whatever the flags name."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch

from tests.support import tiny_models
from tests.support.building import ALONE, close, config, embed, known_to_open_clip, reference, target
from training.cache.features import model_identity
from training.checkpoint import pt_file
from training.checkpoint.architecture import architecture_of, model_differences
from training.checkpoint.run_state import RunState
from training.models.build import build_target
from training.models.create import BuiltModel
from training.models.frozen import build_saved, look_for_weights

CHANGED = ["--force-quick-gelu", "--force-image-size", 48, "--image-mean", 0.1, 0.2, 0.3, "--image-std", 0.9]


@pytest.fixture
def vit(tmp_path) -> str:
    return tiny_models.path("tiny-vit", tmp_path)


@pytest.fixture
def other(tmp_path) -> str:
    return tiny_models.path("tiny-vit-reference", tmp_path)


def save(built: BuiltModel, file: Path) -> str:
    """A checkpoint of ``built`` after one epoch."""
    with torch.no_grad():
        for i, parameter in enumerate(built.module.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    pt_file.write(file, RunState("run", built.module, epoch=1, description=built.description).held())
    return str(file)


def resumed(path: str, *flags: object) -> BuiltModel:
    return build_target(config(*flags), ALONE, Path(path))


def same_model(found: BuiltModel, built: BuiltModel) -> bool:
    """Whether ``found``, with the weights of ``built``, is the same model, with the same preprocessing."""
    found.module.load_state_dict(built.module.state_dict())
    pixels = [found.preprocess, built.preprocess]
    size = built.preprocess.size[0]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (b.module.eval().encode_image(images, normalize=True) for b in (found, built))
    return pixels[0] == pixels[1] and close(ours, theirs)


def test_the_description_builds_the_same_model_without_the_flags_that_made_it(tmp_path, vit):
    built = target("--model", vit, *CHANGED)
    path = save(built, tmp_path / "epoch_1.pt")
    held = pt_file.read(path)["architecture"]
    assert held["name"] == "tiny-vit" and held["context_length"] == 16 and held["tokenizer"] == "SimpleTokenizer"
    assert held["model_cfg"]["quick_gelu"] is True and held["model_cfg"]["vision_cfg"]["image_size"] == 48
    assert held["preprocess_cfg"]["mean"] == [0.1, 0.2, 0.3] and held["preprocess_cfg"]["std"] == [0.9] * 3
    found = build_saved(path, "", ALONE)
    assert not found.module.training
    assert all(torch.equal(a, b) for a, b in zip(found.module.parameters(), built.module.parameters()))
    assert same_model(found, built)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("tiny-vit", "--siglip"),
        ("tiny-vit", "--force-custom-text --force-patch-dropout 0.3"),
        ("tiny-vit", "--precision pure_bf16"),
        ("tiny-coca", ""),
        ("tiny-resnet", "--image-std 0.5"),
    ],
)
def test_every_form_of_model_is_built_again(tmp_path, name, flags):
    built = target("--model", tiny_models.path(name, tmp_path), *flags.split())
    found = build_saved(save(built, tmp_path / "epoch_1.pt"), "", ALONE)
    assert found.module.state_dict().keys() == built.module.state_dict().keys()
    built.module.float()
    assert same_model(found, built)


def test_published_loaders_read_the_file_as_before(tmp_path, vit):
    built = target("--model", vit)
    path = save(built, tmp_path / "epoch_1.pt")
    model = open_clip.create_model(known_to_open_clip(), pretrained=path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built.module.parameters()))


# The reference


def test_a_checkpoint_alone_is_a_reference(tmp_path, vit):
    built = target("--model", vit, *CHANGED)
    path = save(built, tmp_path / "epoch_1.pt")
    assert same_model(reference(tmp_path, "--ref_model_checkpoint", path), built)


def test_a_name_beside_a_checkpoint_does_not_make_another_model_of_it(tmp_path, vit, caplog):
    built = target("--model", vit, *CHANGED)
    path = save(built, tmp_path / "epoch_1.pt")
    with caplog.at_level(logging.WARNING):
        found = reference(tmp_path, "--ref_model", vit, "--ref_model_checkpoint", path)
    assert same_model(found, built)
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert f"--ref_model {vit}: built as checkpoint {path} says" in told
    assert "quick_gelu True, not False" in told and "vision_cfg.image_size 48, not 32" in told


def test_the_same_model_is_not_remarked_upon(tmp_path, vit, caplog):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    with caplog.at_level(logging.WARNING):
        reference(tmp_path, "--ref_model", vit, "--ref_model_checkpoint", path)
        resumed(path, "--model", vit)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_built(tmp_path, vit, other):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    given = config("--fastclip", "--ref_model", other, "--ref_model_checkpoint", path, "--data_size", 100)
    with pytest.raises(
        ValueError, match=r"--ref_model .*: checkpoint .* another --model, tiny-vit \(.*leave --ref"
    ):
        look_for_weights(given)


def test_a_file_that_does_not_say_what_it_is_needs_a_name(tmp_path, vit):
    built = target("--model", vit)
    torch.save({"epoch": 1, "state_dict": built.module.state_dict()}, tmp_path / "old.pt")
    with pytest.raises(
        ValueError, match=r"--ref_model_checkpoint .*old.pt: the file does not say .* --ref_model NAME"
    ):
        reference(tmp_path, "--ref_model_checkpoint", tmp_path / "old.pt")
    found = reference(tmp_path, "--ref_model", vit, "--ref_model_checkpoint", tmp_path / "old.pt")
    assert close(embed(found.module)[0], embed(built.module)[0])


def test_a_description_that_this_open_clip_cannot_build_is_told(tmp_path, vit):
    built = target("--model", vit)
    path = save(built, tmp_path / "epoch_1.pt")
    held = pt_file.read(path)
    held["architecture"]["model_cfg"]["vision_cfg"]["of_a_later_version"] = 3
    pt_file.write(tmp_path / "later.pt", held)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"--ref_model_checkpoint .*later.pt: open_clip cannot build a model"):
            reference(tmp_path, "--ref_model_checkpoint", tmp_path / "later.pt")


def test_stored_features_are_of_the_same_reference_with_and_without_its_name(tmp_path, vit):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    given = ["--fastclip", "--ref_model_checkpoint", path]
    alone, named = config(*given), config(*given, "--ref_model", vit)
    assert model_identity(alone.reference) == model_identity(named.reference)
    other = save(target("--model", vit, "--force-quick-gelu"), tmp_path / "quick.pt")
    quick = config("--fastclip", "--ref_model_checkpoint", other, "--ref_model", vit).reference
    assert model_identity(quick)["model"] != model_identity(named.reference)["model"]


# Resuming


def test_what_the_flags_leave_open_is_as_in_the_checkpoint(tmp_path, vit, caplog):
    flags = ["--force-quick-gelu", "--force-image-size", 48, "--image-mean", 0.1, 0.2, 0.3]
    built = target("--model", vit, *flags)
    path = save(built, tmp_path / "epoch_1.pt")
    with caplog.at_level(logging.WARNING):
        found = resumed(path, "--model", vit)
    assert same_model(found, built)
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        "quick_gelu True, not False" in told
        and "image_size 48, not 32" in told
        and "mean (0.1, 0.2, 0.3), not" in told
    )
    assert not same_model(target("--model", vit, "--force-image-size", 48), built)
    caplog.clear()
    resumed(path, "--model", vit, *flags)
    assert not caplog.records or all(r.levelno < logging.WARNING for r in caplog.records)


def test_pixels_that_the_flags_change_are_told(tmp_path, vit, caplog):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    with caplog.at_level(logging.WARNING):
        found = resumed(path, "--model", vit, "--image-mean", 0.5)
    assert found.preprocess.mean == (0.5, 0.5, 0.5)
    assert "--image-mean 0.5 0.5 0.5" in caplog.text and "goes on with other pixels" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--force-quick-gelu", "--force-quick-gelu: checkpoint .* quick_gelu False, not True"),
        ("--force-custom-text", "--force-custom-text: checkpoint .* custom_text False, not True"),
        ("--force-image-size 64", "--force-image-size: checkpoint .*image_size 32, not 64"),
    ],
)
def test_flags_that_ask_for_another_model_than_the_checkpoint_are_refused(tmp_path, vit, flags, message):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match=message):
        resumed(path, "--model", vit, *flags.split())


def test_another_kind_of_model_is_refused_with_the_names(tmp_path, vit, other):
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    with pytest.raises(ValueError, match=r"--model .*: checkpoint .* was saved with another --model, tiny-vit"):
        resumed(path, "--model", other)


def test_patches_may_be_dropped_otherwise_after_a_resume(tmp_path, vit):
    path = save(target("--model", vit, "--force-patch-dropout", 0.5), tmp_path / "epoch_1.pt")
    assert resumed(path, "--model", vit).description.model_cfg["vision_cfg"].get("patch_dropout", 0) == 0


# Weights alone


def test_pretrained_from_our_checkpoint_brings_its_activation_and_pixels(tmp_path, vit):
    built = target("--model", vit, "--force-quick-gelu", "--image-mean", 0.1, 0.2, 0.3)
    path = save(built, tmp_path / "epoch_1.pt")
    assert same_model(target("--model", vit, "--pretrained", path), built)


def test_pretrained_from_our_checkpoint_turns_quick_gelu_off(tmp_path, vit, caplog):
    built = target("--model", vit)
    path = save(built, tmp_path / "epoch_1.pt")
    quick = tiny_models.path("tiny-vit", tmp_path / "quick", quick_gelu=True)
    found = target("--model", quick, "--pretrained", path)
    assert same_model(found, built)
    assert f"--model {quick}: built as {path} says: quick_gelu False, not True" in caplog.text
    assert not same_model(target("--model", quick, "--pretrained", path, "--force-quick-gelu"), built)
    own = save(found, tmp_path / "epoch_2.pt")
    caplog.clear()
    assert same_model(resumed(own, "--model", quick, "--pretrained", path), found)
    assert "quick_gelu" not in caplog.text  # the command that began the run
    assert same_model(resumed(own, "--model", quick), found)
    assert f"built as checkpoint {own} says: quick_gelu False, not True" in caplog.text
    with pytest.raises(ValueError, match=r"--force-quick-gelu: checkpoint .* quick_gelu False, not True"):
        resumed(own, "--model", quick, "--pretrained", path, "--force-quick-gelu")


def test_a_run_that_had_quick_gelu_from_its_name_goes_on_with_it(tmp_path, vit):
    """Before files could turn it off, ``--pretrained`` of a model with GELU left it on."""
    path = save(target("--model", vit), tmp_path / "epoch_1.pt")
    quick = tiny_models.path("tiny-vit", tmp_path / "quick", quick_gelu=True)
    built = target("--model", quick)
    own = save(built, tmp_path / "epoch_2.pt")
    assert same_model(resumed(own, "--model", quick, "--pretrained", path), built)


def test_a_folder_of_a_reference_with_gelu_turns_quick_gelu_off(tmp_path, vit, caplog):
    built = target("--model", vit)
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save(built.module.state_dict(), folder / "open_clip_model.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_models.CONFIGS["tiny-vit"]}))
    quick = tiny_models.path("tiny-vit", tmp_path / "quick", quick_gelu=True)
    assert same_model(reference(tmp_path, "--ref_model", quick, "--ref_model_checkpoint", folder), built)
    assert f"--ref_model {quick}: built as {folder} says: quick_gelu False, not True" in caplog.text


def test_files_that_do_not_say_it_leave_quick_gelu_to_the_name(tmp_path, vit):
    quick = tiny_models.path("tiny-vit", tmp_path / "quick", quick_gelu=True)
    built = target("--model", quick)
    torch.save({"epoch": 1, "state_dict": built.module.state_dict()}, tmp_path / "old.pt")
    assert same_model(target("--model", quick, "--pretrained", tmp_path / "old.pt"), built)


# The entry itself


def test_a_damaged_entry_is_named():
    with pytest.raises(ValueError, match=r"checkpoint x\.pt: its entry 'architecture' does not describe a model"):
        architecture_of({"architecture": {"model_cfg": {"embed_dim": 3}, "preprocess_cfg": {}}}, "x.pt")
    assert architecture_of({"epoch": 1, "state_dict": {}}, "x.pt") is None


def test_differences_count_defaults_of_open_clip_and_leave_out_what_has_no_meaning():
    a = {"embed_dim": 8, "vision_cfg": {"image_size": 32}, "text_cfg": {}}
    b = {
        "embed_dim": 8,
        "quick_gelu": False,
        "init_logit_scale": 2.0,
        "vision_cfg": {"image_size": [32, 32], "patch_dropout": 0.5, "pool_type": "tok"},
        "text_cfg": {"context_length": 77},
    }
    assert model_differences(a, b) == {}
    assert model_differences(a, b | {"text_cfg": {"context_length": 64}}) == {"text_cfg.context_length": (77, 64)}
