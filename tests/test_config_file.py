"""Config files: what is read of one has the value that Python or TOML gives it, and nothing in one is run."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from fastgpt.config import TrainConfig, UserError
from fastgpt.config_file import Reader
from fastgpt.parse import parse_train

CPU = "--device=cpu"  # else a line says that it is


def settings(*argv):
    return parse_train([str(a) for a in argv])[0]


def refused(*argv):
    with pytest.raises(UserError) as e:
        settings(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


def read(text):
    """{name: value} of a Python text, as a run reads it."""
    found = Reader("a.py", TrainConfig().model_dump()).read(text, TrainConfig.model_fields)
    return {name: value for name, (value, _) in found.items()}


def test_a_config_file_is_read_as_nanogpts_are(tmp_path, capsys):
    """The forms that nanoGPT's own config/*.py use: comments, products, names, str(time.time())."""
    text = '''"""docstring"""
import time
# a comment
out_dir = "out-x"  # trailing
wandb_run_name='ft-' + str(time.time())
gradient_accumulation_steps = 5 * 8
learning_rate = -3e-4 * -1
min_lr = learning_rate/10
tokens = 2 ** 6 // 4
batch_size = tokens
lr_decay_iters = max_iters
decay_lr = not True
'''
    file = tmp_path / "finetune.py"
    file.write_text(text)
    got = settings(CPU, "--max_iters=7000", file)
    assert re.fullmatch(r"ft-\d{10}\.\d+", got.wandb_run_name)
    assert (got.out_dir, got.gradient_accumulation_steps, got.batch_size, got.decay_lr) == ("out-x", 40, 16, False)
    assert (got.learning_rate, got.min_lr, got.lr_decay_iters) == (3e-4, 3e-4 / 10, 7000)
    assert capsys.readouterr().out == f"Overriding config with {file}:\n{text}\n"


@pytest.mark.skipif(not os.environ.get("NANOGPT"), reason="NANOGPT does not name a checkout of nanoGPT")
def test_nanogpts_own_config_files():
    for file in sorted(Path(os.environ.get("NANOGPT", "."), "config").glob("*.py")):
        scope = {}
        exec(file.read_text(), scope)  # the oracle: what nanoGPT does with it
        got = settings(file).model_dump()
        expected = {k: v for k, v in scope.items() if k in got and k != "wandb_run_name"}
        assert expected
        assert {k: got[k] for k in expected} == expected, file


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("out_dir = f'out-{n_layer}x{n_embd}-{learning_rate:.0e}'", {"out_dir": "out-12x768-6e-04"}),
        ("out_dir = f\"{'a'!r:>5}{3:04d}{0.25:.1%}{1234567:,}{max_iters=}\"", {"out_dir": "  'a'000325.0%1,234,567max_iters=600000"}),
        ("w = 3\nout_dir = f'{n_layer:>{w}}|{{}}'", {"out_dir": " 12|{}"}),
        ("sizes = {'small': (4, 64), 'big': (12, 768)}\nn_layer, n_embd = sizes['small']", {"n_layer": 4, "n_embd": 64}),
        ("rates = [1e-3, 3e-4]\nlearning_rate = rates[-1]\nmin_lr = rates[0:1][0]", {"learning_rate": 3e-4, "min_lr": 1e-3}),
        ("names = ['a', 'b']\nextra = {'x': 1}\nbias = 'a' in names", {"bias": True}),
        ("betas = (0.9, 0.99)", {}),  # a collection that nothing uses
        ("if wandb_log and n_layer > 3:\n    bias = 1\nelif n_layer == 12:\n    bias = False\nelse:\n    os.exit()", {"bias": False}),
        ("if not wandb_log:\n    if 1 < n_layer <= 12 != 3:\n        seed = 3", {"seed": 3}),
        ("batch_size = 8 if device == 'cuda' else 2", {"batch_size": 8}),
        ("eval_seed = None\ncompile = eval_seed is not None or False", {"eval_seed": None, "compile": False}),
        ("learning_rate *= 2\nmax_iters -= 1\nmax_iters //= 2\nout_dir += '-x'",
         {"learning_rate": 12e-4, "max_iters": 299999, "out_dir": "out-x"}),
        ("n_layer = n_head = 3\nn_layer, n_head = n_head + 1, n_layer\n[seed, keep] = 1, 2",
         {"n_layer": 4, "n_head": 3, "seed": 1, "keep": 2}),
        ("max_iters: int = int(1e4) // max(2, 3)\nkeep = len('ab') << 1\nseed = round(abs(-2.6))",
         {"max_iters": 3333, "keep": 4, "seed": 3}),
        ("import torch\ndevice = 'cuda' if torch.cuda.is_available() else 'cpu'",
         {"device": "cuda" if torch.cuda.is_available() else "cpu"}),
        ("out_dir = 'a' * 3 + '-' * 2\npass", {"out_dir": "aaa--"}),
        ("name = 'x'; out_dir = 'out-' + name", {"out_dir": "out-x"}),
    ],
)  # fmt: skip
def test_what_users_of_nanogpt_write_is_read(text, names):
    scope = TrainConfig().model_dump()
    exec(text, scope)  # the oracle
    assert read(text) == names == {name: scope[name] for name in names}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("n_layer = 2\nfor i in (1, 2):\n    n_layer += i", "a.py, line 2: a config file is read, not run: only `name = value`, `if`"),
        ("out_dir = os.environ['HOME']", "a.py, line 1: 'os.environ' is not read"),
        ("out_dir = name", "a.py, line 1: 'name' has no value here"),
        ("import os\nout_dir = os.getcwd()", "a.py, line 2: 'os.getcwd()' is not called: a file is read, not run; what is called is str,"),
        ("if n_layer:\n    keep = 1\n    seed = 1 / 0", "a.py, line 3: ZeroDivisionError: division by zero"),
        ("n_layer = (2 +\n 'x')", "a.py, line 1: TypeError: unsupported operand"),
        ("a = [1]\na += [2]", "a.py, line 2: a list is not changed in place: write a = a + ..."),
        ("n_layer, n_head = 1", "a.py, line 1: '(n_layer, n_head)' takes 2 values"),
        ("n_layer = lambda: 3", "a.py, line 1: 'lambda: 3' is not read: a value is made of literals"),
        ("batch_sze = 3", "a.py, line 1: there is no setting 'batch_sze'; the nearest is 'batch_size'"),
        ("dim = 3\ndim *= 2", "a.py, line 2: there is no setting 'dim'; it is 'n_embd' here"),
        ("n_layer = [1]", "a.py, line 1: n_layer: [1] should be a valid integer"),
        ("n_layer = {'a': [1]}", "a.py, line 1: n_layer: {'a': [1]} should be a valid integer"),
    ],
)  # fmt: skip
def test_what_is_not_read_names_file_line_and_reason(tmp_path, monkeypatch, text, why):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(text)
    assert refused("a.py").startswith(why)


@pytest.mark.parametrize(
    "line",
    [
        "__import__('os').system('touch pwned')",
        "out_dir = __import__('os').getcwd()",
        "out_dir = open('x').read()",
        "exec('x = 1')",
        "for i in range(3): pass",
        "out_dir = [x for x in 'ab'][0]",
        "out_dir = 'a' * 10**9",
        "max_iters = 9 ** 9 ** 9",
        "max_iters = 1 / 0",
        "a = 2 ** 60; b = a ** 60; c = b ** 60; d = c ** 60",
        "out_dir = 'abcdefgh' + " + " + ".join(["'" + "x" * 99 + "'"] * 120),
        "max_iters = " + "1" * 5000,
        "out_dir = undefined_name",
        "import os; out_dir = os.sep",
        "out_dir = str(time.sleep(9))",
        "out_dir = [1].pop()",
        "def f(): return 1",
        "while True: pass",
        "with open('pwned', 'w'): pass",
        "out_dir = f'{open(1)}'",
        "out_dir = f'{1:>999999999}'",
        "out_dir = f'{1:.{9**9}f}'",
        "out_dir = '%999999999d' % 1",
        "max_iters = len([0] * 10**9)",
        "max_iters = len(9 * [[0] * 9999])",
        "max_iters = 1 << 10**9",
        "max_iters = round(1, -10**18)",
        "max_iters = (-8) ** 0.5",
        "max_iters = {}['x']",
        "max_iters = [1][2]",
        "a = [1]; a += [2]",
        "a = [1]; a[0] = 2",
        "out_dir = 1 is 1",
        "str = 3; out_dir = str(3)",
        "from base import *",
        "from base import n_layer, size",
        "import math as n_layer",
        "from base import maximum as max; n_layer = max(1, 2)",
        "del out_dir",
        "max_iters: int",
        "n_layer, n_head = 1, 2, 3",
        "n_layer, (n_head, n_embd) = 1, (2, 3)",
        "n_layer, *n_head = 1, 2, 3",
        "out_dir = (",
    ],
)
def test_a_config_file_is_never_run(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(f"\n{line}\n")
    assert refused("evil.py").startswith("evil.py, line 2: ")
    assert os.listdir() == ["evil.py"]


def test_a_config_file_too_deep_to_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("deep.py").write_text("max_iters = " + "1+" * 3000 + "1")
    assert refused("deep.py").startswith("deep.py, line 1: ")
    Path("deep.toml").write_text("max_iters = " + "[" * 3000)
    assert refused("deep.toml").startswith("deep.toml: not TOML")


@pytest.mark.parametrize("ending", ["py", "toml"])
def test_a_byte_order_mark_is_passed_over(tmp_path, ending):
    file = tmp_path / f"a.{ending}"
    file.write_bytes(b"\xef\xbb\xbfn_layer = 3\r\n")
    assert settings(file).n_layer == 3


def test_toml_may_have_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("seed = 1\n[model]\nn_layer = 3\nbias = true\n[optimizer]\nlearning_rate = 1e-3\n")
    got = settings("a.toml")
    assert (got.seed, got.n_layer, got.bias, got.learning_rate) == (1, 3, True, 1e-3)
    for text, why in (
        ("[model]\nn_layers = 3", "a.toml in [model]: there is no setting 'n_layers'; it is 'n_layer' here"),
        ("[model]\nn_layer = 'x'", "a.toml in [model]: n_layer: 'x' should be a valid integer"),
        ("[a]\nn_layer = 3\n[b]\nn_layer = 4", "a.toml: 'n_layer' stands in [a] and in [b]"),
        ("n_layer = 3\n[b]\nn_layer = 4", "a.toml: 'n_layer' stands at the top and in [b]"),
        ("[a.b]\nn_layer = 3", "a.toml in [a]: 'b' is a table in a table"),
        ("[[a]]\nn_layer = 3", "a.toml: there is no setting 'a'"),
        ("n_layer = [3]", "a.toml: n_layer: [3] should be a valid integer"),
    ):
        Path("a.toml").write_text(text)
        assert refused("a.toml").startswith(why)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.py",
            "n_layer = 2\nbatch_sze = 3\n",
            "a.py, line 2: there is no setting 'batch_sze'; the nearest is 'batch_size'",
        ),
        ("a.py", "n_layer = 'two'\n", "a.py, line 1: n_layer: 'two' should be a valid integer"),
        ("a.py", "n_layer = \n", "a.py, line 1: not Python"),
        ("a.toml", "n_layer = 2.5\n", "a.toml: n_layer: 2.5 should be a valid integer"),
        ("a.toml", "n_layers = 2\n", "a.toml: there is no setting 'n_layers'; it is 'n_layer' here"),
        ("a.toml", "n_layer : 2\n", "a.toml: not TOML"),
    ],
)
def test_a_wrong_setting_in_a_file_is_named_with_its_line(tmp_path, monkeypatch, name, text, said):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    assert refused(name).startswith(said)


# ---- any text of a small grammar, beside what Python makes of it ----

NAMES = st.sampled_from(["n_layer", "learning_rate", "out_dir", "bias", "a", "b", "c"])
LEAVES = st.one_of(
    NAMES, st.sampled_from(["0", "1", "2", "7", "-3", "0.5", "1e300", "True", "False", "None", "''", "'ab'", "[]", "()", "{}"])
)  # fmt: skip
SPECS = st.sampled_from(["", ":3", ":>4", ":.2f", ":,", ":03d", ":.1%", ":e", ":x", "!r", "!s:>3", ":{b}", ":*^9"])


def larger(inner):
    """Expressions that are made of others."""
    binary = ["+", "-", "*", "/", "//", "%", "<", "==", "!=", ">=", "in", "not in", "is", "and", "or"]
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(binary), inner),
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["**", "<<", ">>"]), st.sampled_from(["2", "-1", "0.5", "''"])
        ),
        st.builds("({} < {} <= {})".format, inner, inner, inner),
        st.builds("({}{})".format, st.sampled_from(["-", "+", "not "]), inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("({}, {})".format, inner, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:{}]".format, inner, inner, inner),
        st.builds("{}({})".format, st.sampled_from(["str", "int", "float", "len", "abs", "round", "max"]), inner),
        st.builds('f"""x{{{}{}}}"""'.format, NAMES, SPECS),
    )


VALUES = st.recursive(LEAVES, larger, max_leaves=5)
SIMPLE = st.one_of(
    st.builds("{} = {}".format, NAMES, VALUES),
    st.builds("{}, {} = {}, {}".format, NAMES, NAMES, VALUES, VALUES),
    st.builds("{}, {} = {}".format, NAMES, NAMES, VALUES),
    st.builds("{} {}= {}".format, NAMES, st.sampled_from("+-*/%"), VALUES),
)
BRANCHES = "if {}:\n    {}\nelif {}:\n    {}\nelse:\n    {}"
PROGRAMS = st.lists(
    st.one_of(SIMPLE, st.builds(BRANCHES.format, VALUES, SIMPLE, VALUES, SIMPLE, SIMPLE)), min_size=1, max_size=4
)
BOUNDS = "too large|within 64 bits|10,000|in place|write ==|write an f-string|the format .* is not read|complex"


def typed(value):
    """A value with the types in it, and nan equal to itself."""
    if isinstance(value, (list, tuple)):
        return type(value), [typed(v) for v in value]
    if isinstance(value, dict):
        return dict, [(typed(k), typed(v)) for k, v in value.items()]
    return type(value), repr(value)


def read_like_python(lines):
    """Whether a text is read: with Python's values then. It is refused if Python cannot run it, and else only beyond the bounds."""
    known = dict(n_layer=12, learning_rate=6e-4, out_dir="out", bias=False, a=2, b=3, c="x")
    text, scope, reader = "\n".join(lines), dict(known), Reader("a.py", known)
    try:
        exec(text, scope)
    except (Exception, MemoryError):
        scope = None
    try:
        reader.read(text, TrainConfig.model_fields)
    except UserError as e:
        fair = scope is None or re.search(BOUNDS, str(e))
        assert fair, f"{e}\n{text}"  # noqa: PT017
        return False
    assert scope is not None, text
    assert {k: typed(v) for k, v in reader.known.items()} == {k: typed(scope[k]) for k in reader.known}, text
    return True


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_a_text_is_read_as_python_has_it():
    read = []

    @effort(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(PROGRAMS)
    def hold(lines):
        read.append(read_like_python(lines))

    hold()
    assert sum(read) > 25  # most of the texts cannot be run at all


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@effort(max_examples=4_000, deadline=None, database=None)
@given(PROGRAMS)
def test_thousands_of_texts_are_read_as_python_has_them(lines):
    read_like_python(lines)
