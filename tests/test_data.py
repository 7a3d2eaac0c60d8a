"""Real prompts from a folder of evaluation files, where one is named by TTT_FAST_DATA."""

import json

import pytest
import torch

from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.naive import naive_adapt

pytestmark = [pytest.mark.data, pytest.mark.real_model]
OPTIONS = dict(steps=2, lr=1e-3, momentum=0.9, max_grad_norm=10.0)


@pytest.mark.parametrize("name, field", [("memo_trap", "prompt"), ("gsm_symbolic_p2", "question")])
def test_losses_are_the_naive_loops_and_the_weights_come_back(demo_model, data_dir, name, field):
    model, tokenizer = demo_model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines = (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    trainer = TTTTrainer(model, TTTConfig(**OPTIONS), tokenizer=tokenizer)
    for line in lines[:2]:
        text = json.loads(line)[field]
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        expected = naive_adapt(model, ids, **OPTIONS)
        expected.restore()
        with trainer.adapt(text) as adapted:
            torch.testing.assert_close(adapted.losses[0], expected.losses, rtol=1e-5, atol=1e-5)
            adapted_weights = adapted.state_dict()
            assert any(not torch.equal(v, before[k]) for k, v in adapted_weights.items())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
