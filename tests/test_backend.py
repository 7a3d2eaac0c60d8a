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


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available"),
    [
        ("cpu", "auto", "auto", BOTH),
        ("cpu", "torch", "auto", BOTH),
        ("cpu", "auto", "torch", BOTH),
        # The variable is a preference: it says nothing to an op that lacks that backend.
        ("cpu", "auto", "cpp", BOTH),
        ("cpu", "auto", "cpp", NO_CPP),
        ("cuda", "auto", "cpp", BOTH),
    ],
)
def test_choice_for_an_op_without_cpp(device_type, requested, override, available):
    chosen = resolve_backend(device_type, requested, available, override, ("torch",))
    assert chosen == "torch"


def test_refusals_for_an_op_without_cpp():
    message = "product: backend='cpp' was asked for but the op exists only in 'torch'"
    with pytest.raises(ValueError, match=message):
        resolve_backend("cpu", "cpp", BOTH, "auto", ("torch",), "product")
    with pytest.raises(ValueError, match="TTT_FAST_BACKEND='fast' is unknown"):
        resolve_backend("cpu", "auto", BOTH, "fast", ("torch",))


def test_a_setting_for_a_run_asks_each_op_for_what_it_has():
    for name, schema in ops.SCHEMAS.items():
        assert schema.backends[0] == "torch"
        assert ops.backend_for(name, "cpp") == ("cpp" if "cpp" in schema.backends else "auto")
        for same in ("auto", "torch", "nonsense"):
            assert ops.backend_for(name, same) == same


def test_a_product_under_each_way_to_prefer_cpp(monkeypatch):
    """rank_update_ exists in torch only; a run that is set to C++ uses it all the same."""
    factors = torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)

    def updated(**options):
        weight = torch.ones(4, 3)
        ops.rank_update_(weight, *factors, **options)
        return weight

    with pytest.raises(ValueError, match="rank_update_: backend='cpp' .* only in 'torch'"):
        updated(backend="cpp")
    chosen = ops.backend_for("rank_update_", "cpp")
    assert chosen == "auto"
    expected = torch.full((4, 3), 3.0)
    assert torch.equal(updated(backend=chosen), expected)
    monkeypatch.setenv("TTT_FAST_BACKEND", "cpp")
    assert torch.equal(updated(), expected)
    assert torch.equal(updated(backend=chosen), expected)


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
