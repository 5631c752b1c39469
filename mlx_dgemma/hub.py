"""A path or a hub repo id → a local folder or GGUF file.

Source   huggingface_hub: its cache, its HF_HUB_OFFLINE switch, its errors
"""

import errno
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from .errors import DgemmaError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
EXPECTED = "expected a model folder, a GGUF file, or a hub repo id such as owner/name or owner/name/FILE.gguf"


def model_path(path_or_repo, files=MODEL_FILES) -> Path:
    """A model folder, or a GGUF file: as given, the only one in a folder, or from the hub (owner/name/FILE.gguf).

    Raises DgemmaError that names what cannot be had, or the GGUF files to choose from.
    """
    path = Path(path_or_repo).expanduser()
    name = str(path_or_repo)
    if path.is_file():
        return path
    if name.endswith(".gguf") and name.count("/") >= 2 and not path.exists() and not name.startswith((".", "/", "~")):
        owner, repo, file = name.split("/", 2)  # repos keep some types in folders
        return _gguf_from_hub(f"{owner}/{repo}", file)
    folder = model_folder(path_or_repo, files)
    if path.is_dir():
        found = _models(file.name for file in folder.glob("*.gguf"))
    else:
        # Without "*.safetensors" among `files` their absence says nothing; a config.json comes with GGUF repos too.
        complete = any(folder.glob("*.safetensors")) or "*.safetensors" not in files
        found = [] if complete else _gguf_names(name)
    if not found or any(folder.glob("*.safetensors")):
        return folder
    if len(found) == 1 and path.is_dir():
        return folder / found[0]
    some = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
    raise DgemmaError(f"{name}: holds {len(found)} GGUF files ({some}); name one, as {name}/{found[0]}")


def model_folder(path_or_repo, files=MODEL_FILES) -> Path:
    """The folder itself, or the hub snapshot of `files` (name patterns), downloaded where needed.

    Raises DgemmaError that names the repo id when it cannot be had.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_repo)
    if path.exists():
        raise DgemmaError(f"{name}: found a file, {EXPECTED}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DgemmaError(f"{name}: no such folder or file; {EXPECTED}")
    import huggingface_hub

    return from_hub(name, lambda: Path(huggingface_hub.snapshot_download(name, allow_patterns=files)))


def _gguf_from_hub(repo, file) -> Path:
    import huggingface_hub

    return from_hub(f"{repo}/{file}", lambda: Path(huggingface_hub.hf_hub_download(repo, file)))


def _gguf_names(repo) -> list[str]:
    import huggingface_hub

    names = from_hub(repo, lambda: huggingface_hub.HfApi().list_repo_files(repo))
    return _models(name for name in names if name.endswith(".gguf"))


def _models(names) -> list[str]:
    """Vision towers travel beside GGUF models as mmproj files; they are no model of their own."""
    return sorted(name for name in names if not Path(name).name.startswith("mmproj"))


def from_hub(name: str, get: Callable, local: bool = True):
    """What `get` gets from the hub, with every failure as one error of the user's.

    local: a folder or a file of the hub's cache would have done instead.
    """
    from huggingface_hub import errors

    try:
        return get()
    except DgemmaError:
        raise
    except errors.HFValidationError:
        raise DgemmaError(f"{name}: no such folder or file; {EXPECTED}") from None
    except errors.GatedRepoError:
        raise DgemmaError(f"{name}: the repo is gated; accept its terms on the hub, then run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise DgemmaError(f"{name}: the hub no longer has the commit this began with; remove what it left") from None
    except errors.RepositoryNotFoundError:
        raise DgemmaError(f"{name}: neither a local folder nor a repo on the hub; check the name") from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # not in the cache, and the hub was not asked
            raise _unreachable(name, error, local) from None
        raise DgemmaError(f"{name}: the repo has no such file; check the name on the hub") from None
    except Exception as error:  # the HTTP library under the hub's client, and with it the errors, change with versions
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise DgemmaError(f"{name}: the disk is full; free some space, then start again") from None
        raise _unreachable(name, error, local) from None


def _unreachable(name, error, local):
    off = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    why = "the hub is switched off by HF_HUB_OFFLINE" if off else _failure(error)
    if not local:
        mend = "unset HF_HUB_OFFLINE" if off else "connect"
        return DgemmaError(f"{name}: {why}; {mend}, then try again")
    mend = "unset HF_HUB_OFFLINE" if off else "connect (HF_HUB_OFFLINE=1 looks in the cache only)"
    return DgemmaError(
        f"{name}: no such folder here, not in the local hub cache, and {why}; {mend}, or give a local folder or file"
    )


def _failure(error):
    from huggingface_hub.errors import HfHubHTTPError

    for cause in (error, error.__cause__):
        if isinstance(cause, HfHubHTTPError):
            return f"the hub answers with HTTP status {cause.response.status_code}"
    return f"the hub cannot be reached ({kind(error)})"


# What the commonest failures of a connection mean; others go by their type's name.
FAILURES = (
    (socket.gaierror, "its name is not found: no network?"),
    (ConnectionRefusedError, "connection refused"),
    (TimeoutError, "no answer in time"),
    (ssl.SSLError, "no trusted connection"),
)


def kind(error: BaseException) -> str:
    """The innermost cause in few words: libraries wrap a refused connection several times, in many."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return next((words for type_, words in FAILURES if isinstance(error, type_)), type(error).__name__)
