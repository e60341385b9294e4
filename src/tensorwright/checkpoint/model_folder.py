"""A Hugging Face model folder: its JSON files, tokenizer files and safetensors. It knows no families and no output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import tokenizers

from tensorwright.checkpoint.tensor_file import Array, Entry, TensorFile
from tensorwright.errors import ModelError
from tensorwright.models.weight_names import IGNORED_SUFFIXES, Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "special_tokens_map.json")
FLOAT_DTYPES: dict[str, Literal["float32", "float16", "bfloat16"]] = {"F32": "float32", "F16": "float16",
                                                                       "BF16": "bfloat16"}
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelFolder:
    """Config and headers; tensors are read on demand. With `with_weights` False only config.json has to be there."""

    def __init__(self, directory: Path, *, with_weights: bool = True) -> None:
        """Raises ModelError for a folder that is not a model with safetensors."""
        self.directory = directory
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a folder, expected a Hugging Face model folder",
                             mend=f"ls {directory.parent}")
        self.config = self._json("config.json", required=True)
        self.generation_config = self._json("generation_config.json")
        self._homes: dict[str, TensorFile] = self._open() if with_weights else {}

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor."""
        return self._homes[name].entries[name]

    def has(self, name: str) -> bool:
        """Whether the folder holds a tensor of this name."""
        return name in self._homes

    def read_rows(self, name: str, start: int, stop: int) -> Array:
        """Rows of a tensor, in memory of their own."""
        return self._homes[name].read_rows(name, start, stop)

    def prefetch_rows(self, name: str, start: int, stop: int) -> None:
        """Lets the system begin to read rows that will be asked for soon."""
        self._homes[name].prefetch_rows(name, start, stop)

    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: generation_config.json's, else config.json's."""
        for values in (self.generation_config, self.config):
            ids = values.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (int(ids),)
        return ()

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The files that later steps need. Raises ModelError when there is no tokenizer.json."""
        if not (self.directory / "tokenizer.json").is_file():
            script = ("from transformers import AutoTokenizer; "
                      f"AutoTokenizer.from_pretrained('{self.directory}').save_pretrained('{self.directory}')")
            raise ModelError(f"{self.directory} has no tokenizer.json, the one tokenizer file that is read here; "
                             "transformers can write it from the older files",
                             mend=f'pip install transformers sentencepiece tiktoken && python3 -c "{script}"')
        try:
            tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        except Exception as cause:  # the library raises plain Exception
            raise ModelError(f"{self.directory / 'tokenizer.json'} is no tokenizer: {cause}",
                             mend="fetch the file again") from cause
        return tuple(path for name in TOKENIZER_FILES if (path := self.directory / name).is_file())

    def check(self, sources: Iterable[Source], ignored: Iterable[str] = ()) -> None:
        """Compares the folder's tensors with those expected: names, shapes and dtypes. Raises ModelError."""
        expected = {source.name: source for source in sources}
        missing = [name for name in expected if name not in self._homes]
        if missing:
            raise ModelError(f"{self.directory} lacks {_some(missing)}, which the architecture in config.json needs",
                             mend="fetch the folder again, or mend config.json (number of layers, biases, "
                             "tie_word_embeddings)")
        extra = sorted(name for name in self._homes if name not in expected and name not in set(ignored)
                       and not name.endswith(IGNORED_SUFFIXES))
        if extra:
            raise ModelError(f"{self.directory} holds {_some(extra)}, which the architecture in config.json does not "
                             "have; converting without them would change the model",
                             mend=f"python3 -m json.tool {self.directory / 'config.json'}")
        for name, source in expected.items():
            entry = self.entry(name)
            if entry.shape != source.shape:
                raise ModelError(f"tensor {name} has shape {list(entry.shape)}, config.json asks for "
                                 f"{list(source.shape)}", mend=f"python3 -m json.tool {self.directory / 'config.json'}")
            if entry.dtype not in FLOAT_DTYPES:
                raise ModelError(f"tensor {name} is {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}",
                                 mend="fetch the unquantised upload of this model and convert that")

    def _json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        path = self.directory / name
        if not path.is_file():
            if required:
                raise ModelError(f"{self.directory} has no {name}, expected a Hugging Face model folder",
                                 mend=f"ls {self.directory}")
            return {}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as cause:
            raise ModelError(f"{path} cannot be read as JSON: {cause}", mend=f"python3 -m json.tool {path}") from cause
        if not isinstance(values, dict):
            raise ModelError(f"{path} holds {type(values).__name__}, expected a JSON object",
                             mend=f"python3 -m json.tool {path}")
        return values

    def _open(self) -> dict[str, TensorFile]:
        """Each tensor's file. The index decides where there is one; consolidated*.safetensors is never read."""
        if (self.directory / _INDEX).is_file():
            return self._open_indexed(self._json(_INDEX).get("weight_map"))
        if (self.directory / "model.safetensors").is_file():
            file = TensorFile(self.directory / "model.safetensors", ModelError)
            return dict.fromkeys(file.entries, file)
        raise self._no_weights()

    def _open_indexed(self, homes: Any) -> dict[str, TensorFile]:
        if not isinstance(homes, Mapping) or not all(isinstance(home, str) for home in homes.values()):
            raise ModelError(f"{self.directory / _INDEX} has no weight_map of names to files",
                             mend=f"python3 -m json.tool {self.directory / _INDEX}")
        missing = sorted({home for home in homes.values() if not (self.directory / home).is_file()})
        if missing:
            raise ModelError(f"{self.directory} lacks {_some(missing)}, which {_INDEX} names",
                             mend="fetch the missing files")
        files = {home: TensorFile(self.directory / home, ModelError) for home in sorted(set(homes.values()))}
        for name, home in homes.items():
            if name not in files[home].entries:
                raise ModelError(f"{_INDEX} says that {name} is in {home}, which does not hold it",
                                 mend="fetch both files again: they are of different uploads")
        return {name: files[home] for name, home in homes.items()}

    def _no_weights(self) -> ModelError:
        names = sorted(path.name for path in self.directory.iterdir() if path.is_file())
        pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES)]
        if pickles:
            script = (f"from transformers import AutoModelForCausalLM as M; m = M.from_pretrained('{self.directory}', "
                      f"dtype='auto'); m.save_pretrained('{self.directory}-safetensors')")
            return ModelError(f"{self.directory} holds its weights as pickle files ({_some(pickles)}), which can run "
                              "code when opened and are not read here; expected safetensors",
                              mend=f'pip install torch transformers && python3 -c "{script}"')
        others = [name for name in names if name.endswith(".safetensors")]
        found = f"only {_some(others)}" if others else "no weights"
        return ModelError(f"{self.directory} holds {found}, expected model.safetensors or {_INDEX} with its files",
                          mend="fetch the folder's model*.safetensors, or give --dummy_weights for random ones")


def _some(names: list[str], most: int = 5) -> str:
    """The first few names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
