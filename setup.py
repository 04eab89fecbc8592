"""Installs the packages fastgpt and, from the folder kernels/, fastgpt.kernels."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "fastgpt/__init__.py").read_text()).group(1)

test = [
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy>=2.4",
    "transformers",
    "peft",
    "numpy>=2",
]
bench = [
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",  # pyproject.toml's addopts name it
    "transformers",
    "liger-kernel; sys_platform == 'linux'",
    "quack-kernels; sys_platform == 'linux'",
]
setup(
    name="fastgpt",
    version=version,
    description="nanoGPT with its hot paths fused: same model, same loss curve, more tokens per second",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["fastgpt", "fastgpt.kernels", "fastgpt.benchmarks", "fastgpt.benchmarks.peers"],
    # `kernels` is a package of Hugging Face's on PyPI: ours goes under our own name (docs/decisions/0001). The link fastgpt/kernels tells
    # type checkers and editors the same, which read no package_dir.
    package_dir={"fastgpt": "fastgpt", "fastgpt.kernels": "kernels", "fastgpt.benchmarks": "benchmarks"},
    package_data={"fastgpt": ["py.typed", "plot.html"], "fastgpt.kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10; sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'",
        "tiktoken>=0.9",  # encode_to_numpy
        "numpy",
        "pydantic>=2.10",  # settings from files and flags, typed and bounded
        "tomli; python_version < '3.11'",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "test": test,
        "dev": [*test, "pre-commit>=4"],
        "bench": bench,
        "hf": ["transformers"],
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
    },
    entry_points={"console_scripts": ["fastgpt = fastgpt.cli:entry"]},
)
