"""The speeds that the choice of an engine rests on: measured once a machine, kept in a file.

``ttt-fast doctor --calibrate`` measures; without it the documented defaults below serve. The file
lies in ``$XDG_CACHE_HOME/ttt_fast`` or ``~/.cache/ttt_fast``, one for each processor, number of
threads, torch version and dtype. A file that cannot be read is reported and ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ttt_fast import ops
from ttt_fast.batch import Batch
from ttt_fast.engines import cost, policy
from ttt_fast.engines.machine import Machine, smooth
from ttt_fast.engines.products import linear
from ttt_fast.engines.work import Workload
from ttt_fast.objective import negative_log_likelihood

FORMAT = 1
ROWS = (1, 8, 20, 64, 256, 1024)
RANKS = (32, 128, 512)
# A narrow decoder, whose time is that of its many modules, and a wide one, whose time is that of
# its activations; with their tokens.
_DECODERS: dict[str, tuple[dict[str, int], int]] = {
    "narrow": (
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12,
         "num_attention_heads": 2, "num_key_value_heads": 1},
        20,
    ),
    "wide": (
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
         "num_attention_heads": 9, "num_key_value_heads": 3},
        256,
    ),
}  # fmt: skip
_VOCABULARY = 512
_ADAPT_STEPS = 6
# A speed where noise hides what is to be measured.
_LEAST = 1e-6

# Two cores of an AMD EPYC with AVX-512 and bfloat16 instructions, torch 2.13.0: what a laptop or a
# share of a server has, give or take two. Only ratios matter for the choice.
_CPU = {
    "float32": Machine(
        dtype="float32",
        source="defaults for a CPU",
        copy_gb_s=42.0,
        update_gb_s=32.0,
        rows=ROWS,
        product_ns=(0.18, 0.23, 0.28, 0.72, 2.8, 10.7),
        weight_gradient_ns=(0.18, 0.36, 0.42, 0.84, 2.8, 10.4),
        gram_ns=(1.0, 1.0, 1.0, 1.0, 2.7, 9.2),
        ranks=RANKS,
        delta_slowdown=(2.0, 1.3, 1.0),
        module_us=110.0,
        element_ns=2.6,
        logit_ns=1.2,
        dense_module_us=135.0,
        factored_module_us=160.0,
    ),
}
_CPU["bfloat16"] = dataclasses.replace(
    _CPU["float32"],
    dtype="bfloat16",
    copy_gb_s=29.0,
    update_gb_s=18.0,
    product_ns=(0.15, 0.17, 0.23, 0.45, 1.3, 4.9),
    weight_gradient_ns=(0.13, 0.14, 0.18, 0.4, 1.3, 5.0),
    delta_slowdown=(2.6, 1.5, 1.2),
    module_us=190.0,
)
# Computed from the data sheet of an 80 GB H100 at half of its peak, not measured.
_GPU = Machine(
    dtype="bfloat16",
    source="defaults for a GPU, computed and not measured",
    copy_gb_s=2400.0,
    update_gb_s=2400.0,
    rows=ROWS,
    product_ns=(8e-4, 8e-4, 8e-4, 8e-4, 1.28e-3, 5.12e-3),
    weight_gradient_ns=(1.6e-3, 1.6e-3, 1.6e-3, 1.6e-3, 1.6e-3, 5.12e-3),
    gram_ns=(1.6e-3, 1.6e-3, 1.6e-3, 1.6e-3, 2.6e-3, 1.02e-2),
    ranks=RANKS,
    delta_slowdown=(2.0, 1.5, 1.0),
    module_us=60.0,
    element_ns=2e-3,
    logit_ns=1e-2,
    dense_module_us=40.0,
    factored_module_us=100.0,
)


# ---------------------------------------------------------------------------- the file


def machine(dtype: torch.dtype | str, device: torch.device | str = "cpu") -> Machine:
    """The speeds of this machine: those that were measured, else the defaults. Never raises.

    The file is read when it is new, or has been replaced since it was read.

    Args:
        dtype: of the weights.
        device: where they are.
    """
    dtype, device = str(dtype).removeprefix("torch."), torch.device(device)
    try:
        path = cache_file(dtype, device)
        found = path.stat()
    except (OSError, RuntimeError):
        # No file, or not even a home to look for it in.
        return default_machine(dtype, device)
    return _read(path, dtype, device, (found.st_ino, found.st_mtime_ns, found.st_size))


@lru_cache(maxsize=16)
def _read(path: Path, dtype: str, device: torch.device, version: tuple[int, ...]) -> Machine:
    """The speeds in a file; ``version`` is another one for a file that was written since."""
    try:
        return _parse(path.read_bytes(), _key(dtype, device))
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"{path} is ignored ({error}); `ttt-fast doctor --calibrate` measures again.",
            stacklevel=3,
        )
        return default_machine(dtype, device)


@cache
def default_machine(dtype: torch.dtype | str, device: torch.device | str = "cpu") -> Machine:
    """Speeds of a usual machine of the kind."""
    dtype = str(dtype).removeprefix("torch.")
    near = "bfloat16" if getattr(torch, dtype).itemsize <= 2 else "float32"
    found = _CPU[near] if torch.device(device).type == "cpu" else _GPU
    return dataclasses.replace(found, dtype=dtype)


def cache_file(dtype: torch.dtype | str, device: torch.device | str = "cpu") -> Path:
    """Where the measured speeds of this machine are kept.

    Raises:
        RuntimeError: the system knows no home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttt_fast"
    key = _key(str(dtype).removeprefix("torch."), torch.device(device))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"speeds-{key['dtype']}-{digest}.json"


def _key(dtype: str, device: torch.device) -> dict[str, Any]:
    """What the speeds depend on."""
    key: dict[str, Any] = {"dtype": dtype, "torch": torch.__version__}
    if device.type == "cuda":
        return key | {"processor": torch.cuda.get_device_name(device)}
    return key | {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parse(raw: bytes, key: dict[str, Any]) -> Machine:
    content = json.loads(raw)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    if content.get("key") != key:
        raise ValueError("it was measured elsewhere")
    values = content["machine"]
    if not isinstance(values, dict):
        raise ValueError("it holds no speeds")
    return Machine(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _save(speeds: Machine, device: torch.device) -> Path:
    """Write the file in one piece: a reader finds the old one or the new one."""
    path = cache_file(speeds.dtype, device)
    content = {
        "format": FORMAT,
        "key": _key(speeds.dtype, device),
        "machine": dataclasses.asdict(speeds),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=".speeds-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
    return path


# ---------------------------------------------------------------------------- measuring


def calibrate(
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    *,
    rounds: int = 6,
    progress: bool = True,
) -> Machine:
    """Measure this machine in one dtype and keep the result.

    Cases take turns, ``rounds`` times, and the fastest round of each call counts: what neighbours
    on the machine did to the others is not its speed.

    Args:
        dtype: float32 or bfloat16 (any that torch multiplies).
        device: where.
        rounds: repetitions.
        progress: show a bar on stderr.

    Returns:
        the speeds, which :func:`machine` gives from now on.

    Raises:
        OSError: the cache folder cannot be written.
    """
    dtype, device = str(dtype).removeprefix("torch."), torch.device(device)
    torch_dtype = getattr(torch, dtype)
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        cases = {
            **_copy_cases(torch_dtype, device),
            **_product_cases(torch_dtype, device),
            **_delta_cases(torch_dtype, device),
            **_model_cases(torch_dtype, device),
        }
        seconds = _measure(cases, rounds, device, f"calibrating {dtype}" if progress else None)
        del cases
        speeds = _speeds(dtype, {name: 1e9 * s for name, s in seconds.items()})
    _save(speeds, device)
    return speeds


# What is timed: name -> (calls in their order, units of work that they do together). The calls are
# short, so that each has a chance of being left alone by whatever else runs on the machine.
Cases = dict[Any, tuple[list[Callable[[], Any]], float]]


def _measure(
    cases: Cases, rounds: int, device: torch.device, title: str | None
) -> dict[Any, float]:
    """Seconds for each unit of work of every case: the sum of its calls' fastest rounds."""
    best = {name: [float("inf")] * len(calls) for name, (calls, _) in cases.items()}
    total = (rounds + 1) * len(cases)  # the first round warms up
    with tqdm(total=total, desc=title, disable=title is None, leave=False) as bar:
        for i in range(rounds + 1):
            for name, (calls, _) in cases.items():
                for j, call in enumerate(calls):
                    _wait(device)
                    start = time.perf_counter()
                    call()
                    _wait(device)
                    if i:
                        best[name][j] = min(best[name][j], time.perf_counter() - start)
                bar.update()
    return {name: sum(best[name]) / units for name, (_, units) in cases.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copy_cases(dtype: torch.dtype, device: torch.device) -> Cases:
    """Bytes of a copy, and of the norm and update of SGD with momentum."""
    triples = [
        [torch.ones(3 << 20, dtype=dtype, device=device) for _ in range(3)] for _ in range(8)
    ]
    nbytes = sum(param.nbytes for param, _, _ in triples)

    def update(param: Tensor, grad: Tensor, momentum: Tensor) -> None:
        norm = ops.grad_norm([grad])
        options = {"lr": 1e-6, "momentum": 0.9, "grad_norm": norm, "max_grad_norm": 1.0}
        landed = torch.zeros(2, dtype=torch.float64, device=device)
        ops.sgd_([param], [grad], [momentum], landed=landed, **options)

    return {
        "copy": ([partial(ops.copy_, [p], [g]) for p, g, _ in triples], 2 * nbytes),
        "update": ([partial(update, *triple) for triple in triples], 6 * nbytes),
    }


def _product_cases(dtype: torch.dtype, device: torch.device) -> Cases:
    """Products with weights that are not in the cache, as in a model's forward and backward."""
    shapes = [*[(576, 576)] * 8, *[(1536, 576)] * 8, *[(576, 1536)] * 8, *[(2048, 2048)] * 2]
    weights = [torch.randn(s, device=device).mul_(0.02).to(dtype) for s in shapes]
    grads = [torch.empty_like(w) for w in weights]
    gram_norm = ops.implementation("gram_norm", device.type)
    cases: Cases = {}
    for M in ROWS:
        # Long ones are not about memory: a few weights will do.
        chosen = range(0, len(shapes), 1 if M <= 64 else 4 if M <= 256 else 8)
        units = sum(weights[i].numel() for i in chosen)
        rows = {n: torch.randn(M, n, device=device).to(dtype) for n in (576, 1536, 2048)}
        pairs = {i: (rows[shapes[i][1]], rows[shapes[i][0]]) for i in chosen}  # x, dy
        forward = [partial(linear, pairs[i][0], weights[i]) for i in chosen]
        backward = [partial(linear, pairs[i][1], weights[i].t()) for i in chosen]
        gradients = [partial(torch.mm, pairs[i][1].t(), pairs[i][0], out=grads[i]) for i in chosen]
        cases["product", M] = [*forward, *backward], 2 * units
        cases["weight_gradient", M] = gradients, units
        grams = [partial(gram_norm, x[None], dy[None]) for x, dy in pairs.values()]
        cases["gram", M] = grams, M * sum(sum(shapes[i]) for i in chosen)
    return cases


def _delta_cases(dtype: torch.dtype, device: torch.device) -> Cases:
    """((x Aᵀ) ∘ β) D of 20 tokens, the factors not in the cache."""
    x = torch.randn(1, 20, 576, device=device).to(dtype)
    op = ops.implementation("delta_linear", device.type)
    cases: Cases = {}
    for R in RANKS:
        beta = torch.rand(1, R, device=device)
        n_pairs = min(48, 12 * RANKS[-1] // R)
        sizes = [(1, R, 576), (1, R, 1536)]
        pairs = [[torch.randn(s, device=device).to(dtype) for s in sizes] for _ in range(n_pairs)]
        calls = [partial(op, x, None, a, d, beta, None, None) for a, d in pairs]
        cases["delta", R] = calls, n_pairs * R * (576 + 1536)
    return cases


def _model_cases(dtype: torch.dtype, device: torch.device) -> Cases:
    """Forward and backward of two decoders, whole adaptations of the narrow one, and the loss."""
    logits = torch.randn(1, 32, 49152, device=device).to(dtype).requires_grad_()
    labels = torch.zeros(1, 32, dtype=torch.int64, device=device)
    batch = Batch(labels, labels=labels)

    def loss() -> None:
        outputs = SimpleNamespace(logits=logits)
        negative_log_likelihood(outputs, batch, fused=True).sum().backward()
        logits.grad = None

    def step(model: nn.Module, embeddings: Tensor) -> None:
        hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        hidden.sum().backward()
        embeddings.grad = None

    cases: Cases = {"loss": ([loss], logits.numel())}
    for name, (shape, T) in _DECODERS.items():
        model = _decoder(name, dtype, device)
        embeddings = torch.randn(1, T, shape["hidden_size"], device=device).to(dtype)
        cases["decoder", name] = [partial(step, model, embeddings.requires_grad_())], 1
    for name, run in _adaptations(_decoder("narrow", dtype, device)):
        cases["adapt", name] = [run], _ADAPT_STEPS
    return cases


def _decoder(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape, _ = _DECODERS[name]
    config = LlamaConfig(vocab_size=_VOCABULARY, tie_word_embeddings=False, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    return model.requires_grad_(False)


def _adaptations(model: nn.Module) -> Iterator[tuple[str, Callable[[], None]]]:
    """Whole adaptations with each engine, every parameter training."""
    from ttt_fast import TTTConfig, TTTTrainer

    ids = torch.arange(_DECODERS["narrow"][1], device=model.device)[None]
    for engine in ("dense", "factored"):
        trainer = TTTTrainer(model, TTTConfig(lr=1e-6, steps=_ADAPT_STEPS, engine=engine))
        yield engine, lambda trainer=trainer: trainer.adapt(ids).restore()


def _speeds(dtype: str, ns: dict[Any, float]) -> Machine:
    """Turn nanoseconds for each unit of the cases into constants."""

    def table(name: str) -> tuple[float, ...]:
        return smooth(ROWS, [ns[name, M] for M in ROWS])

    product = table("product")
    slowdowns = [ns["delta", R] / product[ROWS.index(20)] for R in RANKS]
    works = [R * s for R, s in zip(RANKS, slowdowns, strict=True)]
    rising = [max(works[: i + 1]) / R for i, R in enumerate(RANKS)]
    speeds = Machine(
        dtype=dtype,
        source=f"measured on {time.strftime('%Y-%m-%d')}",
        copy_gb_s=1 / ns["copy"],
        update_gb_s=1 / ns["update"],
        rows=ROWS,
        product_ns=product,
        weight_gradient_ns=table("weight_gradient"),
        gram_ns=table("gram"),
        ranks=RANKS,
        delta_slowdown=tuple(rising),
        module_us=_LEAST,
        element_ns=_LEAST,
        logit_ns=ns["loss"],
        dense_module_us=_LEAST,
        factored_module_us=_LEAST,
    )
    speeds = dataclasses.replace(speeds, **_besides_products(ns, speeds))
    narrow = _decoder_workload("narrow", dtype)
    own = {}
    for engine, predict in (("dense", cost.dense_ms), ("factored", cost.factored_ms)):
        left = 1e-3 * ns["adapt", engine] - 1e3 * predict(narrow, speeds)
        own[f"{engine}_module_us"] = max(_LEAST, left / narrow.adapted_modules)
    return dataclasses.replace(speeds, **own)


def _besides_products(ns: dict[Any, float], speeds: Machine) -> dict[str, float]:
    """Solve the two decoders' times for what a module, and a token and element, takes."""
    rest, units = [], []
    for name in _DECODERS:
        work = _without_vocabulary(_decoder_workload(name, speeds.dtype))
        rest.append(ns["decoder", name] - 1e6 * cost.frozen_ms(work, speeds))
        units.append((work.modules, work.tokens * work.width))
    (m0, e0), (m1, e1) = units
    element_ns = max(_LEAST, (rest[1] * m0 - rest[0] * m1) / (e1 * m0 - e0 * m1))
    module_us = max(_LEAST, 1e-3 * (rest[0] - element_ns * e0) / m0)
    return {"element_ns": element_ns, "module_us": module_us}


def _without_vocabulary(work: Workload) -> Workload:
    """The blocks alone, as the decoders' cases run them."""
    blocks = tuple(x for x in work.layers if _VOCABULARY not in (x.out, x.in_))
    return dataclasses.replace(work, layers=blocks, vocabulary=0)


def _decoder_workload(name: str, dtype: str) -> Workload:
    from ttt_fast import TTTConfig, select_parameters

    model = _decoder(name, getattr(torch, dtype), torch.device("meta"))
    config = TTTConfig(steps=_ADAPT_STEPS)
    T = _DECODERS[name][1]
    return policy.workload(model, select_parameters(model, "all"), config, 1, T)
