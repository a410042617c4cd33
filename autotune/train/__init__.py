"""The hand-off: training from the emitted files alone."""
