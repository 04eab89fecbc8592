"""fastgpt: nanoGPT with its hot paths fused, and the same kernels for a model of your own.

    from fastgpt import GPT, GPTConfig                  nanoGPT's model
    fastgpt.nn, fastgpt.ops, fastgpt.optim              modules, functions and AdamW for any model: docs/api.md

`fastgpt.kernels` has the Triton kernels themselves, and needs Triton.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt import nn, ops, optim
    from fastgpt.config import GPTConfig, UserError
    from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "UserError", "nn", "ops", "optim"]
HOMES = {"GPT": "fastgpt.model", "GPTConfig": "fastgpt.config", "UserError": "fastgpt.config"}


if not TYPE_CHECKING:  # a checker would take any name then

    def __getattr__(name):
        # Imported on first use: PyTorch takes seconds, and the command line must handle signals before; and the model imports the kernels,
        # which read TRITON_INTERPRET: `fastgpt verify` sets that first.
        if name in HOMES:
            return getattr(importlib.import_module(HOMES[name]), name)
        if name in (*__all__, "kernels"):
            return importlib.import_module(f"fastgpt.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
