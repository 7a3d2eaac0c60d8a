"""Query-only test-time training written out in plain torch, and the trainer's side of it."""

import copy

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from tests.families import tiny_model
from tests.loops import prompt_ids, selected_rows_loop, twin
from ttt_fast import Batch, TTTConfig, TTTTrainer

T = 40
CONTEXT = prompt_ids(T)
# The beginning, one long before the end, the end, one that overlaps another.
SPANS = [(0, 7), (21, 30), (33, T), (25, 34)]
OPTIONS = dict(lr=0.3, momentum=0.9, weight_decay=0.01)
CLIP = 0.7


def fp64(family="llama", attention="sdpa", **config):
    return tiny_model(family, torch.float64, attn_implementation=attention, **config)


def trainer_of(model, engine="factored", **options):
    options = dict(scope="query", max_grad_norm=CLIP, kv="frozen") | OPTIONS | options
    return TTTTrainer(model, TTTConfig(engine=engine, **options))


def span_loss(trained, original, ids, start, stop):
    """Loss of a span (start, stop) of ids (1, T): the prefix is computed from scratch."""
    # With it, layers with a window get the keys in it alone. Eager attention takes the softmax in
    # float32, where it matters how many keys without weight there are.
    eager = original.config._attn_implementation == "eager"
    cache = DynamicCache(config=None if eager else original.config)
    if start:
        with torch.no_grad():
            original(ids[:, :start], past_key_values=cache, use_cache=True)
    # The tokens before are copied once more, in every layer, as any cache of transformers does.
    logits = trained(ids[:, start:stop], past_key_values=cache, use_cache=True).logits
    return F.cross_entropy(logits[0, :-1], ids[0, start + 1 : stop])


def loop(model, spans=SPANS, prefix_of=None, scope="query", loss=span_loss, ids=CONTEXT):
    """What the method is: losses, norms and weights after a step on each of the spans."""
    trained, original = twin(model), twin(model)
    losses = []

    def step(span):
        def loss_of(m):
            value = loss(m, original if prefix_of is None else prefix_of(m), ids, *span)
            losses.append(value.item())
            return value

        return loss_of

    selections = trainer_of(model, scope=scope).selections
    norms = selected_rows_loop(
        trained, [step(span) for span in spans], selections, max_grad_norm=CLIP, **OPTIONS
    )
    return losses, norms, [trained.get_parameter(s.name).detach() for s in selections]


def session(model, engine, spans=SPANS, ids=CONTEXT, **options):
    """The same with a session on spans of the caller's choice."""
    trainer = trainer_of(model, engine, **options)
    with trainer.begin() as steps:
        frozen = steps.prefill(Batch(ids))
        for span in spans:
            steps.step(frozen.spans([span]))
        with steps.end() as adapted:
            return results(adapted, trainer)


def results(adapted, trainer, delta=0):
    state = adapted.state_dict(delta)
    names = [selection.name for selection in trainer.selections]
    rows = adapted.losses[delta].tolist(), adapted.grad_norms[delta].tolist()
    return *rows, [state[name] for name in names]


def agree(ours, theirs, tolerance=1e-10):
    """Losses, norms and weights."""
    return all(
        torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance)
        for left, right in zip(ours, theirs, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def stored(frozen):
    """Copies of all keys and values."""
    return copy.deepcopy([pair for layers in frozen._layers for pair in layers])


def same_bits(stored, others):
    """Of what :func:`stored` gave twice."""
    return all(
        torch.equal(a, b)
        for pair, other in zip(stored, others, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
