"""One allocation problem behind ranks, sparsities, bit widths and layers: what to spend where, under a total."""
