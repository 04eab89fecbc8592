"""README.md and docs/: every command is run as written, every flag is one that there is, every link leads somewhere."""

import ast
import re

import pytest
from pages import PAGES, REASONS, ROOT, blocks, check, commands, run_page

TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NAMES = [str(p.relative_to(ROOT)) for p in PAGES]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@pytest.mark.slow
@pytest.mark.parametrize("page", [n for n in NAMES if any(b.why is None for b in blocks(ROOT / n, "sh", "python"))])
def test_every_command_runs_as_written(page, tmp_path, tmp_path_factory, record_property):
    """The blocks of a page in order, in an empty folder or a fresh copy of the clone. All pages share the embedded text."""
    shared = tmp_path_factory.getbasetemp().parent / "docs-cache"
    record_property("page", run_page(ROOT / page, tmp_path, shared))


@pytest.mark.parametrize("page", NAMES)
def test_a_block_is_left_out_for_a_reason_that_counts(page):
    for block in blocks(ROOT / page, "sh", "python"):
        assert block.why is None or re.fullmatch(REASONS, block.why), f"{block}: {block.why}"
    marks = (ROOT / page).read_text().count("<!-- not run:")
    assert marks == sum(b.why is not None for b in blocks(ROOT / page, "sh", "python")), (
        "a mark stands on the line before its block"
    )


@pytest.mark.parametrize("page", NAMES)
def test_every_command_parses(page):
    """Also those of blocks that are not run, and of transcripts."""
    for block in blocks(ROOT / page, "sh", ""):
        text = block.text if block.kind else "\n".join(re.findall(r"^\$ (.*)", block.text, re.M))
        for words in commands(text):
            assert check(words) == "", f"{block}: {' '.join(words)}"
    for block in blocks(ROOT / page, "python"):
        ast.parse(block.text)


PAGE = """
```sh
fastgpt train --n_layer=2 # a comment, with an apostrophe's quote
MASTER_PORT=1 torchrun --nproc_per_node=8 \\
    train.py --n_head=2 && cat <<'END' | fastgpt sample --seed=3 > out.txt
fastgpt nothing
END
srun bash -c 'RANK=$X exec python train.py --n_embd=4'
```

<!-- not run: needs luck -->
```sh
python -m fastgpt.cli verify
```

```python
1 / 0
```
"""


def test_no_command_is_overlooked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = blocks(page, "sh", "python")
    assert [(block.kind, block.line, block.why) for block in found] == [
        ("sh", 2, None),
        ("sh", 12, "needs luck"),
        ("python", 16, None),
    ]
    assert [" ".join(words) for block in found[:2] for words in commands(block.text)] == [
        "train --n_layer=2", "train --n_head=2", "sample --seed=3", "train --n_embd=4", "verify",
    ]  # fmt: skip
    assert check(["train", "--n_layer=2", "config/of_yours.py"]) == ""
    assert "--n_layers=2" in check(["train", "--n_layers=2"])
    assert "--n_layer" in check(["train", "--n_layer=two"])
    assert "there is no command" in check(["trian"])


@pytest.mark.parametrize(
    "text", ["```sh\ntrue\nfalse\ntrue\n```\n", "```sh\ntrue\n```\n```python\nprint(1 / 0)\n```\n"]
)
def test_a_block_that_fails_is_seen(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match=r"exit status 1 of page\.md, line"):
        run_page(page, tmp_path / "run", tmp_path)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug + f"-{found.count(slug)}" * (slug in found))
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def flags_there_are():
    """The flags of all our commands: the fields of every schema in a module of ours."""
    found = set()
    for path in [*ROOT.glob("fastgpt/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text()
        found |= set(re.findall(r"^ +(\w+): .*Field\(", text, re.M)) | set(re.findall(r'"--([\w-]+)', text))
    return found


MADE_UP = {"kernels/rms_norm.py"}  # files of examples
OTHERS = {  # flags of other programs, which the pages name
    "help", "version", "benchmark-disable", "local-dir", "repo-type", "standalone", "nproc_per_node", "max_restarts", "nnodes",
    "signal", "signals-to-handle", "gpus", "requeue", "wheels",
}  # fmt: skip


@pytest.mark.parametrize("page", NAMES)
def test_every_flag_and_file_in_backticks_is_there(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    known, folders = flags_there_are() | OTHERS, {p.name for p in ROOT.iterdir() if p.is_dir()} - {"data"}
    for span in re.findall(r"`([^`]+)`", text):
        for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", span):
            assert flag in known, f"{page}: `{span}`"
        for word in re.findall(r"(?<![\w./<-])[\w./-]+\.\w+(?![\w<*{])", span):
            if word.split("/")[0] in folders and "/" in word and word not in MADE_UP:
                assert (ROOT / word).exists(), f"{page}: `{span}`"
