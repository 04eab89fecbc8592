"""fastgpt: nanoGPT with its hot paths fused. `from fastgpt import GPT, GPTConfig`."""

from typing import TYPE_CHECKING

from fastgpt.config import GPTConfig

if TYPE_CHECKING:
    from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig"]


def __getattr__(name):
    if name == "GPT":
        # Imported on first use: the model imports the kernels, which read TRITON_INTERPRET. `fastgpt verify` sets that first.
        from fastgpt.model import GPT

        return GPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
