"""Kernels for NVIDIA GPUs: CUDA C++ templates, compiled by NVRTC when an engine is built."""
