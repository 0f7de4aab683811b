"""The tile each kernel runs with: looked up in `tiles.json`, one table per architecture.

`python -m benchmarks.tune` measures candidates on a GPU and rewrites the table. Nothing is tuned at
run time: the first step of a new shape costs a compilation of its kernel at most, never a search.

A table is keyed by kernel, by bytes per element of the tokens (2 or 4), and by the columns that
the tokens are shrunk to (`windows.Layout.columns`; the passes in `shrink` count a row's products
instead); a call takes the entry with the fewest columns that hold its own. Kernels that an
architecture never runs have no entries. A GPU without a table takes that of the nearest older
architecture whose tiles fit into its shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

TABLE = Path(__file__).with_name("tiles.json")

KERNEL_NAMES = (
    "shrink_expand",
    "backward",
    "expand",
    "gemm",
    "shrink",
    "shrink_backward",
)


class Tile(NamedTuple):
    """The shape of one program, and how it is compiled."""

    tokens: int  # rows of x, g and y that a program holds (rows of DW: expand)
    features: int  # columns of x or g per step of its loop
    outputs: int  # columns of the result that it owns; 0 where it owns whole rows
    programs: int  # programs per multiprocessor, each looping over blocks; 0: one per block
    warps: int
    stages: int

    def for_tokens(self, bucket: TokenBucket) -> Tile:
        """The same with fewer rows where there are not enough tokens to keep the GPU busy.

        Rows are halved, down to the 16 that a matrix unit takes, until every multiprocessor has a
        program; and warps with them, so that a thread still has wide loads to do. At most three
        kernels are compiled for all numbers of tokens.
        """
        rows, warps = self.tokens, self.warps
        while rows > _MIN_ROWS and rows >= bucket.rows:
            rows, warps = rows // 2, max(_MIN_WARPS, warps // 2)
        return self._replace(tokens=rows, warps=warps)


_MIN_ROWS, _MAX_ROWS = 16, 256
_MIN_WARPS = 4


class TokenBucket(NamedTuple):
    """The part of the token count that a launch depends on: few values, so few compilations."""

    # From this many rows on, a tile leaves a multiprocessor without a program. Rounded up to a
    # power of two, as tiles' rows are, from twice the fewest of them to twice the most.
    rows: int
    is_int64: bool  # whether the number takes 64 bits, which Triton compiles for


def token_bucket(tokens: int, device: torch.device) -> TokenBucket:
    """The bucket of a token count on a device."""
    return _token_bucket(tokens, multiprocessors(device))


@functools.lru_cache(maxsize=4096)
def _token_bucket(tokens: int, multiprocessors: int) -> TokenBucket:
    others = multiprocessors - 1
    rows = 2 * _MAX_ROWS
    if tokens <= _MAX_ROWS * others:
        rows = max(2 * _MIN_ROWS, 1 << max(0, -(-tokens // others) - 1).bit_length())
    return TokenBucket(rows, tokens >= 1 << 31)


_Function = TypeVar("_Function", bound=Callable[..., Any])
_caches: list[Any] = []


def prepared(function: _Function) -> _Function:
    """Cache what `function` returns, until other tiles are to be looked up."""
    cached = functools.lru_cache(maxsize=2048)(function)
    _caches.append(cached)
    return cached  # type: ignore[return-value]


def _clear_prepared() -> None:
    for cache in _caches:
        cache.cache_clear()


# Set by `as_architecture`: what to look up instead of the device's own.
_forced: str | None = None

# Set by `override`: by kernel, the tile to take instead of the table's.
_overrides: dict[str, Tile] = {}


@contextlib.contextmanager
def as_architecture(name: str) -> Iterator[None]:
    """Use the table of another architecture: to compile for a GPU that is not there."""
    global _forced
    if name not in architectures():
        raise ValueError(f"name: expected one of {', '.join(architectures())}, got {name!r}")
    before, _forced = _forced, name
    _clear_prepared()
    try:
        yield
    finally:
        _forced = before
        _clear_prepared()


@contextlib.contextmanager
def override(kernel: str, tile: Tile) -> Iterator[None]:
    """Run a kernel with this tile, whatever the table says: to measure candidates."""
    if kernel not in KERNEL_NAMES:
        raise ValueError(f"kernel: expected one of {', '.join(KERNEL_NAMES)}, got {kernel!r}")
    before = _overrides.get(kernel)
    _overrides[kernel] = tile
    _clear_prepared()
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before
        _clear_prepared()


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    with TABLE.open(encoding="utf-8") as file:
        return json.load(file)


def architectures() -> tuple[str, ...]:
    """Names of the architectures that have a table; `interpreter` is for tests on the CPU."""
    return tuple(_table())


# Shared memory that tiles of a table may fill, in KiB per block.
_SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}
_LEAST_ARCHITECTURE = 89


@functools.cache
def _device_architecture(index: int) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    shared = properties.shared_memory_per_block_optin / 1024
    fitting = [k for k, most in _SHARED_KIB.items() if k <= capability and most <= shared]
    return f"sm_{max(fitting, default=_LEAST_ARCHITECTURE)}"


def architecture(device: torch.device) -> str:
    """The table for a device: its architecture's, or the nearest older one's."""
    if _forced is not None:
        return _forced
    if device.type != "cuda":
        return "interpreter"
    return _device_architecture(
        torch.cuda.current_device() if device.index is None else device.index
    )


@functools.cache
def entries(arch: str, kernel: str, itemsize: int) -> dict[int, Tile]:
    """The tiles of a kernel by number of columns, fewest first."""
    rows = _table()[arch].get(kernel, {}).get(str(itemsize), {})
    return {int(columns): Tile(*rows[columns]) for columns in sorted(rows, key=int)}


def lookup(arch: str, kernel: str, itemsize: int, columns: int) -> Tile:
    """The tile for a call whose tokens are shrunk to `columns`.

    Raises:
        ValueError: there is none.
    """
    if kernel in _overrides:
        return _overrides[kernel]
    for most, tile in entries(arch, kernel, itemsize).items():
        if columns <= most:
            return tile
    raise ValueError(f"columns: no tile of {kernel} on {arch} holds {columns}")


def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 2 without a GPU."""
    if device.type != "cuda" or _forced is not None:
        return 2
    return _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
