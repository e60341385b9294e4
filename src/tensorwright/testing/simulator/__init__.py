"""A simulator of the PTX that NVRTC makes of our kernels: they run on a CPU, slowly, and are checked as they run."""
