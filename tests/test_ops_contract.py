import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.update_cases import adamw_step, backend_params, make_case, sgd_step
from ttt_fast import ops
from ttt_fast.ops import SCHEMAS
from ttt_fast.undo import UndoLog

backends = pytest.mark.parametrize("backend", backend_params())
needs_cpp = pytest.mark.parametrize("backend", backend_params()[1:])
IMPLEMENTATIONS = [
    pytest.param(name, *backend.values, marks=backend.marks)
    for name, schema in SCHEMAS.items()
    for backend in backend_params()
    if backend.values[0] in schema.backends
]


def arguments_of(name: str) -> tuple[tuple, dict]:
    """Positional and keyword arguments of one call of each op, without `backend`."""
    case = make_case([(5, 3), (), (0,), (70,)], [torch.float32, torch.bfloat16], n_states=2)
    undo = UndoLog(case.params)
    update = ([], [], torch.tensor(2.0), None, None, case.landed, undo.tensors, undo.offsets)
    shared = {"lr": 0.1, "weight_decay": 0.01, "maximize": False, "max_grad_norm": 1.0}
    shared |= {"rounding": "nearest", "seed": 0}
    if name == "sgd_":
        options = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "first_step": True}
        options |= {"decoupled_weight_decay": False}
        return (case.params, case.grads, case.states[0], *update), shared | options
    if name == "adamw_":
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step_index": 1}
        return (case.params, case.grads, *case.states, *update), shared | options
    if name == "copy_":
        return ([torch.zeros(3), torch.zeros(2, 2)], [torch.ones(3), torch.ones(2, 2)]), {}
    if name == "undo_restore_":
        return (case.params, undo.tensors, undo.offsets), {}
    if name == "gram_norm":
        return (torch.randn(2, 5, 3), torch.randn(2, 5, 4)), {}
    if name == "gram_norms":
        xs = [torch.randn(2, 5, 3), torch.randn(2, 5, 6)]
        return (xs, [torch.randn(2, 5, 4), torch.randn(2, 5, 1)]), {}
    if name == "delta_linear":
        a, d = torch.randn(2, 9, 3)[:, :6], torch.randn(2, 9, 4)[:, :6]
        factors = (torch.randn(4, 3), a, d, torch.randn(2, 6), torch.ones(2))
        return (torch.randn(2, 5, 3), *factors, torch.zeros(2, 7, 3)[:, :5]), {}
    if name == "rank_update_":
        factors = (torch.randn(6, 3).bfloat16(), torch.randn(6, 4).bfloat16(), torch.randn(6))
        options = {"scale": 0.5, "rounding": "stochastic", "seed": 0}
        return (torch.randn(4, 3).bfloat16(), *factors), options
    if name == "rank_sgd_":
        factors = [torch.randn(6, 3), torch.randn(0, 2)], [torch.randn(6, 4), torch.randn(0, 5)]
        params, buffers = ([torch.randn(4, 3), torch.randn(5, 2)] for _ in range(2))
        options = {k: v for k, v in shared.items() if k != "maximize"}
        options |= {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "first_step": False}
        scalars = torch.tensor(2.0), torch.tensor(0.0), case.landed
        return (params, *factors, buffers, *scalars), options | {"decoupled_weight_decay": False}
    if name == "rms_norm":
        return (torch.randn(2, 5, 7), torch.rand(2, 7)), {"eps": 1e-5, "round_first": True}
    if name == "rms_norm_backward":
        dy, x, rstd = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.rand(2, 5)
        return (dy, x, torch.rand(2, 7), rstd), {"round_first": True}
    if name == "linears":
        return (torch.randn(2, 5, 7), [torch.randn(3, 7), torch.randn(4, 7)]), {}
    if name == "linears_backward":
        return (
            [torch.randn(2, 5, 3), torch.randn(2, 5, 4)],
            [torch.randn(3, 7), torch.randn(4, 7)],
        ), {}
    if name == "glu":
        return (torch.randn(2, 5), torch.randn(2, 5)), {"activation": "gelu_tanh"}
    if name == "glu_backward":
        return (torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5)), {"activation": "silu"}
    if name == "rotary":
        x, angles = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 1, 5, 6)
        return (x, *angles), {"transposed": True}
    if name == "attention_backward":
        dy, q = torch.randn(2, 2, 3, 4, 8).transpose(2, 3)
        k, v = torch.randn(2, 2, 5, 2, 8).transpose(2, 3)
        mask = torch.rand(2, 1, 3, 5) < 0.5
        return (dy, q, k, v, mask), {"scale": 0.3, "causal": False}
    if name == "nll_":
        return (torch.randn(5, 7), torch.tensor([0, 6, -100, 3, 3])), {"ignore_index": -100}
    return (case.grads,), {}


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_opcheck(name, backend):
    args, kwargs = arguments_of(name)
    # Autograd is not what these ops are for: they run under no_grad and register no formula.
    torch.library.opcheck(
        getattr(torch.ops.ttt_fast, name).default, args, kwargs | {"backend": backend},
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip


@needs_cpp
def test_the_extension_has_the_ops_that_the_table_says(backend):
    namespace = getattr(torch.ops, f"ttt_fast_{backend}")
    assert {name: hasattr(namespace, name) for name in SCHEMAS} == {
        name: backend in schema.backends for name, schema in SCHEMAS.items()
    }


@pytest.mark.parametrize(
    ("name", "backend"), [p for p in IMPLEMENTATIONS if p.values[1] != "torch"]
)
def test_schema_of_the_extension_is_the_schema_less_backend(name, backend):
    ours = str(getattr(torch.ops.ttt_fast, name).default._schema)
    theirs = str(getattr(getattr(torch.ops, f"ttt_fast_{backend}"), name).default._schema)
    without = ours.replace(", *, str backend)", ")").replace(", str backend)", ")")
    assert theirs == without.replace("ttt_fast::", f"ttt_fast_{backend}::")


@backends
def test_compiles_without_a_graph_break(backend):
    def step(params, grads, buffers, saved):
        norm = ops.grad_norm(grads, backend=backend)
        ops.copy_(saved, params, backend=backend)
        ops.sgd_(
            params, grads, buffers, lr=0.1, momentum=0.9, first_step=True, grad_norm=norm,
            max_grad_norm=1.0, backend=backend,
        )  # fmt: skip
        return params[0] * 2, norm

    eager = make_case([(5, 3), (70,)], [torch.float32], n_states=1)
    compiled = eager.clone()
    saved = [torch.zeros_like(p) for p in eager.params]
    saved_compiled = copy.deepcopy(saved)
    expected = step(eager.params, eager.grads, eager.states[0], saved)
    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = function(compiled.params, compiled.grads, compiled.states[0], saved_compiled)
    compiled.assert_same(eager)
    for a, e in zip([*actual, *saved_compiled], [*expected, *saved], strict=True):
        assert torch.equal(a, e)


def test_ops_on_factors_compile_without_a_graph_break():
    def step(x, weight, a, d, beta, logits, targets):
        y = ops.delta_linear(x, weight, a, d, beta)
        losses = ops.nll_(logits, targets)
        ops.rank_update_(weight, a[0], d[0], beta[0], scale=0.5)
        grams = ops.gram_norm(x, y), ops.gram_norms([x, x], [y, y])
        return *grams, losses * 2, weight, logits

    shapes = [(2, 5, 3), (4, 3), (2, 6, 3), (2, 6, 4), (2, 6), (5, 7)]
    args = [torch.randn(shape) for shape in shapes] + [torch.tensor([0, 6, -100, 3, 3])]
    expected = step(*copy.deepcopy(args))
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(actual, expected)


@backends
@pytest.mark.parametrize("op", ["sgd_", "adamw_", "copy_", "undo_restore_"])
def test_autograd_sees_that_a_saved_tensor_was_overwritten(op, backend):
    case = make_case([(8,)], [torch.bfloat16], n_states=2)
    weight = case.params[0].requires_grad_()
    undo = UndoLog(case.params)
    loss = weight.square().sum()
    versions = [s[0]._version for s in case.states]
    if op == "sgd_":
        sgd_step(case, backend, lr=0.1, momentum=0.9, first_step=True)
        assert case.states[0][0]._version > versions[0]
    elif op == "adamw_":
        adamw_step(case, backend, lr=0.1, step_index=1)
        assert [s[0]._version > v for s, v in zip(case.states, versions, strict=True)] == [True] * 2
    elif op == "copy_":
        ops.copy_([weight], [torch.zeros(8, dtype=torch.bfloat16)], backend=backend)
    else:
        ops.undo_restore_([weight], undo, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("name", "backend"),
    [p for p in IMPLEMENTATIONS if p.values[0] in ("nll_", "rank_update_")],
)
def test_autograd_sees_that_a_single_tensor_was_overwritten(name, backend):
    (tensor, *rest), options = arguments_of(name)
    tensor.requires_grad_()
    loss = tensor.square().sum()
    with torch.no_grad():
        getattr(ops, name)(tensor, *rest, **options, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


REFUSALS = [
    ("gram_norm", (torch.ones(2, 3), torch.ones(1, 2, 3)), r"x has shape \(2, 3\); it must be"),
    (
        "gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 3, 3)),
        r"dy has shape \(1, 3, 3\); it must be \(B, M, out\) with B = 1, M = 2",
    ),
    (
        "gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 2, 3).double()),
        "dy is float64; it must be float32",
    ),
    (
        "gram_norm", (torch.ones(1, 2, 3).int(), torch.ones(1, 2, 3).int()),
        "int32 are not supported",
    ),
    ("gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 2, 3, device="meta")), "dy is on meta"),
    ("gram_norms", ([], []), "0 xs and 0 dys"),
    ("gram_norms", ([torch.ones(1, 2, 3)], [torch.ones(1, 2, 3)] * 2), "1 xs and 2 dys"),
    (
        "gram_norms", ([torch.ones(1, 2, 3), torch.ones(1, 4, 3)],) * 2,
        r"xs\[1\] has shape \(1, 4, 3\); it must be \(B, M, in\) with B = 1, M = 2",
    ),
    (
        "gram_norms", ([torch.ones(1, 2, 3), torch.ones(1, 2, 3).double()],) * 2,
        r"xs\[1\] is float64; it must be float32",
    ),
    (
        "gram_norms", ([torch.ones(1, 2, 3)], [torch.ones(1, 2, 3, device="meta")]),
        r"dys\[0\] is on meta",
    ),
    ("nll_", (torch.ones(2, 3, 4), torch.ones(2).long()), r"it must be \(M, V\)"),
    ("nll_", (torch.ones(2, 3), torch.ones(3).long()), r"targets has shape \(3,\); .* with M = 2"),
    ("nll_", (torch.ones(2, 3), torch.ones(2)), "targets is float32; it must be int64"),
    ("nll_", (torch.ones(2, 3).int(), torch.ones(2).long()), "int32 are not supported"),
    ("nll_", (torch.ones(2, 3), torch.ones(2, device="meta").long()), "targets is on meta"),
    ("nll_", (torch.ones(2, 0), torch.ones(2).long()), "no columns"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "args", "message"), REFUSALS)
def test_refusals(op, args, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)


# ops.py checks with names; the extension itself must at least never touch foreign memory.
DIRECT_CALLS = [
    ("copy_", ([torch.zeros(3)], [torch.zeros(4)]), "they must agree"),
    ("copy_", ([torch.zeros(3)], [torch.zeros(3).int()]), "differ in dtype"),
    ("copy_", ([torch.zeros(3, device="meta")], [torch.zeros(3)]), "not on the CPU"),
    ("checksum", ([torch.zeros(3, dtype=torch.complex128)],), "at most 8 are supported"),
    ("grad_norm", ([torch.zeros(3).int()],), "must be float32"),
    ("gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 3, 3)), r"x must be \(B, M, in\)"),
    ("gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 2, 3).double()), "of one dtype"),
    ("gram_norm", (torch.ones(1, 2, 3), torch.ones(1, 2, 3, device="meta")), "not on the CPU"),
    ("gram_norms", ([], []), "as many of both"),
    ("gram_norms", ([torch.ones(1, 2, 3)], []), "as many of both"),
    ("gram_norms", ([torch.ones(1, 2, 3), torch.ones(2, 2, 3)],) * 2, r"x must be \(B, M, in\)"),
    ("gram_norms", ([torch.ones(1, 2, 3), torch.ones(1, 2, 3).double()],) * 2, "of one dtype"),
    ("nll_", (torch.ones(2, 3, 4), torch.ones(2).long()), "logits must be a matrix"),
    ("nll_", (torch.ones(2, 3), torch.ones(3).long()), "targets must be an int64 tensor"),
    ("nll_", (torch.ones(2, 3), torch.ones(2)), "targets must be an int64 tensor"),
    ("nll_", (torch.ones(1, 3).expand(2, 3), torch.ones(2).long()), "expanded"),
]


@needs_cpp
@pytest.mark.parametrize(("op", "args", "message"), DIRECT_CALLS)
def test_direct_calls_are_checked_too(backend, op, args, message):
    options = {"ignore_index": 0} if op == "nll_" else {}
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.ttt_fast_cpp, op)(*args, **options)


def test_unknown_arguments_of_schema_do_not_hide():
    # The version counters are bumped by argument name: each name must exist in its schema.
    for name, schema in SCHEMAS.items():
        for argument in schema.mutated:
            marks = (f"!) {argument},", f"!)[] {argument},", f"!)? {argument},")
            assert any(mark in schema.arguments + "," for mark in marks), (name, argument)


def test_the_norm_of_several_devices_is_one_on_the_first():
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.ttt_fast.grad_norm.default:
                calls.append([grad.device.type for grad in args[0]])
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Count():
        grads = [torch.ones(3, device=device) for device in ("cuda", "cpu", "cuda")]
        norm = ops.grad_norm(grads)
    assert calls == [["cuda", "cuda"], ["cpu"]]
    assert norm.device.type == "cuda"
    assert norm.shape == ()
