"""Which engine: the workload read off a model, and the decision table."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from families import FAMILIES, tiny_model
from ttt_fast import TTTConfig, select_parameters
from ttt_fast.calibration import default_machine
from ttt_fast.engines import cost, policy
from ttt_fast.engines.cost import Workload
from ttt_fast.engines.policy import choose, workload

CONFIGS = {
    "smollm2": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "qwen2.5-3b": Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
}  # fmt: skip
CPU = default_machine("float32")


@cache
def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)


def work_of(model, tokens=20, steps=10, deltas=1, available_bytes=None, **options) -> Workload:
    config = TTTConfig(steps=steps, **options)
    selections = select_parameters(model, config.scope, config.layers)
    return workload(model, selections, config, deltas, tokens, available_bytes)


# ---------------------------------------------------------------------------- reading a model


def test_numbers_of_smollm2():
    work = work_of(meta_model("smollm2"))
    attention = 2 * (576 + 576) + 2 * (192 + 576)
    ffn = 3 * (1536 + 576)
    head = 49152 + 576
    block = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576
    assert work.forward_weights == work.gradient_weights == 30 * block + 49152 * 576
    assert work.adapted_parameters == 134_515_008
    assert work.vector_parameters == 61 * 576
    assert work.width == work.delta_width == 30 * (attention + ffn) + head
    # q, k, v read one tensor, gate and up another; the lookup's gradient is recorded, too.
    shared = 30 * (2 * 576 + 576)
    assert work.factor_width == work.delta_width - shared + 576
    assert work.vocabulary == 49152
    assert work.attention_width == 30 * 576
    assert work.obstacle is None


def test_every_family_is_counted_completely():
    for family in FAMILIES:
        model = tiny_model(family)
        work = work_of(model)
        assert work.adapted_parameters == sum(p.numel() for p in model.parameters()), family
        linears = {m for m in model.modules() if isinstance(m, nn.Linear)}
        assert work.forward_weights >= sum(m.weight.numel() for m in linears), family


def test_a_model_on_meta_and_a_real_one_read_alike():
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    assert work_of(meta) == work_of(tiny_model("llama"))


def test_frozen_layers_are_crossed_but_not_trained():
    whole, part = (work_of(meta_model("smollm2"), scope=s) for s in ("all", "attention"))
    assert part.forward_weights == whole.forward_weights
    assert part.gradient_weights == part.adapted_parameters == 30 * 2 * (576 + 192) * 576
    assert part.delta_width == 30 * (2 * 1152 + 2 * 768)


def test_the_gradient_stops_below_the_first_adapted_layer():
    whole, top = (work_of(meta_model("smollm2"), layers=s) for s in (None, "-4:"))
    block = whole.forward_weights - 49152 * 576
    assert top.backward_weights == 49152 * 576 + 4 * block // 30
    # Without its norm, the first projection has nobody to pass a gradient to.
    bare = work_of(meta_model("smollm2"), layers="-4:", scope="attention")
    assert top.backward_weights - bare.backward_weights == 576 * 576
    # Below it the first step's hidden states are kept.
    below = 26 * block // 30
    assert top.forward_weights == pytest.approx(whole.forward_weights - below * (1 - 1 / top.steps))


def test_slices_and_transposed_weights():
    phi3 = work_of(tiny_model("phi3"), scope="query")
    config = tiny_model("phi3").config
    query = config.hidden_size * config.num_hidden_layers
    assert phi3.gradient_weights == query * config.hidden_size
    gpt2 = tiny_model("gpt2")
    hidden = gpt2.config.hidden_size
    widest = max(x.out for x in work_of(gpt2, scope="ffn").layers if x.adapted_out)
    assert widest == gpt2.transformer.h[0].mlp.c_fc.weight.shape[1] > hidden


# ---------------------------------------------------------------------------- the decision table


@pytest.mark.parametrize(
    ("model", "tokens", "steps", "deltas", "options", "engine"),
    [
        ("smollm2", 20, 10, 1, {}, "factored"),
        ("smollm2", 20, 10, 16, {}, "factored"),
        ("smollm2", 20, 10, 16, {"scope": "attention"}, "factored"),
        ("smollm2", 20, 10, 16, {"scope": "ffn"}, "factored"),
        ("smollm2", 64, 5, 1, {}, "factored"),
        ("smollm2", 20, 100, 1, {}, "dense"),
        ("smollm2", 256, 1, 1, {}, "factored"),
        ("smollm2", 256, 4, 1, {}, "dense"),
        ("smollm2", 256, 10, 1, {}, "dense"),
        ("smollm2", 1024, 20, 1, {}, "dense"),
        ("smollm2", 1024, 20, 16, {}, "dense"),
        ("qwen2.5-3b", 20, 10, 1, {}, "factored"),
        ("qwen2.5-3b", 20, 10, 16, {}, "factored"),
        # A wider model bears a higher rank.
        ("qwen2.5-3b", 256, 4, 1, {}, "factored"),
        ("qwen2.5-3b", 1024, 20, 1, {}, "dense"),
    ],
)
def test_decisions(model, tokens, steps, deltas, options, engine):
    choice = choose(work_of(meta_model(model), tokens, steps, deltas, **options), CPU)
    assert choice.engine == engine, choice.reason
    assert choice.reason.startswith(f"{engine}: ")
    assert "\n" not in choice.reason
    assert min(choice.predicted_ms, key=choice.predicted_ms.get) == engine


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"optimizer": "adamw"}, "adamw is not linear"),
        ({"rounding": "torch"}, "rounding='torch'"),
        ({"rounding": "stochastic"}, "rounding='stochastic'"),
        ({"accumulate": "delta"}, "accumulate='delta'"),
        ({"snapshot": "undo"}, "snapshot='undo'"),
    ],
)
def test_what_cannot_be_factored_is_dense_and_says_why(options, why):
    work = work_of(meta_model("smollm2"), deltas=16, **options)
    choice = choose(work, CPU)
    assert choice.engine == "dense"
    assert why in choice.reason
    assert "factored" not in choice.predicted_ms
    with pytest.raises(ValueError, match=why):
        choose(work, CPU, "factored")
    # The same without the option would be factored.
    assert choose(replace(work, obstacle=None), CPU).engine == "factored"


class Odd(nn.Module):
    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((2, 4, 4)[-ndim:]))


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Odd(3), "3-D"),
        (Odd(2), "Odd"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
    ],
)
def test_modules_that_cannot_be_recorded_are_dense(module, why):
    model = nn.Sequential(nn.Linear(4, 4), module)
    choice = choose(work_of(model, scope=r"1\.weight"), CPU)
    assert choice.engine == "dense"
    assert "1.weight" in choice.reason and why in choice.reason
    assert work_of(model, scope=r"0\.weight").obstacle is None


def test_engine_asked_for():
    work = work_of(meta_model("smollm2"))
    for engine in ("dense", "factored"):
        assert choose(work, CPU, engine).engine == engine
    with pytest.raises(ValueError, match="'quick' is unknown"):
        choose(work, CPU, "quick")


# ---------------------------------------------------------------------------- memory


def test_memory_takes_the_slower_engine_that_fits():
    slow = work_of(meta_model("smollm2"), tokens=256, steps=4)
    free = choose(slow, CPU)
    assert free.engine == "dense"
    sizes = free.predicted_bytes
    limit = (sizes["dense"] + sizes["factored"]) // 2
    tight = choose(replace(slow, available_bytes=limit), CPU)
    assert tight.engine == "factored"
    assert "GiB" in tight.reason
    assert choose(replace(slow, available_bytes=sizes["dense"]), CPU).engine == "dense"


def test_memory_of_factors_makes_it_dense():
    work = work_of(meta_model("qwen2.5-3b"), tokens=256, steps=4, deltas=8, scope="attention")
    assert choose(work, CPU).engine == "factored"
    dense = sum(cost.dense_bytes(work).values())
    # Not even one delta at a time: the factors of all are kept.
    assert sum(cost.factored_bytes(replace(work, steps=12), 1).values()) > dense
    tight = replace(work, steps=12, available_bytes=dense)
    assert choose(tight, CPU).engine == "dense"
    assert cost.deltas_at_once(tight) == 0


def test_too_little_memory_for_either_takes_the_smaller():
    choice = choose(work_of(meta_model("smollm2"), available_bytes=1 << 20), CPU)
    assert choice.engine == "factored"
    assert "neither" in choice.reason


def test_deltas_that_do_not_fit_at_once_take_turns():
    work = work_of(meta_model("smollm2"), deltas=64)
    whole = sum(cost.factored_bytes(work).values())
    tight = replace(work, available_bytes=whole - 1)
    at_once = cost.deltas_at_once(tight)
    assert 1 <= at_once < 64
    choice = choose(tight, CPU)
    assert choice.deltas_at_once == at_once
    assert choice.predicted_bytes["factored"] <= tight.available_bytes
    assert choice.predicted_ms["factored"] >= choose(work, CPU).predicted_ms["factored"]


def test_free_bytes_are_those_of_this_machine():
    free = policy.free_bytes()
    assert free is None or 1 << 20 < free < 1 << 50


# ---------------------------------------------------------------------------- negative controls


def test_the_machine_decides():
    work = work_of(meta_model("smollm2"))
    assert choose(work, CPU).engine == "factored"
    slow_deltas = replace(CPU, delta_slowdown=tuple(100 * s for s in CPU.delta_slowdown))
    assert choose(work, slow_deltas).engine == "dense"
    slow_updates = replace(CPU, update_gb_s=0.1)
    long = work_of(meta_model("smollm2"), tokens=256, steps=4)
    assert choose(long, CPU).engine == "dense"
    assert choose(long, slow_updates).engine == "factored"


def test_no_steps_cost_no_division():
    choice = choose(work_of(meta_model("smollm2"), steps=0), CPU)
    assert all(ms > 0 for ms in choice.predicted_ms.values())
