"""A path or a hub repo id → a local folder.

Source   huggingface_hub: its cache, its HF_HUB_OFFLINE switch, its errors
"""

import errno
from pathlib import Path

from .errors import DgemmaError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def model_folder(path_or_repo, files=MODEL_FILES) -> Path:
    """The folder itself, or the hub snapshot of `files` (name patterns), downloaded where needed.

    Raises DgemmaError that names the repo id when it cannot be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise DgemmaError(f"{name}: found a file, expected a model folder or a hub repo id such as owner/name")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DgemmaError(f"{name}: no such folder; expected a model folder or a hub repo id such as owner/name")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except errors.HFValidationError:
        raise DgemmaError(
            f"{name}: no such folder; expected a model folder or a hub repo id such as owner/name"
        ) from None
    except errors.GatedRepoError:
        raise DgemmaError(f"{name}: the repo is gated; accept its terms on the hub, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DgemmaError(f"{name}: neither a local folder nor a repo on the hub; check the name") from None
    except Exception as error:  # the HTTP library under the hub's client, and with it the errors, change with versions
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise DgemmaError(f"{name}: the disk is full; free some space, then start again") from None
        raise DgemmaError(
            f"{name}: not in the local hub cache and the hub cannot be reached ({error or type(error).__name__}). "
            "Connect and unset HF_HUB_OFFLINE, or give a local folder"
        ) from None
