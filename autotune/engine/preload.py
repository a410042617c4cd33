"""Imported by the server from which ranks are forked, so that a rank starts at once.

Nothing here may touch a device: after a fork it could not be used any more.
"""

import deepspeed
import transformers.models.auto.modeling_auto

import autotune.engine.trainer

__all__ = ["autotune", "deepspeed", "transformers"]
