"""Many deltas side by side in the factored engine: each as if a loop had taken it alone."""

import pytest
import torch
from torch.nn import functional as F

from tests.factored_cases import (
    DENSE,
    OPTIONS,
    STEPS,
    assert_as_loops,
    assert_same_deltas,
    fp64,
    padded,
    prompts_of,
    run_schedule,
    shown,
    tolerance_of,
    trainer_of,
)
from tests.families import tiny_model
from tests.loops import prompt_ids, row_loss, sgd_loop, twin
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer
from ttt_fast.engines import products
from ttt_fast.naive import naive_adapt
from ttt_fast.prompts import prompt_batch


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


@pytest.mark.parametrize("scope", ["all", "attention"])
@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("llama", "model.layers.1.mlp.down_proj"),
        ("gpt2", "transformer.h.1.mlp.c_proj"),
        ("opt", "model.decoder.layers.1.fc2"),
    ],
)
def test_nan_gradients_at_pads_reach_nothing(family, where, scope):
    """Attention would take them from a query at padding to the keys of all tokens."""
    model = fp64(family)
    ids, mask = padded(prompts_of(), "right")
    trainer = trainer_of(model, scope=scope)
    with trainer.adapt(ids, attention_mask=mask, deltas="independent") as clean:
        pass
    planted = mask

    def hook(module, inputs, outputs):
        (x,) = inputs
        return (x.masked_fill(planted.reshape(*x.shape[:-1], 1) == 0, torch.nan),)

    model.get_submodule(where).register_full_backward_hook(hook)
    with trainer.adapt(ids, attention_mask=mask, deltas="independent") as adapted:
        assert torch.allclose(adapted.losses, clean.losses, rtol=tolerance_of(family))
        assert torch.allclose(adapted.grad_norms, clean.grad_norms, rtol=tolerance_of(family))
    # The same NaN at a token does reach the norm.
    planted = mask.roll(1, 1)
    with pytest.raises(DivergedError, match=r"step 1 of delta .* gradient norm nan"):
        trainer.adapt(ids, attention_mask=mask, deltas="independent")


def test_a_list_that_does_not_go_at_once():
    """Prompts are taken in runs of so many tokens; nobody's numbers change."""
    trainer_options = dict(max_batch_tokens=18)
    trainer = trainer_of(fp64(n_layers=1), **trainer_options)
    batch = prompt_batch(trainer.model, None, prompts_of(), deltas="independent")
    session = trainer.begin(n_deltas=5)
    assert len(session.parts(batch)) > 1
    session.abort()
    assert_as_loops(fp64(n_layers=1), prompts_of(), trainer_options=trainer_options)


# ---------------------------------------------------------------------------- sessions


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_go_through_torchs_products(dtype, monkeypatch):
    """The product with W is torch's then, and the delta is added to it before it is rounded."""
    model, ids = tiny_model("llama", dtype), prompt_ids(40, n_rows=2)
    config = TTTConfig(lr=1e-2, steps=4, engine="factored", momentum=0.9)
    found, forwards = [], []
    real = torch.Tensor.addmm_
    spy = lambda *args: (forwards.append(1), real(*args))[1]  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "addmm_", spy)
    for most in (256, 0):
        monkeypatch.setattr(products, "most_rows", lambda *_, most=most: most)
        forwards.clear()
        with TTTTrainer(model, config).adapt(ids, deltas="independent") as adapted:
            found.append(adapted.losses.float())
        assert bool(forwards) == (most == 0 and dtype == torch.float32)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*found, rtol=rtol, atol=rtol)
