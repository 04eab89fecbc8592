"""The command line itself: its help, what it prints of settings, its completion, and what it does without."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt as package
from fastgpt import cli, completion, usage
from fastgpt.config import SampleConfig, TrainConfig
from fastgpt.parse import parse, parse_train

SCHEMAS = completion.schemas()


def printed(capsys, *words):
    """What a command line prints that ends by itself, with status 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        cli.main([*map(str, words)])
    assert e.value.code == 0
    return capsys.readouterr().out


def script(code, **environment):
    """Run Python code in a process of its own, in this folder: what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- help ----


@pytest.mark.parametrize("command", [c for c in SCHEMAS if c != "bench count"])  # that runs in a process of its own
def test_help_lists_every_flag_in_groups_with_its_kind_its_default_and_a_line(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    text, schema = printed(capsys, *command.split(), "--help"), SCHEMAS[command]
    assert text.startswith(f"usage: fastgpt {command} ") or command == "bench"
    assert not any(line != line.rstrip() or len(line) > 100 for line in text.splitlines())
    assert not re.search("LITERAL|VALUE|UNION|last group", text)
    one_line = re.sub(r"\s+", " ", text)
    for name, field in schema.model_fields.items():
        default = field.get_default(call_default_factory=True)
        row = f"--{name}={usage.kind(field)} {field.description} (default: {default!r})"
        assert re.sub(r"\s+", " ", row) in one_line
    assert [title for title in re.findall(r"^([\w ]+):$", text, re.MULTILINE) if title not in ("help", "examples")] == [
        *usage.groups(schema)
    ]


def test_the_kinds_of_flags_are_named():
    kinds = {name: usage.kind(field) for name, field in TrainConfig.model_fields.items()}
    expected = dict(
        n_layer="INT", dropout="FLOAT", eval_seed="INT", save_minutes="FLOAT", compile="BOOL", out_dir="PATH", device="TEXT",
        micro_batch="INT|TEXT", dtype="{float32,bfloat16,float16}", residual="{fp32,bf16}",
    )  # fmt: skip
    assert {name: kinds[name] for name in expected} == expected
    assert kinds["preset"].startswith("{quickstart,gpt2,")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_groups_and_examples_are_of_settings_that_there_are(schema, tmp_path, monkeypatch):
    """A group begins at a setting; each example is a command line that is understood."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgpt.trainer.train", lambda *_: None)
    assert schema.GROUPS.keys() <= schema.model_fields.keys()
    assert sum(map(len, usage.groups(schema).values())) == len(schema.model_fields)
    assert schema.EXAMPLES
    for example in schema.EXAMPLES:
        words = example.partition("#")[0].replace("torchrun --standalone --nproc_per_node=8 train.py", "fastgpt train")
        program, *words = words.split()
        assert program == "fastgpt"
        name = " ".join(words[:2]) if " ".join(words[:2]) in SCHEMAS else words[0]
        flags = [
            w for w in words[len(name.split()) :] if w.startswith("-") or not (w.endswith(".json") or name == "plot")
        ]
        for file in (w for w in flags if w.endswith(".py")):
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).write_text("")
        if "'" not in example:
            parse(SCHEMAS[name], [w for w in flags if w != "--print_config"], "")


def test_help_and_version_come_without_pytorch(tmp_path):
    code = """import sys
from fastgpt.cli import main
assert main({words}) == 0
assert not {{"torch", "pydantic", "numpy"}} & sys.modules.keys()
"""
    for words, says in (
        (["--version"], f"fastgpt {package.__version__}\n"),
        (["-V"], f"fastgpt {package.__version__}\n"),
        (["--help"], cli.USAGE),
        (["help"], cli.USAGE),
        ([], cli.USAGE),
    ):
        assert script(code.format(words=words)) == says
    done = subprocess.run([sys.executable, "-m", "fastgpt", "-V"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"fastgpt {package.__version__}\n")


def test_streams_that_are_closed_end_nothing(monkeypatch):
    """As by `>&- 2>&-`: Python has None then."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["--version"]) == 0
    assert cli.main(["trian"]) == 2
    sys.stdout.close(), sys.stderr.close()


def test_help_of_a_command(capsys):
    for command in ("train", "bench compare"):
        assert printed(capsys, "help", *command.split()) == printed(capsys, *command.split(), "--help")
    assert cli.main(["help", "completion"]) == 0
    assert capsys.readouterr().out.startswith("usage: fastgpt completion {bash,zsh,fish}")


def test_every_command_of_the_help_is_one():
    assert {name.split()[0] for name in SCHEMAS} | {"completion", "help"} == cli.COMMANDS.keys()
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} ", cli.USAGE, re.MULTILINE)


# ---- --print_config ----


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--preset=tiny", "--n_layer=12"],
        ["--preset=gpt2-medium", "--init_from=some/folder", "--eval_seed=3"],
        ["a.py", "--micro_batch=24"],
        ['--dataset=it\'s \\ "so"\n', "--save-minutes=1e-3", "--seed=9223372036854775807", "--out_dir=~"],
    ],
)
def test_a_printed_config_gives_the_same_settings_again(capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("batch_size = 2 * 4\nlearning_rate = 0.1\n")
    first, given = parse_train(words)
    Path("b.py").write_text(printed(capsys, "train", *words, "--print_config"))
    again, given_again = parse_train(["b.py"])
    assert again == first
    assert given_again == given | ({"preset"} if first.preset else set()), "a default counts as given"
    assert not [*tmp_path.glob("out*")], "nothing was trained"


@pytest.mark.parametrize("command", [c for c in SCHEMAS if c not in ("train", "inspect", "bench count")])
def test_every_command_prints_its_config(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text(printed(capsys, *command.split(), "--print-config"))
    capsys.readouterr()
    assert parse(SCHEMAS[command], ["a.py"], "")[0] == parse(SCHEMAS[command], [], "")[0]
    assert os.listdir() == ["a.py"]


def test_settings_that_cannot_be_are_not_printed(fastgpt):
    status, out, err = fastgpt("train", "--n_head=5", "--n_embd=384", "--print_config")
    assert (status, out) == (2, "")
    assert "--n_head=5" in err


# ---- completion ----

BASH = """
source completion.bash
COMP_LINE=$1 COMP_POINT=${#1} COMP_WORDS=($1)
_fastgpt
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_flags_choices_and_files(fastgpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("completion.bash").write_text(fastgpt("completion", "bash")[1])
    for file in ("config/a b.py", "config/c.toml", "config/d.txt"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("")

    def completed(line):
        return subprocess.run(["bash", "-c", BASH, "", line], capture_output=True, text=True).stdout.split("\n")[:-1]

    assert completed("fastgpt ") == [*cli.COMMANDS, "--help", "--version"]
    assert completed("fastgpt tr") == ["train"]
    assert completed("fastgpt train --n_") == ["--n_layer=", "--n_head=", "--n_embd="]
    assert completed("fastgpt train --n_layer=3 --dtype=b") == completed("fastgpt train --dtype b") == ["bfloat16"]
    assert completed("fastgpt train --compile=") == ["True", "False"]
    assert completed("fastgpt train --n_layer=") == [""]
    assert completed("fastgpt train con") == ["config"]
    assert completed("fastgpt train config/") == ["config/a b.py", "config/c.toml"]
    assert completed("fastgpt train --out_dir=config/d") == ["config/d.txt"]
    assert completed("fastgpt sample --num") == ["--num_samples="]
    assert completed("fastgpt plot --x=t") == ["tokens"]
    assert completed("fastgpt bench r") == ["report", "roofline"]
    assert completed("fastgpt bench compare --th") == ["--threshold="]
    assert completed("fastgpt bench --th") == [""]
    assert completed("fastgpt completion z") == ["zsh"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_completion_script_names_every_flag_and_is_one(fastgpt, tmp_path, shell):
    status, text, _ = fastgpt("completion", shell)
    assert status == 0
    for schema in SCHEMAS.values():
        for name in schema.model_fields:
            assert re.search(rf"-l {name} " if shell == "fish" else rf"--{name}=", text)
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_a_shell_that_is_none(fastgpt):
    for words, says in ((["bahs"], "the nearest is 'bash'"), (["tcsh"], "one of bash, zsh, fish"), ([], "one of bash")):
        status, _, err = fastgpt("completion", *words)
        assert status == 2
        assert says in err


# ---- what is not there ----


@pytest.mark.slow
def test_bench_needs_pytest_only_where_it_measures(tmp_path):
    """Without pytest and pytest-benchmark its other commands work; measuring says what to install."""
    code = """import sys
sys.modules["pytest"] = sys.modules["pytest_benchmark"] = None
from fastgpt.cli import main
for words in (["--help"], ["roofline"], ["scaling"], ["compare", "--help"], ["report", "--help"], ["count", "--help"]):
    try:
        assert main(["bench", *words]) == 0
    except SystemExit as e:
        assert e.code == 0
assert main(["bench"]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == (
        "fastgpt: error: bench: pytest and pytest-benchmark are not installed; pip install pytest pytest-benchmark\n"
    )


def test_a_sample_takes_the_device_that_is_there(monkeypatch):
    monkeypatch.setattr("fastgpt.config.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("fastgpt.config.gpu_files", list)
    assert SampleConfig().device == "cpu"
    monkeypatch.setattr("fastgpt.config.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("fastgpt.config.torch.cuda.is_bf16_supported", lambda: True)
    assert SampleConfig().device == "cuda"
