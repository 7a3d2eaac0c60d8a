"""The command line: ``ttt-fast adapt``, ``audit``, ``study`` and others (``ttt-fast --help``).

Results go to stdout (with ``--json`` nothing else does), progress to stderr. Exit codes: 0 done,
1 it ran and failed (diverged, or the weights did not come back), 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, doctor
from ttt_fast.arguments import build_parser, settings, study_settings
from ttt_fast.audit import audit
from ttt_fast.batch import complete_batch
from ttt_fast.comparison import Run, page, page_of_several, plot, ratios
from ttt_fast.demo import DEFAULT_PROMPT, load_demo_model
from ttt_fast.naive import naive_adapt, prompt_loss
from ttt_fast.study import Grid, ResultsError, StudyReport, study
from ttt_fast.study.figures import require_matplotlib
from ttt_fast.study.shards import first_process, own_device
from ttt_fast.study.tasks import find_task

# What Hugging Face raises for a name, a folder or files that it can do nothing with.
_NOT_A_MODEL = (OSError, ValueError, ModuleNotFoundError)


class CommandError(Exception):
    """Something the user can put right: one line on stderr and exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    command = {
        "adapt": _adapt,
        "audit": _audit,
        "study": _study,
        "study-report": _study_report,
        "lm-eval": _lm_eval,
        "doctor": _doctor,
    }[args.command]
    try:
        return command(args)
    except CommandError as error:
        print(f"ttt-fast: {error}", file=sys.stderr)
        return 2
    except DivergedError as error:
        print(f"ttt-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _config(args: argparse.Namespace) -> TTTConfig:
    with _bad_input(ValueError, TypeError):
        return TTTConfig(**settings(args))


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
    prompts = _prompts(args)
    if args.max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens {args.max_new_tokens}: it must be at least 1.")
    several = len(prompts) > 1
    if several and (args.compare or args.plot is not None):
        option = "--compare" if args.compare else "--plot"
        raise CommandError(f"{option}: takes one prompt, got {len(prompts)}. Leave it out.")
    if args.plot is not None:
        _check_plot(args.plot)
    with redirect_stdout(sys.stderr):  # libraries may print
        if several:
            result = _adapt_independently(args, config, prompts)
        else:
            result = _adapt_and_compare(args, config, prompts[0])
    show = page_of_several if several else page
    print(json.dumps(result, indent=2) if args.json else show(result))
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
        runs["naive"] = _run_naive(model, inputs, naive_options, answer)
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
        **_facts(args, model, trainer),
        "prompt": prompt,
        "prompt_tokens": ids.shape[1],
        "loss_before": loss_before,
        "answer_before": answer_before,
        **{name: vars(run) for name, run in runs.items()},
        "ratio": ratios(runs),
        "engine": adapted.report().splitlines()[0],
        "weights": _weights(hash_before, hash_after),
    }


def _run_naive(
    model: nn.Module,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    answer: Callable[..., str],
) -> Run:
    """The naive loop on the same prompt; the model has its weights back afterwards."""
    _return_free_memory()
    with _progress("naive loop", options["steps"]) as on_step:
        result = naive_adapt(model, inputs["input_ids"], on_step=on_step, **options)
    with torch.no_grad():
        after = float(prompt_loss(model, **inputs, reduction=options["reduction"]))
        with result.phases("generate"):
            text = answer(model.generate, **inputs)
    result.restore()
    return Run(
        result.losses.tolist(), result.grad_norms.tolist(), after, text,
        result.phases.ms, result.phases.peak_bytes,
    )  # fmt: skip


def _adapt_independently(
    args: argparse.Namespace, config: TTTConfig, prompts: Sequence[str]
) -> dict[str, Any]:
    """Everything ``ttt-fast adapt`` does with several prompts, as one JSON-able dict."""
    model, tokenizer = _load(args.model, args.dtype, args.device)
    rows = [_encode(tokenizer, prompt, args.chat)[0].to(model.device) for prompt in prompts]
    hash_before = parameter_hash(model)
    with _bad_input(ValueError, TypeError):
        trainer = TTTTrainer(model, config)
        adapted = trainer.adapt(rows, deltas="independent", progress=True)
    with adapted:
        after = adapted.loss().tolist()
        answers = adapted.generate(max_new_tokens=args.max_new_tokens, do_sample=False)
    width = max(row.numel() for row in rows)  # prompts end side by side: all answers begin here
    hash_after = parameter_hash(model)
    return {
        **_facts(args, model, trainer),
        "engine": adapted.report().splitlines()[0],
        "prompts": [
            {
                "prompt": prompt,
                "prompt_tokens": rows[n].numel(),
                "losses": adapted.losses[n].tolist(),
                "grad_norms": adapted.grad_norms[n].tolist(),
                "loss_after": after[n],
                "update_landed": float(adapted.update_landed[n]),
                "answer": tokenizer.decode(answers[n, width:], skip_special_tokens=True),
            }
            for n, prompt in enumerate(prompts)
        ],
        "ms": adapted.timings,
        "peak_bytes": adapted.peak_bytes,
        "weights": _weights(hash_before, hash_after),
    }


def _facts(args: argparse.Namespace, model: Any, trainer: TTTTrainer) -> dict[str, Any]:
    """What a run's numbers depend on."""
    config = trainer.config
    return {
        "model": args.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "selected_parameters": sum(selection.numel for selection in trainer.selections),
        "config": {o.name: _plain(getattr(config, o.name)) for o in fields(config)},
    }


def _weights(before: str, after: str) -> dict[str, Any]:
    return {"before": before, "after": after, "bitwise_equal": before == after}


def _prompts(args: argparse.Namespace) -> list[str]:
    """The prompts, at least one, from the one place where they were given."""
    given = {
        "a prompt": args.prompt,
        "--prompt": args.prompts,
        "--prompt-file": args.prompt_file,
        "--prompt-lines": args.prompt_lines,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise CommandError(f"got {' and '.join(names)}; give one of them.")
    with _bad_input(OSError, UnicodeDecodeError):
        if args.prompt_file is not None:
            return [args.prompt_file.read_text(encoding="utf-8")]
        if args.prompt_lines is not None:
            lines = args.prompt_lines.read_text(encoding="utf-8").splitlines()
            prompts = [line for line in lines if line.strip()]
            if not prompts:
                raise CommandError(f"--prompt-lines {args.prompt_lines}: no line has text.")
            return prompts
    texts = args.prompts or ([] if args.prompt is None else [args.prompt])
    if not texts and args.model != "demo":
        raise CommandError('no prompt; give one as text, with --prompt-file, or "-" for stdin.')
    return [sys.stdin.read() if t == "-" else t for t in texts] or [DEFAULT_PROMPT]


def _load(name: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch_dtype: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    with _bad_input(*_NOT_A_MODEL, about=f"model {name!r}: "):
        if name == "demo":
            model, tokenizer = load_demo_model(torch.float32 if dtype == "auto" else torch_dtype)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
    with _bad_input(RuntimeError, AssertionError):  # torch: unknown or absent device
        return model.to(own_device(device)), tokenizer


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
    if config.kv != "exact":
        raise CommandError(
            "--compare: the naive loop sees the whole prompt, --kv frozen spans of it; these are"
            " two objectives. Leave one of them out."
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


# ---------------------------------------------------------------------------- audit


def _audit(args: argparse.Namespace) -> int:
    prompt = _prompts(args)[0]
    if args.plot is not None:
        _check_plot(args.plot)
    with redirect_stdout(sys.stderr):
        model, tokenizer = _load(args.model, args.dtype, args.device)
        ids = _encode(tokenizer, prompt, args.chat).to(model.device)
        with _bad_input(ValueError, TypeError):
            report = audit(
                model,
                ids,
                lrs=args.lrs,
                modes=args.modes,
                progress=True,
                **settings(args),
            )
    report.conditions["model"] = args.model
    print(report.to_json() if args.json else report.page())
    if args.plot is not None:
        report.plot(args.plot)
        print(f"plot: {args.plot}", file=sys.stderr if args.json else sys.stdout)
    return 0 if report.restored else 1


# ---------------------------------------------------------------------------- study


def _study(args: argparse.Namespace) -> int:
    with _bad_input(ValueError, TypeError, ModuleNotFoundError):
        require_matplotlib()
        axes, options = study_settings(args)
        grid = Grid(**(find_task(args.task).axes | axes))
    with redirect_stdout(sys.stderr), _resumable(args.out):
        model, tokenizer = _load(args.model, args.dtype, args.device)
        hash_before = parameter_hash(model)
        with _bad_input(OSError, ValueError, TypeError, ResultsError):
            report = study(
                args.task,
                model,
                tokenizer,
                args.data,
                args.out,
                grid=grid,
                prompts=args.prompts,
                seed=args.seed,
                chat=args.chat,
                max_new_tokens=args.max_new_tokens,
                segment_tokens=args.segment_tokens,
                delta_norm=args.delta_norm,
                sha256=args.sha256,
                name=args.model,
                show=print,
                only_plan=args.plan,
                progress=True,
                **options,
            )
            writes = first_process() and not args.plan
            files = report.write(args.out) if writes else []
        came_back = parameter_hash(model) == hash_before
    if files:
        print(report)
        print("\n".join(["", *map(str, files)]))
    if not came_back:
        print("ttt-fast: THE WEIGHTS DID NOT COME BACK", file=sys.stderr)
    return 0 if came_back else 1


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nttt-fast: interrupted; the same command goes on from what is in {folder}")
        raise


def _study_report(args: argparse.Namespace) -> int:
    with _bad_input(ModuleNotFoundError, OSError, ResultsError):
        report = StudyReport.read(*args.folders)
        files = []
        if args.out is not None:
            require_matplotlib()
            args.out.mkdir(parents=True, exist_ok=True)
            files = report.write(args.out)
    print("\n".join([str(report), *map(str, files)]))
    return 0


# ---------------------------------------------------------------------------- lm-eval


def _lm_eval(args: argparse.Namespace) -> int:
    if find_spec("lm_eval") is None:
        raise CommandError("lm-eval needs lm-evaluation-harness: pip install 'ttt-fast[lm-eval]'")
    from ttt_fast import harness

    return harness.main(args.arguments)


# ---------------------------------------------------------------------------- doctor


def _doctor(args: argparse.Namespace) -> int:
    config = _config(args)
    if args.tokens < 2:
        raise CommandError(f"--tokens {args.tokens}: a prompt has at least 2.")
    if args.deltas < 1:
        raise CommandError(f"--deltas {args.deltas}: it must be at least 1.")
    about = f"model {args.model!r}: " if args.model is not None else ""
    with redirect_stdout(sys.stderr), _bad_input(*_NOT_A_MODEL, TypeError, about=about):
        report = doctor.report(
            config,
            model=args.model,
            dtype=args.dtype,
            tokens=args.tokens,
            deltas=args.deltas,
            calibrate=args.calibrate,
        )
    print(json.dumps(report, indent=2) if args.json else doctor.page(report))
    return 0
