"""The model in figures: traced under fake tensors, and the virtual run of the engine."""
