"""Kernels compile for absent GPUs, and forbidden needs of a binary are found."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)
triton = pytest.importorskip("triton")

from benchmarks.aot import binaries  # noqa: E402
from benchmarks.aot.cases import CASES  # noqa: E402
from benchmarks.aot.compiling import (  # noqa: E402
    GPU_TARGETS,
    MULTIPROCESSORS,
    Job,
    Record,
    compile_job,
    compiling_for,
    jobs,
)
from dcft_kernels.triton import tiles  # noqa: E402
from dcft_kernels.triton.launch import Launch  # noqa: E402

GOOD = Record("sm_90", "gemm", "bf16", "columns16", 121, 0, 53504, 8, 2, 2, 9, 1, "3.7.1")


def main_job(architecture: str, launcher: str, case: str = "columns16"):
    (job,) = jobs(f"^{architecture} {launcher} bf16 {case}$")
    return job


MAIN = jobs(" bf16 (columns16|columns16-backward-A|products4096)$")


@pytest.mark.parametrize("job", MAIN, ids=lambda job: job.name)
def test_main_cases_fit(job: Job) -> None:
    records = compile_job(job)
    assert records
    for record in records:
        assert record.failures() == []
        assert record.registers > 0


@pytest.mark.parametrize("case", ["dropout", "overlap", "sliced", "per_rank4"])
@pytest.mark.parametrize("launcher", ["shrink_expand", "backward"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_cases_with_most_registers_fit(architecture: str, launcher: str, case: str) -> None:
    records = compile_job(main_job(architecture, launcher, case))
    assert [failure for record in records for failure in record.failures()] == []


@pytest.mark.parametrize(
    ("launcher", "case", "instruction"),
    [
        ("shrink", "products4096", "launch_dependents"),
        ("shrink_backward", "products4096", "launch_dependents"),
        ("gemm", "columns16", "wait"),
        ("gemm", "sums", "wait"),
    ],
)
def test_dependent_launches_are_compiled(launcher: str, case: str, instruction: str) -> None:
    """What a Hopper GPU runs: a launch that starts early waits for the one before it."""
    job = main_job("sm_90", launcher, case)
    with compiling_for("sm_90") as compiled:
        CASES[job.case].run("bf16")
    (found,) = compiled
    assert f"griddepcontrol.{instruction}" in found.kernel.asm["ptx"]
    assert found.kernel.metadata.launch_pdl == (instruction == "wait")


def test_every_architecture_kernel_and_dtype_has_jobs() -> None:
    assert set(GPU_TARGETS) == set(MULTIPROCESSORS) == set(tiles.architectures()) - {"interpreter"}
    found = {(job.architecture, CASES[job.case].launcher, job.dtype) for job in jobs()}
    for architecture, kernel in itertools.product(GPU_TARGETS, tiles.KERNEL_NAMES):
        for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
            if tiles.entries(architecture, kernel, itemsize):
                assert (architecture, kernel, dtype) in found


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"spills": 8}, "spills 8 bytes with 121 registers"),
        (
            {"shared_bytes": 232449, "programs": 0},
            "needs 232449 bytes of shared memory, of 232448",
        ),
        ({"registers": 129}, "fits 1 times, and its tile counts on 2"),
        ({"shared_bytes": 115713}, "fits 1 times, and its tile counts on 2"),
        ({"matrix_instructions": 0}, "computes 2 products without matrix instructions"),
        ({"in_flight": 0}, "waits for every product before the next"),
    ],
)
def test_faults_are_named(fault: dict[str, int], text: str) -> None:
    assert GOOD.failures() == []
    assert GOOD._replace(products=0, matrix_instructions=0).failures() == []  # float32
    assert GOOD._replace(kernel="backward", in_flight=None).failures() == []
    assert GOOD._replace(registers=128, shared_bytes=115712).failures() == []
    assert GOOD._replace(registers=129, case="overlap").failures() == []
    assert GOOD._replace(**fault).failures() == [f"sm_90 gemm bf16 columns16: {text}"]


@pytest.mark.parametrize(
    ("architecture", "limit"), [("sm_80", {"maxnreg": 64}), ("gfx942", {"waves_per_eu": 8})]
)
def test_spills_are_found(
    architecture: str, limit: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = triton.JITFunction.run

    def limited(self, *args, **options):
        return run(self, *args, **options, **limit)

    monkeypatch.setattr(triton.JITFunction, "run", limited)
    assert any(record.spills for record in compile_job(main_job(architecture, "shrink_expand")))


def test_compiling_launches_nothing_and_leaves_nothing_behind() -> None:
    (case,) = (c for c in CASES if c.launcher == "shrink_expand" and c.name == "update")
    patched = lambda: (triton.runtime.driver._active, triton.JITFunction.run, Launch.__init__)  # noqa: E731
    before = patched()
    with compiling_for("sm_80") as compiled:
        case.run("fp32")
        case.run("fp32")
    assert [each.name for each in compiled] == ["shrink_expand"] * 2
    assert patched() == before
    assert tiles.architecture(torch.device("cpu")) == "interpreter"
    with pytest.raises(KeyError), compiling_for("sm_80"):
        raise KeyError
    assert patched() == before


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected unset"):
        compile_job(main_job("sm_80", "backward"))


SASS = """
        /*0010*/                   LDGSTS.E.BYPASS.128 [R33], desc[UR44][R12.64], P1 ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 HMMA.16816.F32.BF16 R4, R4, R6, R8 ;
        /*0070*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], !UPT ;
        /*0090*/                   STL [R1], R3 ;
        /*00a0*/                   LDL.LU R3, [R1] ;
"""
USAGE = "REG:40 STACK:8 SHARED:1040 LOCAL:4 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0"
GCN = """
	buffer_load_dwordx4 v[10:13], v4, s[64:67], 0 offen
	v_mfma_f32_16x16x16_bf16 v[2:5], v[70:71], v[54:55], v[2:5]
    .private_segment_fixed_size: 8
    .sgpr_spill_count: 2
    .vgpr_count:     87
    .vgpr_spill_count: 9
"""


def test_assembly_is_read() -> None:
    assert binaries.read_sass(SASS, USAGE, reserved=1024) == (40, 12, 16, 3, None)
    clean = USAGE.replace("STACK:8", "STACK:0").replace("LOCAL:4", "LOCAL:0")
    assert binaries.read_sass(SASS, clean).spills == 2  # instructions on local memory
    assert binaries.read_amdgcn(GCN) == (87, 9, 0, 1, None)
    for read in (lambda: binaries.read_sass("", USAGE), lambda: binaries.read_amdgcn("")):
        with pytest.raises(ValueError, match="expected one kernel, got none"):
            read()


def test_products_for_the_matrix_unit_are_counted() -> None:
    ttir = """
      %u = tt.dot %x, %a, %c : tensor<64x16xbf16> * tensor<16x16xbf16> -> tensor<64x16xf32>
      %v = tt.dot %u, %a, %c : tensor<64x16xf32> * tensor<16x16xf32> -> tensor<64x16xf32>
      %w = tt.dot %u, %a, %c, inputPrecision = tf32 : tensor<64x16xf32> * tensor<16x16xf32> -> ()
    """
    assert binaries.matrix_products(ttir) == 2
    assert binaries.matrix_products(TTGIR) == 2


# The loop of products, and after it the last product, for which the kernel waits.
TTGIR = """
    %count:4 = scf.for %turn = %c0 to %17 step %c1 iter_args(%tile_29 = %tile) -> (i32)  : i32 {
      %acc:2 = scf.for %step = %c0 to %steps step %c1 iter_args(%acc_49 = %cst) -> (i32)  : i32 {
        %token_54 = ttng.warp_group_dot %a, %b, %acc_49, %true {isAsync = true} : \
!ttg.memdesc<128x64xbf16, #shared, #smem> * !ttg.memdesc<64x256xbf16, #shared3, #smem> -> ()
        %acc_55 = ttng.warp_group_dot_wait %token_54 {pendings = 1 : i32} : tensor<128x256xf32>
        scf.if %33 {
          ttng.async_tma_store_wait {pendings = 0 : i32}
        }
        scf.yield %acc_55
      }
      %token = ttng.warp_group_dot %u, %q, %acc#1, %true {isAsync = true} : \
!ttg.memdesc<128x16xbf16, #shared, #smem> * !ttg.memdesc<16x256xbf16, #shared3, #smem> -> ()
      %acc_36 = ttng.warp_group_dot_wait %token {pendings = 0 : i32} : tensor<128x256xf32>
      scf.yield %18
    }
"""
LOOP = """
.L_x_6:
.L_x_4:
        /*1f10*/              @!P0 BRA `(.L_x_2) ;
.L_x_7:
        /*1f90*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
        /*20d0*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*2310*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*26b0*/               @P0 BRA `(.L_x_4) ;
        /*2830*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*2930*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*2eb0*/               @P0 BRA `(.L_x_6) ;
.L_x_2:
        /*2f00*/              @!P0 BRA `(.L_x_2) ;
        /*2f10*/                   BRA `(.L_x_7) ;
"""
# As ptxas serialises products whose accumulator the loop also uses otherwise.
SERIALISED = LOOP.replace(
    "R24 ;\n",
    "R24, gsb0 ;\n        /*2030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n",
    1,
)


def test_products_in_flight_are_counted() -> None:
    assert binaries.products_in_flight(TTGIR) == 1
    waiting = TTGIR.replace("pendings = 1", "pendings = 0")
    assert binaries.products_in_flight(waiting) == 0
    assert binaries.products_in_flight(TTGIR.replace("scf.for", "scf.while")) is None
    assert binaries.read_sass(LOOP, USAGE).in_flight == 1
    assert binaries.read_sass(SERIALISED, USAGE).in_flight == 0
