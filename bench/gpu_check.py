"""One command for the day someone has a GPU: the tests on the device, the benchmarks, one file.

    make gpu-check                       # everything; allow an hour, and 64 GiB of free GPU memory
    make gpu-check ARGS=--quick          # without the tests of 2³¹ elements and the benchmarks

Nobody who wrote this package had a GPU, so whatever this prints is news. It runs the tests marked
`gpu`, each file in a process of its own (an illegal access leaves a process without a GPU), runs
those that failed once more alone (which tells a cause from its consequences), then the benchmarks
(bench/gpu_bench.py). All of it goes into bench/results/gpu-<GPU>-<time>.json together with GPU,
driver, versions and commit, whatever failed; the last lines say what to do with that file.

Exit status: 0 if everything passed, 1 if something failed, 2 if there is no GPU to be used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ttt_fast.doctor import system

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
TESTS = ROOT / "tests" / "gpu"
# What is kept of a message: the end of it says what went wrong.
KEPT_CHARACTERS = 4000
TEST_SECONDS = 3600
MAX_ALONE = 20


def environment() -> dict[str, Any]:
    """GPUs, driver, versions, backends and commit."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpus": gpus,
        "nvidia_smi": _output(
            "nvidia-smi", "--format=csv",
            "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        ),
        "torch_cuda": torch.version.cuda,
        "nvcc": _output("nvcc", "--version").splitlines()[-1:],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": _output("git", "status", "--short", "-uno").splitlines(),
        "TTT_FAST_BACKEND": os.environ.get("TTT_FAST_BACKEND"),
        "system": system(),
    }  # fmt: skip


def _output(*command: str) -> str:
    """What a program prints, or why it prints nothing."""
    if shutil.which(command[0]) is None:
        return f"{command[0]}: not found"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return (done.stdout if done.returncode == 0 else done.stderr).strip()


def no_gpu() -> str | None:
    """Why there is no GPU to be used and what to do, None if there is one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        why = (
            f"torch {torch.__version__} is built for the CPU only; install one that is built for"
            " CUDA (https://pytorch.org/get-started), for instance: make clean && make gpu-check"
            " TORCH_INDEX=https://download.pytorch.org/whl/cu130"
        )
    else:
        why = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no device;"
            " look at what nvidia-smi says, at the driver's version and at CUDA_VISIBLE_DEVICES"
        )
    return f"gpu-check: no CUDA device can be used: {why}.\nnvidia-smi: {_output('nvidia-smi')}"


# ---------------------------------------------------------------------------- tests


def run_pytest(selection: Sequence[str], *, slow: bool) -> dict[str, Any]:
    """Run tests in one process.

    Args:
        selection: files or names of tests.
        slow: those marked `slow`, too.

    Returns:
        "passed" (number), "skipped" (reason -> number), "failures" (list of "test" and "message"),
        "seconds".
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *selection, f"--junitxml={report}"]
        command += ["-m", "gpu" if slow else "gpu and not slow", "--tb=short"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, timeout=TEST_SECONDS
            )
            status, printed = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            status, printed = -1, f"{late}"
        found = read_report(report) if report.exists() else read_report(None)
    # 0 passed, 1 failed, 5 nothing was selected. Else it did not come to the tests, or died.
    if status not in (0, 1, 5):
        message = f"{printed}\npytest ended with status {status}"[-KEPT_CHARACTERS:]
        found["failures"].append({"test": " ".join(selection), "message": message})
    return found


def read_report(path: Path | None) -> dict[str, Any]:
    """What a JUnit report of pytest (None: an empty one) says, as :func:`run_pytest` returns it."""
    passed, skipped, failures, seconds = 0, {}, [], 0.0
    cases = ElementTree.parse(path).iter("testcase") if path else ()
    for case in cases:
        seconds += float(case.get("time", 0))
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            message = f"{bad[0].get('message')}\n{bad[0].text or ''}"
            failures.append({"test": name, "message": message[-KEPT_CHARACTERS:]})
        elif skip is not None:
            reason = skip.get("message") or ""
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            passed += 1
    return {
        "passed": passed, "skipped": skipped, "failures": failures, "seconds": round(seconds, 1)
    }  # fmt: skip


def run_tests(slow: bool) -> dict[str, Any]:
    """All of tests/gpu by file; failures again, alone."""
    results: dict[str, Any] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        name = str(path.relative_to(ROOT))
        print(f"{name} ...", flush=True)
        result = results[name] = run_pytest([name], slow=slow)
        for failure in result["failures"][:MAX_ALONE]:
            if "::" not in failure["test"]:
                continue  # the whole file
            again = run_pytest([failure["test"]], slow=slow)
            failure["fails_alone"] = bool(again["failures"])
            if again["failures"]:
                failure["message"] = again["failures"][0]["message"]
        print(f"  {summary(result)}", flush=True)
    return results


def summary(result: dict[str, Any]) -> str:
    """One line about a file's tests."""
    n_skipped = sum(result["skipped"].values())
    line = f"{result['passed']} passed, {len(result['failures'])} failed, {n_skipped} skipped"
    return f"{line}, {result['seconds']:.0f} s"


# ---------------------------------------------------------------------------- benchmarks, the end


def run_benchmarks() -> dict[str, Any]:
    """bench/gpu_bench.py in a process of its own; what it wrote, or how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "bench.gpu_bench", "--output", str(output)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if output.exists():
            return json.loads(output.read_text())
        error = f"ended with status {done.returncode}: {done.stderr[-KEPT_CHARACTERS:]}"
        return {"benchmarks": [], "failures": [{"group": "all", "error": error}]}


def report(result: dict[str, Any], path: Path) -> tuple[str, bool]:
    """What to print at the end, and whether everything passed."""
    lines, good = ["", "-" * 88], True
    for name, tests in result["tests"].items():
        lines.append(f"{name}: {summary(tests)}")
        for reason, number in tests["skipped"].items():
            lines.append(f"  skipped {number}: {reason}")
        for failure in tests["failures"]:
            good = False
            alone = "" if failure.get("fails_alone", True) else " (not when it is run alone)"
            last = failure["message"].strip().splitlines() or [""]
            lines.append(f"  FAILED {failure['test']}{alone}\n    {last[-1][:300]}")
    bench = result["bench"]
    if bench is None:
        lines.append("benchmarks: not run")
    else:
        lines.append(f"benchmarks: {len(bench['benchmarks'])} times measured")
        for failure in bench["failures"]:
            good = False
            lines.append(f"  FAILED {failure['group']}\n    {failure['error'][:300]}")
    good = good and any(tests["passed"] for tests in result["tests"].values())
    unusable = {
        name: status
        for name, status in result["environment"]["system"]["backends"].items()
        if status != "ok" and name != "cpp"
    }
    lines += [f"backend {name} was not tested: {status}" for name, status in unusable.items()]
    lines += [
        "",
        "Everything passed." if good else "Something failed; the whole messages are in the file.",
        f"Please send {path}",
        "as an issue, or as a pull request that adds it. It holds the results above, the messages",
        "of what failed, GPU, driver, versions and commit.",
    ]
    return "\n".join(lines), good


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks on a CUDA device.")
    parser.add_argument(
        "--quick", action="store_true", help="leave out benchmarks and the tests of 2^31 elements"
    )
    args = parser.parse_args(arguments)
    reason = no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    found = environment()
    for gpu in found["gpus"]:
        print(f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    result = {
        "environment": found,
        "tests": run_tests(slow=not args.quick),
        "bench": None if args.quick else run_benchmarks(),
    }
    gpu = re.sub(r"[^a-z0-9]+", "-", found["gpus"][0]["name"].lower()).strip("-")
    stamp = re.sub(r"[^0-9T]", "", found["datetime"].partition("+")[0])
    path = RESULTS / f"gpu-{gpu}-{stamp}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1).replace(str(ROOT), ".") + "\n")
    text, good = report(result, path.relative_to(ROOT))
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
