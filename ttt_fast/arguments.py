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

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a command line cannot express; the library takes it.
_NOT_OPTIONS = ("param_groups",)
# What an audit varies by itself, and what has to be as it is for that.
_AUDITED = (*VARIED, "snapshot")
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="adapt|audit|doctor")
    _add_adapt(commands.add_parser("adapt", help="adapt a model to a prompt and let it continue"))
    about = "how much of an update reaches the weights, by learning rate and rounding"
    _add_audit(commands.add_parser("audit", help=about))
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
        text = re.sub(r":\w+:|`", "", words.get(option.name, "")).rstrip(".")
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
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"type": float, "nargs": len(default), "metavar": option.name.rstrip("s").upper()}
    kinds = {"float | None": _or_none(float), "int | None": _or_none(int)}
    return {"type": kinds.get(str(option.type), str if default is None else type(default))}


def _or_none(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = f"{kind.__name__} or none"  # argparse: "invalid float or none value"
    return read
