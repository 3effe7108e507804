"""The study: which method to use untuned, which tuned, and how well does SePPO's sign judge samples?

    python assets/study.py            # 976 runs, eleven hours on two cores; run it again to resume
    python assets/study.py --tables   # no runs: study.md and study.png, from the lines of study.jsonl

The base model of the world `far` has not seen preferred pictures; `near` starts from that model after 40 updates of
sft on them. Every method runs in every cell of a grid of learning rates and betas, on 2 seeds. Tuned: the cell whose
mean with its neighbours is highest (one lucky cell counts less), scored on fresh seeds. Best cell: the one with the
highest mean of its own; it runs on fresh seeds too if it is not the tuned cell and beats tuned sft.

Each run is measured on 480 pictures. score: 1 is flawless, 0 is as good as plain grey (ruined models fall below).
gained: score at best contrast gain. shape: share of pictures with the caption's shape. distance: energy distance to
preferred pictures (lower is better; other preferred pictures have about 0). clipped: share of pixel values at the
limit. sign_pos: share of x^r that lose. mean gain, worst run, below base: scores of the grid less the base model's.
close: only the runs within one lr step of the tuned cell. one step of lr up, two steps up: change of the score from
the tuned lr, over all betas. minus X: paired by seed, in the grid also by cell. In round brackets: lowest and highest.
±: a 95 % interval over 8 seeds, 4 for ablations and forms (Student's t, not corrected for the number of comparisons);
bold where it excludes 0. No interval covers another task or base model.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import eval as evaluation  # noqa: E402
import seppo  # noqa: E402

BASES = {"far": seppo.MINI_BASE, "near": seppo.MINI_BASE.with_name("near-base")}
ABLATIONS = {"seppo " + " ".join(switch): switch for switch in (["--flip", "none"], ["--reference", "initial"])}
METHODS = {name: ["--method", name] for name in ("seppo", "sspo", "spin", "sft", "ditto", "dpo")} | ABLATIONS
MODES = ("independent draw", "8 draws", "coin", "batch's mean", "previous mean", "oracle")  # see Anchored
FORMS = {f"{mode}, {flip}": ["--flip", flip] for mode in MODES for flip in ("sign", "indicator")} | {"half": []}
BEST = ", best cell"  # after a method's name
OWN = ("seppo", "sspo", "seppo --flip none")  # forms with the loss's own draw: sign, indicator, no sign
LR, BETA = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), (5, 250, 2000)  # betas' logits: ~0.01, 0.3 and 2
GRID_SEEDS, FORM_SEEDS, FRESH_SEEDS = (0, 1), range(4), range(10, 18)
CELLS = [("far", 1e-4, 5), ("far", 3e-5, 5), ("far", 1e-5, 250), *(("near", lr, 5) for lr in (1e-4, 3e-4, 3e-5))]
HIGHER = [("far", 3e-4, 5), ("far", 1e-3, 5), ("near", 1e-3, 5)]  # the best two of CELLS' forms are also tried there

# ---- What is measured -----------------------------------------------------------------------------------------------

mean, PROMPTS = statistics.fmean, seppo.CAPTIONS * 30
load_net = lambda folder: seppo.load_unet(folder, "UNet2DConditionModel")
unit_vectors = lambda x: F.normalize(x.flatten(1) - x.flatten(1).mean(1, keepdim=True))  # u @ v is a correlation


@functools.cache
def templates():  # clean pictures of all captions with random places, blurs and sizes: (N, 768), and their N shapes
    captions, pixels, _ = zip(*seppo.mini_rows("mini-mixture", 16384, 3))
    return unit_vectors(torch.stack(pixels)), [caption.split()[-1] for caption in captions]


def shape_accuracy(pixels, captions):
    """Share of (B, 3, 16, 16) pictures whose most similar template has the caption's shape. Chance is 0.25."""
    known, shapes = templates()
    found = (unit_vectors(pixels) @ known.T).argmax(1)
    return mean(shapes[i] == caption.split()[-1] for i, caption in zip(found, captions))


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'| of samples (N, d) and (M, d): about 0 if both have the same distribution."""
    distance = functools.partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # the default is inexact
    within = lambda z: distance(z, z).sum() / (len(z) * (len(z) - 1))
    return (2 * distance(x, y).mean() - within(x) - within(y)).item()


@functools.cache
def preferred_pictures(seed):  # (n, 3, 16, 16) for each caption; the runs train on those of seed 0
    rows = seppo.mini_rows("mini", 2048, seed)
    return [torch.stack([x for caption, x, _ in rows if caption == wanted]) for wanted in seppo.CAPTIONS]


def measure(pixels):  # pictures of PROMPTS -> what is measured on them, as explained at the top
    score = lambda gain: seppo.mini_score((gain * pixels).clamp(-1, 1), PROMPTS).mean().item()
    by_caption = zip(pixels.flatten(1).unflatten(0, (-1, len(seppo.CAPTIONS))).unbind(1), preferred_pictures(1))
    found = dict(score=score(1), gained=max(map(score, torch.linspace(0.3, 3, 55))))
    found |= dict(shape=shape_accuracy(pixels, PROMPTS), clipped=(pixels.abs() >= 1).float().mean().item())
    return found | {"distance": mean(energy_distance(x, y.flatten(1)) for x, y in by_caption)}


def mini_pictures(unet, captions, noise):
    codec = seppo.Miniature("cpu")
    context, empty = codec.encode_text(captions), codec.encode_text([""])
    settings = dict(steps=seppo.SMALL["sampler_steps"], guidance=seppo.SMALL["guidance"])
    return codec.decode(seppo.sample(unet, codec.scheduler, noise, context, empty, **settings)).nan_to_num()


def measure_net(folder):
    return measure(mini_pictures(load_net(folder), PROMPTS, torch.stack(evaluation.start_noise(PROMPTS, (12, 8, 8)))))


@torch.no_grad()
def anchor_truth(run, rule, seed, n=256, many=16):
    """From better to agrees: does the sign -1 find the better x^r? Rates over n winners and `many` draws of (t, eps),
    means over the run's checkpoint pairs that --reference allows. better: x^r scores above the policy's picture from
    the same noise. minus: the sign is -1. gain: rate of better x^r where the sign is -1, less the rate over all.
    gain_many: the same for the sign of the draws' mean. agrees: mean error and mean score prefer the same model."""
    captions, winners, _ = zip(*seppo.mini_rows("mini", n, 1000 + seed))
    codec, x, errors, scores = seppo.Miniature("cpu"), F.pixel_unshuffle(torch.stack(winners), 2), [], []
    draws = [seppo.draws(f"truth {seed} {i}", range(n), x.shape[1:], 1000, 0) for i in range(many)]
    context, start, found = codec.encode_text(captions), draws[0][-1], []
    for step in sorted(int(folder.name[11:]) for folder in run.glob("checkpoint-*")):
        unet = load_net(run / f"checkpoint-{step}")
        by_draw = [seppo.denoising_error(unet, codec.scheduler, x, eps, t, context) for t, _, eps, *_ in draws]
        errors.append(torch.stack(by_draw))  # (many, n)
        scores.append(seppo.mini_score(mini_pictures(unet, captions, start), captions))  # (n,)
    for r, p in itertools.combinations(range(len(scores)), 2):  # reference and policy
        minus, better = errors[r] < errors[p], scores[r] > scores[p]
        gain = lambda mask: (mask & better).sum() / mask.sum() - better.float().mean()  # nan: the mask is empty
        agrees = (errors[r].mean() < errors[p].mean()) == (scores[r].mean() > scores[p].mean())
        rates = dict(better=better.float().mean(), minus=minus.float().mean(), gain=gain(minus), agrees=agrees.float())
        rates["gain_many"] = gain(errors[r].mean(0) < errors[p].mean(0))
        found += [rates] if rule == "random" or r == 0 else []
    return {name: torch.stack([rates[name] for rates in found]).nanmean().item() for name in found[0]}


# ---- The runs -------------------------------------------------------------------------------------------------------


class Anchored(seppo.Trainer):
    """Forms of the sign, in place of that of the loss's own draw of (t, eps). independent draw: the sign of another
    draw; 8 draws: that of their mean. coin: the loss's own signs in random order. batch's mean: the sign of the
    batch's mean; previous mean: that of the update before, 0 where the reference has just changed. oracle: -1 where
    x^r scores above the policy's picture. half: x^r always loses, with half the weight. indicator: 0 replaces -1."""

    def __init__(self, mode, *args):
        super().__init__(*args)
        self.mode, self.last, self.chance = mode, (None, None), torch.Generator().manual_seed(self.o.seed)

    def advantage(self, x_w, eps, t, context):  # (B,) the reference's error less the policy's
        nets, rest = (self.reference, self.policy), (self.codec.scheduler, x_w, eps, t, context)
        return torch.sub(*(seppo.denoising_error(net, *rest) for net in nets))

    @torch.no_grad()
    def anchor_sign(self, batch, texts, noise_r):
        n, g, own = len(texts), self.chance, lambda: self.advantage(**batch)
        if self.mode == "half":
            sign = torch.full((n,), 0.5)
        elif self.mode in ("independent draw", "8 draws"):
            drawn = lambda: dict(t=torch.randint(1000, (n,), generator=g), eps=torch.randn(noise_r.shape, generator=g))
            sign = sum(self.advantage(**batch | drawn()) for _ in range(8 if self.mode == "8 draws" else 1)).sign()
        elif self.mode == "coin":
            sign = own().sign()[torch.randperm(n, generator=g)]
        elif self.mode == "batch's mean":
            sign = own().mean().sign().expand(n)
        elif self.mode == "previous mean":
            index, previous = self.last
            sign = previous.sign().expand(n) if index == self.reference_index else torch.zeros(n)
            self.last = self.reference_index, own().mean()
        elif self.mode == "oracle":
            pictures = (mini_pictures(net, texts, noise_r) for net in (self.policy, self.reference))
            sign = torch.sub(*(seppo.mini_score(pixels, texts) for pixels in pictures)).sign()
        return sign.clamp(min=0) if self.o.flip == "indicator" else sign


def run_cell(world, variant, lr, beta, seed, truth=False):  # one run -> its measures, also those of anchor_truth
    if variant == "base":
        return measure_net(BASES[world])
    if variant == "preferred":
        return measure(torch.stack([pixels[:30] for pixels in preferred_pictures(2)], 1).flatten(0, 1))
    kind = functools.partial(Anchored, variant.partition(",")[0]) if variant in FORMS else seppo.Trainer
    with tempfile.TemporaryDirectory(prefix="study-") as folder, contextlib.redirect_stderr(io.StringIO()) as said:
        argv = ["--unet", str(BASES[world]), "--lr", f"{lr:g}", "--seed", f"{seed}", *(METHODS | FORMS)[variant]]
        argv += [*(["--beta", f"{beta:g}"] if beta else []), "--device", "cpu", "--out", folder]
        code = seppo.main(argv, lambda argv: seppo.train(seppo.parse_args(argv), kind))
        reason = said.getvalue().rpartition("seppo.py: ")[2].strip()
        seppo.need(code == 0 or "not finite" in reason, f"python seppo.py {' '.join(argv)}: {reason}")
        if code:  # counts as plain grey
            return measure(torch.zeros(len(PROMPTS), 3, 16, 16)) | {"sign_pos": 0.0}
        o, log = seppo.parse_args(argv), map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        line = {"sign_pos": mean(update["sign_pos"] or 0 for update in log)}
        line |= measure_net(Path(folder, f"checkpoint-{o.steps}"))
        return line | (anchor_truth(Path(folder), o.reference, seed) if truth and o.flip != "none" else {})


def start_worker():  # quiet, on one thread; it ends with the study, even if that is killed
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


T95 = (None, None, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # Student's t, by the number of values
KEY, MEASURES = ("world", "variant", "lr", "beta", "seed"), ("score", "gained", "shape", "distance")
seeded = lambda cells, seeds: [(*cell, seed) for seed in seeds for cell in cells]
flat = lambda runs, variants: [run for variant in variants for world in BASES for run in runs(variant, world)]
minus = lambda a, b: [x - y for x, y in zip(a, b)]
half = lambda values: T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
interval = lambda values, form=".3f": f"{mean(values):{form}} ± {half(values):.3f}"
bold = lambda values: ("**{}**" if abs(mean(values)) > half(values) else "{}").format(interval(values, "+.3f"))
spread = lambda values, form="+.3f": f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(title, names, row, items):
    """Markdown. row(*item) yields (heading, text) until a run is missing. names: the headings of the item's parts."""
    rows = []
    for item in items:
        cells = {}
        with contextlib.suppress(KeyError):
            for heading, text in row(*item):
                cells[heading] = text
        rows += [dict(zip(names, item)) | cells] if cells else []
    head = [*max(rows, key=len, default=names)]
    return f"## {title}\n\n{evaluation.markdown(head, *([row.get(name, '') for name in head] for row in rows))}\n"


class Study(dict):
    """{run: its line in study.jsonl}; a run is (world, variant, lr, beta, seed). digests: {world: base's digest}."""

    def __init__(self, path, digests):
        self.path, self.digests = path, digests
        with seppo.explained(f"{path} cannot be read", "restore it, or choose another --out"):
            for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
                base = digests.setdefault(line["world"], line["base"])
                what = f"{path} has a run of `{line['world']}` from the base model {line['base']}, not {base}"
                seppo.need(line["base"] == base, f"{what}: restore the former, or choose another --out")
                self[tuple(line[name] for name in KEY)] = line

    def make(self, what, runs, truth=False):  # makes the missing ones of these runs, one per core at a time
        missing = [run for run in runs if run not in self]
        print(f"{what}: {len(missing)} of {len(runs)} runs to make, on {os.cpu_count()} cores")
        pool = ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
        try:
            jobs = {pool.submit(run_cell, *run, truth): run for run in missing}
            for job in tqdm(as_completed(jobs), desc=what, total=len(jobs), unit="run") if jobs else ():
                if not job.exception():
                    run = jobs[job]
                    self[run] = dict(zip(KEY, run)) | {"base": self.digests[run[0]]} | job.result()
                    with seppo.explained(f"{self.path} cannot be written", seppo.ROOM), open(self.path, "a") as file:
                        print(json.dumps(self[run]), file=file)
            for job in jobs:  # a failure is raised when the other runs are written
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, runs, name="score"):
        return [self[run][name] for run in runs]

    def mean(self, runs):  # -inf until all of them are made
        return mean(self.read(runs)) if {*runs} <= {*self} else float("-inf")

    def tried(self, variant, world):  # the runs from which the variant's cell is chosen
        if variant in FORMS:
            return seeded([(w, variant, *at) for w, *at in CELLS + HIGHER if w == world], FORM_SEEDS)
        return seeded([(world, variant, lr, b) for lr in LR for b in (BETA if variant != "sft" else (0,))], GRID_SEEDS)

    def choose(self, variant, world):  # the cell with the highest mean over itself and its neighbours in lr and beta
        tried = self.tried(variant, world)
        place = {run: (LR.index(run[2]), BETA.index(run[3] or BETA[0])) for run in tried}
        near = lambda a, most: [b for b in tried if sum(abs(i - j) for i, j in zip(place[a], place[b])) <= most]
        outside = lambda a: 5 - len(near(a, 1)) // len(near(a, 0))  # neighbours off the grid count as the cell itself
        return max(tried, key=lambda a: self.mean(near(a, 1) + near(a, 0) * outside(a)))[:4]

    def best(self, variant, world):  # the runs of the cell with the highest mean, however lucky
        tried = self.tried(variant, world)
        return max(([b for b in tried if b[:4] == a[:4]] for a in tried), key=self.mean)

    def doubtful(self):  # methods whose best cell was not chosen and seems to beat tuned sft
        better = lambda m, world: self.mean(self.best(m, world)) > self.mean(self.fresh("sft", world)) > float("-inf")
        other = lambda *item: self.best(*item)[0][:4] != self.choose(*item)
        return [(m + BEST, w) for m, w in itertools.product(METHODS, BASES) if better(m, w) and other(m, w)]

    def fresh(self, variant, world):  # the chosen cell on fresh seeds, fewer for ablations
        if variant in ("base", "preferred"):
            return [(world, variant, 0, 0, 0)]
        if variant.endswith(BEST):
            return seeded([self.best(variant.removesuffix(BEST), world)[0][:4]], FRESH_SEEDS)
        return seeded([self.choose(variant, world)], FRESH_SEEDS[: 4 if variant in ABLATIONS else 8])

    def best_forms(self):  # the best two without the oracle, which needs the true score
        forms = [form for form in FORMS if "oracle" not in form]
        return sorted(forms, key=lambda f: -self.mean(seeded([(w, f, *at) for w, *at in CELLS], FORM_SEEDS)))[:2]

    def stages(self):
        """(what, its runs, whether to run anchor_truth), most important first; later ones depend on earlier ones."""
        by_seed = functools.partial(sorted, key=lambda run: run[-1])
        yield "base models and preferred pictures", flat(self.fresh, ["base", "preferred"])
        for what, methods in (("main", [*METHODS][:4]), ("other", [*METHODS][4:])):
            yield f"grid of the {what} methods", by_seed(flat(self.tried, methods))
            yield f"tuned {what} methods on fresh seeds", flat(self.fresh, methods), True
        for world, *at in CELLS:
            yield f"what the sign knows, {world} {at}", seeded([(world, f, *at) for f in (*OWN, *FORMS)], FORM_SEEDS)
        higher = [(world, form, *at) for form in self.best_forms() for world, *at in HIGHER]
        yield "best forms of the sign at higher rates", seeded(higher, FORM_SEEDS)
        yield "best forms of the sign on fresh seeds", flat(self.fresh, self.best_forms())
        yield "best cells on fresh seeds", [run for item in self.doubtful() for run in self.fresh(*item)]

    def untuned_row(self, variant, world):
        base, tried = self[world, "base", 0, 0, 0]["score"], self.tried(variant, world)
        gains, own = {"": [score - base for score in self.read(tried)]}, LR.index(self.choose(variant, world)[2])
        gains["close: "] = [gain for run, gain in zip(tried, gains[""]) if abs(LR.index(run[2]) - own) <= 1]
        sft = mean(self.read(self.fresh("sft", world))) - base
        for close, values in gains.items():
            yield f"{close}mean gain", f"{mean(values):+.3f}"
            yield f"{close}worst run", f"{min(values):+.3f}"
            yield f"{close}below base", f"{mean(gain < 0 for gain in values):.0%}"
            yield f"{close}above tuned sft", f"{mean(gain > sft for gain in values):.0%}"
        best = self.best(variant, world)
        score, distance = (mean(self.read(best, name)) for name in ("score", "distance"))
        yield "best cell", "lr {:g}, beta {:g}: {:.3f}, distance {:.3f}".format(*best[0][2:4], score, distance)
        for name in ("distance", "shape"):
            yield name, spread(self.read(tried, name), ".3f")
        for steps, lr in zip(("one step of lr up", "two steps up"), LR[own + 1 :]):
            scores = (self.read(run for run in tried if run[2] == rate) for rate in (lr, LR[own]))
            yield steps, spread(minus(*scores))
        for other in ("sft", "seppo"):
            same = [(world, other, lr, beta if other != "sft" else 0, seed) for *_, lr, beta, seed in tried]
            yield f"minus {other}", spread(minus(self.read(tried), self.read(same)))

    def tuned_row(self, variant, world):
        runs = self.fresh(variant, world)
        for name in ("lr", "beta"):
            yield name, f"{self[runs[0]][name]:g}"
        for name in (*MEASURES, "clipped", "sign_pos", "better", "minus", "gain", "gain_many", "agrees"):
            yield name, interval(self.read(runs, name)) if len(runs) > 1 else f"{self[runs[0]][name]:.3f}"

    def difference_row(self, variant, world):
        for other, name in itertools.product(("sft", "seppo", "sspo"), MEASURES):
            values = (self.read(self.fresh(v, world), name) for v in (variant, other))
            yield f"{name} minus {other}", bold(minus(*values))

    def form_row(self, form):
        for world, own in itertools.product(BASES, ("seppo", "sspo")):
            cells = lambda v, seed: [(w, v, *at, seed) for w, *at in CELLS if w == world]
            means = ([mean(self.read(cells(v, seed))) for seed in FORM_SEEDS] for v in (form, own))
            yield f"{world}, minus {own}", bold(minus(*means))
        for seeds, (world, *at) in [(FORM_SEEDS, cell) for cell in CELLS] + [(GRID_SEEDS, cell) for cell in HIGHER]:
            heading = "{} lr {:g}, beta {:g} ({} seeds)".format(world, *at, len(seeds))
            yield heading, f"{mean(self.read(seeded([(world, form, *at)], seeds))):.3f}"

    def report(self):  # study.md, from study.jsonl alone
        stages = [(what, sum(run not in self for run in runs), len(runs)) for what, runs, *_ in self.stages()]
        missing = "; ".join(f"{what} ({n} of {of})" for what, n, of in stages if n) or "none"
        rows = lambda *variants: [(variant, world) for world in BASES for variant in variants]
        known = ", ".join(f"{v} {w} scores {self.mean(self.fresh(v, w)):.3f}" for v, w in rows("base", "preferred"))
        names, tuned = ("method", "world"), rows(*METHODS, *self.best_forms()) + self.doubtful()
        planned = {run for _, runs, *_ in self.stages() for run in runs}
        text = [f"# The study: {len(planned & {*self})} of {len(planned)} runs\n\nMissing: {missing}.\n"]
        text.append(table(f"Without tuning: every run of the grid ({known})", names, self.untuned_row, rows(*METHODS)))
        text.append(table("Tuned, on fresh seeds", names, self.tuned_row, rows("base", "preferred") + tuned))
        text.append(table(f"Tuned, minus another method ({known})", names, self.difference_row, tuned))
        text.append(table(f"Forms of the sign ({known})", ("sign",), self.form_row, [(f,) for f in (*OWN, *FORMS)]))
        explained = [*__doc__.split("\n\n")[2:], anchor_truth.__doc__, Anchored.__doc__]
        return "\n".join([*text, "\n\n".join(textwrap.dedent("    " + text).strip() for text in explained), ""])


def run(argv=None):
    import study_figure  # it needs matplotlib, which the runs do not

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: seppo.need(False, f"{message} (--help lists the options)")
    parser.add_argument("--tables", action="store_true", help="no runs: study.md and study.png from study.jsonl")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of study.jsonl, study.md and study.png")
    o, digests = parser.parse_args(argv), {}
    for world, folder in {} if o.tables else BASES.items():
        seppo.need(folder.is_dir(), f"there is no {folder}: copy it from the repository")
        digests[world] = evaluation.digest(*load_net(folder).state_dict().values())
    o.out.mkdir(parents=True, exist_ok=True)
    study = Study(o.out / "study.jsonl", digests)
    for stage in [None] if o.tables else study.stages():
        if stage:
            study.make(*stage)
        with seppo.atomic(o.out / "study.md") as file:
            file.write_text(study.report(), "utf-8")  # after each stage
        study_figure.draw_figure(study, o.out / "study.png")
    print(f"{o.out}: study.md, study.png")


if __name__ == "__main__":
    sys.exit(seppo.main(None, run, "study.py"))
