"""Runs one after the other: data read once, stored results reused, learning rates chosen."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks.quality import errors, language, sentences, squad, tasks, training
from benchmarks.quality.errors import QualityError
from benchmarks.quality.found import StoredRuns, find
from benchmarks.quality.methods.table import by_name
from benchmarks.quality.models import TARGETS, load_tokenizer
from benchmarks.quality.runs import SLICE, Result, Run, Store, read
from benchmarks.quality.studies import Study
from benchmarks.quality.tasks import Prepared, Task, spread

_HELD_OUT = 600  # at most so many examples of the slice decide when to stop


class Session:
    """What runs share: the data, the stored results, the terminal."""

    def __init__(self, data: Path | None, store: Store, console: Console) -> None:
        self._data = data
        self._store = store
        self._console = console
        self._prepared: dict[tuple[object, ...], Prepared] = {}
        self._tokenizers: dict[str, Any] = {}

    def study(self, study: Study) -> None:
        """Run a study, one line of its table after the other: the learning rate, then all seeds."""
        self._check(study)
        for task in study.tasks:
            for variant in study.variants:
                rates = study.rates(variant)
                for rate in rates if len(rates) > 1 else ():
                    for trial in study.trials(task, variant, rate):
                        self.result(trial, study.name, study.criterion(task))
                chosen = find(StoredRuns(read(self._store.path)), study, task, variant)
                if chosen.learning_rate is not None:
                    for run in study.runs(task, variant, chosen.learning_rate):
                        self.result(run, study.name)

    def _check(self, study: Study) -> None:
        """Report mistakes in any line before the first one is trained."""
        for variant in study.variants:
            by_name(variant.method).check_options(variant.method, variant.options)
            if variant.targets not in TARGETS:
                raise errors.unknown("--targets", variant.targets, TARGETS)
            for name in study.tasks:
                self._prepare(study.run(name, variant))

    def result(self, run: Run, study: str, needed: str = "") -> Result:
        """The stored result of a run if it has the metric `needed`, or a new one, then stored."""
        task, prepared = self._prepare(run)
        result = self._store.find(run, prepared.digest)
        if result is None or (needed and needed not in result.values):
            method = by_name(run.method)
            with Progress(console=self._console, transient=True) as bars:
                bar = bars.add_task(escape(run.label()), total=run.steps)
                advance = functools.partial(bars.advance, bar)
                result = training.train(run, task, method, prepared, study, advance)
            self._store.add(result)
        self._console.print(_line(result))
        return result

    def _prepare(self, run: Run) -> tuple[Task, Prepared]:
        data = self._data
        if run.task not in tasks.TASKS and Path(run.task).is_dir():
            data = Path(run.task)
            task = sentences.own_task(data)
        else:
            task = tasks.by_name(run.task)
        if data is None:
            raise QualityError(f"--data: expected the folder or file of {task.name}, got nothing")
        key = (run.task, run.scored, run.scored_size, run.model, run.max_tokens, run.stopping)
        if key not in self._prepared and run.stopping:
            in_slice = dataclasses.replace(run, scored=SLICE, scored_size=_HELD_OUT, stopping=False)
            _, held_out = self._prepare(in_slice)
            _, whole = self._prepare(dataclasses.replace(run, stopping=False))
            self._prepared[key] = dataclasses.replace(
                whole, train=held_out.train, held_out=held_out
            )
        elif key not in self._prepared:
            self._prepared[key] = self._read(run, task, data)
        return task, self._prepared[key]

    def _read(self, run: Run, task: Task, data: Path) -> Prepared:
        if run.model not in self._tokenizers:
            self._tokenizers[run.model] = load_tokenizer(run.model)
        tokenizer = self._tokenizers[run.model]
        longest = tokenizer.model_max_length  # astronomically large if unknown
        max_tokens = min(run.max_tokens or longest, task.max_tokens)
        if max_tokens > longest:
            raise QualityError(
                f"--max-tokens: {run.model} reads at most {longest} tokens, got {run.max_tokens}"
            )
        in_slice, size = run.scored == SLICE, run.scored_size
        if task.kind == "language":
            text = language.read_text(data)
            return language.prepare(text, tokenizer, max_tokens, size, slice_of_train=in_slice)
        reader: Any = squad if task.kind == "answers" else sentences
        splits = reader.read(task, data)
        splits = reader.slice_of_train(splits) if in_slice else splits
        splits = dataclasses.replace(splits, dev=spread(splits.dev, size))
        prepared: Prepared = reader.prepare(task, splits, tokenizer, max_tokens)
        return prepared


def _line(result: Result) -> str:
    run = result.run
    start = f"{run.label()} seed {run.seed} ({run.scored}): "
    if result.value is None:
        return f"{start}failed: {result.error}"
    value = f"{result.value:.4f} (constant answer {result.constant_value:.4f})"
    return f"{start}{result.metric} {value}, {result.seconds:.0f} s"
