"""fastgpt: nanoGPT with its hot paths fused. `from fastgpt import GPT, GPTConfig`."""

from fastgpt.config import GPTConfig
from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig"]
