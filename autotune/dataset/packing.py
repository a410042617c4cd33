"""Puts several sequences into one row, and says which models keep them apart."""

import inspect
import re
import sys
from bisect import bisect_left, insort
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autotune.errors import UsageError

Ints = NDArray[np.int64]

# These build their mask from positions that start again; flash attention reads them too, but only
# where a micro-batch is a single row.
_SEPARATING = ("sdpa", "eager")
_MIXING_LAYERS = re.compile(r"linear|mamba|ssm|conv|recurrent|rwkv", re.IGNORECASE)
_MASKS = re.compile(r"create_(?:causal_mask|masks_for_generate)\b")


def pack(lengths: Ints, limit: int) -> tuple[Ints, Ints]:
    """Return an order of sequences, and where in it each row starts and the last one ends.

    Best fit, longest first: a sequence goes into the fullest row that still has room for it, so no
    row is longer than `limit` and none is cut.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sequence])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        else:
            room, row = limit, len(rows)
            rows.append([])
        rows[row].append(sequence)
        left = room - length
        if left not in open_rows:
            insort(rooms, left)
            open_rows[left] = []
        open_rows[left].append(row)
    order = np.asarray([sequence for row in rows for sequence in row], dtype=np.int64)
    return order, np.cumsum([0, *map(len, rows)], dtype=np.int64)


def require_separation(model_dir: Path, attention: str, *, trust_remote_code: bool) -> None:
    """Refuse to pack for a model that would let a sequence see the one before it.

    Raises:
        UsageError: the attention implementation or the architecture does not keep them apart.
    """
    why = _why_mixed(model_dir, attention, trust_remote_code=trust_remote_code)
    if why is not None:
        msg = f"--packing would mix the samples of a row: {why}. Leave it off for this model"
        raise UsageError(msg)


def _why_mixed(model_dir: Path, attention: str, *, trust_remote_code: bool) -> str | None:
    if attention not in _SEPARATING:
        return f"{attention} keeps them apart only where a micro-batch is one row"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        return f"its configuration cannot be read ({(str(error).splitlines() or [''])[0]})"
    return _why_carried(config) or _why_unread(config)


def _why_carried(config: Any) -> str | None:  # noqa: ANN401 - PretrainedConfig
    kinds = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()))
    names = [kind for kind in (*kinds, config.model_type) if _MIXING_LAYERS.search(kind)]
    return f"layers of the kind {names[0]} carry a state along the row" if names else None


def _why_unread(config: Any) -> str | None:  # noqa: ANN401 - PretrainedConfig
    from transformers import AutoModelForCausalLM

    models = AutoModelForCausalLM._model_mapping  # noqa: SLF001 - there is no public way to ask
    if type(config) not in models:
        return f"the code of {config.model_type} is not part of transformers"
    model = models[type(config)]
    source = inspect.getsource(sys.modules[model.__module__])
    if not _MASKS.search(source) or "position_ids=position_ids" not in source:
        return f"{model.__name__} does not build its mask from positions"
    return None
