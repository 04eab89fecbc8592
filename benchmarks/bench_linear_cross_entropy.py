"""The head with its loss, against eager, Inductor and Liger's fused linear cross entropy."""

from fastgpt.benchmarks.harness import Op, importable, needs_gpu
from fastgpt.records import Shape

SHAPES = [Shape(16, 1024, 768, 1, 50304), Shape(8, 1024, 1600, 1, 50304)]

linear_cross_entropy = Op("linear_cross_entropy", SHAPES, Shape(4, 64, 64, 1, 256))


@linear_cross_entropy.provider("liger")
def liger(it):
    needs_gpu("Liger-Kernel")
    loss = importable("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy

    def f(h, weight):
        return (loss(h.flatten(0, 1), weight.to(h.dtype), it.targets.flatten(), ignore_index=-1),)

    return f


test_linear_cross_entropy = linear_cross_entropy.benchmark()
