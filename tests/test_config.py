"""Settings: nanoGPT's flags, defaults and config files, the presets, and what is said of a wrong one."""

import ast
import os
import re
from pathlib import Path

import pytest

from fastgpt.config import MODEL_SIZES, SampleConfig, TrainConfig, UserError, default_dtype, preset
from fastgpt.parse import parse, parse_train

NANOGPT_DEFAULTS = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True, init_from="scratch",
    wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1,
    beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend="nccl",
    device="cuda", dtype=default_dtype(), compile=True,
)  # fmt: skip


def settings(*argv):
    return parse_train([str(a) for a in argv])[0]


def refused(*argv):
    with pytest.raises(UserError) as e:
        settings(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_every_flag_of_nanogpt_has_its_default():
    got = settings("--dataset=openwebtext").model_dump()
    assert {k: got[k] for k in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS
    own = {"kernels", "preset", "train_data", "val_data", "seed", "eval_seed", "peak_flops", "sample_tokens"}
    own |= {
        "overwrite",
        "save_minutes",
        "max_bad_steps",
        "keep",
        "async_checkpoint",
        "parallel",
        "timeout",
        "join_timeout",
    }
    own |= {"micro_batch", "recompute", "doc_mask", "residual", "activation", "init_scheme", "cuda_graphs", "runner"}
    assert got.keys() - NANOGPT_DEFAULTS.keys() == own


def test_samples_flags_have_nanogpts_defaults():
    assert parse(SampleConfig, [], "sample")[0].model_dump() == dict(
        init_from="resume", out_dir="out", start="\n", num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200, seed=1337,
        device="cuda", dtype=default_dtype(), compile=False, activation="",
    )  # fmt: skip


def test_the_base_is_quickstart_only_where_nothing_names_a_run(tmp_path):
    quick = settings()
    assert quick == TrainConfig(**preset("quickstart"))
    assert settings("--batch_size=3") == quick.model_copy(update={"batch_size": 3})
    file = tmp_path / "empty.py"
    file.write_text("")
    for words in (["--dataset=x"], ["--preset=gpt2"], [file], ["--train_data=x"]):
        assert settings(*words).n_layer == 12, words
        assert settings(*words).out_dir == "out", words


def test_other_weights_to_start_from_end_the_quickstart():
    """Its text and settings are not to be trained on by another run's checkpoint, or GPT-2's."""
    for words in (["--init_from=gpt2"], ["--init_from=some/folder"], ["--init_from=resume", "--out_dir=out"]):
        assert settings(*words).dataset == "openwebtext", words
    for words in (["--init_from=resume"], ["--init_from=resume", "--out_dir=out-quickstart"]):
        assert settings(*words).dataset == "python-stdlib", words


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_gpt2_presets_change_size_and_learning_rate_only(name):
    got, base = settings(f"--preset={name}").model_dump(), NANOGPT_DEFAULTS
    assert {k for k in base if got[k] != base[k]} <= {"n_layer", "n_head", "n_embd", "learning_rate", "min_lr"}
    assert (got["n_layer"], got["n_head"], got["n_embd"]) == tuple(MODEL_SIZES[name].values())


def test_presets_are_gpt2s_sizes_and_nanogpts_shakespeare_char():
    # Parameters of OpenAI's models: 50257 tokens, with biases.
    sizes = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    for name, expected in sizes.items():
        cfg = settings(f"--preset={name}")
        C, L = cfg.n_embd, cfg.n_layer
        assert expected == 50257 * C + 1024 * C + L * (12 * C * C + 13 * C) + 2 * C
        assert C // cfg.n_head == 64
        assert cfg.min_lr == cfg.learning_rate / 10
    got = settings("--preset=shakespeare-char").model_dump()
    published = dict(
        out_dir="out-shakespeare-char", eval_interval=250, eval_iters=200, log_interval=10, always_save_checkpoint=False,
        dataset="shakespeare_char", gradient_accumulation_steps=1, batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384,
        dropout=0.2, learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100,
    )  # fmt: skip
    assert {k: got[k] for k in published} == published


@pytest.mark.parametrize("name", ["quickstart", "shakespeare-char", "tiny"])
def test_small_presets_are_valid_and_flags_change_them(name):
    assert settings(f"--preset={name}", "--seed=3").seed == 3
    assert settings("--seed=3", f"--preset={name}").seed == 3  # the preset is the base wherever it stands
    assert settings(f"--preset={name}").gradient_accumulation_steps == 1


def test_words_apply_from_left_to_right(tmp_path):
    file, toml = tmp_path / "a.py", tmp_path / "b.toml"
    file.write_text("n_layer = 3\nn_embd = 24\n")
    toml.write_text('n_layer = 5\nlearning_rate = 1\ndataset = "x"\n')
    assert settings("--n_layer=2", file).n_layer == 3
    assert settings(file, "--n_layer=2").n_layer == 2
    assert settings(file, toml).n_layer == 5
    assert settings(toml, file).n_layer == 3
    got = settings(toml, "--compile", "False", "--wandb_run_name=a=b", "--dropout=0")
    assert (got.learning_rate, got.compile, got.wandb_run_name, got.dropout, got.dataset) == (
        1.0,
        False,
        "a=b",
        0.0,
        "x",
    )


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
    got = settings("--max_iters=7000", file)
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
        "max_iters: int",
        "a, b = 1, 2",
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_sze=3"], ["--batch_sze=3", "no setting 'batch_sze'", "'batch_size'"]),
        (["--batch_size=12.5"], ["--batch_size", "12.5", "12"]),
        (["--batch_size=0"], ["--batch_size", "0", "greater than 0", "1"]),
        (["--batch_size=abc"], ["--batch_size", "'abc'", "integer"]),
        (["--batch_size=True"], ["--batch_size", "True", "integer"]),
        (["--max_iters=1e4"], ["--max_iters", "10000.0", "10000"]),
        (["--dtype=bf16"], ["--dtype", "'bf16'", "'bfloat16'"]),
        (["--compile=yes"], ["--compile", "'yes'", "True"]),
        (["--compile=0"], ["--compile", "0", "False"]),
        (["--n_layer=99999999999999"], ["--n_layer", "99999999999999", "10000"]),
        (["--dropout=1.5"], ["--dropout", "1.5", "less than 1"]),
        (["--learning_rate=-1"], ["--learning_rate", "-1", "0"]),
        (["--learning_rate=1e999"], ["--learning_rate", "inf", "finite"]),
        (["--learning_rate=fast"], ["--learning_rate", "'fast'", "number"]),
        (["--eval_seed=-3"], ["--eval_seed", "-3", "0"]),
        (["--preset=gpt2-xxl"], ["--preset", "'gpt2-xxl'", "'gpt2-xl'"]),
        (["--n_head=5", "--n_embd=384"], ["--n_head=5", "n_embd=384", "is 4"]),
        (["--n_layer={[]:1}"], ["--n_layer", "integer"]),
        (["--n_layer=" + "-" * 30000 + "1"], ["--n_layer", "integer"]),
        (["--n_layer"], ["--n_layer", "a value is missing"]),
        (["--n_layer", "--n_head=2"], ["--n_layer", "a value is missing"]),
        (["nowhere.py"], ["nowhere.py", "no such config file"]),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(words, said):
    message = refused(*words)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.py",
            "n_layer = 2\nbatch_sze = 3\n",
            "a.py, line 2: there is no setting 'batch_sze'; the nearest is 'batch_size'",
        ),
        ("a.py", "n_layer = 'two'\n", "a.py, line 1: 'two' should be a valid integer; the nearest right value is 12"),
        ("a.py", "n_layer = \n", "a.py, line 1: not Python"),
        ("a.toml", "n_layer = 2.5\n", "a.toml: 2.5 should be a valid integer"),
        ("a.toml", "n_layers = 2\n", "a.toml: there is no setting 'n_layers'; the nearest is 'n_layer'"),
        ("a.toml", "n_layer : 2\n", "a.toml: not TOML"),
    ],
)
def test_a_wrong_setting_in_a_file_is_named_with_its_line(tmp_path, monkeypatch, name, text, said):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    assert refused(name).startswith(said)


def test_help_lists_every_flag_with_its_default_and_a_line(capsys):
    with pytest.raises(SystemExit) as e:
        parse_train(["--help"])
    assert e.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, field in TrainConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert re.search(
            rf"--{name} \S+ {re.escape(field.description)} \(default: {re.escape(repr(default))}\)", text
        ), name


def test_defaults_are_right_values_themselves():
    """Defaults are not validated by use: a default out of bounds would only show when someone types it."""
    for name, value in TrainConfig().model_dump().items():
        text = value if isinstance(value, str) else repr(value)
        assert getattr(settings("--dataset=x", f"--{name}={text}"), name) == value or name == "dataset"
    assert ast.literal_eval("None") == TrainConfig().eval_seed
