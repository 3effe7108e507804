"""The study: all methods on the miniature, in two worlds, with what the paper's comparisons lack.

    python assets/study.py            # about 550 runs, hours on two cores; killed, the same command goes on
    python assets/study.py --small    # 18 runs, minutes: the machinery, not the verdict

In the world `far` the base model is far from what people like; in `near` it has learned from the liked pictures. Each
method has its own lr and beta, chosen in three steps, so that luck is not chosen too: a grid on 2 seeds (and once a
value beyond its edge, where the best cell lies there); the best two on 4 more; the better by all six on fresh seeds,
which alone are reported. A run is a line of study.jsonl, of which study.md and the pictures are made.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import eval as evaluation  # noqa: E402
import seppo  # noqa: E402

VARIANTS = {method: ["--method", method] for method in seppo.METHODS}
VARIANTS |= {"random, no flip": ["--flip", "none"], "initial, sign": ["--reference", "initial"]}  # switches from seppo
NEAR = ["--method", "sft", "--steps", "300", "--lr", "9e-4"]  # what the base of `near` has learned before
FULL = dict(variants=[*VARIANTS], lr=(1e-5, 3e-5, 1e-4, 3e-4), beta=(5, 25), edge=True)
FULL |= dict(grid=(0, 1), chosen=(2, 3, 4, 5), fresh=tuple(range(10, 18)))
SMALL = dict(variants=["seppo", "sspo", "sft"], lr=(1e-4,), beta=(5,), edge=False, grid=(0,), chosen=(), fresh=(8, 9))
BEYOND = {1e-5: 3e-6, 3e-4: 9e-4, 5: 1, 25: 125}  # the edges, and what lies beyond them
T95 = (None, float("nan"), 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # Student's t, by the number of values


# ---- A run ----------------------------------------------------------------------------------------------------------


def quietly(argv):
    """The command, on one thread -> its exit code, and what it said last."""
    torch.set_num_threads(1)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = seppo.main(argv)
    return code, said.getvalue().rpartition("seppo.py: ")[2].strip()


def load_net(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        return seppo.load_unet(folder, "UNet2DConditionModel")


def base_models():
    """{world: its base model's folder}, trained once, before many processes need them."""
    far = Path(seppo.MINI_BASE, f"checkpoint-{seppo.MINI['mini-untrained']['steps']}")
    near, steps = Path("runs/study-near"), seppo.parse_args(NEAR).steps
    if not (near / f"checkpoint-{steps}").is_dir() or not far.is_dir():
        code, said = quietly([*NEAR, "--device", "cpu", "--out", str(near)])
        seppo.need(code == 0, said)
    return {"far": str(far), "near": str(near / f"checkpoint-{steps}")}


def mini_pictures(unet, captions, noise):
    codec = seppo.Miniature("cpu")
    context, empty = codec.encode_text(captions), codec.encode_text([""])
    settings = dict(steps=seppo.SMALL["sampler_steps"], guidance=seppo.SMALL["guidance"])
    return codec.decode(seppo.sample(unet, codec.scheduler, noise, context, empty, **settings))


def mini_mean(unet):
    prompts = evaluation.read_prompts("mini")
    noise = torch.stack(evaluation.start_noise(prompts, (12, 8, 8)))
    return seppo.mini_score(mini_pictures(unet, prompts, noise), prompts).mean().item()


@torch.no_grad()
def anchor_truth(run, rule, n=256, many=16):
    """What the anchor's sign is worth, where the truth is known: over the pairs of a run's checkpoints, the later one
    as policy, the earlier one as a reference that the rule allows, on n winners each. -> rates. better: x^r scores
    above what the policy draws from the same noise. minus: the sign is -1 ("take x^r for a winner"); precision and
    recall of that, with one draw of (t, eps) for the anchor, and `_many`: the errors are means over 16."""
    captions, winners, _ = zip(*seppo.mini_rows("mini")[:n])
    codec, x, errors, scores = seppo.Miniature("cpu"), F.pixel_unshuffle(torch.stack(winners), 2), [], []
    chance = [seppo.draws(f"truth {i}", range(n), x.shape[1:], 1000, 0) for i in range(many)]
    context, start = codec.encode_text(captions), chance[0][-1]
    for step in sorted(int(p.name[11:]) for p in run.glob("checkpoint-*")):
        unet = load_net(run / f"checkpoint-{step}")
        drawn = [seppo.denoising_error(unet, codec.scheduler, x, eps, t, context) for t, _, eps, *_ in chance]
        errors.append(torch.stack(drawn))  # (many, n)
        scores.append(seppo.mini_score(mini_pictures(unet, captions, start), captions))
    pairs = []
    for policy in range(1, len(scores)):
        pairs += [(reference, policy) for reference in {"random": range(policy), "initial": [0]}[rule]]
    better = torch.cat([scores[r] > scores[p] for r, p in pairs])
    minus = torch.cat([errors[r][0] < errors[p][0] for r, p in pairs])
    minus_many = torch.cat([errors[r].mean(0) < errors[p].mean(0) for r, p in pairs])
    share = lambda mask, of: (mask & of).sum().item() / max(1, of.sum().item())
    rates = {"better": better.float().mean().item(), "minus": minus.float().mean().item()}
    rates |= {"precision": share(better, minus), "recall": share(minus, better)}
    return rates | {"precision_many": share(better, minus_many), "recall_many": share(minus_many, better)}


def place(world, variant, lr, beta, seed):
    return Path("runs/study", re.sub(r"\W+", "-", f"{world}-{variant}-lr{lr:g}-beta{beta:g}-seed{seed}"))


def run_cell(world, base, variant, lr, beta, seed, truth=False):
    """One run -> its line. score: the mean of 480 pictures (0, as plain grey, if the loss ceased to be finite).
    truth: the anchor's sign is held against the truth, and the final net stays."""
    run = place(world, variant, lr, beta, seed)
    shutil.rmtree(run, ignore_errors=True)  # what a kill left
    argv = ["--lr", f"{lr:g}", "--seed", f"{seed}", "--device", "cpu", "--out", str(run), *VARIANTS[variant]]
    argv += ["--beta", f"{beta:g}"] if beta else []
    argv += ["--unet", base] if world == "near" else []
    code, reason = quietly(argv)
    seppo.need(code == 0 or "not finite" in reason, f"python seppo.py {' '.join(argv)}: {reason}")
    o = seppo.parse_args(argv)
    last, lines = run / f"checkpoint-{o.steps}", (run / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, lines) if line["sign_neg"] is not None]
    score = 0.0 if code else mini_mean(load_net(last))
    cell = dict(world=world, variant=variant, lr=lr, beta=beta, seed=seed, score=score)
    for sign in ("sign_neg", "sign_zero", "sign_pos") if lines else ():
        cell[sign] = sum(line[sign] for line in lines) / len(lines)
    if truth and code == 0 and o.flip != "none":
        cell |= anchor_truth(run, o.reference)
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
        elif path != last or not truth:
            shutil.rmtree(path)
    return cell


class Runs:
    """The lines there are, and those that are still to be made."""

    key = staticmethod(lambda line: tuple(line[name] for name in ("world", "variant", "lr", "beta", "seed")))

    def __init__(self, path, bases):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.path, self.bases = path, bases
        self.lines = {self.key(line): line for line in map(json.loads, path.read_text().splitlines())}

    def add(self, line):
        self.lines[self.key(line)] = line
        with open(self.path, "a") as file:
            print(json.dumps(line), file=file)

    def make(self, cells, what, truth=False):
        """Runs what is missing of these cells (world, variant, lr, beta, seed), on all cores."""
        missing = [cell for cell in dict.fromkeys(cells) if cell not in self.lines]
        with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(run_cell, c[0], self.bases[c[0]], *c[1:], truth) for c in missing]
            for job in tqdm(as_completed(jobs), desc=what, total=len(jobs), unit="run"):
                if not job.exception():
                    self.add(job.result())
            for job in jobs:  # what failed is said when the others are written
                job.result()

    def mean(self, seeds, *point):
        return sum(self.lines[*point, seed]["score"] for seed in seeds) / len(seeds)


# ---- The comparison -------------------------------------------------------------------------------------------------

ONE_SWITCH = [("seppo", "random, no flip"), ("sspo", "seppo"), ("seppo", "initial, sign")]  # a method, less another
ONE_SWITCH += [("random, no flip", "spin"), ("random, no flip", "ditto")]
LEGEND = """Score: of 480 pictures. ±: a 95 % interval over the seeds {plan.fresh} (Student's t, not corrected for the
number of comparisons), for one base model and these pictures' noises; differences are paired by seed. Settings chosen
on {plan.grid}, the best two on {plan.chosen} too; *: beyond the grid, nothing further was tried. Cells: the grid's.
x^r better: than the policy's own from the same noise. Sign -1: what the criterion says (sspo then makes no x^r), by
one draw of (t, eps) and by 16; gain: its precision less a coin's, "x^r better". One switch turned: at both methods'
settings; at each lr mean (range) over beta, seed. strip.png: of each world base, sft, spin, seppo, sspo. {n} runs."""


def interval(values, form="{:.3f} ± {:.3f}"):
    values = torch.tensor(values, dtype=torch.float64)
    return form.format(values.mean().item(), T95[len(values)] * values.std().item() / len(values) ** 0.5)


def choose(runs, plan):  # the three steps -> {(world, variant): (lr, beta)}, and its grid
    pairs = list(itertools.product(runs.bases, plan.variants))
    grid = {pair: list(itertools.product(plan.lr, plan.beta if pair[1] != "sft" else (0,))) for pair in pairs}
    runs.make([(*pair, *at, seed) for pair in pairs for at in grid[pair] for seed in plan.grid], "grid")
    mean = lambda pair, seeds: lambda at: runs.mean(seeds, *pair, *at)
    tried = {pair: list(grid[pair]) for pair in pairs}
    for pair in pairs if plan.edge else ():
        lr, beta = max(grid[pair], key=mean(pair, plan.grid))
        tried[pair] += [(BEYOND[lr], beta)] if lr in BEYOND else []
        tried[pair] += [(lr, BEYOND[beta])] if beta in BEYOND else []
    runs.make([(*pair, *at, seed) for pair in pairs for at in tried[pair] for seed in plan.grid], "beyond the edge")
    two = {pair: sorted(tried[pair], key=mean(pair, plan.grid))[-2:] for pair in pairs}
    runs.make([(*pair, *at, seed) for pair in pairs for at in two[pair] for seed in plan.chosen], "the best two")
    return {pair: max(two[pair], key=mean(pair, plan.grid + plan.chosen)) for pair in pairs}, grid


def tables(runs, plan, chosen, grid):
    heads = ["method", "lr", "beta", "score", "minus sft", "minus seppo", "worst cell", "cells below the base"]
    heads += ["made x^r", "x^r better", "sign -1", "gain", "recall", "16 draws: gain", "recall"]
    text = []
    for world in runs.bases:
        rows, at_base = [heads], runs.lines[world, "base", 0, 0, 0]["score"]
        fresh = {v: [runs.lines[world, v, *chosen[world, v], seed] for seed in plan.fresh] for v in plan.variants}
        for v in plan.variants:
            lr, beta = chosen[world, v]
            score = [line["score"] for line in fresh[v]]
            star = lambda value, tried: f"{value:g}" + "*" * (value not in tried)
            row = [v, star(lr, plan.lr), star(beta, plan.beta) if beta else "", interval(score)]
            for other in ("sft", "seppo"):
                minus = [a - b["score"] for a, b in zip(score, fresh[other])]
                row.append(interval(minus, "{:+.3f} ± {:.3f}") if v != other else "")
            cells = [runs.mean(plan.grid, world, v, *at) for at in grid[world, v]]
            row += [f"{min(cells):.3f}", f"{sum(cell < at_base for cell in cells)} of {len(cells)}"]
            made = [line["sign_pos"] if v == "sspo" else 1.0 for line in fresh[v] if "sign_pos" in line]
            row.append(f"{sum(made) / len(made):.0%}" if made and v not in ("dpo", "sft") else "")
            known = [x for x in fresh[v] if "precision" in x]
            for name in ("better", "minus", "precision", "recall", "precision_many", "recall_many"):
                rates = [x[name] - x["better"] * name.startswith("precision") for x in known]
                row.append(interval(rates, "{:.1%} ± {:.1%}") if known else "")
            rows.append(row)
        text.append(f"## World `{world}`: the base model has {at_base:.3f}\n\n{evaluation.markdown(*rows)}\n")
    text.append(f"## One switch turned\n\n{evaluation.markdown(*one_switch(runs, plan, chosen))}\n")
    text.append(LEGEND.format(plan=plan, n=len(runs.lines) - len(runs.bases)))
    return "\n".join(text)


def one_switch(runs, plan, chosen):  # -> the rows of that table
    rows = [["method, less another", "world", "score", *(f"at lr {lr:g}" for lr in plan.lr)]]
    for world, (a, b) in itertools.product(runs.bases, ONE_SWITCH):
        if {a, b} <= {*plan.variants}:
            score = lambda v, *at: runs.lines[world, v, *at]["score"]
            cells = [[score(a, *chosen[world, a], seed) - score(b, *chosen[world, b], seed) for seed in plan.fresh]]
            for lr in plan.lr:
                at = [(lr, *pair) for pair in itertools.product(plan.beta, plan.grid)]
                cells.append([score(a, *point) - score(b, *point) for point in at])
            spread = [f"{sum(c) / len(c):+.3f} ({min(c):+.3f} to {max(c):+.3f})" for c in cells[1:]]
            rows.append([f"{a} - {b}", world, interval(cells[0], "{:+.3f} ± {:.3f}"), *spread])
    return rows


def study(plan, out):
    """Everything: the runs, the tables, the pictures."""
    bases = base_models()
    runs = Runs(out / "study.jsonl", bases)
    for world, folder in bases.items():
        if (world, "base", 0, 0, 0) not in runs.lines:
            runs.add(dict(world=world, variant="base", lr=0, beta=0, seed=0, score=mini_mean(load_net(folder))))
    chosen, grid = choose(runs, plan)
    runs.make([(*pair, *at, seed) for pair, at in chosen.items() for seed in plan.fresh], "fresh seeds", truth=True)
    text = tables(runs, plan, chosen, grid)
    (out / "study.md").write_text(text, "utf-8")
    draw_heat(runs, plan, grid, out / "heat.png")
    nets = []
    for world, folder in bases.items():
        shown = [v for v in ("sft", "spin", "seppo", "sspo") if v in plan.variants]
        nets += [folder, *(str(place(world, v, *chosen[world, v], plan.fresh[0])) for v in shown)]
    with seppo.explained("strip.png cannot be drawn", "it needs the nets of runs/study, where the runs were made"):
        draw_strip([load_net(folder) for folder in nets], out / "strip.png")
    print(f"{text}\nIn {out}: study.md, heat.png, strip.png (rows: {', '.join(map(str, nets))})")


# ---- The pictures ---------------------------------------------------------------------------------------------------


def draw_strip(nets, path):
    captions = seppo.CAPTIONS[:12]
    noise = torch.stack(evaluation.start_noise(captions, (12, 8, 8)))
    pictures = torch.cat([mini_pictures(net, captions, noise) for net in nets])
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = [Image.fromarray(picture).resize((80, 80), Image.NEAREST) for picture in pixels]
    evaluation.save_png(diffusers.utils.make_image_grid(tiles, len(nets), len(captions)), path)


def draw_heat(runs, plan, grid, path):
    """heat.png: the mean score of every cell of the grid, a row of maps a world; white is the base, red below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * len(plan.variants), 4), layout="constrained")
    for row, world in zip(figure.subplots(2, len(plan.variants), squeeze=False), runs.bases):
        at_base = runs.lines[world, "base", 0, 0, 0]["score"]
        mean = {(v, *at): runs.mean(plan.grid, world, v, *at) for v in plan.variants for at in grid[world, v]}
        reach = max(max(mean.values()) - at_base, 1e-3)
        for axis, v in zip(row, plan.variants):
            betas = sorted({beta for _, beta in grid[world, v]})
            values = [[mean[v, lr, beta] for lr in plan.lr] for beta in betas]
            axis.imshow(values, cmap="RdBu", vmin=at_base - reach, vmax=at_base + reach, aspect="auto")
            axis.set_title(f"{v} ({world}: {at_base:.2f})", fontsize=8)
            axis.set_xticks(range(len(plan.lr)), [f"{lr:g}" for lr in plan.lr], fontsize=7)
            axis.set_yticks(range(len(betas)), [f"{beta:g}" if beta else "" for beta in betas], fontsize=7)
            for y, x in itertools.product(range(len(betas)), range(len(plan.lr))):
                ink = "white" if abs(values[y][x] - at_base) > 0.6 * reach else "black"
                axis.text(x, y, f"{values[y][x]:.2f}", ha="center", va="center", fontsize=7, color=ink)
    figure.suptitle("mean score on the grid's seeds; lr across, beta down; white, and in brackets: base", fontsize=9)
    with seppo.whole(path) as file:
        figure.savefig(file, format="png", dpi=100)


def run(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: seppo.need(False, f"{message} (--help lists the options)")
    parser.add_argument("--small", action="store_true", help="18 runs, into runs/study-small")
    parser.add_argument("--out", type=Path, help="where study.jsonl, tables and pictures lie [beside this script]")
    o = parser.parse_args(argv)
    out = o.out or (Path("runs/study-small") if o.small else HERE)
    study(argparse.Namespace(**(SMALL if o.small else FULL)), out)


if __name__ == "__main__":
    sys.exit(seppo.main(None, run, "study.py"))
