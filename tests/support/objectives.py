"""The compositional losses, and what they must give: the published code's numbers and the float64 oracle's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from drrho_clip.losses import fastclip, individual, registry
from drrho_clip.losses.interface import LossInputs
from drrho_clip.losses.pair_kernels import Budget, Kernels
from drrho_clip.sample_state import SampleState, StateUpdate
from tests.support import oracle

CPU = torch.device("cpu")
TRACES = Path(__file__).parents[1] / "assets" / "loss_traces.npz"
SCHEMES = (
    "drrho",
    "drrho_gamma1",
    "fastclip_v3_logspace",
    "fastclip_v1_logspace",
    "fastclip_v3_2ranks",
    "fastclip_v2_2ranks",
)
# Tiles of five rows, none or the first of them kept, and everything in one kept tile.
ROW = 4 * 12
BUDGETS = {"tiled": Budget(5 * ROW, 0), "first-kept": Budget(5 * ROW, 6 * ROW), "kept": Budget(1 << 20, 1 << 20)}
COPIES = torch.tensor([3, 5, 3, 0, 7, 9, 3, 11, 1, 5, 2, 8])  # some samples twice or more


def settings(**changes):
    return {"gamma": lambda epoch: 0.6, "eps": 1e-8, "rho": 7.0, **changes}


def make(name, state, budget=BUDGETS["kept"], kernels=None, **changes):
    kernels = kernels or Kernels(budget=budget)
    if state is None:
        changes = {"gamma": lambda epoch: 1.0, **changes}
    if name == "v2":
        extra = {"temperature": 0.03, "betas": (0.9, 0.999), "adam_eps": 1e-8, "lr_tau": 0.0133}
        return individual.IndividualFastCLIP(state=state, kernels=kernels, **settings(**extra, **changes))
    return fastclip.FastCLIP(state=state, kernels=kernels, **settings(multiply_tau=name == "v3", **changes))


def columns(name):
    return individual.COLUMNS if name == "v2" else fastclip.COLUMNS


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def inputs(b=12, d=16, scale=40.0, reference=True, index=None, seed=0, device=CPU):
    image, text = (unit(b, d, seed + i).to(device).requires_grad_() for i in range(2))
    ref = [unit(b, 24, seed + i).to(device) for i in (2, 3)] if reference else (None, None)
    logit_scale = torch.tensor(scale, device=device, requires_grad=True)
    index = torch.arange(b) if index is None else index
    return LossInputs(image, text, logit_scale, None, index.to(device), *ref)


def relative(ours, theirs):
    ours, theirs = (torch.as_tensor(x).double().cpu() for x in (ours, theirs))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check_published_numbers(
    scheme: str, kernels: Kernels, device: torch.device = CPU, context: AbstractContextManager | None = None
) -> None:
    """Three steps on the published code's inputs give its gradients, u and temperatures."""
    traces = np.load(TRACES)
    n, _, _, gamma, eps, rho, multiply_tau, has_reference = traces[f"{scheme}/config"]
    name = "v2" if "v2" in scheme else "v3" if multiply_tau else "v1"
    state = SampleState(int(n), columns(name), device)
    # The FastCLIP code counts the pair term of the temperature's gradient twice; the others are corrected.
    published = {} if name == "v2" else {"tau_gradient": "published" if "2ranks" in scheme else "paper"}
    loss = make(name, state, kernels=kernels, gamma=lambda epoch: gamma, eps=eps, rho=rho, **published)
    loss.set_epoch(1)
    for step in range(3):

        def trace(field, step=step):
            return torch.from_numpy(np.asarray(traces[f"{scheme}/step{step}/{field}"])).to(device)

        image, text = trace("image").requires_grad_(), trace("text").requires_grad_()
        scale = trace("logit_scale").requires_grad_()
        ref = (trace("ref_image"), trace("ref_text")) if has_reference else (None, None)
        with context or nullcontext():
            result = loss(LossInputs(image, text, scale, None, trace("index"), *ref))
        result.terms["contrastive_loss"].backward()
        state.commit(result.update)
        assert relative(image.grad, trace("grad_image")) < 1e-4
        assert relative(text.grad, trace("grad_text")) < 1e-4
        if name != "v2":
            assert relative(scale.grad, trace("grad_logit_scale")) < 1e-4
        for side in ("image", "text"):
            if "2ranks" in scheme:
                bound = trace(f"bound_{side}") if name == "v2" else 0.0
                expected = trace(f"u_{side}").double().log() + bound
            else:
                expected = trace(f"log_u_{side}").double()
            assert (result.update.values[f"log_u_{side}"] - expected).abs().max() < 1e-4
            if name == "v2":
                assert relative(result.update.values[f"tau_{side}"], trace(f"tau_{side}")) < 1e-5


def check_oracle(
    name: str,
    kernels: Kernels,
    *,
    reference: bool,
    duplicates: bool,
    device: torch.device = CPU,
    context: AbstractContextManager | None = None,
) -> None:
    """One step on rows of which some were seen before gives the oracle's u, gradients, value and temperatures."""
    index = COPIES if duplicates else torch.arange(12)
    state = SampleState(12, columns(name), device)
    loss = make(name, state, kernels=kernels)
    loss.set_epoch(1)
    seen = torch.tensor([0, 3, 5, 9])
    old = torch.full((12, 2), torch.nan)
    old[seen] = torch.rand(4, 2, generator=torch.Generator().manual_seed(9)) + 0.1
    rows = {c: old[:, i].log().to(device) for i, c in enumerate(fastclip.COLUMNS)}
    state.commit(StateUpdate(torch.arange(12, device=device), rows))
    x = inputs(reference=reference, index=index, device=device)
    with context or nullcontext():
        result = loss(x)
    result.terms["contrastive_loss"].backward()

    scale = x.logit_scale.item()
    tau = torch.full((12, 2), 0.03 if name == "v2" else 1 / scale)
    weight = torch.ones(12, 2) if name == "v3" else 1 / tau
    ref_image, ref_text = (x.ref_image.cpu(), x.ref_text.cpu()) if reference else (None, None)
    expected = oracle.step(
        x.image.cpu(), x.text.cpu(), index, tau, old[index], gamma=0.6, eps=1e-8, weight=weight,
        ref_image=ref_image, ref_text=ref_text,
    )  # fmt: skip
    assert relative(x.image.grad, expected.grad_image) < 1e-4
    assert relative(x.text.grad, expected.grad_text) < 1e-4
    log_u = torch.stack([result.update.values[c] for c in fastclip.COLUMNS], 1)
    assert (log_u.cpu() - expected.u.log()).abs().max() < 1e-4
    if name != "v2":
        value = expected.u.log().mean()
        grad_tau = -(expected.mean_margin * scale).mean()
        if name == "v3":
            value, grad_tau = (value + 7.0) / scale, value + 7.0 - expected.mean_margin.mean()
        assert result.terms["contrastive_loss"].item() == pytest.approx(value.item(), rel=1e-5)
        assert x.logit_scale.grad.item() == pytest.approx(-grad_tau.item() / scale**2, rel=1e-4)
    else:
        grad = (expected.u.log() + 7.0 - expected.mean_margin).clamp(-5, 5)
        for sample in index.unique():
            grad[index == sample] = grad[index == sample].mean(0)
        m_hat, v_hat = 0.1 * grad / (1 - 0.9**2), 0.001 * grad**2 / (1 - 0.999**2)
        stepped = (0.03 - 0.0133 * m_hat / (v_hat.sqrt() + 1e-8)).clamp(0.01, 1)
        taus = torch.stack([result.update.values[c] for c in registry.TAU], 1)
        assert relative(taus, stepped) < 1e-4
