"""Models of the Hugging Face Hub in the place of folders: `ORG/NAME` and `ORG/NAME@REVISION`.

`local_folder` turns what a user names into a folder. What exists is taken as it is, so a path wins
over an id. An id becomes the folder of its snapshot in the cache of `huggingface_hub`, which does
the work: it takes the cache, the token, the endpoint and the offline mode from where it always does
(HF_HOME, `hf auth login`, HF_ENDPOINT, HF_HUB_OFFLINE).

Only what the tools read or carry along is downloaded: the weights that `weights_among` chooses, and
the side files that `side_names` lists. Pickles, GGUF and code never are.

The weights come last, so a snapshot in the cache that has all of them has everything else, too.
That is how an interrupted download is told from a finished one when the Hub cannot be asked.

Every file of a snapshot is a link to `../../blobs` of the same repository. `folder.check_link` lets
those links, and no others, leave their folder. Copies with real files (`local_dir`) would need no
exception, but would take the space of a model once more, beside the cache that vLLM serves from.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_qoq.checkpoint import transforms
from vllm_qoq.checkpoint.folder import (
    INDEX,
    NO_SIDE_FILES,
    weight_files,
    weights_among,
)
from vllm_qoq.errors import FormatError, UserError, reason, shown
from vllm_qoq.progress import human_bytes

if TYPE_CHECKING:
    from types import ModuleType

# A name begins with a letter or a digit, so that `./x/y` and `../x` are always paths.
_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\w[\w./+-]*))?", re.ASCII)
_SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".yaml", ".md")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
# By file: the library begins one that was cut off anew.
_GOES_ON = "finished files stay in the cache, and the same command goes on with the others"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


class HubError(UserError):
    """An error for a model that cannot be had from the Hugging Face Hub."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository of models on the Hub, `ORG/NAME`, and a branch, tag or commit of it."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, value: str | Path) -> HubId | None:
        """Parse `ORG/NAME` or `ORG/NAME@REVISION`; None for what cannot be an id."""
        match = _ID.fullmatch(str(value))
        # The cache has a file for each revision, whose name must not lead out of its folder.
        if match is None or ".." in str(value):
            return None
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def is_to_download(value: str | Path) -> bool:
    """Whether `value` is an id, and no path that exists."""
    return not _exists(Path(value)) and HubId.parse(value) is not None


def local_folder(value: str | Path, *, has_weights: bool = True, quiet: bool = True) -> Path:
    """Find the folder that a path or an id of the Hub names; an id is downloaded into the cache.

    value        a path, which wins if it exists, or `ORG/NAME` or `ORG/NAME@REVISION`
    has_weights  whether the weights are needed; otherwise only config, tokenizer and the like come
    quiet        show no progress

    Raises HubError for what is neither, and for an id that cannot be downloaded.
    """
    path = Path(value)
    if _exists(path):
        return path
    wanted = HubId.parse(value)
    if wanted is None:
        raise HubError(
            f"{value}: neither a folder, nothing is there, nor an id of the Hugging Face Hub "
            "(ORG/NAME or ORG/NAME@REVISION); check the path, or give an id"
        )
    return _Download(_library(), wanted).run(has_weights, quiet)


def name_of(folder: Path) -> str:
    """The name of the model in a folder: the id of a snapshot in the cache, else the folder's."""
    return id_of(folder) or folder.name


def id_of(folder: Path) -> str | None:
    """The id of the repository whose snapshot in the cache the folder is, without revision.

    Its place there is models--ORG--NAME/snapshots/COMMIT.
    """
    snapshots = folder.absolute().parent
    kind, *parts = snapshots.parent.name.split("--")
    if snapshots.name != "snapshots" or kind != "models" or len(parts) != 2:
        return None
    return "/".join(parts)


def has_file(repository: str, revision: str | None, name: str) -> bool:
    """Whether a repository has the file `name`; where the Hub cannot be asked, whether the cache.

    False for what is no repository.
    """
    import httpx
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    try:
        return HfApi().file_exists(repository, name, revision=revision)
    except errors.HFValidationError:
        return False
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx.HTTPError, OSError):
        return isinstance(try_to_load_from_cache(repository, name, revision=revision), str)


def one_file(repository: str, revision: str | None, name: str) -> Path | None:
    """Download the small file `name` of a repository into the cache; None if it cannot be had."""
    import httpx
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except (errors.HFValidationError, errors.HfHubHTTPError, httpx.HTTPError, OSError):
        return None


def side_names(names: Collection[str]) -> list[str]:
    """Choose the files beside the weights from all of a repository: what `side_files` copies.

    This is a list of what is known to belong to a model, not of what does not: a repository may
    hold gigabytes of any kind, and a file that nobody knows is not worth its download.
    """
    with_weights = {name.partition("/")[0] for name in names if name.endswith(NO_SIDE_FILES)}
    return sorted(name for name in names if _is_side(name, with_weights))


def _is_side(name: str, with_weights: Collection[str]) -> bool:
    first, slash, _ = name.partition("/")
    leaf = name.rpartition("/")[2]
    if name in (INDEX, transforms.FILE):
        return True
    if any(part.startswith((".", "__")) for part in name.split("/")):
        return False
    if (slash and first in with_weights) or name.endswith((*NO_SIDE_FILES, ".py")):
        return False
    return name.endswith(_SIDE_SUFFIXES) or leaf.upper().startswith(_LICENCES)


def _exists(path: Path) -> bool:
    try:
        # A link to nothing is a path, too: its message must not tell of the Hub.
        return path.exists() or path.is_symlink()
    except OSError:  # a name that is too long
        return False


def _library() -> ModuleType:
    """Import huggingface_hub, which takes a good part of a second and most runs do not need."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise HubError(f"{error}; install it: pip install huggingface_hub") from None
    return huggingface_hub


class _Download:
    """The download of one model, with the errors of the library in the user's terms."""

    def __init__(self, library: ModuleType, wanted: HubId) -> None:
        self._library = library
        self._wanted = wanted

    def run(self, has_weights: bool, quiet: bool) -> Path:
        try:
            with _bars(quiet):
                sizes = self._listing()
                if sizes is None:
                    return self._cached(has_weights)
                return self._fetch_all(sizes, has_weights)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self._wanted}: {_GOES_ON}") from None
        except FormatError as error:
            raise HubError(f"{self._wanted}: {error}") from None
        except UserError:
            raise
        except Exception as error:  # of the library, httpx, hf_xet and the system: all kinds
            raise HubError(f"{self._wanted}: {self._explained(error)}") from error

    def _listing(self) -> dict[str, int] | None:
        """Ask the Hub for the files and their bytes; None where it cannot be reached."""
        import httpx
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        try:
            info = self._library.HfApi().model_info(
                self._wanted.repository, revision=self._wanted.revision, files_metadata=True
            )
        except (OfflineModeIsEnabled, httpx.ConnectError, httpx.TimeoutException):
            return None
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return None
        return {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def _fetch_all(self, sizes: dict[str, int], has_weights: bool) -> Path:
        entry = weights_among(sizes, "the repository") if has_weights else None
        folder = self._fetch(side_names(sizes), self._wanted.revision)
        if entry is None:
            return folder
        files = weight_files(folder) if entry == INDEX else [entry]
        for file in files:
            if file not in sizes:
                raise HubError(
                    f"{self._wanted}: {INDEX} names {shown(file)}, which the repository lacks; "
                    "choose another revision or repository"
                )
        self._check_space(sum(sizes[f] for f in files if not (folder / f).exists()))
        # By its commit, so that both parts are of one even if the branch moves on meanwhile.
        return self._fetch(files, folder.name)

    def _fetch(self, names: Collection[str], revision: str | None) -> Path:
        return Path(
            self._library.snapshot_download(
                self._wanted.repository,
                revision=revision,
                # The library takes patterns. None of them would mean all files.
                allow_patterns=[glob.escape(name) for name in names] or ["config.json"],
            )
        )

    def _cached(self, has_weights: bool) -> Path:
        """Find the snapshot in the cache without the Hub; HubError unless it is complete."""
        folder = Path(
            self._library.snapshot_download(
                self._wanted.repository,
                revision=self._wanted.revision,
                allow_patterns=["config.json"],
                local_files_only=True,
            )
        )
        try:
            files = weight_files(folder) if has_weights else []
            missing = [file for file in files if not (folder / file).exists()]
        except FormatError:
            missing = ["model.safetensors"]
        if missing:
            raise HubError(
                f"{self._wanted}: {self._unreachable()}, and its cache lacks {shown(missing[0])}; "
                f"{self._reach()}"
            )
        return folder

    def _check_space(self, needed: int) -> None:
        place = self._cache()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise HubError(
                f"{self._wanted}: {human_bytes(needed)} are to be downloaded to {self._cache()}, "
                f"but {human_bytes(free)} are free; make room, or set HF_HOME to another disk"
            )

    def _cache(self) -> Path:
        return Path(self._library.constants.HF_HUB_CACHE).expanduser().absolute()

    def _page(self) -> str:
        return f"{self._library.constants.ENDPOINT}/{self._wanted.repository}"

    def _unreachable(self) -> str:
        if self._library.constants.is_offline_mode():
            return "the Hub is not asked, because HF_HUB_OFFLINE is set"
        return f"the Hub ({self._library.constants.ENDPOINT}) cannot be reached"

    def _reach(self) -> str:
        if self._library.constants.is_offline_mode():
            return "run it once with HF_HUB_OFFLINE=0, or give a folder"
        return "check the connection, HF_ENDPOINT and proxies, or give a folder"

    def _explained(self, error: Exception) -> str:
        """Say what is wrong and what to do, for an error of the library."""
        from huggingface_hub import errors

        if isinstance(error, errors.LocalEntryNotFoundError):
            if not isinstance(error.__cause__, errors.HfHubHTTPError):
                return f"{self._unreachable()}, and its cache lacks this model; {self._reach()}"
            error = error.__cause__  # the library looked into the cache because of this
        if isinstance(error, errors.HFValidationError):
            return (
                "neither a folder, nothing is there, nor an id that the Hub could have; check the "
                "path, or give ORG/NAME or ORG/NAME@REVISION"
            )
        if isinstance(error, errors.GatedRepoError):
            return f"is gated; ask for access at {self._page()}, then {_LOG_IN}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                "neither a folder, nothing is there, nor a repository on the Hub that you may "
                f"read; check the name, and for a private one {_LOG_IN}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return (
                f"the repository has no revision {self._wanted.revision}; give a branch, tag or "
                f"commit that {self._page()}/commits shows"
            )
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status in (401, 403):
                return f"the Hub refuses access ({status}); {_LOG_IN}, with a token that may read"
            if status == 429:
                return f"the Hub has got too many requests from here (429); wait, or {_LOG_IN}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"no room left in {self._cache()}; make room, or set HF_HOME to another disk; "
                f"{_GOES_ON}"
            )
        if isinstance(error, PermissionError | NotADirectoryError) or (
            isinstance(error, OSError) and error.errno == errno.EROFS
        ):
            return f"cannot write to {self._cache()}; get the right to it, or set HF_HOME"
        return f"the download broke off ({reason(error)}); {_GOES_ON}"


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """Hide the library's progress bars if `quiet`; the setting is of the whole process."""
    from huggingface_hub import utils

    if not quiet or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
