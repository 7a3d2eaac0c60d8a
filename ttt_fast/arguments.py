"""What the command line takes: an option for every setting of TTTConfig, and those of a command."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from ttt_fast import TTTConfig
from ttt_fast.audit import DEFAULT_LRS, DEFAULT_STEPS, MODES, VARIED
from ttt_fast.config import SPAN_OPTIONS
from ttt_fast.study.grid import Grid
from ttt_fast.study.tasks import TASKS

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a command line cannot express; the library takes it.
_NOT_OPTIONS = ("param_groups",)
# What an audit varies by itself, and what has to be as it is for that.
_AUDITED = (*VARIED, "snapshot")
# What a study varies, and what it has an option of its own for.
_VARIED_BY_STUDY = (*(axis.name for axis in fields(Grid)), "seed")
_MODEL_HELP = 'folder, hub name, or "demo" for SmolLM2-135M-Instruct'
_PROMPT_HELP = 'text, or "-" for stdin; with "demo" there is a default'
_JSON_HELP = "print one JSON object and nothing else"


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option on one line, without the usage, which is long here."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``ttt-fast``; what it parses names its command in ``command``."""
    parser = _Parser(
        prog="ttt-fast", description="Adapt a language model to a prompt and have its weights back."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="adapt|audit|study|study-report|lm-eval|doctor"
    )
    _add_adapt(commands.add_parser("adapt", help="adapt a model to a prompt and let it continue"))
    about = "how much of an update reaches the weights, by learning rate and rounding"
    _add_audit(commands.add_parser("audit", help=about))
    about = "does adapting help on a task, and with which settings"
    _add_study(commands.add_parser("study", help=about))
    about = "what one or several studies of the same model and file have found so far"
    _add_study_report(commands.add_parser("study-report", help=about))
    about = "lm-evaluation-harness, with the model type ttt_fast (its own arguments follow)"
    _add_lm_eval(commands.add_parser("lm-eval", help=about, add_help=False, prefix_chars="\0"))
    about = "versions, backends, and the memory that a run would need"
    _add_doctor(commands.add_parser("doctor", help=about))
    return parser


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of TTTConfig that were given."""
    names = [option.name for option in fields(TTTConfig)]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return options


def _add_adapt(adapt: argparse.ArgumentParser) -> None:
    adapt.add_argument("model", help=_MODEL_HELP)
    adapt.add_argument("prompt", nargs="?", help=_PROMPT_HELP)
    adapt.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="the same; given several times, each prompt adapts on its own",
    )
    adapt.add_argument(
        "--prompt-lines", type=Path, metavar="FILE", help="one prompt a line, each on its own"
    )
    adapt.add_argument("--max-new-tokens", type=int, default=40, help="of the answers (default 40)")
    adapt.add_argument("--compare", action="store_true", help="run the naive torch loop, too")
    _add_run_options(adapt, plot="losses")
    _add_settings(adapt)


def _add_audit(audit: argparse.ArgumentParser) -> None:
    audit.set_defaults(prompts=None, prompt_lines=None)
    audit.add_argument("model", help=_MODEL_HELP)
    audit.add_argument("--prompt", help=_PROMPT_HELP)
    audit.add_argument(
        "--lr",
        type=float,
        nargs="+",
        dest="lrs",
        default=DEFAULT_LRS,
        help=f"learning rates (default {' '.join(f'{lr:g}' for lr in DEFAULT_LRS)})",
    )
    audit.add_argument(
        "--modes", nargs="+", choices=MODES, help="default all that make a difference"
    )
    _add_run_options(audit, plot="table")
    _add_settings(audit, dtype="bfloat16", without=_AUDITED, steps=DEFAULT_STEPS)


def study_settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The axes of a study that were given, and the other settings of TTTConfig."""
    axes = {f.name: tuple(getattr(args, f.name)) for f in fields(Grid) if hasattr(args, f.name)}
    others = {k: v for k, v in settings(args).items() if k not in _VARIED_BY_STUDY}
    return axes, others


def _add_study(study: argparse.ArgumentParser) -> None:
    study.add_argument("task", metavar="TASK", help=f"one of {', '.join(TASKS)}")
    study.add_argument("--model", required=True, help=_MODEL_HELP)
    study.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines")
    study.add_argument(
        "--out",
        type=Path,
        default=Path("study"),
        metavar="DIR",
        help="folder of results and report; a run that was interrupted goes on there"
        " (default study)",
    )
    study.add_argument("--prompts", type=int, metavar="N", help="how many (default all)")
    study.add_argument("--seed", type=int, default=0, help="of the draw of prompts (default 0)")
    study.add_argument("--sha256", metavar="PREFIX", help="refuse a file with another hash")
    study.add_argument("--max-new-tokens", type=int, help="of answers (default the task's)")
    study.add_argument(
        "--segment-tokens", type=int, help="of a segment of text-stream (default 64)"
    )
    study.add_argument(
        "--delta-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure how far the weights moved; on long trajectories as slow as the steps",
    )
    study.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    study.add_argument("--plan", action="store_true", help="show the plan and stop")
    study.add_argument("--device", default=None, help="default cuda if there is one, else cpu")
    axes = study.add_argument_group("settings to try, each with every other")
    defaults = Grid()
    kinds = {"steps": int, "optimizer": str, "scope": str, "max_grad_norm": _or_none(float)}
    for axis in fields(Grid):
        shown = " ".join(str(v).lower() for v in getattr(defaults, axis.name))
        axes.add_argument(
            "--" + axis.name.replace("_", "-"),
            nargs="+",
            type=kinds.get(axis.name, float),
            default=argparse.SUPPRESS,
            help=f"default {shown}",
        )
    _add_settings(study, without=(*_VARIED_BY_STUDY, "check_every", *SPAN_OPTIONS))


def _add_study_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="of a study")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="write tables, figures and page here, too"
    )


def _add_lm_eval(lm_eval: argparse.ArgumentParser) -> None:
    # Without a prefix that starts an option, all that follows is the harness's.
    lm_eval.add_argument("arguments", nargs=argparse.REMAINDER)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.add_argument("model", nargs="?", help="estimate the memory for this model (config only)")
    doctor.add_argument("--tokens", type=int, default=256, help="prompt length (default 256)")
    doctor.add_argument("--deltas", type=int, default=1, help="prompts adapted at once (default 1)")
    doctor.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine's speeds once (about 30 s) and keep them for engine=auto",
    )
    doctor.add_argument("--json", action="store_true", help=_JSON_HELP)
    _add_settings(doctor)


def _add_run_options(parser: argparse.ArgumentParser, plot: str) -> None:
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help=f"draw the {plot} into this file")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    parser.add_argument("--json", action="store_true", help=_JSON_HELP)
    parser.add_argument("--device", default=None, help="default cuda if there is one, else cpu")


def _add_settings(
    parser: argparse.ArgumentParser,
    dtype: str = "auto",
    without: Sequence[str] = (),
    **defaults: Any,
) -> None:
    """The dtype, and every setting of TTTConfig but those of ``without``."""
    parser.add_argument(
        "--dtype", choices=DTYPES, default=dtype, help=f"of the weights (default {dtype})"
    )
    group = parser.add_argument_group("hyper-parameters")
    words = dict(re.findall(r"^    (\w+): (.*)$", inspect.getdoc(TTTConfig) or "", re.M))
    for option in fields(TTTConfig):
        if option.name in (*_NOT_OPTIONS, *without) or option.default is MISSING:
            continue
        text = re.sub(r":\w+:|`", "", words.get(option.name, "")).rstrip(".;")
        default = defaults.get(option.name, option.default)
        text = f"{text} (default {default})".replace("%", "%%")
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            dest=option.name,
            default=argparse.SUPPRESS,
            help=text,
            **_argument_type(option),
        )


def _argument_type(option: Field[Any]) -> dict[str, Any]:
    """How argparse reads an option, from its default value and its annotation."""
    default = option.default
    if str(option.type) == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"type": float, "nargs": len(default), "metavar": option.name.rstrip("s").upper()}
    kinds = {
        "float | None": _or_none(float),
        "int | None": _or_none(int),
        "bool | str": _true_false_or_word,
    }
    return {"type": kinds.get(str(option.type), str if default is None else type(default))}


def _true_false_or_word(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"  # argparse: "invalid float or none value"
    return read
