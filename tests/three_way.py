"""The rule that a kernel is held to: against fp64, at most twice the error of the same maths in PyTorch at the same dtypes.

The floor is four units in the last place of the largest element: on few elements PyTorch's own error may be near nothing.
"""

import torch


def within(kernel, torch_same, exact, what):
    """Assert the rule for one tensor: the kernel's, PyTorch's at the same dtypes, and the fp64 one."""
    assert kernel.dtype == torch_same.dtype, f"{what}: {kernel.dtype}, not {torch_same.dtype}"
    assert kernel.shape == exact.shape, f"{what}: shape {tuple(kernel.shape)}, not {tuple(exact.shape)}"
    assert not kernel.isnan().any(), f"{what}: nan (an element was never written, or the maths failed)"
    error, allowed = ((t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (kernel, torch_same))
    floor = 4 * torch.finfo(kernel.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    assert error <= 2 * allowed + floor, f"{what}: error {error:.3g}, PyTorch's {allowed:.3g}, floor {floor:.3g}"


def hold(op, reference, inputs, grads, names):
    """Hold op's outputs and every gradient of its inputs to the rule.

    op and reference take the same inputs and give a tuple of outputs; `grads` are the outputs' gradients, None where one
    is not to be differentiated. An input that is None, or no floating tensor, is passed as it is.
    """
    results = {}
    for kind, f in (("kernel", op), ("torch", reference), ("exact", reference)):
        args = []
        for x in inputs:
            if not (torch.is_tensor(x) and x.is_floating_point()):
                args.append(x)
                continue
            # A detached alias keeps the strides that are under test; fp64 needs none.
            leaf = x.detach().double() if kind == "exact" else x.detach()
            args.append(leaf.requires_grad_())
        outputs = f(*args)
        pairs = [
            (o, g.double() if kind == "exact" else g) for o, g in zip(outputs, grads, strict=True) if g is not None
        ]
        torch.autograd.backward(*zip(*pairs, strict=True))
        results[kind] = [o.detach() for o in outputs] + [a.grad for a in args if torch.is_tensor(a) and a.requires_grad]
    assert len(names) == len(results["kernel"])
    for what, kernel, same, exact in zip(names, *results.values(), strict=True):
        within(kernel, same, exact, what)
