import inspect
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ttt_fast import backend as backend_module
from ttt_fast import cuda_ops, dispatch, ops, reference
from ttt_fast.backend import BACKENDS, available_backends, backends_on, resolve_backend
from ttt_fast.snapshot import Snapshot

ALL = dict.fromkeys(BACKENDS, "ok")
NO_CPP = ALL | {"cpp": "the C++ extension is not built"}
NO_GPU = ALL | dict.fromkeys(("triton", "cuda"), "there is no CUDA device")
NO_TRITON = ALL | {"triton": "triton is not installed"}
ONLY_TORCH = NO_CPP | NO_TRITON | {"cuda": "the extension was built without CUDA"}


def test_the_extension_is_built_and_loads():
    # Tests of the C++ backend are skipped without it; this one is what notices.
    assert available_backends()["cpp"] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_each_backend_says_why_it_is_not_there(monkeypatch):
    available = available_backends()
    assert list(available) == list(BACKENDS)
    assert available["torch"] == "ok"
    no_device = "there is no CUDA device"
    assert available["triton"] in (no_device, "triton is not installed (pip install triton)")
    assert available["cuda"] == no_device or "built without CUDA" in available["cuda"]
    monkeypatch.setattr(backend_module, "_KNOWN", {})
    monkeypatch.setattr(backend_module.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in available_backends()["triton"]


def test_triton_is_not_imported_before_it_is_used():
    code = "import sys, ttt_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_launch_finds_the_device_of_its_tensors_current(monkeypatch):
    # Triton launches on the current device, wherever the tensors are.
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: entered.append(d) or nullcontext())
    launch = dispatch.on_its_device(lambda *args, **options: (args, options))
    with FakeTensorMode():
        second, host = torch.ones(3, device="cuda:1"), torch.ones(3)
    for first in (second, [second, second]):
        assert launch(first, 5, seed=1) == ((first, 5), {"seed": 1})
    assert entered == [torch.device("cuda:1")] * 2
    for first in (host, [host], []):
        launch(first)
    assert len(entered) == 2


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available", "chosen"),
    [
        ("cpu", "auto", "auto", ALL, "cpp"),
        ("cpu", "auto", "auto", NO_CPP, "torch"),
        ("cpu", "torch", "auto", ALL, "torch"),
        ("cpu", "cpp", "auto", ALL, "cpp"),
        ("cpu", "auto", "torch", ALL, "torch"),
        ("cpu", "cpp", "torch", ALL, "cpp"),
        ("cuda", "auto", "auto", ALL, "triton"),
        ("cuda", "auto", "auto", NO_TRITON, "cuda"),
        ("cuda", "auto", "auto", ONLY_TORCH, "torch"),
        ("cuda", "auto", "cuda", ALL, "cuda"),
        ("cuda", "cuda", "torch", ALL, "cuda"),
        ("cuda", "triton", "auto", ALL, "triton"),
        ("mps", "auto", "auto", ALL, "torch"),
        ("meta", "auto", "auto", NO_CPP, "torch"),
    ],
)
def test_choice(device_type, requested, override, available, chosen):
    assert resolve_backend(device_type, requested, available, override) == chosen


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available", "message"),
    [
        ("cpu", "metal", "auto", ALL, "backend='metal' is unknown; use one of 'auto', 'torch', "),
        ("cpu", "auto", "fast", ALL, "TTT_FAST_BACKEND='fast' is unknown"),
        ("cpu", "cpp", "auto", NO_CPP, "asked for but the C\\+\\+ extension is not built"),
        ("cpu", "auto", "cpp", NO_CPP, "TTT_FAST_BACKEND='cpp' was asked for"),
        ("cuda", "cpp", "auto", ALL, "runs on cpu, but the tensors are on cuda"),
        ("cuda", "auto", "cpp", ALL, "TTT_FAST_BACKEND='cpp' runs on cpu"),
        ("cuda", "triton", "auto", NO_TRITON, "asked for but triton is not installed"),
        ("cuda", "cuda", "auto", ONLY_TORCH, "asked for but the extension was built without CUDA"),
        ("cpu", "triton", "auto", NO_GPU, "asked for but there is no CUDA device"),
        ("cpu", "triton", "auto", ALL, "'triton' runs on cuda, but the tensors are on cpu"),
        ("cpu", "cuda", "auto", ALL, "'cuda' runs on cuda, but the tensors are on cpu"),
        ("mps", "triton", "auto", ALL, "runs on cuda, but the tensors are on mps"),
    ],
)
def test_refusal(device_type, requested, override, available, message):
    with pytest.raises(ValueError, match=message):
        resolve_backend(device_type, requested, available, override, interpreted=False)


def test_only_the_interpreter_brings_triton_to_the_cpu():
    assert backends_on("cpu", interpreted=False) == ("torch", "cpp")
    assert backends_on("cpu", interpreted=True) == ("torch", "cpp", "triton")
    assert backends_on("cuda", interpreted=False) == ("torch", "triton", "cuda")
    assert backends_on("mps", interpreted=True) == ("torch",)
    assert resolve_backend("cpu", "triton", ALL, "auto", interpreted=True) == "triton"
    # It is for tests: nobody gets it without asking.
    assert resolve_backend("cpu", "auto", ALL, "auto", interpreted=True) == "cpp"


@pytest.mark.parametrize(
    ("device_type", "requested", "override", "available", "implemented", "chosen"),
    [
        ("cpu", "auto", "auto", ALL, ("torch", "triton"), "torch"),
        ("cpu", "torch", "auto", ALL, ("torch", "triton"), "torch"),
        ("cpu", "auto", "torch", ALL, ("torch", "triton"), "torch"),
        # The variable is a preference: it says nothing to an op that lacks that backend.
        ("cpu", "auto", "cpp", ALL, ("torch", "triton"), "torch"),
        ("cpu", "auto", "cpp", NO_CPP, ("torch", "triton"), "torch"),
        ("cuda", "auto", "cpp", ALL, ("torch", "triton"), "triton"),
        ("cuda", "auto", "cuda", ALL, ("torch", "triton"), "triton"),
        ("cuda", "auto", "auto", ALL, ("torch", "cpp"), "torch"),
        ("cuda", "auto", "auto", ALL, ("torch", "cpp", "cuda"), "cuda"),
    ],
)
def test_choice_for_an_op_that_lacks_a_backend(
    device_type, requested, override, available, implemented, chosen
):
    assert resolve_backend(device_type, requested, available, override, implemented) == chosen


def test_refusals_for_an_op_that_lacks_a_backend():
    message = "product: backend='cpp' was asked for but the op exists only in 'torch'"
    with pytest.raises(ValueError, match=message):
        resolve_backend("cpu", "cpp", ALL, "auto", ("torch",), "product")
    with pytest.raises(ValueError, match="TTT_FAST_BACKEND='fast' is unknown"):
        resolve_backend("cpu", "auto", ALL, "fast", ("torch",))


def test_a_setting_for_a_run_asks_each_op_for_what_it_has():
    for name, schema in ops.SCHEMAS.items():
        assert schema.backends[0] == "torch"
        for backend in BACKENDS:
            asked = backend if backend in schema.backends else "auto"
            assert ops.backend_for(name, backend) == asked
        for same in ("auto", "torch", "nonsense"):
            assert ops.backend_for(name, same) == same


def test_a_setting_for_a_run_says_nothing_of_tensors_elsewhere():
    assert ops.backend_for("copy_", "triton", "cuda") == "triton"
    assert ops.backend_for("copy_", "triton", "cuda", "meta") == "auto"
    assert ops.backend_for("copy_", "cpp", "cpu") == "cpp"
    assert ops.backend_for("copy_", "cpp", "cuda", "cpu") == "auto"
    assert ops.backend_for("copy_", "torch", "cuda", "cpu") == "torch"


def test_a_snapshot_takes_its_setting_for_the_tensors_that_it_is_for():
    weight = torch.ones(3)
    snapshot = Snapshot([weight], backend="cuda")
    weight.zero_()
    snapshot.restore()
    assert weight.tolist() == [1.0] * 3


def test_the_cuda_ops_are_those_that_the_table_says():
    said = [name for name, schema in ops.SCHEMAS.items() if "cuda" in schema.backends]
    assert sorted(said) == sorted(cuda_ops.OPS)
    for name in cuda_ops.OPS:
        given = list(inspect.signature(getattr(cuda_ops, name)).parameters)
        wanted = list(inspect.signature(getattr(reference, name)).parameters)
        assert given == wanted or given[-1] == "options" and given[:-1] == wanted[: len(given) - 1]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_a_backend_refuses_to_copy_between_devices(backend):
    here, there = torch.ones(3), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match="one device, but the tensors are on cpu and meta"):
        ops.copy_([there], [here], backend=backend)
    ops.copy_([there], [here], backend=ops.backend_for("copy_", backend, "meta", "cpu"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_without_tensors_is_wrong_for_no_backend(backend):
    assert ops.grad_norm([], backend=ops.backend_for("grad_norm", backend)).item() == 0.0
    ops.copy_([], [], backend=ops.backend_for("copy_", backend))
    with pytest.raises(ValueError, match="backend='metal' is unknown"):
        ops.copy_([], [], backend="metal")


def test_a_product_under_each_way_to_prefer_cpp(monkeypatch):
    """rank_update_ has no C++; a run that is set to C++ uses it all the same."""
    factors = torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)

    def updated(**options):
        weight = torch.ones(4, 3)
        ops.rank_update_(weight, *factors, **options)
        return weight

    with pytest.raises(ValueError, match="rank_update_: backend='cpp' .* only in 'torch', "):
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
    assert resolve_backend("cpu", available=ALL) == "torch"
    monkeypatch.setenv("TTT_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        ops.grad_norm([torch.ones(3)])


def test_an_explicit_request_never_falls_back(monkeypatch):
    monkeypatch.setattr(backend_module, "_EXTENSION_STATUS", "broken on purpose")
    assert ops.grad_norm([torch.ones(4)]).item() == 2.0
    with pytest.raises(ValueError, match="broken on purpose"):
        ops.grad_norm([torch.ones(4)], backend="cpp")


def test_a_setting_for_a_run_means_what_each_op_has_on_its_tensors():
    for setting in ("cuda", "triton"):
        assert ops.implementation("gram_norm", "cpu", setting) is ops.implementation(
            "gram_norm", "cpu"
        )
    assert ops.implementation("gram_norm", "cpu", "torch") is reference.gram_norm
