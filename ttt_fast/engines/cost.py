"""What a step costs in either engine: time and memory, from numbers alone.

A :class:`Workload` says what is done, a :class:`Machine` how fast. With T tokens a delta at a step,
D deltas, s(M) the time of a product of M rows with one weight, and for step t of K:

    dense     D · (W·s(T) + dX·s(T) + dW·w(T) + norm + update + 4 copies of the weights / K)
    factored  W·s(D·T) + dX·s(D·T) + D · (Gram 2T²·Σ(in + out) + delta products 4T·tT·Σ(in + out))

so many short prompts favour the factored engine, which reads the weights once for all deltas, and a
high rank t·T favours the dense one.

Memory is of tensors that live at the same time at the end of a forward, when most do; the bytes
that a step saves are stated once, in :func:`saved_bytes`. What an allocator holds
beyond that is not among them: glibc keeps freed memory of some sizes, a tenth to a half more,
unless ``MALLOC_MMAP_THRESHOLD_=65536`` is in the environment.
"""

from __future__ import annotations

from collections.abc import Callable

from ttt_fast.engines.head_kinds import most_tokens
from ttt_fast.engines.machine import Machine
from ttt_fast.engines.products import Products
from ttt_fast.engines.work import Layer, Workload

# Operations of attention for each pair of positions and channel: 2 products forward, 5 backward
# (the scores are computed again), 2 operations each.
_ATTENTION_FLOPS = 14
# To frozen keys and values: 2 products forward, 3 backward.
_FROZEN_FLOPS = 10


# ---------------------------------------------------------------------------- time


def frozen_ms(work: Workload, machine: Machine, rows: int = 1) -> float:
    """Milliseconds of forward, loss and input gradients, as if nothing trained.

    Args:
        work: what is to be done.
        machine: what it is done on.
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    tokens = rows * work.tokens
    return 1e-6 * (
        (work.forward_weights + work.backward_weights + work.recomputed_weights)
        * machine.product(tokens)
        + 1e3 * machine.module_us * work.modules
        + machine.element_ns * tokens * work.width
        + machine.logit_ns * tokens * work.vocabulary
        + _ATTENTION_FLOPS * tokens * work.tokens * work.attention_width * machine.flop_ns
        # A span is drawn anywhere: half of the context is before it, in the mean.
        + _FROZEN_FLOPS * tokens * work.context / 2 * work.attention_width * machine.flop_ns
    )


def dense_ms(work: Workload, machine: Machine) -> float:
    """Milliseconds of one step of one delta in the dense engine; the deltas take turns.

    A short prompt's gradient, which stays factors (:mod:`ttt_fast.engines.products`), saves memory
    but takes as long: what it saves in traffic the Gram matrices and the smaller calls cost.
    """
    size = work.itemsize
    # The weight is read and written, and so is what the optimizer keeps.
    moved = 2 * size + 2 * (size if work.momentum and work.optimizer == "sgd" else 0)
    if work.optimizer == "adamw":
        moved += 4 * (size if work.rounding == "torch" else work.wide_itemsize)
    if work.accumulate_delta:
        moved += 2 * work.wide_itemsize + size
    # The gradient is written as it is formed; the norm and the update read it.
    gradient_ns = machine.weight_gradient(work.tokens) + 2 * size / machine.update_gb_s
    # Taken and given back, a read and a write each.
    snapshot = 4 * size * work.adapted_parameters / max(1, work.steps)
    return frozen_ms(work, machine) + 1e-6 * (
        gradient_ns * work.gradient_weights
        + moved * work.adapted_parameters / machine.update_gb_s
        + snapshot / machine.copy_gb_s
        + 1e3 * machine.dense_module_us * work.adapted_modules
    )


def factored_ms(work: Workload, machine: Machine, at_once: int | None = None) -> float:
    """Milliseconds of one step of one delta in the factored engine, the mean over the steps.

    Args:
        work: what is to be done.
        machine: what it is done on.
        at_once: how many deltas a batch holds, by default all.
    """
    T, D = work.tokens, at_once or work.deltas
    own = 1e-3 * machine.factored_module_us * work.adapted_modules
    record = 2 * T * work.factor_width * work.itemsize / machine.copy_gb_s
    gram = T * work.delta_width * machine.gram(T)
    # Every number of the factors takes part in one product of the forward and one of the backward.
    ranks = [t * T for t in range(1, work.steps)]
    deltas = 2 * work.delta_width * sum(r * machine.delta_product(T, r) for r in ranks)
    return (frozen_ms(work, machine, D) + own) / D + 1e-6 * (
        record + gram + deltas / max(1, work.steps)
    )


# ---------------------------------------------------------------------------- memory


def saved_bytes(work: Workload, engine: str, rows: int = 1) -> int:
    """Bytes that autograd saves in a forward of ``rows`` times ``work.tokens`` tokens.

        Σ over what the gradient crosses      a norm: its input and 1 / rms
        for each token                        attention: query, key, value, result, log-sum-exp,
                                              and its mask, where it has one
                                              a gated MLP: gate and up
                                              the head with the loss: the gradient of its input
        + Σ over the linears that train       the input, in the dense engine, where neither a
                                              sibling nor attention has it
        + the head, if it trains              in the dense engine its input and the gradient of
                                              the logits, of tokens with a label, and no other

    and nothing for frozen linears, nor below the lowest module that trains. In the factored engine
    inputs and the logits' gradient are among the factors. Where the model gives its logits, the
    loss saves their gradient, which is not among these. What other modules keep, and these with
    the model's own code, is in :mod:`ttt_fast.engines.shapes`.

    Args:
        work: what is to be done.
        engine: "dense" or "factored".
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    return rows * sum(_saved_bytes(work, layer, engine, rows) for layer in work.layers)


def activation_bytes(work: Workload, engine: str, rows: int = 1) -> int:
    """Bytes of what is saved that are there at the peak: all.

    With checkpointing, the inputs of the layers and what is saved outside of them; and what one of
    them saves, or the dense engine's factors of gradients that are not formed, which it keeps until
    the update. By then the logits are gone, so that only what exceeds them counts.

    Args:
        work: what is to be done.
        engine: "dense" or "factored".
        rows: how many times ``work.tokens`` tokens go through the model together.
    """
    saved = saved_bytes(work, engine, rows)
    if work.checkpointing is not True or not work.blocks:
        return saved
    tokens = rows * work.tokens
    layers = [layer for layer in work.layers if layer.inside]
    inside = rows * sum(_saved_bytes(work, layer, engine, rows) for layer in layers)
    whole = tokens * work.blocks * work.hidden_width * work.itemsize + saved - inside
    kept = 0
    if engine == "dense":
        linears = [x for x in layers if x.kind == "linear" and _stays_factors(work, x)]
        widths = (x.count * (x.adapted_out + (0 if x.shares_input else x.in_)) for x in linears)
        kept = tokens * work.itemsize * sum(widths)
    later = max(kept, -(-inside // work.blocks))
    gone = tokens * work.vocabulary * work.itemsize
    if not work.gives_logits:
        gone = _logit_bytes(work, rows, engine)
    return whole + max(0, later - gone)


def _saved_bytes(work: Workload, layer: Layer, engine: str, rows: int) -> int:
    """Of the layers of one shape, a share of 1 / ``rows``: for ``work.tokens`` tokens."""
    numbers = statistics = pairs = wide_pairs = wide = labelled = 0
    narrow = work.itemsize < work.wide_itemsize
    if layer.differentiated:
        numbers, statistics, pairs = layer.saved, layer.statistics, layer.pairs
        wide_pairs = layer.wide_pairs if narrow else 0
        if _is_masked(work, layer, rows):
            numbers, pairs = numbers + layer.masked, pairs + layer.mask_pairs
    if engine == "factored" and layer.adapted_out and layer.normalised:
        wide = layer.normalised * (2 if narrow else 1)
        numbers = 0 if narrow else numbers
    trains_whole = engine == "dense" and layer.kind == "linear" and layer.adapted_out
    if trains_whole and layer.head and not work.gives_logits:
        labelled = layer.in_ + layer.out
    elif trains_whole:
        kept = layer.shares_input or (layer.keeps_input and layer.differentiated)
        numbers += 0 if kept else layer.in_
    elif layer.head and not work.gives_logits:
        numbers += layer.in_ * layer.differentiated
    seen = -(-(work.tokens + work.context) // work.n_rows)
    return layer.count * (
        work.itemsize * (work.predicted * labelled + work.tokens * (numbers + pairs * seen))
        + work.wide_itemsize * work.tokens * (wide + wide_pairs * seen)
        + 4 * work.tokens * statistics
    )


def _is_masked(work: Workload, layer: Layer, rows: int) -> bool:
    """Whether an attention is given a mask; spans before frozen keys make do without."""
    padded = 0 < work.padded_from <= rows
    full = 0 < layer.window * work.n_rows <= work.tokens
    return not work.context and (padded or full)


def dense_bytes(work: Workload) -> dict[str, int]:
    """Memory above the model, by use."""
    selected = work.adapted_parameters * work.itemsize
    wide = work.adapted_parameters * work.wide_itemsize
    whole = [x for x in work.layers if not (x.tied or _stays_factors(work, x))]
    gradients = work.itemsize * sum(x.count * x.adapted_out * x.in_ for x in whole)
    held = 1 if work.in_turn else work.deltas
    state = selected if work.momentum else 0
    if work.optimizer == "adamw":
        state = 2 * (selected if work.rounding == "torch" else wide)
    return {
        "snapshot": selected,
        "gradients": gradients,
        "optimizer": held * state,
        "delta": held * wide if work.accumulate_delta else 0,
        # The weights hold one delta; the others wait in copies.
        "weights": held * selected if held > 1 else 0,
        **_frozen_bytes(work, 1),
        **_forward_bytes(work, 1, "dense"),
    }


def _stays_factors(work: Workload, layer: Layer) -> bool:
    """Whether the dense engine never forms a layer's gradient whole."""
    if work.rounding == "torch" or not layer.adapted_out or layer.kind == "vector":
        return False
    if layer.kind == "embedding":
        tied = any(x.tied for x in work.layers)
        products = Products(layer.in_, layer.adapted_out)
        return products.pays(pair_rows=tied * work.tokens, lookup_rows=work.tokens)
    products = Products(layer.adapted_out, layer.in_)
    return products.pays(pair_rows=work.tokens, lookup_rows=layer.tied * work.tokens)


def factored_bytes(work: Workload, at_once: int | None = None) -> dict[str, int]:
    """Memory above the model, by use; ``at_once`` deltas in a forward, by default all."""
    head = work.head_factor_width
    numbers = work.tokens * (work.factor_width - head) + work.predicted * head
    vectors = 4 * work.vector_parameters
    return {
        "factors": work.deltas * work.steps * (numbers * work.itemsize + vectors),
        **_frozen_bytes(work, at_once or work.deltas),
        **_forward_bytes(work, at_once or work.deltas, "factored"),
    }


def _frozen_bytes(work: Workload, rows: int) -> dict[str, int]:
    """Keys and values of all deltas' contexts; and what attention copies of ``rows`` of them."""
    if not work.context:
        return {}
    # Copies for each query head are kept for the backward pass.
    copies = rows * 2 * work.attention_width if work.joined else 0
    return {"keys_values": work.context * work.itemsize * (work.deltas * work.kv_width + copies)}


def _forward_bytes(work: Workload, rows: int, engine: str) -> dict[str, int]:
    """What ``rows`` times ``work.tokens`` tokens keep until their backward pass."""
    return {
        "activations": activation_bytes(work, engine, rows),
        "logits": _logit_bytes(work, rows, engine),
    }


def _logit_bytes(work: Workload, rows: int, engine: str) -> int:
    """Of the logits that are there at the same time, those not counted that the head keeps."""
    tokens, token_bytes = rows * work.predicted, work.vocabulary * work.itemsize
    if not work.gives_logits:
        trains = any(layer.head and layer.adapted_out for layer in work.layers)
        if engine == "dense" and trains:
            return 0  # they become a factor of the gradient, and that is saved
        return (tokens if trains else min(tokens, most_tokens(token_bytes))) * token_bytes
    # The logits, and their gradient in a copy; stock torch's loss has a log-softmax in fp32 at
    # least, and a cast of 16-bit logits.
    numbers = 2 * work.itemsize
    if work.rounding == "torch":
        numbers = work.itemsize + work.wide_itemsize * (1 if work.itemsize >= 4 else 2)
    if work.capped:
        numbers += work.itemsize
    return tokens * work.vocabulary * numbers


def deltas_at_once(work: Workload) -> int:
    """Deltas that the factored engine can train side by side; 0 if not even one fits.

    The factors of all of them are kept whatever the number; activations and logits only of those
    in a batch.
    """

    def fits(n: int) -> bool:
        return sum(factored_bytes(work, n).values()) <= work.limit("factored")

    return largest(work.deltas, fits)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to a limit that fits, 0 if not even 1 does; so do all smaller ones."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
