"""Checkpoints from the Hugging Face hub, by name: used where `--model` is not a folder."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError


def snapshot(name: str, weights: bool = True) -> Path:
    """The folder of the downloaded snapshot of "Qwen/Qwen2-VL-2B-Instruct" or the like.

    Only json files and, if wanted, safetensors are fetched, with a progress bar on stderr, into HF_HOME. With
    HF_HUB_OFFLINE=1 only what is there already is used. Raises FileNotFoundError that says why not.
    """
    patterns = ["*.safetensors", "*.json"] if weights else ["*.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        reason = (
            "the hub cannot be reached (or HF_HUB_OFFLINE is set) and HF_HOME has no download of it"
        )
        raise FileNotFoundError(f"no folder {name}, and {reason}") from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no folder {name}, and the hub says: {reason}") from error
