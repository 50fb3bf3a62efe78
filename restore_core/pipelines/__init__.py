"""The jobs' graphs: packing, restoring, proving and evaluating on Ray Data, training on Ray Train and Tune."""
