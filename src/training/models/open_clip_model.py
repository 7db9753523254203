"""open_clip's models as type checkers see them: open_clip has no type information."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:

    class OpenClipModel(nn.Module):
        """What this program uses of open_clip's ``CLIP``, ``CustomTextCLIP`` and ``CoCa``.

        ``visual``  the image tower: open_clip's own, or one of timm's.
        ``text``    the text tower; ``CLIP`` has none and holds its layers itself.
        """

        visual: Any
        text: Any
        logit_scale: nn.Parameter
        logit_bias: nn.Parameter | None

        def encode_image(self, image: Tensor, /, *, normalize: bool) -> Tensor: ...

        def encode_text(self, text: Tensor, /, *, normalize: bool) -> Tensor: ...

        def set_grad_checkpointing(self) -> None: ...

else:
    OpenClipModel = nn.Module
