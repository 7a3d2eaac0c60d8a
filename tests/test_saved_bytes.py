"""What autograd saves in a step: the bytes of a stated formula for each scope, and nothing else."""

import weakref
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.cases import meta_model
from bench.shapes import MODELS
from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood
from ttt_fast.batch import complete_batch
from ttt_fast.engines import cost, policy
from ttt_fast.naive import prompt_loss
from ttt_fast.scope import decoder_layers, select_parameters

T = 24
ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
SCOPES = {
    "all": dict(scope="all"),
    "ffn": dict(scope="ffn"),
    "attention": dict(scope="attention"),
    "query": dict(scope="query"),
    "norm": dict(scope="norm"),
    "last two layers": dict(layers="-2:"),
    "attention of the last layer": dict(scope="attention", layers="-1:"),
    "head": dict(scope="head"),
}


def saved_by(model, run):
    """Bytes of what autograd saves while something runs, weights aside; a storage counts once.

    What a backward computes again, of one layer at a time, is not kept either.
    """
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved = {}

    def note(tensor):
        backward = torch._C._current_graph_task_id() != -1
        if tensor.untyped_storage().data_ptr() not in weights and not backward:
            # The tensor itself, so that its memory is not used again.
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def saved_by_a_step(model, batch=None, n_deltas=1, **options):
    """Bytes that the second step saves."""
    trainer = TTTTrainer(model, TTTConfig(steps=2, lr=1e-2, **options))
    batch = Batch(prompt_ids(T)) if batch is None else batch
    with trainer.begin(n_deltas, T) as session:
        parts = session.parts(complete_batch(batch, model, n_deltas))
        session.step_parts(parts)
        return saved_by(model, lambda: session.step_parts(parts))


def stated(model, engine, n_tokens=T, rows=1, found=None, **options):
    """The formula; where the model gives logits, with their gradient and what a cap keeps."""
    trainer = TTTTrainer(model, TTTConfig(steps=2, **options))
    work = policy.workload(model, trainer.selections, trainer.config, rows, n_tokens)
    # The last token has no label.
    work = replace(work, **({"n_labels": n_tokens - 1} | (found or {})))
    saved = cost.saved_bytes(work, engine, rows)
    if work.gives_logits:
        saved += rows * n_tokens * work.itemsize * work.vocabulary * (1 + work.capped)
    return saved


def shared_tables(model):
    """Bytes that do not grow with the layers: rotary tables, the labels' weights, norm weights."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = model.dtype.itemsize
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return 2 * T * head_dim * itemsize + 8 * (T + 1) + 4 * norms


@ENGINES
@pytest.mark.parametrize("options", SCOPES.values(), ids=list(SCOPES))
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
def test_bytes_are_those_of_the_formula(family, options, engine):
    model = tiny_model(family, attn_implementation="sdpa")
    saved = saved_by_a_step(model, engine=engine, **options)
    expected = stated(model, engine, **options)
    assert expected <= saved <= expected + shared_tables(model)


@ENGINES
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scope", ["ffn", "query"])
def test_in_bfloat16_and_in_other_families(family, scope, engine):
    model = tiny_model(family, torch.bfloat16, attn_implementation="sdpa")
    saved = saved_by_a_step(model, engine=engine, scope=scope)
    assert saved == pytest.approx(stated(model, engine, scope=scope), rel=0.1)


# Attention as one op, and written out in 16 bits; of Gemma 2 there is only the second.
WAYS = pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")],
    ids=str,
)


@WAYS
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_within_a_twentieth(family, dtype, attention):
    attention = "eager" if family == "gemma2" else attention
    # GPT-NeoX's lowest MLP is beside its attention, and not reached: one of so many layers.
    depth = dict(num_hidden_layers=8) if family == "gpt_neox" else {}
    for engine in ("dense", "factored"):
        for scope in ("all", "attention"):
            if family in ("mixtral", "qwen2_moe") and (engine, scope) == ("factored", "all"):
                continue  # experts are dense
            model = tiny_model(family, dtype, attn_implementation=attention, **depth)
            saved = saved_by_a_step(model, engine=engine, scope=scope)
            expected = stated(model, engine, scope=scope)
            tables = shared_tables(model)
            assert 0.95 * expected <= saved <= 1.05 * expected + tables, (engine, scope)


def ragged():
    """Two prompts, one of them shorter by three tokens."""
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, -3:] = 0
    return Batch(prompt_ids(T, n_rows=2), attention_mask=mask, delta_index=torch.arange(2))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_mask_and_what_it_asks_for_is_counted(family):
    """Stock attention keeps its mask; and keys and values for each head, where there are fewer."""
    model = tiny_model(family, attn_implementation="sdpa")
    options = dict(engine="factored", scope="ffn", backend="torch")
    saved = saved_by_a_step(model, ragged(), 2, **options)
    expected = stated(model, rows=2, found={"padded_from": 2}, **options)
    assert expected <= saved <= expected + 2 * shared_tables(model)
    # Without the mask's share it would be too little; a prompt of its own is not padded.
    assert saved > 1.05 * stated(model, rows=2, **options)
    alone = stated(model, rows=1, found={"padded_from": 2}, **options)
    assert alone == stated(model, rows=1, **options)
    # Rows of one delta do not attend to each other.
    saved = saved_by_a_step(model, replace(ragged(), delta_index=None), **options)
    assert expected <= saved <= expected + 2 * shared_tables(model)
    assert stated(model, n_tokens=2 * T, found=dict(padded_from=1, n_rows=2), **options) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_where_the_backward_is_ours_all_layers_share_the_mask(family, dtype):
    model = tiny_model(family, dtype, attn_implementation="sdpa")
    options = dict(engine="factored", scope="ffn")
    saved = saved_by_a_step(model, ragged(), 2, **options)
    expected = stated(model, rows=2, found={"padded_from": 2}, **options)
    assert expected == stated(model, rows=2, **options)
    assert expected <= saved <= expected + 2 * shared_tables(model) + 2 * T * T


def test_a_window_asks_for_a_mask_once_it_is_full():
    short, long = (
        tiny_model("mistral", attn_implementation="sdpa", sliding_window=n) for n in (T, T + 1)
    )
    options = dict(engine="factored", scope="ffn", backend="torch")
    saved = [saved_by_a_step(each, **options) for each in (short, long)]
    expected = [stated(each, **options) for each in (short, long)]
    assert saved[0] - saved[1] == expected[0] - expected[1] > 0
    # As everything else: of two layers, which the gradient crosses.
    assert saved[0] - saved[1] == 2 * T * 4 * (2 * 16 + T)


def test_only_tokens_with_a_label_are_counted():
    model, ids = tiny_model("llama"), prompt_ids(T)
    labels = ids.clone()
    labels[:, :-4] = -100
    options = dict(engine="dense", scope="head")
    saved = saved_by_a_step(model, Batch(ids, labels=labels), **options)
    assert saved == stated(model, found={"n_labels": 4}, **options)
    assert saved == 4 * 4 * (101 + 32) < stated(model, **options)


def test_the_formula_by_hand():
    model = tiny_model("llama", attn_implementation="sdpa")
    norm, attention, mlp = 4 * 32 + 4, 4 * (32 + 16 + 16), 4 * 2 * 48
    # The final norm, and the gradient of what the head is given; in the lowest layer of these
    # scopes, what lies above the lowest weights.
    whole = 2 * (2 * norm + attention + mlp) + norm + 4 * 32
    by_hand = {
        "ffn": whole + mlp,
        "attention": whole + attention + norm + mlp,
        "query": whole + attention + norm + mlp,
        "norm": whole + norm + attention + norm + mlp,
    }
    for scope, expected in by_hand.items():
        assert stated(model, "factored", scope=scope) == T * expected, scope
    # The dense engine keeps inputs: of q, k and v one, and that of o; those of MLPs.
    assert stated(model, "dense", scope="attention") == T * (by_hand["attention"] + 3 * 4 * 64)
    assert stated(model, "dense", scope="query") == T * (by_hand["query"] + 3 * 4 * 32)
    assert stated(model, "dense", scope="ffn") == T * (by_hand["ffn"] + 3 * 4 * (32 + 48))
    assert stated(model, "dense", scope="norm") == T * by_hand["norm"]
    # A head that trains: to the dense engine the gradient of its logits is a factor of its own.
    assert stated(model, "factored", scope="head") == 0
    assert stated(model, "dense", scope="head") == (T - 1) * 4 * (101 + 32)


@ENGINES
def test_a_model_that_does_something_with_its_logits_saves_their_gradient(engine):
    model = tiny_model("gemma2")
    saved = saved_by_a_step(model, engine=engine, scope="ffn")
    assert saved > T * 4 * 101
    work = policy.workload(model, TTTTrainer(model).selections, TTTConfig(), 1, T)
    assert work.gives_logits
    plain = saved_by_a_step(
        tiny_model("gemma2", final_logit_softcapping=None), engine=engine, scope="ffn"
    )
    # The cap keeps its tanh, and the loss the gradient of what it gives.
    assert saved - plain == pytest.approx(2 * T * 4 * 101, rel=0.2)
    assert 0.95 * saved <= stated(model, engine, scope="ffn") <= saved


def saved_by_eager(model, scope, layers=None):
    """Bytes that stock torch saves for the loss of 64 tokens, with the scope's weights trained."""
    selected = {id(s.param) for s in select_parameters(model, scope, layers)}
    for param in model.parameters():
        param.requires_grad_(id(param) in selected)
    return saved_by(model, lambda: prompt_loss(model, prompt_ids(64)))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def shallow(request):
    """Models of SmolLM2's widths with one layer and with two."""
    shape = MODELS["SmolLM2-135M"]
    return [
        AutoModelForCausalLM.from_config(replace(shape, layers=n).config(), dtype=request.param)
        for n in (1, 2)
    ]


# Bytes over those of stock torch: SmolLM2, 30 layers, 64 tokens, with the factored and the dense
# engine in float32, and in bfloat16. More than half is left where stock torch keeps little itself:
# of frozen linears nothing, of bfloat16 norms float32 copies. What we keep then of each layer are
# two hidden states, gate and up, queries, keys and values, which only products could compute again:
# ``checkpointing`` is for that. The dense engine keeps the inputs of what trains besides, and for a
# head that trains the gradient of its logits.
RATIOS = {
    "all": (0.408, 0.788, 0.335, 0.647),
    "ffn": (0.465, 0.656, 0.373, 0.525),
    "attention": (0.548, 0.669, 0.424, 0.518),
    "query": (0.548, 0.609, 0.424, 0.471),
    "norm": (0.518, 0.518, 0.406, 0.406),
    "-4:": (0.235, 0.376, 0.150, 0.239),
}


@pytest.mark.parametrize("scope", RATIOS)
def test_bytes_beside_those_of_stock_torch(scope, shallow):
    dtype, last = shallow[0].dtype, scope.startswith("-")
    whole = meta_model("SmolLM2-135M", dtype)
    one, two = (saved_by_eager(model, "all" if last else scope) for model in shallow)
    if last:
        # Of the lowest layer that trains stock torch keeps as much whatever lies above it.
        eager = saved_by_eager(shallow[1], "all", "-1:") + 3 * (two - one)
    else:
        eager = one + (len(decoder_layers(whole)) - 1) * (two - one)
    options = dict(layers=scope) if last else dict(scope=scope)
    ratios = RATIOS[scope][2 * (dtype == torch.bfloat16) :]
    for engine, ratio in zip(("factored", "dense"), ratios, strict=False):
        ours = stated(whole, engine, 64, **options)
        assert ours / eager == pytest.approx(ratio, abs=0.002), engine


@ENGINES
def test_frozen_layers_below_cost_nothing(engine):
    shallow, deep = (
        tiny_model("llama", attn_implementation="sdpa", num_hidden_layers=n) for n in (3, 6)
    )
    saved = [saved_by_a_step(m, engine=engine, layers="-2:") for m in (shallow, deep)]
    assert saved[0] == saved[1]
    assert saved_by_a_step(deep, engine=engine) > 1.8 * saved_by_a_step(shallow, engine=engine)


def test_the_count_shows_what_is_saved_without_need():
    """Stock code, which keeps act(gate) and the inputs of frozen norms as they are in float32."""
    model = tiny_model("llama", torch.bfloat16, attn_implementation="sdpa")
    options = dict(engine="dense", scope="attention")
    stock = saved_by_a_step(model, rounding="torch", **options)
    assert stock > 1.2 * (stated(model, **options) + shared_tables(model))
    # And the formula knows of it; it leaves the loss' log-softmax in float32 out.
    own = stated(model, rounding="torch", **options)
    assert own > stated(model, **options) + T * 2 * 101
    assert own <= stock <= own + shared_tables(model) + 4 * T * 101


@pytest.mark.parametrize(("engine", "kept"), [("factored", False), ("dense", True)])
def test_inputs_that_are_among_the_factors_are_not_kept_twice(engine, kept):
    model, seen = tiny_model("llama"), []
    # The product of gate and up, which nothing but this weight's gradient needs.
    downs = [layer.mlp.down_proj for layer in decoder_layers(model)]
    for down in downs:
        down.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    alive = []

    def objective(outputs, batch):
        alive.append([ref() is not None for ref in seen])
        seen.clear()
        return negative_log_likelihood(outputs, batch)

    config = TTTConfig(steps=2, engine=engine, scope="ffn")
    TTTTrainer(model, config, objective=objective).adapt(prompt_ids(T)).restore()
    assert alive == 2 * [3 * [kept]]
