"""The files of one hub repo at one commit, fetched one by one, each verified.

Source   huggingface_hub: its names, tokens, endpoint, caches and errors; it resumes a body whose connection drops
Differs  huggingface_hub checks a body's length only; here its hash too. What may be a passing failure is tried again
         with growing pauses, and a wrong body is fetched once more before it is an error
"""

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from .errors import DgemmaError
from .hub import from_hub

ATTEMPTS, PAUSE = 4, 2.0  # tries of one request, and seconds before the second; doubled before each further one
PASSING = (408, 425, 429)  # HTTP statuses beside the server's own failures, 500 and above
BLOCK = 1 << 22  # bytes hashed at a time

T = TypeVar("T")


class HubFile(NamedTuple):
    name: str
    size: int  # bytes
    hash: str  # hexadecimal: sha256 of a large file, of a small one git's sha1

    @property
    def algorithm(self) -> str:
        return "sha256" if len(self.hash) == 64 else "git sha1"


class HubRepo(NamedTuple):
    name: str  # owner/name
    revision: str  # a commit, so that every request sees the same files
    files: dict[str, HubFile]


def hub_repo(name: str, revision: str | None = None) -> HubRepo:
    """What a repo holds at `revision`, or at its newest commit. Raises DgemmaError."""
    import huggingface_hub

    def ask():
        return huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)

    info = from_hub(name, lambda: again(ask))
    files = {}
    for s in info.siblings or ():
        hash = s.lfs.sha256 if s.lfs else s.blob_id
        if s.size is None or hash is None:
            raise DgemmaError(f"{name}: the hub names neither size nor hash of {s.rfilename}; try again later")
        files[s.rfilename] = HubFile(s.rfilename, s.size, hash)
    return HubRepo(name, info.sha, files)


def fetch(repo: HubRepo, file: HubFile, folder: Path) -> Path:
    """`file` in `folder`, under its name; as it is where it is there already. Verified: its length and its hash.

    Raises DgemmaError where it cannot be had, or is wrong twice.
    """
    import huggingface_hub

    where = f"{repo.name}/{file.name}"

    def get(anew):
        try:
            return huggingface_hub.hf_hub_download(
                repo.name, file.name, revision=repo.revision, local_dir=folder, force_download=anew
            )
        except OSError as error:
            if found := re.search(r"should be of size (\d+) but has size (\d+)", str(error)):  # but no network's error
                raise _WrongBody(f"found {found[2]} bytes, expected {found[1]}") from None
            raise

    for anew in (False, True):  # the second time past every cache
        try:
            path = Path(from_hub(where, lambda anew=anew: again(lambda: get(anew)), local=False))
            _check(path, file)
            return path
        except _WrongBody as error:
            wrong = error
    raise DgemmaError(f"{where}: the hub's answer was wrong twice: {wrong}; try again later")


def fetch_start(repo: HubRepo, file: HubFile, nbytes: int) -> bytes:
    """The first `nbytes` of a file, or all of a shorter one. Raises DgemmaError."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    nbytes, where = min(nbytes, file.size), f"{repo.name}/{file.name}"
    # Compressed, a range would count other bytes.
    headers = {"Range": f"bytes=0-{nbytes - 1}", "Accept-Encoding": "identity"}

    def get():
        url = hf_hub_url(repo.name, file.name, revision=repo.revision)
        found = b""
        with http_stream_backoff("GET", url, headers=build_hf_headers() | headers, timeout=30) as response:
            hf_raise_for_status(response)
            for chunk in response.iter_bytes(1 << 16):
                found += chunk
                if len(found) >= nbytes:  # a server may know no ranges, and send all 5 GB
                    break
        return found[:nbytes]

    start = from_hub(where, lambda: again(get), local=False)
    if len(start) < nbytes:
        raise DgemmaError(
            f"{where}: the hub's answer has the wrong length: found {len(start)} bytes, expected {nbytes} of a file of "
            f"{file.size}; try again later"
        )
    return start


class _WrongBody(DgemmaError):
    """Of a fetched file: found, expected."""


def _check(path, file):
    """Removes a file that is not the one wanted."""
    size = path.stat().st_size
    digest = hashlib.sha256() if file.algorithm == "sha256" else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    if found == file.hash:
        return
    path.unlink()
    if size != file.size:
        raise _WrongBody(f"found {size} bytes, expected {file.size}")
    raise _WrongBody(f"found {file.algorithm} {found}, expected {file.hash}")


def again(get: Callable[[], T]) -> T:
    """What `get` gets. A failure that may pass is tried again, ATTEMPTS times in all, after ever longer pauses."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return get()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(PAUSE * 2**attempt)
    return get()


def _may_pass(error):
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # what the client makes of a failed look at the hub
        error = error.__cause__ or error
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return status in PASSING or status >= 500
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.HFValidationError, DgemmaError)):
        return False
    # The system's own errors, as of a full disk, carry a number; the network's come wrapped.
    return not (isinstance(error, OSError) and error.errno is not None)
