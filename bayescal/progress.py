"""The progress line of training, drawn by rich where there is a terminal or a notebook."""

import time

import numpy as np


class Progress:
    """A line with the epoch, updates per second, time left and each member's loss; nothing without a terminal.

    Losses are fetched at most four times a second, so that training is not held up.

    Args:
        epochs: total number of epochs.
        updates_per_epoch: updates of all members together.
        shown: False = draw nothing.
    """

    def __init__(self, epochs: int, updates_per_epoch: int, shown: bool):
        self.epochs, self.updates_per_epoch, self.shown = epochs, updates_per_epoch, shown
        self.done, self.last_drawn = 0, 0.0

    def __enter__(self):
        self.began = time.perf_counter()
        self.line = None
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            console = Console(stderr=True)
            if console.is_terminal or console.is_jupyter:
                columns = "epoch", BarColumn(), MofNCompleteColumn(), "left", TimeRemainingColumn()
                self.line = Bars(*columns, TextColumn("{task.fields[text]}"), console=console)
                self.task = self.line.add_task("train", total=self.epochs, text="compiling")
                self.line.start()
        return self

    def update(self, losses) -> None:
        """Counts an epoch; `losses` is a device array (member,), fetched only when the line is redrawn."""
        self.done += 1
        if self.line is None or (time.perf_counter() - self.last_drawn < 0.25 and self.done < self.epochs):
            return
        text = describe(np.asarray(losses))  # waits for the epoch to end
        rate = self.done * self.updates_per_epoch / (time.perf_counter() - self.began)
        self.line.update(self.task, completed=self.done, text=f"{rate:,.0f} updates/s  {text}")
        self.last_drawn = time.perf_counter()

    def __exit__(self, *exception):
        if self.line is not None:
            self.line.stop()


def describe(losses: np.ndarray, most: int = 8) -> str:
    """The members' losses in words; of more than `most` members the range."""
    if len(losses) <= most:
        return "loss " + " ".join(f"{x:.3f}" for x in losses)
    return f"loss {np.nanmin(losses):.3f} to {np.nanmax(losses):.3f} ({int(np.isfinite(losses).sum())} finite)"
