"""The numbers of an adaptation against the loop a researcher writes."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.families import FAMILIES, FUSED_QUERY, tiny_model
from tests.loops import (
    distance,
    params_of,
    prompt_ids,
    row_loss,
    selected_rows_loop,
    sgd_loop,
    twin,
    weights,
)
from ttt_fast import TTTConfig, TTTTrainer, select_parameters
from ttt_fast.demo import PROMPTS, load_demo_model
from ttt_fast.naive import naive_adapt

# tests/test_factored.py holds the other engine against the same loops.
dense_config = functools.partial(TTTConfig, engine="dense")

SCOPES = ("all", "ffn", "attention", "query", "norm", "embedding", "head")
RICH = dict(lr=2e-2, momentum=0.9, nesterov=True, weight_decay=0.1, max_grad_norm=2.0)


def assert_as_naive(model, ids, steps, tolerance=1e-12, scope="all", layers=None, **options):
    """Adapt ``model`` and the naive loop a twin: losses, norms and final weights must agree."""
    other = twin(model)
    before = weights(model)
    params = params_of(other, select_parameters(model, scope, layers))
    naive_options = {name: value for name, value in options.items() if name not in ("betas", "eps")}
    if options.get("optimizer") == "adamw":
        naive_options["optimizer_kwargs"] = {
            name: options[name] for name in ("betas", "eps") if name in options
        }
    expected = naive_adapt(other, ids, steps=steps, params=params, **naive_options)
    trainer = TTTTrainer(model, dense_config(steps=steps, scope=scope, layers=layers, **options))
    with trainer.adapt(ids, deltas="shared") as adapted:
        assert torch.allclose(adapted.losses[0], expected.losses, rtol=tolerance, atol=0)
        assert torch.allclose(adapted.grad_norms[0], expected.grad_norms, rtol=tolerance, atol=0)
        assert distance(model, other) <= tolerance
        moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        assert moved, "nothing was adapted"
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


# ---------------------------------------------------------------------------- float64, all options


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_rich_options(family):
    tolerance = 1e-6 if family.startswith("gemma") else 1e-12
    assert_as_naive(tiny_model(family, torch.float64), prompt_ids(), 6, tolerance, **RICH)


def test_the_comparison_notices_a_wrong_option():
    model = tiny_model("llama", torch.float64)
    other = twin(model)
    naive_adapt(other, prompt_ids(), steps=3, **RICH)
    wrong = RICH | dict(weight_decay=0.1001)
    with TTTTrainer(model, dense_config(steps=3, **wrong)).adapt(prompt_ids()):
        assert distance(model, other) > 1e-9


GRID = [
    dict(momentum=momentum, dampening=dampening, nesterov=nesterov, weight_decay=decay,
         max_grad_norm=clip, reduction=reduction)
    for momentum, dampening, nesterov, decay, clip, reduction in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.1), (None, 0.5), ("mean", "sum")
    )
    if not (nesterov and (momentum == 0 or dampening != 0)) and (momentum or not dampening)
]  # fmt: skip


@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_option_grid(options):
    # An unclipped sum of losses needs a small step to stay finite.
    assert_as_naive(tiny_model("qwen2", torch.float64), prompt_ids(), 5, lr=2e-3, **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_option_grid_of_every_family(family):
    for options in GRID:
        assert_as_naive(tiny_model(family, torch.float64), prompt_ids(), 5, lr=2e-3, **options)


@pytest.mark.parametrize("scope", [s for s in SCOPES if s != "query"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_scopes(family, scope):
    assert_as_naive(tiny_model(family, torch.float64), prompt_ids(), 4, scope=scope, **RICH)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_scopes_of_every_family(family):
    for scope in SCOPES:
        if scope != "query" or family not in FUSED_QUERY:
            assert_as_naive(tiny_model(family, torch.float64), prompt_ids(), 4, scope=scope, **RICH)


def test_query_of_an_unfused_projection():
    assert_as_naive(tiny_model("qwen2", torch.float64), prompt_ids(), 4, scope="query", **RICH)


@pytest.mark.parametrize("family", FUSED_QUERY)
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_query_rows_of_a_fused_projection(family, max_grad_norm):
    """Only the rows move, and only they count in the norm: the loop zeroes all other gradients."""
    model = tiny_model(family, torch.float64)
    other = twin(model)
    ids = prompt_ids()
    norms = selected_rows_loop(
        other, [lambda m: row_loss(m, ids[0])] * 4, select_parameters(model, "query"),
        lr=2e-2, momentum=0.9, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    config = dense_config(steps=4, lr=2e-2, scope="query", max_grad_norm=max_grad_norm)
    with TTTTrainer(model, config).adapt(ids) as adapted:
        assert distance(model, other) <= 1e-12
        assert adapted.grad_norms[0].tolist() == pytest.approx(norms, rel=1e-12)


def test_layers():
    for layers in ("-1:", [0, 2]):
        model = tiny_model("llama", torch.float64)
        assert_as_naive(model, prompt_ids(), 4, scope="ffn", layers=layers, **RICH)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(family, decay):
    options = dict(
        optimizer="adamw", lr=3e-3, weight_decay=decay, betas=(0.8, 0.95), max_grad_norm=1.0
    )
    # The division by sqrt(v) magnifies the last bits of gradients that are nearly zero.
    model = tiny_model(family, torch.float64)
    assert_as_naive(model, prompt_ids(), 6, tolerance=1e-11, eps=1e-6, **options)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decoupled_decay_of_sgd(momentum):
    model = tiny_model("gemma2", torch.float64)
    other, ids = twin(model), prompt_ids()
    options = dict(lr=2e-2, momentum=momentum, weight_decay=0.2, max_grad_norm=1.0)
    sgd_loop(other, [lambda m: row_loss(m, ids[0])] * 5, decoupled=True, **options)
    config = dense_config(steps=5, decoupled_weight_decay=True, **options)
    with TTTTrainer(model, config).adapt(ids):
        assert distance(model, other) <= 1e-12


@pytest.mark.parametrize("as_function", [False, True])
def test_lr_schedule(as_function):
    rates = [1e-2, 3e-2, 0.0, 5e-3]
    model = tiny_model("llama", torch.float64)
    other, ids = twin(model), prompt_ids()
    losses, _ = sgd_loop(other, [lambda m: row_loss(m, ids[0])] * 4, lr=rates, momentum=0.9)
    lr = rates.__getitem__ if as_function else rates
    config = dense_config(steps=4, lr=lr, max_grad_norm=None)
    with TTTTrainer(model, config).adapt(ids) as adapted:
        assert distance(model, other) <= 1e-12
        assert torch.allclose(adapted.losses[0], torch.tensor(losses, dtype=torch.float64))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_param_groups(optimizer):
    """No decay on norms, another lr on the last layer's FFN; the first match counts; one norm."""
    model = tiny_model("qwen3", torch.float64)
    other, ids = twin(model), prompt_ids()
    last = r"layers\.2\.mlp\."
    groups = [
        {"params": "norm", "weight_decay": 0.0},
        {"params": last, "lr": 5e-3},
        {"params": "ffn", "lr": 1.0, "weight_decay": 0.3},
    ]
    config = dense_config(
        steps=5, lr=1e-2, weight_decay=0.1, optimizer=optimizer, eps=1e-6,
        param_groups=[groups[0], groups[1]], max_grad_norm=1.0,
    )  # fmt: skip
    norm = params_of(other, select_parameters(model, "norm"))
    ffn = params_of(other, select_parameters(model, last))
    chosen = {id(p) for p in norm + ffn}
    rest = [p for p in other.parameters() if id(p) not in chosen]
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    extra = dict(momentum=0.9) if optimizer == "sgd" else dict(eps=1e-6)
    torch_groups = [dict(params=norm, weight_decay=0.0), dict(params=ffn, lr=5e-3),
                    dict(params=rest)]  # fmt: skip
    stock = make(torch_groups, lr=1e-2, weight_decay=0.1, **extra)
    for _ in range(5):
        stock.zero_grad()
        row_loss(other, ids[0]).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        stock.step()
    with TTTTrainer(model, config).adapt(ids):
        assert distance(model, other) <= 1e-11
        adapted = weights(model)
    # With a later group that also matches the last layer's FFN, the earlier one still wins.
    config = dense_config(
        steps=1, lr=0.0, momentum=0.0, param_groups=groups[1:], optimizer=optimizer, max_grad_norm=1
    )
    before = weights(model)
    with TTTTrainer(model, config).adapt(ids):
        now = model.state_dict()
        moved = {n: (now[n] - before[n]).norm() / before[n].norm() for n in now}
    name = "model.layers.{}.mlp.up_proj.weight"
    assert 0 < moved[name.format(2)] < 0.1 * moved[name.format(1)]
    assert moved["model.norm.weight"] == 0 and adapted.keys() == before.keys()


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    n_tokens=st.integers(2, 20),
    steps=st.integers(1, 7),
    scope=st.sampled_from(["all", "ffn", "attention", "norm", "embedding", "head"]),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    dampening=st.sampled_from([0.0, 0.4]),
    nesterov=st.booleans(),
    weight_decay=st.sampled_from([0.0, 1e-3, 0.5]),
    max_grad_norm=st.sampled_from([None, 1e-3, 1.0, 1e6]),
    reduction=st.sampled_from(["mean", "sum"]),
    attention=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 10),
)
def test_any_options(family, n_tokens, steps, scope, attention, seed, **options):
    if options["nesterov"] and (not options["momentum"] or options["dampening"]):
        options |= dict(momentum=0.9, dampening=0.0)
    attention = "eager" if family == "gemma2" else attention
    model = tiny_model(family, torch.float64, seed=seed, attn_implementation=attention)
    ids = prompt_ids(n_tokens, seed=seed)
    # Rounding is magnified by each step that overshoots, so the steps are small.
    # Gemma's norms work in float32 all the same: other sums in front of one round otherwise there.
    tolerance = 1e-6 if family.startswith("gemma") else 1e-12
    assert_as_naive(model, ids, steps, tolerance, scope=scope, lr=1e-3, **options)


# ---------------------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "opt", "qwen2_moe"])
@pytest.mark.parametrize(
    "options",
    [
        dict(lr=1e-2, momentum=0.9, max_grad_norm=1.0),
        dict(lr=3e-2, momentum=0.9, nesterov=True, weight_decay=0.1, max_grad_norm=None),
        dict(lr=1e-2, momentum=0.5, dampening=0.5, weight_decay=0.01, max_grad_norm=0.3),
        dict(lr=3e-2, momentum=0.0, max_grad_norm=10.0),
        dict(lr=3e-3, optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0),
    ],
    ids=["momentum", "nesterov", "dampening", "plain", "adamw"],
)
def test_rounding_torch_is_bitwise_the_stock_loop(family, options):
    model = tiny_model(family, torch.bfloat16)
    other, ids = twin(model), prompt_ids(17)
    naive_adapt(other, ids, steps=7, optimizer_kwargs=dict(foreach=True), **options)
    before = weights(model)
    with TTTTrainer(model, dense_config(steps=7, rounding="torch", **options)).adapt(ids):
        for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def bf16_run(lr, steps=8, dtype=torch.bfloat16, prompt=1, **options):
    """Adapt beside an fp64 twin of the same weights; update_landed and distance to the twin."""
    model = tiny_model("llama", torch.bfloat16).to(dtype)
    oracle = tiny_model("llama", torch.bfloat16).double()
    start = [p.detach().clone() for p in oracle.parameters()]
    ids = prompt_ids(15, seed=prompt)
    naive_adapt(oracle, ids, steps=steps, lr=lr, momentum=0.9, max_grad_norm=1.0)
    config = dense_config(steps=steps, lr=lr, momentum=0.9, max_grad_norm=1.0, **options)
    with TTTTrainer(model, config).adapt(ids) as adapted:
        pairs = list(zip(model.parameters(), oracle.parameters(), start, strict=True))
        error = sum((p - q).detach().square().sum().item() for p, q, _ in pairs)
        length = sum((q - s).detach().square().sum().item() for _, q, s in pairs)
    return float(adapted.update_landed), math.sqrt(error / length)


def test_update_landed_tells_where_small_steps_vanish():
    assert bf16_run(1e-6, rounding="torch")[0] < 0.05
    assert bf16_run(1e-6, rounding="nearest")[0] < 0.05
    assert bf16_run(1e-6, dtype=torch.float32)[0] == pytest.approx(1.0, abs=0.02)
    # Stochastic rounding lands in the mean, whatever single weights do.
    assert bf16_run(1e-3, rounding="stochastic")[0] == pytest.approx(1.0, abs=0.25)
    assert bf16_run(3e-1, rounding="nearest")[0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
def test_a_kept_delta_is_no_farther_from_float64_than_rounding_each_step(lr):
    # In the mean of some prompts: where steps are large, rounding decides who is nearer in one.
    runs = [
        (bf16_run(lr, prompt=n, rounding="nearest"), bf16_run(lr, prompt=n, accumulate="delta"))
        for n in range(8)
    ]
    assert sum(kept for _, (_, kept) in runs) <= sum(each for (_, each), _ in runs) * 1.001
    for (landed_each, _), (landed_kept, _) in runs:
        assert abs(landed_kept - 1) <= abs(landed_each - 1) + 1e-3


def test_a_kept_delta_lands_once_it_is_large_enough():
    # Each step is below half a unit in the last place of most weights, forty together are not.
    assert bf16_run(2e-3, steps=40, rounding="nearest")[0] < 0.7
    assert bf16_run(2e-3, steps=40, accumulate="delta")[0] > 0.8


def test_a_kept_delta_in_float32_changes_the_numbers_by_rounding_only():
    model = tiny_model("llama", torch.float32)
    other, ids = twin(model), prompt_ids()
    with TTTTrainer(model, dense_config(steps=6, lr=1e-2)).adapt(ids):
        with TTTTrainer(other, dense_config(steps=6, lr=1e-2, accumulate="delta")).adapt(ids):
            assert 0 < distance(model, other) < 1e-6


def test_stochastic_rounding_repeats_with_its_seed():
    ids = prompt_ids()
    runs = []
    for seed in (0, 0, 1):
        model = tiny_model("llama", torch.bfloat16)
        config = dense_config(steps=4, lr=1e-3, rounding="stochastic", seed=seed)
        with TTTTrainer(model, config).adapt(ids):
            runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# ---------------------------------------------------------------------------- the real model

# Delta over weights. 1e-2 is mostly weight decay: steps whose gradients alone move this model so
# far diverge (lr 0.3, clip 1: the loss goes from 2.3 to 9).
SMALL_SHARE, LARGE_SHARE = (1e-6, 1e-4), (4e-3, 3e-2)
SIX_STEPS = [
    (dict(lr=1e-3, momentum=0.9, weight_decay=1e-3), SMALL_SHARE),  # 2e-5
    (dict(lr=5e-2, momentum=0.9, weight_decay=1e-2), LARGE_SHARE),  # 9e-3
]
TWENTY_STEPS = [(5e-5, SMALL_SHARE), (2e-2, LARGE_SHARE)]


@pytest.fixture(scope="module")
def demo_model_fp64():
    """The real model in float64: the oracle; tests leave its weights as they were."""
    return load_demo_model(dtype=torch.float64)[0]


def length(tensors):
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def deltas(params, originals):
    """One delta at a time, so that none is kept."""
    return (p.detach().double() - o for p, o in zip(params, originals, strict=True))


def gap(params, originals, exact):
    """|delta - exact delta| over all parameters."""
    return length(d - e for d, e in zip(deltas(params, originals), exact, strict=True))


def assert_no_farther_than_naive(models, text, steps, share, **options):
    """Our fp32 delta is at most 1.2 times as far from the fp64 loop as the naive fp32 loop's."""
    (model, tokenizer), oracle = models
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    result = naive_adapt(oracle, ids, steps=steps, **options)
    # float32 is enough to hold it: the distances are thousands of times its rounding.
    exact = [d.float() for d in deltas(result.params, result.originals)]
    result.restore()
    size = length(exact)
    assert share[0] <= size / length(result.originals) <= share[1]
    result = naive_adapt(model, ids, steps=steps, **options)
    originals = result.originals
    naive = gap(result.params, originals, exact)
    result.restore()
    with TTTTrainer(model, dense_config(steps=steps, **options)).adapt(ids):
        ours = gap(model.parameters(), originals, exact)
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), originals, strict=True))
    assert 0 < ours <= 1.2 * naive, f"ours {ours:.3g}, naive {naive:.3g}, delta {size:.3g}"


@pytest.mark.real_model
@pytest.mark.parametrize(("options", "share"), SIX_STEPS, ids=["small", "large"])
def test_real_model(demo_model, demo_model_fp64, options, share):
    models = demo_model, demo_model_fp64
    assert_no_farther_than_naive(models, PROMPTS[0], 6, share, max_grad_norm=1.0, **options)


REAL_OPTIONS = [
    dict(momentum=0.9),
    dict(momentum=0.0),
    dict(momentum=0.9, nesterov=True),
    dict(momentum=0.9, dampening=0.3),
    dict(momentum=0.5, reduction="sum"),
    dict(momentum=0.9, nesterov=True, max_grad_norm=2.0),
    dict(momentum=0.0, reduction="sum"),
    dict(momentum=0.9, max_grad_norm=0.1),
    dict(momentum=0.5, nesterov=True),
    dict(momentum=0.8, dampening=0.1),
]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize(("lr", "share"), TWENTY_STEPS, ids=["small", "large"])
@pytest.mark.parametrize("n", range(10))
def test_real_model_on_ten_prompts(demo_model, demo_model_fp64, n, lr, share):
    options = dict(max_grad_norm=1.0, weight_decay=5e-3) | REAL_OPTIONS[n]
    # With momentum a gradient moves the weights by up to 1 / (1 - momentum) steps.
    options["lr"] = lr * 10 * (1 - options["momentum"])
    assert_no_farther_than_naive((demo_model, demo_model_fp64), PROMPTS[n], 20, share, **options)
