"""The update in one pass: PyTorch's AdamW after its clipping, to the outside and to the last digits; nothing moved twice."""

from copy import deepcopy

import pytest
import torch

pytest.importorskip("triton")
import triton.runtime.interpreter as interpreter
from kernel_case import DEVICE

from fastgpt import ops, optim
from fastgpt.kernels import configs

FUSED = DEVICE == "cuda"
SIZES = [(40, 7), (1,), (0,), (513,), (3, 5, 2)]  # a chunk and a bit, elements that no vector divides, one, none


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(configs, "ADAMW", configs.AdamWConfig(chunk=256, block=64, clip_block=4))
    yield
    ops.use("torch")


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, device=DEVICE)) for size in SIZES]


def groups(params):
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]


def ours(params, **settings):
    return optim.AdamW(groups(params), **dict(lr=0.01, betas=(0.9, 0.95), fused=FUSED) | settings)


def theirs(params, **settings):
    return torch.optim.AdamW(groups(params), **dict(lr=0.01, betas=(0.9, 0.95), fused=FUSED) | settings)


def set_gradients(params, step, scale=1.0):
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(DEVICE)


def assert_near(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999), (0.999, 0.0)])
def test_steps_are_clipping_and_pytorchs_adamw(implementation, max_norm, betas):
    found, expected = parameters(), parameters()
    a, b = ours(found, betas=betas), theirs(expected, betas=betas)
    a.max_norm = max_norm
    ops.use({"adamw": implementation})
    for step in range(5):
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 0.01 * (step + 1)
        for params in (found, expected):
            set_gradients(params, step)
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
        a.step()
        b.step()
        if max_norm is not None:
            torch.testing.assert_close(a.grad_norm, norm)
            assert a.grad_norm.shape == ()
        assert_near(found, expected)
    for p, q in zip(found, expected, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert_near(a.state[p].values(), b.state[q].values())


def test_its_state_is_pytorchs_in_both_directions():
    """Checkpoints are nanoGPT's: what one optimizer saved, the other goes on with."""
    ops.use({"adamw": "triton"})
    found, expected = parameters(), parameters()
    a, b = ours(found), theirs(expected)
    for step in range(4):
        for params in (found, expected):
            set_gradients(params, step)
        a.step()
        b.step()
        saved_a, saved_b = deepcopy(a.state_dict()), deepcopy(b.state_dict())
        assert saved_a["param_groups"] == saved_b["param_groups"]
        assert saved_a["state"].keys() == saved_b["state"].keys()
        a, b = ours(found), theirs(expected)
        a.load_state_dict(saved_b)
        b.load_state_dict(saved_a)
    assert_near(found, expected)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_shadows_are_the_new_weights(implementation):
    ops.use({"adamw": implementation})
    params = parameters()
    a = ours(params, lr=0.5)
    a.shadows = {p: torch.full_like(p, float("nan"), dtype=torch.float16) for p in (params[0], params[3])}
    for step in range(2):
        set_gradients(params, step)
        a.step()
        for p, shadow in a.shadows.items():
            assert torch.equal(shadow, p.detach().half())


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_parameter_without_a_gradient_is_left_alone(implementation):
    ops.use({"adamw": implementation})
    params = parameters()
    before = [p.detach().clone() for p in params]
    a = ours(params)
    a.step()  # none has one
    set_gradients(params, 0)
    params[0].grad = params[3].grad = None
    a.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, True, True, False]
    assert not a.state[params[0]]


def test_odd_addresses_and_what_it_does_not_take():
    ops.use({"adamw": "triton"})
    found, expected = parameters(), parameters()
    a, b = ours(found), theirs(expected)
    for params in (found, expected):
        set_gradients(params, 0)
    for p in found:  # as views into a bucket, off by four bytes
        bucket = torch.zeros(p.numel() + 1, device=DEVICE)
        bucket[1:] = p.grad.flatten()
        p.grad = bucket[1:].view(p.shape)
    a.step()
    b.step()
    assert_near(found, expected)
    half = torch.nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    with pytest.warns(UserWarning, match="adamw: triton does not take float16"):
        optim.AdamW([half], lr=0.1, fused=FUSED).step()
    assert (half < 1).all()
    wide = torch.nn.Parameter(torch.ones(4, 3, device=DEVICE))
    wide.grad = torch.arange(12.0, device=DEVICE).view(3, 4).t()
    assert not ops.kernels("adamw").takes(
        wide, [dict(params=[wide], grads=[wide.grad], exp_avgs=[], exp_avg_sqs=[], steps=[], shadows=[])]
    )


def test_where_an_infinity_was_found_nothing_changes():
    """As torch.amp.GradScaler leaves it to a fused optimizer: a flag on the device, and a scale that is still to be taken off."""
    ops.use({"adamw": "triton"})
    params = parameters()
    a = ours(params)
    set_gradients(params, 0)
    a.step()
    before = [p.detach().clone() for p in params] + [t.clone() for s in a.state.values() for t in s.values()]
    set_gradients(params, 1, scale=float("inf"))
    a.max_norm, a.grad_scale, a.found_inf = 1.0, None, torch.ones((), device=DEVICE)
    a.step()
    after = [*params, *(t for s in a.state.values() for t in s.values())]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))

    scaled, plain = parameters(), parameters()
    for params, scale in ((scaled, 1024.0), (plain, 1.0)):
        a = ours(params)
        set_gradients(params, 0, scale)
        if scale > 1:
            a.grad_scale, a.found_inf = torch.tensor(scale, device=DEVICE), torch.zeros((), device=DEVICE)
        a.step()
    assert all(torch.equal(p, q) for p, q in zip(scaled, plain, strict=True))


def test_nan_shows():
    ops.use({"adamw": "triton"})
    params = parameters()
    a = ours(params)
    a.max_norm = 1.0
    set_gradients(params, 0)
    params[3].grad[-1] = float("nan")
    a.step()
    assert a.grad_norm.isnan()
    assert params[0].isnan().all(), "as in PyTorch, whose clipping multiplies all by nan"


def test_hooks_and_closures_are_pytorchs():
    params = parameters()
    a, seen = ours(params), []
    a.register_step_pre_hook(lambda *_: seen.append("before"))
    a.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        set_gradients(params, 0)
        return 3

    assert a.step(closure) == 3
    assert seen == ["before", "after"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU, not in the interpreter")
def test_34_bytes_an_element_move(monkeypatch):
    """4 for the norm; weight, gradient and moments in, all but the gradient and the shadow out. PyTorch's way moves 46."""
    moved = {"load": 0, "store": 0}

    def counted(kind, real):
        def call(self, ptrs, *args):
            mask = args[0] if kind == "load" else args[1]
            n = ptrs.data.size if mask is None else int(mask.data.astype(bool).sum())
            moved[kind] += n * ptrs.get_element_ty().primitive_bitwidth // 8
            return real(self, ptrs, *args)

        return call

    for kind in moved:
        name = f"create_masked_{kind}"
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, name, counted(kind, getattr(interpreter.InterpreterBuilder, name))
        )
    monkeypatch.setattr(configs, "ADAMW", configs.AdamWConfig())
    ops.use({"adamw": "triton"})
    n = 2**17
    p = torch.nn.Parameter(torch.randn(n))
    p.grad = torch.randn(n)
    a = optim.AdamW([p], lr=0.1)
    a.max_norm, a.shadows = 1.0, {p: torch.empty(n, dtype=torch.float16)}
    a.step()
    assert moved["load"] == pytest.approx(20 * n, rel=0.01)
    assert moved["store"] == pytest.approx(14 * n, rel=0.01)
