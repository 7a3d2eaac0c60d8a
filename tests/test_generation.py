"""What an adaptation of the dense engine continues its prompts with."""

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids, twin
from tests.trainer_cases import GENERATE, IDS, padded, trainer_of
from ttt_fast import Batch


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma3", "opt"])
def test_generate_is_hugging_faces_on_the_adapted_weights(family):
    model = tiny_model(family)
    merged, question = twin(model), prompt_ids(5, seed=4)
    trainer_of(merged, lr=0.3).adapt(IDS).merge()
    unadapted = model.generate(IDS, **GENERATE)
    with trainer_of(model, lr=0.3).adapt(IDS) as adapted:
        for ids in (IDS, question):
            expected = merged.eval().generate(ids, **GENERATE)
            assert torch.equal(adapted.generate(ids, **GENERATE), expected)
        continued = adapted.generate(**GENERATE)
        assert torch.equal(continued, merged.generate(IDS, **GENERATE))
        assert torch.equal(model.generate(IDS, **GENERATE), continued)
    assert not torch.equal(continued, unadapted)
    assert torch.equal(model.generate(IDS, **GENERATE), unadapted)


def test_each_delta_continues_its_own_row():
    model = tiny_model("llama")
    prompts = [prompt_ids(n, seed=n)[0] for n in (5, 9)]
    trainer = trainer_of(model, lr=0.3)
    alone = []
    for prompt in prompts:
        with trainer.adapt(prompt) as adapted:
            alone.append(adapted.generate(**GENERATE)[0])
    with trainer.adapt(prompts, deltas="independent") as adapted:
        together = adapted.generate(**GENERATE)
        # The shorter prompt is padded on the left, where generation wants it.
        assert torch.equal(together[0, -6:], alone[0][-6:])
        assert torch.equal(together[1], alone[1])
        given = adapted.generate([p.tolist() for p in prompts], **GENERATE)
        assert torch.equal(given, together)
        with pytest.raises(ValueError, match="got 3 rows for 2 deltas"):
            adapted.generate(prompt_ids(5, n_rows=3), **GENERATE)
        with pytest.raises(ValueError, match="got 1 rows for 2 deltas"):
            adapted.loss(prompt_ids(5))
        with pytest.raises(ValueError, match="return_dict_in_generate"):
            adapted.generate(return_dict_in_generate=True, **GENERATE)
        assert torch.equal(adapted.generate(**GENERATE), together)


def test_several_sequences_and_beams():
    model = tiny_model("llama")
    rows = prompt_ids(6, n_rows=2)
    with trainer_of(model, lr=0.3).adapt(rows, deltas="independent") as adapted:
        beams = adapted.generate(max_new_tokens=4, num_beams=3, num_return_sequences=2)
        assert beams.shape[0] == 4
        assert torch.equal(beams[:, :6], rows.repeat_interleave(2, 0))
        for delta in range(2):
            with adapted.weights_of(delta):
                row = rows[delta : delta + 1]
                own = model.generate(
                    row, attention_mask=torch.ones_like(row),
                    max_new_tokens=4, num_beams=3, num_return_sequences=2,
                )  # fmt: skip
            assert torch.equal(beams[2 * delta : 2 * delta + 2, : own.shape[1]], own)


def test_generate_of_a_padded_prompt_drops_the_padding():
    model = tiny_model("gpt2")
    ids, mask = padded(IDS, 0, 3)
    with trainer_of(model, lr=0.3).adapt(ids, attention_mask=mask) as adapted:
        assert torch.equal(adapted.generate(**GENERATE), adapted.generate(IDS, **GENERATE))
        left, left_mask = padded(IDS, 3, 0)
        out = adapted.generate(left, attention_mask=left_mask, **GENERATE)
        assert torch.equal(out[:, -6:], adapted.generate(**GENERATE)[:, -6:])


def test_generation_without_dropout_in_a_model_that_trains():
    model = tiny_model("gpt2", resid_pdrop=0.5)
    with trainer_of(model).adapt(IDS) as adapted:
        expected = adapted.generate(**GENERATE)
        model.train()
        assert torch.equal(adapted.generate(**GENERATE), expected)
        assert all(module.training for module in model.modules())


def test_a_session_of_ones_own_has_no_prompt_to_continue():
    model = tiny_model("llama")
    session = trainer_of(model).begin()
    session.step(Batch(IDS))
    with session.end() as adapted:
        with pytest.raises(ValueError, match="no prompt to continue"):
            adapted.generate(**GENERATE)
        with pytest.raises(ValueError, match="no prompt of its own"):
            adapted.loss()
        assert adapted.generate(IDS, **GENERATE).shape == (1, 13)
