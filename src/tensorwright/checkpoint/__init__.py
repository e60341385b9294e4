"""Checkpoint folders: Hugging Face folders in, upstream's unified checkpoint out, and read again by the builder."""
