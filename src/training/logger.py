"""What a run reports: console and ``out.log``, TensorBoard and W&B behind one interface, progress bars.

Rank 0 reports (``--log-local``: one rank per node, into ``out-RANK.log``). On the other ranks a ``RunLog`` has the
same methods and they do nothing (warnings still reach the console), so the loop never asks which rank it is on.
On a terminal, log lines are written above the progress bar; elsewhere there is no bar, and slow work logs its
progress at intervals.

    with open_run(config, world, choose_folder(config, world)) as log:
        log.info("training data: ...")
        log.scalars(step, {"train/lr": 1e-3})
        with log.progress(1000, "validation", unit="batch") as progress:
            progress.update()
        log.done()
"""

from __future__ import annotations

import json
import logging
import math
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from tqdm import tqdm

from training.checkpoint.run_folder import RunFolder, create_folder
from training.config.params import Config
from training.distributed.process_group import World
from training.reports import Distribution, TensorBoardWriter, WandbWriter, Writer

logger = logging.getLogger(__name__)


class ProgressBar:
    """The progress of slow work: a bar on a terminal, elsewhere a log line every ``every`` seconds."""

    def __init__(
        self, total: int, desc: str, *, initial: int = 0, unit: str = "it", shown: bool, every: float
    ) -> None:
        self.total, self.desc, self.unit, self.every = total, desc, unit, every
        self.count = self.initial = initial
        self.started = self.reported = time.monotonic()
        terminal = shown and sys.stderr.isatty()
        self.plain = shown and not terminal
        self.bar = tqdm(
            total=total, initial=initial, desc=desc, unit=unit, unit_scale=True, leave=False, dynamic_ncols=True,
            disable=not terminal,
        )  # fmt: skip

    def update(self, n: int = 1) -> None:
        self.count += n
        self.bar.update(n)
        if self.plain and time.monotonic() - self.reported >= self.every:
            self.reported = time.monotonic()
            left = (self.reported - self.started) * (self.total - self.count) / max(self.count - self.initial, 1)
            share = 100 * self.count / max(self.total, 1)
            eta = timedelta(seconds=int(left))
            logger.info(f"{self.desc}: {self.count}/{self.total} {self.unit} ({share:.0f}%) ETA: {eta}")

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()


class RunLog:
    """What the loop and the evaluation report to. Made by ``open_run``; a context manager."""

    def __init__(
        self, folder: RunFolder, world: World, writers: tuple[Writer, ...], handlers: list[logging.Handler]
    ):
        self.folder, self.world = folder, world
        self.writers, self.handlers = writers, handlers
        self._level = logging.getLogger().level
        self._failed: set[Writer] = set()

    def info(self, message: str) -> None:
        logger.info(message)

    def warning(self, message: str) -> None:
        logger.warning(message)

    def scalars(self, step: int, values: Mapping[str, float], axis: str = "step") -> None:
        """Send ``values`` to every writer: 'train/…' against 'step', 'val/…' and 'data/…' against 'epoch'."""
        self._send(lambda writer: writer.scalars(step, values, axis))

    def histograms(self, epoch: int, values: Mapping[str, Distribution]) -> None:
        """Send distributions to every writer, against 'epoch'."""
        self._send(lambda writer: writer.histograms(epoch, values))

    def progress(
        self, total: int, desc: str, *, initial: int = 0, unit: str = "it", every: float = 15.0
    ) -> ProgressBar:
        """A context manager with ``update(n)``. ``every=math.inf``: no log lines."""
        return ProgressBar(total, desc, initial=initial, unit=unit, shown=self.world.is_main, every=every)

    def eval_result(self, result: Mapping[str, Any]) -> None:
        """Append one object to ``eval_results.jsonl``; its floats are sent as ``val/NAME`` against its 'epoch'.

        NaN and infinity, which JSON does not know, are written as null.
        """
        if not self.world.is_main:
            return
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        try:
            with self.folder.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.warning(
                "--logs: %s cannot be written (%s), so this result is in the log only: %s",
                *(self.folder.results, error.strerror, json.dumps(line)),
            )
        self.scalars(result["epoch"], {f"val/{k}": v for k, v in result.items() if isinstance(v, float)}, "epoch")

    def watch(self, model: nn.Module) -> None:
        """``--debug``: let W&B record parameters and gradients."""
        self._send(lambda writer: writer.watch(model))

    def goes_on(self, step: int) -> None:
        """The run has been resumed after ``step`` steps."""
        self._send(lambda writer: writer.goes_on(step))

    def done(self) -> None:
        """The run reached its end: leave ``job.done``."""
        if not self.world.is_main:
            return
        try:
            self.folder.done.write_text(time.strftime("%Y-%m-%d %H:%M:%S\n"))
        except OSError as error:
            logger.warning(
                "--logs: the run is complete, but %s cannot be written (%s)", self.folder.done, error.strerror
            )

    def close(self) -> None:
        self._send(lambda writer: writer.close())
        root = logging.getLogger()
        for handler in self.handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(self._level)
        self.writers, self.handlers = (), []

    def _send(self, send: Callable[[Writer], None]) -> None:
        """``send`` with each writer. A report that fails does not end the run; its first failure is logged."""
        for writer in self.writers:
            try:
                send(writer)
            except Exception as error:
                if writer not in self._failed:
                    self._failed.add(writer)
                    logger.warning(
                        "--report-to %s: values are lost there (%s); the run goes on", writer.name, error
                    )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:  # Python prints the traceback on the console itself
            text, cause = "the run ended with an error", (type(error), error, trace)
            record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), cause)
            for handler in self.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(record)
        self.close()


def open_run(config: Config, world: World, folder: RunFolder) -> RunLog:
    """Create ``folder`` and start logging.

    ValueError: the folder cannot be written, or a package that ``--report-to`` needs is not installed.
    """
    create_folder(folder, config, world)
    reports = world.is_main or (config.run.log_local and world.is_local_main)
    level = logging.DEBUG if config.run.debug else logging.INFO
    handlers: list[logging.Handler] = [_Console(level if reports else logging.WARNING)]
    if reports:
        name = f"out-{world.rank}.log" if config.run.log_local else "out.log"
        handlers.append(LogFile(folder.path / name, f"--logs {config.run.logs}"))
        handlers[-1].setLevel(level)
    writers: tuple[Writer, ...] = ()
    if world.is_main and "tensorboard" in config.run.report_to:
        writers += (TensorBoardWriter(folder),)
    if world.is_main and "wandb" in config.run.report_to:
        writers += (WandbWriter(folder, config),)
    log = RunLog(folder, world, writers, handlers)
    _start_logging(handlers, level, "" if world.is_main else f"{socket.gethostname()} rank {world.rank} | ")
    return log


class EarlyRecords(logging.Handler):
    """Keeps what is logged before the run's folder exists, for the run's log. A context manager.

    If the run ends before ``hand_over``, its warnings are printed on stderr.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def hand_over(self) -> None:
        """Log all records with the handlers that exist now, and keep no more."""
        root = logging.getLogger()
        root.removeHandler(self)
        for record in self.records:
            if record.levelno >= root.level:
                root.handle(record)
        self.records = []

    def __enter__(self) -> EarlyRecords:
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(min(root.level, logging.INFO))
        root.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.removeHandler(self)
        root.setLevel(self._level)
        for record in self.records:
            if record.levelno >= logging.WARNING:
                print(f"{record.levelname}: {record.getMessage()}", file=sys.stderr)


class LogFile(logging.FileHandler):
    """Lines in a file. That it cannot be written is told on the console once; each line is a new attempt.

    ValueError, with ``flag``: the file cannot be opened.
    """

    def __init__(self, path: Path, flag: str) -> None:
        self._told = False
        try:
            # Names of files need not be text: what UTF-8 has no bytes for is written as an escape.
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ValueError(f"{flag}: {path} cannot be written ({error.strerror})") from error

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told:
            self._told = True
            print(
                f"WARNING: {self.baseFilename} cannot be written ({error.strerror}): lines are missing there; the "
                "run goes on",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Console(logging.Handler):
    """Lines on stderr; on a terminal above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if sys.stderr.isatty():
                tqdm.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _start_logging(handlers: list[logging.Handler], level: int, origin: str) -> None:
    root = logging.getLogger()
    root.setLevel(level)
    logging.getLogger("PIL").setLevel(logging.INFO)  # dozens of debug lines per picture
    form = logging.Formatter(f"%(asctime)s | {origin}%(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S")
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)
