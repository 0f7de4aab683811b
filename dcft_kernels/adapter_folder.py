"""The folder of a saved adapter: any number of processes may save to it and load from it at once.

    folder/dcft_config.json                   settings, name of the weights file, checksum
    folder/dcft_adapter-<random>.safetensors  the tensors

A save writes its weights under a new random name, then a config that names them. Each is written
under a temporary name, flushed and renamed. A save takes effect when its config is renamed: a crash
before that leaves the former adapter, and of several saves the last to rename its config wins.

A save locks its files from their creation until it ends (`flock`, which the system releases if the
process is killed). Only the owner of a weights file writes its name into a config. So weights that
are not locked, and not named by the config read after that, will never be named again. Once it has
taken effect and released its locks, a save deletes such weights, and temporary files that are not
locked; of two overlapping saves, the last to do so finds the other's files unlocked. It takes
shared locks for this, so that two saves do not take each other for the owner. A temporary file may
be deleted before its owner locks it; the owner then creates another one.

A load takes no lock. If the weights are missing, it starts again, unless the config is still the
same: then it was not a save that deleted them. On POSIX systems, an open file stays readable when
it is deleted.

Where there are no locks (Windows, some network file systems), a save deletes only the weights that
the config named before its own, which no save can be about to name. Where locks are not shared by
machines (`local_lock` of NFS, `localflock` of Lustre), only one machine at a time may save.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import secrets
import sys
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as serialize_safetensors
from torch import Tensor

if sys.platform != "win32":
    import fcntl

CONFIG_FILE = "dcft_config.json"
FORMAT = "dcft_adapter"
FORMAT_VERSIONS = (1, 2, 3)
_ENTRIES = {"format", "format_version", "weights", "layers", "modules_to_save", "sha256"}
_WEIGHTS = re.compile(rf"{FORMAT}-[0-9a-f]{{12}}\.safetensors")
_TEMPORARY = re.compile(rf"\.({_WEIGHTS.pattern}|{re.escape(CONFIG_FILE)})\.[0-9a-f]{{8}}\.tmp")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Save `config` and `tensors` to `folder`, which is created if needed, in place of what it has.

    Args:
        folder: other files in it are left alone.
        config: "format_version", "layers" and, from version 2 on, "modules_to_save"; "format",
            "weights" and "sha256" are added.
        tensors: contiguous, on the CPU, sharing no memory.

    Raises:
        OSError: the folder cannot be written; what was saved there before is intact.
    """
    weights = serialize_safetensors(tensors, metadata={"format": FORMAT})
    weights_file = f"{FORMAT}-{secrets.token_hex(6)}.safetensors"
    config = {
        "format": FORMAT,
        "format_version": config["format_version"],
        "weights": {"file": weights_file, "sha256": hashlib.sha256(weights).hexdigest()},
    } | config
    config["sha256"] = _checksum(config)
    content = (json.dumps(config, indent=1) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    replaced = _WEIGHTS.findall(_config_text(folder))
    try:
        with contextlib.ExitStack() as locks:
            _write_file(folder / weights_file, weights, locks)
            _write_file(folder / CONFIG_FILE, content, locks)
    except BaseException:
        _delete_unnamed(folder / weights_file)
        raise
    for name in replaced:
        _delete_unnamed(folder / name)
    _sweep(folder)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What one call of `write` saved to `folder`, also while other processes save to it.

    Returns:
        The config and the tensors. "format_version" is 1, 2 or 3, "layers" a non-empty object, and
        "modules_to_save", if present, a list of strings. The checksum may be missing in version 1.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file that is truncated, changed, foreign or of a newer format version.
    """
    path, content = folder / CONFIG_FILE, b""
    while True:
        former, content = content, _read_bytes(path, "save_adapter writes it")
        config = _parse_config(path, content)
        weights_path = folder / config["weights"]["file"]
        try:
            weights = _read_bytes(weights_path, f"{CONFIG_FILE} names it")
            break
        except FileNotFoundError:
            if content == former:
                raise
    if hashlib.sha256(weights).hexdigest() != config["weights"]["sha256"]:
        raise ValueError(
            f"{weights_path}: truncated or changed since it was saved: its SHA-256 is not the one "
            f"in {CONFIG_FILE}; copy the folder again"
        )
    try:
        return config, parse_safetensors(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights_path}: not a safetensors file: {error}") from None


def _parse_config(path: Path, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content, parse_int=_parse_int)
        # Nesting that can just be parsed may be too deep to be written again.
        checksum = _checksum(config) if isinstance(config, dict) else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f'{path}: not a DCFT adapter: expected "format": "{FORMAT}"; '
            "was it written by another library?"
        )
    version = config.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise ValueError(
            f"{path}: expected format_version 1, 2 or 3, got {reprlib.repr(version)}; "
            "it needs another version of dcft_kernels"
        )
    # Otherwise a changed bit in the name "sha256" would switch off the check.
    unknown = sorted(config.keys() - _ENTRIES)
    if unknown or config.get("sha256", checksum if version == 1 else None) != checksum:
        what = f"unknown entry {reprlib.repr(unknown[0])}" if unknown else "wrong SHA-256"
        raise ValueError(
            f"{path}: truncated or changed since it was saved: {what}; copy the folder again, or "
            "to change a setting, load the adapter, change it in Python and save it again"
        )
    weights, layers = config.get("weights"), config.get("layers")
    if not (
        isinstance(weights, dict)
        and weights.keys() == {"file", "sha256"}
        and all(isinstance(value, str) for value in weights.values())
        and isinstance(layers, dict)
        and layers
    ):
        raise ValueError(f'{path}: expected "weights" with "file" and "sha256", and "layers"')
    if not _WEIGHTS.fullmatch(weights["file"]):
        raise ValueError(
            f"{path}: expected a weights file {FORMAT}-<12 hexadecimal digits>.safetensors, "
            f"got {reprlib.repr(weights['file'])}"
        )
    extra = config.get("modules_to_save", [])
    if not isinstance(extra, list) or not all(isinstance(name, str) for name in extra):
        raise ValueError(f'{path}: expected "modules_to_save" to be a list of names')
    return config


def _parse_int(text: str) -> int:
    """Limits integers, which are sizes, so that they fit into shapes and messages."""
    if len(text) > 18:
        raise ValueError(f"expected integers of at most 18 digits, got {text[:20]}...")
    return int(text)


def _checksum(config: dict[str, Any]) -> str:
    """SHA-256 of the config's content, the digest of the weights included, whatever its format."""
    content = {name: value for name, value in config.items() if name != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_bytes(path: Path, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"folder: {os.fspath(path.parent)!r} is not a directory"
            ) from None
        raise FileNotFoundError(f"{path}: no such file; {origin}") from None


def _write_file(path: Path, content: bytes, locks: contextlib.ExitStack) -> None:
    """Write under a temporary name and rename, each step flushed; locked until `locks` closes."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = locks.enter_context(temporary.open("xb"))
        if not _lock(file) or temporary.exists():
            break
    try:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "win32":  # which renames no open file
            file.close()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()  # flushes again, and fails again
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_directory(path.parent)


def _lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Lock a file until it is closed. False: there are no locks, or `shared` and a save has it."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB if shared else fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _sweep(folder: Path) -> None:
    """Delete what other saves left: files that no save has locked and the config does not name."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if _WEIGHTS.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    if _lock(file, shared=True):
                        _delete_unnamed(path)


def _delete_unnamed(path: Path) -> None:
    """Delete a file that no save is about to name, unless the config names it."""
    with contextlib.suppress(OSError):
        if path.name not in _config_text(path.parent):
            os.unlink(path)


def _config_text(folder: Path) -> str:
    """The config, unchecked; empty if there is none."""
    try:
        return (folder / CONFIG_FILE).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _flush_directory(folder: Path) -> None:
    """Make a rename survive a power failure, where the system lets directories be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
