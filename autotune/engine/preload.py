"""Imported by the server from which ranks are forked, so that a rank starts at once.

Nothing here may touch a device: after a fork it could not be used any more.
"""

# ruff: noqa: E402 - the order is the point
from autotune.processes import die_with_parent

# First of all, as what follows takes seconds in which the client may end.
die_with_parent()

import gc

import deepspeed
import transformers.models.auto.modeling_auto

import autotune.engine.trainer

# No imported module is ever garbage. Looking through all of them takes a third of a second, in
# whichever step of a probe the collector comes to it.
gc.freeze()

__all__ = ["autotune", "deepspeed", "transformers"]
