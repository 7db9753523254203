"""The meaning of ``--precision`` on a device: autocast dtype, dtype of the pixels, gradient scaling.

amp                     float16 autocast with a gradient scaler on a GPU; float32 on the CPU, where float16 is too
                        slow to be useful
amp_bf16, amp_bfloat16  bfloat16 autocast
bf16, fp16              weights of matrix products in that dtype (open_clip), no autocast
pure_bf16, pure_fp16    all weights in that dtype
fp32                    float32
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from open_clip import get_input_dtype


@dataclass(frozen=True)
class Precision:
    """A precision on a device.

    ``autocast_dtype``    None: no autocast.
    ``pixel_dtype``       the dtype that the model's first layer expects.
    ``scales_gradients``  whether training needs a gradient scaler.
    """

    name: str
    device_type: str
    autocast_dtype: torch.dtype | None
    pixel_dtype: torch.dtype
    scales_gradients: bool

    def autocast(self) -> AbstractContextManager[object]:
        """The context for forward passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)

    def scaler(self) -> torch.amp.GradScaler | None:
        """A new gradient scaler; None if this precision needs none."""
        return torch.amp.GradScaler(self.device_type) if self.scales_gradients else None


def resolve(name: str, device: torch.device) -> Precision:
    """``--precision NAME`` on ``device``."""
    half_amp = name == "amp" and device.type == "cuda"
    autocast_dtype = None
    if half_amp:
        autocast_dtype = torch.float16
    elif name in ("amp_bf16", "amp_bfloat16"):
        autocast_dtype = torch.bfloat16
    # Under autocast the first layer rounds its input to autocast's type, so the pixels can have it from the start.
    pixel_dtype = get_input_dtype(name) or autocast_dtype or torch.float32
    return Precision(name, device.type, autocast_dtype, pixel_dtype, scales_gradients=half_amp)


def remark(name: str, device: torch.device) -> str | None:
    """What is worth knowing of ``--precision NAME`` on ``device``; None: nothing."""
    if "bf16" not in name or device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return (
        f"--precision {name}: {torch.cuda.get_device_name(device)} has no bfloat16 units, so it is slow there; "
        "--precision amp is the fast one"
    )
