"""Risks of per-sample losses: values and gradients against the dual in float64, bias, state, FastCLIP, ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drrho_clip import collectives
from drrho_clip.losses.fastclip import COLUMNS, FastCLIP
from drrho_clip.losses.interface import LossInputs
from drrho_clip.risk import (
    CVaR,
    KLConstrained,
    KLRegularized,
    MovingAverageKLConstrained,
    MovingAverageKLRegularized,
    PerSampleCVaR,
    PerSampleKLConstrained,
    PerSampleKLRegularized,
    ThresholdCVaR,
)
from drrho_clip.sample_state import SampleState
from tests.support import duals
from tests.support.ranks import ranks

BATCH = 24
OF_BATCH = {
    "regularized": (lambda: KLRegularized(0.7), lambda m: duals.kl_regularized(m, 0.7)),
    "constrained": (lambda: KLConstrained(0.4), lambda m: duals.kl_constrained(m, 0.4)),
    "cvar": (lambda: CVaR(0.3), lambda m: duals.cvar(m, 0.3)),
}
KEPT = {
    "regularized": lambda: MovingAverageKLRegularized(0.7, 0.3),
    "constrained": lambda: MovingAverageKLConstrained(0.4, 0.3, tau=0.8),
    "threshold": lambda: ThresholdCVaR(0.3),
}


def normal(*shape: int, seed: int = 0, **options) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.parametrize("referenced", [False, True])
def test_value_and_gradient_are_those_of_the_dual(name, referenced):
    make, dual = OF_BATCH[name]
    for seed in range(5):
        losses, reference = normal(BATCH, seed=seed).requires_grad_(), normal(BATCH, seed=seed + 100)
        given = (losses, reference) if referenced else (losses,)
        value = make()(*given)
        value.backward()
        m = losses.detach().double().numpy() - (reference.double().numpy() if referenced else 0)
        assert value.item() == pytest.approx(dual(m), abs=1e-6)
        np.testing.assert_allclose(losses.grad, duals.gradient(dual, m), atol=2e-5)
        np.testing.assert_allclose(make().weights(*given), losses.grad, atol=1e-6)


@pytest.mark.parametrize("name", OF_BATCH)
def test_hostile_losses(name):
    """Large, nearly equal, one sample alone: nothing overflows, and values are exact to float32."""
    make, dual = OF_BATCH[name]
    for losses in (
        1e30 * normal(BATCH),
        1e4 + 1e-2 * normal(BATCH),
        torch.zeros(BATCH).index_fill_(0, torch.tensor(3), 5e4),
        torch.full((BATCH,), -7.0),
        torch.tensor([2.5]),
    ):
        leaf = losses.clone().requires_grad_()
        value = make()(leaf)
        value.backward()
        assert value.item() == pytest.approx(dual(losses.double().numpy()), rel=2e-7 * 8)
        assert leaf.grad.sum().item() == pytest.approx(1, abs=1e-5)
        assert (leaf.grad >= 0).all()


def test_the_ends_of_the_scales():
    losses = normal(BATCH)
    for mean in (KLRegularized(1e6), KLConstrained(0.0), CVaR(1.0)):
        assert mean(losses).item() == pytest.approx(losses.mean().item(), abs=1e-5)
    for largest in (KLRegularized(1e-6), KLConstrained(math.log(BATCH)), CVaR(1e-6)):
        assert largest(losses).item() == pytest.approx(losses.max().item(), abs=1e-4)


def test_second_derivatives_of_the_regularized_risk():
    losses = normal(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(KLRegularized(0.7), (losses,))


@pytest.mark.parametrize("name", OF_BATCH)
def test_batches_estimate_from_below(name):
    """All batches of two of a population of seven: the mean value is below the risk of all, and so it is said."""
    make, dual = OF_BATCH[name]
    population = normal(7, dtype=torch.float64)
    risk = make()
    values = [risk(torch.stack(pair)).item() for pair in itertools.product(population, repeat=2)]
    assert np.mean(values) < dual(population.numpy()) - 0.01


def batch_bias(risk: Callable[[Tensor], Tensor], population: Tensor, size: int, steps: int) -> tuple[float, float]:
    """The mean of the values over random batches minus the regularized risk of all, and its standard error."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(population), (steps, size), generator=generator)
    values = torch.stack([risk(population[i]) for i in draws]).numpy()[steps // 10 :]
    pieces = np.array([piece.mean() for piece in np.array_split(values, 20)])  # as neighbours are not independent
    return pieces.mean() - duals.kl_regularized(population.numpy(), 1.0), pieces.std() / math.sqrt(20)


def test_bias_of_the_regularized_risk_is_as_stated():
    population, size, gamma = normal(200, dtype=torch.float64), 64, 0.5
    e = population.exp()
    stated = -(e.var(unbiased=False) / e.mean() ** 2).item() / (2 * size)
    bias, error = batch_bias(KLRegularized(1.0), population, size, 3000)
    assert bias == pytest.approx(stated, abs=4 * error) and error < 0.2 * abs(stated)
    averaged = MovingAverageKLRegularized(1.0, gamma).double()
    bias, error = batch_bias(averaged, population, size, 3000)
    assert bias == pytest.approx(stated * gamma / (2 - gamma), abs=4 * error)


def test_moving_average_replayed_in_float64():
    """u is kept linearly here; the gradients are those of tau g / u with u as a constant."""
    risk, gamma, rho = MovingAverageKLConstrained(0.4, 0.3, tau=0.8), 0.3, 0.4
    tau, u = torch.tensor(0.8, dtype=torch.float64, requires_grad=True), None
    for step in range(6):
        losses = (3 * normal(BATCH, seed=step)).requires_grad_()
        reference = normal(BATCH, seed=step + 50)
        risk.zero_grad()
        value = risk(losses, reference)
        value.backward()

        m = (losses - reference).detach().double().requires_grad_()
        g = (m / tau).exp().mean()
        u = g.item() if u is None else (1 - gamma) * u + gamma * g.item()
        by_tau = math.log(u) + rho + torch.autograd.grad(tau * (g / u), (m, tau), retain_graph=True)[1] - g / u
        (by_m,) = torch.autograd.grad(tau * g / u, (m,))
        assert value.item() == pytest.approx(tau.item() * (math.log(u) + rho), rel=1e-6)
        assert risk.log_u.item() == pytest.approx(math.log(u), rel=1e-6)
        torch.testing.assert_close(losses.grad, by_m.float(), rtol=1e-5, atol=1e-7)
        assert risk.log_tau.grad.item() == pytest.approx((tau * by_tau).item(), rel=1e-5, abs=1e-6)


def test_gamma_one_is_the_batch():
    risk = MovingAverageKLRegularized(0.7, 1.0)
    for seed in range(3):
        losses = normal(BATCH, seed=seed)
        torch.testing.assert_close(risk(losses), KLRegularized(0.7)(losses))


def test_far_losses_neither_overflow_nor_vanish():
    """exp(m / tau) is beyond float64 here, and changes by e^2000 between steps."""
    for risk in (MovingAverageKLRegularized(0.01, 0.3), MovingAverageKLConstrained(0.4, 0.3, tau=0.01)):
        for size in (1.0, 30.0, -20.0, 500.0):
            losses = (size + normal(BATCH)).requires_grad_()
            value = risk(losses)
            value.backward()
            assert value.isfinite() and losses.grad.isfinite().all() and losses.grad.sum() <= 1 / 0.3 + 1e-3


@pytest.mark.parametrize("name", KEPT)
def test_state_changes_in_training_mode_and_by_finite_losses_only(name):
    risk = KEPT[name]()
    risk(normal(BATCH))

    def state() -> list[float]:
        return [value.item() for value in risk.state_dict().values()]

    before = state()
    assert all(map(math.isfinite, before))
    risk.eval()(normal(BATCH, seed=1))
    assert not risk.train()(torch.full((BATCH,), torch.nan)).isfinite()
    assert state() == before
    fresh = KEPT[name]()
    assert not fresh(torch.full((BATCH,), torch.inf)).isfinite()
    fresh.load_state_dict(risk.state_dict())
    losses = normal(BATCH, seed=2)
    assert fresh(losses).item() == risk(losses).item()


def test_learned_dual_variables_reach_the_risk_of_all_samples():
    """Small batches of a fixed population: tau and lambda go where the dual has its minimum."""
    population = normal(400)
    all_of_it = population.double().numpy()
    generator = torch.Generator().manual_seed(0)
    for risk, exact in (
        (MovingAverageKLConstrained(0.4, 0.05, tau=3.0), duals.kl_constrained(all_of_it, 0.4)),
        (ThresholdCVaR(0.3), duals.cvar(all_of_it, 0.3)),
    ):
        optimizer = torch.optim.SGD(risk.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 800)
        for _ in range(800):
            value = risk(population[torch.randint(400, (32,), generator=generator)])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            risk.eval()
            if isinstance(risk, MovingAverageKLConstrained):
                risk.gamma = 1.0  # the value of all samples at the tau that was learned
            assert risk(population).item() == pytest.approx(exact, abs=0.01)


def test_the_reference_gets_no_gradient_and_types_are_kept():
    losses = normal(BATCH).bfloat16().requires_grad_()
    reference = normal(BATCH, seed=1).requires_grad_()
    risk = KLConstrained(0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = risk(losses, reference)
    value.backward()
    assert reference.grad is None and losses.grad.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    assert value.item() == risk(losses.float(), reference).item()


@pytest.mark.parametrize("learned", [False, True])
def test_contrastive_objectives_are_risks_over_negatives(learned):
    """FastCLIP with a reference (DRRho-CLIP) is the mean of two per-sample risks, one for each direction.

    Three steps, of which the last two visit samples again, one of them twice in a batch.
    """
    n, b, d, tau, rho, gamma, eps = 30, 12, 16, 0.05, 7.0, 0.6, 1e-8
    state = SampleState(n, COLUMNS)
    fastclip = FastCLIP(state=state, gamma=lambda _: gamma, eps=eps, rho=rho, multiply_tau=True)

    def direction() -> nn.Module:
        if learned:
            return PerSampleKLConstrained(n, rho, gamma, tau, eps)
        return PerSampleKLRegularized(n, tau, gamma, eps)

    directions = [direction(), direction()]
    for step, index in enumerate((torch.arange(12), torch.arange(6, 18), torch.tensor([3, 3, *range(10)]))):
        image, text = (F.normalize(normal(b, d, seed=9 * step + i), dim=1).requires_grad_() for i in range(2))
        ref_image, ref_text = (F.normalize(normal(b, 10, seed=9 * step + i), dim=1) for i in (2, 3))
        scale = torch.tensor(1 / tau, requires_grad=learned)
        result = fastclip(LossInputs(image, text, scale, None, index, ref_image, ref_text))
        state.commit(result.update)
        expected = result.terms["contrastive_loss"]
        expected.backward()
        gradients = [x.grad.clone() for x in (image, text)]
        image.grad = text.grad = None

        similarity, of_reference = image @ text.T, ref_image @ ref_text.T
        values = []
        for risk, s, r in zip(directions, (similarity, similarity.T), (of_reference, of_reference.T), strict=True):
            risk.zero_grad()
            losses, reference = (negatives(x - x.diagonal()[:, None], index) for x in (s, r))
            values.append(risk(losses, reference.nan_to_num(neginf=0), index=index))
        value = sum(values) / 2
        value.backward()
        assert value.item() == pytest.approx(expected.item() - (0 if learned else rho * tau), rel=1e-5)
        for x, gradient in zip((image, text), gradients, strict=True):
            torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-7)
        for risk, column in zip(directions, COLUMNS, strict=True):
            torch.testing.assert_close(
                risk.state.local()["log_u"], state.local()[column], rtol=1e-5, atol=1e-6, equal_nan=True
            )
        if learned:
            by_log_tau = sum(risk.log_tau.grad for risk in directions)
            assert by_log_tau.item() == pytest.approx(-scale.grad.item() / tau, rel=1e-4)


def negatives(x: Tensor, index: Tensor) -> Tensor:
    """[B, B] -> [B, B - 1], without the diagonal; -inf at further copies of the anchor."""
    x = x.masked_fill(index[:, None] == index[None, :], -torch.inf)
    return x[~torch.eye(len(x), dtype=torch.bool)].view(len(x), -1)


def make(name: str) -> nn.Module:
    kind, _, which = name.partition(" ")
    if kind == "batch":
        return OF_BATCH[which][0]()
    if kind == "kept":
        return KEPT[which]()
    return PerSampleCVaR(50, 0.3, 0.1) if which == "cvar" else PerSampleKLConstrained(50, 0.4, 0.3, 0.8, 1e-6)


def steps_of(name: str, size: int = 1, rank: int = 0) -> list:
    """Value and gradients of three steps on this rank's part of equal global batches; then state and weights."""
    part, results = slice(rank * BATCH // size, (rank + 1) * BATCH // size), []
    risk, per_sample = make(name), name.startswith("per-sample")
    for step in range(3):
        shape = (BATCH, 9) if per_sample else (BATCH,)
        losses = normal(*shape, seed=step)[part].clone().requires_grad_()
        reference = normal(*shape, seed=step + 50)[part]
        index = torch.randint(50, (BATCH,), generator=torch.Generator().manual_seed(step))[part]
        risk.zero_grad()
        value = risk(losses, reference, **({"index": index} if per_sample else {}))
        value.backward()
        own = [p.grad.item() for p in risk.parameters()]
        results.append((value.item(), (losses.grad / size).numpy(), own))
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in risk.state_dict().items()}
    weights = risk.weights(losses, reference).numpy() if hasattr(risk, "weights") else None
    return [*results, {k: v.numpy() for k, v in state.items()}, weights]


def steps_on_ranks(name: str) -> list:
    return steps_of(name, collectives.world_size(), collectives.rank())


@pytest.mark.parametrize(
    "name",
    [*(f"batch {k}" for k in OF_BATCH), *(f"kept {k}" for k in KEPT), "per-sample constrained", "per-sample cvar"],
)
def test_ranks_give_what_one_process_gives(name):
    """After DDP's mean over ranks the gradient is that of the global batch; a risk's own is so on every rank."""
    *steps, state, weights = steps_of(name)
    together = ranks(2).run(steps_on_ranks, name)
    for step, (value, gradient, own) in enumerate(steps):
        for on_rank in together:
            assert on_rank[step][0] == pytest.approx(value, rel=1e-5)
            assert on_rank[step][2] == pytest.approx(own, rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(np.concatenate([r[step][1] for r in together]), gradient, atol=1e-6)
    for on_rank in together:
        for key, value in state.items():
            np.testing.assert_allclose(on_rank[3][key], value, rtol=1e-5, atol=1e-6)
    if weights is not None:
        np.testing.assert_allclose(np.concatenate([r[4] for r in together]), weights, atol=1e-6)


def test_per_sample_cvar_replayed_in_float64():
    n, alpha, lr = 9, 0.3, 0.05
    risk, thresholds = PerSampleCVaR(n, alpha, lr), np.full(n, np.nan)
    for step, index in enumerate(([0, 3, 5, 8], [3, 1, 3, 0], [8, 3, 5, 0])):
        losses, reference = normal(4, 7, seed=step).requires_grad_(), normal(4, 7, seed=step + 50)
        value = risk(losses, reference, index=torch.tensor(index))
        value.backward()
        m = (losses.detach() - reference).double().numpy()
        upper = np.sort(m, 1)[:, -math.ceil(alpha * 7)]  # the largest value with less than the share above it
        limit = np.where(np.isnan(thresholds[index]), upper, thresholds[index])
        above = m > limit[:, None]
        assert value.item() == pytest.approx(
            (limit + ((m - limit[:, None]) * above).mean(1) / alpha).mean(), rel=1e-6
        )
        np.testing.assert_allclose(losses.grad, above / (alpha * 7 * 4), rtol=1e-6)
        new = limit - lr * (1 - above.mean(1) / alpha)
        for i in set(index):
            thresholds[i] = new[np.array(index) == i].mean()
        np.testing.assert_allclose(risk.state.local()["threshold"], thresholds, rtol=1e-5)


def test_per_sample_thresholds_reach_the_cvar():
    """Each sample's value comes down to the CVaR of all that it is ever compared with."""
    population = normal(4, 300)
    exact = np.mean([duals.cvar(row, 0.3) for row in population.double().numpy()])
    risk, generator = PerSampleCVaR(4, 0.3, 0.05), torch.Generator().manual_seed(0)
    for step in range(300):
        risk.lr = 0.05 if step < 150 else 0.005
        columns = torch.randint(300, (20,), generator=generator)
        risk(population[:, columns], index=torch.arange(4))
    assert risk.eval()(population, index=torch.arange(4)).item() == pytest.approx(exact, abs=0.01)


def test_per_sample_state_is_in_the_state_dict():
    risk = PerSampleKLConstrained(10, 0.4, 0.3, eps=1e-6)
    losses, index = normal(4, 7), torch.tensor([2, 9, 0, 5])
    risk(losses, index=index)
    loop = nn.ModuleDict({"risk": risk})
    saved = {key: value.clone() for key, value in loop.state_dict().items()}
    assert (~saved["risk.log_u"].isnan()).nonzero().squeeze(1).tolist() == [0, 2, 5, 9]
    fresh = nn.ModuleDict({"risk": PerSampleKLConstrained(10, 0.4, 0.3, eps=1e-6)})
    fresh.load_state_dict(saved)
    assert fresh["risk"](losses, index=index).item() == risk(losses, index=index).item()
    risk.eval()(5 * losses, index=index)
    risk.train()(losses * torch.nan, index=index)
    torch.testing.assert_close(risk.state.local(), fresh["risk"].state.local(), equal_nan=True)
    with pytest.raises(RuntimeError, match="log_u"):
        fresh.load_state_dict({"risk.log_tau": saved["risk.log_tau"]})
    with pytest.raises(ValueError, match="has 11 rows"):
        fresh.load_state_dict(saved | {"risk.log_u": torch.zeros(11)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KLRegularized(0), "tau 0 is not above 0"),
        (lambda: KLRegularized(math.inf), "tau inf"),
        (lambda: KLConstrained(-0.1), "rho -0.1"),
        (lambda: CVaR(1.2), "alpha 1.2"),
        (lambda: MovingAverageKLRegularized(1.0, 0.0), "gamma 0.0"),
        (lambda: PerSampleKLRegularized(3, 1.0, 0.5, eps=-1), "eps -1"),
        (lambda: PerSampleCVaR(3, 0.5, lr=0), "lr 0"),
        (lambda: KLRegularized(1.0)(torch.tensor(2.0)), r"losses has shape \(\): give \[b\]"),
        (lambda: KLRegularized(1.0)(torch.empty(0)), "reduction='none'"),
        (lambda: CVaR(0.5)(torch.ones(4), torch.ones(4, 1)), r"reference_losses has shape \(4, 1\)"),
        (lambda: PerSampleKLRegularized(3, 1.0, 0.5)(torch.ones(2), index=torch.arange(2)), r"give \[b, c\]"),
        (lambda: PerSampleKLRegularized(3, 1.0, 0.5)(torch.ones(2, 4), index=torch.arange(3)), "one for each row"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
