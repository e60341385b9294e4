"""Running GPU engines. torch gives memory, streams, graphs and matrix products; nothing here compiles."""
