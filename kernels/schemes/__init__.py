"""Quantised weights: one published layout a file, and the memory that kernels read. `packed` says what they share."""
