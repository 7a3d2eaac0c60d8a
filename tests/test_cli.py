"""The command line, on a tiny random model in a folder; one case on the real one."""

import io
import json
import os
import re
from dataclasses import fields, replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)

from ttt_fast import TTTConfig, TTTTrainer, audit, cli, doctor
from ttt_fast.arguments import build_parser
from ttt_fast.comparison import PHASES
from ttt_fast.naive import prompt_loss

WORDS = "the cat sat on a mat and dog ran to old red house by river".split()
PROMPT = "the old cat sat on a red mat by the river"
CHAT = "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def save_tokenizer(folder, chat: bool = False) -> int:
    words = ["<unk>", "<pad>", *WORDS]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.chat_template = CHAT if chat else None
    fast.save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("llama")
    size = save_tokenizer(path, chat=True)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **SHAPE)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def fused_folder(tmp_path_factory):
    """A tiny Phi-3: query, key and value in one projection, and no chat template."""
    path = tmp_path_factory.mktemp("phi3")
    size = save_tokenizer(path)
    torch.manual_seed(0)
    Phi3ForCausalLM(Phi3Config(vocab_size=size, **SHAPE)).save_pretrained(path)
    return str(path)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys, *arguments: object) -> dict:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # and nothing else is on stdout


SHORT = ("--steps", 3, "--lr", 0.1, "--max-new-tokens", 4)


def test_json_with_the_naive_loop(folder, capsys, tmp_path):
    plot = tmp_path / "loss.png"
    result = run_json(capsys, "adapt", folder, PROMPT, *SHORT, "--compare", "--plot", plot)
    ours, naive = result["ours"], result["naive"]
    assert result["prompt_tokens"] == len(PROMPT.split())
    assert result["config"]["steps"] == len(ours["losses"]) == len(ours["grad_norms"]) == 3
    assert ours["losses"] == pytest.approx(naive["losses"], rel=1e-4)
    assert ours["grad_norms"] == pytest.approx(naive["grad_norms"], rel=1e-4)
    assert ours["loss_after"] == pytest.approx(naive["loss_after"], rel=1e-4)
    assert result["loss_before"] == pytest.approx(ours["losses"][0], rel=1e-5)
    assert ours["loss_after"] < result["loss_before"]
    for one in (ours, naive):
        assert set(one["ms"]) == set(one["peak_bytes"]) == set(PHASES)
    assert set(result["ratio"]) == {*PHASES, "without_generate", "total"}
    assert result["weights"]["bitwise_equal"]
    assert re.fullmatch("[0-9a-f]{64}", result["weights"]["before"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_page_shows_everything(folder, capsys):
    code, out, err = run(capsys, "adapt", folder, PROMPT, *SHORT, "--compare")
    assert code == 0
    for part in ("answer before", "answer after", "loss before", "loss by step", "loss after",
                 "bitwise equal", "sha256", *PHASES):  # fmt: skip
        assert part in out, part
    assert "naive ms" in out
    assert "3/3" in err  # the progress bars


def test_without_compare_there_is_no_ratio(folder, capsys):
    result = run_json(capsys, "adapt", folder, PROMPT, *SHORT)
    assert "naive" not in result
    assert result["ratio"] is None


def test_adamw_compares(folder, capsys):
    result = run_json(
        capsys, "adapt", folder, PROMPT, *SHORT, "--compare", "--optimizer", "adamw",
        "--betas", 0.8, 0.95, "--weight-decay", 0.1, "--max-grad-norm", "none",
    )  # fmt: skip
    assert result["config"]["betas"] == [0.8, 0.95]
    assert result["config"]["max_grad_norm"] is None
    assert result["ours"]["losses"] == pytest.approx(result["naive"]["losses"], rel=1e-3)


def test_spans_of_a_prompt(folder, capsys):
    result = run_json(
        capsys, "adapt", folder, PROMPT, *SHORT, "--kv", "frozen", "--span-tokens", "2",
        "--spans", "2", "--scope", "query",
    )  # fmt: skip
    assert [result["config"][name] for name in ("kv", "span_tokens", "spans")] == ["frozen", 2, 2]
    assert result["weights"]["bitwise_equal"] and "prefill" in result["ours"]["ms"]


def test_every_setting_is_an_option():
    values = {bool: [], float: ["0.5"], int: ["7"], str: ["x"], type(None): ["7"]}
    kinds = {field.name: str(field.type) for field in fields(TTTConfig)}
    names = [name for name in kinds if name != "param_groups"]
    parser = build_parser()
    for name in names:
        default = getattr(TTTConfig(), name)
        given = ["0.5", "0.25"] if name == "betas" else values[type(default)]
        given = ["auto"] if kinds[name] == "bool | str" else given
        args = parser.parse_args(["adapt", "m", "p", "--" + name.replace("_", "-"), *given])
        assert hasattr(args, name)
        assert not any(hasattr(args, other) for other in names if other != name)
    assert names


def test_options_that_may_be_none():
    parser = build_parser()
    clip = ("adapt", "m", "p", "--max-grad-norm")
    assert parser.parse_args([*clip, "None"]).max_grad_norm is None
    assert parser.parse_args([*clip, "0.5"]).max_grad_norm == 0.5


def test_negative_options(folder, capsys):
    result = run_json(
        capsys, "adapt", folder, PROMPT, *SHORT, "--layers=-1:", "--scope", "ffn", "--nesterov"
    )
    assert result["selected_parameters"] == 3 * 16 * 24
    assert result["config"]["nesterov"] is True


@pytest.mark.parametrize("source", ["argument", "file", "stdin"])
def test_prompt_sources(folder, capsys, monkeypatch, tmp_path, source):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    arguments = {"argument": [PROMPT], "file": ["--prompt-file", file], "stdin": ["-"]}[source]
    assert run_json(capsys, "adapt", folder, *arguments, *SHORT)["prompt"] == PROMPT


OTHER = "a dog ran to the house"


@pytest.mark.parametrize("source", ["options", "lines"])
def test_several_prompts_adapt_independently(folder, capsys, tmp_path, source):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\n{OTHER}\n", encoding="utf-8")
    several = {
        "options": ["--prompt", PROMPT, "--prompt", OTHER],
        "lines": ["--prompt-lines", file],
    }
    result = run_json(capsys, "adapt", folder, *several[source], *SHORT)
    assert [one["prompt"] for one in result["prompts"]] == [PROMPT, OTHER]
    for one in result["prompts"]:
        alone = run_json(capsys, "adapt", folder, one["prompt"], *SHORT)
        assert one["prompt_tokens"] == alone["prompt_tokens"]
        assert one["losses"] == pytest.approx(alone["ours"]["losses"], rel=1e-5)
        assert one["loss_after"] == pytest.approx(alone["ours"]["loss_after"], rel=1e-5)
        assert one["answer"] == alone["ours"]["answer"]
    assert result["prompts"][0]["loss_after"] != result["prompts"][1]["loss_after"]
    assert result["weights"]["bitwise_equal"]


def test_page_of_several_prompts(folder, capsys):
    code, out, err = run(capsys, "adapt", folder, "--prompt", PROMPT, "--prompt", OTHER, *SHORT)
    assert code == 0, err
    assert re.search(rf"prompt 1 +{PROMPT}\nanswer .*\nloss +\d.* -> .*update landed", out)
    assert re.search(rf"prompt 2 +{OTHER}\nanswer ", out)
    assert "bitwise equal" in out


def test_one_prompt_as_an_option_is_the_usual_run(folder, capsys):
    result = run_json(capsys, "adapt", folder, "--prompt", PROMPT, *SHORT)
    assert (
        result["ours"]["losses"]
        == run_json(capsys, "adapt", folder, PROMPT, *SHORT)["ours"]["losses"]
    )


@pytest.mark.parametrize("engine", ["dense", "factored"])
def test_engine(folder, capsys, engine):
    result = run_json(capsys, "adapt", folder, PROMPT, *SHORT, "--engine", engine)
    assert result["config"]["engine"] == engine
    assert engine in result["engine"]
    assert result["weights"]["bitwise_equal"]


def test_chat_template(folder, capsys):
    result = run_json(capsys, "adapt", folder, PROMPT, *SHORT, "--chat")
    assert result["prompt_tokens"] == 1 + len(PROMPT.split())


def test_dtype(folder, capsys):
    result = run_json(capsys, "adapt", folder, PROMPT, *SHORT, "--dtype", "bfloat16")
    assert result["dtype"] == "bfloat16"
    assert result["weights"]["bitwise_equal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "no prompt"),
        (["{folder}", "the", "--prompt-file", "x"], "give one of them"),
        (["{folder}", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["{folder}", ""], "at least two tokens"),
        (["{folder}", "the"], "two tokens|nothing to predict"),
        (["{folder}", "the cat " * 40], "64"),
        (["{folder}", "the cat", "--prompt", "the dog"], "give one of them"),
        (["{folder}", "--prompt", "the cat", "--prompt-lines", "x"], "give one of them"),
        (["{folder}", "--prompt-lines", "nowhere.txt"], "nowhere.txt"),
        (["{folder}", "--prompt-lines", os.devnull], "no line has text"),
        (["{folder}", "--prompt", "the cat", "--prompt", "the dog", "--compare"], "takes one"),
        (["{folder}", "--prompt", "the cat", "--prompt", "a dog", "--plot", "x.png"], "takes one"),
        (["{folder}", "--prompt", "the cat", "--prompt", "the"], "nothing to predict"),
        (["{folder}", "the cat", "--engine", "lora"], "'dense'"),
        (["{folder}", "the cat", "--lr", "-1"], "lr"),
        (["{folder}", "the cat", "--lr", "fast"], "invalid float"),
        (["{folder}", "the cat", "--steps", "-1"], "steps"),
        (["{folder}", "the cat", "--scope", "nonsense"], "Modules of this model"),
        (["{folder}", "the cat", "--optimizer", "lion"], "adamw"),
        (["{folder}", "the cat", "--device", "toaster"], "toaster"),
        (["{folder}", "the cat", "--max-new-tokens", "0"], "at least 1"),
        (["{folder}", "the cat", "--plot", "nowhere/loss.png"], "there is no folder"),
        (["{folder}", "the cat", "--compare", "--dropout"], "naive loop"),
        (["{folder}", "the cat", "--compare", "--kv", "frozen"], "two objectives"),
        (["{fused}", "the cat", "--compare", "--scope", "query"], "whole parameters only"),
        (["{fused}", "the cat", "--chat"], "no chat template"),
        (["./no-such-folder", "the cat"], "no-such-folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(folder, fused_folder, capsys, arguments, message):
    arguments = [a.format(folder=folder, fused=fused_folder) for a in arguments]
    code, out, err = run(capsys, "adapt", *arguments)
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1, err


def test_divergence_is_one_line_and_exit_code_1(folder, capsys):
    code, out, err = run(
        capsys, "adapt", folder, PROMPT, "--steps", 5, "--lr", 1e30, "--max-grad-norm", "none"
    )
    assert code == 1
    assert out == ""
    assert "not finite" in err.splitlines()[-1]


def test_a_changed_weight_is_reported(folder, capsys, monkeypatch):
    hashes = iter(["a" * 64, "b" * 64])
    monkeypatch.setattr(cli, "parameter_hash", lambda model: next(hashes))
    code, out, _ = run(capsys, "adapt", folder, PROMPT, *SHORT)
    assert code == 1
    assert "THE WEIGHTS DIFFER" in out


def test_hash_sees_one_bit(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = cli.parameter_hash(model)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int16)[3] ^= 1
    assert cli.parameter_hash(model) != before


AUDIT = ("--prompt", PROMPT, "--steps", 2, "--lr", "1e-4", "1e-2")


def test_audit_begins_with_its_conclusion(folder, capsys, tmp_path):
    plot = tmp_path / "audit.png"
    code, out, err = run(capsys, "audit", folder, *AUDIT, "--plot", plot)
    assert code == 0, err
    assert re.match(r"At lr 1e-4 a stock bfloat16 loop applies \S+ % of its update: ", out)
    for part in ("fp32 delta", "stochastic", "float32 model", "2 steps", "momentum 0.9", "7e-4"):
        assert part in out, part
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "stochastic, lr 1e-2" in err  # the progress bar


def test_audit_json(folder, capsys):
    settings = ("--momentum", 0.5, "--max-grad-norm", "none", "--weight-decay", 0.1)
    result = run_json(
        capsys, "audit", folder, *AUDIT, *settings, "--scope", "ffn", "--modes", "torch", "delta"
    )
    assert [(row["lr"], row["mode"]) for row in result["rows"]] == [
        (1e-4, "torch"), (1e-4, "delta"), (1e-2, "torch"), (1e-2, "delta")
    ]  # fmt: skip
    conditions = result["conditions"]
    assert (conditions["model"], conditions["dtype"]) == (folder, "bfloat16")
    assert conditions["steps"] == 2
    assert (conditions["momentum"], conditions["max_grad_norm"]) == (0.5, None)
    assert (conditions["weight_decay"], conditions["scope"]) == (0.1, "ffn")
    assert result["restored"] is True


def test_audit_of_float32(folder, capsys):
    out = run(capsys, "audit", folder, *AUDIT, "--dtype", "float32")[1]
    assert out.startswith("In float32 everything lands")


def test_audit_reports_a_changed_weight(folder, capsys, monkeypatch):
    monkeypatch.setattr(audit.Snapshot, "verify", lambda self: False)
    code, out, _ = run(capsys, "audit", folder, *AUDIT, "--modes", "torch")
    assert code == 1
    assert "DID NOT COME BACK" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "no prompt"),
        (["{folder}", "--prompt", "the"], "at least two tokens"),
        (["{folder}", "--prompt", "the cat", "--lr", "0"], "> 0"),
        (["{folder}", "--prompt", "the cat", "--steps", "0"], "at least 1"),
        (["{folder}", "--prompt", "the cat", "--modes", "kahan"], "kahan"),
        (["{folder}", "--prompt", "the cat", "--rounding", "torch"], "unrecognized"),
        (["{folder}", "--prompt", "the cat", "--plot", "nowhere/x.png"], "there is no folder"),
        (["./no-such-folder", "--prompt", "the cat"], "no-such-folder"),
    ],
)
def test_audit_bad_input_is_one_line(folder, capsys, arguments, message):
    code, out, err = run(capsys, "audit", *[a.format(folder=folder) for a in arguments])
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1, err


def test_doctor_is_asked_for_what_was_given(folder, capsys, monkeypatch):
    asked = []

    def report(config, **arguments):
        asked.append((config.scope, arguments))
        return {"answer": 1}

    monkeypatch.setattr(doctor, "report", report)
    assert run_json(
        capsys, "doctor", folder, "--calibrate", "--deltas", 3, "--tokens", 8, "--dtype", "float32",
        "--scope", "ffn",
    ) == {"answer": 1}  # fmt: skip
    assert run_json(capsys, "doctor") == {"answer": 1}
    given = dict(model=folder, dtype="float32", tokens=8, deltas=3, calibrate=True)
    default = dict(model=None, dtype="auto", tokens=256, deltas=1, calibrate=False)
    assert asked == [("ffn", given), ("all", default)]


def test_doctor_names_versions_and_backends(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert f"torch          {torch.__version__}" in out
    assert re.search(r"backend torch +available", out)
    assert re.search(r"backend cpp", out)


def test_doctor_says_why_a_backend_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "available_backends", lambda: {"cpp": "the compiler was away"})
    assert "not available: the compiler was away" in run(capsys, "doctor")[1]


def test_doctor_memory(folder, capsys):
    options = ("--scope", "ffn", "--tokens", 8, "--optimizer", "adamw", "--dtype", "bfloat16")
    need = run_json(capsys, "doctor", folder, *options)["memory"]
    ffn = 2 * 3 * 16 * 24
    assert need["selected_parameters"] == ffn
    assert need["bytes"]["snapshot"] == 2 * ffn
    # Those of 8 tokens are kept as factors; of 64 they are smaller whole.
    assert need["bytes"]["gradients"] == 0
    longer = options[:3] + (64,) + options[4:]
    assert run_json(capsys, "doctor", folder, *longer)["memory"]["bytes"]["gradients"] == 2 * ffn
    assert need["bytes"]["optimizer"] == 2 * 4 * ffn
    assert need["bytes"]["delta"] == 0
    assert need["bytes"]["activations"] > 0
    assert need["total_bytes"] == sum(need["bytes"].values())
    assert "ffn" in run(capsys, "doctor", folder, *options)[1]


def test_doctor_activations_are_those_of_a_step_and_not_of_the_models_own_code(folder, capsys):
    options = ("--tokens", 32, "--dtype", "float32", "--engine", "dense", "--scope", "ffn")
    need = run_json(capsys, "doctor", folder, *options)["memory"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        prompt_loss(model, torch.zeros(1, 32, dtype=torch.int64))
    stock = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in weights)
    assert 0 < need["bytes"]["activations"] < 0.7 * stock
    # They are what a budget is held against, to the byte.
    config = TTTConfig(steps=need["steps"], engine="dense", scope="ffn", checkpointing=False)
    enough = need["total_bytes"]
    ids = torch.zeros(1, 32, dtype=torch.int64)
    TTTTrainer(model, replace(config, memory_budget=enough)).adapt(ids).restore()
    with pytest.raises(ValueError, match="too small"):
        TTTTrainer(model, replace(config, memory_budget=enough - 1)).adapt(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such-folder"], "no-such-folder"),
        (["{folder}", "--scope", "nonsense"], "Modules of this model"),
        (["{folder}", "--tokens", "1"], "at least 2"),
        (["{folder}", "--deltas", "0"], "at least 1"),
        (["{folder}", "--lr", "nan"], "lr"),
    ],
)
def test_doctor_bad_input_is_one_line(folder, capsys, arguments, message):
    code, out, err = run(capsys, "doctor", *[a.format(folder=folder) for a in arguments])
    assert code == 2
    assert out == ""
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.real_model
def test_demo_model(capsys):
    result = run_json(
        capsys, "adapt", "demo", "--steps", 2, "--max-new-tokens", 2, "--compare", "--scope", "ffn"
    )
    assert result["prompt"] == cli.DEFAULT_PROMPT
    assert result["ours"]["losses"] == pytest.approx(result["naive"]["losses"], rel=1e-3)
    assert result["ours"]["loss_after"] < result["loss_before"]
    assert result["weights"]["bitwise_equal"]


@pytest.mark.real_model
def test_audit_of_the_demo_model(capsys):
    result = run_json(
        capsys, "audit", "demo", "--steps", 2, "--lr", "1e-5", "--scope", "ffn", "--layers=-2:",
        "--modes", "torch", "stochastic",
    )  # fmt: skip
    landed = {row["mode"]: row["update_landed"] for row in result["rows"]}
    assert landed["torch"] < 0.1 < landed["stochastic"]
    assert result["restored"]
