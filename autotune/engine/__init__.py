"""The one way a model, its loss, collator, optimizer and DeepSpeed engine are built and stepped.

Probe, virtual run and training all come through here, so what was measured is what is trained.
"""
