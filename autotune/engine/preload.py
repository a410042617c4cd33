"""Imported by the server from which ranks are forked, so that a rank starts at once.

Nothing here may touch a device: after a fork it could not be used any more.
"""

# ruff: noqa: E402 - the order is the point
import sys

from autotune.processes import die_with_parent

# First of all, as what follows takes seconds in which the client may end.
die_with_parent()

import gc

# bitsandbytes asks the device what it is, and peft imports it where it is found. Ranks that need it
# import it themselves.
_HIDDEN = "bitsandbytes"
sys.modules[_HIDDEN] = None  # type: ignore[assignment] # so it is not there: the import system

import deepspeed
import peft.import_utils
import transformers.models.auto.modeling_auto

import autotune.engine.trainer

del sys.modules[_HIDDEN]
peft.import_utils.is_bnb_available.cache_clear()
peft.import_utils.is_bnb_4bit_available.cache_clear()
transformers.utils.is_bitsandbytes_available.cache_clear()

# No imported module is ever garbage. Looking through all of them takes a third of a second, in
# whichever step of a probe the collector comes to it.
gc.freeze()

__all__ = ["autotune", "deepspeed", "transformers"]
