"""Saving and loading adapters under adverse conditions: `make torture`; on POSIX systems.

    kills      a process that saves in a loop is killed; its last save, or the next one, is there
    full_disk  a limit on the size of files (RLIMIT_FSIZE) makes writes fail, as a full disk does
    crowd      eight processes save to a folder while eight load from it
    mutations  changed copies of the files load the values that were saved, or are refused

Stops at the first failure.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from tests.numbered_adapters import check_folder, load, save

# Forked children need not import torch, which would take longer than their work.
CONTEXT = multiprocessing.get_context("fork")
CROWD = 8


def save_each(folder: Path, numbers: Sequence[int], ended: Any) -> None:
    for number in numbers:
        save(number, folder)
        ended.value = number


def kills(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    ended, interrupted = CONTEXT.RawValue("q", 0), 0
    for _ in range(count):
        save(ended.value, folder)
        check_folder(folder, [ended.value])
        numbers = itertools.count(ended.value + 1)
        process = CONTEXT.Process(target=save_each, args=(folder, numbers, ended))
        process.start()
        time.sleep(rng.uniform(0.0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "a save failed"
        number = load(folder)[0]
        assert number - ended.value in (0, 1), f"save {ended.value} ended, {number} is loaded"
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


def load_until(folder: Path, stop: Any, numbers: Sequence[int], loads: Any) -> None:
    while not stop.is_set():
        assert load(folder)[0] in numbers, "an adapter that was not saved"
        loads.value += 1


def crowd(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    save(0, folder)
    stop, loads = CONTEXT.Event(), [CONTEXT.RawValue("q", 0) for _ in range(CROWD)]
    numbers, ended = range(CROWD * count), CONTEXT.RawValue("q", 0)
    readers, writers = [], []
    for i in range(CROWD):
        arguments: tuple[Any, ...] = (folder, stop, numbers, loads[i])
        readers.append(CONTEXT.Process(target=load_until, args=arguments))
        arguments = (folder, numbers[i::CROWD], ended)
        writers.append(CONTEXT.Process(target=save_each, args=arguments))
    for process in readers + writers:
        process.start()
    for process in writers:
        process.join()
    stop.set()
    for process in readers:
        process.join()
    failed = sum(process.exitcode != 0 for process in readers + writers)
    assert failed == 0, f"{failed} of {2 * CROWD} processes failed"
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
    tokens = list(TOKEN.finditer(content))
    token, replacement = rng.choice(tokens), rng.choice(tokens).group()
    before_token, after_token = content[: token.start()], content[token.end() :]
    return rng.choice(
        (
            before + bytes([content[start] ^ 1 << rng.randrange(8)]) + content[start + 1 :],
            before + rng.randbytes(rng.randint(1, 8)) + after,
            before,
            before + after,
            before + piece + content[start:],
            before + piece + after,
            before_token + replacement + after_token,
            before_token + rng.choice(VALUES) + after_token,
            content.replace(token.group(), replacement),
        )
    )


def mutations(folder: Path, count: int, rng: random.Random) -> dict[str, int]:
    save(3, folder)
    expected, refused = load(folder), 0
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for _ in range(count):
        path = rng.choice(list(files))
        while (changed := mutate(files[path], rng)) == files[path]:
            pass
        path.write_bytes(changed)
        try:
            assert load(folder) == expected
        except (ValueError, FileNotFoundError):
            refused += 1
        except Exception as error:
            error.add_note(f"{path.name}: {changed!r}")
            raise
        path.write_bytes(files[path])
    return {"files": count, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scale", type=float, default=1.0, help="of all counts (1)")
    parser.add_argument("--output", type=Path, help="append a JSON row with the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    time_of_day = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    row = dataclasses.asdict(environment.describe("cpu"))
    row |= {"python": platform.python_version(), "time": time_of_day, "scale": options.scale}
    for part, count in {kills: 500, full_disk: 500, crowd: 100, mutations: 10_000}.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            scaled = max(1, round(count * options.scale))
            result = part(Path(folder) / "adapter", scaled, random.Random(0))
        row[part.__name__] = result | {"seconds": round(time.perf_counter() - start, 1)}
        print(part.__name__, json.dumps(row[part.__name__]), flush=True)
    if options.output is not None:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
