"""The update in one pass: PyTorch's AdamW after its clipping, to the outside and to the last digits; nothing moved twice."""

from copy import deepcopy

import pytest
import torch

pytest.importorskip("triton")
import triton.runtime.interpreter as interpreter
from kernel_case import DEVICE, HALVES

from fastgpt import ops, optim
from fastgpt.kernels import adamw, configs
from fastgpt.model import GPT, GPTConfig
from fastgpt.shadows import Shadows

FUSED = DEVICE == "cuda"
SIZES = [(40, 7), (1,), (0,), (513,), (3, 5, 2)]  # a chunk and a bit, elements that no vector divides, one, none


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(configs, "ADAMW", configs.AdamWConfig(chunk=256, block=64, warps=2, clip_block=4))


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(size, device=DEVICE)) for size in SIZES]


def groups(params):
    return [{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2], "weight_decay": 0.0}]


def by(optimizer, implementation):
    """The optimizer, by PyTorch's update or the kernels'."""
    optimizer.kernels = ops.Kernels(adamw=implementation)
    return optimizer


def ours(params, implementation="triton", **settings):
    settings = dict(lr=0.01, betas=(0.9, 0.95), fused=FUSED) | settings
    return by(optim.AdamW(groups(params), **settings), implementation)


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
@pytest.mark.parametrize(
    "betas", [(0.9, 0.95), *(pytest.param(b, marks=pytest.mark.slow) for b in ((0.0, 0.999), (0.999, 0.0)))]
)
def test_steps_are_clipping_and_pytorchs_adamw(implementation, max_norm, betas):
    found, expected = parameters(), parameters()
    a, b = ours(found, implementation, betas=betas), theirs(expected, betas=betas)
    a.max_norm = max_norm
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


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_shadows_are_the_new_weights(implementation, dtype):
    params = parameters()
    a = ours(params, implementation, lr=0.5)
    for p in (params[0], params[3]):
        p.shadow = torch.full_like(p, float("nan"), dtype=dtype)
    for step in range(2):
        set_gradients(params, step)
        a.step()
        for p in (params[0], params[3]):
            assert torch.equal(p.shadow, p.detach().to(dtype))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_models_shadows_follow_its_weights(implementation):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 31, n_layer=1, n_head=1, n_embd=16)).to(DEVICE)
    model.set_kernels(f"adamw={implementation}")
    optimizer = model.configure_optimizers(0.1, 0.1, (0.9, 0.95), DEVICE)
    shadows = Shadows(model, torch.bfloat16)
    assert len(shadows.tensors) == 5  # four of the block, and the head
    frozen, before = model.transformer.h[0].mlp.c_fc.weight, deepcopy(model.state_dict())
    for wanted in (model.parameters(), [p for p in model.parameters() if p is not frozen]):
        for p in wanted:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.equal(shadow, w.detach().bfloat16()) for w, shadow in shadows.tensors.items())
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_parameter_without_a_gradient_is_left_alone(implementation):
    params = parameters()
    before = [p.detach().clone() for p in params]
    a = ours(params, implementation)
    a.step()  # none has one
    set_gradients(params, 0)
    params[0].grad = params[3].grad = None
    a.step()
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, False, True, True, False]
    assert not a.state[params[0]]


def test_odd_addresses_and_what_it_does_not_take():
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
    ops.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="adamw: triton does not take float16"):
        by(optim.AdamW([half], lr=0.1, fused=FUSED), "triton").step()
    assert (half < 1).all()


def test_nothing_is_read_or_written_beyond_its_tensor():
    """The kernel has addresses alone: what is of another shape, layout, dtype or device than it takes it for is PyTorch's."""
    p, takes = torch.ones(4, 3, device=DEVICE), adamw.takes
    good = dict(grads=p, exp_avgs=p, exp_avg_sqs=p, steps=torch.zeros((), device=DEVICE), shadows=p.half())

    def taken(other=None, **changed):
        group = {"params": [p], **{k: [t] for k, t in (good | changed).items()}}
        return takes(p, [group] if other is None else [group, other])

    assert taken()
    assert taken(shadows=None)
    for name in ("grads", "exp_avgs", "exp_avg_sqs"):
        for wrong in (p[:3], p.half(), torch.ones(3, 4, device=DEVICE).t(), p.double(), p.to("meta")):
            assert not taken(**{name: wrong}), (name, wrong.dtype, wrong.shape)
    for wrong in (
        torch.zeros(1, device=DEVICE),
        torch.zeros((), dtype=torch.float64, device=DEVICE),
        torch.zeros((), device="meta"),
    ):
        assert not taken(steps=wrong)
    for wrong in (p[:3].half(), torch.ones(3, 4, device=DEVICE).t().half(), p.half().to("meta")):
        assert not taken(shadows=wrong)
    two = {"params": [p, p], **{k: [t, t] for k, t in good.items()}}
    assert takes(p, [two])
    two["shadows"] = [p.half(), p.bfloat16()]
    assert not takes(p, [two])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_norm_beyond_fp32_is_measured_and_clips_nothing_where_nothing_is_to_be(implementation):
    params = parameters()
    a = ours(params, implementation)
    a.max_norm = float("inf")
    set_gradients(params, 0)
    params[3].grad[0] = 3e19
    a.step()
    assert not any(p.isnan().any() for p in params)
    assert a.grad_norm > 1e19


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_copies_and_groups_that_come_later_train_on(implementation):
    (first, later), (same, same_later) = (parameters()[:2] for _ in range(2))
    a = by(optim.AdamW([first], lr=0.1, fused=FUSED), implementation)
    b = torch.optim.AdamW([same], lr=0.1, fused=FUSED)
    for optimizer, p in ((a, later), (b, same_later)):
        optimizer.add_param_group({"params": [p]})
    a.max_norm = 1.0
    for step in range(2):
        for pair in ((first, later), (same, same_later)):
            set_gradients(pair, step, 10.0)
        norm = torch.nn.utils.clip_grad_norm_([same, same_later], 1.0)
        a.step()
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
    assert_near((first, later), (same, same_later))
    copy = deepcopy(a)
    copied = [p for group in copy.param_groups for p in group["params"]]
    for optimizer, params in ((a, (first, later)), (copy, copied)):
        set_gradients(params, 3, 10.0)
        optimizer.step()
    assert copy.kernels == a.kernels
    assert torch.equal(copy.grad_norm, a.grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(copied, (first, later), strict=True))


@pytest.mark.parametrize("setting", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_what_it_would_pass_over_is_refused(setting):
    params = parameters()[:1]
    set_gradients(params, 0)
    before = params[0].detach().clone()
    with pytest.raises(ValueError, match=f"this AdamW has no {setting}: take torch.optim.AdamW"):
        optim.AdamW(params, **{setting: True}).step()
    assert torch.equal(params[0], before)


def test_a_capture_of_an_update_is_refused(monkeypatch):
    params = parameters()[:1]
    set_gradients(params, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        optim.AdamW(params).step()


def test_where_an_infinity_was_found_nothing_changes():
    """As torch.amp.GradScaler leaves it to a fused optimizer: a flag on the device, and a scale that is still to be taken off."""
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


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_an_update_that_is_not_finite_changes_nothing(implementation, where, bad):
    params = parameters()
    params[0].shadow = params[0].detach().half()
    a = ours(params, implementation)
    a.max_norm, a.loss = 1.0, torch.ones((), device=DEVICE)
    set_gradients(params, 0)
    a.step()
    tensors = [*params, params[0].shadow, *(t for s in a.state.values() for t in s.values())]
    before = [t.clone() for t in tensors]
    set_gradients(params, 1)
    if where == "gradient":
        params[3].grad[-1] = float(bad)
    else:
        a.loss = torch.tensor(float(bad), device=DEVICE)
    a.step()
    assert a.grad_norm.isfinite() == (where == "loss")
    assert all(torch.equal(p, q) for p, q in zip(before, tensors, strict=True))
    set_gradients(params, 2)
    a.loss = torch.ones((), device=DEVICE)
    a.step()
    assert a.state[params[0]]["step"] == 2
    assert not any(torch.equal(p, q) for p, q in zip(before, tensors, strict=True) if p.numel())


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
    n = 2**17
    p = torch.nn.Parameter(torch.randn(n))
    p.grad = torch.randn(n)
    p.shadow = torch.empty(n, dtype=torch.bfloat16)
    a = by(optim.AdamW([p], lr=0.1), "triton")
    a.max_norm = 1.0
    a.step()
    assert moved["load"] == pytest.approx(20 * n, rel=0.01)
    assert moved["store"] == pytest.approx(14 * n, rel=0.01)
