"""Quantisation of weight matrices: schemes, the NumPy reference, the same in C++. It knows no models and no files."""
