"""The study: all methods on the miniature, with what the paper's comparisons lack.

    python assets/study.py            # 322 runs, hours on two cores; killed, the same command goes on
    python assets/study.py --small    # 27 runs, minutes: the machinery, not the verdict

One budget for all, each method at its own learning rate and beta (one grid, on seeds of its own), and intervals over
other seeds. A cell is an ordinary run of seppo.py. In --out lie then study.md (the comparison), heat.png (every method
over the grid) and strip.png (samples at equal noise).
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation  # noqa: E402
import seppo  # noqa: E402

VARIANTS = {method: ["--method", method] for method in seppo.METHODS}
VARIANTS |= {  # single switches from seppo
    "random, no flip": ["--flip", "none"],
    "latest, sign": ["--reference", "latest"],
    "initial, sign": ["--reference", "initial"],
}
PLANS = {
    "full": dict(lr=(1e-5, 3e-5, 1e-4, 3e-4, 9e-4), beta=(5, 25, 125), tuning=(0, 1), seeds=range(10, 18)),
    "small": dict(lr=(1e-4,), beta=(5,), tuning=(0,), seeds=range(10, 12)),
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, by the number of seeds


# ---- A cell ---------------------------------------------------------------------------------------------------------


def load_base():
    """The miniature's base model, trained here, once, before many processes need it."""
    o = seppo.parse_args(["--model", "mini-untrained", "--out", str(seppo.MINI_BASE), "--device", "cpu"])
    if not (o.out / f"checkpoint-{o.steps}").is_dir():
        seppo.train(o)
    return seppo.load_unet(seppo.MINI_BASE, "UNet2DConditionModel")


def load_net(folder):
    return seppo.load_unet(folder, "UNet2DConditionModel")


def mini_pictures(unet, captions, noise):
    """(N, 3, 16, 16) pictures that a net draws, in [-1, 1]."""
    codec = seppo.Miniature("cpu")
    context, empty = codec.encode_text(captions), codec.encode_text([""])
    settings = dict(steps=seppo.SMALL["sampler_steps"], guidance=seppo.SMALL["guidance"])
    return codec.decode(seppo.sample(unet, codec.scheduler, noise, context, empty, **settings))


def mini_mean(unet):
    """The mean score of a net's pictures for `mini`'s prompts."""
    prompts = evaluation.read_prompts("mini")
    noise = torch.stack(evaluation.start_noise(prompts, (12, 8, 8)))
    return seppo.mini_score(mini_pictures(unet, prompts, noise), prompts).mean().item()


@torch.no_grad()
def anchor_truth(run, rule, n=256, many=16):
    """What the anchor's sign is worth, where the truth is known: over the pairs of a run's checkpoints, the later one
    as policy, the earlier one as a reference that the rule allows, on n winners each. -> rates:

    better: x^r scores above what the policy draws from the same noise. Where the sign is -1 ("take x^r for a winner"):
    precision and recall for that; precision_many, as if the anchor's two errors were means over many draws of (t, eps)
    instead of one.
    """
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
        allowed = {"random": range(policy), "latest": [policy - 1], "initial": [0]}[rule]
        pairs += [(reference, policy) for reference in allowed]
    better = torch.cat([scores[r] > scores[p] for r, p in pairs])
    minus = torch.cat([errors[r][0] < errors[p][0] for r, p in pairs])
    minus_many = torch.cat([errors[r].mean(0) < errors[p].mean(0) for r, p in pairs])

    def share(mask, of):
        return (mask & of).sum().item() / max(1, of.sum().item())

    return {
        "better": better.float().mean().item(),
        "precision": share(better, minus),
        "recall": share(minus, better),
        "precision_many": share(better, minus_many),
    }


def cell_folder(out, variant, lr, beta, seed):
    return Path(out, re.sub(r"\W+", "-", variant) + f"-lr{lr:g}-beta{beta:g}-seed{seed}")


def run_cell(out, variant, lr, beta, seed, keep=False):
    """One cell -> {"score": the mean of 480 pictures (0, as plain grey, if the loss ceased to be finite), ...}; from
    the disk if it was done before. keep: its final net stays, and the anchor's sign is held against the truth."""
    run = cell_folder(out, variant, lr, beta, seed)
    path = run.with_name(run.name + ".json")
    if path.exists():
        return json.loads(path.read_text())
    argv = ["--lr", f"{lr:g}", "--seed", f"{seed}", "--device", "cpu", "--out", str(run), *VARIANTS[variant]]
    argv += ["--beta", f"{beta:g}"] if beta else []
    torch.set_num_threads(1)
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code, o = seppo.main(argv), seppo.parse_args(argv)
    reason = said.getvalue().rpartition("seppo.py: ")[2].strip()
    diverged = code != 0 and "not finite" in reason
    seppo.need(code == 0 or diverged, f"a cell of the study failed: python seppo.py {' '.join(argv)}: {reason}")
    last = run / f"checkpoint-{o.steps}"
    cell = {"argv": argv, "score": 0.0 if diverged else mini_mean(load_net(last))}
    if o.loser == "generated":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for sign in ("sign_neg", "sign_zero", "sign_pos"):  # of a skipped update there is none
            cell[sign] = [line[sign] for line in lines if line[sign] is not None]
        if keep and o.flip != "none" and not diverged:
            cell |= anchor_truth(run, o.reference)
    with seppo.whole(path) as file:
        file.write_text(json.dumps(cell))
    (run / "resume.safetensors").unlink(missing_ok=True)  # there are hundreds of runs
    for checkpoint in run.glob("checkpoint-*"):
        if not keep or checkpoint != last:
            shutil.rmtree(checkpoint)
    return cell


def run_cells(out, cells, keep, what):
    """-> {cell: its result}, on all cores. What is done already is only read."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_cell, out, *cell, keep=keep) for cell in cells]
        for _ in tqdm(as_completed(jobs), desc=what, total=len(jobs), unit="run"):
            pass
        return {cell: job.result() for cell, job in zip(cells, jobs)}


# ---- The comparison -------------------------------------------------------------------------------------------------

HEADS = ["method", "lr", "beta", "score", "minus sft", "minus seppo", "grid cells below the base"]
HEADS += ["sign -1: first half", "second half", "x^r better", "where the sign is -1", "where it is +1"]
HEADS += ["recall of -1", "where 16 draws say -1"]


def interval(values):
    """Mean and half the 95 % interval (Student's t) of what the seeds gave."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), T95[len(values)] * values.std().item() / len(values) ** 0.5


def anchor_cells(variant, runs):
    """Of the runs that have an anchor and did not diverge: how often its sign is -1, and what that is worth."""
    runs = [run for run in runs if "precision" in run]
    if len(runs) < 2:
        return [""] * 7
    rates = []
    for run in runs:
        signs = run["sign_zero" if variant == "sspo" else "sign_neg"]  # the indicator makes 0 of -1
        half = len(signs) // 2
        both = run["better"] * run["recall"]  # better, and the sign is -1
        minus = both / max(1e-9, run["precision"])
        better_at_plus = (run["better"] - both) / max(1e-9, 1 - minus)
        first, second = sum(signs[:half]) / half, sum(signs[half:]) / (len(signs) - half)
        row = [first, second, run["better"], run["precision"], better_at_plus, run["recall"], run["precision_many"]]
        rates.append(row)
    return ["{:.0%} ± {:.0%}".format(*interval(rate)) for rate in zip(*rates)]


def study(plan, out):
    """Everything: tuning, comparison, table, pictures."""
    plan, base = argparse.Namespace(**plan), load_base()
    home = out / f"cells-{evaluation.digest(base, seppo.MINI, VARIANTS)}"  # another base, other settings: other cells
    grids = {v: list(itertools.product(plan.lr, plan.beta if v != "sft" else (0,))) for v in VARIANTS}  # SFT: no beta
    points = [(v, *at) for v in VARIANTS for at in grids[v]]
    tuning = run_cells(home, [(*point, seed) for point in points for seed in plan.tuning], False, "tuning")
    mean = {point: sum(tuning[*point, s]["score"] for s in plan.tuning) / len(plan.tuning) for point in points}
    best = {v: max(grids[v], key=lambda at: mean[v, *at]) for v in VARIANTS}
    final = run_cells(home, [(v, *best[v], seed) for v in VARIANTS for seed in plan.seeds], True, "comparison")
    cells, at_base = {v: [final[v, *best[v], seed] for seed in plan.seeds] for v in VARIANTS}, mini_mean(base)
    rows = [HEADS, ["---"] * len(HEADS)]
    for v, runs in cells.items():
        below = sum(mean[v, *at] < at_base for at in grids[v])
        row = [v, f"{best[v][0]:g}", f"{best[v][1]:g}" if v != "sft" else ""]
        row.append("{:.3f} ± {:.3f}".format(*interval([run["score"] for run in runs])))
        for other in ("sft", "seppo"):
            minus = interval([a["score"] - b["score"] for a, b in zip(runs, cells[other])])
            row.append("{:+.3f} ± {:.3f}".format(*minus) if v != other else "")
        rows.append([*row, f"{below} of {len(grids[v])}", *anchor_cells(v, runs)])
    text = f"""{evaluation.markdown(rows)}

The miniature's base model: {at_base:.3f}. Score: mean over {len(plan.seeds)} seeds ({min(plan.seeds)} to \
{max(plan.seeds)}) of the mean of 480 pictures, with its 95 % interval (Student's t); differences: paired by seed. lr \
and beta: the best of the grid on seeds {", ".join(map(str, plan.tuning))}. {len(tuning) + len(final)} runs of 100 \
updates of 64 winners."""
    print("\n" + text)
    with seppo.whole(out / "study.md") as file:
        file.write_text(text + "\n", "utf-8")
    draw_heat(mean, grids, plan.lr, at_base, out / "heat.png")
    last = f"checkpoint-{seppo.MINI['mini']['steps']}"
    ends = {v: cell_folder(home, v, *best[v], plan.seeds[0]) / last for v in ("sft", "spin", "seppo") if v in VARIANTS}
    nets = {"base": base} | {v: load_net(end) for v, end in ends.items() if end.is_dir()}  # what diverged has none
    draw_strip(nets.values(), out / "strip.png")
    print(f"\nIn {out}: study.md, heat.png, strip.png ({', '.join(nets)}, seed {plan.seeds[0]}), {home.name}/")


# ---- The pictures ---------------------------------------------------------------------------------------------------


def draw_strip(nets, path):
    """strip.png: what the nets draw from equal noise, one below the other."""
    captions = seppo.CAPTIONS[:12]
    noise = torch.stack(evaluation.start_noise(captions, (12, 8, 8)))
    pictures = torch.cat([mini_pictures(net, captions, noise) for net in nets])
    pixels = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    tiles = [Image.fromarray(picture).resize((80, 80), Image.NEAREST) for picture in pixels]
    evaluation.save_png(diffusers.utils.make_image_grid(tiles, len(nets), len(captions)), path)


def draw_heat(mean, grids, rates, at_base, path):
    """heat.png: the mean score of every cell of the grid; white is the base, red below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 3, figsize=(11, 8), layout="constrained")
    reach = max(max(mean.values()) - at_base, 1e-3)  # what diverged is far below: it has the darkest red
    for axis, (v, grid) in zip(axes.flat, grids.items()):
        betas = sorted({beta for _, beta in grid})
        values = [[mean[v, lr, beta] for lr in rates] for beta in betas]
        axis.imshow(values, cmap="RdBu", vmin=at_base - reach, vmax=at_base + reach, aspect="auto")
        axis.set(title=v, xlabel="lr", ylabel="beta")
        axis.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        axis.set_yticks(range(len(betas)), [f"{beta:g}" if beta else "" for beta in betas])
        for y, x in itertools.product(range(len(betas)), range(len(rates))):
            ink = "white" if abs(values[y][x] - at_base) > 0.6 * reach else "black"
            axis.text(x, y, f"{values[y][x]:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.suptitle(f"mean score on the tuning seeds; the base model has {at_base:.2f}")
    with seppo.whole(path) as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def run(argv=None):
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.error = lambda message: seppo.need(False, f"{message} (--help lists the options)")
    parser.add_argument("--small", action="store_true", help="27 runs instead of 322")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="cells that are there are not run again")
    o = parser.parse_args(argv)
    study(PLANS["small" if o.small else "full"], o.out)


def main(argv=None):
    """The command. Returns the exit code: 0, or 2 after one line that says what to do."""
    return seppo.main(argv, run, "study.py")


if __name__ == "__main__":
    sys.exit(main())
