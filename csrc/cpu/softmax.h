// Loops over a row of numbers that a softmax is made of.
#pragma once

#include "blocks.h"

namespace ttt_fast {

float maximum(const float* z, int64_t n);
double maximum(const double* z, int64_t n);

// e = exp(z - maximum), 0 where that comes near the denormals
void exponentials(const float* z, float maximum, int64_t n, float* e);
void exponentials(const double* z, double maximum, int64_t n, double* e);

// In an order that depends on nothing but n.
float sum(const float* e, int64_t n);
double sum(const double* e, int64_t n);

// p = e * factor, 0 where e < smallest: a small value would make denormals
void scale(const float* e, float smallest, float factor, int64_t n, float* p);
void scale(const double* e, double smallest, double factor, int64_t n, double* p);

}  // namespace ttt_fast
