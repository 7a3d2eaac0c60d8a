"""An adaptation in a file, and back on a model."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.adaptation_cases import CASES, IDS, STEPS, adapted_of, assert_near, logits_of, trainer_of
from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import Boom, unchanged
from ttt_fast import Adaptation, TTTTrainer
from ttt_fast.engines import deltas
from ttt_fast.factored_adaptation import FactoredAdaptation


@pytest.mark.parametrize(("family", "scope"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_a_file(tmp_path, family, scope, dtype):
    rows = prompt_ids(8, n_rows=2)
    model, adapted = adapted_of(family, dtype, rows, scope=scope, max_batch_tokens=8)
    path = tmp_path / "adapted.safetensors"
    adapted.rewind([3, 4])
    adapted.save(path)
    logits = logits_of(model, prompt_ids(6, n_rows=2))
    results = adapted.loss(), adapted.delta_norm(), adapted.grad_cosine(0, 1)
    state = adapted.state_dict(1)
    adapted.restore()
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapted.safetensors"]

    fresh = tiny_model(family, dtype, attn_implementation="sdpa")
    with unchanged(fresh):
        loaded = Adaptation.load(path, fresh)
        assert loaded.attached and loaded.at_step.tolist() == [3, 4]
        assert torch.equal(logits_of(fresh, prompt_ids(6, n_rows=2)), logits)
        for ours, theirs in zip(
            (loaded.loss(), loaded.delta_norm(), loaded.grad_cosine(0, 1)), results, strict=True
        ):
            assert torch.equal(ours, theirs)
        assert_near(loaded.state_dict(1), state, 0)
        for name in ("losses", "grad_norms", "steps", "update_landed"):
            assert torch.equal(getattr(loaded, name), getattr(adapted, name)), name
        assert loaded.config == adapted.config
        assert loaded.generate(max_new_tokens=3).shape[0] == 2
        # All steps are there, and it can be put away and saved again.
        with loaded.at(1):
            assert torch.allclose(loaded.loss().float(), loaded.losses[:, 1].float(), rtol=2e-2)
        loaded.detach()
        loaded.attach()
        loaded.save(tmp_path / "again.safetensors")
        assert torch.equal(logits_of(fresh, prompt_ids(6, n_rows=2)), logits)
        loaded.restore()
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("adapted", "again"))
    assert_near(first, second, 0)


def test_settings_that_are_functions_come_back_as_what_they_gave(tmp_path):
    model = tiny_model("llama", torch.float64)
    options = dict(
        lr=lambda step: 1e-2 / (step + 1),
        scope=lambda name, param: "mlp" in name or "norm" in name,
        layers=slice(1, None),
        param_groups=[{"params": re.compile("norm"), "weight_decay": 0.0}],
    )
    adapted = trainer_of(model, **options).adapt(IDS)
    logits = logits_of(model)
    adapted.save(tmp_path / "a")
    adapted.restore()
    with Adaptation.load(tmp_path / "a", model) as loaded:
        assert torch.equal(logits_of(model), logits)
        assert list(loaded.config.lr) == [1e-2 / (step + 1) for step in range(STEPS)]
        assert loaded.config.layers == "1:"
    # The settings can be used to do the same again.
    with TTTTrainer(model, loaded.config).adapt(IDS):
        assert torch.equal(logits_of(model), logits)


def test_another_models_weights_are_refused_by_name(tmp_path):
    model, adapted = adapted_of("llama", dtype=torch.float32, scope="ffn")
    path = tmp_path / "a"
    adapted.save(path)
    with pytest.raises(RuntimeError, match="model is held by"):
        Adaptation.load(path, model)
    adapted.restore()
    others = {
        "embed_tokens.weight has other values": tiny_model("llama", seed=1),
        r"embed_tokens.weight is bfloat16 \(101, 32\), not float32": tiny_model(
            "llama", torch.bfloat16
        ),
        "it has no parameter model.": tiny_model("gpt2"),
        "it has no parameter lm_head.weight": tiny_model("llama_tied"),
        r"gate_proj.weight is float32 \(40, 32\), not float32 \(48, 32\)": tiny_model(
            "llama", intermediate_size=40
        ),
    }
    with torch.no_grad():
        nudged = tiny_model("llama")
        nudged.lm_head.weight[-1, -1] += 1e-6
    # A weight outside the scope counts as well: the logits would be others.
    others["lm_head.weight has other values"] = nudged
    others["it has a parameter extra more"] = larger = tiny_model("llama")
    larger.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    for words, other in others.items():
        with (
            unchanged(other),
            pytest.raises(ValueError, match=f"made for another model: .*{words}"),
        ):
            Adaptation.load(path, other)
    Adaptation.load(path, tiny_model("llama")).restore()


def test_files_that_are_no_adaptations(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "text").write_text("hello")
    with unchanged(model), pytest.raises(ValueError, match="is not a safetensors file"):
        Adaptation.load(tmp_path / "text", model)
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with unchanged(model), pytest.raises(ValueError, match=r"write one with adapted.save\(path\)"):
        Adaptation.load(tmp_path / "other", model)
    save_file({}, tmp_path / "newer", metadata={"ttt_fast": json.dumps({"format": 99})})
    with unchanged(model), pytest.raises(ValueError, match="has format 99, this version reads 1"):
        Adaptation.load(tmp_path / "newer", model)
    with unchanged(model), pytest.raises(FileNotFoundError):
        Adaptation.load(tmp_path / "missing", model)


@pytest.mark.parametrize(
    ("kind", "name"), [(deltas.Trajectory, "__init__"), (FactoredAdaptation, "rewind")]
)
def test_a_load_that_fails_half_way_leaves_the_model_free(tmp_path, monkeypatch, kind, name):
    model, adapted = adapted_of()
    adapted.save(tmp_path / "a")
    adapted.restore()
    with unchanged(model):
        with monkeypatch.context() as patch, pytest.raises(Boom):
            patch.setattr(kind, name, lambda *a: (_ for _ in ()).throw(Boom))
            Adaptation.load(tmp_path / "a", model)
        Adaptation.load(tmp_path / "a", model).restore()


def test_text_and_an_objective_of_ones_own_after_loading(tmp_path):
    model, adapted = adapted_of()
    adapted.save(tmp_path / "a")
    adapted.restore()

    def objective(outputs, batch):
        return outputs.logits.sum((1, 2)) * 0 + 7

    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": IDS[0].tolist()}

    with Adaptation.load(tmp_path / "a", model, objective=objective, tokenizer=Tokenizer()) as a:
        assert a.loss("some text").item() == 7
    with Adaptation.load(tmp_path / "a", model) as a:
        assert a.loss().item() == a.loss(IDS).item() < a.losses[0, -1].item()
