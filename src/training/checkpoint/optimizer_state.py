"""The state of an optimizer in a checkpoint: moments and step counts, found by the parameters' names.

Rates, betas and decay remain those of this run's flags. Files have their parameters in the order of their groups:

* ours and the published ones: without decay, with decay, ``logit_scale``;
* OpenCLIP's: without decay, with ``logit_scale`` among them, and with decay (``open_clip_train.main``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_log = logging.getLogger(__name__)

# What the optimizers keep per parameter; SGD keeps nothing without momentum.
_KEPT = {"AdamW": {"exp_avg", "exp_avg_sq"}, "Lamb": {"exp_avg", "exp_avg_sq"}, "Lion": {"exp_avg"}}


def load(optimizer: Optimizer, model: nn.Module, held: Mapping[str, Any], path: Path) -> None:
    """Fill ``optimizer``, over parameters of ``model``, from ``held``, the content of the checkpoint ``path``.

    ValueError: it is of another optimizer, or of other parameters.
    """
    saved, current = held["optimizer"], optimizer.state_dict()
    kind = type(optimizer).__name__
    if held.get("optimizer_class", kind) != kind:
        raise ValueError(
            f"checkpoint {path} was saved with the optimizer {held['optimizer_class']}, but --optimizer is {kind}"
        )
    # The published code keeps a group for the temperature, without a parameter, even where it is constant.
    saved_groups = [group for group in saved["param_groups"] if group["params"]]
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in current["param_groups"]]:
        theirs = _by_open_clips_order(model, optimizer, saved_groups, saved["state"])
        if theirs is not None:
            saved, saved_groups = theirs
            _log.info("%s: its optimizer is OpenCLIP's, whose state is taken by the parameters' names", path)
    _check_groups(saved_groups, current["param_groups"], path)
    groups = []
    for theirs_of, ours in zip(saved_groups, current["param_groups"], strict=True):
        progress = {"step": theirs_of["step"]} if "step" in theirs_of else {}
        groups.append(ours | progress | {"params": theirs_of["params"]})
    shapes = {
        index: parameter.shape
        for group, live in zip(groups, optimizer.param_groups, strict=True)
        for index, parameter in zip(group["params"], live["params"], strict=True)
    }
    for index, values in saved["state"].items():
        if not _KEPT.get(kind, set()) <= values.keys():
            raise ValueError(
                f"checkpoint {path}: its optimizer keeps {', '.join(sorted(values))} of a parameter, so it is not "
                f"--optimizer {kind.lower()}: give the one that it was saved with, or take the weights alone with "
                f"--pretrained {path}"
            )
        for key, value in values.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != shapes[index]:
                raise ValueError(
                    f"checkpoint {path}: the optimizer's {key} of parameter {index} has shape "
                    f"{list(value.shape)}, the parameter has shape {list(shapes[index])}: its parameters are in "
                    "another order"
                )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = _in_memory_of(parameter, value)


def _in_memory_of(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` in the parameter's memory order, which torch's fused optimizers take for granted.

    A file has it in rows; the parameter may have its channels last. torch keeps tensors that need no conversion.
    They are mapped from the file, so they are copied; those that went to a GPU are not.
    """
    if value.shape == parameter.shape and value.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
    return value.clone() if value.device.type == "cpu" else value


def _by_open_clips_order(
    model: nn.Module, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]], state: Mapping[int, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """The state and groups in this run's order, if they are in OpenCLIP's; None: they are not.

    A parameter that only the file has a state of, such as a temperature that is constant here, is left out.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    live = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    trained = {name for group in live for name in group}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for trained_there in (trained | {"logit_scale"}, set(shapes)):
        order: list[list[str]] = [[], []]
        for name, shape in shapes.items():
            if name in trained_there:
                spared = len(shape) < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
                order[0 if spared else 1].append(name)
        order = [group for group in order if group]
        if [len(group) for group in order] != [len(group["params"]) for group in groups]:
            continue
        place = {
            name: index
            for ours, theirs in zip(order, groups, strict=True)
            for name, index in zip(ours, theirs["params"], strict=True)
        }
        if not all(_is_of_shape(state.get(index, {}), shapes[name]) for name, index in place.items()):
            continue
        kept = {place[name]: state[place[name]] for name in trained if place[name] in state}
        return {"state": kept}, [{"params": [place[name] for name in group]} for group in live]
    return None


def _is_of_shape(values: Mapping[str, Any], shape: Sequence[int]) -> bool:
    return all(v.shape == shape for v in values.values() if isinstance(v, Tensor) and v.ndim)


def _check_groups(saved: Sequence[dict[str, Any]], current: Sequence[dict[str, Any]], path: Path) -> None:
    hint = (
        "it was saved with other locked parts, another temperature scheme or by another trainer; "
        f"--pretrained {path} takes its weights alone"
    )
    sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in current]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"checkpoint {path}: its optimizer has groups of {sizes[0]} parameters, this run of {sizes[1]}: {hint}"
        )
    for theirs, ours in zip(saved, current, strict=True):
        names = zip(theirs.get("param_names", ()), ours.get("param_names", ()))
        differing = next(((a, b) for a, b in names if a != b), None)
        if differing:
            raise ValueError(
                f"checkpoint {path}: its optimizer has {differing[0]!r} in place of {differing[1]!r}: {hint}"
            )
