"""open_clip's models as type checkers see them (open_clip has no type information), and what they put out."""

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


def with_labels(outputs: dict[str, Tensor], text: Tensor) -> dict[str, Tensor]:
    """A model's ``outputs`` for ``text``, int64 [n, t], with the ``labels`` of a captioner beside its ``logits``.

    open_clip 3 puts out both, [n, t - 1] and [n, t - 1, vocabulary]; open_clip 4 logits for all t tokens and no
    labels. A token's logits are for the one that follows. Models that write no captions have neither.
    """
    if "logits" not in outputs or "labels" in outputs:
        return outputs
    return {**outputs, "logits": outputs["logits"][:, :-1], "labels": text[:, 1:]}
