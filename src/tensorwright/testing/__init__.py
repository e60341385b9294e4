"""Tiny models and engines, fakes, and the differential test: for our own tests and for those who build on us."""
