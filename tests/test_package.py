"""The house: what may import what, and what works without Triton or a GPU."""

import ast
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imports(path):
    """Every module that a file names in an import, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_only_kernels_import_triton_and_only_ops_imports_kernels():
    for path in ROOT.glob("fastgpt/*.py"):
        names = set(imports(path))
        assert not any(n.split(".")[0] == "triton" for n in names), path
        assert path.name == "ops.py" or not any(n.startswith("fastgpt.kernels") for n in names), path
    for path in ROOT.glob("kernels/*.py"):
        assert not any(n.startswith("fastgpt") and not n.startswith("fastgpt.kernels") for n in imports(path)), path


def test_arrows_run_one_way():
    order = [
        "config",
        "micro_batch",
        "metrics",
        "reference",
        "ops",
        "optim",
        "verify",
        "tuned",
        "choose",
        "tokenizer",
        "prepare",
        "data",
        "model",
        "step",
        "checkpoint",
        "distributed",
        "graphs",
        "tune",
        "trainer",
        "sample",
        "cli",
    ]
    assert {p.stem for p in ROOT.glob("fastgpt/*.py")} - {"__init__"} == set(order)
    for i, name in enumerate(order):
        used = {n.split(".")[1] for n in imports(ROOT / f"fastgpt/{name}.py") if n.startswith("fastgpt.")}
        later = used & set(order[i:])
        assert not later or (name, later) == ("sample", {"cli"}), (name, later)  # sample runs as a module, too


def test_the_package_imports_without_triton_and_without_a_gpu():
    code = """import sys
sys.modules["triton"] = None
import fastgpt, fastgpt.cli, fastgpt.trainer, fastgpt.sample
fastgpt.GPT(fastgpt.GPTConfig(8, 8, 1, 1, 8))
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})


def test_the_kernels_folder_is_installed_under_our_name():
    import fastgpt.kernels

    assert Path(fastgpt.kernels.__file__).samefile(ROOT / "kernels/__init__.py")
    assert "fastgpt" in {e.name for e in distribution("fastgpt").entry_points}
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, cwd="/")
    assert done.returncode != 0, "the bare name `kernels` belongs to Hugging Face's package"
