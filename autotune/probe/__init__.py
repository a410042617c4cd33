"""Short runs of real DeepSpeed: one process group a structure, a ladder of micro-batches in it."""
