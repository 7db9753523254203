"""A stand-in for a GPU on machines without one: it counts where the host would wait, and refuses what would fail.

``with StandIn() as device:`` tensors of ``device.name`` (torch's ``meta``) are kept in host memory, but belong to
the device, as does all that is computed from them. As with a GPU

* the host waits when it asks for their values: ``.cpu()``, ``.to("cpu")``, ``.item()``, ``bool(...)``, a copy into
  host memory, a mask as an index;
* an operation that mixes them with tensors of the host (other than numbers) is an error.

``Readback`` reads values that the device has copied to the host some time before; these are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from drrho_clip.state.readback import Readback

_READS = {"cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
_SHAPES = {"__len__", "dim", "size", "numel", "element_size", "is_floating_point"}
_PLACES = {"to", "copy_"}


class _OnDevice(Tensor):
    """A tensor of the stand-in."""


class StandIn(TorchFunctionMode):
    """The device. ``waits``: how often the host has waited for it; ``late``: how often it read an early copy."""

    name = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.late = 0
        self._late = mock.patch.object(Readback, "value", self._value())

    def __enter__(self) -> StandIn:
        self._late.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._late.stop()

    def _value(self) -> Callable[[Readback], Tensor]:
        def value(readback: Readback) -> Tensor:
            self.late += 1
            with torch._C.DisableTorchFunction():
                return _plain(readback._copy)

        return value

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        ours = any(isinstance(tensor, _OnDevice) for tensor in tensors)
        if function == Tensor.device.__get__:
            return self.name if ours else torch.device("cpu")
        if name == "to" and (target := _target(args[1:], kwargs)) is not None:
            return self._moved(args, kwargs, target)
        if ours and (name in _READS or (name == "__getitem__" and _masked(args[1]))):
            self.waits += 1
            return function(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if name == "copy_" and not isinstance(args[0], _OnDevice):
            self.waits += ours
            return function(*tree_map(_plain, args), **kwargs)
        if ours and name not in _PLACES and any(_of_the_host(tensor) for tensor in tensors):
            raise RuntimeError(f"{name} of tensors on two devices")
        created = kwargs.get("device") is not None and torch.device(kwargs["device"]) == self.name
        if created:
            kwargs["device"] = "cpu"
        result = function(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if not (ours or created) or name in _SHAPES:
            return result
        return iter([_wrapped(each) for each in result]) if name == "__iter__" else tree_map(_wrapped, result)

    def _moved(self, args: Any, kwargs: dict[str, Any], target: torch.device) -> Tensor:
        """``Tensor.to`` another device, or the same one."""
        was, source = isinstance(args[0], _OnDevice), _plain(args[0])
        args = [torch.device("cpu") if _is_device(each) else each for each in args[1:]]
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        moved = source.to(*args, **kwargs)
        if target == self.name:
            return _wrapped(moved if was else moved.clone())
        self.waits += was
        return moved


def _target(args: Any, kwargs: dict[str, Any]) -> torch.device | None:
    given = [each for each in (*args[:1], kwargs.get("device")) if _is_device(each)]
    return torch.device(given[0]) if given else None


def _is_device(given: Any) -> bool:
    return isinstance(given, (str, torch.device))


def _masked(index: Any) -> bool:
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(index))


def _of_the_host(tensor: Tensor) -> bool:
    return not isinstance(tensor, _OnDevice) and tensor.ndim > 0


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, _OnDevice) else value


def _wrapped(value: Any) -> Any:
    return value.as_subclass(_OnDevice) if isinstance(value, Tensor) else value
