"""The published checkpoint format: safe reading, prefixes, sample-state columns of all kinds."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from tests.support import tiny_models
from tests.support.building import known_to_open_clip
from training.checkpoint import pt_file, published

NAN = float("nan")


class Malice:
    """Creates a folder when an ordinary loader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "logit_scale": torch.tensor(2.0)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_file_is_refused_and_nothing_of_it_runs(tmp_path, zipped):
    trace, file = tmp_path / "trace", tmp_path / "evil.pt"
    torch.save({"state_dict": WEIGHTS, "epoch": Malice(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pt.*posix\.mkdir.*no code in it was run"):
        pt_file.read(file)
    assert not trace.exists()
    torch.load(file, weights_only=False)  # the trap is a real one
    assert trace.exists()


def test_a_malicious_plain_pickle_is_refused(tmp_path):
    trace, file = tmp_path / "trace", tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps({"state_dict": Malice(trace)}))
    with pytest.raises(ValueError, match="cannot be read"):
        pt_file.read(file)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_are_read(tmp_path, zipped):
    file = tmp_path / "epoch_1.pt"
    scalars = {"lr": np.float64(1e-3), "step": np.int64(7), "x": np.float32(0.5), "flag": np.bool_(True)}
    torch.save({"epoch": 1, "state_dict": WEIGHTS, **scalars}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    held = pt_file.read(file)
    assert {name: held[name].item() for name in scalars} == {"lr": 1e-3, "step": 7, "x": 0.5, "flag": True}
    assert torch.equal(held["state_dict"]["a.weight"], WEIGHTS["a.weight"])


def test_numpy_scalars_as_numpy_1_named_them_are_read(tmp_path):
    file = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": WEIGHTS, "lr": np.float64(1e-3)}, file, _use_new_zipfile_serialization=False)
    renamed = file.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert renamed.count(b"numpy.core.multiarray")
    file.write_bytes(renamed)
    assert pt_file.read(file)["lr"] == 1e-3


def test_other_objects_are_refused_by_name(tmp_path):
    file = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": WEIGHTS, "args": Namespace(lr=1)}, file)
    with pytest.raises(ValueError, match=r"argparse\.Namespace"):
        pt_file.read(file)


def test_torn_and_missing_files_are_a_sentence(tmp_path):
    whole, torn = tmp_path / "whole.pt", tmp_path / "torn.pt"
    torch.save({"state_dict": WEIGHTS}, whole)
    content = whole.read_bytes()
    for length in (0, 1, 40, len(content) // 2, len(content) - 1):
        torn.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"torn\.pt: cannot be read"):
            pt_file.read(torn)
    torn.write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(ValueError, match=r"torn\.pt: cannot be read"):
        pt_file.read(torn)
    with pytest.raises(ValueError, match="no such file"):
        pt_file.read(tmp_path / "none.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bare", [True, False])
def test_weights_come_back_without_prefixes(tmp_path, prefix, bare):
    file = tmp_path / "weights.pt"
    weights = {prefix + name: value for name, value in WEIGHTS.items()}
    torch.save(weights if bare else {"epoch": 3, "state_dict": weights}, file)
    loaded = pt_file.load_weights(file)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_compiled_part_and_a_part_named_module_keep_their_names():
    names = {"visual._orig_mod.conv.weight": "visual.conv.weight", "module.head": "module.head"}
    assert list(pt_file.plain_names(dict.fromkeys(names, torch.ones(1)))) == list(names.values())


def test_files_without_weights_are_refused(tmp_path):
    for content, sentence in (([1, 2], "not a dict"), ({"epoch": 3}, "neither"), ({}, "neither")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=sentence):
            pt_file.load_weights(tmp_path / "x.pt")


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert torch.equal(pt_file.load_weights(tmp_path / "weights.safetensors")["a.weight"], WEIGHTS["a.weight"])


def test_written_files_are_small_plain_and_load_in_open_clip(tmp_path):
    torch.manual_seed(0)
    model = tiny_models.build("tiny-vit")
    file = tmp_path / "epoch_2.pt"
    pt_file.write(file, {"epoch": 2, "name": "run", "state_dict": model.state_dict(), "pair": (1, "a", None)})
    held = torch.load(file, weights_only=True)
    assert (held["epoch"], held["name"], held["pair"]) == (2, "run", [1, "a", None])
    loaded, _, _ = open_clip.create_model_and_transforms(known_to_open_clip(), pretrained=str(file))
    assert all(torch.equal(loaded.state_dict()[n], value) for n, value in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_2.pt"]


def test_a_view_is_saved_without_the_storage_behind_it(tmp_path):
    pt_file.write(tmp_path / "x.pt", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "x.pt").stat().st_size < 10_000


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "epoch_1.pt"
    pt_file.write(file, {"epoch": 1})

    def disk_full(held, handle) -> None:
        handle.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space"):
        pt_file.write(file, {"epoch": 2})
    assert pt_file.read(file) == {"epoch": 1}


# --- the sample state in published files ------------------------------------------------------------------


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


GLOBAL = {"log_u_image": torch.tensor([-2.5, NAN, 1.0]), "log_u_text": torch.tensor([0.5, NAN, -400.0])}
INDIVIDUAL = GLOBAL | {
    "tau_image": torch.tensor([0.02, NAN, 0.03]),
    "tau_text": torch.tensor([0.05, NAN, 0.01]),
    "tau_m_image": torch.tensor([0.0, NAN, -1.0]),
    "tau_m_text": torch.tensor([1.0, NAN, 2.0]),
    "tau_v_image": torch.tensor([0.0, NAN, 1.0]),
    "tau_v_text": torch.tensor([3.0, NAN, 4.0]),
}


@pytest.mark.parametrize("columns", [GLOBAL, INDIVIDUAL], ids=["global", "individual"])
def test_columns_come_back_as_they_were(columns):
    back = published.from_published(published.to_published(columns, initial_tau=0.03))
    assert back.keys() == columns.keys()
    for name, value in columns.items():
        torch.testing.assert_close(back[name], value, rtol=0, atol=0, equal_nan=True)


def test_published_columns_have_the_published_names_shapes_and_marks():
    held = published.to_published(INDIVIDUAL, initial_tau=0.03)
    assert held.pop("u_format") == "log"
    pairs = ("u", "tau", "m_grad_tau", "v_grad_tau", "bound")
    assert held.keys() == {f"{name}_{direction}" for name in pairs for direction in ("im", "tt")}
    assert all(value.shape == (3, 1) and value.dtype == torch.float32 for value in held.values())
    assert held["u_im"].flatten().tolist() == [-2.5, 0.0, 1.0]
    assert held["tau_tt"].flatten().tolist() == pytest.approx([0.05, 0.03, 0.01])
    assert held["bound_im"].count_nonzero() == held["bound_tt"].count_nonzero() == 0


def test_a_negative_value_in_either_column_means_log():
    held = {"u_im": column(0.5, 0.0, 2.0), "u_tt": column(-3.0, 0.0, 1.0)}
    columns = published.from_published(held)
    assert columns["log_u_image"].tolist() == pytest.approx([0.5, NAN, 2.0], nan_ok=True)
    assert columns["log_u_text"].tolist() == pytest.approx([-3.0, NAN, 1.0], nan_ok=True)


def test_linear_u_with_bounds_as_the_fastclip_code_keeps_it():
    held = {
        "u_im": column(2.0, 0.0),
        "u_tt": column(1.0, 0.0),
        "bound_im": column(10.0, 0.0),
        "bound_tt": column(-3.0, 0.0),
        "tau_im": column(0.02, 0.03),
        "tau_tt": column(0.02, 0.03),
    }
    columns = published.from_published(held, u_format="linear")
    # u = stored * exp(bound)
    assert columns["log_u_image"].exp()[0].item() == pytest.approx(2 * np.exp(10.0), rel=1e-5)
    assert columns["log_u_text"][0].item() == pytest.approx(-3.0)
    assert all(value[1].isnan() for value in columns.values())
    assert columns["tau_image"][0].item() == pytest.approx(0.02)


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("told", [None, "linear"])
def test_blocks_are_the_columns_in_their_order(rows, told):
    """A negative value tells for all blocks that these are logarithms."""
    held = {"u_im": torch.tensor([[0.5], [0.0], [2.0]]), "u_tt": torch.tensor([[1.0], [3.0], [-1.0]])}
    bounds = {f"bound_{d}": torch.tensor([[1.0], [2.0], [3.0]]) for d in ("im", "tt")}
    linear = {name: value.abs() for name, value in held.items()} | {"u_format": "linear"}
    for file in (held, held | bounds, linear):
        found = list(published.blocks(file, told, rows))
        for name, values in published.from_published(file, told).items():
            read = torch.cat([block[name] for block in found])
            assert torch.equal(read.nan_to_num(9.0), values.nan_to_num(9.0))
    assert list(published.blocks({"state_dict": WEIGHTS}, told, rows)) == []


def test_u_that_may_be_either_needs_to_be_told():
    held = {"u_im": column(0.5, 2.0), "u_tt": column(0.25, 1.0)}
    with pytest.raises(ValueError, match="u_format"):
        published.from_published(held)
    assert published.from_published(held, "log")["log_u_image"].tolist() == [0.5, 2.0]
    assert published.from_published(held, "linear")["log_u_text"].tolist() == pytest.approx([np.log(0.25), 0.0])
    assert published.from_published(held | {"u_format": "linear"}, "log")["log_u_text"][1].item() == 0.0
    assert published.from_published({"state_dict": WEIGHTS}) == {}
