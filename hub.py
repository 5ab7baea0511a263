"""Checkpoints from the Hugging Face hub, by name: used where `--model` is not a directory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from json_files import read_json

SETTINGS = ("*.json", "*.jinja", "*.txt")  # configuration, tokenizer, merges.txt, chat template
WEIGHTS = ("*.safetensors",)
# Subdirectories hold other formats (original/, onnx/), and consolidated files
# are those of another code base.
IGNORED = ("*/*", "consolidated*")


def snapshot(name: str, weights: bool = True) -> Path:
    """Return the directory of the snapshot of a hub name such as "Qwen/Qwen2-VL-2B-Instruct".

    Only the configuration, the tokenizer's files and, if wanted, the safetensors files
    are downloaded, with a progress bar on stderr, into HF_HOME. With HF_HUB_OFFLINE=1
    only an earlier download is used.
    Raises FileNotFoundError if the name cannot be found, OSError if its download fails; either
    names the cause and what to do.
    """
    import huggingface_hub

    patterns = [*SETTINGS, *WEIGHTS] if weights else [*SETTINGS]
    try:
        path = huggingface_hub.snapshot_download(
            name, allow_patterns=patterns, ignore_patterns=[*IGNORED]
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the client raises errors of five libraries, one of them in Rust
        raise explain(name, error) from error
    directory = Path(path)
    if weights:
        check_complete(name, directory)
    return directory


def check_complete(name: str, directory: Path) -> None:
    """Raise FileNotFoundError if the snapshot lacks weight files.

    An interrupted download leaves such a snapshot.
    """
    index = "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return
    if (directory / "adapter_config.json").is_file():
        return  # its weights have another name
    if not (directory / index).is_file():
        raise FileNotFoundError(
            f"{directory}, the download of {name}, lacks model.safetensors: run again with network "
            "access if it was interrupted; a repository without safetensors files cannot be loaded"
        )
    shards = read_json(directory, index).get("weight_map")
    if not isinstance(shards, dict):
        return  # an error that the loader reports
    missing = sorted(
        {str(file) for file in shards.values() if not (directory / str(file)).exists()}
    )
    if missing:
        raise FileNotFoundError(
            f"{directory}, the download of {name}, is incomplete: it lacks {missing[0]} "
            f"({len(missing)} of {len(set(shards.values()))} files); run again with network access"
        )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those that it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(name: str, error: BaseException) -> OSError:
    """Return the error to raise instead of that of the hub client: one sentence.

    It names the cause and the remedy.
    """
    return (
        explain_disk(name, error) or explain_answer(name, error) or explain_connection(name, error)
    )


def explain_disk(name: str, error: BaseException) -> OSError | None:
    """Return the error for a cache that cannot be written; None if the disk is not the cause."""
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    for cause in causes(error):
        code = getattr(cause, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return OSError(
                f"the disk is full while downloading {name} into {cache}: free some space, or set "
                "HF_HOME to a directory on another disk"
            )
        if isinstance(cause, PermissionError) or code == errno.EROFS:
            return OSError(
                f"{name} cannot be downloaded into {cache}, which is not writable: set HF_HOME to "
                "a directory that is"
            )
    return None


def explain_answer(name: str, error: BaseException) -> OSError | None:
    """Return the error for a name or an access that the hub refuses; None if it did not refuse."""
    from huggingface_hub import errors

    missing = f"no folder {name}, and"
    if isinstance(error, errors.HFValidationError):
        return FileNotFoundError(
            f"{missing} it is not a valid hub name: expected OWNER/NAME of letters, digits, "
            "'-', '_' and '.', such as Qwen/Qwen2-VL-2B-Instruct"
        )
    if isinstance(error, errors.GatedRepoError):
        return FileNotFoundError(
            f"{missing} access to it is restricted: accept its conditions at "
            f"https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{missing} the hub's repository of that name has no main branch")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{missing} the hub has no public repository of that name: check its spelling; for a "
            "private one run `hf auth login` or set HF_TOKEN"
        )
    if not isinstance(error, errors.HfHubHTTPError):
        return None
    status = getattr(error.response, "status_code", None)
    if status is None:  # in huggingface_hub 0, what is not in the cache is such an error, too
        return None
    if status in (401, 403):
        return OSError(
            f"{missing} the hub refuses access ({status}): run `hf auth login` or set HF_TOKEN to "
            "a valid token"
        )
    return OSError(f"{missing} the hub responds with an error ({status}): try again later")


def explain_connection(name: str, error: BaseException) -> OSError:
    """Return the error for a hub that is not reached, or a connection that breaks."""
    from huggingface_hub import errors

    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
        return FileNotFoundError(
            f"the download of {name} is incomplete, and the hub cannot be reached (or "
            "HF_HUB_OFFLINE is set): run again with network access"
        )
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)
    if isinstance(error, unreachable):
        return FileNotFoundError(
            f"no folder {name}, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and "
            "HF_HOME has no download of it"
        )
    lines = str(error).strip().splitlines() or [""]
    return OSError(
        f"the download of {name} failed ({type(error).__name__}: {lines[0]}): check the network "
        "and run again, it continues where it stopped"
    )
