"""The numbers of the factored engine against the loops a researcher writes: one delta."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.factored_cases import (
    DENSE,
    OPTIONS,
    RICH,
    STEPS,
    assert_as_loop,
    assert_same_deltas,
    fp64,
    prompts_of,
    shown,
    trainer_of,
)
from tests.families import FUSED_QUERY, tiny_model
from tests.loops import params_of, prompt_ids, row_loss, selected_rows_loop, sgd_loop, twin
from ttt_fast import Batch, select_parameters
from ttt_fast.naive import naive_adapt


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DENSE)
def test_every_family(family, attention):
    assert_as_loop(fp64(family, attention), prompt_ids(), **RICH)


def test_the_comparison_notices_a_wrong_option():
    model, ids = fp64(), prompt_ids()
    other, base = twin(model), shown(model)
    sgd_loop(other, [lambda m: row_loss(m, ids[0])] * STEPS, **OPTIONS)
    with trainer_of(model, weight_decay=0.01001).adapt(ids):
        with pytest.raises(AssertionError):
            assert_same_deltas(shown(model), shown(other), base)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_are_refused_by_name(family):
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp.*engine='dense'"):
        trainer_of(tiny_model(family)).adapt(prompt_ids())
    with trainer_of(tiny_model(family), scope="attention").adapt(prompt_ids()) as adapted:
        assert adapted.losses[0, -1] < adapted.losses[0, 0]


MOMENTA = [
    dict(momentum=0.0),
    dict(momentum=0.9),
    dict(momentum=0.9, dampening=0.3),
    dict(momentum=0.9, nesterov=True),
]
DECAYS = [
    dict(weight_decay=0.0),
    dict(weight_decay=0.1),
    dict(weight_decay=0.1, decoupled_weight_decay=True),
]
GRID = [
    momentum | decay | dict(max_grad_norm=clip)
    for momentum, decay, clip in itertools.product(MOMENTA, DECAYS, (None, 0.5))
]


@pytest.mark.parametrize("options", GRID, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_option_grid(options):
    assert_as_loop(fp64(n_layers=1), prompt_ids(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_option_grid_of_every_family(family):
    for options in GRID:
        assert_as_loop(fp64(family), prompt_ids(), **options)


def test_lr_schedule():
    rates = [1e-2, 3e-2, 0.0, 5e-3]
    assert_as_loop(fp64(), prompt_ids(), lr=rates, weight_decay=0.1)


SCOPES = ("all", "ffn", "attention", "norm", "embedding", "head", r"layers\.1\.|h\.1\.")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_scopes(family, scope):
    assert_as_loop(fp64(family), prompt_ids(), scope=scope, **RICH)


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_scopes_of_every_family(family):
    for scope in SCOPES:
        assert_as_loop(fp64(family), prompt_ids(), scope=scope, **RICH)


def test_query_of_an_unfused_projection():
    assert_as_loop(fp64("qwen2"), prompt_ids(), scope="query", **RICH)


def test_a_list_of_names():
    """A bias without its weight, a weight without its bias, a module, one of q, k and v."""
    scope = [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj",
        "model.layers.0.mlp.up_proj",
        "model.norm.weight",
    ]
    assert_as_loop(fp64("qwen2"), prompt_ids(), scope=scope, **RICH)


@pytest.mark.parametrize("layers", ["-1:", [0]])
def test_layers(layers):
    assert_as_loop(fp64("opt"), prompt_ids(), layers=layers, **RICH)


@pytest.mark.parametrize("n_prompts", [1, 2, 3])
@pytest.mark.parametrize("family", FUSED_QUERY)
def test_query_rows_of_a_fused_projection(family, n_prompts):
    """Only these rows move, decay and count in the norm, whatever the number of deltas."""
    model = fp64(family)
    base, prompts = shown(model), prompts_of()[:n_prompts]
    twins = [twin(model) for _ in prompts]
    options = dict(lr=2e-2, momentum=0.9, weight_decay=0.1, max_grad_norm=0.05)
    trainer = trainer_of(model, scope="query", **options)
    selections = trainer.selections
    with trainer.adapt(prompts, deltas="independent") as adapted:
        for delta, (prompt, other) in enumerate(zip(prompts, twins, strict=True)):
            losses = [lambda m, row=prompt: row_loss(m, row)] * STEPS
            norms = selected_rows_loop(other, losses, selections, **options)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=1e-10)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(other), base)


@pytest.mark.parametrize("family", FUSED_QUERY)
def test_query_rows_before_the_first_step(family):
    """There are no factors yet, and their width is not the projection's."""
    model, ids = fp64(family), prompt_ids()
    expected = pytest.approx(row_loss(model, ids[0]).item(), rel=1e-12)
    with trainer_of(model, scope="query").begin() as session:
        assert session.loss(Batch(ids)).item() == expected
    with trainer_of(model, scope="query", steps=0).adapt(ids) as adapted:
        assert adapted.loss().item() == expected


def test_param_groups():
    """No decay on norms, another lr on a layer's FFN; one norm and one clip over all of them."""
    model, ids = fp64("qwen3"), prompt_ids()
    other, base = twin(model), shown(model)
    last = r"layers\.1\.mlp\."
    norm = params_of(other, select_parameters(model, "norm"))
    ffn = params_of(other, select_parameters(model, last))
    chosen = {id(p) for p in norm + ffn}
    stock = torch.optim.SGD(
        [
            dict(params=norm, weight_decay=0.0, momentum=0.0),
            dict(params=ffn, lr=5e-3),
            dict(params=[p for p in other.parameters() if id(p) not in chosen]),
        ],
        lr=2e-2, weight_decay=0.1, momentum=0.9,
    )  # fmt: skip
    norms = []
    for _ in range(STEPS):
        stock.zero_grad()
        row_loss(other, ids[0]).backward()
        norms.append(nn.utils.clip_grad_norm_(other.parameters(), 1.0).item())
        stock.step()
    groups = [
        {"params": "norm", "weight_decay": 0.0, "momentum": 0.0},
        {"params": last, "lr": 5e-3},
    ]
    with trainer_of(model, weight_decay=0.1, param_groups=groups).adapt(ids) as adapted:
        assert adapted.grad_norms[0].tolist() == pytest.approx(norms, rel=1e-10)
        assert_same_deltas(shown(model), shown(other), base)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "opt"])
def test_a_pad_token_inside_the_prompt(family):
    """Torch drops the lookup gradient of padding_idx; a tied head still moves that row."""
    model = fp64(family) if family != "llama_tied" else fp64_with_padding_idx()
    ids = prompt_ids()
    pad = model.get_input_embeddings().padding_idx
    ids[0, [2, 3, 6]] = 0 if pad is None else pad
    assert_as_loop(model, ids, tolerance=1e-10, **RICH)


def fp64_with_padding_idx():
    model = tiny_model("llama_tied", torch.float64, num_hidden_layers=2, pad_token_id=5)
    assert model.get_input_embeddings().padding_idx == 5
    return model


# ---------------------------------------------------------------------------- use of the model


def test_looking_on_the_way():
    """Forwards between steps use what was learnt so far; the same at `session.loss`."""
    model, ids, probe = fp64(), prompt_ids(), prompt_ids(7, seed=2)
    other, ours, theirs = twin(model), [], []
    with trainer_of(model).begin() as session:
        for _ in range(3):
            with torch.no_grad():
                ours.append(model(probe).logits)
            assert session.loss(Batch(probe)).item() == pytest.approx(
                row_loss(model, probe[0]).item(), rel=1e-12
            )
            session.step(Batch(ids))

    def loss_of(m):
        with torch.no_grad():
            theirs.append(m(probe).logits)
        return row_loss(m, ids[0])

    sgd_loop(other, [loss_of] * 3, **OPTIONS)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours[0], ours[2], rtol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_is_that_of_the_dense_engine(family, checkpointing):
    """With checkpointing a forward runs again in the backward, and is recorded again."""
    model, ids = fp64(family), prompt_ids()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with trainer_of(model, engine="dense", dropout=True).adapt(ids) as adapted:
        losses, norms, expected = adapted.losses, adapted.grad_norms, adapted.loss()
    with trainer_of(model).adapt(ids) as adapted:
        assert not torch.allclose(adapted.losses, losses, rtol=1e-3)
    with trainer_of(model, dropout=True).adapt(ids) as adapted:
        assert torch.allclose(adapted.losses, losses, rtol=1e-10)
        assert torch.allclose(adapted.grad_norms, norms, rtol=1e-10)
        assert torch.allclose(adapted.loss(), expected, rtol=1e-10)


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(fp64("qwen2"), config).requires_grad_(True)
    assert_as_loop(model, prompt_ids(), scope="lora", lr=1e-2)
    assert_as_loop(model, prompt_ids(), lr=1e-2)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_gradients_through_the_adapted_model(family):
    """Outside a step the model is differentiable in its inputs, as any other."""
    model, ids = fp64(family), prompt_ids()
    other = twin(model)
    naive_adapt(other, ids, steps=STEPS, **OPTIONS)
    embeds = other.get_input_embeddings()(prompt_ids(6)).detach().requires_grad_()

    def saliency(m):
        return torch.autograd.grad(m(inputs_embeds=embeds).logits.logsumexp(-1).sum(), embeds)[0]

    with trainer_of(model).adapt(ids):
        assert torch.allclose(saliency(model), saliency(other), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------- bfloat16


def delta_of(factors):
    """Δ = (ρ − 1)·W₀ − Σ β_s G_s of delta 0, as it is stored, written out in float64."""
    coefficients = factors.track.coefficients
    rho, beta = coefficients.rho[0], F.pad(coefficients.beta[0], (0, 1))

    def betas(rows):
        return beta[rows.columns(beta.device)[0]][:, None]

    def rows_of(buffer, rows):
        return buffer.first(slice(0, 1), rows.lengths[0])[0].double()

    base = factors.selection.param.detach().double()
    delta = (rho - 1) * base
    if base.dim() == 1:
        return delta - (betas(factors.rows) * rows_of(factors.grads, factors.rows)).sum(0)
    if factors.inputs is not None:
        rows = factors.inputs.rows
        dy = betas(rows) * rows_of(factors.dy, rows)
        gradient = dy.t() @ rows_of(factors.inputs.buffer, rows)
        delta -= gradient if factors.weight.is_contiguous() else gradient.t()  # Conv1D: (in, out)
    if factors.lookups is not None:
        rows = factors.lookups.rows
        ids = factors.lookups.ids.first(slice(0, 1), rows.lengths[0])[0, :, 0]
        delta.index_add_(0, ids, -betas(rows) * rows_of(factors.lookups.dy, rows))
    return delta


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gpt2", "opt", "gemma3"])
def test_bfloat16_is_nearer_to_float64_than_a_stock_loop(family, lr):
    """Small steps vanish in bfloat16 weights; factors are never added to one."""
    model = tiny_model(family, torch.bfloat16)
    stock, oracle = twin(model), twin(model).double()
    ids, options = prompt_ids(15), OPTIONS | dict(lr=lr)
    exact, rounded = (naive_adapt(m, ids, steps=8, **options) for m in (oracle, stock))
    trainer = trainer_of(model, steps=8, **options)
    with trainer.adapt(ids) as adapted:
        assert adapted.losses.isfinite().all() and adapted.losses.dtype == torch.float32
        assert adapted.update_landed.tolist() == [1.0]
        assert adapted.loss(ids).item() < adapted.losses[0, 0]
        ours = {f.selection.name: delta_of(f) for f in trainer._engines["factored"].factors}
    deltas = [
        (ours[name], q.detach() - q0, p.detach().double() - p0.double())
        for (name, p), p0, q, q0 in zip(
            stock.named_parameters(), rounded.originals, exact.params, exact.originals, strict=True
        )
    ]
    size = math.hypot(*(float(e.norm()) for _, e, _ in deltas))
    our_gap = math.hypot(*(float((o - e).norm()) for o, e, _ in deltas)) / size
    stock_gap = math.hypot(*(float((s - e).norm()) for _, e, s in deltas)) / size
    assert our_gap < 0.5 * stock_gap and our_gap < 0.1, (our_gap, stock_gap)


def test_several_deltas_in_bfloat16():
    model, prompts = tiny_model("llama_tied", torch.bfloat16), prompts_of()
    trainer = trainer_of(model)
    with trainer.adapt(prompts, deltas="independent") as adapted:
        together = adapted.losses
        assert (adapted.loss() < together[:, 0]).all()
        assert adapted.generate(max_new_tokens=3).shape[0] == 5
    for delta, prompt in enumerate(prompts):
        with trainer.adapt(prompt) as adapted:
            assert torch.allclose(adapted.losses[0], together[delta], rtol=3e-2)
