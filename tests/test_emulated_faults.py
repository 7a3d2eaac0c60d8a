"""Would the emulated kernels show a fault? Each of these, put into a source, must be caught.

Orders of threads show races, the emulation's own checks show barriers that not all threads reach,
the sanitizers show accesses outside of a tensor and packs that are not aligned.
"""

import re
from collections.abc import Callable

import pytest
import torch

from tests.csrc import emulated
from tests.csrc.emulated import Edit
from tests.test_emulated_update import undo_case, update
from tests.update_cases import bits, make_case
from ttt_fast import cuda_ops, reference
from ttt_fast.undo import UndoLog


def norm() -> bool:
    grads = make_case([(3000,), (50,)], [torch.float32]).grads
    return torch.isclose(cuda_ops.grad_norm(grads), reference.grad_norm(grads), rtol=1e-6).item()


def gram() -> bool:
    x, dy = torch.randn(1, 40, 150), torch.randn(1, 40, 70)
    norms = cuda_ops.gram_norm(x, dy)
    return torch.isclose(norms, reference.gram_norm(x, dy), rtol=1e-5).item()


def sgd() -> bool:
    case = make_case([(2500,), (101,)], [torch.bfloat16], n_states=1)
    expected = case.clone()
    for module, tensors in ((cuda_ops, case), (reference, expected)):
        update(module, tensors, 1, momentum=0.9, rounding="stochastic")
    pairs = zip(case.params, expected.params, strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def undo() -> bool:
    case, steps = undo_case(torch.bfloat16)
    before = [param.clone() for param in case.params]
    log = UndoLog(case.params)
    log.tensors[5].fill_(0x5555)  # not what an earlier log left in this memory
    for step, case.grads in enumerate(steps):
        update(cuda_ops, case, step, log, lr=0.5)
    cuda_ops.undo_restore_(case.params, log.tensors, log.offsets)
    return all(torch.equal(bits(case.params[i]), bits(before[i])) for i in (0, 2, 4))


def copy() -> bool:
    srcs = [torch.arange(10001), torch.arange(77)]
    dsts = [torch.zeros_like(src) for src in srcs]
    cuda_ops.copy_(dsts, srcs)
    return all(torch.equal(dst, src) for dst, src in zip(dsts, srcs, strict=True))


def shifted() -> bool:
    case = make_case([(4001,)], [torch.bfloat16], n_states=1)
    for tensors in (case.params, case.grads, case.states[0]):
        tensors[0] = tensors[0][1:]
    update(cuda_ops, case, 1, momentum=0.9)
    return True


SCENARIOS = {f.__name__: f for f in (norm, gram, sgd, undo, copy, shifted)}
RACE = "wrong result"
FAULTS = {
    "barrier missing in a sum": (
        norm, RACE,
        Edit("cuda/reduce.cuh", "/ kWarp] = value;\n  __syncthreads();", "/ kWarp] = value;"),
    ),
    "barrier missing before shared memory is read": (
        gram, RACE,
        Edit("cuda/gram_norm.cu", "stage.right);\n    __syncthreads();", "stage.right);"),
    ),
    "barrier missing before shared memory is written again": (
        gram, RACE,
        Edit(
            "cuda/gram_norm.cu", "    __syncthreads();\n  }\n  // The warps", "  }\n  // The warps"
        ),
    ),
    "barrier in a branch": (
        undo, "a thread exited while others wait|threads wait at different barriers|deadlock",
        Edit("cuda/update.cuh", "if (undo != nullptr) {", "if (undo != nullptr && some) {"),
    ),
    "half of a warp in the mask": (
        norm, "lane outside its mask|a mask that leaves it out",
        Edit("cuda/reduce.cuh", "0xffffffffu", "0x0000ffffu"),
    ),
    "threads without work leave before the sum": (
        norm, "lanes that have exited|exited while others",
        Edit(
            "cuda/grad_norm.cu", "  double sum = 0;\n",
            "  if (thread >= numel) return;\n  double sum = 0;\n",
        ),
    ),
    "oldest entry without an atomic operation": (
        undo, RACE,
        Edit(
            "cuda/undo_restore.cu", "atomicMin(&oldest[slot], uint32_t(k))",
            "oldest[slot] = uint32_t(k)",
        ),
    ),
    "pages that nobody completes": (
        undo, RACE, Edit("cuda/update.cu", "if (state == kLogged) {", "if (state == kNotLogged) {"),
    ),
    "random bits of the chunk instead of the tensor": (
        sgd, RACE, Edit("cuda/update.cuh", "index_ + uint64_t(i + k)", "uint64_t(i)"),
    ),
    "last pack left out": (
        copy, RACE, Edit("cuda/copy.cu", "for (; pack < packs;", "for (; pack + 1 < packs;"),
    ),
}  # fmt: skip
# What only the sanitizers see, and what they say.
UNSAFE = {
    "one element too many": (
        "copy", "heap-buffer-overflow", Edit("cuda/copy.cu", "i < numel", "i <= numel")
    ),
    "packs at any address": (
        "shifted", "misaligned address",
        Edit("cuda/update.cuh", "call_.table.aligned ?", "numel > 0 ?"),
    ),
}  # fmt: skip


def outcome(scenario: Callable[[], bool], edit: Edit | None) -> str:
    """What a scenario shows first, run in every order: an error, a wrong result, or nothing."""
    for order in emulated.ORDERS:
        torch.manual_seed(0)
        try:
            with emulated.running(edit, order):
                if not scenario():
                    return RACE
        except RuntimeError as error:
            return str(error)
    return "right result"


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_without_a_fault_nothing_is_found(scenario):
    assert outcome(scenario, None) == "right result"


@pytest.mark.parametrize(("scenario", "expected", "edit"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_caught(scenario, expected, edit):
    assert re.search(expected, outcome(scenario, edit))


def test_a_fault_must_apply():
    with pytest.raises(ValueError, match="0 times"):
        emulated.load(Edit("cuda/copy.cu", "what is not there", ""))


# One of each kernel, in every dtype; the whole files take minutes.
SANITIZED = "multiple_of_16 or strided or what_the_reference or agrees_bit_for_bit[nearest"
SANITIZED += " or copies_every_bit or norm_of_views or not_finite"


def test_the_sanitizers_find_nothing():
    files = ["tests/test_emulated_update.py", "tests/test_emulated_reductions.py"]
    done = emulated.sanitized(["-m", "pytest", "-p", "no:cacheprovider", *files, "-k", SANITIZED])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 20


@pytest.mark.parametrize("name", UNSAFE)
def test_a_fault_is_caught_by_the_sanitizers(name):
    code = "from tests import test_emulated_faults as faults\n"
    code += f"scenario, _, edit = faults.UNSAFE[{name!r}]\n"
    code += "print(faults.outcome(faults.SCENARIOS[scenario], edit))"
    done = emulated.sanitized(["-c", code])
    assert done.returncode != 0, done.stdout
    assert UNSAFE[name][1] in done.stderr
