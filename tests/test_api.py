"""docs/api.md: its examples run, and it leaves out no public name."""

import inspect
import re
from pathlib import Path

import fastgpt
from fastgpt import nn, ops

PAGE = Path(__file__).parents[1] / "docs/api.md"
EXAMPLES = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def test_every_example_runs(workdir):
    """In order, in one session, as a reader would type them."""
    text, session = PAGE.read_text(), {}
    found = list(EXAMPLES.finditer(text))
    assert len(found) == text.count("```python")
    for example in found:
        line = text.count("\n", 0, example.start()) + 1
        exec(compile("\n" * line + example[1], PAGE, "exec"), session)


def test_every_public_name_has_a_section_with_its_arguments():
    text = PAGE.read_text()
    for module, prefix in ((nn, ""), (ops, "ops.")):
        for name in set(module.__all__) - {"AUTO", "OPS", "TORCH"}:
            section = re.search(rf"^### {re.escape(prefix + name)}\n(.*?)(?=^##|\Z)", text, re.M | re.S)
            assert section, name
            assert EXAMPLES.search(section[1]), f"{name}: no example"
            said = re.search(rf"^`{name}\((.*?)\)`", section[1].replace("\n", " ").strip(), re.M)[1]
            arguments = [
                p for p in inspect.signature(getattr(module, name)).parameters if p not in ("kernels", "squares")
            ]
            for argument in arguments:
                assert re.search(rf"\b{argument}\b", said), f"{name}: {argument}"
    for name in fastgpt.__all__:
        assert re.search(rf"^## .*\b{name}\b", text, re.M), name
