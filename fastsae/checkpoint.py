"""A run folder that survives a crash: after one at any moment, the newest checkpoint in it is whole.

    with run_lock(run):
        folder = write_checkpoint(run, step, write, keep=3)     # write(staging) puts the files there
    folder = newest(run)                                        # the newest that verifies

    run/.lock   run/step-000100/   run/step-000200/{..., MANIFEST.json}   run/.tmp-4711/ (being written by process 4711)

A checkpoint is staged in a folder of its own. Its files are flushed to the disk, then MANIFEST.json with their sizes and
hashes, then the directories; one rename gives it its name. So it is there whole or not at all. POSIX only.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .strict_json import read_json, write_json

FORMAT = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-\d{6,}")


class CheckpointError(OSError):
    """A checkpoint cannot be written, or is not what was written, or its run folder is in use."""


def write_checkpoint(
    run: Path, step: int, write: Callable[[Path], None], keep: int | None = None, need: int | None = None
) -> Path:
    """Make run/step-000123 of the files that `write(folder)` puts into the folder it is given. The caller holds run_lock(run).

    Of the checkpoints up to this step the `keep` newest stay (None: all). `need` is the expected size in bytes, by default
    that of the checkpoint before; if less is free, nothing is begun. A failure leaves the checkpoints as they were.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(f"step={step}, keep={keep}: pass step >= 0, and keep >= 1 or None to keep all")
    target, staging = run / f"step-{step:06d}", run / f".tmp-{os.getpid()}"
    before = [folder for folder in checkpoints(run) if _step(folder) < step]
    if target.exists() and _damage(target) is None:
        raise CheckpointError(f"{target} exists and is whole: checkpoints are not overwritten; remove it or use another folder")
    need = need if need is not None else _size(before[-1]) if before else 0
    free = shutil.disk_usage(run).free
    if need > free:
        raise CheckpointError(_disk_full(target, need, free))

    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write(staging)
        _seal(staging, step)
        _publish(staging, target)
    except Exception as error:
        code = _errno(error)
        if code is None:
            raise
        if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(f"{target} was not written: {error}") from error
        with suppress(OSError):
            need = max(need, _size(staging))
        raise CheckpointError(f"{_disk_full(target, need, free)} ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

    if keep is not None:
        for old in before[: max(0, len(before) + 1 - keep)]:
            try:
                _remove(old)
            except OSError as error:
                warnings.warn(f"{old} is no longer needed, but could not be removed: {error}", stacklevel=2)
    return target


def checkpoints(run: Path) -> list[Path]:
    """By step, oldest first, verified or not."""
    return sorted((path for path in run.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all. Warns about each that it passes over."""
    found = checkpoints(run)
    for folder in reversed(found):
        damage = _damage(folder)
        if damage is None:
            return folder
        warnings.warn(f"{damage}; falling back to the checkpoint before it", stacklevel=2)
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {run} is whole: start anew in another folder")
    return None


def verify(folder: Path) -> None:
    """Every file that the manifest lists has the size and the hash that it had when written. Other files are not looked at.

    Raises CheckpointError, which names the file. Takes 0.6 s/GB (sha256).
    """
    for name, expected in _read_manifest(folder).items():
        path = folder / name
        try:
            inside = path.resolve().is_relative_to(folder.resolve())  # neither ../, nor /, nor a link outwards
            got = _fingerprint(path) if inside and path.is_file() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if got is None:
            raise CheckpointError(f"{path} is {'missing' if inside else 'outside of the checkpoint'}: {MANIFEST} lists it")
        if got != expected:
            raise CheckpointError(f"{path} is damaged: expected {expected}, got {got}")


@contextmanager
def run_lock(run: Path) -> Generator[None]:
    """Only one process at a time works in the folder `run`, which is made where missing; a second one is refused at once.

    The kernel holds the lock and releases it when the process ends, however it ends; the file .lock stays and means nothing
    by itself. On NFS it holds between hosts only if the server keeps locks (not with the mount option nolock).
    """
    _make_folder(run)
    with open(run / ".lock", "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            raise CheckpointError(f"{run} is in use by {holder}: wait for it, stop it, or use another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            warnings.warn(f"nothing keeps a second run out of {run}: its file system has no locks", stacklevel=3)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        os.register_at_fork(after_in_child=file.close)  # a worker that outlives this process must not keep the lock
        for left in run.glob(".tmp-*"):  # whoever began it is dead
            shutil.rmtree(left, ignore_errors=True)
        yield


def _seal(folder: Path, step: int) -> None:
    """Flush what is in `folder`, and add the manifest of it."""
    mode = folder.stat().st_mode & 0o666  # what the umask made of 0777; safetensors writes 0600
    files: dict[str, Any] = {}
    inside = sorted(folder.rglob("*"))
    for path in inside:
        if path.is_file():
            path.chmod(mode)
            _flush(path)
            files[path.relative_to(folder).as_posix()] = _fingerprint(path)
    manifest = {"format": FORMAT, "step": step, "files": files}
    write_json(folder / MANIFEST, manifest | {"sha256": _digest(manifest)})
    _flush(folder / MANIFEST)
    for path in [*reversed(inside), folder]:  # inner ones first
        if path.is_dir():
            _flush(path)


def _publish(staging: Path, target: Path) -> None:
    if target.exists():  # it is damaged
        _remove(target)
    os.rename(staging, target)
    try:
        _flush(target.parent)
    except OSError:
        os.rename(target, staging)  # it might not survive a power failure, and its place must be free for the next try
        raise


def _read_manifest(folder: Path) -> dict[str, Any]:
    """name -> fingerprint."""
    path = folder / MANIFEST
    try:
        if path.is_symlink() or not path.is_file():
            raise FileNotFoundError("there is no such file")
        content = read_json(path)
        seal = content.pop("sha256")
        if seal != _digest(content):
            raise ValueError(f"its own sha256 should be {_digest(content)} and is {seal}")
        if content["format"] > FORMAT:
            raise ValueError(f"it has format {content['format']}, this version reads up to {FORMAT}: install a newer fastsae")
        if _NAME.fullmatch(folder.name) and content["step"] != _step(folder):
            raise ValueError(f"it belongs to step {content['step']}")
        return dict(content["files"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a whole checkpoint: {type(error).__name__}: {error}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _damage(folder: Path) -> OSError | None:
    try:
        verify(folder)
    except OSError as error:
        return error
    return None


def _remove(folder: Path) -> None:
    """Renamed first: a crash in between must not leave half of it under its name."""
    trash = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def _make_folder(run: Path) -> None:
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    for folder in new:
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _errno(error: Exception) -> int | None:
    """Of an OSError, or of what Rust says in the text of one."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else None


def _disk_full(target: Path, need: int, free: int) -> str:
    return (
        f"{target} was not written: it needs at least {need / 1e6:.1f} MB, and {free / 1e6:.1f} MB were free. The checkpoints "
        "before it are intact: free some space, or keep fewer of them"
    )
