"""A report from the folders of runs: read, drawn, written; or served while the runs go on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from training.files import replacing
from training.predictions import Place
from training.run_report.charts import Chart, png
from training.run_report.curves import charts
from training.run_report.history import History, read_run, signature
from training.run_report.page.document import page
from training.run_report.pictures import Thumbnails
from training.run_report.samples import LargestU, largest_u
from training.run_report.summary import summary


def _not_read(place: Place) -> bytes:
    raise OSError(f"{place}: pictures are not read")


@dataclass
class RunReport:
    """A report about the runs in ``folders``.

    ``samples``: how many with the largest u are shown, looked up for ``seconds`` at most. ``train_data``: where
    the training data are now; None: as the run had them. ``price``: of a card for an hour. ``read_picture`` gives
    the file of a picture of an evaluation set, or an OSError.
    """

    folders: Sequence[Path]
    samples: int = 24
    seconds: float = 60.0
    train_data: str | None = None
    price: float | None = None
    read_picture: Callable[[Place], bytes] = _not_read
    _hard: dict[tuple[object, ...], LargestU] = field(default_factory=dict)
    _made: tuple[str, str] = ("", "")
    _pictures: Thumbnails = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._pictures = Thumbnails(self.read_picture, seconds=self.seconds)

    def read(self) -> tuple[list[History], list[LargestU], list[Chart]]:
        """What the page shows. ValueError: a folder is not that of a run."""
        self._pictures.begin()
        runs = [read_run(folder) for folder in self.folders]
        names = [run.name for run in runs]
        runs = [replace(r, name=str(r.folder)) if names.count(r.name) > 1 else r for r in runs]
        hard = [self._largest(run) for run in runs]
        return runs, hard, list(charts(runs, hard))

    def write(self, out: Path, runs: list[History], hard: list[LargestU], drawn: list[Chart]) -> list[Path]:
        """Write what ``read`` returned to ``out``, and as PNGs into a folder beside it a summary and each chart.

        Returns all files.
        """
        folder = out.parent / f"{out.stem}_png"
        folder.mkdir(parents=True, exist_ok=True)
        written = [out]
        with replacing(out) as file:
            file.write(page(runs, drawn, hard, self._pictures, self.price).encode())
        written.append(folder / "summary.png")
        with replacing(written[-1]) as file:
            file.write(summary(runs, drawn, self._pictures))
        for chart in drawn:
            written.append(folder / f"{chart.key}.png")
            with replacing(written[-1]) as file:
                file.write(png(chart))
        return written

    def signature(self) -> str:
        """Changes when a page that is made now would be another one."""
        return hashlib.sha256(repr([signature(folder) for folder in self.folders]).encode()).hexdigest()[:16]

    def served(self) -> str:
        """The page as it is now, which looks for newer ones; made anew only where something has changed."""
        with self._lock:
            now = self.signature()
            if now != self._made[0]:
                runs, hard, drawn = self.read()
                self._made = now, page(runs, drawn, hard, self._pictures, self.price, now)
            return self._made[1]

    def _largest(self, run: History) -> LargestU:
        """Looked up once for each checkpoint."""
        files = sorted((run.folder / "checkpoints").glob("*.pt"))
        key = (run.folder, *((file.name, file.stat().st_mtime_ns) for file in files if file.exists()))
        if key not in self._hard:
            self._hard = {k: v for k, v in self._hard.items() if k[0] != run.folder}
            flags = run.flags if self.train_data is None else run.flags | {"train_data": self.train_data}
            self._hard[key] = largest_u(run.folder, flags, self.samples, self.seconds)
        return self._hard[key]
