"""Triton kernels, installed as `fastgpt.kernels`: one file per op, imported only by `fastgpt.ops`.

Empty for now: every op runs its plain-PyTorch twin in `fastgpt/reference.py`.
"""
