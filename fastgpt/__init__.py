"""fastgpt: nanoGPT with its hot paths fused. `from fastgpt import GPT, GPTConfig`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt.config import GPTConfig
    from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig"]


def __getattr__(name):
    if name in __all__:
        # Imported on first use: PyTorch takes seconds, and the command line must handle signals before; and the model imports the
        # kernels, which read TRITON_INTERPRET: `fastgpt verify` sets that first.
        return getattr(importlib.import_module("fastgpt.model" if name == "GPT" else "fastgpt.config"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
