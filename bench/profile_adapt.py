"""One adaptation, to be looked at under NVIDIA's profilers. This text is their manual.

The program
    python -m bench.profile_adapt [--model demo] [--engine dense] [--tokens 64] [--deltas 1] ...

adapts once to warm up (kernels are compiled, memory is reserved; with --cuda-graph three times, for
the steps to be recorded), then once between cudaProfilerStart and cudaProfilerStop: the profilers
are told to record only that. Every phase is a named range (NVTX): adapt > snapshot, step > forward,
backward, update > norm; then restore. Where there is no GPU it says so and ends with status 2;
`--device cpu` prints the phases' times without any profiler.

Where the time goes: Nsight Systems
    make profile-nsys ARGS="--engine factored --deltas 16"

writes profile-nsys.nsys-rep (open it with nsys-ui) and prints four tables. What they answer:
  1. nvtx_gpu_proj_sum: GPU time by range. Is it forward, backward or update that takes long?
     Projected: from the start of a range's first kernel to the end of its last.
  2. cuda_gpu_kern_sum: time by kernel. Ours are named sgd_kernel, grad_norm_kernel, ...
  3. cuda_api_sum: cudaStreamSynchronize or cudaMemcpy many times means that the host waits inside
     the steps. It should do so once for K steps, and once a forward in transformers, which looks
     at the position ids.
  4. cuda_gpu_mem_time_sum: copies between host and device. In the steps there should be none.
In the timeline, gaps between kernels while the CPU's row is full mean that launches are what
limits the step: short prompts on small models. More deltas at once (--deltas) fill the gaps, and
--cuda-graph does without launches: all steps are then one range, replay. nsys shows the kernels of
a graph with --cuda-graph-trace=node.

How good one kernel is: Nsight Compute
    make profile-ncu KERNEL=sgd_kernel ARGS="--engine dense --dtype bfloat16"

records the first three launches whose name matches the regular expression KERNEL, each replayed
some ten times with all counters, into profile-ncu.ncu-rep (open it with ncu-ui), and prints the
summary. Read in this order:
  1. dram__throughput.avg.pct_of_peak_sustained_elapsed: an update, a norm, a copy is as good as it
     gets near 90 %. Products with few tokens should be near it, too: they read the weight once.
  2. dram__bytes.sum over the number of parameters: bytes a parameter. kernels/README.md has what
     the machine code says it must be. More means that something is read twice.
  3. launch__registers_per_thread and sm__warps_active.avg.pct_of_peak_sustained_active: whether
     registers keep warps out. kernels/README.md has the registers of each kernel.
  4. smsp__warp_issue_stalled_*: long_scoreboard is memory; barrier or short_scoreboard is us.
  5. sm__inst_executed_pipe_tensor: 0 in a kernel with products in 16 bits means that they are not
     on the tensor cores.
"ERR_NVGPUCTRPERM" means that counters are for administrators: run it as root, or load the driver
with NVreg_RestrictProfilingToAdminUsers=0.

Both tools come with the CUDA toolkit and do not change results, only times: none that was taken
under a profiler is a result. bench/gpu_bench.py measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import nn

from ttt_fast import TTTConfig, TTTTrainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Adapt twice, the second time under the profiler; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="folder, hub name, or demo (SmolLM2-135M)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--engine", default="auto", choices=["auto", "dense", "factored"])
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt")
    parser.add_argument("--deltas", type=int, default=1, help="prompts at once")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cuda-graph", action="store_true", help="replay the steps from a graph")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "profile_adapt: torch finds no CUDA device, so there is nothing to profile; `make"
            " gpu-check` says why. --device cpu shows the times of the phases there.",
            file=sys.stderr,
        )
        return 2
    model = load(args.model, getattr(torch, args.dtype)).to(device)
    config = TTTConfig(
        steps=args.steps,
        engine=args.engine,
        optimizer=args.optimizer,
        cuda_graph=args.cuda_graph,
    )
    trainer = TTTTrainer(model, config)
    generator = torch.Generator().manual_seed(0)
    # Ids that every vocabulary has.
    ids = torch.randint(3, 100, (args.deltas, args.tokens), generator=generator)
    for _ in range(3 if args.cuda_graph else 1):
        trainer.adapt(ids, deltas="independent").restore()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
    with trainer.adapt(ids, deltas="independent") as adapted:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
    print(adapted.report())
    return 0


def load(name: str, dtype: torch.dtype) -> nn.Module:
    """A model by its folder or hub name, or the demo model."""
    if name == "demo":
        from ttt_fast.demo import load_demo_model

        return load_demo_model(dtype)[0]
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


if __name__ == "__main__":
    sys.exit(main())
