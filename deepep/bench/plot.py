"""Bars of every operation, with the bare calls and the floor beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepep.bench.report import Row


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Draw the time of each row, in milliseconds, to a file of the kind its name says."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = [f"{row.op}\n{row.routing}" + (f", {row.num_sms} SMs" if row.num_sms else "") for row in rows]
    places = list(range(len(rows)))
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(rows)), 4.5), layout="constrained")
    axes.bar(places, [row.best_us / 1e3 for row in rows], width=0.6, color="tab:blue", label="deepep")
    for label, color, times in (
        ("bare all_to_all_single", "tab:orange", [row.bare_us for row in rows]),
        ("floor of the link", "black", [row.floor_us for row in rows]),
    ):
        known = [(place, time / 1e3) for place, time in zip(places, times, strict=True) if time]
        if known:
            xs, ys = zip(*known, strict=True)
            axes.scatter(xs, ys, marker="_", s=700, linewidths=3, color=color, label=label, zorder=3)
    axes.set_xticks(places, names, rotation=45, ha="right", fontsize=8)
    axes.set(ylabel="ms", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
