"""The figure of the study, which study.py draws from the lines of study.jsonl."""

from statistics import fmean as mean

from matplotlib.figure import Figure
from study import BASES, LR, METHODS

import seppo


def draw_figure(study, path):
    """study.png: the score against the learning rate, with a band over beta and seeds (no ablations)."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    for axis, world in zip(figure.subplots(1, 2, sharey=True), BASES):
        for variant, colour in zip(METHODS, ("#0072b2", "#009e73", "#d55e00", "#555555", "#cc79a7", "#e69f00")):
            runs = study.tried(variant, world)
            if {*runs} <= {*study}:
                at = [study.read(run for run in runs if run[2] == lr) for lr in LR]
                axis.plot(LR, [*map(mean, at)], "o-", color=colour, label=variant)
                axis.fill_between(LR, [*map(min, at)], [*map(max, at)], color=colour, alpha=0.08, lw=0)
        for variant, style in (("base", "--"), ("preferred", ":")):
            for score in study.read({*study.fresh(variant, world)} & {*study}):
                axis.axhline(score, color="black", ls=style, label=variant)
        axis.set(xscale="log", xlabel="learning rate", title=f"{world}: score (axis cut at 0.4)", ylim=(0.4, 0.85))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)
    with seppo.atomic(path) as file:
        figure.savefig(file, format="png", dpi=200)
