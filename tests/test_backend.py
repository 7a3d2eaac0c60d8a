import pytest
import torch

from ttt_fast import backend as backend_module
from ttt_fast import ops
from ttt_fast.backend import available_backends, resolve_backend

BOTH = {"torch": "ok", "cpp": "ok"}
NO_CPP = {"torch": "ok", "cpp": "the C++ extension is not built"}


def test_the_extension_is_built_and_loads():
    # Tests of the C++ backend are skipped without it; this one is what notices.
    assert available_backends() == BOTH


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available", "chosen"),
    [
        ("cpu", "auto", "auto", BOTH, "cpp"),
        ("cpu", "auto", "auto", NO_CPP, "torch"),
        ("cpu", "torch", "auto", BOTH, "torch"),
        ("cpu", "cpp", "auto", BOTH, "cpp"),
        ("cpu", "auto", "torch", BOTH, "torch"),
        ("cpu", "cpp", "torch", BOTH, "cpp"),
        ("cuda", "auto", "auto", BOTH, "torch"),
        ("mps", "auto", "auto", BOTH, "torch"),
        ("meta", "auto", "auto", NO_CPP, "torch"),
    ],
)
def test_choice(device_type, requested, override, available, chosen):
    assert resolve_backend(device_type, requested, available, override) == chosen


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available", "message"),
    [
        ("cpu", "cuda", "auto", BOTH, "backend='cuda' is unknown"),
        ("cpu", "auto", "fast", BOTH, "TTT_FAST_BACKEND='fast' is unknown"),
        ("cpu", "cpp", "auto", NO_CPP, "asked for but the C\\+\\+ extension is not built"),
        ("cpu", "auto", "cpp", NO_CPP, "TTT_FAST_BACKEND='cpp' was asked for"),
        ("cuda", "cpp", "auto", BOTH, "runs on cpu, but the tensors are on cuda"),
        ("cuda", "auto", "cpp", BOTH, "TTT_FAST_BACKEND='cpp' runs on cpu"),
    ],
)
def test_refusal(device_type, requested, override, available, message):
    with pytest.raises(ValueError, match=message):
        resolve_backend(device_type, requested, available, override)


def test_the_environment_variable_is_read(monkeypatch):
    monkeypatch.setenv("TTT_FAST_BACKEND", "torch")
    assert resolve_backend("cpu", available=BOTH) == "torch"
    monkeypatch.setenv("TTT_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        ops.grad_norm([torch.ones(3)])


def test_an_explicit_request_never_falls_back(monkeypatch):
    monkeypatch.setattr(backend_module, "_EXTENSION_STATUS", "broken on purpose")
    assert ops.grad_norm([torch.ones(4)]).item() == 2.0
    with pytest.raises(ValueError, match="broken on purpose"):
        ops.grad_norm([torch.ones(4)], backend="cpp")
