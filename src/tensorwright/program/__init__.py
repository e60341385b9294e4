"""Programs: flat lists of ops over named buffers. Nothing here knows a model family or a machine."""
