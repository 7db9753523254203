"""Where a run's scalars go besides its log: TensorBoard and W&B.

A package that is not there and a folder that cannot be written are refused. Nothing else that happens to a report
ends a run or makes it wait: the caller of a writer's methods drops what they raise, and they raise soon.
"""

from __future__ import annotations

import logging
import math
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from training.checkpoint.run_folder import RunFolder
from training.config.params import Config
from training.distributed.board import within

logger = logging.getLogger(__name__)

_REOPEN = 30.0  # seconds until TensorBoard's files are tried again
# Seconds for W&B: to answer at all, to begin a run, and to take the last values.
_ANSWER, _BEGIN, _FINISH = 10.0, 10.0, 30.0


@dataclass(frozen=True)
class Distribution:
    """How ``count`` values are spread: ``bins`` of equal width hold them, from ``low`` to ``high``.

    ``total`` is the sum of the values, ``squares`` that of their squares.
    """

    low: float
    high: float
    count: int
    total: float
    squares: float
    bins: Sequence[int]

    @property
    def edges(self) -> list[float]:
        """The ends of the bins, one more than there are bins."""
        low, high = outer_edges(self.low, self.high)
        return [low + (high - low) * i / len(self.bins) for i in range(len(self.bins) + 1)]


def outer_edges(low: float, high: float) -> tuple[float, float]:
    """Where the first bin of values from ``low`` to ``high`` begins and the last ends; wider if all are equal."""
    return (low, high) if low < high else (low - 1, high + 1)


class Writer:
    """A destination of scalars, called ``name`` in ``--report-to``; this one discards them."""

    name = "none"

    def scalars(self, step: int, values: Mapping[str, float], axis: str) -> None:
        """``values`` at position ``step`` of ``axis``, 'step' or 'epoch'."""

    def histograms(self, epoch: int, values: Mapping[str, Distribution]) -> None:
        """``values`` after ``epoch`` complete epochs."""

    def watch(self, model: nn.Module) -> None:
        """Record parameters and gradients, if the destination can."""

    def goes_on(self, step: int) -> None:
        """The run resumes after ``step`` steps: what an earlier launch has sent about later steps is discarded."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoardWriter(Writer):
    """Event files in ``tensorboard/``. ValueError: they cannot be written there.

    TensorBoard's writer is of no use after a failure. The next one begins another file, which is read too.
    """

    name = "tensorboard"

    def __init__(self, folder: RunFolder) -> None:
        with _named("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

        self._kind, self._folder = SummaryWriter, folder.path / "tensorboard"
        self._purge: int | None = None
        self._failed = -math.inf
        self._hook = threading.excepthook
        threading.excepthook = self._told_elsewhere
        try:
            self._writer: Any = self._kind(self._folder)
        except (OSError, ValueError) as error:  # ValueError: TensorBoard takes no path that is not UTF-8
            threading.excepthook = self._hook
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"--report-to tensorboard: {self._folder} cannot be written ({reason}); make it writable, or "
                "leave tensorboard out"
            ) from error

    def goes_on(self, step: int) -> None:
        self._purge = step + 1
        with self._failing():
            if self._writer is not None:
                self._writer.close()
            self._writer = self._kind(self._folder, purge_step=self._purge)

    def scalars(self, step: int, values: Mapping[str, float], axis: str) -> None:
        with self._failing():
            if (writer := self._open()) is not None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)

    def histograms(self, epoch: int, values: Mapping[str, Distribution]) -> None:
        with self._failing():
            if (writer := self._open()) is not None:
                for name, d in values.items():
                    moments = {"num": d.count, "sum": d.total, "sum_squares": d.squares}
                    # TensorBoard knows the upper ends alone; an empty bin in front tells where the first begins.
                    writer.add_histogram_raw(
                        name, d.low, d.high, **moments, bucket_limits=d.edges, bucket_counts=[0.0, *d.bins],
                        global_step=epoch,
                    )  # fmt: skip

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _open(self) -> Any:
        """TensorBoard's writer; None: it has failed a moment ago."""
        if self._writer is None and time.monotonic() - self._failed >= _REOPEN:
            self._writer = self._kind(self._folder)
        return self._writer

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._writer, self._failed = None, time.monotonic()
            raise

    def _told_elsewhere(self, failure: threading.ExceptHookArgs) -> None:
        """The failure of TensorBoard's thread, which its writer raises too: no traceback of it."""
        if type(failure.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            self._hook(failure)


class WandbWriter(Writer):
    """A W&B run named like the run's folder; ``WANDB_MODE=offline`` keeps it in that folder.

    Where W&B cannot be used, the run is recorded as with ``WANDB_MODE=offline``, and the log says why.
    """

    name = "wandb"

    def __init__(self, folder: RunFolder, config: Config) -> None:
        with _named("wandb"):
            import wandb

        self._wandb: Any = wandb
        self._config = config
        self._name, self._path = folder.name, folder.path
        self._resume = "allow" if folder.restarted or config.run.resume else None
        self._sent_later = False
        self._run: Any = None
        reason = _obstacle(wandb, _settings(wandb))
        if reason is None:
            try:
                self._run = self._begin()
            except Exception as error:  # of the network, of the account, of the settings, of wandb's own process
                reason = f"W&B has not accepted the run ({_in_short(error)})"
        if reason is not None:
            self._record(reason)
        if self._run is not None:
            for handler in logging.getLogger("wandb").handlers:  # its own log, which may be on a full disk
                setattr(handler, "handleError", lambda record: None)  # noqa: B010, a method to type checkers
            # Not W&B's own step, which cannot go back.
            for axis, prefix in (
                ("step", "train"),
                *(("epoch", what) for what in ("val", "data", "sample_state")),
            ):
                self._run.define_metric(axis)
                self._run.define_metric(f"{prefix}/*", step_metric=axis)

    def scalars(self, step: int, values: Mapping[str, float], axis: str) -> None:
        if self._run is not None:
            self._run.log({**values, axis: step})

    def histograms(self, epoch: int, values: Mapping[str, Distribution]) -> None:
        if self._run is not None:
            drawn = {
                name: self._wandb.Histogram(np_histogram=(list(d.bins), d.edges)) for name, d in values.items()
            }
            self._run.log({**drawn, "epoch": epoch})

    def watch(self, model: nn.Module) -> None:
        if self._run is not None:
            self._run.watch(model, log="all", log_freq=self._config.run.log_every_n_steps)

    def close(self) -> None:
        if self._run is None:
            return
        held = Path(self._run.dir).parent
        try:
            # W&B keeps to the setting; should its process hang, nothing does.
            within(2 * (getattr(self._run.settings, "finish_timeout", 0) or _FINISH), self._run.finish)
        except Exception as error:
            logger.warning(
                "--report-to wandb: W&B has not taken all values (%s); they are in %s, and 'wandb sync %s' sends "
                "them; with WANDB_MODE=offline a run does not try",
                *(_in_short(error), held, held),
            )
            return
        if self._sent_later:
            logger.warning(
                "--report-to wandb: W&B has nothing of this run, which was recorded as with WANDB_MODE=offline: "
                "'wandb sync %s' sends it",
                held,
            )

    def _begin(self, mode: str | None = None) -> Any:
        config, known = self._config, getattr(self._wandb.Settings, "model_fields", {})
        limits = {
            "init_timeout": _BEGIN,
            "finish_timeout": _FINISH,
            "finish_timeout_raises": True,
            "x_service_wait": _BEGIN,
        }
        ours = {key: value for key, value in limits.items() if key in known and _variable(key) not in os.environ}
        return self._wandb.init(
            project=config.run.wandb_project_name,
            name=self._name,
            id=re.sub(r"[^\w.-]", "-", self._name)[-128:],  # W&B: at most 128 characters, no / \ # ? % :
            notes=config.run.wandb_notes,
            config={name: _plain(value) for name, value in config.recorded_flags.items()},
            dir=self._path,
            resume=self._resume,
            mode=mode,
            settings=self._wandb.Settings(**ours),
        )

    def _record(self, reason: str) -> None:
        """Record the run in its folder, because of ``reason``."""
        try:
            self._wandb.teardown()  # a run of the same name that has begun half
            self._run, self._sent_later = self._begin("offline"), True
        except Exception as error:
            logger.warning(
                "--report-to wandb: %s, and the run cannot be recorded either (%s): it goes on without W&B; leave "
                "wandb out, or mend this and give WANDB_MODE=offline where there is no network",
                *(reason, _in_short(error)),
            )
            return
        logger.warning(
            "--report-to wandb: %s; the run goes on and is recorded in %s, as with WANDB_MODE=offline, for 'wandb "
            "sync'",
            *(reason, Path(self._run.dir).parent),
        )


def _settings(wandb: Any) -> Any:
    """W&B's settings, of its variables and files. ValueError: one of them is wrong."""
    try:
        return wandb.setup().settings
    except ValueError as error:  # pydantic's
        faults: list[Any] = getattr(error, "errors", list)()
        told = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults] or [_in_short(error)]
        raise ValueError(
            f"--report-to wandb: a setting of W&B is wrong ({'; '.join(told)}); correct the variable (WANDB_...) "
            "or the settings file that sets it"
        ) from error


def _obstacle(wandb: Any, settings: Any) -> str | None:
    """Why a run cannot be begun online, found out without a question to the user and within seconds."""
    try:
        if settings.mode not in ("online", "run", "shared"):
            return None
        if not (settings.http_proxy or settings.https_proxy):
            reason = within(2 * _ANSWER, lambda: _unreachable(settings.base_url))
            if reason is not None:
                return reason
        with suppress(TypeError):  # an older wandb, which cannot be told not to ask
            if not wandb.login(prompt=False, verify=False):
                return "no API key is configured (run 'wandb login', or export WANDB_API_KEY)"
        return None
    except TimeoutError:
        return "W&B cannot be reached (no answer)"
    except Exception as error:
        return f"W&B cannot be used ({_in_short(error)})"


def _unreachable(url: str) -> str | None:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER):
            return None
    except urllib.error.HTTPError:  # an answer
        return None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):  # wandb may know other certificates
            return None
        return f"{url} cannot be reached ({error.reason})"
    except TimeoutError:  # connected, and slow
        return None


def _variable(setting: str) -> str:
    """The environment variable of a setting of wandb."""
    return f"WANDB_{setting.upper()}"


def _in_short(error: BaseException) -> str:
    text = " ".join(str(error).partition("\nConsider")[0].split()) or type(error).__name__
    return text[:300].rstrip(".:")


@contextmanager
def _named(package: str) -> Iterator[None]:
    """Turn the failed import of an optional package into a sentence about its flag."""
    try:
        yield
    except Exception as error:  # a package that does not fit the others fails in any way
        raise ValueError(
            f"--report-to {package}: the package cannot be imported ({_in_short(error)}); pip install {package}"
        ) from error


def _plain(value: Any) -> Any:
    """A flag's value as JSON can hold it."""
    return value if isinstance(value, (str, int, float, bool, type(None), list, tuple, dict)) else str(value)
