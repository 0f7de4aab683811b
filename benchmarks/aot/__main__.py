"""Compile every kernel for every architecture, without a GPU: `python -m benchmarks.aot`.

The package's launchers run on CPU tensors with the tiles of the architecture; Triton compiles what
they would launch, and the binaries are read. The command fails if a kernel

- spills registers to memory,
- needs more shared memory than a block of the architecture has,
- fits on a multiprocessor fewer times than its tile counts on,
- multiplies 16-bit operands (or in tf32) without matrix instructions, or
- only loads and multiplies, and waits for every product before it issues the next.

Triton caches what it compiles, so a run that was interrupted continues where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.aot.compiling import Job, Record, compile_job, jobs

RESULTS = Path(__file__).parents[1] / "results" / "aot_resources.csv"


def compile_all(chosen: Sequence[Job], processes: int | None) -> tuple[list[Record], list[str]]:
    """Records and failures of all jobs, in their order."""
    records: dict[Job, list[Record]] = {}
    wrong = []
    # Fresh interpreters: forks of a process that runs threads can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes or os.cpu_count(), context) as pool:
        futures = {pool.submit(compile_job, job): job for job in chosen}
        for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            job = futures[future]
            try:
                records[job] = future.result()
                problems = [text for record in records[job] for text in record.failures()]
            except Exception as error:  # Triton quotes the source first
                text = str(error).strip().splitlines() or [""]
                problems = [f"{job.name}: {type(error).__name__}: {text[-1]}"]
            print(f"[{done}/{len(chosen)}] {'; '.join(problems) or f'{job.name}: ok'}", flush=True)
            wrong += problems
    return [record for job in chosen for record in records.get(job, [])], wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="over 'architecture launcher dtype case'; stores nothing",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (one per core)")
    options = parser.parse_args(arguments)
    records, wrong = compile_all(jobs(options.only), options.jobs)
    if not options.only:
        with RESULTS.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([Record._fields, *records])
    print(f"{len(records)} binaries, {len(wrong)} failures")
    for text in wrong:
        print(f"FAILED {text}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
