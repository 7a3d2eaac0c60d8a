"""The head and the loss in one piece: the same numbers as behind logits, which nobody sees."""

import functools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from tests.factored_cases import fp64, tolerance_of
from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from tests.untouched import Boom, assert_adapts, unchanged
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, negative_log_likelihood, placement
from ttt_fast.batch import complete_batch, pad_rows
from ttt_fast.engines import head as head_module
from ttt_fast.engines import head_kinds
from ttt_fast.engines.head import OutputHead, expects_no_logits
from ttt_fast.engines.head_kinds import FrozenHead, tokens_at_once
from ttt_fast.objective import next_tokens, reduce_rows, row_losses, token_scale

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
STEPS = 3
T = 9


def trainer_of(model, objective=None, **options):
    options = dict(steps=STEPS, lr=2e-2, momentum=0.9, max_grad_norm=1.0) | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def with_logits(reduction="mean"):
    """An objective of the user's, which is plain torch on real logits."""
    return lambda outputs, batch: negative_log_likelihood(outputs, batch, reduction)


def batch_of(kind):
    """Rows of two deltas: as they are, with labels masked out, weighted, or padded."""
    ids = prompt_ids(T, n_rows=4, seed=3)
    labels, mask, token_weights, row_weights = ids.clone(), None, None, None
    if kind != "plain":
        labels[0, :6], labels[1, 2:], labels[3, 4:6] = -100, -100, -100
    if kind == "weights":
        token_weights = torch.rand(4, T, generator=torch.Generator().manual_seed(2)) + 0.1
        row_weights = torch.tensor([0.5, 2.0, 1.0, 0.25])
    if kind == "padded":
        mask = torch.ones(4, T, dtype=torch.int64)
        mask[1, 4:], mask[3, 7:] = 0, 0
    return Batch(
        ids, labels, mask, token_weights=token_weights, row_weights=row_weights,
        delta_index=torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip


def run(model, batch, objective=None, steps=STEPS, **options):
    """Losses and norms of each step, the loss afterwards, and the engine's head."""
    trainer = trainer_of(model, objective, **options)
    with trainer.begin(2, 2 * T) as session:
        reports = [session.step(batch) for _ in range(steps)]
        after = session.loss(batch)
        head = session.engine.head
    numbers = [each for r in reports for each in (r.losses, r.grad_norms)]
    return torch.stack([*numbers, after]), head


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
    assert tokens_at_once(100, 4 * 49152) == 50  # not 85 and 15
    assert tokens_at_once(3, 1 << 30) == 1
    assert tokens_at_once(300, 4 * 49152, "cuda") == 300


# ---------------------------------------------------------------------------- who is left alone


@ENGINES
def test_a_soft_cap_is_found_at_the_first_forward(engine, monkeypatch):
    model, forwards = fp64("gemma2"), []
    model.register_forward_pre_hook(lambda *call: forwards.append(call))
    batch, options = batch_of("plain"), dict(engine=engine, scope="ffn")
    expected, _ = run(model, batch, with_logits(), **options)
    once = len(forwards)
    ours, head = run(model, batch, **options)
    assert head.plain is False and len(forwards) == 2 * once + 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    # To take it for a plain one gives other losses.
    monkeypatch.setattr(head_module._Call, "is_answered_by", lambda self, outputs: True)
    wrong, head = run(model, batch, **options)
    assert head.plain and not torch.allclose(wrong[0], expected[0], rtol=1e-3)


class Llama(LlamaForCausalLM):
    """Does something after its forward."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        inputs = input_ids, attention_mask, position_ids
        return self.after(super().forward(*inputs, use_cache=use_cache))


class InPlace(Llama):
    """Writes into the logits that it returns."""

    def after(self, outputs):
        outputs.logits[..., 3:50] -= 2.0
        return outputs


class Twice(Llama):
    """Calls its head again, on something else."""

    def after(self, outputs):
        self.second = self.lm_head(torch.ones(4, T, 32, dtype=torch.float64))
        return outputs


class Numbers(Llama):
    """Looks at its logits."""

    def after(self, outputs):
        self.highest = outputs.logits.max().item()
        return outputs


class Fickle(Llama):
    """Scales its logits from a certain forward on."""

    forwards, plain = 0, 2

    def after(self, outputs):
        self.forwards += 1
        if self.forwards > self.plain:
            outputs.logits = outputs.logits * 0.5
        return outputs


def llama_of(kind):
    """The tiny Llama as one of these."""
    model = fp64("llama")
    model.__class__ = kind
    return model


@ENGINES
@pytest.mark.parametrize("kind", [InPlace, Twice, Numbers])
def test_a_model_that_uses_its_logits_has_them(engine, kind):
    model, batch = llama_of(kind), batch_of("masked")
    ours, head = run(model, batch, engine=engine, scope="ffn")
    theirs, _ = run(model, batch, with_logits(), engine=engine, scope="ffn")
    assert head.plain is False
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@ENGINES
def test_a_model_that_begins_to_change_its_logits_is_refused(engine):
    model = llama_of(Fickle)
    with unchanged(model, but=["attributes"]):
        with pytest.raises(RuntimeError, match="the model changed its head's logits"):
            run(model, batch_of("plain"), engine=engine, scope="ffn")
    model.plain = 1 << 30
    run(model, batch_of("plain"), engine=engine, scope="ffn")


def watched_head(model, seen):
    return model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out))


def watched_model(model, seen):
    return model.register_forward_hook(lambda m, args, out: seen.append(out.logits))


def watched_everywhere(model, seen):
    def look(module, args, output):
        if module is model.lm_head:
            seen.append(output)

    return nn.modules.module.register_module_forward_hook(look)


class OwnForward:
    """Somebody's forward on the instance, as a handle."""

    def __init__(self, model, seen):
        self.model, own = model, model.forward

        @functools.wraps(own)
        def forward(*args, **kwargs):
            outputs = own(*args, **kwargs)
            seen.append(outputs.logits)
            return outputs

        model.forward = forward

    def remove(self):
        del self.model.forward


WATCHERS = [watched_head, watched_model, watched_everywhere, OwnForward]


@ENGINES
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_who_watches_sees_logits(engine, watch):
    model, seen = fp64("llama"), []
    handle = watch(model, seen)
    try:
        _, head = run(model, batch_of("plain"), engine=engine, scope="ffn")
    finally:
        handle.remove()
    assert head.plain is None and len(seen) > STEPS
    assert all(logits.device.type == "cpu" and logits.isfinite().all() for logits in seen)
    assert run(model, batch_of("plain"), engine=engine, scope="ffn")[1].plain


def test_an_objective_of_the_users_sees_logits():
    seen = []

    def objective(outputs, batch):
        seen.append(outputs.logits)
        return negative_log_likelihood(outputs, batch)

    _, head = run(fp64("llama"), batch_of("plain"), objective, engine="dense")
    assert head.plain is None
    assert all(logits.device.type == "cpu" and logits.shape == (2, T, 101) for logits in seen)


class Wrapper(nn.Module):
    """Has a model's head, but not among its modules."""

    def __init__(self, model):
        super().__init__()
        self.body, self.config = model.model, model.config
        object.__setattr__(self, "head", model.lm_head)

    def get_input_embeddings(self):
        return self.body.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden = self.body(input_ids, attention_mask, position_ids, use_cache=False)[0]
        return SimpleNamespace(logits=self.head(hidden))


@ENGINES
def test_a_head_outside_the_model_is_left_alone(engine):
    model, options = fp64("llama"), dict(engine=engine, scope="ffn")
    expected, _ = run(model, batch_of("padded"), **options)
    ours, head = run(Wrapper(model), batch_of("padded"), **options)
    assert head.plain is None
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_stock_torchs_bits_are_those_behind_logits():
    _, head = run(tiny_model("llama"), batch_of("plain"), engine="dense", rounding="torch")
    assert head.plain is None


def test_under_autocast_it_is_left_alone():
    with torch.autocast("cpu", torch.bfloat16):
        _, head = run(tiny_model("llama"), batch_of("plain"), engine="dense")
    assert head.plain is None


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [("llama", {}, True), ("gemma2", {}, False), ("gemma2", dict(final_logit_softcapping=None), 1)],
    ids=str,
)
def test_what_is_expected_before_the_first_forward(family, options, expected):
    assert expects_no_logits(tiny_model(family, **options)) == expected


def test_what_was_found_is_planned_with():
    model = llama_of(InPlace)
    trainer = trainer_of(model, engine="dense")
    before = trainer.plan(1, 64).predicted_bytes["dense"]
    trainer.adapt(prompt_ids(T)).restore()
    after = trainer.plan(1, 64).predicted_bytes["dense"]
    assert after >= before + 64 * 101 * 8


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
