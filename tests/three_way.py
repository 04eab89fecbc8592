"""The rule that a kernel is held to, `fastgpt.verify`'s, as an assertion."""

from fastgpt.verify import compare


def hold(op, reference, inputs, outputs, grads):
    """Hold op's outputs and every gradient of its inputs to the rule.

    op and reference take the same inputs and give a tuple of outputs, named by `outputs`; `grads` are the outputs' gradients,
    None where one is not to be differentiated. inputs by name; one that is None, or no floating tensor, is passed as it is.
    """
    for c in compare(op, reference, inputs, outputs, grads):
        assert c.holds, f"{c.what}: error {c.error:.3g}, PyTorch's {c.torch_error:.3g}, floor {c.floor:.3g}"
