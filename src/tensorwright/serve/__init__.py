"""Serving an engine: what stands between the runtime and a client's protocol."""
