"""The head and the loss in one piece: the same numbers as behind logits, which nobody sees."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.factored_cases import fp64, tolerance_of
from tests.families import FAMILIES, tiny_model
from tests.head_cases import STEPS, T, batch_of, run, trainer_of, with_logits
from tests.loops import prompt_ids
from tests.untouched import Boom, assert_adapts, unchanged
from ttt_fast import Batch, DivergedError, placement
from ttt_fast.batch import complete_batch, pad_rows
from ttt_fast.engines import head_kinds
from ttt_fast.engines.head import OutputHead
from ttt_fast.engines.head_kinds import FrozenHead, tokens_at_once
from ttt_fast.objective import next_tokens, reduce_rows, row_losses, token_scale

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])


def supports(family, engine):
    return engine == "dense" or not ("mix" in family or "moe" in family)


EVERY = [
    (family, engine) for family in FAMILIES for engine in ("dense", "factored")
    if supports(family, engine)
]  # fmt: skip


@pytest.mark.parametrize(("family", "engine"), EVERY)
@pytest.mark.parametrize("scope", ["all", "ffn", "head"])
def test_the_same_losses_and_norms_as_behind_logits(family, engine, scope):
    model, options = fp64(family), dict(engine=engine, scope=scope)
    batch = batch_of("padded")
    with unchanged(model):
        ours, head = run(model, batch, **options)
    theirs, _ = run(model, batch, with_logits(), **options)
    assert head.plain is (family != "gemma2")
    torch.testing.assert_close(ours, theirs, rtol=tolerance_of(family), atol=0)


@ENGINES
@pytest.mark.parametrize("kind", ["plain", "masked", "weights", "padded"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 2000, 1 << 24], ids=["by token", "some", "whole"])
def test_whatever_counts_and_however_it_is_cut(engine, kind, reduction, chunk, monkeypatch):
    monkeypatch.setattr(head_kinds, "CPU_LOGIT_BYTES", chunk)
    model, batch = fp64("llama_tied"), batch_of(kind)
    options = dict(engine=engine, reduction=reduction)
    ours, _ = run(model, batch, **options)
    theirs, _ = run(model, batch, with_logits(reduction), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    # What counts does matter.
    if kind != "plain":
        other, _ = run(model, batch_of("plain"), **options)
        assert not torch.allclose(other, ours, rtol=1e-3)


@ENGINES
@pytest.mark.parametrize("scope", ["all", "ffn"])
def test_where_the_host_does_not_count_labels(engine, scope, monkeypatch):
    """As on other devices: all tokens have logits, and padding may hold anything."""
    model, batch = fp64("llama_tied"), batch_of("padded")
    theirs, _ = run(model, batch, with_logits(), engine=engine, scope=scope)
    monkeypatch.setattr(placement, "look_waits", lambda device: True)
    ours, head = run(model, batch, engine=engine, scope=scope)
    assert head.plain
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@ENGINES
@pytest.mark.parametrize(
    "options",
    [dict(checkpointing=True), dict(layers="-1:"), dict(scope="norm"), dict(weight_decay=0.1)],
    ids=str,
)
def test_beside_what_else_saves(engine, options):
    model, batch = fp64("llama"), batch_of("masked")
    ours, head = run(model, batch, engine=engine, **options)
    theirs, _ = run(model, batch, with_logits(), engine=engine, **options)
    assert head.plain
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@ENGINES
@pytest.mark.parametrize("trained", [True, False])
def test_a_head_with_a_bias(engine, trained):
    model = fp64("llama")
    with torch.no_grad():
        bias = nn.Parameter(torch.linspace(-2, 2, 101, dtype=torch.float64))
        model.lm_head.bias = bias
    options = dict(engine=engine, scope="all" if trained else "ffn")
    ours, head = run(model, batch_of("masked"), **options)
    theirs, _ = run(model, batch_of("masked"), with_logits(), **options)
    assert head.plain
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    with torch.no_grad():
        model.lm_head.bias.zero_()
    assert not torch.allclose(run(model, batch_of("masked"), **options)[0], ours, rtol=1e-3)


@ENGINES
@pytest.mark.parametrize("scope", ["all", "ffn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_twenty_steps_in_narrower_types(engine, dtype, scope):
    model, ids = tiny_model("llama_tied", dtype, attn_implementation="sdpa"), prompt_ids(T)
    options = dict(engine=engine, steps=20, scope=scope, lr=5e-3)
    with trainer_of(model, **options).adapt(ids) as adapted:
        ours = adapted.losses[0]
        assert adapted._engine.head.plain
    with trainer_of(model, with_logits(), **options).adapt(ids) as adapted:
        theirs = adapted.losses[0]
    assert theirs[-1] < 0.9 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol={4: 1e-4, 2: 2e-2}[dtype.itemsize], atol=0)


@pytest.mark.parametrize("kind", ["plain", "masked", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_scale_of_a_token_is_autograds_to_the_bit(kind, reduction, dtype):
    batch = complete_batch(batch_of(kind), tiny_model("llama"), 2)
    targets = next_tokens(batch.labels)
    token_losses = torch.rand(targets.shape, dtype=dtype).requires_grad_()
    rows = row_losses(token_losses, targets, batch, reduction)
    (gradient,) = torch.autograd.grad(reduce_rows(rows, batch.row_weights, 2).sum(), token_losses)
    assert torch.equal(token_scale(targets, batch, reduction, 2, dtype), gradient)


# ---------------------------------------------------------------------------- what is not there


class Largest(TorchDispatchMode):
    """The most numbers of a new tensor that has them."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                self.numel = max(self.numel, 0 if func.is_view else each.numel())
        return out


def largest_of(model, call, objective=None, **options):
    """Numbers in the largest tensor of the second step, or of a loss."""
    with trainer_of(model, objective, **options).begin(1, 40) as session:
        parts = session.parts(complete_batch(Batch(prompt_ids(40)), model, 1))
        session.step_parts(parts)
        with Largest() as largest:
            session.step_parts(parts) if call == "step" else session.loss(parts[0][1])
    return largest.numel


@ENGINES
@pytest.mark.parametrize("call", ["step", "loss"])
def test_no_logits_of_all_tokens_are_made(engine, call, monkeypatch):
    monkeypatch.setattr(head_kinds, "CPU_LOGIT_BYTES", 4 * 4 * 2003)  # four tokens
    model = tiny_model("llama", vocab_size=2003, attn_implementation="sdpa")
    options = dict(engine=engine, scope="ffn")
    assert largest_of(model, call, **options) < 8 * 2003
    assert largest_of(model, call, with_logits(), **options) >= 40 * 2003


def test_factors_of_a_head_are_of_tokens_with_a_label():
    model, labels = tiny_model("llama_tied"), prompt_ids(T)
    labels[0, :5] = -100
    with trainer_of(model, engine="factored").adapt(prompt_ids(T), labels=labels) as adapted:
        (matrix,) = (
            f for f in adapted._engine.factors if f.selection.param is model.lm_head.weight
        )
        assert matrix.inputs.rows.lengths == (STEPS * 4,)
        assert matrix.lookups.rows.lengths == (STEPS * T,)


def test_chunks_are_about_as_large():
    assert tokens_at_once(64, 4 * 49152) == 64
    assert tokens_at_once(140, 4 * 49152) == 70  # not 128 and 12
    assert tokens_at_once(3, 1 << 30) == 1
    assert tokens_at_once(300, 4 * 49152, "cuda") == 300


# ---------------------------------------------------------------------------- errors


@ENGINES
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_error_in_the_middle_leaves_nothing(engine, at, monkeypatch):
    model, calls = tiny_model("llama_tied"), []
    nll_ = head_kinds.ops.nll_

    def fail(*args, **options):
        calls.append(args)
        if len(calls) == at:
            raise Boom
        return nll_(*args, **options)

    with unchanged(model), monkeypatch.context() as patch:
        patch.setattr(head_kinds.ops, "nll_", fail)
        with pytest.raises(Boom):
            trainer_of(model, engine=engine).adapt(prompt_ids(T))
    assert len(calls) == at
    assert_adapts(model, engine)


def test_its_own_forward_is_given_back_after_each_step():
    model = tiny_model("llama")
    trainer = trainer_of(model, engine="factored", scope="all")
    with trainer.begin(1, T) as session:
        attached = model.lm_head.forward
        session.step(Batch(prompt_ids(T)))
        assert model.lm_head.forward == attached
        assert model(prompt_ids(4)).logits.device.type == "cpu"
    assert "forward" not in vars(model.lm_head)


def test_a_gradient_of_anything_but_the_sum_is_noticed():
    model = tiny_model("llama").requires_grad_(False)
    batch = complete_batch(Batch(prompt_ids(T)), model, 1)
    head = OutputHead(model, FrozenHead(model.lm_head))
    model.model.norm.weight.requires_grad_(True)
    with head.answering(batch, 1, "mean") as call:
        _, losses = head.run(call, partial(model, batch.input_ids), lambda: lambda: None)
    with pytest.raises(AssertionError):
        (2 * losses).sum().backward()


@ENGINES
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("scope", ["all", "ffn", "head"])
def test_padding_that_holds_nan(engine, scope, counted, monkeypatch):
    """What the head is given is NaN at padding; neither losses nor gradients are."""
    monkeypatch.setattr(placement, "look_waits", lambda device: not counted)
    model = fp64("llama")
    ids, mask = pad_rows([prompt_ids(n, seed=n)[0] for n in (9, 5)], 0, "right")
    # Two deltas with unlike numbers of labels where they go through the model together.
    deltas = torch.arange(2) if engine == "factored" else torch.zeros(2, dtype=torch.int64)
    batch = Batch(ids, attention_mask=mask, delta_index=deltas)
    expected, _ = run(model, batch, engine=engine, scope=scope)
    empty = [mask == 0]
    handle = model.model.norm.register_forward_hook(
        lambda m, args, output: output.masked_fill(empty[0][..., None], torch.nan)
    )
    try:
        ours, head = run(model, batch, engine=engine, scope=scope)
        assert head.plain
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0, equal_nan=True)
        assert ours[0, 0].isfinite()
        empty[0] = ids == ids[0, 3]  # at a token it is noticed
        with pytest.raises(DivergedError):
            run(model, batch, engine=engine, scope=scope)
    finally:
        handle.remove()
