"""The house: what may import what, and what works without Triton or a GPU."""

import ast
import functools
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import distribution
from pathlib import Path

import pytest
from pages import copy_of_the_clone, own_environment

ROOT = Path(__file__).parents[1]
PACKAGES = {"fastgpt": "fastgpt", "fastgpt.kernels": "kernels"}
FILES = {
    package if path.stem == "__init__" else f"{package}.{path.stem}": path
    for package, folder in PACKAGES.items()
    for path in (ROOT / folder).glob("*.py")
}


@functools.cache
def imports(path, whole=True):
    """The modules that a file names in an import: anywhere in it, or only where it runs as the file is imported."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if whole else statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in FILES else node.module for name in names}
    return found


def statements(node):
    """The statements that run as a file is imported: of no function, and not for a type checker alone."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, (ast.FunctionDef, ast.Lambda))
        if not later and not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            yield child
            yield from statements(child)


def reached(module):
    """All of fastgpt's modules that importing one of them may ever import, itself left out."""
    found, todo = set(), [module]
    while todo:
        todo += (new := FILES.keys() & imports(FILES[todo.pop()]) - found)
        found |= new
    return found - {module}


def test_only_kernels_import_triton_and_only_ops_imports_kernels():
    for name, path in FILES.items():
        names = imports(path)
        if name.startswith("fastgpt.kernels"):
            assert not any(n.startswith("fastgpt") and not n.startswith("fastgpt.kernels") for n in names), name
        else:
            assert not any(n.split(".")[0] == "triton" for n in names), name
            assert name == "fastgpt.ops" or not any(n.startswith("fastgpt.kernels") for n in names), name


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter({name: FILES.keys() & imports(path, whole=False) for name, path in FILES.items()}).prepare()


def test_arrows_run_one_way():
    """From the command to the maths; what a function imports when it is called counts too."""
    chain = [f"fastgpt.{name}" for name in ("cli", "trainer", "step", "model", "ops", "reference")]
    assert all(later in reached("fastgpt.cli") for later in chain[1:])
    for i, name in enumerate(chain):
        assert not reached(name) & set(chain[:i]), name
    assert {"fastgpt.reference", "fastgpt.kernels"} <= reached("fastgpt.ops")


def test_no_test_imports_from_another():
    for path in ROOT.glob("tests/*.py"):
        assert not any(n.startswith("test_") for n in imports(path)), path


def test_it_works_without_triton_and_without_a_gpu():
    code = """import sys
sys.modules["triton"] = None
import fastgpt
assert not {"fastgpt.ops", "fastgpt.kernels"} & sys.modules.keys()
import fastgpt.cli, fastgpt.sample, fastgpt.trainer, fastgpt.verify, fastgpt.tune
import pytest, torch
from fastgpt import ops
model = fastgpt.GPT(fastgpt.GPTConfig(8, 8, 1, 1, 8))
assert model.set_kernels("auto") == ops.TORCH
with pytest.raises(ops.UserError, match="Triton is not installed"):
    model.set_kernels("triton")
with ops.accumulate_in_place():
    model(torch.zeros(1, 8).long(), torch.zeros(1, 8).long(), return_logits=False)[1].backward()
assert all(p.grad is not None for p in model.parameters())
model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").step()
assert fastgpt.cli.main(["verify"]) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})


def test_a_missing_package_is_named():
    """Only a missing Triton means PyTorch's operators; what else is missing is not hidden behind that."""
    for module, hidden in (
        ("pydantic", "pydantic"),
        ("fastgpt.ops", "fastgpt.kernels.adamw"),
        ("fastgpt.ops", "numpy"),
    ):
        code = f"import sys; sys.modules[{hidden!r}] = None; import fastgpt.config, {module}, fastgpt.data"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert hidden in last or hidden.rpartition(".")[2] in last, last


def test_the_kernels_folder_is_installed_under_our_name():
    import fastgpt.kernels

    assert Path(fastgpt.kernels.__file__).samefile(ROOT / "kernels/__init__.py")
    assert "fastgpt" in {e.name for e in distribution("fastgpt").entry_points}
    done = subprocess.run([sys.executable, "-c", "import kernels"], capture_output=True, cwd="/")
    assert done.returncode != 0, "the bare name `kernels` belongs to Hugging Face's package"


def test_the_citation_is_of_this_version():
    import fastgpt

    assert f"\nversion: {fastgpt.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def build(folder, hook, out):
    """Call a hook of setuptools in a folder, as a front end does: the path of what it builds."""
    code = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", code, hook, out], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_that_of_the_checkout_and_works_elsewhere(tmp_path):
    """.ci/wheel does the same, and more, in an environment that has nothing else."""
    copy_of_the_clone(tmp_path / "clone")
    sdist = build(tmp_path / "clone", "build_sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in (
        "tests/conftest.py",
        "tests/ptx/machine.py",
        "docs/kernels.md",
        "examples/shakespeare_char.sh",
        "benchmarks/on_gpu.sh",
    ):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
    wheel = build(unpacked, "build_wheel", tmp_path)
    shutil.rmtree(tmp_path / "clone/fastgpt.egg-info", ignore_errors=True)
    (tmp_path / "other").mkdir()
    found = contents(wheel)
    assert found == contents(build(tmp_path / "clone", "build_wheel", tmp_path / "other"))
    assert {name.split("/")[0] for name in found} == {"fastgpt", f"{sdist.name.removesuffix('.tar.gz')}.dist-info"}
    assert {f"fastgpt/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")} <= found.keys()
    assert {"fastgpt/py.typed", "fastgpt/kernels/py.typed", "fastgpt/benchmarks/bench_train.py"} <= found.keys()

    programs = own_environment(tmp_path / "venv")
    subprocess.run([programs / "pip", "install", "-q", "--no-deps", wheel], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    for words in (
        "train --preset=tiny --device=cpu --max_iters=2 --eval_iters=1 --out_dir=out",
        "sample --out_dir=out --device=cpu --num_samples=1 --max_new_tokens=5",
        "bench roofline --preset=gpt2 --gpu=H200",
    ):
        done = subprocess.run(
            [programs / "fastgpt", *words.split()], cwd=tmp_path, env={**environment, "FASTGPT_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, words + done.stdout + done.stderr
    where = subprocess.run(
        [programs / "python", "-c", "import fastgpt.kernels; print(fastgpt.kernels.__file__)"], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert str(tmp_path / "venv") in where.stdout


@pytest.mark.slow
def test_beside_the_clone_an_editable_install_is_found(tmp_path):
    """The clone's folder, of the same name, is no package; another clone's package on the path still comes first."""
    pytest.importorskip("setuptools")
    clone, wheels, site = tmp_path / "fastgpt", tmp_path / "wheels", tmp_path / "site"
    for name in ("fastgpt", "kernels", "benchmarks"):
        (clone / name).mkdir(parents=True)
        (clone / name / "__init__.py").write_text(f"which = {name!r}")
    (clone / "fastgpt/__init__.py").write_text('__version__ = "1"')
    (clone / "benchmarks/peers").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = f"from setuptools.build_meta import build_editable as build; build({str(wheels)!r})"
    wheels.mkdir()
    done = subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import site; site.addsitedir({str(site)!r}); import fastgpt, fastgpt.kernels as k; print(fastgpt.__file__, k.which)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    (tmp_path / "other/fastgpt/kernels").mkdir(parents=True)
    (tmp_path / "other/fastgpt/__init__.py").write_text("")
    (tmp_path / "other/fastgpt/kernels/__init__.py").write_text("which = 'another'")
    for folder, found, kernels in ((tmp_path, clone, "kernels"), (tmp_path / "other", tmp_path / "other", "another")):
        run = [sys.executable, "-S", "-c", code]  # without what else is installed here
        done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [str(found / "fastgpt/__init__.py"), kernels], done.stderr
    metadata = zipfile.ZipFile(wheel).read(
        next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("/METADATA"))
    )
    assert b"Classifier: Environment :: GPU :: NVIDIA CUDA" in metadata
    assert b"# fastgpt" in metadata
    assert b"](docs/quickstart.png)" not in metadata
