"""Triton kernels, installed as `fastgpt.kernels`: one file per op, imported only by `fastgpt.ops`."""
