"""A step never makes the host wait for the device, and launches no more as a session goes on.

The model is on the device "meta". Tensors there have no values, so all that would wait for a GPU
(item, nonzero, a copy to the host) raises by itself, and nothing of the path is that of a CPU.
Copies in the other direction and launches are counted where torch dispatches them. Our ops count
as the one launch that their kernels are, rank_sgd_ as one for each weight; plain torch, which
stands in for them on a device without kernels, looks at ``found_inf`` on the host.
"""

from collections import Counter
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
import transformers.masking_utils
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import Batch, TTTConfig, ops, select_parameters
from ttt_fast.batch import complete_batch, pad_rows
from ttt_fast.engines import dense
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.objective import negative_log_likelihood
from ttt_fast.session import Session, parts_of

ENGINES = {"dense": DenseEngine, "factored": FactoredEngine}
OPTIONS = dict(steps=8, weight_decay=0.01)
# These only reserve memory.
NO_LAUNCH = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


class Watch(TorchDispatchMode):
    """Counts launches, and notes what brings something from the host to the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.uploads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.uploads.append(name)
        if not func.is_view and name not in NO_LAUNCH:
            self.launches[name] += len(args[0]) if name == "ttt_fast::rank_sgd_" else 1
        return out


class WatchNumbers(TorchFunctionMode):
    """Notes tensors made from numbers of Python, which on "meta" leave no other trace."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor):
            self.watch.uploads.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_meta(monkeypatch):
    """What the device "meta" lacks, and what is the model's own."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    # Opaque, as kernels are, where the engines would call plain torch.
    monkeypatch.setattr(
        ops,
        "implementation",
        lambda name, device_type, backend="auto": partial(
            getattr(torch.ops.ttt_fast, name), backend="torch"
        ),
    )
    monkeypatch.setattr(dense, "Snapshot", NoSnapshot)
    monkeypatch.setattr(dense, "takes_factors", lambda device_type, backend: True)
    # transformers looks, once a forward, whether position ids are of several packed texts.
    monkeypatch.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda ids: None, raising=False
    )


class NoSnapshot:
    """Weights without values need none."""

    def __init__(self, selections, **options):
        self.originals = [selection.view().clone() for selection in selections]

    def restore(self):
        pass


def start(
    kind, family="llama_tied", lengths=(9,), objective=None, keep=True, configs=None, layers=3,
    **options,
):  # fmt: skip
    """A session on "meta", and what goes through the model in its steps."""
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = tiny_model(family, **{name: layers})
    config = TTTConfig(**(OPTIONS | options))
    ids, mask = pad_rows([prompt_ids(n, seed=n)[0] for n in lengths], 0, "right")
    index = torch.arange(len(lengths))
    batch = complete_batch(Batch(ids, attention_mask=mask, delta_index=index), model, len(lengths))
    parts = [(deltas, on_device(rows)) for deltas, rows in parts_of(batch, ENGINES[kind], config)]
    model.to("meta")
    engine = ENGINES[kind](model, select_parameters(model, "all"), config)
    objective = objective or partial(negative_log_likelihood, fused=True)
    begin = {} if configs is None else {"configs": [replace(config, **c) for c in configs]}
    session = Session(model, engine, config, len(lengths), objective, keep_diverged=keep, **begin)
    return session, parts


def on_device(rows):
    tensors = {f.name: getattr(rows, f.name) for f in fields(rows)}
    moved = {n: t.to("meta") for n, t in tensors.items() if isinstance(t, Tensor)}
    found = rows.padded  # what looking at the mask once has found
    rows = replace(rows, **moved)
    vars(rows)["padded"] = found
    return rows


def watch_steps(session, schedule):
    """A watch of each step; anything that waits for the device has raised."""
    watches = []
    for parts in schedule:
        with Watch() as watch, WatchNumbers(watch):
            session.step_parts(parts)
        watches.append(watch)
    return watches


def assert_free_of_uploads(watches):
    assert [watch.uploads for watch in watches] == [[]] * len(watches)


GROUPS = [{"params": "norm", "lr": [0.1 / (k + 1) for k in range(8)], "weight_decay": 0.0}]
GRID = [dict(lr=1e-3), dict(lr=1e-2, momentum=0.5), dict(lr=[0.1 / (k + 1) for k in range(8)])]
CASES = {
    "one": dict(),
    "gpt2": dict(family="gpt2"),  # slices of fused projections, biases, positions
    "gemma2": dict(family="gemma2"),  # scales inside its embedding
    "groups, schedule": dict(param_groups=GROUPS),
}
FACTORED = {
    "two": dict(lengths=(9, 9)),
    "padded": dict(lengths=(9, 6, 4)),
    "padded gpt2": dict(lengths=(9, 6), family="gpt2"),
    "grid": dict(lengths=(9, 9, 9), configs=GRID),
}
DENSE = {
    "several": dict(lengths=(9, 6)),
    "adamw": dict(optimizer="adamw"),
    "delta, stochastic": dict(accumulate="delta", rounding="stochastic"),
}
EVERY = [
    *[("factored", name, case) for name, case in (CASES | FACTORED).items()],
    *[("dense", name, case) for name, case in (CASES | DENSE).items()],
]


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, _, case in EVERY],
    ids=[f"{kind}, {name}" for kind, name, _ in EVERY],
)  # fmt: skip
def test_a_step_waits_for_nothing_and_launches_as_much_as_the_last(kind, case):
    session, parts = start(kind, **case)
    watches = watch_steps(session, [parts] * 5)
    assert_free_of_uploads(watches)
    # The first step differs: nothing was there before it.
    _, second, *later = [watch.launches for watch in watches]
    assert all(launches == second for launches in later)


def test_deltas_that_sit_out_and_start_at_different_rows():
    session, parts = start("factored", lengths=(9, 6, 4), max_batch_tokens=9)
    assert [deltas for deltas, _ in parts] == [(0,), (1,), (2,)]
    together = start("factored", lengths=(9, 6, 4))[1]
    watches = watch_steps(session, [parts, parts[1:], *[together] * 3, parts[1:], *[together] * 2])
    assert_free_of_uploads(watches)
    # Each behind a step of all three, after as many and after more of them.
    assert watches[-1].launches == watches[4].launches


@pytest.mark.parametrize("kind", ENGINES)
def test_launches_of_a_layer(kind):
    """Fewer than its plain forward and backward, which have neither norm nor update in them."""
    counts = []
    for layers in (2, 3):
        session, parts = start(kind, "llama", layers=layers)
        counts.append(watch_steps(session, [parts] * 2)[1].launches)
        # The norms of all matrices are one launch, however many there are.
        assert counts[-1]["ttt_fast::gram_norms"] == 1 and "ttt_fast::gram_norm" not in counts[-1]
        model = tiny_model("llama", num_hidden_layers=layers).to("meta")
        counts.append(launches_of(model, parts[0][1].input_ids))
    ours, theirs = (counts[i + 2].total() - counts[i].total() for i in (0, 1))
    assert 0 < ours <= theirs - {"dense": 4, "factored": 3}[kind] * 9  # 7 matrices, 2 norms


def launches_of(model: nn.Module, ids: Tensor) -> Counter[str]:
    """Of a plain forward and backward."""
    with Watch() as watch:
        model(ids, use_cache=False).logits.sum().backward()
    return watch.launches


class Record(TorchDispatchMode):
    """What is dispatched, with every number; of tensors only the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = dict(kwargs or {})
        arguments.pop("seed", None)
        shapes = tree_map(lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, args)
        self.calls.append((func.name(), f"{shapes} {arguments}"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "differing"),
    [(dict(), set()), (dict(optimizer="adamw"), {"ttt_fast::adamw_"})],
    ids=["sgd", "adamw"],
)
def test_what_steps_of_the_dense_engine_differ_in(options, differing):
    """Apart from seeds in nothing, or in AdamW's number of the step: so one could be replayed."""
    session, parts = start("dense", **options)
    calls = []
    for _ in range(3):
        with Record() as record:
            session.step_parts(parts)
        calls.append(record.calls)
    _, second, third = calls
    pairs = zip(second, third, strict=True)
    assert {mine[0] for mine, other in pairs if mine != other} == differing


# ---------------------------------------------------------------------------- the looks there are


@pytest.mark.parametrize("kind", ENGINES)
def test_the_host_looks_at_the_losses_when_the_steps_are_over(kind):
    session, parts = start(kind, keep=False)
    watch_steps(session, [parts] * (OPTIONS["steps"] - 1))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        watch_steps(session, [parts])


def test_the_host_looks_as_often_as_it_was_told():
    session, parts = start("factored", keep=False, check_every=2)
    watch_steps(session, [parts])
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        watch_steps(session, [parts])


# ---------------------------------------------------------------------------- that this can fail


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.sum().item(),
        lambda t: bool((t > 0).any()),
        lambda t: t.nonzero(),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t[t > 0],
    ],
    ids=["item", "bool", "nonzero", "cpu", "tolist", "mask"],
)
@pytest.mark.parametrize("kind", ENGINES)
def test_a_look_of_the_host_is_noticed(kind, look):
    def objective(outputs, batch):
        losses = negative_log_likelihood(outputs, batch)
        look(losses)
        return losses

    session, parts = start(kind, objective=objective)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        watch_steps(session, [parts])


@pytest.mark.parametrize(
    "upload",
    [
        lambda like: torch.tensor(0.5, device=like.device),
        lambda like: torch.full_like(like, 0.5, device="cpu").to(like.device),
        lambda like: torch.arange(3).to(like.device).sum(),
    ],
    ids=["tensor", "to", "arange"],
)
def test_an_upload_is_noticed(upload):
    def objective(outputs, batch):
        losses = negative_log_likelihood(outputs, batch)
        return losses * upload(losses)

    session, parts = start("factored", objective=objective)
    assert watch_steps(session, [parts])[0].uploads


def test_launches_that_grow_are_noticed():
    calls = []

    def objective(outputs, batch):
        losses = negative_log_likelihood(outputs, batch)
        calls.append(None)
        for _ in calls:
            losses = losses * 1.0
        return losses

    session, parts = start("dense", objective=objective)
    second, third = [watch.launches for watch in watch_steps(session, [parts] * 3)[1:]]
    assert third["aten::mul"] > second["aten::mul"]
