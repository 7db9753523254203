"""FastCLIP and DRRho-CLIP against numbers of the published code and against a float64 oracle."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drrho_clip import collectives
from drrho_clip.losses import compositional, fastclip, individual, pair_kernels
from drrho_clip.losses.interface import LossInputs
from drrho_clip.losses.pair_kernels import Budget, Kernels
from drrho_clip.sample_state import SampleState, StateUpdate
from tests.support import oracle
from tests.support.objectives import (
    BUDGETS,
    COPIES,
    SCHEMES,
    check_oracle,
    check_published_numbers,
    columns,
    inputs,
    make,
    relative,
    unit,
)
from tests.support.ranks import ranks


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_reproduces_the_published_numbers(scheme, budget):
    check_published_numbers(scheme, Kernels(budget=BUDGETS[budget]))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("reference", [False, True], ids=["fastclip", "drrho"])
@pytest.mark.parametrize("name", ["v1", "v3", "v2"])
def test_matches_the_oracle(name, reference, duplicates, budget):
    check_oracle(name, Kernels(budget=BUDGETS[budget]), reference=reference, duplicates=duplicates)


def test_published_tau_gradient_counts_the_pair_term_twice():
    grads = {}
    for kind in ("paper", "published"):
        x = inputs()
        make("v1", None, tau_gradient=kind)(x).terms["contrastive_loss"].backward()
        grads[kind] = x.logit_scale.grad.item()
    assert grads["published"] == pytest.approx(2 * grads["paper"], rel=1e-6)
    assert grads["paper"] != 0


@pytest.mark.parametrize("reference", [False, True])
def test_exponents_of_400_stay_finite_and_accurate(reference):
    # Orthogonal-ish embeddings with planted opposite pairs, tau 0.005: exponents reach +-400.
    x = inputs(b=16, d=4, scale=200.0, reference=reference, seed=5)
    with torch.no_grad():
        x.text[:8] = -x.image[:8]
        x.text[8:] = x.image[8:]
    s = (x.image @ x.text.T - (x.ref_image @ x.ref_text.T if reference else 0)) * 200
    margins = s - s.diagonal()[:, None]
    assert margins.max() > 380 and margins.min() < -380
    old = torch.full((16,), torch.nan)
    old[::2], old[1::4] = -390.0, 390.0
    state = SampleState(16, fastclip.COLUMNS)
    state.commit(StateUpdate(torch.arange(16), dict.fromkeys(fastclip.COLUMNS, old)))
    loss = make("v3", state, eps=1e-14)
    result = loss(x)
    result.terms["contrastive_loss"].backward()
    tau = torch.full((16, 2), 1 / 200.0)
    stored = old.double().exp()[:, None].expand(16, 2)
    expected = oracle.step(
        x.image, x.text, x.index, tau, stored, gamma=0.6, eps=1e-14, weight=torch.ones(16, 2),
        ref_image=x.ref_image, ref_text=x.ref_text,
    )  # fmt: skip
    log_u = torch.stack([result.update.values[c] for c in fastclip.COLUMNS], 1)
    assert log_u.isfinite().all() and log_u.max() > 350
    assert relative(log_u, expected.u.log()) < 1e-3
    for ours, theirs in ((x.image.grad, expected.grad_image), (x.text.grad, expected.grad_text)):
        assert ours.isfinite().all()
        assert relative(ours, theirs) < 1e-3


def test_similarities_are_float32_inside_autocast():
    plain = inputs()
    make("v3", None)(plain).terms["contrastive_loss"].backward()
    cast = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = make("v3", None)(cast).terms["contrastive_loss"]
    loss.backward()
    assert torch.equal(plain.image.grad, cast.image.grad)


def test_gamma_one_never_reads_u():
    kept, bare = inputs(), inputs()
    state = SampleState(12, fastclip.COLUMNS)
    state.commit(StateUpdate(torch.arange(12), {c: torch.full((12,), 9.0) for c in fastclip.COLUMNS}))
    make("v3", state, gamma=lambda epoch: 1.0)(kept).terms["contrastive_loss"].backward()
    result = make("v3", None, gamma=lambda epoch: 1.0)(bare)
    result.terms["contrastive_loss"].backward()
    assert result.update is None
    assert torch.equal(kept.image.grad, bare.image.grad)


def _on_ranks(name, reference, index, steps=2):
    """One rank's slice of a global batch of 12: gradients and final state, as numpy."""
    k, r = collectives.world_size(), collectives.rank()
    b = 12 // k
    own = slice(r * b, (r + 1) * b)
    state = SampleState(12, columns(name))
    loss = make(name, state, BUDGETS["tiled"])
    loss.set_epoch(1)
    grads = []
    for step in range(steps):
        full = inputs(reference=reference, index=index, seed=10 * step)
        image = full.image.detach()[own].clone().requires_grad_()
        text = full.text.detach()[own].clone().requires_grad_()
        ref = (full.ref_image[own], full.ref_text[own]) if reference else (None, None)
        result = loss(LossInputs(image, text, full.logit_scale, None, index[own], *ref))
        result.terms["contrastive_loss"].backward()
        state.commit(result.update)
        grad_scale = 0.0 if full.logit_scale.grad is None else full.logit_scale.grad.item()
        grads.append((image.grad / k, text.grad / k, grad_scale / k, result.terms["contrastive_loss"].item()))
    _, table = state.fetch(torch.arange(12)[own])
    return grads, {name: value.numpy() for name, value in table.items()}


@pytest.mark.parametrize("duplicates", [False, True], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("reference", [False, True], ids=["fastclip", "drrho"])
@pytest.mark.parametrize("name", ["v1", "v3", "v2"])
@pytest.mark.parametrize("k", [2, 4])
def test_ranks_give_the_gradient_of_the_whole_batch(k, name, reference, duplicates):
    index = COPIES if duplicates else torch.arange(12)
    (whole, table) = _on_ranks(name, reference, index)
    parts = ranks(k).run(_on_ranks, name, reference, index)
    for step, (image, text, scale, value) in enumerate(whole):
        assert relative(torch.cat([g[step][0] for g, _ in parts]), image) < 1e-5
        assert relative(torch.cat([g[step][1] for g, _ in parts]), text) < 1e-5
        assert sum(g[step][2] for g, _ in parts) == pytest.approx(scale, rel=1e-5)
        assert all(g[step][3] == pytest.approx(value, rel=1e-6) for g, _ in parts)
    for column, values in table.items():
        for _, part in parts:
            np.testing.assert_allclose(part[column], values, rtol=1e-5, atol=1e-5, equal_nan=True)


class CountCollectives(TorchDispatchMode):
    """Records every collective, whichever function started it: its name and the bytes that this rank sends."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = args[0] if function._opname == "allreduce_" else [args[1]]
            self.calls.append((function._opname, sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))))
        return function(*args, **(kwargs or {}))


def _counted_collectives(name, b, d):
    state = SampleState(100, columns(name))
    loss = make(name, state)
    x = inputs(b=b, d=d, index=torch.arange(b) + b * collectives.rank())
    with CountCollectives() as forward:
        result = loss(x)
    with CountCollectives() as backward:
        result.terms["contrastive_loss"].backward()
    with CountCollectives() as commit:
        state.commit(result.update)
    return forward.calls, backward.calls, commit.calls


def _backward_collectives_of_openclip():
    x = inputs(b=6)
    loss = open_clip.ClipLoss(
        local_loss=True, gather_with_grad=True, rank=collectives.rank(), world_size=collectives.world_size()
    )(x.image, x.text, x.logit_scale)
    with CountCollectives() as backward:
        loss.backward()
    return backward.calls


def test_counting_sees_the_backward_collectives_of_openclip():
    assert len(ranks(2).run(_backward_collectives_of_openclip)[0]) >= 2


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_collectives_and_their_bytes(name):
    """FastCLIP's gradient reduction: embeddings once, u once, nothing in backward."""
    b, d, d_ref, k = 6, 16, 24, 2
    forward, backward, commit = ranks(k).run(_counted_collectives, name, b, d)[0]
    expected = [
        ("_allgather_base_", 8 * b),  # indices
        ("allreduce_", 4 * k * b * len(columns(name))),  # old rows of the sample state
        ("_allgather_base_", 4 * b * 2 * d_ref),  # the reference's embeddings
        ("_allgather_base_", 4 * b * 2 * d),  # the target's
        ("_allgather_base_", 4 * b * 2),  # new log u
    ]
    if name == "v2":
        expected.append(("_allgather_base_", 4 * b * 2))  # temperatures' gradients
    assert forward == expected
    assert backward == commit == []


@pytest.mark.parametrize("scales", [False, True], ids=["shared", "individual"])
def test_kernels_compile_without_a_graph_break(scales):
    embeddings = [(unit(12, 16, s), unit(12, 24, s + 1)) for s in (0, 2)]
    groups = torch.arange(12)
    scale = (torch.rand(12) + 1, torch.rand(12) + 1) if scales else (torch.tensor(3.0),) * 2
    block = pair_kernels.Block(*embeddings, groups, groups, *scale)
    options = {"columns": True, "budget": Budget(4 * 12 * 5, 0)}
    statistics = torch.compile(pair_kernels.pair_statistics, fullgraph=True, backend="aot_eager")
    gradient = torch.compile(pair_kernels.pair_gradient, fullgraph=True, backend="aot_eager")
    eager = pair_kernels.pair_statistics(block, moments=True, **options)
    compiled = statistics(block, moments=True, **options)
    for ours, theirs in zip(compiled[:2], eager[:2], strict=True):
        torch.testing.assert_close(ours.lse, theirs.lse)
        torch.testing.assert_close(ours.mean, theirs.mean)
    shift = (eager[0].lse, eager[1].lse)
    torch.testing.assert_close(
        gradient(block, *shift, kept=None, **options),
        pair_kernels.pair_gradient(block, *shift, kept=None, **options),
    )


def _compiled_gradients(name, budget):
    """One step with passes that must compile without a graph break, and with eager ones."""
    b, found = 6, []
    for kernels in (Kernels.compiled(budget, backend="aot_eager"), Kernels(budget=budget)):
        state = SampleState(12, columns(name))
        loss = make(name, state, kernels=kernels)
        loss.set_epoch(1)
        x = inputs(b=b, index=torch.arange(b) + b * collectives.rank(), seed=collectives.rank())
        result = loss(x)
        result.terms["contrastive_loss"].backward()
        found.append([x.image.grad, x.text.grad, *result.update.values.values()])
    return found


COMPILED = [
    (2, "v3", "tiled"),
    (2, "v3", "first-kept"),
    (2, "v3", "kept"),
    (2, "v2", "first-kept"),
    (1, "v3", "first-kept"),
    (1, "v2", "kept"),
]


@pytest.mark.parametrize("k, name, budget", COMPILED)
def test_compiled_kernels_on_ranks_and_with_kept_tiles(k, name, budget):
    given = (name, BUDGETS[budget])
    for compiled, eager in [_compiled_gradients(*given)] if k == 1 else ranks(k).run(_compiled_gradients, *given):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_merging_copies_takes_the_mean_of_u():
    index = torch.tensor([4, 1, 4, 4, 0])
    u = torch.tensor([[1.0, 2.0], [5.0, 6.0], [2.0, 4.0], [6.0, 9.0], [7.0, 8.0]])
    groups = compositional.duplicate_groups(index)
    merged = compositional.merge_duplicates(u.log(), groups).exp()
    expected = torch.tensor([[3.0, 5.0], [5.0, 6.0], [3.0, 5.0], [3.0, 5.0], [7.0, 8.0]])
    torch.testing.assert_close(merged, expected)


def test_the_mean_of_copies_does_not_depend_on_the_order_of_addition():
    index = torch.randint(30, (300,))
    values = torch.randn(300, 2) * 10 ** (2 * torch.randn(300, 1))
    mean = compositional.mean_of_copies(values, compositional.duplicate_groups(index))
    for i, row in enumerate(index):
        copies = values[index == row].double()
        assert ((mean[i] - copies.mean(0)).abs() <= 1e-6 * copies.abs().amax(0)).all()
    for order in (torch.randperm(300) for _ in range(5)):
        again = compositional.mean_of_copies(values[order], compositional.duplicate_groups(index[order]))
        assert torch.equal(again, mean[order])


@pytest.mark.parametrize("name", ["v1", "v3", "v2"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eps": 0.0}, "eps 0.0"),
        ({"eps": -1.0}, "eps -1.0"),
        ({"gamma": lambda epoch: 1.5}, "gamma 1.5"),
        ({"gamma": lambda epoch: 0.0}, "gamma 0.0"),
    ],
)
def test_settings_outside_of_their_intervals_are_refused(name, changes, said):
    with pytest.raises(ValueError, match=said):
        make(name, SampleState(12, columns(name)), **changes)


def test_a_gamma_below_1_without_a_state_is_refused_when_its_epoch_comes():
    """It would train with gamma = 1, silently."""
    with pytest.raises(ValueError, match=r"gamma 0\.5 needs .* give a state"):
        make("v3", None, gamma=lambda epoch: 0.5)
    later = make("v3", None, gamma=lambda epoch: 1.0 if epoch < 2 else 0.5)
    later.set_epoch(1)
    with pytest.raises(ValueError, match="give a state"):
        later.set_epoch(2)
    kept = set(individual.TEMPERATURE_COLUMNS)
    with pytest.raises(ValueError, match="give a state"):
        make("v2", SampleState(12, tuple(kept)), gamma=lambda epoch: 0.5)
    with pytest.raises(ValueError, match="tau_gradient 'nonsense': choose paper or published"):
        make("v1", None, tau_gradient="nonsense")


@pytest.mark.parametrize("name", ["v3", "v2"])
@pytest.mark.parametrize("b", [0, 1])
def test_a_global_batch_without_negatives_is_refused(name, b):
    with pytest.raises(ValueError, match=f"a global batch of {b} samples has no negatives"):
        make(name, SampleState(12, columns(name)))(inputs(b=b))


def test_half_a_reference_is_refused():
    whole = inputs()
    for missing in ("ref_image", "ref_text"):
        with pytest.raises(ValueError, match="give ref_image and ref_text, or neither"):
            make("v3", SampleState(12, columns("v3")))(replace(whole, **{missing: None}))


def test_rows_of_a_narrower_type_are_refused_before_a_step():
    with pytest.raises(ValueError, match=r"torch\.int32: give int64"):
        make("v3", SampleState(12, columns("v3")))(inputs(index=torch.arange(12, dtype=torch.int32)))
