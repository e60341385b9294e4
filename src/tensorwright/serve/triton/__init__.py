"""NVIDIA's Triton: the model repository, the model in its Python backend, and the launch of the server."""
