"""Where a model comes from: shipped with the package, a local directory, or a model hub."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from autotune import builtin, chatglm3
from autotune.environment import cache_dir
from autotune.errors import ConfigError, InputMissingError
from autotune.rundir import write_json, writing

_BUILTIN = "builtin:"
_WEIGHTS = ("*.safetensors",)
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
_SAMPLES, _SAMPLE_BYTES = 32, 4096
_POSITION_KEYS = ("max_position_embeddings", "seq_length", "n_positions", "max_sequence_length")
_VOCABULARY_KEYS = ("vocab_size", "padded_vocab_size")
_NO_LIMIT = 2**31 - 1
_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A directory with config.json, and what the model recommends for options nobody set.

    `from_scratch` says that there are no weights, so that training starts from random ones. Where
    the model is one in a form of its own, that is in `original`, and `directory` holds the standard
    form of it: the configuration at once, the rest after `complete`.
    """

    name: str
    directory: Path
    from_scratch: bool
    recommended: Mapping[str, float]
    original: Path | None = None

    @property
    def short_name(self) -> str:
        return Path(self.name.removeprefix(_BUILTIN)).name

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer is that the data is read with."""
        return self.original or self.directory

    def complete(self) -> None:
        """Put weights and tokenizer of a model in a form of its own into the standard one.

        Raises:
            ConfigError: a tensor has no place in it.
            CannotWriteError: there is no room for them.
        """
        if self.original is not None:
            chatglm3.convert(self.original, self.directory)

    def content_hash(self) -> str:
        """Return a hash of configuration and tokenizer, and of samples of the weights.

        Reading all weights would take minutes; a training changes every part of them.
        """
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self.tokenizer_directory.iterdir()):
            if path.match("*.safetensors"):
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                digest.update(_sampled(path))
            elif any(path.match(pattern) for pattern in _SMALL_FILES):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def limits(self) -> tuple[int, int]:
        """Return the positions and the vocabulary of the model, as its configuration names them.

        A configuration that names none, as those of models without position embeddings, gives a
        limit that no row reaches.
        """
        config = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        nested = config.get("text_config")
        config = config | nested if isinstance(nested, dict) else config
        positions, vocabulary = (
            next((config[key] for key in keys if isinstance(config.get(key), int)), _NO_LIMIT)
            for keys in (_POSITION_KEYS, _VOCABULARY_KEYS)
        )
        return positions, vocabulary


def _sampled(path: Path) -> bytes:
    """Return some bytes of evenly spaced places of a file, the first and the last among them."""
    last = max(0, path.stat().st_size - _SAMPLE_BYTES)
    with path.open("rb") as file:
        samples = []
        for place in range(_SAMPLES):
            file.seek(last * place // (_SAMPLES - 1))
            samples.append(file.read(_SAMPLE_BYTES))
    return b"".join(samples)


def find_model(model: str) -> ModelSource:
    """Find a model by `builtin:NAME`, directory, or hub id.

    Raises:
        InputMissingError: there is no such model, or no config.json in it.
        ConfigError: config.json is no JSON object, or the weights are only there as pickles.
    """
    if model.startswith(_BUILTIN):
        name = model.removeprefix(_BUILTIN)
        return ModelSource(
            name=model,
            directory=builtin.directory(name),
            from_scratch=True,
            recommended=builtin.RECOMMENDED.get(name, {}),
        )
    directory = (
        Path(model)
        if Path(model).is_dir()
        else _presets().get(model.casefold()) or _from_hub(model)
    )
    _check_config(directory)
    has_weights = any(any(directory.glob(pattern)) for pattern in _WEIGHTS)
    if not has_weights and any(any(directory.glob(pattern)) for pattern in _UNSAFE_WEIGHTS):
        msg = (
            f"{directory} has weights as pickles only, which can run code when they are loaded: "
            "convert them to safetensors"
        )
        raise ConfigError(msg)
    source = ModelSource(
        name=model, directory=directory.resolve(), from_scratch=not has_weights, recommended={}
    )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return _in_standard_form(source, config) if chatglm3.is_original(config) else source


def _in_standard_form(source: ModelSource, config: Mapping[str, object]) -> ModelSource:
    """Return the model with its configuration in standard form, in the cache."""
    standard = chatglm3.standard_config(config)
    directory = cache_dir() / "models" / source.content_hash()
    if not (directory / "config.json").exists():
        with writing(directory):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(directory / "config.json", standard)
    return replace(source, directory=directory, original=source.directory)


def _presets() -> dict[str, Path]:
    """Return the configurations that come with the package, to plan with, by name."""
    package = Path(str(files("autotune")))
    # An installed package carries them; a checkout has them beside it.
    folders = (package / "configs" / "models", package.parent / "configs" / "models")
    found = (path for folder in folders for path in sorted(folder.glob("*/config.json")))
    return {path.parent.name: path.parent for path in found}


def _check_config(directory: Path) -> None:
    path = directory / "config.json"
    if not path.is_file():
        msg = f"{directory} has no config.json: name a directory that holds a transformers model"
        raise InputMissingError(msg)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON: {error}"
        raise ConfigError(msg) from None
    if not isinstance(config, dict) or "model_type" not in config:
        msg = f"{path} names no model_type, so transformers cannot build the model"
        raise ConfigError(msg)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        # To plan with; a training would miss its tokenizer.
        if (preset := _presets().get(model.rpartition("/")[2].casefold())) is not None:
            return preset
        reason = str(error).strip().splitlines()[0]
        nearest = difflib.get_close_matches(model.casefold(), _presets(), n=3, cutoff=0.0)
        msg = (
            f"no directory and no model of the hub that can be reached is called {model!r} "
            f"({reason}): name a directory that holds config.json, tokenizer and weights, or for a "
            f"plan a published model, the nearest being {', '.join(nearest)}"
        )
        raise InputMissingError(msg) from None
