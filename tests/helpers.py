"""What more than one test module calls: nanoGPT's way to generate, and token files with llm.c's header."""

import numpy as np
import torch

from fastgpt.model import sample_token


def uncached(model, idx, n, **how):
    """generate as nanoGPT does it: the whole window, every token."""
    for _ in range(n):
        logits, _ = model(idx[:, -model.config.block_size :])
        idx = torch.cat((idx, sample_token(logits[:, -1], **how)), dim=1)
    return idx


def write_shard(path, tokens, magic=20240520, version=1, dtype="<u2", count=None):
    """A file of tokens as llm.c writes it; count is what its header promises."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=dtype).tobytes())
