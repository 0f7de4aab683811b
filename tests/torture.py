"""Saving and loading adapters under adverse conditions: `make torture`; on POSIX systems.

    kills      a process that saves in a loop is killed; its last save, or the next one, is there
    full disk  a limit on the size of files (RLIMIT_FSIZE) makes writes fail, as a full disk does
    crowd      eight processes save to a folder while eight load from it
    mutations  changed copies of the files load the values that were saved, or are refused

An adapter has one number for all its values and for its scaling, so that a mixture of two shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import environment
from dcft_kernels import load_adapter, save_adapter, swap_linear

# Children inherit what is imported: importing torch would take longer than all they do.
CONTEXT = multiprocessing.get_context("fork")
CROWD = 8


def base_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))


def save(number: int, folder: Path) -> None:
    model = base_model()
    swap_linear(model, kernel_size=4, alpha=number, dropout=0.125)
    for layer in model:
        for factor in layer.adapter[:3]:
            nn.init.constant_(factor, number)
    save_adapter(model, folder)


def load(folder: Path) -> tuple[int, list[Any]]:
    """The number of the adapter in a folder, after a look at all its values, and its settings."""
    model = base_model()
    load_adapter(model, folder)
    tensors = [factor.flatten() for layer in model for factor in layer.adapter[:3]]
    values = {layer.scaling for layer in model} | set(torch.cat(tensors).tolist())
    check(len(values) == 1, f"values of several saves: {sorted(values)}")
    return int(values.pop()), [layer.options for layer in model]


def check(condition: bool, failure: str) -> None:
    if not condition:
        raise AssertionError(failure)


def check_folder(folder: Path, numbers: Sequence[int]) -> int:
    """Check that the folder has one of these adapters and no other files; its number."""
    number, files = load(folder)[0], sorted(path.name for path in folder.iterdir())
    check(number in numbers, f"loaded {number}, expected {numbers}")
    check(len(files) == 2, f"files were left: {files}")
    return number


def save_for_ever(folder: Path, ended: Any) -> None:
    for number in itertools.count(ended.value + 1):
        save(number, folder)
        ended.value = number


def kills(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    ended, interrupted = CONTEXT.RawValue("q", 0), 0
    for _ in range(count):
        save(ended.value, folder)
        check_folder(folder, [ended.value])
        process = CONTEXT.Process(target=save_for_ever, args=(folder, ended))
        process.start()
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check(process.exitcode == -signal.SIGKILL, f"a save failed: {process.exitcode}")
        number = load(folder)[0]
        check(number - ended.value in (0, 1), f"save {ended.value} ended, {number} is loaded")
        interrupted += len(list(folder.iterdir())) > 2
        ended.value = number + 1
    return {"kills": count, "saves": ended.value, "left_files": interrupted}


def full_disk(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    save(0, folder)
    largest = max(path.stat().st_size for path in folder.iterdir())
    number, failed, (soft, hard) = 0, 0, resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(largest + 100), hard))
        try:
            save(number + 1, folder)
            number += 1
        except OSError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check_folder(folder, [number])
    return {"saves": count, "failed": failed}


def save_range(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        save(number, folder)


def load_until(folder: Path, stop: Any, numbers: Sequence[int], loads: Any) -> None:
    while not stop.is_set():
        check(load(folder)[0] in numbers, "an adapter that was not saved")
        loads.value += 1


def crowd(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    save(0, folder)
    stop, loads = CONTEXT.Event(), [CONTEXT.RawValue("q", 0) for _ in range(CROWD)]
    numbers = range(CROWD * count)
    readers = [
        CONTEXT.Process(target=load_until, args=(folder, stop, numbers, each)) for each in loads
    ]
    writers = [
        CONTEXT.Process(target=save_range, args=(folder, numbers[i::CROWD])) for i in range(CROWD)
    ]
    for process in readers + writers:
        process.start()
    for process in writers:
        process.join()
    stop.set()
    for process in readers:
        process.join()
    failed = sum(process.exitcode != 0 for process in readers + writers)
    check(failed == 0, f"{failed} of {2 * CROWD} processes failed")
    check_folder(folder, numbers[-CROWD:])
    total = sum(each.value for each in loads)
    return {"writers": CROWD, "readers": CROWD, "saves": len(numbers), "loads": total}


TOKEN = re.compile(rb'"[\w.]*"|-?\d[\d.]*|(?m:^.*\n)')
VALUES = (b"0", b"-1", b"1e999", b"NaN", b"true", b"null", b"[]", b'"a"', b"9" * 400, b"[" * 9999)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change bits or bytes, cut, insert or repeat a piece, or move names, numbers and lines."""
    start, other = rng.randrange(len(content)), rng.randrange(len(content))
    end, piece = start + rng.randint(1, 40), content[other : other + rng.randint(1, 40)]
    before, after = content[:start], content[end:]
    tokens = list(TOKEN.finditer(content)) or [re.match(b"", b"")]
    token, replacement = rng.choice(tokens), rng.choice(tokens).group()
    start_of, end_of = content[: token.start()], content[token.end() :]
    return rng.choice(
        (
            before + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
            before + rng.randbytes(rng.randint(1, 8)) + after,
            before,
            before + after,
            before + piece + content[start:],
            before + piece + after,
            start_of + replacement + end_of,
            start_of + rng.choice(VALUES) + end_of,
            content.replace(token.group(), replacement),
        )
    )


def mutations(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    save(3, folder)
    expected, refused = load(folder), 0
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for index in range(count):
        path = rng.choice(list(files))
        while (changed := mutate(files[path], rng)) == files[path]:
            pass
        path.write_bytes(changed)
        try:
            check(load(folder) == expected, f"file {index} loads: {changed!r}")
        except (ValueError, FileNotFoundError):
            refused += 1
        except Exception as error:
            error.add_note(f"file {index}, {path.name}: {changed!r}")
            raise
        finally:
            path.write_bytes(files[path])
    return {"files": count, "refused": refused}


PARTS = {kills: 500, full_disk: 500, crowd: 100, mutations: 10_000}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts (1)")
    parser.add_argument("--output", type=Path, help="append a JSON row with the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row: dict[str, Any] = {"scale": options.scale}
    row |= dataclasses.asdict(environment.describe("cpu"))
    row |= {"python": ".".join(map(str, sys.version_info[:3])), "time": started}
    for part, count in PARTS.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                scaled = max(1, round(count * options.scale))
                result = part(Path(folder) / "adapter", scaled, random.Random(0))
            except Exception:
                traceback.print_exc()
                print(f"{part.__name__}: failed", flush=True)
                return 1
        result["seconds"] = round(time.perf_counter() - start, 1)
        row[part.__name__] = result
        print(f"{part.__name__}:", *(f"{name} {n}" for name, n in result.items()), flush=True)
    if options.output is not None:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
