"""What ours is compared with: the same objective as one writes it down first, and as the published code does.

Autograd differentiates a surrogate whose value means nothing and whose gradient is that of F (docs/objective.md),
so every matrix of pairs lives until backward has passed it. One product per direction and model, as on a rank of
many, where the rows of both directions differ. The sample state is a full table on each rank's CPU, 0.0 standing
for "never seen", read and written with copies that wait.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def matrix_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    ref_image: Tensor,
    ref_text: Tensor,
    old_log_u: Tensor,
    *,
    gamma: float,
    eps: float,
    rho: float,
) -> tuple[Tensor, Tensor]:
    """DRRho-CLIP with a learnable temperature, objective multiplied by tau: the surrogate and log u [B, 2].

    ``image``, ``text`` [B, d], ``ref_*`` [B, d_r], ``old_log_u`` [B, 2] with 0.0 for never seen. In the dtype
    that autocast, where the caller is in one, gives matrix products.
    """
    batch = len(image)
    itself = torch.eye(batch, dtype=torch.bool, device=image.device)
    own = (image * text).sum(1, keepdim=True)
    ref_own = (ref_image * ref_text).sum(1, keepdim=True)
    towers = ((image, text, ref_image, ref_text), (text, image, ref_text, ref_image))
    log_u, pairs = [], []
    for old, (x, y, ref_x, ref_y) in zip(old_log_u.unbind(1), towers, strict=True):
        margin = (x @ y.T - own) - (ref_x @ ref_y.T - ref_own)
        exponent = scale * margin
        with torch.no_grad():
            others = exponent.masked_fill(itself, -torch.inf)
            log_g = torch.logsumexp(others, 1) - math.log(batch - 1)
            log_u.append(_moving_average(log_g, old, gamma, eps))
            weight = (others - log_u[-1][:, None]).exp()
        pairs.append((weight * exponent).sum(1) / (batch - 1))
    mean_log_u = torch.stack(log_u, 1)
    loss = torch.stack(pairs).mean() / scale.detach() + (mean_log_u.mean() + rho) / scale
    return loss, mean_log_u


def _moving_average(log_g: Tensor, old: Tensor, gamma: float, eps: float) -> Tensor:
    fresh = torch.logaddexp(log_g, torch.full_like(log_g, math.log(eps)))
    if gamma == 1.0:
        return fresh
    averaged = torch.logaddexp(old + math.log(1 - gamma), fresh + math.log(gamma))
    return torch.where(old == 0.0, fresh, averaged)


class ReplicatedTable:
    """Both columns of log u for all ``num_samples``, on this process's CPU.

    Memory is taken from the system page by page as rows are touched, so that a table of any size can be tried.
    """

    COLUMNS = 2

    def __init__(self, num_samples: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.columns = [_zero_pages(num_samples) for _ in range(self.COLUMNS)]

    @staticmethod
    def bytes_per_rank(num_samples: int) -> int:
        """Bytes of the whole table."""
        return 4 * num_samples * ReplicatedTable.COLUMNS

    def read(self, index: Tensor) -> Tensor:
        """``index`` int64 [b] -> [b, 2] on the device."""
        return torch.stack([column[index] for column in self.columns], 1).to(self.device)

    def write(self, index: Tensor, log_u: Tensor) -> None:
        """``log_u`` [B, 2] of the samples ``index`` [B]; waits for the device that it comes from."""
        index, values = index.cpu(), log_u.float().cpu()
        for column, value in zip(self.columns, values.unbind(1), strict=True):
            column[index] = value


def _zero_pages(n: int) -> Tensor:
    pages = mmap.mmap(-1, 4 * n)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a touched row is to cost 4 KB, not 2 MB
    return torch.frombuffer(pages, dtype=torch.float32)
