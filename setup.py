"""Installs the packages fastgpt and, from the folder kernels/, fastgpt.kernels."""

import re
from pathlib import Path

from setuptools import setup

try:
    from setuptools.command import editable_wheel
except ImportError:  # as in a setuptools that is to come: editable installs are then its own
    editable_wheel = None

# Beside a clone, whose folder has the package's name, Python takes that folder for a package without an __init__.py before it asks
# setuptools' finder of editable installs. This one comes first, and speaks only in that case.
BEFORE_FOLDERS = """

class _BeforeFolders:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if path is None and fullname in MAPPING:
            found = PathFinder.find_spec(fullname)
            if found is None or found.origin is None:
                return _EditableFinder.find_spec(fullname)
        return None


_install = install


def install():
    _install()
    sys.meta_path.insert(0, _BeforeFolders)
"""
template = getattr(editable_wheel, "_FINDER_TEMPLATE", "")  # setuptools' own text: another version may have another
if all(part in template for part in ("import sys", "PathFinder", "MAPPING", "class _EditableFinder", "def install():")):
    editable_wheel._FINDER_TEMPLATE = template + BEFORE_FOLDERS

here = Path(__file__).parent
readme = (here / "README.md").read_text(encoding="utf-8")
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
    "pyarrow",
    "tensorboard",
    "wandb",
    "setuptools>=77",  # tests build the package, without a network
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
    long_description=re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", readme),  # its links lead into the checkout
    long_description_content_type="text/markdown",
    author="the fastgpt authors",
    license="MIT",
    keywords=["nanogpt", "gpt", "transformer", "language model", "triton", "cuda", "kernels", "pytorch", "training"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
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
        "hf": ["huggingface_hub", "safetensors", "tokenizers"],
        "parquet": ["pyarrow"],  # `prepare` of .parquet
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
    },
    entry_points={"console_scripts": ["fastgpt = fastgpt.cli:entry"]},
)
