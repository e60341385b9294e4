"""The demo model: a small decoder trained on text that this project makes itself.

Nothing in ``src/tensorwright`` imports this package; it only leaves the folder ``demo/model``.
"""
