// The kernels of a decode step of several sequences: embedding, linears with fused epilogues, attention.
#pragma once
#include "decode_attention.cuh"
#include "decode_embed.cuh"
#include "linear.cuh"
#include "linear_batched.cuh"
