"""`fastgpt completion SHELL`: a script that completes commands, flags, choices and files; made from the schemas.

bash: fastgpt completion bash > ~/.fastgpt.bash, and in ~/.bashrc: source ~/.fastgpt.bash
zsh:  fastgpt completion zsh > ~/.fastgpt.zsh, and in ~/.zshrc, behind compinit: source ~/.fastgpt.zsh
fish: fastgpt completion fish > ~/.config/fish/completions/fastgpt.fish
"""

from pydantic.fields import FieldInfo

from fastgpt import cli, config
from fastgpt.config import Settings, UserError
from fastgpt.parse import close
from fastgpt.usage import choices, is_path

SHELLS = ("bash", "zsh", "fish")


def schemas() -> dict[str, type[Settings]]:
    """{command: its schema}; the commands of bench are of two words."""
    from fastgpt.benchmarks import command, compare, count, report, roofline, scaling

    return {
        "train": config.TrainConfig, "plot": config.PlotConfig, "sample": config.SampleConfig, "export": config.ExportConfig,
        "prepare": config.PrepareConfig, "verify": config.VerifyConfig, "inspect": config.InspectConfig, "study": config.StudyConfig,
        "tune": config.TuneConfig, "bench": command.BenchConfig,
        "bench compare": compare.CompareConfig, "bench count": count.CountConfig, "bench report": report.ReportConfig,
        "bench roofline": roofline.RooflineConfig, "bench scaling": scaling.ScalingConfig,
    }  # fmt: skip


def completion(argv: list[str]) -> str:
    """The script for the shell that the words name. Raises UserError."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        if argv in (["-h"], ["--help"]):
            return f"usage: fastgpt completion {{{','.join(SHELLS)}}}\n\n{(__doc__ or '').partition(chr(10) * 2)[2]}"
        near = close(argv[0], SHELLS) if argv else None
        raise UserError(f"completion: give one of {', '.join(SHELLS)}" + f"; the nearest is {near!r}" * bool(near))
    return {"bash": bash, "zsh": zsh, "fish": fish}[argv[0]]()


def values(field: FieldInfo) -> list[str] | None:
    """The words that a setting's value may be, [] for any text, None for a path."""
    if is_path(field):
        return None
    return [word for word in choices(field) if word] or ["True", "False"] * (field.annotation is bool)


def inner() -> str:
    """The commands of bench."""
    return " ".join(name.split()[1] for name in schemas() if " " in name)


# `=` may break words in bash: of --key=value only the value is replaced then.
BASH = r"""_fastgpt() {
    local IFS=$' \t\n' line=${COMP_LINE:0:COMP_POINT}
    local cur=${line##*[[:space:]]} command last flags= words= key= value= values= before
    before=(${line%%"$cur"}) last=${before[${#before[@]}-1]} command=${before[1]-}
    if [[ $command == bench && " %(inner)s " == *" ${before[2]-} "* ]]; then command="bench ${before[2]}"; fi
    case $command in
        "") words="%(commands)s --help --version" ;;
        completion) words="%(shells)s" ;;
        help) words="%(commands)s" ;;
%(flags)s
    esac
    if [[ $command == bench ]]; then words="%(inner)s"; fi
    if [[ $cur == --*=* ]]; then
        key=${cur%%%%=*} value=${cur#*=}
    elif [[ $last == --* && $last != *=* && $last != --print_config && $cur != -* ]]; then
        key=$last value=$cur
    fi
    if [[ -z $key && $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$flags $words --help --print_config" -- "$cur"))
        if [[ ${COMPREPLY[0]} == *= ]]; then compopt -o nospace 2> /dev/null; fi
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
    if [[ -z $key && -z $flags ]]; then return; fi
    IFS=$'\n'
    if [[ -z $key ]]; then
        COMPREPLY+=($(compgen -d -- "$cur"; for end in py toml json jsonl; do compgen -f -X "!*.$end" -- "$cur"; done))
        compopt -o filenames 2> /dev/null
        return
    fi
    case "$command $key" in
%(values)s
        *) COMPREPLY=() ;;
    esac
    if [[ $cur == *=* && $COMP_WORDBREAKS != *=* ]]; then COMPREPLY=("${COMPREPLY[@]/#/$key=}"); fi
}
complete -F _fastgpt fastgpt
"""


def bash() -> str:
    """bash's script."""
    flags, cases = [], []
    for command, schema in schemas().items():
        flags.append(f'        "{command}") flags="{" ".join(f"--{name}=" for name in schema.model_fields)}" ;;')
        for name, field in schema.model_fields.items():
            words = values(field)
            if words is None:
                found = 'compgen -f -- "$value"); compopt -o filenames 2> /dev/null'
            elif words:
                found = f'IFS=\' \' compgen -W "{" ".join(words)}" -- "$value")'
            else:
                continue
            reply, _, rest = found.partition(")")
            cases.append(f'        "{command} --{name}") COMPREPLY=($({reply})){rest} ;;')
    return BASH % dict(
        inner=inner(), commands=" ".join(cli.COMMANDS), shells=" ".join(SHELLS), flags="\n".join(flags), values="\n".join(cases)
    )  # fmt: skip


ZSH = r"""#compdef fastgpt
_fastgpt() {
    local command=$words[2]
    local -a commands flags
    if ((CURRENT == 2)); then
        commands=(%(commands)s)
        _describe command commands
        return
    fi
    if [[ $command == bench && " %(inner)s " == *" $words[3] "* ]] && ((CURRENT > 3)); then command="bench $words[3]"; fi
    case $command in
        completion) _values shell %(shells)s; return ;;
        help) _values command %(names)s; return ;;
        bench) ((CURRENT == 3)) && compadd %(inner)s ;;
    esac
    case $command in
%(flags)s
    esac
    _arguments -S $flags '--help[print every flag]' '--print_config[print all settings]' '*:config file:_files -g "*.(py|toml|json|jsonl)"'
}
compdef _fastgpt fastgpt
"""


def zsh() -> str:
    """zsh's script."""

    def quoted(text: str) -> str:
        for c in "\\[]:":
            text = text.replace(c, "\\" + c)
        return text.replace("'", "'\\''")

    flags = []
    for command, schema in schemas().items():
        lines = []
        for name, field in schema.model_fields.items():
            words = values(field)
            how = "_files" if words is None else f"({' '.join(words)})" if words else " "
            lines.append(f"            '--{name}=[{quoted(field.description or '')}]:value:{how}'")
        flags.append("\n".join([f'        "{command}") flags=(', *lines, "        ) ;;"]))
    commands = " ".join(f"'{name}:{quoted(says)}'" for name, says in cli.COMMANDS.items())
    return ZSH % dict(
        commands=commands, names=" ".join(cli.COMMANDS), inner=inner(), shells=" ".join(SHELLS), flags="\n".join(flags)
    )  # fmt: skip


def fish() -> str:
    """fish's script."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    begin = "complete -c fastgpt"
    lines = [f"{begin} -n __fish_use_subcommand -f -a {name} -d {quoted(says)}" for name, says in cli.COMMANDS.items()]
    lines.append(f"{begin} -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    lines.append(
        f"{begin} -n '__fish_seen_subcommand_from bench; and not __fish_seen_subcommand_from {inner()}' -f -a '{inner()}'"
    )
    lines += [f"{begin} -l {name}" for name in ("help", "print_config")]
    for command, schema in schemas().items():
        words = [f"__fish_seen_subcommand_from {word}" for word in command.split()]
        words += [f"not __fish_seen_subcommand_from {inner()}"] * (command == "bench")
        for name, field in schema.model_fields.items():
            found = values(field)
            how = "-r -F" if found is None else f"-x -a '{' '.join(found)}'" if found else "-x"
            lines.append(f"{begin} -n '{'; and '.join(words)}' -l {name} {how} -d {quoted(field.description or '')}")
    return "\n".join(lines) + "\n"
