// Found in place of the CUDA toolkit's header of this name.
#pragma once

#include "cuda_emu.h"
