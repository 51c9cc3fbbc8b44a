"""The progress of training: drawn by rich on a terminal or in a notebook, told in lines of text elsewhere."""

import sys
import time

import numpy as np

_DRAW_EVERY, _TELL_EVERY = 0.25, 10.0  # seconds


class Progress:
    """Epochs and, where an epoch comes in several blocks, its blocks; rate, time left, losses, who has stopped.

    On a terminal or in a notebook a line that is redrawn; elsewhere (a log, a batch job) a line of text every ten
    seconds.

    Args:
        epochs: total number of epochs.
        members: how many; what is beyond them only fills up the devices.
        updates_per_epoch: of each.
        done: epochs that an earlier process made.
        shown: False = nothing at all.
        blocks: parts of an epoch.
    """

    def __init__(self, epochs: int, members: int, updates_per_epoch: int, done: int, shown: bool, blocks: int = 1):
        self.epochs, self.members, self.first, self.shown = epochs, members, done, shown
        self.updates_per_epoch, self.blocks, self.line = members * updates_per_epoch, blocks, None

    def __enter__(self):
        self.began = self.last_told = time.perf_counter()
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            console = Console(stderr=True)
            if console.is_terminal or console.is_jupyter:
                left = "left", TimeRemainingColumn()
                name = TextColumn("{task.description}")
                self.line = Bars(
                    name,
                    BarColumn(bar_width=16),
                    MofNCompleteColumn(),
                    *left,
                    TextColumn("{task.fields[text]}"),
                    console=console,
                )
                self.task = self.line.add_task("epoch", total=self.epochs, completed=self.first, text="compiling")
                if self.blocks > 1:
                    self.inner = self.line.add_task("block", total=self.blocks, text="")
                self.line.start()
        return self

    def say(self, sentence: str) -> None:
        """A sentence above the line."""
        if self.line is not None:
            self.line.console.print(sentence, highlight=False)
        elif self.shown:
            print(sentence, file=sys.stderr, flush=True)

    def block(self, done: int) -> None:
        """Counts a block of the epoch."""
        if self.line is not None and self.blocks > 1:
            self.line.update(self.inner, completed=done)

    def update(self, done: int, history: list[dict], over: bool = False) -> None:
        """Tells that `done` epochs are over; `history` ends with numpy arrays (member,) of the last of them."""
        now = time.perf_counter()
        wait = _TELL_EVERY if self.line is None else _DRAW_EVERY
        if not self.shown or done <= self.first or (now - self.last_told < wait and not (over and self.line)):
            return
        text = describe(*(history[-1][k][: self.members] for k in ("loss", "alive", "training")))
        spent = time.perf_counter() - self.began
        rate = (done - self.first) * self.updates_per_epoch / spent
        text = f"{rate:,.0f} updates/s  {text}"
        self.last_told = now
        if self.line is not None:
            self.line.update(self.task, completed=done, text=text)
        else:
            left = spent / (done - self.first) * (self.epochs - done)
            print(f"epoch {done}/{self.epochs}  left {left:,.0f} s  {text}", file=sys.stderr, flush=True)

    def __exit__(self, *exception):
        if self.line is not None:
            self.line.stop()


def describe(losses: np.ndarray, alive: np.ndarray, training: np.ndarray, most: int = 8) -> str:
    """The members' losses in words, of more than `most` members the range; and how many have stopped or diverged."""
    if len(losses) <= most:
        text = "loss " + " ".join(f"{x:.3f}" for x in losses)
    elif np.isfinite(losses).any():
        finite = losses[np.isfinite(losses)]
        text = f"loss {finite.min():.3f} to {finite.max():.3f}"
    else:
        text = "loss nowhere finite"
    early, dead = int((alive & ~training).sum()), int((~alive).sum())
    told = [f"{number} {word}" for number, word in ((early, "stopped early"), (dead, "diverged")) if number]
    return text + (f" ({', '.join(told)} of {len(losses)})" if told else "")
