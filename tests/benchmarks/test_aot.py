"""Kernels compile for GPUs that are not here, fit into them, and the stored table says so."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels that are interpreted do not compile", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks import aot  # noqa: E402
from benchmarks.absent_gpu import dropping  # noqa: E402
from benchmarks.aot import CASES, FIRST, TARGETS, Case, Job, Key, Record, Variant  # noqa: E402
from dcft_kernels.triton import tiles  # noqa: E402

MAIN = [case for case in CASES if case.name == FIRST]
GOOD = Record(
    "sm_90", "shrink_expand", "bf16", "fp32", "columns16", "64 128 0 0 4 3",
    registers=132, spills=0, lane_spills=0,
    shared_bytes=53504, shared_limit=232448, tensor_memory=0,
    products=2, matrix_instructions=9, in_flight=0, may_spill=0,
    alignable=1, wide_loads=24, narrow_loads=0,
    instructions=1208, triton="3.7.1", fingerprint="0123456789abcdef",
)  # fmt: skip


@pytest.fixture(scope="module")
def shipped() -> dict[Key, tuple[Job, Variant]]:
    return aot.all_variants()


def main_variant(architecture: str = "sm_90", kernel: str = "shrink_expand") -> Variant:
    (case,) = (case for case in MAIN if case.kernel == kernel)
    return aot.variants_of(case, architecture, "bf16", "fp32")[0]


# The proof itself: a slice of it here, all of it in the stored table.


@pytest.mark.parametrize("case", MAIN, ids=lambda case: case.kernel)
@pytest.mark.parametrize("architecture", TARGETS)
def test_main_variants_fit(architecture: str, case: Case) -> None:
    for variant in aot.variants_of(case, architecture, "bf16", "fp32"):
        record = aot.measure(variant)
        print(aot.table([record]))
        assert aot.failures(record) == []


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("DCFT_AOT"), reason="compiles everything for many minutes: set DCFT_AOT=1"
)
def test_all_variants_fit(tmp_path: Path) -> None:
    records, wrong = aot.compile_all(path=tmp_path / "table.csv", fresh=True)
    print(aot.table(records))
    assert wrong == []


def test_the_stored_table_is_complete(shipped: dict[Key, tuple[Job, Variant]]) -> None:
    """Refresh it with `python -m benchmarks.aot`."""
    stored = aot.read()
    missing = [" ".join(key) for key in shipped if key not in stored]
    surplus = [" ".join(key) for key in stored if key not in shipped]
    assert not missing, f"not in {aot.RESULTS.name}, run python -m benchmarks.aot: {missing}"
    assert not surplus, f"only in {aot.RESULTS.name}, run python -m benchmarks.aot: {surplus}"


def test_the_stored_table_is_current(shipped: dict[Key, tuple[Job, Variant]]) -> None:
    """Fingerprints are Triton's to define: another version's cannot be compared."""
    stored = aot.read()
    versions = {record.triton for record in stored.values()}
    if versions != {triton.__version__}:
        pytest.skip(f"stored with triton {', '.join(versions)}, here is {triton.__version__}")
    stale = [
        " ".join(key)
        for key, record in stored.items()
        if key in shipped and not aot.is_current(record, shipped[key][1])
    ]
    assert not stale, f"out of date in {aot.RESULTS.name}, run python -m benchmarks.aot: {stale}"


def test_the_stored_table_has_no_failures() -> None:
    stored = aot.read().values()
    assert [
        (" ".join(record.key), text) for record in stored for text in aot.failures(record)
    ] == []


def test_every_tile_has_a_variant(shipped: dict[Key, tuple[Job, Variant]]) -> None:
    covered = {
        (key.architecture, key.kernel, aot.DTYPES[key.dtype].itemsize, variant.tile)
        for key, (_, variant) in shipped.items()
    }
    for architecture in tiles.architectures():
        if architecture == "interpreter":
            continue
        for kernel in tiles.KERNELS:
            for itemsize in (2, 4):
                for columns, tile in tiles.entries(architecture, kernel, itemsize).items():
                    text = " ".join(map(str, tile))
                    where = (architecture, kernel, itemsize, text)
                    assert where in covered, f"no case of {kernel} has {columns} columns"


def test_every_architecture_is_compiled_for() -> None:
    assert set(TARGETS) == set(tiles.architectures()) - {"interpreter"}
    assert set(TARGETS) <= set(aot.SHARED_LIMITS)


def test_every_dtype_and_kernel_is_compiled(shipped: dict[Key, tuple[Job, Variant]]) -> None:
    found = {(key.architecture, key.kernel, key.dtype, key.adapter_dtype) for key in shipped}
    for architecture in TARGETS:
        for kernel in tiles.KERNELS:
            for dtype in aot.DTYPES:
                if not tiles.entries(architecture, kernel, aot.DTYPES[dtype].itemsize):
                    assert kernel == "fused_backward"
                    continue
                assert (architecture, kernel, dtype, "fp32") in found
                assert (architecture, kernel, dtype, dtype) in found


# What must hold, on records that break it.


def test_a_good_record_passes() -> None:
    assert aot.failures(GOOD) == []


@pytest.mark.parametrize(
    ("check", "fault", "text"),
    [
        (aot.check_spills, {"spills": 8}, "spills: expected 0, got 8"),
        (aot.check_shared_memory, {"shared_bytes": 232449}, "expected 232448 bytes or less"),
        (aot.check_shared_memory, {"tensor_memory": 513}, "expected 512 columns or fewer"),
        (aot.check_matrix_instructions, {"matrix_instructions": 0}, "expected some for 2"),
        (aot.check_products_in_flight, {"in_flight": 1}, "expected none when a loop goes on"),
        (aot.check_wide_loads, {"narrow_loads": 1}, "24 wide, 1 narrow"),
        (aot.check_wide_loads, {"wide_loads": 0}, "0 wide, 0 narrow"),
    ],
)
def test_a_fault_is_named(check: Any, fault: dict[str, int], text: str) -> None:
    record = GOOD._replace(**fault)
    assert text in (check(record) or "")
    assert aot.failures(record) == [check(record)]


@pytest.mark.parametrize(
    "exempt",
    [
        {"shared_bytes": 232448},  # just fits
        {"products": 0, "matrix_instructions": 0},  # float32
        {"lane_spills": 9},  # they do not reach memory
        {"alignable": 0, "wide_loads": 0, "narrow_loads": 9},  # ragged or overlapping windows
    ],
)
def test_what_is_allowed_passes(exempt: dict[str, int]) -> None:
    assert aot.failures(GOOD._replace(**exempt)) == []


# The same faults in real binaries.


@triton.jit
def _plain_product_kernel(x_ptr, w_ptr, y_ptr, length, BLOCK: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        x = tl.load(x_ptr + row * length + start + column)
        w = tl.load(w_ptr + (start + row) * BLOCK + column)
        y = tl.dot(x, w, y)
    tl.store(y_ptr + row * BLOCK + column, y)


@pytest.mark.parametrize(("architecture", "in_flight"), [("sm_90", 1), ("sm_80", 0)])
def test_products_that_a_loop_leaves_running_are_found(architecture: str, in_flight: int) -> None:
    """A product that its operands' buffers are enough for, but a loop that has to be looked at."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*fp32", "length": "i32"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(4)}
    source = ASTSource(_plain_product_kernel, types | {"BLOCK": "constexpr"}, {(4,): 64}, aligned)
    compiled = triton.compile(source, target=TARGETS[architecture], options={"num_warps": 4})
    assert aot.products_in_flight(str(compiled.asm["ttgir"])) == in_flight


@pytest.mark.parametrize(
    ("architecture", "limit"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8})]
)
def test_spills_are_found(architecture: str, limit: dict[str, object]) -> None:
    variant = main_variant(architecture)
    launch = variant.launch._replace(options=variant.launch.options | limit)
    record = aot.measure(variant._replace(launch=launch))
    assert aot.check_spills(record) is not None


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
def test_narrow_loads_are_found(architecture: str) -> None:
    variant = main_variant(architecture)
    unaligned = {**variant.launch.attributes, (0,): []}
    assert variant.launch.function.arg_names[0] == "x_ptr"
    record = aot.measure(variant._replace(launch=variant.launch._replace(attributes=unaligned)))
    assert record.wide_loads == 0
    assert aot.check_wide_loads(record) is not None


# Recording.


def test_recording_launches_nothing_and_leaves_nothing_behind() -> None:
    config, knobs = triton.runtime.driver, triton.knobs.runtime
    before = config._active, knobs.jit_cache_hook
    x, u = torch.zeros(32, 64), torch.zeros(32, 8)
    setting = aot.Setting(aot.Geometry.build(64, 64, 1, (8, 8), (8, 8)), x.dtype, x.dtype)
    with aot.recording("sm_80") as launches:
        aot.shrink_expand(x, setting.adapter, u=u)
        aot.shrink_expand(x, setting.adapter, u=u)
    assert [launch.kernel for launch in launches] == ["_shrink_expand_kernel"] * 2
    assert launches[0].fingerprint == launches[1].fingerprint
    assert u.eq(0).all()
    assert (config._active, knobs.jit_cache_hook) == before
    assert tiles.architecture(x.device) == "interpreter"


def test_recording_sees_what_was_launched_elsewhere() -> None:
    """Kernels that were compiled for launches to be dropped are not known to a recording."""
    (case,) = (case for case in MAIN if case.kernel == "backward")
    alone = [variant.launch.kernel for variant in aot.variants_of(case, "sm_90", "bf16", "fp32")]
    with dropping("sm_90"):
        case.launch(aot.Setting(case.geometry, torch.bfloat16, torch.float32, False, case.tokens))
    again = [variant.launch.kernel for variant in aot.variants_of(case, "sm_90", "bf16", "fp32")]
    assert again == alone
    assert len(alone) == 2


def test_recording_ends_on_an_error() -> None:
    before = triton.runtime.driver._active
    with pytest.raises(KeyError), aot.recording("sm_80"):
        raise KeyError
    assert triton.runtime.driver._active is before
    assert triton.knobs.runtime.jit_cache_hook is None


def test_recording_needs_kernels_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected unset, got 1"):
        main_variant()


def test_a_launch_is_what_the_table_says() -> None:
    launch = main_variant("sm_89").launch
    tile = tiles.lookup("sm_89", "shrink_expand", 2, 16)
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (tile.warps, tile.stages)
    position = launch.function.arg_names.index("BLOCK_T")
    assert launch.constants[(position,)] == tile.tokens
    assert launch.signature["x_ptr"] == "*bf16"
    assert launch.signature["A_ptr"] == "*fp32"
    assert launch.signature["base_ptr"] == "constexpr"  # None


# Fingerprints.

KERNEL = '''
import triton
import triton.language as tl

FACTOR = tl.constexpr(2)

@triton.jit
def helper(x):
    """About the helper."""
    return x * FACTOR

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    """About the kernel."""
    where = x_ptr + tl.arange(0, BLOCK)
    tl.store(where, helper(tl.load(where)))  # a comment
'''


def loaded(folder: Path, text: str) -> ModuleType:
    path = folder / f"kernel_{len(list(folder.iterdir()))}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("About the kernel", "Something else", True),
        ("About the helper", "Something else", True),
        ("  # a comment", "", True),
        ("import triton\n", "import triton\n\n\n", True),
        ("x * FACTOR", "x + FACTOR", False),
        ("constexpr(2)", "constexpr(3)", False),
        ("x_ptr + tl", "x_ptr - tl", False),
    ],
)
def test_fingerprints_follow_the_code(tmp_path: Path, old: str, new: str, same: bool) -> None:
    assert old in KERNEL
    launch = main_variant().launch
    before, after = (
        launch._replace(function=loaded(tmp_path, text).kernel).fingerprint
        for text in (KERNEL, KERNEL.replace(old, new, 1))
    )
    assert (before == after) == same


def test_fingerprints_follow_the_specialisation() -> None:
    launch = main_variant().launch
    others = [
        launch._replace(architecture="sm_100"),
        launch._replace(options=launch.options | {"num_warps": 16}),
        launch._replace(constants=launch.constants | {(2,): 2}),
        launch._replace(signature=launch.signature | {"x_ptr": "*fp16"}),
        launch._replace(attributes={}),
    ]
    assert len({launch.fingerprint, *(other.fingerprint for other in others)}) == 6


# Reading binaries.

SASS = """
	//## File "/somewhere/kernel.py", line 7
        /*0010*/                   LDGSTS.E.BYPASS.128 [R33], desc[UR44][R12.64], P1 ;
        /*0020*/              @!P0 LDG.E.64.CONSTANT R2, desc[UR44][R12.64] ;
        /*0030*/                   LDGDEPBAR ;
	//## File "/somewhere/helper.py", line 9
        /*0040*/                   LDG.E R2, desc[UR44][R12.64] ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*0070*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], !UPT ;
        /*0080*/                   UTMALDG.2D [UR16], [UR4] ;
        /*0090*/                   STL [R1], R3 ;
        /*00a0*/                   LDL.LU R3, [R1] ;
        /*00b0*/                   FFMA R1, R2, R3, R4 ;
"""
USAGE = """
 Function kernel:
  REG:40 STACK:8 SHARED:1040 LOCAL:4 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_sass_is_read() -> None:
    binary = aot.read_sass(SASS, USAGE, reserved=1024)
    assert binary.loads == [
        ("kernel.py", 7, True),
        ("kernel.py", 7, False),
        ("helper.py", 9, False),
        ("helper.py", 9, True),
    ]
    assert binary[:6] == (40, 12, 0, 16, 3, 11)
    spilling = aot.read_sass(
        SASS, USAGE.replace("STACK:8", "STACK:0").replace("LOCAL:4", "LOCAL:0")
    )
    assert spilling.spills == 2
    with pytest.raises(ValueError, match="expected one kernel"):
        aot.read_sass("", USAGE)


GCN = """
	.file	1 "/somewhere" "kernel.py"
	.file	2 "/somewhere" "helper.py"
	.loc	1 7 16 is_stmt 0               ; kernel.py:7:16
	buffer_load_dwordx4 v[10:13], v4, s[64:67], 0 offen
	global_load_dwordx2 v[1:2], v4, s[64:65]
.Ltmp1:
	.loc	2 9 3                          ; helper.py:9:3 @[ kernel.py:8:1 ]
	global_load_ushort v1, v4, s[64:65]
	v_mfma_f32_16x16x16_bf16 v[2:5], v[70:71], v[54:55], v[2:5]
	s_endpgm
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 2
    .vgpr_count:     87
    .vgpr_spill_count: 9
"""


def test_amdgcn_is_read() -> None:
    binary = aot.read_amdgcn(GCN)
    assert binary.loads == [
        ("kernel.py", 7, True),
        ("kernel.py", 7, False),
        ("helper.py", 9, False),
    ]
    assert binary[:6] == (87, 9, 2, 0, 1, 5)
    with pytest.raises(ValueError, match="expected one kernel"):
        aot.read_amdgcn("")


TTIR = """
#loc = loc("/somewhere/kernel.py":1:0)
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), \
%0: !tt.ptr<f32> loc("a_ptr"(#loc)), %n: i32 loc("n"(#loc))) attributes {noinline = false} {
    %1 = tt.splat %x_ptr : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#loc1)
    %2 = tt.splat %0 : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc1)
    %3:2 = scf.for %i = %c0 to %n step %c1 iter_args(%p = %1, %q = %2) -> (i32)  : i32 {
      %x = tt.load %p, %mask, %other : tensor<64x!tt.ptr<bf16>> loc(#loc3)
      %a = tt.load %q, %mask, %other : tensor<64x!tt.ptr<f32>> loc(#loc4)
      %u = tt.dot %x, %a, %c : tensor<64x16xbf16> * tensor<16x16xbf16> -> \
tensor<64x16xf32> loc(#loc1)
      %v = tt.dot %u, %a, %c : tensor<64x16xf32> * tensor<16x16xf32> -> \
tensor<64x16xf32> loc(#loc1)
      %w = tt.dot %u, %a, %c, inputPrecision = tf32 : tensor<64x16xf32> * tensor<16x16xf32> -> \
tensor<64x16xf32> loc(#loc1)
      %next = tt.addptr %p, %c : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc1)
      %y = tt.load %next : tensor<64x!tt.ptr<bf16>> loc(#loc5)
#loc1 = loc("/somewhere/kernel.py":5:1)
#loc2 = loc("/somewhere/helper.py":9:3)
#loc3 = loc("x"(#loc1))
#loc4 = loc(callsite(#loc2 at #loc1))
#loc5 = loc("y"(#loc4))
"""


def test_loads_are_traced_to_their_arguments() -> None:
    arguments = ["x_ptr", "a_ptr", "n"]
    assert aot.token_loads(TTIR, arguments, {"x_ptr"}) == {("kernel.py", 5), ("helper.py", 9)}
    assert aot.token_loads(TTIR, arguments, {"a_ptr"}) == {("helper.py", 9)}
    assert aot.token_loads(TTIR, arguments, set()) == set()


def test_products_for_the_matrix_unit_are_counted() -> None:
    assert aot.matrix_products(TTIR) == 2


# The table.


def test_records_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.csv"
    assert aot.read(path) == {}
    other = GOOD._replace(case="overlap", spills=3)
    aot.write([GOOD, other], path)
    assert aot.read(path) == {GOOD.key: GOOD, other.key: other}
    path.write_text("wrong,header\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the columns"):
        aot.read(path)


def test_the_table_prints() -> None:
    header, row = aot.table([GOOD]).splitlines()
    assert header.split()[:3] == ["architecture", "kernel", "dtype"]
    assert row.split()[:3] == ["sm_90", "shrink_expand", "bf16"]
    assert "fingerprint" not in header


def test_what_is_current_is_not_compiled_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--only", "^sm_80 sum_partials bf16 fp32 columns16$", "--jobs", "1"]
    options += ["--results", str(tmp_path / "table.csv")]
    assert aot.main(options) == 0
    assert "[1/1" in capsys.readouterr().out
    assert aot.main(options) == 0
    assert "[1/" not in capsys.readouterr().out
