"""From files of rows to tokenised, memory-mapped sequences and their figures."""

from autotune.dataset.lines import content_hash
from autotune.dataset.preparing import prepare
from autotune.dataset.rows import Rows
from autotune.dataset.sources import Rules, Source

__all__ = ["Rows", "Rules", "Source", "content_hash", "prepare"]
