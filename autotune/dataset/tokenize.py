"""From a conversation to token ids, and to the mask of those that are trained on."""

import hashlib
import logging
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.conversation import Conversation, Message
from autotune.dataset.lines import RowError
from autotune.errors import InputMissingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRow = tuple[NDArray[np.int32], NDArray[np.bool_]]
_Span = tuple[int, int]
_Rendered = list[dict[str, str]]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "tokenization_*.py",
)

_log = logging.getLogger(__name__)


def tokenizer_hash(model_dir: Path) -> str:
    """Return a hash of all files that decide how text becomes tokens, in hexadecimal digits.

    Raises:
        InputMissingError: there is none, or one cannot be read.
    """
    whole = hashlib.blake2b(digest_size=16)
    for path in _tokenizer_files(model_dir):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
        except OSError as error:
            msg = f"the tokenizer file {path} cannot be read ({error.strerror}): make it readable"
            raise InputMissingError(msg) from error
        whole.update(f"{path.relative_to(model_dir)} {content}\n".encode())
    return whole.hexdigest()


def _tokenizer_files(model_dir: Path) -> list[Path]:
    found = {path for pattern in _TOKENIZER_FILES for path in model_dir.glob(pattern)}
    if not found:
        msg = f"no tokenizer is in {model_dir}: copy tokenizer.json and tokenizer_config.json there"
        raise InputMissingError(msg)
    return sorted(found)


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model directory.

    Raises:
        InputMissingError: no tokenizer with a vocabulary and a chat template can be loaded.
    """
    _tokenizer_files(model_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        msg = (
            f"the tokenizer in {model_dir} cannot be loaded ({_first_line(error)}):"
            " complete its files, or allow its own code with trust_remote_code if you trust it"
        )
        raise InputMissingError(msg) from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        # Transformers makes a tokenizer that drops all text where the vocabulary file is missing.
        msg = f"the tokenizer in {model_dir} has no vocabulary: copy its tokenizer.json there"
        raise InputMissingError(msg)
    _require_template(tokenizer, model_dir)
    return tokenizer


def _require_template(tokenizer: "PreTrainedTokenizerBase", model_dir: Path) -> None:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        msg = (
            f"the tokenizer in {model_dir} has no chat template: use the tokenizer of an instruct"
            " model, or put a template in chat_template.jinja beside it"
        )
        raise InputMissingError(msg) from error


def tokenize(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    """Return the token ids of a conversation, and for each whether it is trained on.

    What is trained on is what the model is to write: an assistant's turn behind its header,
    with the mark that ends it.

    Raises:
        RowError: the chat template refuses the conversation, or hides where its turns are.
    """
    if tokenizer.is_fast and _GENERATION_TAG.search(tokenizer.get_chat_template()):
        row = _by_generation_tags(conversation, tokenizer)
        if row is not None:
            return row
    return _by_renderings(conversation, tokenizer)


def _by_generation_tags(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase"
) -> TokenRow | None:
    """Take the mask from the template's tags, or None if it does not show one span a turn."""
    encoding = _apply_template(
        tokenizer,
        _as_dicts(conversation.messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False, "return_offsets_mapping": True},
    )
    mask = np.asarray(encoding["assistant_masks"], dtype=np.bool_)
    spans = _runs(mask)
    turns = [turn for turn in conversation.messages if turn.role == "assistant"]
    # Where no token claims the last character of a span, transformers marks all that follows.
    runs_over = bool(mask.size and mask[-1]) and conversation.messages[-1].role != "assistant"
    if len(spans) != len(turns) or runs_over:
        _log.debug("%d tagged spans for %d assistant turns", len(spans), len(turns))
        return None
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64)
    wanted = [
        (start, _end_of_character(offsets, stop))
        for (start, stop), turn in zip(spans, turns, strict=True)
        if turn.trained
    ]
    return _token_row(encoding["input_ids"], wanted)


def _end_of_character(offsets: NDArray[np.int64], stop: int) -> int:
    """Move `stop` behind the last token of a character that takes several.

    Transformers ends a span at the first token of its last character; an emoji has up to four.
    """
    while stop < len(offsets) and (offsets[stop] == offsets[stop - 1]).all():
        stop += 1
    return stop


def _by_renderings(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> TokenRow:
    """Find the turns by rendering the conversation up to them."""
    messages = _as_dicts(conversation.messages)
    text = _render(tokenizer, messages)
    spans = [
        _turn_span(text, messages, index, tokenizer)
        for index, turn in enumerate(conversation.messages)
        if turn.trained
    ]
    if any(left[1] > right[0] for left, right in pairwise(spans)):
        msg = "the tokenizer's chat template renders two assistant turns at the same place"
        raise RowError(msg)
    if tokenizer.is_fast:
        return _encode_with_offsets(text, spans, tokenizer)
    return _encode_with_prefixes(text, spans, tokenizer)


def _turn_span(
    text: str, messages: _Rendered, index: int, tokenizer: "PreTrainedTokenizerBase"
) -> _Span:
    """Return the characters of `text` that the model writes in the turn `index`."""
    until = _render(tokenizer, messages[: index + 1])
    before = _render(tokenizer, messages[:index]) if index else ""
    if not (text.startswith(until) and until.startswith(before)):
        msg = (
            f"the tokenizer's chat template renders the turns up to messages[{index}] otherwise"
            " once more turns follow, so what to train on cannot be told: switch that turn off"
            ' with "train": false, or use a template with {% generation %} tags'
        )
        raise RowError(msg)
    if index:
        prompt = _render(tokenizer, messages[:index], add_generation_prompt=True)
        start = len(before) + _length_in_common(prompt[len(before) :], until[len(before) :])
    else:
        start = _start_of_first(until, messages, tokenizer)
    return start, _end_of_turn(until, start, messages[index]["content"])


def _length_in_common(header: str, turn: str) -> int:
    # A header may say more than the turn does, as one that opens a thought with "<think>".
    pairs = enumerate(zip(header, turn, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(header), len(turn)))


def _start_of_first(until: str, messages: _Rendered, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return where an opening assistant turn starts; templates render no empty conversation."""
    prompted = _render(tokenizer, messages[:1], add_generation_prompt=True)
    header = prompted.removeprefix(until)
    if not header or header not in until:
        msg = (
            "the conversation opens with an assistant turn, and the tokenizer's chat template does"
            ' not show where it starts: switch it off with "train": false, or put a user turn first'
        )
        raise RowError(msg)
    return until.index(header) + len(header)


def _end_of_turn(until: str, start: int, content: str) -> int:
    """Leave out white space behind an end-of-turn mark: the model stops at the mark."""
    stripped = until.rstrip()
    only_content = stripped.endswith(content.rstrip())
    return len(until) if only_content else max(start, len(stripped))


def _encode_with_offsets(
    text: str, spans: list[_Span], tokenizer: "PreTrainedTokenizerBase"
) -> TokenRow:
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    # Some tokenizers leave a token of white space with an empty range at its end, so a token is
    # before a place when it ends there or earlier; a token across the last place is trained on.
    wanted = [
        (
            int(np.searchsorted(ends, start, side="right")),
            max(int(np.searchsorted(ends, end, side="right")), int(np.searchsorted(starts, end))),
        )
        for start, end in spans
    ]
    return _token_row(encoding["input_ids"], wanted)


def _encode_with_prefixes(
    text: str, spans: list[_Span], tokenizer: "PreTrainedTokenizerBase"
) -> TokenRow:
    """Serve tokenizers in Python, which do not say where in the text a token is from."""
    ids = _ids(text, tokenizer)
    wanted = []
    for span in spans:
        heads = [_ids(text[:place], tokenizer) for place in span]
        if any(ids[: len(head)] != head for head in heads):
            msg = "a token of the tokenizer reaches across the border of an assistant turn"
            raise RowError(msg)
        wanted.append((len(heads[0]), len(heads[1])))
    return _token_row(ids, wanted)


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _token_row(ids: list[int], wanted: Iterable[_Span]) -> TokenRow:
    trained = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in wanted:
        trained[start:stop] = True
    return np.asarray(ids, dtype=np.int32), trained


def _runs(mask: NDArray[np.bool_]) -> list[_Span]:
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _as_dicts(messages: Iterable[Message]) -> _Rendered:
    return [{"role": turn.role, "content": turn.content} for turn in messages]


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: _Rendered,
    *,
    add_generation_prompt: bool = False,
) -> str:
    text: str = _apply_template(
        tokenizer, messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return text


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: _Rendered,
    **options: Any,  # noqa: ANN401 - what transformers takes
) -> Any:  # noqa: ANN401 - text or encoding, by the options
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        msg = f"the tokenizer's chat template refuses the conversation ({_first_line(error)})"
        raise RowError(msg) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
