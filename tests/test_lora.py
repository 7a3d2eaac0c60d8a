"""LoRA adapters of deltas, as peft reads them."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.adaptation_cases import IDS, adapted_of, exact_weight, logits_of, trainer_of
from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast.lora import LoraAdapter


def with_peft(model, path):
    """The model with an adapter that peft has read."""
    with warnings.catch_warnings():
        # Tied weights, biases that some modules lack, Conv1D: peft says what it does about them.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), path).eval()


LORA_CASES = [
    ("llama", "all"),
    ("llama_tied", "all"),
    ("qwen2", "attention"),
    ("qwen3", "all"),
    ("gpt2", "ffn"),
    ("gpt2", "query"),
    ("phi3", "query"),
    ("llama", "embedding"),
    ("opt", "attention"),
]


@pytest.mark.parametrize(("family", "scope"), LORA_CASES)
def test_peft_computes_the_same_at_full_rank(tmp_path, family, scope):
    model, adapted = adapted_of(family, torch.float64, scope=scope, **dict(weight_decay=0.0))
    adapter = adapted.to_lora(64, tmp_path / "lora")
    assert isinstance(adapter, LoraAdapter)
    expected = logits_of(model, IDS)
    adapted.restore()
    assert adapter.rank <= 32 and adapter.error < 1e-12 and max(adapter.errors.values()) < 1e-12
    loaded = with_peft(model, tmp_path / "lora")
    assert torch.allclose(logits_of(loaded, IDS), expected, atol=1e-6)
    assert not torch.allclose(logits_of(model, IDS), expected, atol=1e-3)
    with loaded.disable_adapter():
        assert torch.allclose(logits_of(loaded, IDS), logits_of(model, IDS), atol=1e-12)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    with warnings.catch_warnings():
        # peft 0.21 takes the biases of lora_B for matrices of a wrong shape here.
        warnings.simplefilter("ignore")
        ours = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert written.keys() == ours.keys()


def test_a_truncated_adapter_says_what_it_lost(tmp_path):
    model, adapted = adapted_of("llama", torch.float64, **dict(weight_decay=0.0))
    errors = []
    for rank in (1, 4, 16):
        adapter = adapted.to_lora(rank)
        assert adapter.rank == rank
        errors.append(adapter.error)
        state = adapted.state_dict()
        for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
            change = state[name] - model.state_dict()[name]
            s = torch.linalg.svdvals(change)
            best = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
            assert adapter.errors[name] == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert adapter.errors["model.norm.weight"] == 0.0
    assert errors[0] > errors[1] > errors[2] > 0
    expected = logits_of(model, IDS)
    adapted.restore()
    adapter.save(tmp_path)
    near = (logits_of(with_peft(model, tmp_path), IDS) - expected).norm()
    assert near < 0.2 * (logits_of(model, IDS) - expected).norm()


def test_an_adapter_of_one_of_several_deltas_at_an_earlier_step(tmp_path):
    model, adapted = adapted_of(
        "llama", torch.float64, prompt_ids(7, n_rows=2), **dict(weight_decay=0.0)
    )
    with pytest.raises(ValueError, match="to_lora: there are 2 deltas; say which"):
        adapted.to_lora(8)
    adapted.rewind(2)
    adapted.to_lora(64, tmp_path, delta=1)
    with adapted.weights_of(1):
        expected = logits_of(model)
    adapted.restore()
    assert torch.allclose(logits_of(with_peft(model, tmp_path)), expected, atol=1e-6)


def test_weight_decay_is_refused_or_dropped(tmp_path):
    model, adapted = adapted_of("llama", torch.float64, scope="ffn")
    with pytest.raises(ValueError, match=r"has scaled model\.layers\.0\.mlp.* decay='drop'"):
        adapted.to_lora(64)
    adapter = adapted.to_lora(64, decay="drop")
    name = "model.layers.0.mlp.up_proj.weight"
    factors = next(f for f in adapted._engine.factors if f.selection.name == name)
    drop = float(factors.track.coefficients.rho[0]) - 1
    base = model.state_dict()[name]
    change = (adapted.state_dict()[name] - base).norm()
    assert adapter.errors[name] == pytest.approx((-drop * base.norm() / change).item(), rel=1e-9)
    assert adapter.error > 0
    # At the start nothing has decayed, and nothing is lost.
    with adapted.at(0):
        assert adapted.to_lora(4).error == 0.0
    # Norms are kept whole, so their decay is no obstacle.
    with trainer_of(tiny_model("llama"), scope="norm").adapt(IDS) as norms:
        assert norms.to_lora(1).error < 1e-6


def test_what_no_adapter_can_hold_is_refused():
    with trainer_of(tiny_model("gemma3"), scope="embedding", weight_decay=0.0).adapt(IDS) as a:
        with pytest.raises(ValueError, match="is a Gemma3TextScaledWordEmbedding, which scales"):
            a.to_lora(4)
    with trainer_of(tiny_model("qwen2"), weight_decay=0.0).adapt(IDS) as adapted:
        with pytest.raises(ValueError, match="biases of linears and the embedding .* have both"):
            adapted.to_lora(4)
        for rank in (0, 1.5, True):
            with pytest.raises(ValueError, match="it must be an integer >= 1"):
                adapted.to_lora(rank)
        with pytest.raises(ValueError, match="decay='keep' is unknown"):
            adapted.to_lora(4, decay="keep")
    wrapped = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["up_proj"]))
    with trainer_of(wrapped, scope="lora", weight_decay=0.0).adapt(IDS) as adapted:
        with pytest.raises(ValueError, match="is a peft model already"):
            adapted.to_lora(4)


def test_rounding_of_norms_is_reported():
    model, adapted = adapted_of("llama", torch.bfloat16, scope="norm", lr=1e-3)
    errors = adapted.to_lora(1).errors
    name = "model.norm.weight"
    factors = next(f for f in adapted._engine.factors if f.selection.name == name)
    exact, base = exact_weight(factors), model.get_parameter(name).detach().double()
    lost = adapted.state_dict()[name].double() - exact
    assert errors[name] == pytest.approx((lost.norm() / (exact - base).norm()).item(), rel=1e-3)
    assert errors[name] > 0.1
