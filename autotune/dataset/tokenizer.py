"""Loads the tokenizer of a model directory, and names it by its content."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from autotune.errors import InputMissingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
_CHATGLM3_CLASS = "ChatGLMTokenizer"


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


def is_chatglm3(model_dir: Path) -> bool:
    """Tell whether a directory has the tokenizer of an original ChatGLM3 checkpoint."""
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = isinstance(config, dict) and config.get("tokenizer_class") == _CHATGLM3_CLASS
    return named and (model_dir / "tokenizer.model").is_file()


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model directory with transformers.

    Raises:
        InputMissingError: no tokenizer with a vocabulary can be loaded.
    """
    _tokenizer_files(model_dir)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        msg = (
            f"the tokenizer in {model_dir} cannot be loaded ({reason}):"
            " complete its files, or allow its own code with trust_remote_code if you trust it"
        )
        raise InputMissingError(msg) from error
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        # Transformers makes a tokenizer that drops all text where the vocabulary file is missing.
        msg = f"the tokenizer in {model_dir} has no vocabulary: copy its tokenizer.json there"
        raise InputMissingError(msg)
    return tokenizer


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Tell whether the tokenizer has a chat template."""
    try:
        tokenizer.get_chat_template()
    except ValueError:
        return False
    return True
