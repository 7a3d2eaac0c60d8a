"""The command line: ``ttt-fast adapt`` and ``ttt-fast doctor``.

Results go to stdout (with ``--json`` nothing else does), progress to stderr. Exit codes: 0 done,
1 it ran and failed (diverged, or the weights did not come back), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, doctor
from ttt_fast.batch import complete_batch
from ttt_fast.comparison import Run, page, plot, ratios
from ttt_fast.demo import DEFAULT_PROMPT, load_demo_model
from ttt_fast.naive import naive_adapt, prompt_loss

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a command line cannot express; the library takes it.
_NOT_OPTIONS = ("param_groups",)
# What Hugging Face raises for a name, a folder or files that it can do nothing with.
_NOT_A_MODEL = (OSError, ValueError, ModuleNotFoundError)


class CommandError(Exception):
    """Something the user can put right: one line on stderr and exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"ttt-fast: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"ttt-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


# ---------------------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """Reports a wrong option on one line, without the usage, which is long here."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ttt-fast", description="Adapt a language model to a prompt and have its weights back."
    )
    commands = parser.add_subparsers(required=True, metavar="adapt|doctor")
    adapt = commands.add_parser("adapt", help="adapt a model to a prompt and let it continue")
    adapt.set_defaults(run=_adapt)
    adapt.add_argument("model", help='folder, hub name, or "demo" for SmolLM2-135M-Instruct')
    adapt.add_argument(
        "prompt", nargs="?", help='text, or "-" for stdin; with "demo" there is a default'
    )
    adapt.add_argument("--prompt-file", type=Path, help="read the prompt from a file")
    adapt.add_argument("--chat", action="store_true", help="wrap the prompt in the chat template")
    adapt.add_argument("--max-new-tokens", type=int, default=40, help="of the answers (default 40)")
    adapt.add_argument("--compare", action="store_true", help="run the naive torch loop, too")
    adapt.add_argument("--plot", type=Path, metavar="PNG", help="draw the losses into this file")
    adapt.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    adapt.add_argument("--device", default=None, help="default cuda if there is one, else cpu")
    _add_common_options(adapt)
    check = commands.add_parser(
        "doctor", help="versions, backends, and the memory that a run would need"
    )
    check.set_defaults(run=_doctor)
    check.add_argument("model", nargs="?", help="estimate the memory for this model (config only)")
    check.add_argument("--tokens", type=int, default=256, help="prompt length (default 256)")
    check.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _add_common_options(check)
    return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights")
    group = parser.add_argument_group("hyper-parameters")
    words = dict(re.findall(r"^    (\w+): (.*)$", inspect.getdoc(TTTConfig) or "", re.M))
    for option in fields(TTTConfig):
        if option.name in _NOT_OPTIONS or option.default is MISSING:
            continue
        text = re.sub(r":\w+:|`", "", words.get(option.name, "")).rstrip(".")
        text = f"{text} (default {option.default})".replace("%", "%%")
        group.add_argument(
            "--" + option.name.replace("_", "-"),
            dest=option.name,
            default=argparse.SUPPRESS,
            help=text,
            **_argument_type(option.name, option.default),
        )


def _argument_type(name: str, default: Any) -> dict[str, Any]:
    """How argparse reads an option, from its default value."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"type": float, "nargs": len(default), "metavar": name.rstrip("s").upper()}
    if name == "max_grad_norm":
        return {"type": _number_or_none}
    return {"type": str if default is None else type(default)}


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _config(args: argparse.Namespace) -> TTTConfig:
    names = [option.name for option in fields(TTTConfig)]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    with _bad_input(ValueError, TypeError):
        return TTTConfig(**options)


@contextmanager
def _bad_input(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Turn exceptions of these kinds into a :class:`CommandError` of one line."""
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise CommandError(about + message) from error


# ---------------------------------------------------------------------------- adapt


def _adapt(args: argparse.Namespace) -> int:
    config = _config(args)
    prompt = _prompt(args)
    if args.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1.")
    if args.plot is not None:
        _check_plot(args.plot)
    with redirect_stdout(sys.stderr):  # libraries may print
        result = _adapt_and_compare(args, config, prompt)
    print(json.dumps(result, indent=2) if args.json else page(result))
    if args.plot is not None:
        plot(result, args.plot)
        print(f"loss plot: {args.plot}", file=sys.stderr if args.json else sys.stdout)
    return 0 if result["weights"]["bitwise_equal"] else 1


def _adapt_and_compare(args: argparse.Namespace, config: TTTConfig, prompt: str) -> dict[str, Any]:
    """Everything ``ttt-fast adapt`` does, as one JSON-able dict."""
    model, tokenizer = _load(args.model, args.dtype, args.device)
    ids = _encode(tokenizer, prompt, args.chat).to(model.device)
    with _bad_input(ValueError, TypeError):
        complete_batch(Batch(ids), model, 1)  # refuses what cannot be adapted to
        trainer = TTTTrainer(model, config)
    naive_options = _naive_options(trainer) if args.compare else None

    def answer(generate: Callable[..., Tensor], **inputs: Any) -> str:
        output = generate(max_new_tokens=args.max_new_tokens, do_sample=False, **inputs)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    hash_before = parameter_hash(model)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        # Also the warm-up of both runs.
        answer_before = answer(model.generate, **inputs)
        loss_before = float(prompt_loss(model, **inputs, reduction=config.reduction))
    runs = {}
    if naive_options is not None:
        _return_free_memory()
        with _progress("naive loop", config.steps) as on_step:
            result = naive_adapt(model, ids, on_step=on_step, **naive_options)
        with torch.no_grad():
            after = float(prompt_loss(model, **inputs, reduction=config.reduction))
            with result.phases("generate"):
                text = answer(model.generate, **inputs)
        result.restore()
        runs["naive"] = Run(
            result.losses.tolist(), result.grad_norms.tolist(), after, text,
            result.phases.ms, result.phases.peak_bytes,
        )  # fmt: skip
        del result
    _return_free_memory()
    with _bad_input(ValueError, TypeError), _progress("ttt_fast", config.steps) as on_step:
        adapted = trainer.adapt(
            ids,
            on_step=lambda report: on_step(
                report.step, float(report.losses[0]), float(report.grad_norms[0])
            ),
        )
    with adapted:
        after = float(adapted.loss()[0])
        text = answer(adapted.generate)
    runs["ours"] = Run(
        adapted.losses[0].tolist(), adapted.grad_norms[0].tolist(), after, text,
        adapted.timings, adapted.peak_bytes, float(adapted.update_landed[0]),
    )  # fmt: skip
    hash_after = parameter_hash(model)
    return {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "selected_parameters": sum(selection.numel for selection in trainer.selections),
        "config": {o.name: _plain(getattr(config, o.name)) for o in fields(config)},
        "prompt": prompt,
        "prompt_tokens": ids.shape[1],
        "loss_before": loss_before,
        "answer_before": answer_before,
        **{name: vars(run) for name, run in runs.items()},
        "ratio": ratios(runs),
        "weights": {
            "before": hash_before,
            "after": hash_after,
            "bitwise_equal": hash_before == hash_after,
        },
    }


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt_file is not None:
        raise CommandError("got a prompt and --prompt-file; give one of them.")
    if args.prompt_file is not None:
        with _bad_input(OSError, UnicodeDecodeError):
            return args.prompt_file.read_text(encoding="utf-8")
    if args.prompt == "-":
        return sys.stdin.read()
    if args.prompt is None and args.model != "demo":
        raise CommandError('no prompt; give one as text, with --prompt-file, or "-" for stdin.')
    return DEFAULT_PROMPT if args.prompt is None else args.prompt


def _load(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _bad_input(*_NOT_A_MODEL, about=f"model {name!r}: "):
        if name == "demo":
            model, tokenizer = load_demo_model(torch.float32 if dtype == "auto" else torch_dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
    with _bad_input(RuntimeError, AssertionError):  # torch: unknown or absent device
        return model.to(device), tokenizer


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    if chat:
        if not tokenizer.chat_template:
            raise CommandError("--chat: this tokenizer has no chat template; leave --chat out.")
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat).input_ids
    return torch.tensor([ids], dtype=torch.int64)


def _naive_options(trainer: TTTTrainer) -> dict[str, Any]:
    """The settings as arguments of the naive loop, which has to compute the same numbers."""
    config = trainer.config
    sliced = [s.name for s in trainer.selections if s.rows is not None]
    if sliced:
        raise CommandError(
            f"--compare: scope {config.scope!r} is a slice of {sliced[0]}, and the naive loop "
            f"adapts whole parameters only. Leave --compare out or widen the scope."
        )
    if config.dropout or (config.decoupled_weight_decay and config.optimizer == "sgd"):
        raise CommandError(
            "--compare: the naive loop has neither --dropout nor SGD with "
            "--decoupled-weight-decay. Leave one of them out."
        )
    names = ("steps", "lr", "momentum", "weight_decay", "dampening", "nesterov", "max_grad_norm",
             "optimizer", "reduction")  # fmt: skip
    options = {name: getattr(config, name) for name in names}
    if config.optimizer == "adamw":
        options["optimizer_kwargs"] = {"betas": config.betas, "eps": config.eps}
    return options | {"params": [selection.param for selection in trainer.selections]}


@contextmanager
def _progress(name: str, steps: int) -> Iterator[Callable[[int, float, float], None]]:
    """A bar on stderr; yields the function that a step reports to."""
    with tqdm(total=steps, desc=f"{name:>10}", unit="step", file=sys.stderr) as bar:

        def on_step(step: int, loss: float, grad_norm: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", grad_norm=f"{grad_norm:.3g}", refresh=False)
            bar.update()

        yield on_step


def parameter_hash(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        digest.update(f"{name} {param.dtype} {tuple(param.shape)}\n".encode())
        flat = param.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def _return_free_memory() -> None:
    # What the first run leaves behind would hide the peak of the second.
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else list(value)


def _check_plot(path: Path) -> None:
    """Before minutes of work, not after."""
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'ttt-fast[demo]'")
    if not path.absolute().parent.is_dir():
        raise CommandError(f"--plot {path}: there is no folder {path.absolute().parent}.")


# ---------------------------------------------------------------------------- doctor


def _doctor(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.tokens < 2:
        raise CommandError(f"--tokens {args.tokens}: a prompt has at least 2.")
    with redirect_stdout(sys.stderr):
        report: dict[str, Any] = {"system": doctor.system()}
        if args.model is not None:
            with _bad_input(*_NOT_A_MODEL, TypeError, about=f"model {args.model!r}: "):
                report["memory"] = doctor.memory(args.model, config, args.dtype, args.tokens)
    print(json.dumps(report, indent=2) if args.json else doctor.page(report))
    return 0
