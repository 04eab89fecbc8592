"""Settings: nanoGPT's flags, defaults and config files, the presets, and what is said of a wrong one."""

import ast

import pytest

from fastgpt import completion, config
from fastgpt.config import (
    MODEL_SIZES,
    PrepareConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    default_device,
    default_dtype,
    preset,
)
from fastgpt.parse import INSTEAD, parse, parse_train

NANOGPT_DEFAULTS = dict(
    out_dir="out", eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True, init_from="scratch",
    wandb_log=False, wandb_project="owt", wandb_run_name="gpt2", dataset="openwebtext", gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=1e-1,
    beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend="nccl",
    device="cuda", dtype=default_dtype(), compile=True,
)  # fmt: skip


def settings(*argv):
    return parse_train([str(a) for a in argv])[0]


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU, as far as the settings ask."""
    monkeypatch.setattr("fastgpt.parse.default_device", lambda: "cuda")


def refused(*argv):
    with pytest.raises(UserError) as e:
        settings(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_every_flag_of_nanogpt_has_its_default(gpu):
    got = settings("--dataset=openwebtext").model_dump()
    assert {k: got[k] for k in NANOGPT_DEFAULTS} == NANOGPT_DEFAULTS
    own = {"kernels", "preset", "train_data", "val_data", "seed", "eval_seed", "peak_flops", "sample_tokens"}
    own |= {"eval_windows"}
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
    own |= {"sample_every_eval", "tracker", "patience", "target_loss"}
    own |= {"micro_batch", "recompute", "doc_mask", "residual", "activation", "init_scheme", "cuda_graphs", "runner"}
    assert got.keys() - NANOGPT_DEFAULTS.keys() == own


def test_samples_flags_have_nanogpts_defaults():
    assert parse(SampleConfig, [], "sample")[0].model_dump() == dict(
        init_from="resume", out_dir="out", start="\n", num_samples=10, max_new_tokens=500, temperature=0.8, top_k=200, seed=1337,
        device=default_device(), dtype=default_dtype(), compile=False, activation="",
    )  # fmt: skip


def test_without_a_gpu_the_cpu_trains_eagerly_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr("fastgpt.parse.default_device", lambda: "cpu")
    got = settings("--dataset=x")
    assert (got.device, got.compile) == ("cpu", False)
    assert capsys.readouterr().out == "no CUDA GPU here: training on the CPU, without torch.compile\n"
    assert settings("--dataset=x", "--compile=True").compile
    assert capsys.readouterr().out == "no CUDA GPU here: training on the CPU\n"
    for given in ("cuda", "cpu"):
        assert settings("--dataset=x", f"--device={given}").device == given
        assert settings("--dataset=x", f"--device={given}").compile
    assert capsys.readouterr().out == ""


def test_the_cpu_is_for_machines_without_a_gpu_not_for_those_where_it_does_not_work(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for works, present, device in ((True, True, "cuda"), (False, False, "cpu"), (False, True, "cuda")):
        monkeypatch.setattr(config.torch.cuda, "is_available", lambda works=works: works)
        monkeypatch.setattr(config, "gpu_files", lambda present=present: ["/dev/nvidia0"] * present)
        assert default_device() == device
        if not works:
            with monkeypatch.context() as hidden:
                hidden.setenv("CUDA_VISIBLE_DEVICES", "")
                assert default_device() == "cpu"


def test_the_base_is_quickstart_only_where_nothing_names_a_run(tmp_path):
    quick = settings()
    assert quick == TrainConfig(**preset("quickstart"), preset="quickstart")
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


def test_a_folder_or_a_text_in_place_of_a_config_file_is_told_its_flag(tmp_path):
    """`fastgpt sample out-quickstart`, `fastgpt prepare text.txt`."""
    (text := tmp_path / "text.txt").write_text("To be")
    for schema, word, flag in (
        (SampleConfig, tmp_path, "out_dir"),
        (TrainConfig, tmp_path, "out_dir"),
        (PrepareConfig, text, "input"),
    ):
        with pytest.raises(UserError, match=f"write --{flag}={word}"):
            parse(schema, [str(word)], "")


@pytest.mark.parametrize("start", ["resume", "auto"])
def test_a_quickstart_in_another_folder_goes_on_as_one(start, tmp_path):
    """`fastgpt train --out_dir=x`, and then `fastgpt train --out_dir=x --init_from=auto`. config.json says what was trained."""
    words = [f"--init_from={start}", f"--out_dir={tmp_path}"]
    for given, dataset in (
        ('{"preset": "quickstart", "out_dir": "x"}', "python-stdlib"),
        ('{"preset": "gpt2"}', "openwebtext"),
        ('{"out_dir": "x"}', "openwebtext"),
        ("[]", "openwebtext"),
    ):
        (tmp_path / "config.json").write_text(f'{{"given": {given}}}')
        assert settings(*words).dataset == dataset, given
        assert settings(*words, "--preset=shakespeare-char").dataset == "shakespeare_char", given


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_gpt2_presets_change_size_and_learning_rate_only(name, gpu):
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
        (["--compile=maybe"], ["--compile: 'maybe' should be a valid boolean"]),
        (["--dtype=fp16"], ["'fp16'", "the nearest right value is 'float16'"]),
        (["--residual=bfloat16"], ["'bfloat16'", "the nearest right value is 'bf16'"]),
        (["--dtype=quick"], ["'quick' should be 'float32', 'bfloat16' or 'float16'"]),
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
        (["gpt2-xl"], ["gpt2-xl: no such config file; the preset of this name is --preset=gpt2-xl"]),
        (["--lr=3"], ["--lr=3: there is no setting 'lr'; it is 'learning_rate' here"]),
        (["--epochs=3"], ["'epochs'; it is 'max_iters' here; there are no epochs: it counts updates"]),
        (["--config=a.py"], ["'config'; give the file's name alone, as in `fastgpt train FILE.py`"]),
        (["--learning-rte=3"], ["there is no setting 'learning_rte'; the nearest is 'learning_rate'"]),
        (["--hiden_size=3"], ["there is no setting 'hiden_size'; it is 'n_embd' here"]),
        (["--gpus=8"], ["'gpus'; torchrun says it: `torchrun --nproc_per_node=N train.py ...`"]),
        (["--frobnicate=1"], ["there is no setting 'frobnicate'; --help lists them all"]),
    ],
)
def test_a_wrong_setting_is_named_with_the_nearest_right_one(words, said):
    message = refused(*words)
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frobnicate=1"], "there is no setting 'frobnicate'; --help lists them all"),
        (["--zeal=1"], "'zeal'; --help"),
        (["--eps=1"], "'eps'; --help"),
        (["--epsilon=1"], "'epsilon'; --help"),
        (["--num_workers=1"], "'num_workers'; --help"),
        (["--dtype=quick"], "'float32', 'bfloat16' or 'float16'"),
        (["--n_layer=two"], "should be a valid integer"),
        (["--compile=maybe"], "should be a valid boolean"),
        (["--preset=llama"], "'shakespeare-char' or 'tiny'"),
    ],
)
def test_what_is_like_nothing_has_no_nearest(words, said):
    message = refused(*words)
    assert said in message
    assert "nearest" not in message


def test_hyphens_are_underscores():
    got = settings("--learning-rate=0.5", "--n-layer", "3", "--eval-only", "--dataset=a-b")
    assert (got.learning_rate, got.n_layer, got.eval_only, got.dataset) == (0.5, 3, True, "a-b")


def test_other_programs_names_lead_to_settings_that_there_are():
    known = {*completion.schemas().values()}
    names = {name for schema in known for name in schema.model_fields}
    for words, right, note in INSTEAD:
        assert note or right
        assert {*right.split()} <= names
        assert not {*words.split()} & {*TrainConfig.model_fields, *SampleConfig.model_fields}, "it is a setting itself"
    words = [word for words, _, _ in INSTEAD for word in words.split()]
    assert len(words) == len({*words})


def test_defaults_are_right_values_themselves():
    """Defaults are not validated by use: a default out of bounds would only show when someone types it."""
    for name, value in TrainConfig().model_dump().items():
        text = value if isinstance(value, str) else repr(value)
        assert getattr(settings("--dataset=x", f"--{name}={text}"), name) == value or name == "dataset"
    assert ast.literal_eval("None") == TrainConfig().eval_seed
