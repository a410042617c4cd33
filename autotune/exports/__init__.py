"""Tuned runs in the words of other tools: records in, the text of files out."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from autotune.exports import accelerate, axolotl, llama_factory, ms_swift, transformers, trl
from autotune.exports.tuned import Export, TunedRun

EXPORTERS: Mapping[str, Callable[[TunedRun], Export]] = MappingProxyType(
    {
        "transformers": transformers.export,
        "accelerate": accelerate.export,
        "trl": trl.export,
        "llama-factory": llama_factory.export,
        "axolotl": axolotl.export,
        "ms-swift": ms_swift.export,
    }
)
"""By the name that `--to` takes."""

__all__ = ["EXPORTERS", "Export", "TunedRun"]
