"""Runs one after the other: data read once, stored results reused, learning rates chosen."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks.quality import errors, language, sentences, squad, tasks, training
from benchmarks.quality.errors import QualityError
from benchmarks.quality.methods.table import by_name
from benchmarks.quality.models import TARGETS, load_tokenizer
from benchmarks.quality.runs import SLICE, Result, Run, add, by_key, read
from benchmarks.quality.studies import Study, find
from benchmarks.quality.tasks import Prepared, Task, spread


class Session:
    """What runs share: the data, the stored results, the terminal."""

    def __init__(self, data: Path | None, results: Path, console: Console) -> None:
        read(results)  # a broken line is reported before anything is trained
        self._data, self._results, self._console = data, results, console
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
                chosen = find(by_key(read(self._results)), study, task, variant).learning_rate
                for run in [] if chosen is None else study.runs(task, variant, chosen):
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
        """The stored result of a run, or a new one, which is stored.

        A stored one has to be of the same data, not failed, and to have the metric `needed`. Other
        processes may have added it: the file is read each time.
        """
        task, prepared = self._prepare(run)
        result = by_key(read(self._results)).get(run.key())
        lacks = result is None or result.error or (needed and needed not in result.values)
        if result is None or lacks or result.data != prepared.digest:
            method = by_name(run.method)
            with Progress(console=self._console, transient=True) as bars:
                bar = bars.add_task(escape(run.label()), total=run.steps)
                advance = functools.partial(bars.advance, bar)
                result = training.train(run, task, method, prepared, study, advance)
            add(self._results, result)
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
            # 600 examples at most decide when to stop.
            in_slice = replace(run, scored=SLICE, scored_size=600, stopping=False)
            _, held_out = self._prepare(in_slice)
            _, whole = self._prepare(replace(run, stopping=False))
            self._prepared[key] = replace(whole, train=held_out.train, held_out=held_out)
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
        splits = replace(splits, dev=spread(splits.dev, size))
        prepared: Prepared = reader.prepare(task, splits, tokenizer, max_tokens)
        return prepared


def _line(result: Result) -> str:
    run = result.run
    start = f"{run.label()} seed {run.seed} ({run.scored}): "
    if result.value is None:
        return f"{start}failed: {result.error}"
    values = ", ".join(f"{metric} {value:.4f}" for metric, value in result.values.items())
    return f"{start}{values}, {result.seconds:.0f} s"
