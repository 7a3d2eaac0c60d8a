// The binding of the CUDA kernels for tensors on the CPU. Several builds of the kernels (as they
// are, and with faults) are loaded into one process, so that each registers its ops under another
// name; only the name is compiled again, this file is not.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

extern const char* const cuda_emu_namespace;

static const char* emulated_name(const char* name) {
  return strcmp(name, "ttt_fast_cuda") == 0 ? cuda_emu_namespace : name;
}

// The macros that register make a string of the namespace's name with it.
#undef C10_STRINGIZE
#define C10_STRINGIZE(name) emulated_name(#name)
#define TTT_FAST_EMULATED
#include "../ops_cuda.cpp"
