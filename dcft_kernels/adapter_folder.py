"""The folder of a saved adapter: any number of processes may save to it and load from it at once.

    folder/dcft_config.json                   settings, weights file, checksum
    folder/dcft_adapter-<random>.safetensors  the tensors

Each save writes weights under a new random name, then a config that names them, both flushed under
temporary names and renamed. Renaming the config is the moment at which a save takes effect. A crash
before it leaves the former adapter; of several saves, the last one to rename its config wins.

A save locks its files from their creation until it ends (`flock`, which the system releases if the
process is killed). Only the save that has a weights file locked puts its name into a config. So
weights that are not locked, and not named by the config after that, will never be named again. A
save deletes such files, and temporary files that are not locked, once it has taken effect and has
released its own locks: whichever of two saves is the last to look finds the other's unlocked. Its
own locks for this are shared ones, so that two that look at once do not mistake each other for the
owner. A temporary file may be deleted before its owner locks it, who then creates another one.

A load takes no lock. If the weights are missing, it starts again; if the config is still the same
then, they were not deleted by a save. On POSIX systems, an open file stays readable when deleted.

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
FORMAT_VERSIONS = (1, 2)
_ENTRIES = {"format", "format_version", "weights", "layers", "modules_to_save", "sha256"}
_WEIGHTS = re.compile(rf"{FORMAT}-[0-9a-f]{{12}}\.safetensors")
_TEMPORARY = re.compile(rf"\.({_WEIGHTS.pattern}|{re.escape(CONFIG_FILE)})\.[0-9a-f]{{8}}\.tmp")


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Save `config` and `tensors` to `folder`, which is created if needed, in place of what it has.

    Args:
        folder: other files in it are left alone.
        config: "format_version", "layers" and, in version 2, "modules_to_save".
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
    """What `write` saved to `folder`, whole, also while other processes save to it.

    Returns:
        The config: "format_version" is 1 or 2, "layers" a non-empty object, "modules_to_save" a
        list of strings if present, and the checksum right if present; it is optional in version 1.
        And the tensors.

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
            f"{path}: expected format_version 1 or 2, got {reprlib.repr(version)}; "
            "it needs another version of dcft_kernels"
        )
    # Without this, a changed bit in the name of the checksum would make it an unsigned file.
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
    """An integer, which is a size; a longer one would end in a shape or a message."""
    if len(text) > 18:
        raise ValueError(f"expected integers of at most 18 digits, got {text[:20]}...")
    return int(text)


def _checksum(config: dict[str, Any]) -> str:
    """SHA-256 of the config without its checksum, whatever its formatting; covers the weights'."""
    content = {name: value for name, value in config.items() if name != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read_bytes(path: Path, origin: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        if path.is_file():
            raise
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
            file.close()  # which tries again to write what it has not
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _flush_directory(path.parent)


def _lock(file: BinaryIO, *, shared: bool = False) -> bool:
    """Lock a file until it is closed. False: no locks here, or, if `shared`, a save has it."""
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
    """Delete a file that no save will name any more, unless the config does."""
    with contextlib.suppress(OSError):
        if path.name not in _config_text(path.parent):
            os.unlink(path)


def _config_text(folder: Path) -> str:
    """The config as it is; empty if there is none."""
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
