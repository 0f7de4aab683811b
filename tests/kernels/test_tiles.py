"""The tile of a kernel: the table, the architecture it is for, and fewer rows for few tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from dcft_kernels.triton import gemm, seeded, tiles
from dcft_kernels.triton.launch import may_use_tf32
from dcft_kernels.triton.tiles import (
    Tile,
    as_architecture,
    entries,
    lookup,
    override,
    token_bucket,
)

CPU = torch.device("cpu")
PASSES = ("shrink", "shrink_backward")  # without matrix products
SEEDED = ("gemm", *PASSES)  # of a strategy for 16-bit tokens that not every GPU runs
GPUS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]


def test_every_architecture_has_a_complete_table() -> None:
    assert tiles.architectures() == ("interpreter", *GPUS)
    for architecture in tiles.architectures():
        for kernel in tiles.KERNEL_NAMES:
            for itemsize in (2, 4):
                assert entries(architecture, kernel, itemsize) or kernel in SEEDED
                for columns, tile in entries(architecture, kernel, itemsize).items():
                    sizes = [tile.tokens, tile.warps, *(s for s in tile[1:3] if s)]
                    assert all(size & (size - 1) == 0 for size in (*sizes, columns)), tile
                    assert tile.tokens >= 16 or kernel in PASSES, tile
                    assert tile.stages >= 1, tile
    for architecture in GPUS:
        runs = architecture == "sm_90"
        assert [bool(entries(architecture, kernel, 2)) for kernel in SEEDED] == [runs] * 3


def test_smallest_layers_fill_the_buffers_of_products() -> None:
    """A product loads `stages - 1` steps ahead, into the next tile at most, and x in parts."""
    for tile in entries("sm_90", "gemm", 2).values():
        steps = seeded._LEAST_FEATURES // tile.features
        assert tile.stages - 1 <= steps
        assert tile.outputs // gemm._PART_COLUMNS <= steps


def test_lookup_takes_the_narrowest_entry_that_fits() -> None:
    table = entries("sm_90", "backward", 2)
    for columns in (16, 17, 32, 33, 128):
        least = min(c for c in table if c >= columns)
        assert lookup("sm_90", "backward", 2, columns) == table[least]
    with pytest.raises(ValueError, match="columns: no tile of backward on sm_90 holds 129"):
        lookup("sm_90", "backward", 2, 129)


@pytest.mark.parametrize(
    ("capability", "shared_kib", "expected"),
    [
        ((8, 0), 163, "sm_80"),
        ((8, 6), 99, "sm_89"),  # as little shared memory as sm_89
        ((8, 7), 163, "sm_80"),
        ((8, 9), 99, "sm_89"),
        ((9, 0), 227, "sm_90"),
        ((10, 0), 227, "sm_100"),
        ((10, 3), 227, "sm_100"),
        ((12, 0), 99, "sm_89"),
    ],
)
def test_a_gpu_takes_the_nearest_table_that_fits(
    capability, shared_kib: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared_kib * 1024
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    tiles._device_architecture.cache_clear()
    try:
        assert tiles.architecture(torch.device("cuda", 0)) == expected
    finally:
        tiles._device_architecture.cache_clear()


def test_fewer_rows_until_every_multiprocessor_has_a_program(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    tile = Tile(64, 128, 0, 0, 4, 3)
    rows = {
        tokens: tile.for_tokens(token_bucket(tokens, CPU)).tokens
        for tokens in (1, 2048, 4096, 8448, 10**6)
    }
    assert rows == {1: 16, 2048: 16, 4096: 16, 8448: 64, 10**6: 64}
    assert tile.for_tokens(token_bucket(6000, CPU)).tokens == 32
    # However many tokens: three kernels to compile, no more.
    assert {tile.for_tokens(token_bucket(t, CPU)).tokens for t in range(1, 20000, 7)} == {
        16,
        32,
        64,
    }
    assert token_bucket(2**31, CPU) != token_bucket(2**31 - 1, CPU)


def test_overrides_and_architectures_end_with_their_block() -> None:
    before = lookup("sm_90", "expand", 2, 16)
    other = Tile(16, 0, 16, 0, 4, 1)
    with override("expand", other):
        assert lookup("sm_90", "expand", 2, 16) == other
        assert lookup("sm_80", "expand", 4, 64) == other
    assert lookup("sm_90", "expand", 2, 16) == before
    with as_architecture("sm_100"):
        assert tiles.architecture(CPU) == "sm_100"
    assert tiles.architecture(CPU) == "interpreter"
    with pytest.raises(ValueError, match=r"name: expected one of .*got 'sm_70'"), \
            as_architecture("sm_70"):  # fmt: skip
        pass


def test_prepared_launches_follow_the_table() -> None:
    @tiles.prepared
    def tile_of(columns: int) -> Tile:
        return lookup("sm_90", "expand", 2, columns)

    before, other = tile_of(16), Tile(16, 0, 16, 0, 4, 1)
    with override("expand", other):
        assert tile_of(16) == other
    assert tile_of(16) == before


def test_tf32_by_either_of_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_use_tf32(torch.float32) is torch.backends.cuda.matmul.allow_tf32
    assert not may_use_tf32(torch.bfloat16)

    class Newer:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self) -> bool:
            raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch.backends.cuda, "matmul", Newer())
    assert may_use_tf32(torch.float32)
