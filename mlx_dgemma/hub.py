"""A path or a hub repo id → a local folder.

Source   huggingface_hub: its cache, its HF_HUB_OFFLINE switch, its errors
"""

import errno
import os
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
        off = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "the hub is switched off by HF_HUB_OFFLINE" if off else f"the hub cannot be reached ({kind(error)})"
        mend = "unset HF_HUB_OFFLINE" if off else "connect (HF_HUB_OFFLINE=1 looks in the cache only)"
        raise DgemmaError(
            f"{name}: no such folder here, not in the local hub cache, and {why}; {mend}, or give a local folder"
        ) from None


def kind(error: BaseException) -> str:
    """The innermost cause's type: libraries wrap a refused connection several times, in many words."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return type(error).__name__
