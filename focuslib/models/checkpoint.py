"""Find a checkpoint (a local folder, or a hub id that is cached or can be downloaded) and load it shard by shard."""

import json
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config

from focuslib.errors import UserError

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]  # no code and no pickles are ever fetched
INDEX = "model.safetensors.index.json"


@dataclass
class Architecture:
    """How to build a checkpoint's model: class, configuration, and patterns of checkpoint name → parameter name."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    key_mapping: dict[str, str] | None = None


def resolve_folder(pretrained: str | Path, download: bool = False) -> Path:
    """The local folder of a checkpoint. Raises UserError if there is none.

    download: fetch from the hub what is not cached; without it nothing ever calls out.
    """
    folder = Path(pretrained).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(pretrained), allow_patterns=FILES, local_files_only=not download))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            where = f"the hub has not delivered it ({type(error).__name__})" if download else "the hub's cache lacks it"
            raise UserError(
                f"{pretrained}: no such folder, and {where}; "
                f"download it where there is a network: hf download {pretrained}"
            ) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no config.json; not a checkpoint folder")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file. Raises UserError if it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; download it again")
    return content


def check_shards(folder: Path) -> None:
    """Refuse a checkpoint folder with a missing or half-downloaded weight file. Reads the files' headers only."""
    index = folder / INDEX
    names = {"model.safetensors"}
    if index.is_file():
        names = set(read_json(index).get("weight_map", {}).values())
    for name in sorted(names):
        path = folder / name
        if not path.is_file():
            why = f"named in {INDEX} but missing" if index.is_file() else "missing"
            if any(folder.glob("*.bin")):
                raise UserError(f"{folder}: weights as .bin, which can hold code; convert them to safetensors")
            raise UserError(f"{path}: {why}; download the checkpoint again")
        _check_safetensors(path)


def _check_safetensors(path: Path) -> None:
    """A safetensors file is 8 bytes of header size, the JSON header, and the tensors' bytes."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, path.stat().st_size)))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete safetensors file; download it again") from error
    expected, actual = 8 + size + end, path.stat().st_size
    if actual != expected:
        raise UserError(f"{path}: {actual} bytes, but its header announces {expected}; download it again")


def load_model(
    folder: Path,
    architecture: Architecture,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device = "cpu",
    device_map: Any = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load the weights of a checkpoint folder, every parameter exactly once.

    Parameters
    ----------
    folder, architecture
        The checkpoint, and how to build its model.
    dtype
        Of the parameters; "auto": as the checkpoint has them.
    device, device_map
        Where the model goes; with a device_map it is spread over devices, as in transformers.
    quantization
        A transformers quantization config, such as BitsAndBytesConfig(load_in_8bit=True).

    Raises
    ------
    UserError
        For missing, half-downloaded, unexpected or misshapen weights.
    """
    check_shards(folder)
    if quantization is not None and device_map is None:
        device_map = {"": device}
    with _no_load_report():
        load: Any = architecture.model_class.from_pretrained  # which returns a pair when asked for its loading info
        model, info = load(
            folder,
            config=architecture.config,
            key_mapping=architecture.key_mapping,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in info, and refused below
            output_loading_info=True,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if keys:
            what = kind.replace("_", " ")
            raise UserError(f"{folder}: {len(keys)} {what} (such as {keys[0]}); is it this model's checkpoint?")
    return model if device_map is not None else model.to(device)


@contextmanager
def _no_load_report() -> Iterator[None]:
    """Silence the table that transformers prints about keys that do not fit: the error says it in one line."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def qwen2_config(raw: dict[str, Any]) -> Qwen2Config:
    """The language model's configuration from a flat config.json that also describes a vision tower."""
    known = (set(Qwen2Config().to_dict()) | {"rope_theta"}) - {"model_type", "architectures"}
    if raw.get("rope_scaling") is not None:
        known.add("rope_scaling")
    return Qwen2Config(**{key: value for key, value in raw.items() if key in known})
