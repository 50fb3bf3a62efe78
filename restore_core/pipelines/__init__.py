"""The jobs' graphs: packing, training on Ray Train, restoring on Ray Data."""
