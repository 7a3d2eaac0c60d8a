"""The numbers of the factored engine against the loops a researcher writes, delta by delta."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests.families import FAMILIES, tiny_model
from tests.loops import params_of, prompt_ids, row_loss, sgd_loop, twin
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, select_parameters
from ttt_fast.batch import pad_rows
from ttt_fast.naive import naive_adapt

DENSE = [family for family in FAMILIES if "mix" not in family and "moe" not in family]
FUSED_QUERY = ("phi3", "gpt2", "gpt_neox")
RICH = dict(lr=2e-2, momentum=0.9, nesterov=True, weight_decay=0.1, max_grad_norm=2.0)
OPTIONS = dict(lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)
# Within a sliding window of 8 of each other: a padded query that sees no token at all is NaN in
# transformers' own eager attention in float64.
LENGTHS = (9, 6, 13, 7, 11)
STEPS = 4


def fp64(family="llama_tied", attention="sdpa", n_layers=2):
    """A tiny model in float64; its many shapes are in the families, not in its depth."""
    attention = "eager" if family == "gemma2" else attention
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, torch.float64, attn_implementation=attention, **{name: n_layers})


def tolerance_of(family):
    """Gemma's norms work in float32 in a float64 model too: sums over a batch round there."""
    return 1e-5 if family.startswith("gemma") else 1e-10


def trainer_of(model, objective=None, **options):
    options = dict(engine="factored", steps=STEPS) | OPTIONS | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def prompts_of(lengths=LENGTHS):
    return [prompt_ids(length, seed=length)[0] for length in lengths]


# ---------------------------------------------------------------------------- what is compared


@torch.no_grad()
def shown(model):
    """What each module with weights computes from a probe that shows all of them.

    Nothing is written to the weights, so this is how they look from outside.
    """
    outputs = {}
    for name, module in model.named_modules():
        if not list(module.parameters(recurse=False)):
            continue
        weight = module.weight
        if isinstance(module, nn.Linear | Conv1D):
            width = weight.shape[0 if isinstance(module, Conv1D) else 1]
            probe = torch.cat([torch.eye(width), torch.zeros(1, width)])
            outputs[name] = module(probe.to(weight.dtype))
        elif isinstance(module, nn.Embedding):
            shifted = "Learned" in type(module).__name__  # OPT adds 2 to the positions
            ids = torch.arange(weight.shape[0] - 2 * shifted)[None]
            outputs[name] = module(None, 0, ids) if shifted else module(ids)
        else:
            wave = torch.linspace(-1, 2, weight.numel()).cos().to(weight.dtype)
            outputs[name] = module(torch.stack([wave, -wave])[None])
    return {name: output.double() for name, output in outputs.items()}


def assert_same_deltas(ours, theirs, base, tolerance=1e-10):
    """What changed in three looks at weights: the same in every module, and something did."""
    sizes = {name: float((theirs[name] - base[name]).norm()) for name in base}
    whole = math.hypot(*sizes.values())
    assert whole > 1e-6, "nothing was adapted"
    for name, size in sizes.items():
        error = float((ours[name] - theirs[name]).norm())
        # A gradient that is zero but for rounding (the bias of keys) is held to the others' size.
        assert error <= tolerance * (size + 1e-3 * whole), (name, error, size)


def assert_as_loop(model, ids, scope="all", layers=None, tolerance=1e-10, **options):
    """Adapt to one prompt; losses, norms and every module as after the loop."""
    options = OPTIONS | options
    other, base = twin(model), shown(model)
    loop_options = {n: v for n, v in options.items() if n != "decoupled_weight_decay"}
    losses, norms = sgd_loop(
        other,
        [lambda m: row_loss(m, ids[0])] * STEPS,
        params=params_of(other, select_parameters(model, scope, layers)),
        decoupled=options.get("decoupled_weight_decay", False),
        **loop_options,
    )
    with trainer_of(model, scope=scope, layers=layers, **options).adapt(ids) as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=tolerance, abs=0)
        assert adapted.grad_norms[0].tolist() == pytest.approx(norms, rel=tolerance, abs=0)
        assert_same_deltas(shown(model), shown(other), base, tolerance)
        probe = prompt_ids(7, seed=40)
        assert adapted.loss(probe).item() == pytest.approx(
            row_loss(other, probe[0]).item(), rel=tolerance
        )
    assert_same_deltas(shown(other), shown(other), shown(model))


# ---------------------------------------------------------------------------- one delta


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


def query_loop(model, ids, selections, **options):
    """Torch's SGD on the whole of fused projections, of which only the selected rows may move."""
    params = params_of(model, selections)
    masks = []
    for selection in selections:
        mask = torch.zeros_like(selection.param)
        selection.view(mask).fill_(1)
        masks.append(mask)
    bound = options.pop("max_grad_norm")
    optimizer = torch.optim.SGD(params, **options)
    norms = []
    for _ in range(STEPS):
        loss = row_loss(model, ids)
        kept = [p.detach().clone() for p in params]
        for param, grad, mask in zip(params, torch.autograd.grad(loss, params), masks, strict=True):
            param.grad = grad * mask
        norms.append(nn.utils.clip_grad_norm_(params, bound).item())
        optimizer.step()
        with torch.no_grad():
            for param, mask, before in zip(params, masks, kept, strict=True):
                param.copy_(torch.where(mask != 0, param, before))
    return norms


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
            norms = query_loop(other, prompt, selections, **options)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=1e-10)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(other), base)


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


# ---------------------------------------------------------------------------- many deltas


def assert_as_loops(model, prompts, tolerance=1e-10, trainer_options=None, **options):
    """Adapt prompts side by side; each as if a loop had taken it alone, without padding."""
    options = OPTIONS | options
    base, twins = shown(model), [twin(model) for _ in prompts]
    expected = [
        sgd_loop(other, [lambda m, row=prompt: row_loss(m, row)] * STEPS, **options)
        for other, prompt in zip(twins, prompts, strict=True)
    ]
    trainer = trainer_of(model, **options, **(trainer_options or {}))
    with trainer.adapt(prompts, deltas="independent") as adapted:
        for delta, (losses, norms) in enumerate(expected):
            assert adapted.losses[delta].tolist() == pytest.approx(losses, rel=tolerance)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=tolerance)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(twins[delta]), base, tolerance)
        final = [row_loss(o, p).item() for o, p in zip(twins, prompts, strict=True)]
        assert adapted.loss().tolist() == pytest.approx(final, rel=tolerance)


@pytest.mark.parametrize("family", DENSE)
def test_prompts_of_different_lengths_as_separate_loops(family):
    assert_as_loops(fp64(family), prompts_of(), tolerance_of(family))


def test_prompts_of_different_lengths_with_eager_attention():
    assert_as_loops(fp64("gpt2", "eager"), prompts_of())


def test_an_embedding_narrower_than_the_layers():
    """OPT projects in and out; its tied matrix is the embedding's width."""
    model = tiny_model(
        "opt",
        torch.float64,
        attn_implementation="sdpa",
        num_hidden_layers=1,
        word_embed_proj_dim=16,
    )
    assert_as_loops(model, [*prompts_of()[:2], prompt_ids(2)[0]])


def test_prompts_that_are_one_prompt():
    model, prompt = fp64(n_layers=1), prompt_ids()[0]
    with trainer_of(model).adapt([prompt] * 3, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, adapted.losses[:1], rtol=1e-13)


def padded(prompts, side, dirt=0):
    """Rows with padding on a side, which holds other tokens than any row's own."""
    ids, mask = pad_rows(prompts, 0, side)
    ids = torch.where(mask != 0, ids, torch.full_like(ids, dirt))
    return ids, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma3", "llama_tied", "gpt_neox"])
def test_padding_order_and_neighbours_change_nothing(family, attention):
    # A fully masked row is NaN in transformers itself with eager attention in float64.
    dtype = torch.float32 if attention == "eager" else torch.float64
    tolerance = 1e-5 if dtype == torch.float32 or family.startswith("gemma") else 1e-12
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = tiny_model(family, dtype, attn_implementation=attention, **{name: 2})
    trainer, prompts = trainer_of(model, lr=1e-2), prompts_of()
    probe = prompt_ids(6, seed=50)

    def run(order, side, dirt=0):
        ids, mask = padded([prompts[i] for i in order], side, dirt)
        with trainer.adapt(ids, attention_mask=mask, deltas="independent") as adapted:
            logits = []
            for delta in range(len(order)):
                with adapted.weights_of(delta), torch.no_grad():
                    logits.append(model(probe).logits[0])
        return dict(zip(order, zip(adapted.losses, adapted.grad_norms, logits, strict=True),
                        strict=True))  # fmt: skip

    expected = run(range(5), "right")
    for order, side, dirt in (
        (range(5), "right", 7),
        (range(5), "left", 7),
        ((3, 0, 4, 2, 1), "left", 0),
        ((4, 1), "right", 0),
        ((1,), "left", 0),
    ):
        for prompt, found in run(order, side, dirt).items():
            for what, (value, other) in enumerate(zip(found, expected[prompt], strict=True)):
                distance = (value - other).norm() / other.norm()
                assert distance <= tolerance, (order, side, dirt, prompt, what)


def plant(model, mask, where):
    """Write NaN into what goes into a module wherever the mask of the rows is 0."""

    def hook(module, args):
        x = args[0]
        if x.shape[:-1].numel() != mask.numel():
            return None
        return (x.masked_fill(mask.reshape(*x.shape[:-1], 1) == 0, torch.nan),)

    return model.get_submodule(where).register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("llama", "model.layers.1.mlp"),
        ("llama_tied", "lm_head"),
        ("llama", "model.norm"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("gpt2", "lm_head"),
        ("opt", "model.decoder.layers.1.fc2"),
        ("opt", "lm_head"),
        ("gemma3", "model.layers.1.mlp.down_proj"),
        ("gpt_neox", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
    ],
)
def test_nan_at_pads_reaches_nothing(family, where):
    model, prompts = fp64(family), prompts_of()
    ids, mask = padded(prompts, "right")
    trainer = trainer_of(model)
    with trainer.adapt(ids, attention_mask=mask, deltas="independent") as clean:
        pass
    handle = plant(model, mask, where)
    with trainer.adapt(ids, attention_mask=mask, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, clean.losses, rtol=tolerance_of(family))
        assert torch.allclose(adapted.grad_norms, clean.grad_norms, rtol=tolerance_of(family))
    handle.remove()
    # The same NaN at a token does reach the loss.
    handle = plant(model, mask.roll(1, 1), where)
    with pytest.raises(DivergedError, match=r"step 1 of delta"):
        trainer.adapt(ids, attention_mask=mask, deltas="independent")
    handle.remove()


def test_a_list_that_does_not_go_at_once():
    """Prompts are taken in runs of so many tokens; nobody's numbers change."""
    trainer_options = dict(max_batch_tokens=18)
    trainer = trainer_of(fp64(n_layers=1), **trainer_options)
    batch = trainer._batch(prompts_of(), None, None, None, None, None, "independent")
    session = trainer.begin(n_deltas=5)
    assert len(session.parts(batch)) > 1
    session.abort()
    assert_as_loops(fp64(n_layers=1), prompts_of(), trainer_options=trainer_options)


# ---------------------------------------------------------------------------- sessions


def run_schedule(model, schedule, n_deltas, tolerance=1e-10, **options):
    """Steps of (rows, delta of each row); the losses and weights of each delta against a loop."""
    options = OPTIONS | options
    base, twins = shown(model), [twin(model) for _ in range(n_deltas)]
    session = trainer_of(model, **options).begin(n_deltas=n_deltas)
    for rows, deltas in schedule:
        ids, mask = padded(rows, "right")
        session.step(Batch(ids, attention_mask=mask, delta_index=torch.tensor(deltas)))
    with session.end() as adapted:
        for delta, other in enumerate(twins):
            mine = [
                [row for row, d in zip(rows, deltas, strict=True) if d == delta]
                for rows, deltas in schedule
                if delta in deltas
            ]
            losses, norms = sgd_loop(
                other,
                [
                    lambda m, rows=rows: torch.stack([row_loss(m, row) for row in rows]).mean()
                    for rows in mine
                ],
                **options,
            )
            kept = ~adapted.losses[delta].isnan()
            assert adapted.losses[delta][kept].tolist() == pytest.approx(losses, rel=tolerance)
            assert adapted.grad_norms[delta][kept].tolist() == pytest.approx(norms, rel=tolerance)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(other), base, tolerance)
    return adapted


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt", "gemma2"])
def test_other_tokens_and_other_deltas_at_every_step(family):
    """Deltas sit steps out, have several rows, unequally many, and come in any order."""
    a, b, c, d, e = prompts_of()
    schedule = [
        ([a, b, c], [0, 1, 2]),
        ([d, e, a], [1, 1, 2]),
        ([b], [2]),
        ([c, a, e, d], [2, 0, 0, 2]),
        ([e, d, c, b, a], [1, 0, 2, 1, 0]),
        ([a, b], [0, 1]),
    ]
    adapted = run_schedule(fp64(family), schedule, 3, tolerance_of(family))
    assert adapted.steps.tolist() == [4, 4, 5]


def test_a_delta_that_never_had_a_row_is_the_model():
    model, ids = fp64(), prompt_ids()
    base = shown(model)
    session = trainer_of(model).begin(n_deltas=3)
    session.step(Batch(ids, delta_index=torch.tensor([1])))
    with session.end() as adapted:
        for delta in (0, 2):
            with adapted.weights_of(delta):
                assert all(torch.equal(base[n], v) for n, v in shown(model).items())
        assert adapted.steps.tolist() == [0, 1, 0]


def test_steps_of_the_delta_set_its_learning_rate():
    """A schedule counts the steps that the delta took, not those of the session."""
    a, b, _, _, _ = prompts_of()
    schedule = [([a], [0]), ([a, b], [0, 1]), ([b], [1]), ([a, b], [0, 1])]
    run_schedule(fp64(n_layers=1), schedule, 2, lr=[1e-2, 4e-2, 2e-3, 1e-2])


def test_few_shot_rows_train_one_delta():
    """Leave-one-out: many rows, one delta, labels on the last tokens."""
    model = fp64("qwen2")
    other, base = twin(model), shown(model)
    rows = prompt_ids(12, n_rows=3)
    labels = torch.where(torch.arange(12) >= 10, rows, -100)
    losses, _ = sgd_loop(
        other,
        [lambda m: sum(row_loss(m, r, t) for r, t in zip(rows, labels, strict=True)) / 3] * STEPS,
        **OPTIONS,
    )
    with trainer_of(model).adapt(rows, labels=labels, deltas="shared") as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=1e-10)
        assert_same_deltas(shown(model), shown(other), base)


def test_row_weights_and_token_weights():
    """Two deltas with two rows each, every row and token with a weight of its own."""
    model = fp64()
    base, twins = shown(model), [twin(model), twin(model)]
    rows = prompt_ids(6, n_rows=4)
    row_weights = torch.tensor([0.3, 2.0, 1.0, -0.5], dtype=torch.float64)
    token_weights = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)).double()
    token_weights[1, 3] = 0
    deltas = torch.tensor([0, 1, 0, 1])

    def loss_of(m, mine):
        logits = m(rows[mine], use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), rows[mine][:, 1:], reduction="none")
        kept = token_weights[mine][:, 1:]
        return (row_weights[mine] * (nll * kept).sum(1) / kept.sum(1)).sum()

    batch = Batch(rows, row_weights=row_weights, token_weights=token_weights, delta_index=deltas)
    session = trainer_of(model).begin(n_deltas=2)
    for _ in range(3):
        session.step(batch)
    with session.end() as adapted:
        for delta, other in enumerate(twins):
            mine = (deltas == delta).nonzero()[:, 0]
            losses, norms = sgd_loop(other, [lambda m, i=mine: loss_of(m, i)] * 3, **OPTIONS)
            assert adapted.losses[delta].tolist() == pytest.approx(losses, rel=1e-10)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=1e-10)
            with adapted.weights_of(delta):
                assert_same_deltas(shown(model), shown(other), base)


def test_chunks_behind_a_cache():
    """Two deltas behind a cache of two rows, as the whole text with labels on the chunk."""
    model, text = fp64("llama", n_layers=3), prompt_ids(12, n_rows=2)
    base = shown(model)
    # Only the last layer's output side adapts, so that the cached keys stay what they are.
    trainer = trainer_of(model, scope=r"layers\.2\.mlp\.|lm_head")
    with torch.no_grad():
        cache = model(text[:, :7], use_cache=True).past_key_values
    labels = torch.where(torch.arange(12) >= 8, text, -100)
    found = []
    for batch in (
        Batch(text[:, 7:], past_key_values=cache, delta_index=torch.arange(2)),
        Batch(text, labels=labels, delta_index=torch.arange(2)),
    ):
        session = trainer.begin(n_deltas=2)
        for _ in range(3):
            session.step(batch)
        with session.end() as adapted:
            with adapted.weights_of(1):
                found.append((adapted.losses, adapted.grad_norms, shown(model)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-11)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-11)
    assert_same_deltas(found[0][2], found[1][2], base)
    assert cache.get_seq_length() == 7


# ---------------------------------------------------------------------------- use of the batch

GENERATION = [
    dict(),
    dict(num_beams=3),
    dict(num_beams=4, num_return_sequences=2),
    dict(use_cache=False),
]


@pytest.mark.parametrize("kwargs", GENERATION, ids=lambda k: "-".join(map(str, k.items())))
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt"])
def test_generation_of_the_batch_is_that_of_each_adapted_model(family, kwargs):
    model, prompts = fp64(family), prompts_of()[:3]
    model.generation_config.pad_token_id = 0
    kwargs = kwargs | dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected, plain = [], []
    for prompt in prompts:
        other = twin(model)
        plain.append(other.generate(prompt[None], **kwargs)[:, prompt.numel() :])
        naive_adapt(other, prompt[None], steps=STEPS, **OPTIONS)
        expected.append(other.generate(prompt[None], **kwargs)[:, prompt.numel() :])
    expected, plain = torch.cat(expected), torch.cat(plain)
    assert not torch.equal(expected, plain)
    ids, mask = padded(prompts, "left")
    with trainer_of(model).adapt(prompts, deltas="independent") as adapted:
        assert torch.equal(adapted.generate(**kwargs)[:, ids.shape[1] :], expected)
        given = adapted.generate(ids, attention_mask=mask, **kwargs)
        assert torch.equal(given[:, ids.shape[1] :], expected)
        n = kwargs.get("num_return_sequences", 1)
        for delta, prompt in enumerate(prompts):
            with adapted.weights_of(delta) as one:
                alone = one.generate(prompt[None], **kwargs)[:, prompt.numel() :]
            assert torch.equal(alone, expected[n * delta : n * delta + n])


def test_several_rows_of_each_delta():
    """Rows of a forward belong to the deltas in their order, equally many to each."""
    model, prompts = fp64(), prompts_of()[:2]
    probe = prompt_ids(6, n_rows=4, seed=60)
    with trainer_of(model).adapt(prompts, deltas="independent") as adapted, torch.no_grad():
        together = model(probe).logits
        for delta in range(2):
            with adapted.weights_of(delta):
                alone = model(probe).logits[2 * delta : 2 * delta + 2]
            assert torch.allclose(together[2 * delta : 2 * delta + 2], alone, rtol=1e-10)
        assert not torch.allclose(together[2:], alone.roll(1, 0), rtol=1e-3)


def test_rows_that_cannot_be_divided_among_the_deltas():
    model, prompts = fp64(), prompts_of()[:2]
    with trainer_of(model).adapt(prompts, deltas="independent") as adapted:
        for rows in (prompt_ids(5, n_rows=3), prompt_ids(5)):
            with pytest.raises(ValueError, match="holds 2 deltas but was given"):
                model(rows)
            with pytest.raises(ValueError, match="2 deltas"):
                adapted.generate(rows, max_new_tokens=2)
            with pytest.raises(ValueError, match="2 deltas"):
                adapted.loss(rows)
        with pytest.raises(ValueError, match="delta 2 of 2"):
            adapted.weights_of(2).__enter__()
        assert adapted.loss().isfinite().all()


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


# ---------------------------------------------------------------------------- unusual modules


class Toy(nn.Module):
    """A language model with what real ones do not have, told apart by ``kind``."""

    def __init__(self, kind=""):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(101, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 101, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.5 * torch.randn(param.shape, generator=generator))
        self.double()
        if kind == "tied":
            self.second.weight = self.first.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        h = self.embed(input_ids)
        if self.kind == "skips" and bool((input_ids == 50).any()):
            return SimpleNamespace(logits=self.head(h))
        if self.kind == "changes" and bool((input_ids == 50).any()):
            # What was one tensor for both is one each.
            return SimpleNamespace(logits=self.head(h + self.first(h) + self.second(h.cos()).sin()))
        if self.kind == "changes":
            return SimpleNamespace(logits=self.head(h + self.first(h) + self.second(h).sin()))
        if self.kind == "same":
            h = h + self.second(h) + self.first(h).cos() + self.second(h).sin()
        h = h + self.first(h).tanh()
        if self.kind == "twice":
            h = h + self.first(h).tanh() + 0.5 * self.embed(input_ids.flip(1))
        if self.kind == "half":
            h = h + self.first(h.cos()).detach()
        if self.kind == "called":
            self.second(h)
        else:
            h = h + self.second(h).sin()
        h = self.norm(h)
        if self.kind == "norm twice":
            h = self.norm(h.exp())
        if self.kind == "outside":
            h = h + F.linear(h, self.second.weight)
        if self.kind == "bias outside":
            h = h + self.first.bias
        return SimpleNamespace(logits=self.head(h))


def prompts_with(token, at):
    """Prompts; those numbered by ``at`` hold the token, the others do not."""
    prompts = prompts_of()
    for i, prompt in enumerate(prompts):
        prompt[prompt == token] = token + 1
        if i in at:
            prompt[1] = token
    return prompts


@pytest.mark.parametrize("kind", ["", "twice", "same", "half", "called", "norm twice", "tied"])
def test_modules_called_more_than_once_or_for_nothing(kind):
    model, ids = Toy(kind), prompt_ids()
    assert_as_loop(model, ids, **RICH)
    # A model without an attention mask takes rows of one length.
    prompts = [prompt_ids(9, seed=seed)[0] for seed in range(3)]
    assert_as_loops(Toy(kind), prompts, **RICH)


def test_modules_that_shared_an_input_and_then_do_not():
    """And the other way round: which step they meet in first is chance."""
    prompts = prompts_with(50, at=(0, 2, 3))
    for order in (prompts, prompts[1:]):
        run_schedule(Toy("changes"), [([p], [0]) for p in order], 1, weight_decay=0.1)


def test_a_module_that_some_steps_skip():
    """Its parameters sit these steps out, as torch's do: no decay, no momentum, no first step."""
    prompts = prompts_with(50, at=(0, 2))
    model = Toy("skips")
    run_schedule(model, [([p], [0]) for p in prompts * 2], 1, weight_decay=0.1)
    rows = [prompt_ids(9, seed=seed)[0] for seed in range(4)]
    for row, token in zip(rows, (50, 51, 50, 51), strict=True):
        row[row == 50] = 51
        row[1] = token
    # Delta 1 has two rows, so the deltas go one after the other and each skips on its own.
    schedule = [
        ([rows[i], rows[j], rows[j]], [0, 1, 1]) for i, j in ((0, 1), (1, 0), (2, 3), (3, 3))
    ]
    run_schedule(model, schedule, 2, weight_decay=0.1, nesterov=True)


@pytest.mark.parametrize(
    ("kind", "name"), [("outside", "second.weight"), ("bias outside", "first.bias")]
)
def test_a_parameter_used_outside_its_module_is_refused_by_name(kind, name):
    model = Toy(kind)
    with pytest.raises(ValueError, match=f"{name} is used outside the module.*engine='dense'"):
        trainer_of(model).adapt(prompt_ids())
    assert all("forward" not in vars(module) for module in model.modules())
    # Where it is not selected, it may be used anywhere.
    assert_as_loop(Toy(kind), prompt_ids(), scope="head|embed")


def test_a_module_with_a_forward_of_its_own_is_refused_by_name():
    model = Toy()
    model.first.forward = lambda x: x
    with pytest.raises(ValueError, match=r"first\.weight of first .*replaced on the instance"):
        trainer_of(model).adapt(prompt_ids())
    assert_as_loop(Toy(), prompt_ids(), scope="head|embed")
    # Or where it came after the engine was made.
    model = Toy()
    trainer = trainer_of(model)
    trainer.adapt(prompt_ids()).restore()
    model.second.forward = own = model.second.forward
    with pytest.raises(ValueError, match="second has a forward of its own"):
        trainer.adapt(prompt_ids())
    assert vars(model.second)["forward"] == own and "forward" not in vars(model.first)


@pytest.mark.parametrize("options", [dict(max_norm=1.0), dict(scale_grad_by_freq=True)])
def test_embeddings_with_rules_of_their_own_are_refused(options):
    model = Toy()
    for name, value in options.items():
        setattr(model.embed, name, value)
    with pytest.raises(ValueError, match=r"embed\.weight of embed .*not supported"):
        trainer_of(model).adapt(prompt_ids())


def test_modules_that_nobody_knows_are_refused():
    model = Toy()
    model.second = nn.Bilinear(8, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second\.weight of second \(Bilinear\)"):
        trainer_of(model).adapt(prompt_ids())


def test_a_subclass_of_linear_with_code_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Toy()
    model.second = Scaled(8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second\.weight of second \(Scaled\)"):
        trainer_of(model).adapt(prompt_ids())


def test_a_norm_with_code_of_its_own_is_refused_by_name():
    """As Nemotron's: a LayerNorm that adds 1 to its weight is not computed as a LayerNorm."""

    class ShiftedLayerNorm(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)

    model = Toy()
    model.norm = ShiftedLayerNorm(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"norm\.weight of norm \(ShiftedLayerNorm\)"):
        trainer_of(model).adapt(prompt_ids())


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
