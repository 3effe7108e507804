"""python -m pytest: offline, on a CPU, in under two minutes. SLOW=1 adds the long ones."""
import argparse
import builtins
import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: nothing here may look for a hub

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from diffusers import (AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, MotionAdapter, PNDMScheduler,
                       StableDiffusionPipeline, UNet2DConditionModel, UNetMotionModel)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import eval as evaluation
import seppo

HERE = Path(__file__).parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="minutes: SLOW=1 runs it")
torch.set_num_threads(1)  # the nets are tiny: more threads wait for each other


# ---- Small things in the real layouts -------------------------------------------------------------------------------

def jpeg(seed, side=64):
    """A small photograph-like JPEG: smooth colour noise."""
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise[None], (side, side), mode="bicubic")[0].clamp(0, 1)
    buffer = io.BytesIO()
    Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()).save(buffer, "JPEG")
    return buffer.getvalue()


def pickapic_rows(n, first=0):
    """Rows with Pick-a-Pic's columns: every fifth is a tie, labels alternate otherwise."""
    labels = [0.5 if i % 5 == 4 else float(i % 2) for i in range(first, first + n)]
    return {"caption": [f"picture {i}" for i in range(first, first + n)], "jpg_0": [jpeg(2 * i) for i in range(first, first + n)],
            "jpg_1": [jpeg(2 * i + 1) for i in range(first, first + n)], "label_0": labels, "label_1": [1 - x for x in labels],
            "has_label": [True] * n}


def write_parquet(path, rows, group=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=group)
    return path


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A tiny Stable Diffusion 1.x, saved by diffusers: the layout of the real one, 64-pixel pictures, 0.2 M parameters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-sd")
    words = ["<|startoftext|>", "<|endoftext|>"] + [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789,." for end in ("", "</w>")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), unk_token="<|endoftext|>", model_max_length=77)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1))
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
                                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16)
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
                        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, sample_size=64)
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, skip_prk_steps=True, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


TINY = ["--resolution", "64", "--batch-size", "4", "--micro-batch", "2", "--generate-batch", "4", "--steps", "4", "--save-every", "2",
        "--sampler-steps", "2", "--lr", "1e-3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ goes there


def run(pipeline, data, *more):
    return seppo.main(["--model", str(pipeline), "--data", str(data), "--out", "run", *TINY, *map(str, more)])


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


# ---- The objective --------------------------------------------------------------------------------------------------

def four_errors(n=64, seed=0, scale=1e-3):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, generator=g, dtype=torch.float64) * scale for _ in range(4)]


def by_hand(pw, rw, pr, rr, beta, flip):
    """The paper's formula, one sample at a time, in plain Python floats."""
    losses = []
    for a, b, c, d in zip(pw.tolist(), rw.tolist(), pr.tolist(), rr.tolist()):
        sign = (b > a) - (b < a)
        sign = {"sign": sign, "indicator": max(sign, 0), "none": 1}[flip]
        z = -beta / 2 * ((a - b) - sign * (c - d))
        losses.append(math.log1p(math.exp(-z)) if z > -30 else -z)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("flip", seppo.FLIPS)
def test_objective_equals_a_plain_rewrite(flip):
    errors = four_errors()
    losses, _ = seppo.seppo_loss(*errors, 2000.0, flip)
    torch.testing.assert_close(losses, by_hand(*errors, 2000.0, flip), rtol=1e-12, atol=1e-15)
    single = seppo.seppo_loss(*(e.float() for e in errors), 2000.0, flip)[0]
    assert single.dtype == torch.float32, "the loss must stay in the dtype of the errors"
    torch.testing.assert_close(single.double(), losses, rtol=1e-4, atol=1e-5)


def test_sign_table():
    policy_w, reference_w = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])  # better, equal, worse than the reference
    for flip, expected in {"sign": [1, 0, -1], "indicator": [1, 0, 0], "none": [1, 1, 1]}.items():
        _, details = seppo.seppo_loss(policy_w, reference_w, policy_w, reference_w, flip=flip)
        assert details["sign"].tolist() == expected, f"flip {flip}"
    with pytest.raises(ValueError, match="flip"):
        seppo.seppo_loss(policy_w, reference_w, policy_w, reference_w, flip="nope")


def test_gradient_directions():
    """The winner is always pulled (its error's gradient is positive); the reference sample is pushed, pulled or left."""
    for reference_w, direction in ((2.0, -1), (0.5, 1), (1.0, 0)):
        policy_w, policy_r = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        seppo.seppo_loss(policy_w, torch.tensor([reference_w]), policy_r, torch.tensor([1.0]), beta=1.0)[0].sum().backward()
        assert policy_w.grad > 0
        assert torch.sign(policy_r.grad) == direction, f"reference_w {reference_w}"


def test_no_gradient_passes_the_sign():
    errors = four_errors(8)
    pw = errors[0].clone().requires_grad_()
    loss, details = seppo.seppo_loss(pw, *errors[1:], 5.0)
    loss.sum().backward()
    expected = 2.5 * torch.sigmoid(-details["logit"])  # d loss / d policy_w with the sign held
    torch.testing.assert_close(pw.grad, expected)
    assert not any(v.requires_grad for v in details.values())
    sign = torch.ones(8, dtype=torch.float64, requires_grad=True)
    assert not seppo.seppo_loss(*errors, 5.0, sign=sign)[0].requires_grad, "nor through a sign that was passed in"


def test_equality_and_extremes():
    e = torch.rand(16)
    losses, details = seppo.seppo_loss(e, e, e, e, beta=5000.0)
    assert torch.equal(losses, torch.full_like(e, math.log(2))), "exactly log 2 at policy == reference"
    assert (details["sign"] == 0).all() and (details["logit"] == 0).all()
    huge = [torch.tensor([1e4, 0.0], requires_grad=True), torch.tensor([0.0, 1e4]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1e4])]
    loss = seppo.seppo_loss(*huge, beta=1e6, flip="none")[0]
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(huge[0].grad).all() and loss[0] > 1e9


def test_a_given_sign_is_used():
    errors = four_errors(6)
    sign = torch.tensor([1.0, -1, 0, 1, -1, 0], dtype=torch.float64)
    losses, details = seppo.seppo_loss(*errors, 100.0, sign=sign)
    assert torch.equal(details["sign"], sign)
    s_w, s_r = errors[0] - errors[1], errors[2] - errors[3]
    torch.testing.assert_close(losses, torch.log1p(torch.exp(50.0 * (s_w - sign * s_r))))


@pytest.mark.parametrize("method", seppo.METHODS)
def test_each_preset_is_its_formula(method):
    """The presets' rows, and the loss a row leads to, written out for each method."""
    o = seppo.resolve(["--method", method])
    pw, rw, pr, rr = four_errors(32, 3)
    sigmoid = lambda z: 1 / (1 + torch.exp(-z))
    sign = torch.sign(rw - pw)
    dpo = -torch.log(sigmoid(-1000 * ((pw - rw) - (pr - rr))))
    expected, rule, loser = {
        "seppo": (-torch.log(sigmoid(-1000 * ((pw - rw) - sign * (pr - rr)))), "random", "generated"),
        "sspo": (torch.where(sign > 0, dpo, -torch.log(sigmoid(-1000 * (pw - rw)))), "random", "generated"),
        "spin": (dpo, "latest", "generated"), "ditto": (dpo, "initial", "generated"), "dpo": (dpo, "initial", "data"),
        "sft": (pw, None, "none")}[method]
    assert o.loser == loser and (rule is None or o.reference == rule)
    losses = pw if o.loser == "none" else seppo.seppo_loss(pw, rw, pr, rr, 2000.0, o.flip)[0]
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)


# ---- The reference rule ---------------------------------------------------------------------------------------------

def test_reference_rule():
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 7):
        drawn = torch.tensor([seppo.choose_reference(k, "random", g) for _ in range(7000)]).bincount(minlength=k)
        assert len(drawn) == k, "an index outside 0..k-1 is a checkpoint of the future"
        chi2 = ((drawn - 7000 / k).square() / (7000 / k)).sum()
        assert chi2 < 30, f"not uniform over {k}: {drawn.tolist()}"  # 99.99 % quantile for 6 degrees of freedom: 27.9
        assert seppo.choose_reference(k, "latest") == k - 1 and seppo.choose_reference(k, "initial") == 0
    again = [[seppo.choose_reference(9, "random", torch.Generator().manual_seed(5)) for _ in range(3)] for _ in range(2)]
    assert again[0] == again[1]
    for k, rule in ((0, "random"), (3, "newest")):
        with pytest.raises(ValueError):
            seppo.choose_reference(k, rule)


# ---- Noising, errors, sampler ---------------------------------------------------------------------------------------

class Recorder(torch.nn.Module):
    """A net that predicts a constant and remembers its input."""

    def __init__(self, out=0.5):
        super().__init__()
        self.out = torch.nn.Parameter(torch.tensor(out))

    def forward(self, x, t, encoder_hidden_states):
        self.x = x
        return type("Output", (), {"sample": self.out.expand_as(x)})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_error(kind):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, prediction_type=kind)
    g = torch.Generator().manual_seed(0)
    x, eps, t = torch.randn(5, 4, 8, 8, generator=g), torch.randn(5, 4, 8, 8, generator=g), torch.tensor([0, 1, 500, 998, 999])
    net = Recorder()
    m = seppo.denoising_error(net, scheduler, x, eps, t, torch.zeros(5, 1, 1))
    abar = torch.cumprod(1 - torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2, 0)[t][:, None, None, None]
    torch.testing.assert_close(net.x.double(), abar.sqrt() * x + (1 - abar).sqrt() * eps, rtol=1e-4, atol=1e-5)
    target = eps if kind == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x
    torch.testing.assert_close(m.double(), (0.5 - target.double()).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


class Oracle(torch.nn.Module):
    """The exact net for data that is a single point per caption: eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""

    def __init__(self, scheduler):
        super().__init__()
        self.abar, self.one = scheduler.alphas_cumprod, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, encoder_hidden_states):
        abar = self.abar[t]
        x_0 = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return type("Output", (), {"sample": (x - abar.sqrt() * x_0) / (1 - abar).sqrt()})


@pytest.mark.parametrize("solver", seppo.SOLVERS)
def test_sampler_reaches_the_point_that_guidance_asks_for(solver):
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012)  # which would clip
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context, null = torch.tensor([2.5, -0.5, 0.2])[:, None, None].expand(3, 2, 6), torch.full((1, 2, 6), 0.1)
    for guidance in (1.0, 3.0):
        x = seppo.sample(Oracle(scheduler), scheduler, noise, context, null, solver, 30, guidance)
        wanted = 0.1 + guidance * (torch.tensor([2.5, -0.5, 0.2]) - 0.1)
        assert (x.mean((1, 2, 3)) - wanted).abs().max() < 0.05, f"{solver} with guidance {guidance}"
        assert x.dtype == torch.float32


def test_draws_depend_on_the_position_alone():
    whole = seppo.draws(0, range(8), (4, 8, 8), 1000, 0.5)
    parts = [torch.cat(pair) for pair in zip(seppo.draws(0, range(3), (4, 8, 8), 1000, 0.5), seppo.draws(0, range(3, 8), (4, 8, 8), 1000, 0.5))]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    assert not torch.equal(whole[2], seppo.draws(1, range(8), (4, 8, 8), 1000, 0.5)[2]), "the seed must matter"
    t, dropped, eps, *_ = seppo.draws(0, range(4000), (1,), 1000, 0.2)
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 20
    assert abs(dropped.float().mean() - 0.2) < 0.03 and abs(eps.std() - 1) < 0.05


# ---- The data -------------------------------------------------------------------------------------------------------

def test_parquet_order_ties_and_broken_rows(tmp_path):
    rows = pickapic_rows(20)
    rows["jpg_0"][0] = rows["jpg_1"][0] = b"not a picture"
    rows["jpg_0"][2] = rows["jpg_0"][2][:200]
    rows["jpg_1"][2] = rows["jpg_1"][2][:200]
    rows["caption"][3] = None
    rows["label_0"][6] = float("nan")
    write_parquet(tmp_path / "data" / "train-0.parquet", {k: v[:12] for k, v in rows.items()})
    write_parquet(tmp_path / "data" / "train-1.parquet", {k: v[12:] for k, v in rows.items()})
    data = seppo.open_data(seppo.resolve(["--model", "x", "--data", str(tmp_path / "data"), "--resolution", "64", "--method", "dpo"]))
    assert data.total == 20
    fetched = [data.fetch(n) for n in range(40)]
    captions = [caption for caption, *_ in fetched]
    usable = {f"picture {i}" for i in range(20) if i % 5 != 4} - {"picture 0", "picture 2", "picture 3", "picture 6"}
    assert set(captions) == usable, "ties and broken rows never come, all others come in each epoch"
    assert set(captions[:20]) == usable and captions[:20] != captions[20:], "each epoch has its own order"
    assert sum(attempts for *_, attempts in fetched) >= 8, "four broken rows an epoch are replaced and counted"
    for caption, winner, loser, _ in fetched:  # the winner is the picture with label 1
        i = int(caption.split()[1])
        sides = [seppo.to_pixels(rows[f"jpg_{side}"][i], 64) for side in ((0, 1) if rows["label_0"][i] == 1 else (1, 0))]
        assert any(torch.equal(winner, f(sides[0])) and torch.equal(loser, f(sides[1])) for f in (lambda p: p, lambda p: p.flip(-1)))
    assert fetched[7][0] == data.fetch(7)[0] and torch.equal(fetched[7][1], data.fetch(7)[1]), "position n is always the same row"
    other = seppo.open_data(seppo.resolve(["--model", "x", "--data", str(tmp_path / "data"), "--resolution", "64", "--seed", "1"]))
    assert [other.fetch(n)[0] for n in range(20)] != captions[:20]


def test_only_the_row_groups_asked_for_are_read():
    read = []
    groups = [(s, g, 10) for s in range(3) for g in range(4)]
    data = seppo.Winners("", groups, lambda s, g, n: read.append((s, g)) or [(f"{s} {g} {i}", None, None) for i in range(n)])
    first = [data.row(n)[0] for n in range(10)]
    assert len(read) == 1 and len(set(first)) == 10
    assert sorted(data.row(n)[0] for n in range(120)) == sorted(f"{s} {g} {i}" for s in range(3) for g in range(4) for i in range(10))
    assert len({data.row(n)[0][0] for n in range(40)}) == 1, "a shard is used up before the next"
    few = seppo.Winners("", groups, data.read, max_winners=25)
    assert few.total == 25 and {few.row(n)[0][:3] for n in range(100)} == {"0 0", "0 1", "0 2"}, "nothing behind --max-winners"


def test_picture_folders(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, 80 + i))
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n", "utf-8")
    (tmp_path / "uncaptioned.jpg").write_bytes(jpeg(9))
    resolve = lambda: seppo.resolve(["--model", "x", "--data", str(tmp_path), "--resolution", "64"])
    data = seppo.open_data(resolve())
    assert {data.fetch(n)[0].strip() for n in range(4)} == {f"caption {i}" for i in range(3)}
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.jpg", "text": f"line {i}"}) + "\n" for i in range(3)))
    data = seppo.open_data(resolve())
    assert {data.fetch(n)[0] for n in range(3)} == {f"line {i}" for i in range(3)}


def test_pixels(tmp_path):
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (50, 0, 150, 100))  # the centre square is blue
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    pixels = seppo.to_pixels(buffer.getvalue(), 64)
    assert pixels.shape == (3, 64, 64) and pixels[2].mean() > 0.95 and pixels[0].mean() < -0.95
    buffer = io.BytesIO()
    Image.new("1", (9000, 8000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="9000"):
        seppo.to_pixels(buffer.getvalue(), 64)


# ---- The command on a tiny Stable Diffusion -------------------------------------------------------------------------

def test_command_end_to_end(pipeline, tmp_path, capsys):
    rows = pickapic_rows(10)
    rows["jpg_0"][1] = rows["jpg_1"][1] = b"broken"
    data = write_parquet(tmp_path / "pairs.parquet", rows)
    assert run(pipeline, data) == 0
    said, out = capsys.readouterr(), Path("run")
    assert "from_pretrained" in said.out and "checkpoint-4/unet" in said.out
    lines = metrics()
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    expected = {*seppo.STATISTICS, "update", "reference", "grad_norm", "lr", "seconds_data", "seconds_generate", "seconds_train", "peak_gb", "skipped_rows"}
    assert expected <= set(lines[0]) and None not in lines[0].values()
    assert lines[0]["sign_zero"] == 1.0 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "policy == reference at first"
    assert lines[1]["sign_zero"] == 0 and lines[-1]["skipped_rows"] > 0
    assert [line["lr"] for line in lines] == [1e-3] * 4  # warm-up over 25 % of 4 updates
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "samples", "resume", "checkpoint-0", "checkpoint-2", "checkpoint-4"}
    assert Image.open(out / "samples" / "step-4.png").height == 2 * Image.open(out / "samples" / "step-0.png").height
    assert same(weights(out / "checkpoint-0" / "unet"), weights(pipeline / "unet"))
    unet = UNet2DConditionModel.from_pretrained("run", subfolder="checkpoint-4/unet", low_cpu_mem_usage=False)
    pipe = StableDiffusionPipeline.from_pretrained(str(pipeline), unet=unet, low_cpu_mem_usage=False)
    assert not same(unet.state_dict(), weights(pipeline / "unet")), "it must have learned something"
    assert pipe("a picture", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert run(pipeline, data) == 0 and "finished" in capsys.readouterr().out
    assert run(pipeline, data, "--seed", 1) == 2 and "seed was 0, is 1" in capsys.readouterr().err
    assert run(pipeline, data, "--seed", 1, "--fresh") == 0 and not same(unet.state_dict(), weights(out / "checkpoint-4" / "unet"))


def test_updates_equal_a_plain_rewrite(pipeline, tmp_path):
    """Each update's reference errors, and the first one's gradient, from the saved checkpoints and diffusers' own pipeline."""
    drawn = lambda seed, k: seppo.choose_reference(k, "random", torch.Generator().manual_seed(seppo.key(seed, "reference", k)))
    seed = next(s for s in range(99) if drawn(s, 2) == 1 and drawn(s, 3) == 0)  # base, first checkpoint, base again
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(10))
    options = ["--steps", 8, "--save-every", 3, "--seed", seed, "--caption-dropout", 0.5, "--beta", 7, "--guidance", 3]
    assert run(pipeline, data, *options) == 0
    rows = seppo.open_data(seppo.resolve(["--model", "x", "--data", str(data), "--resolution", "64", "--seed", str(seed)]))
    pipe = StableDiffusionPipeline.from_pretrained(str(pipeline), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    noising = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    for u, line in enumerate(metrics()):
        assert line["reference"] == drawn(seed, u // 3 + 1), "the reference is held for an interval"
        assert line["lr"] == pytest.approx(1e-3 * min(1, (u + 1) / 2)), "linear warm-up over a quarter of the updates"
        pipe.unet = UNet2DConditionModel.from_pretrained(f"run/checkpoint-{3 * line['reference']}/unet", low_cpu_mem_usage=False)
        t, dropped, eps, noise_w, noise_r = seppo.draws(seed, range(4 * u, 4 * u + 4), (4, 8, 8), 1000, 0.5)
        captions, winners, _, _ = zip(*(rows.fetch(n) for n in range(4 * u, 4 * u + 4)))
        with torch.no_grad():
            posterior = pipe.vae.encode(torch.stack(winners)).latent_dist
            x_w = (posterior.mean + posterior.std * noise_w) * pipe.vae.config.scaling_factor
            x_r = pipe(list(captions), latents=noise_r, num_inference_steps=2, guidance_scale=3.0, output_type="latent", height=64, width=64).images
            ids = pipe.tokenizer(["" if d else c for d, c in zip(dropped, captions)], padding="max_length", return_tensors="pt").input_ids
            context = pipe.text_encoder(ids)[0]
        m_w, m_r = ((pipe.unet(noising.add_noise(x, eps, t), t, context).sample - eps).square().mean((1, 2, 3)) for x in (x_w, x_r))
        assert line["reference_w"] == pytest.approx(m_w.mean().item(), rel=1e-4), f"winner, update {u}"
        assert line["reference_r"] == pytest.approx(m_r.mean().item(), rel=1e-4), f"reference sample, update {u}"
        if u == 0:  # policy == reference: the gradient of the winner alone, half weighted by the sigmoid
            (-torch.nn.functional.logsigmoid(-3.5 * (m_w - m_w.detach()))).mean().backward()
            norm = torch.stack([p.grad.norm() for p in pipe.unet.parameters() if p.grad is not None]).norm()
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.parametrize("method", ["sspo", "spin", "dpo", "sft"])
def test_methods_run(pipeline, tmp_path, method):
    assert run(pipeline, write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), "--method", method) == 0
    last = metrics()[-1]
    if method == "sspo":  # at first there is no reference sample: the reference is the policy
        assert metrics()[0]["sign_zero"] == 1 and metrics()[0]["policy_r"] is None and metrics()[0]["policy_w"] > 0
    assert {"sspo": last["sign_neg"] == 0, "spin": last["sign_pos"] == 1 and last["reference"] == 1,
            "dpo": last["sign_pos"] == 1 and last["reference"] == 0, "sft": last["loss"] == last["policy_w"] and last["policy_r"] is None}[method]


def test_the_indicator_generates_only_what_it_uses(pipeline, tmp_path, monkeypatch):
    """The anchor first, then samples only where its sign is +1: the update of the plain order, which generates them all."""
    data, sizes, norms = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(16)), [], []
    sample, gradients, first = seppo.sample, seppo.Trainer.gradients, seppo.Trainer.pairs_first

    def both(self, update):
        statistics, *rest = gradients(self, update)
        now = [p.grad.clone() for p in self.trained.values()]
        assert [6] * (len(sizes) - 1) == sizes[:-1], "batches are full, but for the last"
        ours, sizes[:] = sum(sizes), []
        with monkeypatch.context() as patch:
            patch.setattr(seppo.Trainer, "pairs_first", lambda self, x, *_: (torch.arange(len(x)), torch.arange(0)))
            self.optimizer.zero_grad()
            plain, *_ = gradients(self, update)
        assert ours == round(16 * plain["sign_pos"]) and sum(sizes) == 16
        far, norm = (math.sqrt(sum(p.square().sum() for p in ps)) for ps in ([p.grad - n for p, n in zip(self.trained.values(), now)], now))
        norms.append(far / norm)
        for k in ("loss", "logit", "policy_w", "reference_w", "sign_zero", "sign_pos"):
            assert statistics[k] == pytest.approx(plain[k], rel=1e-5, abs=1e-6), k
        sizes.clear()
        return statistics, *rest

    monkeypatch.setattr(seppo, "sample", lambda unet, *args, **options: sizes.append(len(options["noise"])) or sample(unet, *args, **options))
    monkeypatch.setattr(seppo.Trainer, "grid", lambda self, update: None)
    monkeypatch.setattr(seppo.Trainer, "gradients", both)
    assert run(pipeline, data, "--method", "sspo", "--batch-size", 16, "--micro-batch", 4, "--generate-batch", 6, "--steps", 2) == 0
    assert len(norms) == 2 and max(norms) < 1e-4, norms


def test_what_saves_memory_does_not_change_an_update(pipeline, tmp_path, monkeypatch):
    data, results, calls, again = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), [], [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **options: calls.append(1) or again(*args, **options))
    for i, (micro, generate, *more) in enumerate(((4, 4), (1, 4), (2, 3), (4, 4, "--gradient-checkpointing"))):
        assert run(pipeline, data, "--micro-batch", micro, "--generate-batch", generate, "--steps", 2, "--out", f"run{i}", *more) == 0
        assert bool(calls) == bool(more)
        results.append(weights(f"run{i}/checkpoint-2/unet"))
    base = weights("run0/checkpoint-0/unet")
    for other in results[1:]:
        assert distance(results[0], other) < 0.01 * distance(results[0], base), "the gradient depends on the micro-batch"


def test_resume_is_bit_equal(pipeline, tmp_path, monkeypatch):
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--out", "straight") == 0
    update = seppo.Trainer.update
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: update(self, u) if u < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(pipeline, data) == 130
    assert len(metrics()) == 3 and not Path("run/checkpoint-4").exists()
    monkeypatch.setattr(seppo.Trainer, "update", update)
    assert run(pipeline, data) == 0
    assert same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
    drop = lambda lines: [{k: v for k, v in line.items() if not k.startswith(("seconds", "peak"))} for line in lines]
    assert drop(metrics()) == drop(metrics("straight")), "the resumed log must read as if nothing had happened"


def test_the_state_to_resume_from_is_young(pipeline, tmp_path, monkeypatch):
    """Between checkpoints it is written every SAVE_SECONDS, and what comes after is the same."""
    data, update, done = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.Trainer.update, []
    assert run(pipeline, data, "--out", "straight") == 0
    monkeypatch.setattr(seppo, "SAVE_SECONDS", 0)
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: done.append(u) or update(self, u) if u < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(pipeline, data) == 130 and done == [0, 1, 2]
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: done.append(u) or update(self, u))
    assert run(pipeline, data) == 0 and done == [0, 1, 2, 3], "update 3 is not made again"
    assert same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_update_and_saves(pipeline, tmp_path, monkeypatch, capsys, number):
    data, update = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.Trainer.update
    assert run(pipeline, data, "--out", "straight") == 0
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: (os.kill(os.getpid(), number) if u == 0 else None, update(self, u))[1])
    before = signal.getsignal(number)
    assert run(pipeline, data) == 130 and "stopped after update 1" in capsys.readouterr().err
    assert len(metrics()) == 1 and signal.getsignal(number) is before
    monkeypatch.setattr(seppo.Trainer, "update", update)
    assert run(pipeline, data) == 0 and same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
    assert [line["policy_w"] for line in metrics()] == [line["policy_w"] for line in metrics("straight")]


def test_fp16_overflow_is_redone(pipeline, tmp_path, monkeypatch):
    """fp16 autocast with loss scaling: an overflowing scale is lowered and the update redone, with the same draws."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--dtype", "fp16", "--steps", 2) == 0
    scaler, calls, gradients = torch.amp.GradScaler, [], seppo.Trainer.gradients
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0 ** 40, enabled=enabled))
    monkeypatch.setattr(seppo.Trainer, "gradients", lambda self, u: calls.append(u) or gradients(self, u))
    assert run(pipeline, data, "--dtype", "fp16", "--steps", 2, "--out", "high") == 0
    assert calls.count(0) > 1 and metrics("high")[0]["loss"] == metrics("run")[0]["loss"]
    assert metrics("high")[-1]["policy_w"] == pytest.approx(metrics("run")[-1]["policy_w"], rel=0.05)


def test_the_generator_is_the_reference(pipeline, tmp_path, monkeypatch):
    """In half precision a copy generates: it must follow when the reference is drawn anew."""
    data, gradients, seen = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.Trainer.gradients, []

    def checked(self, update):
        assert self.generator is not self.reference and same(self.generator.state_dict(), {k: v.bfloat16() for k, v in self.reference.state_dict().items()})
        seen.append(next(self.generator.parameters()).sum().item())
        return gradients(self, update)

    monkeypatch.setattr(seppo.Trainer, "gradients", checked)
    assert run(pipeline, data, "--dtype", "bf16", "--reference", "latest", "--steps", 2, "--save-every", 1) == 0
    assert seen[0] != seen[1]


def test_numeric_path_is_checked(pipeline, tmp_path, monkeypatch, capsys):
    data, error = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.denoising_error
    monkeypatch.setattr(seppo, "denoising_error", lambda unet, *args: error(unet, *args) * (1 + 1e-6 * (not torch.is_grad_enabled())))
    assert run(pipeline, data) == 2 and "one numeric path" in capsys.readouterr().err


def test_time_tells_in_advance(pipeline, tmp_path, capsys):
    """--time: all phases, speeds, and hours that follow from them; the run's own folder stays untouched."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--time", "--sampler-steps", 20, "--steps", 1000, "--method", "sspo") == 0
    said = capsys.readouterr().out
    each = {phase: float(re.search(rf"{phase} +([\d.]+) s", said).group(1)) for phase in seppo.PHASES}
    step, save = map(float, re.search(r"step ([\d.]+) s, a checkpoint ([\d.]+) s", said).groups())
    hours = (1000 * (4 * sum(each.values()) + step) + 501 * save) / 3600  # 0, 2, 4, ..., 1000; an update's first rows are waited for
    assert float(re.search(r"alone: (\S+) hours", said).group(1)) == pytest.approx(hours, rel=0.05)
    assert each["generate"] > 3 * each["encode"] and said.count("of a matrix product's") == 2 and "sampler-steps 20" in said
    unet = seppo.load_unet(pipeline)
    x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, 16)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        unet(x, 0, context)
    rates = [float(rate) * 1e12 for rate in re.findall(r"s, (\S+) TFLOP/s, ", said)]
    for rate, phase, passes in zip(rates, ("generate", "train"), (40, 8)):
        assert rate == pytest.approx(passes * counter.get_total_flops() / each[phase], rel=0.05), phase
    assert not Path("run").exists() and sorted(p.name for p in Path().iterdir()) == ["pairs.parquet"]


def test_pndm_takes_more_evaluations_than_steps():
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012)
    assert [len(seppo.make_solver(scheduler, name, 20).timesteps) for name in ("dpm++", "unipc", "ddim", "pndm")] == [20, 20, 20, 29]
    with pytest.raises(seppo.UserError, match="take more steps"):
        seppo.make_solver(scheduler, "pndm", 3)


@pytest.mark.parametrize("method, solver", [("seppo", "dpm++"), ("spin", "unipc"), ("ditto", "ddim"), ("seppo", "pndm"), ("dpo", "dpm++"), ("sft", "dpm++")])
def test_an_update_waits_for_the_gpu_once(pipeline, method, solver):
    """On the meta device no number can be read: an update must get there as far as its totals."""
    o = seppo.resolve(["--model", str(pipeline), "--data", "none", *TINY, "--method", method, "--solver", solver, "--dtype", "fp32"])
    o.device = "meta"
    row = ("a", torch.zeros(3, 64, 64), torch.zeros(3, 64, 64), 0)
    with ThreadPoolExecutor(1) as pool:
        trainer = seppo.Trainer(o, argparse.Namespace(fetch=lambda position: row, pool=pool))
        trainer.autocast, trainer.scaler = contextlib.nullcontext, torch.amp.GradScaler("cpu", enabled=False)
        with pytest.raises(RuntimeError, match="meta") as stopped:
            trainer.gradients(0)
    assert "waits for the GPU" in str([step for step in stopped.traceback if step.path == HERE / "seppo.py"][-1].statement)


def test_random_weights_of_sd15():
    """As many weights as Stable Diffusion 1.5 has: 859.5 M, 123.1 M, 83.7 M."""
    with torch.device("meta"):
        unet, codec = seppo.random_sd15("meta", torch.float32)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (unet, codec.text, codec.vae)]
    assert sizes == [859_520_964, 123_060_480, 83_653_863]
    ids = codec.tokenizer(["a", "b", "a"]).input_ids
    assert ids.shape == (3, 77) and torch.equal(ids[0], ids[2]) and not torch.equal(ids[0], ids[1])
    data = seppo.open_data(seppo.resolve(["--model", "random-sd15", "--device", "cpu"]))
    assert data.fetch(3)[1].shape == (3, 512, 512)


def test_only_generation_is_compiled(pipeline, tmp_path, monkeypatch):
    """--compile: the same run, through a compiled generator; the error passes see the plain nets."""
    data, compiled = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), []

    class Compiled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, *args, **options):
            assert not torch.is_grad_enabled()
            compiled.append(1)
            return self.net(*args, **options)

    assert run(pipeline, data) == 0
    monkeypatch.setattr(torch, "compile", Compiled)
    assert run(pipeline, data, "--compile", "--out", "fast") == 0
    assert len(compiled) == 4 * 2, "4 updates of one generate-batch, 2 steps"
    assert same(weights("run/checkpoint-4/unet"), weights("fast/checkpoint-4/unet"))


def test_unet_option(pipeline, tmp_path, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data) == 0
    assert run(pipeline, data, "--unet", "run/checkpoint-4", "--out", "next", "--steps", 1) == 0
    assert same(weights("run/checkpoint-4/unet"), weights("next/checkpoint-0/unet"))
    seppo.load_mini("mini-untrained").save_pretrained("other/unet")
    assert run(pipeline, data, "--unet", "other", "--out", "wrong") == 2 and "another shape" in capsys.readouterr().err


# ---- The miniature --------------------------------------------------------------------------------------------------

def test_miniature_learns(capsys):
    """The untrained miniature, a few updates of SFT: the error falls, and the score can be read."""
    assert seppo.main(["--model", "mini-untrained", "--steps", "40", "--save-every", "20", "--device", "cpu"]) == 0
    lines = metrics(next(Path("runs").iterdir()))
    assert sum(line["loss"] for line in lines[-5:]) < 0.6 * sum(line["loss"] for line in lines[:5])


def test_taste_orders_pictures():
    flawless = seppo.draw_mini(seppo.CAPTIONS, torch.zeros(len(seppo.CAPTIONS), 5))
    torch.testing.assert_close(seppo.mini_score(flawless, seppo.CAPTIONS), torch.ones(len(seppo.CAPTIONS)))
    assert seppo.mini_score(torch.zeros_like(flawless), seppo.CAPTIONS).abs().max() < 1e-6
    name, groups, read = seppo.open_mini("mini")
    every = seppo.open_mini("mini-mixture")[2](0, 0, 200)  # four pictures a caption
    for i, (caption, winner, loser) in enumerate(read(0, 0, 50)):
        four = seppo.mini_score(torch.stack([picture for _, picture in every[4 * i:4 * i + 4]]), [caption] * 4)
        liked, other = seppo.mini_score(torch.stack([winner, loser]), [caption] * 2)
        assert liked == four.max() and other < liked
    for flaw in range(5):
        worse = torch.zeros(len(seppo.CAPTIONS), 5)
        worse[:, flaw] = 0.5
        assert (seppo.mini_score(seppo.draw_mini(seppo.CAPTIONS, worse), seppo.CAPTIONS) < 0.99).all(), f"flaw {flaw} must cost"


# ---- Evaluation: numbers, prompts, noise ----------------------------------------------------------------------------

def test_table_from_known_scores():
    base = {"pickscore": torch.tensor([.20, .21, .22, .21]), "imagereward": None}
    better = {"pickscore": torch.tensor([.21, .22, .22, .20]), "imagereward": None}  # two wins, a tie, a loss: 62.5 %
    assert evaluation.table({"base": base, "ours": better}, paper=True).splitlines() == [
        "| model | PickScore x100 | wins vs base | ImageReward | wins vs base |", "| --- | --- | --- | --- | --- |",
        "| base | 21.00 ± 0.41 |  | missing |  |", "| ours | 21.25 ± 0.48 | 62.5 % [21.9, 90.8] | missing |  |",
        "| *SePPO, the paper's own figures* | 21.57 |  | 0.615 |  |"]
    assert "paper" not in evaluation.table({"base": base})
    each = {name: torch.tensor([.272, .272]) for name in evaluation.SCORERS}
    assert evaluation.table({"base": each}).splitlines()[-1].split(" | ")[1::2] == [
        f"{value} ± {0:.{digits}f}" for value, digits in (("27.20", 2),) * 3 + (("0.272", 3),) * 2 + (("27.20", 2), ("0.272", 3))]


@pytest.mark.parametrize("n, share, ties", [(20, .5, 0), (20, .9, 0), (100, .7, 0), (100, .98, 0), (500, .6, 0), (100, .6, .3)])
def test_the_interval_covers(n, share, ties):
    g, covered = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        difference = torch.where(torch.rand(n, generator=g) < share, 1.0, -1.0) * (torch.rand(n, generator=g) >= ties)
        rate, low, high = evaluation.win_rate(difference, torch.zeros(n))
        assert 0 <= low <= rate <= high <= 1
        covered += low <= share * (1 - ties) + ties / 2 <= high
    assert 0.93 < covered / 2000 < (0.98 if not ties else 1.0), covered / 2000


def test_noise_belongs_to_the_prompt():
    prompts = ["a", "b", "a", "c"]
    all_four = evaluation.start_noise(prompts, (4, 8, 8), seed=1)
    for subset in (["c", "a"], ["b"], ["a", "a"]):
        seen = {"a": [0, 2], "b": [1], "c": [3]}
        for prompt, noise in zip(subset, evaluation.start_noise(subset, (4, 8, 8), seed=1)):
            assert torch.equal(noise, all_four[seen[prompt].pop(0)]), "a prompt's noise depends on the other prompts"
    assert len({noise.sum().item() for noise in all_four + evaluation.start_noise(["a"], (4, 8, 8), seed=2)}) == 5
    together = torch.stack(evaluation.start_noise([str(i) for i in range(100)], (4, 8, 8)))
    assert together.mean().abs() < 0.03 and abs(together.std() - 1) < 0.03


def test_prompts_of_every_form(tmp_path, monkeypatch, capsys):
    expected = ["two cats", "a dog, “quoted”"]
    for name, text in {"p.txt": "two cats\n\n  a dog, “quoted”\r\n", "p.json": json.dumps([{"prompt": p, "image_path": ["x"]} for p in expected]),
                       "q.json": json.dumps(expected), "p.jsonl": "".join(json.dumps({"caption": p}) + "\n" for p in expected)}.items():
        Path(name).write_text(text, "utf-8")
        assert evaluation.read_prompts(name) == expected, name
    assert len(evaluation.read_prompts("mini")) == 480
    asked = []
    def snapshot_download(repository, repo_type, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository != evaluation.PICKAPIC[1]:
            raise OSError("gone")
        write_parquet(tmp_path / "set/data/validation_unique-00000-of-00001-c2396290184ff49d.parquet", pickapic_rows(6))
        return tmp_path / "set"
    monkeypatch.setattr(evaluation.huggingface_hub, "snapshot_download", snapshot_download)
    [monkeypatch.setitem(evaluation.NAMED, name, n) for name, n in {"pickapic": 6, "parti": 2, "hpsv2": 4}.items()]
    assert evaluation.read_prompts("pickapic") == [f"picture {i}" for i in range(6)] and "liuhuohuo2" in capsys.readouterr().out
    assert asked == [(repository, "*/validation_unique-*.parquet") for repository in evaluation.PICKAPIC]
    hub = {"PartiPrompts.tsv": 'Prompt\tCategory\n"two cats"\tA\na 3" nail\tB\n'} | {
        f"benchmark/{style}.json": json.dumps([style]) for style in ("anime", "concept-art", "paintings", "photo")}
    monkeypatch.setattr(evaluation.huggingface_hub, "hf_hub_download", lambda repo, file, repo_type: (
        Path(file.replace("/", "-")).write_text(hub[file]), file.replace("/", "-"))[1])
    assert evaluation.read_prompts("parti") == ["two cats", 'a 3" nail']
    assert evaluation.read_prompts("hpsv2") == ["anime", "concept-art", "paintings", "photo"]


def test_clean_text():
    """As ftfy, html.unescape and white space clean-up in OpenAI's and open_clip's tokenizers leave it."""
    for raw, cleaned in {"a “b” ‘c’": "a \"b\" 'c'", "a &amp;amp; b": "a & b", " a\n\tb  c ": "a b c", "Ｆｕｌｌ，width": "Full,width",
                         "\ufeffa": "a", "cafe\u0301": "café"}.items():
        assert evaluation.clean(raw) == cleaned


# ---- Evaluation: the scorers ----------------------------------------------------------------------------------------

def noise(name, *shape):
    """Weights that depend on their name alone; small enough that activations stay of order 1."""
    g = torch.Generator().manual_seed(seppo.key(name))
    return torch.randn(shape, generator=g) * (0.3 if len(shape) < 2 else 1.2 / math.sqrt(math.prod(shape[1:])))


def layer(prefix, out, into):
    return {f"{prefix}.weight": noise(prefix, out, into), f"{prefix}.bias": noise(prefix + "b", out)}


def norm(prefix, n):
    return {f"{prefix}.weight": 1 + noise(prefix, n), f"{prefix}.bias": noise(prefix + "b", n)}


def openai_clip(vision, text, dim, depth, patch, vocab):
    """The state dict of a CLIP under OpenAI's names, which open_clip and HPSv2 share: two towers of `depth` blocks."""
    s = {"visual.class_embedding": noise("class", vision), "visual.positional_embedding": noise("vpos", (224 // patch) ** 2 + 1, vision),
         "visual.conv1.weight": noise("conv", vision, 3, patch, patch), "visual.proj": noise("vproj", vision, dim),
         "positional_embedding": noise("pos", 77, text), "token_embedding.weight": 8 * noise("tokens", vocab, text),
         "text_projection": noise("tproj", text, dim), "logit_scale": torch.tensor(4.6),
         **norm("visual.ln_pre", vision), **norm("visual.ln_post", vision), **norm("ln_final", text)}
    for tower, width in (("visual.", vision), ("", text)):
        for i in range(depth):
            p = f"{tower}transformer.resblocks.{i}."
            s |= {p + "attn.in_proj_weight": noise(p, 3 * width, width), p + "attn.in_proj_bias": noise(p + "b", 3 * width),
                  **layer(p + "attn.out_proj", width, width), **layer(p + "mlp.c_fc", 4 * width, width),
                  **layer(p + "mlp.c_proj", width, 4 * width), **norm(p + "ln_1", width), **norm(p + "ln_2", width)}
    return s


def imagereward_state(vision, text, depth, patch, vocab):
    """ImageReward.pt's names: BLIP's vision transformer, its text encoder with cross attention, five linear layers."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    s = {v + "cls_token": noise("cls", 1, 1, vision), v + "pos_embed": noise("vpos", 1, (224 // patch) ** 2 + 1, vision),
         v + "patch_embed.proj.weight": noise("patch", vision, 3, patch, patch), v + "patch_embed.proj.bias": noise("patchb", vision),
         **norm(v + "norm", vision), t + "embeddings.word_embeddings.weight": noise("words", vocab, text) * 8,
         t + "embeddings.position_embeddings.weight": noise("pos", 64, text), t + "embeddings.position_ids": torch.arange(64)[None],
         **norm(t + "embeddings.LayerNorm", text), **layer("blip.vision_proj", 8, vision), **layer("blip.text_proj", 8, text)}
    for i in range(depth):
        p, q = f"{v}blocks.{i}.", f"{t}encoder.layer.{i}."
        s |= norm(p + "norm1", vision) | norm(p + "norm2", vision) | layer(p + "attn.qkv", 3 * vision, vision) | layer(p + "attn.proj", vision, vision)
        s |= layer(p + "mlp.fc1", 4 * vision, vision) | layer(p + "mlp.fc2", vision, 4 * vision)
        for attention, width in (("attention.", text), ("crossattention.", vision)):
            s |= layer(q + attention + "self.query", text, text) | layer(q + attention + "self.key", text, width)
            s |= layer(q + attention + "self.value", text, width) | layer(q + attention + "output.dense", text, text)
            s |= norm(q + attention + "output.LayerNorm", text)
        s |= layer(q + "intermediate.dense", 2 * text, text) | layer(q + "output.dense", text, 2 * text) | norm(q + "output.LayerNorm", text)
    return s | {f"mlp.{k}": x for k, x in head_state(text).items()}


def head_state(width):
    sizes, s = (width, 1024, 128, 64, 16, 1), {}
    for n, into, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        s |= layer(f"layers.{n}", out, into)
    return s


BERT_CONFIG = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99,
               "max_position_embeddings": 64, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0, "type_vocab_size": 2,
               "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "encoder_width": 768, "add_cross_attention": True}
SIZES = {"H": (128, 64, 48, 2, 56, 78), "L": (128, 64, 32, 2, 56, 78)}  # of the two CLIPs: vision, text, dim, depth, patch, vocabulary


@pytest.fixture(scope="session")
def scorer_weights(tmp_path_factory):
    """All scorers' files in the layout of the hub, at small random sizes."""
    root = tmp_path_factory.mktemp("scorers")
    words = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789,." for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))  # the last has the largest id, as in CLIP
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), unk_token="<|endoftext|>", model_max_length=77)
    for repository, size, act in ((evaluation.H14, "H", "gelu"), ("yuvalkirstain/PickScore_v1", "H", "gelu"), (evaluation.L14, "L", "quick_gelu")):
        vision, text, dim, depth, patch, vocab = SIZES[size]
        config = transformers.CLIPConfig(
            projection_dim=dim, text_config=dict(hidden_size=text, intermediate_size=4 * text, num_hidden_layers=depth, num_attention_heads=2,
                                                 vocab_size=vocab, hidden_act=act, bos_token_id=76, eos_token_id=77, projection_dim=dim),
            vision_config=dict(hidden_size=vision, intermediate_size=4 * vision, num_hidden_layers=depth, num_attention_heads=2,
                               patch_size=patch, hidden_act=act, projection_dim=dim))
        clip = transformers.CLIPModel(config)
        clip.load_state_dict(evaluation.from_open_clip(openai_clip(*SIZES[size])))
        clip.save_pretrained(root / repository)
        tokenizer.save_pretrained(root / repository)
    for folder in ("xswu/HPSv2", "zai-org/ImageReward", evaluation.BERT, evaluation.AESTHETIC):
        (root / folder).mkdir(parents=True)
    half = {k: v.half() for k, v in openai_clip(*SIZES["H"]).items()}
    torch.save({"state_dict": half}, root / "xswu/HPSv2/HPS_v2_compressed.pt")
    torch.save({"state_dict": {k: v * 0.9 for k, v in half.items()}}, root / "xswu/HPSv2/HPS_v2.1_compressed.pt")
    torch.save(head_state(SIZES["L"][2]), root / evaluation.AESTHETIC / evaluation.AESTHETIC_FILE)
    torch.save(imagereward_state(64, 32, 2, 56, 99), root / "zai-org/ImageReward/ImageReward.pt")
    (root / "zai-org/ImageReward/med_config.json").write_text(json.dumps(BERT_CONFIG))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [c for c in "abcdefghijklmnopqrstuvwxyz0123456789"] + [
        f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (root / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / evaluation.BERT)
    return root


PROMPTS = ["a red fox, 8k", "A  Painting of &amp; two moons " * 9, "“cat”"]


def photographs():
    return [Image.open(io.BytesIO(jpeg(i, 256))).resize(size) for i, size in enumerate(((64, 64), (300, 200), (513, 640)))]


# What the scorers' original code gives for these weights, pictures and prompts (fp32, CPU), recorded by
# test_scorers_equal_their_originals below.
EXPECTED = {
    "pickscore": [-0.1993654, -0.0711491, -0.3062271], "hpsv2": [-0.1995323, -0.0927444, -0.3687989],
    "hpsv2-aliased": [-0.1991733, -0.0924639, -0.3681261], "hpsv2.1": [-0.2518828, -0.1314805, -0.356244],
    "imagereward": [3.4114513, 3.0269389, 3.2150545], "aesthetic": [-1.1151464, -0.5988638, -0.8857701],
    "clip": [0.1329802, 0.2335817, -0.0271757]}


@pytest.mark.parametrize("name", EXPECTED)
def test_scorers_give_their_originals_values(name, scorer_weights):
    scorer = evaluation.load_scorer(name.split("-")[0], scorer_weights, antialias="aliased" not in name)
    scores = scorer.score(photographs(), PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(EXPECTED[name]), rtol=0, atol=2e-6)
    one = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(photographs(), PROMPTS)])
    torch.testing.assert_close(scores, one, rtol=0, atol=2e-6)


def original_scores(name, root, scorer, monkeypatch):
    """The original code on the same files, pictures and tokens, one pair at a time; only the tokenizer's vocabulary is ours."""
    for function in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):  # image-reward wants them
        vars(transformers.modeling_utils).setdefault(function, getattr(transformers.pytorch_utils, function, None))
    hps, openai, _ = (pytest.importorskip(module) for module in ("hpsv2.src.open_clip", "clip", "ImageReward"))
    from ImageReward.ImageReward import MLP, ImageReward, _transform
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    kind, unit, load = name.split("-")[0], torch.nn.functional.normalize, functools.partial(torch.load, weights_only=True)
    tokens = scorer.tokenizer([scorer.tidy(p) for p in PROMPTS], padding="max_length", truncation=True, max_length=scorer.length, return_tensors="pt")
    vision, text, dim, depth, patch, vocab = SIZES["H" if kind.startswith("hps") else "L"]
    if kind == "imagereward":
        model = ImageReward.__new__(ImageReward)
        torch.nn.Module.__init__(model)
        for gone, stand_in in (("all_tied_weights_keys", {}), ("get_head_mask", lambda self, mask, n: [None] * n),
                               ("invert_attention_mask", lambda self, m: (1 - m[:, None, None].float()) * torch.finfo().min)):
            hasattr(BertModel, gone) or setattr(BertModel, gone, stand_in)
        (root / "bert.json").write_text(json.dumps(BERT_CONFIG | {"encoder_width": 64}))
        model.device, model.mean, model.std, model.mlp = "cpu", 0.16717362830052426, 1.0333394966054072, MLP(32)
        model.blip = torch.nn.Module()
        model.blip.visual_encoder = VisionTransformer(img_size=224, patch_size=56, embed_dim=64, depth=2, num_heads=16)
        model.blip.text_encoder = BertModel(BertConfig.from_json_file(str(root / "bert.json")), add_pooling_layer=False)
        missing, unexpected = model.load_state_dict(load(root / "zai-org/ImageReward/ImageReward.pt"), strict=False)
        assert not missing and all("_proj." in key or "position_ids" in key for key in unexpected)
        score = lambda picture, ids, mask: model.eval().score_gard(ids, mask, _transform(224)(picture)[None])
    elif kind.startswith("hps"):
        model = hps.model.CLIP(dim, dict(layers=depth, width=vision, patch_size=patch, image_size=224),
                               dict(vocab_size=vocab, width=text, heads=2, layers=depth))
        model.load_state_dict(load(root / f"xswu/HPSv2/HPS_{kind[3:]}_compressed.pt")["state_dict"])
        transform, resize = hps.image_transform(224, False, resize_longest_max=True), hps.transform.F.resize
        monkeypatch.setattr(hps.transform.F, "resize", lambda x, size, how: resize(x, size, how, antialias="aliased" not in name))
        score = lambda picture, ids, mask: (model.eval().encode_image(transform(picture)[None], True) * model.encode_text(ids, True)).sum()
    elif kind == "pickscore":  # its model card
        model, process = scorer.clip, transformers.CLIPImageProcessorPil(size={"shortest_edge": 224})
        features = lambda out: unit(getattr(out, "pooler_output", out))
        score = lambda picture, ids, mask: (features(model.get_text_features(ids, mask)) * features(model.get_image_features(
            process(picture, return_tensors="pt").pixel_values))).sum()
    else:  # as in ImageReward's CLIPScore.py and AestheticScore.py
        model = openai.model.CLIP(dim, 224, depth, vision, patch, 77, vocab, text, 2, depth)
        model.load_state_dict(openai_clip(*SIZES["L"]))
        picture_vector = lambda picture: unit(model.eval().encode_image(_transform(224)(picture)[None]))
        score = lambda picture, ids, mask: (picture_vector(picture) * unit(model.encode_text(ids))).sum()
        if kind == "aesthetic":
            mlp = MLP(dim).eval()
            mlp.load_state_dict(load(root / evaluation.AESTHETIC / evaluation.AESTHETIC_FILE))
            score = lambda picture, ids, mask: mlp(picture_vector(picture))
    with torch.no_grad():
        return torch.stack([score(picture, ids[None], mask[None]).reshape(()) for picture, ids, mask in
                            zip(photographs(), tokens.input_ids, tokens.attention_mask)])


@pytest.mark.parametrize("name", EXPECTED)
def test_scorers_equal_their_originals(name, scorer_weights, monkeypatch):
    """Skipped without the originals: pip install torchvision timm ftfy clint fairscale accelerate "setuptools<80", then pip
    install --no-deps hpsv2==1.2.0 image-reward==1.5 clip-anytorch==2.6.0. With -s it prints what EXPECTED records."""
    scorer = evaluation.load_scorer(name.split("-")[0], scorer_weights, antialias="aliased" not in name)
    original, ours = original_scores(name, scorer_weights, scorer, monkeypatch), scorer.score(photographs(), PROMPTS)
    print(f'{name}: {[round(v, 7) for v in original.tolist()]} largest difference {(original - ours).abs().max():.1e}')
    torch.testing.assert_close(ours, original, rtol=0, atol=2e-6)


# ---- Evaluation: the command ----------------------------------------------------------------------------------------

EVAL = ["--resolution", "64", "--sampler-steps", "2", "--batch-size", "3", "--device", "cpu", "--scorers", "clip,aesthetic"]


@pytest.fixture
def evaluate(pipeline, scorer_weights):
    Path("prompts.txt").write_text("\n".join(f"picture {i}" for i in range(7)))
    return lambda *argv: evaluation.main(["--model", str(pipeline), "--prompts", "prompts.txt", "--scorer-weights", str(scorer_weights),
                                          "--out", "out", *EVAL, *map(str, argv)])


def other_unet(folder, pipeline, noise=0.05):
    unet = seppo.load_unet(pipeline)
    torch.manual_seed(0)
    for p in unet.parameters():
        p.data += noise * torch.randn_like(p)
    unet.save_pretrained(folder)


def pictures(folder="out"):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*.png") if "pictures" in path.parts}


def test_evaluation_end_to_end(pipeline, scorer_weights, evaluate, capsys):
    other_unet("run/checkpoint-2/unet", pipeline, 0.05), other_unet("run/checkpoint-10/unet", pipeline, 0.1), other_unet("bare", pipeline, 0.2)
    Path("empty").mkdir()
    assert evaluate("--unet", "ours=run", "run/checkpoint-2", "bare", "--scorers", "clip,pickscore,aesthetic", "--scorer-weights", "empty") == 2, "none"
    said = capsys.readouterr().out
    assert said.count("missing") > 3 and "CLIPScore is missing" in said
    assert evaluate("--scorers", "clip,pickscore", "--scorer-weights", scorer_weights) == 0
    assert evaluate("--scorers", "clip", "--scorer-weights", "empty") == 2 and "no scorer could be loaded" in capsys.readouterr().err
    shutil.rmtree("out")
    assert evaluate("--unet", "ours=run", "run/checkpoint-2", "bare") == 0
    said, bars = capsys.readouterr()
    assert "bare: pictures: 100%" in bars and "7/7" in bars and "picture/s" in bars
    assert Path("out/table.md").read_text() in said + "\n" and "no safety checker" in said
    rows = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    models = ["base", "ours", "run-checkpoint-2", "bare"]
    assert [row["model"] for row in rows] == [model for model in models for _ in range(7)]
    for model in models[1:]:  # the table says what the scores say
        both = [torch.tensor([row["clip"] for row in rows if row["model"] == m], dtype=torch.float64) for m in ("base", model)]
        assert f"| {model} | {100 * both[1].mean():.2f} ± {100 * both[1].std() / 7 ** .5:.2f} | {100 * (both[1] > both[0]).double().mean():.1f} %" in said
    scorers = {name: evaluation.load_scorer(name, scorer_weights) for name in ("aesthetic", "clip")}
    for row in rows[::5]:
        assert row["prompt"] == f"picture {row['index']}" and f"{row['index']:05d}-" in row["file"] and row["model"] in row["file"]
        for name, scorer in scorers.items():
            with Image.open(Path("out", row["file"])) as image:
                assert scorer.score([image], [row["prompt"]]).item() == pytest.approx(row[name], abs=1e-5)
    assert "paper's own" not in said
    with Image.open("out/grid.png") as grid:
        assert grid.width == 5 * 192 and grid.height > 6 * 192
        assert grid.crop((2 * 192 + 2, 28 + 5 * 192 + 2, 3 * 192 - 2, 28 + 6 * 192 - 2)).tobytes() == Image.open(
            Path("out", rows[5 + 7]["file"])).resize((188, 188), Image.NEAREST).tobytes(), "row 6, second model"
    assert len({picture for picture in pictures().values()}) == 28, "every model's picture of every prompt is its own"


def test_pictures_are_what_the_model_draws(pipeline, evaluate):
    """The last checkpoint's own weights, the prompt's own noise and caption, guidance and solver: against diffusers' pipeline."""
    other_unet("run/checkpoint-10/unet", pipeline, 0.1)
    assert evaluate("--unet", "ours=run", "--solver", "ddim", "--guidance", "3", "--seed", "5") == 0
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, unet=seppo.load_unet("run/checkpoint-10"), safety_checker=None)
    pipe.scheduler = seppo.diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    prompts = evaluation.read_prompts("prompts.txt")
    for i, (prompt, noise) in enumerate(zip(prompts, evaluation.start_noise(prompts, (4, 8, 8), seed=5))):
        theirs = pipe(prompt, latents=noise[None], num_inference_steps=2, guidance_scale=3.0).images[0]
        assert far(theirs, next(Path("out/pictures/ours").glob(f"{i:05d}-*.png"))) <= 1


def far(image, path):
    pixels = lambda image: torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).double()
    difference = pixels(image) - pixels(Image.open(path))
    assert difference.mean().abs() < 0.1, "rounded, not cut"
    return difference.abs().max().item()


def test_paper_protocol_is_a_loop_over_the_pipeline(pipeline, evaluate):
    """One generator for all prompts, one picture at a time, PNDM: as the authors' script, prompt after prompt."""
    assert evaluation.resolve(["--model", "x", "--protocol", "paper"]).sampler_steps == 50
    assert evaluate("--protocol", "paper", "--sampler-steps", "4") == 0
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for i, prompt in enumerate(evaluation.read_prompts("prompts.txt")):
        theirs = pipe(prompt, generator=generator, num_inference_steps=4, guidance_scale=7.5).images[0]
        assert far(theirs, next(Path("out/pictures/base").glob(f"{i:05d}-*.png"))) <= 1


def test_evaluation_resumes_and_reuses(pipeline, evaluate, monkeypatch):
    other_unet("other", pipeline)
    assert evaluate("--unet", "x=other", "--out", "straight") == 0
    calls, sample = [], seppo.sample
    def counted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)
    monkeypatch.setattr(seppo, "sample", counted)
    assert evaluate("--unet", "x=other") == 130
    next(Path("out/pictures/base").glob("00001-*.png")).unlink()  # its batch of three is made again, and no other
    assert evaluate("--unet", "x=other") == 0 and len(calls) == 2 + 6
    assert pictures() == pictures("straight") and Path("out/scores.jsonl").read_text() == Path("straight/scores.jsonl").read_text()
    assert evaluate("--unet", "x=other", "--max-prompts", "3") == 0 and len(calls) == 8, "a subset needs no new picture"
    other_unet("other", pipeline, 0.2)
    assert evaluate("--unet", "x=other") == 0 and len(calls) == 11, "other weights under the same name need new pictures"
    assert evaluate("--unet", "x=other", "--seed", "1") == 0 and len(calls) == 17


def test_whatever_changes_a_picture_changes_its_name(pipeline, scorer_weights, evaluate, monkeypatch):
    calls, sample = [], seppo.sample
    monkeypatch.setattr(seppo, "sample", lambda *args: calls.append(1) or sample(*args))
    def is_new(*argv):
        before = len(calls)
        assert evaluate("--max-prompts", "1", "--scorers", "aesthetic", *argv) == 0
        return len(calls) > before
    assert is_new() and not is_new()
    for argv in (["--guidance", "3"], ["--solver", "ddim"], ["--sampler-steps", "3"], ["--dtype", "bf16"], ["--guidance", "17.5"],
                 ["--sampler-steps", "21"], ["--protocol", "paper", "--sampler-steps", "1"]):
        assert is_new(*argv) and not is_new(*argv), argv
    Path("one.txt").write_text("another prompt")
    assert is_new("--protocol", "paper", "--sampler-steps", "1", "--prompts", "one.txt")
    for part, change in (("vae", {"scaling_factor": 1.0}), ("scheduler", {"beta_end": 0.02}), ("unet", {"attention_head_dim": 2})):
        shutil.copytree(pipeline, part)
        config = Path(part, part, "scheduler_config.json" if part == "scheduler" else "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
        assert is_new("--model", part), part
    for part, file in (("vae", "diffusion_pytorch_model"), ("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        shutil.copytree(pipeline, f"w-{part}")
        path = Path(f"w-{part}", part, f"{file}.safetensors")
        state = load_file(path)
        next(t for t in state.values() if t.is_floating_point()).view(-1)[0] += 1
        save_file(state, path, {"format": "pt"})
        assert is_new("--model", f"w-{part}"), part


def test_protocols_options_and_papers_row(pipeline, scorer_weights, evaluate, monkeypatch, capsys):
    asked, load = [], evaluation.load_scorer
    monkeypatch.setattr(evaluation, "load_scorer", lambda name, *args, **options: asked.append(options.get("antialias")) or load(name, *args, **options))
    monkeypatch.setattr(evaluation, "pickapic_captions", lambda: ["a", "b"])
    monkeypatch.setitem(evaluation.NAMED, "pickapic", 2)
    quick = ("--scorers", "hpsv2", "--max-prompts")
    assert evaluate("--prompts", "pickapic", *quick, "2") == 0 and re.search(r"own figures\* \| 27.2 .*own protocol", capsys.readouterr().out, re.S)
    assert evaluate("--protocol", "paper", "--sampler-steps", "1", "--prompts", "pickapic", *quick, "1") == 0
    said = capsys.readouterr().out
    assert asked == [True, False] and "paper's own" not in said and "without antialiasing" in said
    o = evaluation.resolve(["--model", "x", "--protocol", "paper"])
    assert (o.solver, o.sampler_steps, o.guidance, o.resolution, o.seed) == ("pndm", 50, 7.5, 512, 0)
    o = evaluation.resolve([])
    assert (o.model, o.prompts, o.scorers, o.sampler_steps, o.guidance) == ("mini", "mini", ["mini"], 8, 1.0)
    assert evaluation.load_scorer("pickscore", scorer_weights).tidy is str and evaluation.load_scorer("clip", scorer_weights).tidy is evaluation.clean


def test_the_last_run_of_the_miniature_is_found():
    for i, (name, model) in enumerate((("new", "mini"), ("old", "mini"), ("other", "x"), ("odd", None))):
        Path("runs", name, "checkpoint-100").mkdir(parents=True), Path("runs", name, "checkpoint-20").mkdir()
        Path("runs", name, "config.json").write_text(json.dumps({"options": {"model": model}}) if model else "{")
        os.utime(Path("runs", name, "config.json"), (1000 - i * (name == "old"), 1000 - i * (name == "old")))
    os.utime("runs/other/config.json", (2000, 2000))
    o = evaluation.resolve(["--device", "cpu"])
    assert evaluation.find_unets(o) == {"base": None, "new": "runs/new/checkpoint-100"}
    o.unet = ["runs/old", "b=runs/old/checkpoint-20", "runs/old/checkpoint-20/unet"]
    assert list(evaluation.find_unets(o).items())[1:] == [
        ("old", "runs/old/checkpoint-100"), ("b", "runs/old/checkpoint-20"), ("old-checkpoint-20", "runs/old/checkpoint-20/unet")]


def test_broken_scorer_files_are_missing(scorer_weights, tmp_path):
    """What does not fit together is said: never a score from random weights or an empty vocabulary."""
    def broken(name, change):
        folder = Path(str(len([*Path().iterdir()])))
        shutil.copytree(scorer_weights, folder)
        change(folder)
        with pytest.raises(seppo.UserError):
            evaluation.load_scorer(name, folder)
    def drop_weight(path):
        save_file({k: v for k, v in load_file(path).items() if "visual_projection" not in k}, path)
    broken("clip", lambda f: drop_weight(f / evaluation.L14 / "model.safetensors"))
    for name, repository in (("clip", evaluation.L14), ("hpsv2", evaluation.H14), ("imagereward", evaluation.BERT)):
        broken(name, lambda f: [p.unlink() for p in (f / repository).iterdir() if p.name.startswith(("vocab", "merges", "token", "special"))])
    head = Path(evaluation.AESTHETIC, evaluation.AESTHETIC_FILE)
    broken("aesthetic", lambda f: torch.save({}, f / head))
    broken("aesthetic", lambda f: torch.save(head_state(16), f / head))
    broken("hpsv2", lambda f: (f / "xswu/HPSv2/HPS_v2_compressed.pt").write_bytes(b"torn"))
    broken("imagereward", lambda f: torch.save(imagereward_state(64, 32, 1, 56, 99), f / "zai-org/ImageReward/ImageReward.pt"))


def test_a_torn_picture_is_named(evaluate, capsys):
    assert evaluate() == 0
    next(Path("out/pictures/base").iterdir()).write_bytes(b"torn")
    assert evaluate() == 2 and "a picture in out/pictures/base cannot be read" in capsys.readouterr().err.splitlines()[-1]


def test_processes_share_the_work(evaluate, monkeypatch):
    """Two processes, one after the other here: each makes its own batches, and what they gathered makes the one table."""
    assert evaluate("--out", "one") == 0
    shares, gathered = [], []
    def gather(into, mine):
        shares.append(mine)
        into[:] = shares if len(shares) == 2 else [mine, mine]
    for name, stand_in in (("init_process_group", lambda *a, **k: None), ("all_gather_object", gather), ("destroy_process_group", lambda: None),
                           ("broadcast_object_list", lambda box: box.__setitem__(0, evaluation.read_prompts("prompts.txt")))):
        monkeypatch.setattr(torch.distributed, name, stand_in)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert evaluate() == 0
        assert len(pictures()) == (3 if rank == "1" else 7) and Path("out/table.md").exists() == (rank == "0")
    assert Path("out/scores.jsonl").read_text() == Path("one/scores.jsonl").read_text()


def test_curves(capsys, monkeypatch):
    for run, reference in (("a", 1.0), ("b", None)):
        Path(run).mkdir()
        Path(run, "metrics.jsonl").write_text("".join(json.dumps({"update": i + 1} | dict.fromkeys(
            ("reference_w", "policy_r", "reference_r", "sign_pos", "sign_neg", "sign_zero", "implicit_acc"), reference) | {"policy_w": 1 + i / 10}) + "\n" for i in range(30)))
    from matplotlib.axes import Axes
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *args, **options: drawn.append((x, y, options["label"])) or plot(self, x, y, *args, **options))
    assert evaluation.main(["--runs", "a", "b", "--out", "here"]) == 0
    with Image.open("here/curves.png") as image:
        assert image.width > 800
    first = next((x, y) for x, y, label in drawn if label == "a: policy_w")
    assert first[0] == (*range(1, 31),) and first[1][0] == 1 and first[1][-1] == pytest.approx(3.45), "the mean of the last ten"
    assert len(drawn) == 8 + 1, "SFT has no reference to draw"
    assert not Path("here/table.md").exists()
    assert evaluation.main(["--runs", "nowhere", "--out", "here"]) == 2 and "--runs nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["--scorers", "clip,beauty"], "beauty: there are pickscore"), (["--unet", "x=nowhere"], "--unet x=nowhere cannot be read"),
    (["--unet", "a=bare", "a=bare"], "name of its own"), (["--unet", "base=bare"], "name of its own"), (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
    (["--prompts", "empty.txt"], "holds no prompt"), (["--prompts", "bad.json"], "--prompts bad.json cannot be read"),
    (["--unet", "a=wide"], "another shape"), (["--model", "nowhere"], "--model nowhere"), (["--max-prompts", "0"], "--max-prompts must be positive"),
    (["--protocol", "best"], "invalid choice"), (["--scorers", "mini"], "for --model mini"), (["--unet", "a="], "does not say where"), (["--unet", ""], "does not say where"),
    (["--prompts", "object.json"], "holds no list"), (["--prompts", "null.jsonl"], "--prompts null.jsonl cannot be read"), (["--sampler-steps", "1001"], "1000 at most"),
    (["--out", "empty.txt"], "--out empty.txt cannot be read"), (["--unet", "a=lacking"], "lacks weights"), (["--scorer-weights", "nowhere"], "is no folder"),
    (["--scorer-weights", "flat"], "a folder for each repository"), (["--unet", "a=nan"], "not finite"), (["--prompts", "pickapic"], "--prompts pickapic cannot be read"),
    (["--resolution", "100"], "multiple of 64")])
def test_evaluation_refusals(evaluate, pipeline, argv, says, capsys):
    Path("empty.txt").write_text("\n \n"), Path("bad.json").write_text("{"), other_unet("bare", pipeline)
    wide = seppo.load_unet("bare").config | {"cross_attention_dim": 32}
    UNet2DConditionModel.from_config(wide).save_pretrained("wide")
    Path("object.json").write_text('{"0": {"prompt": "a"}}'), Path("null.jsonl").write_text('{"prompt": null}')
    Path("flat").mkdir(), Path("flat/config.json").write_text("{}")
    for name, change in (("lacking", lambda state: state.pop("conv_in.weight")), ("nan", lambda state: state["conv_in.weight"].fill_(math.nan))):
        shutil.copytree("bare", name)
        state = load_file(Path(name, "diffusion_pytorch_model.safetensors"))
        change(state), save_file(state, Path(name, "diffusion_pytorch_model.safetensors"))
    assert evaluate(*argv) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "pictures:" not in line]
    assert len(err) == 1 and says in err[0] and err[0].startswith("eval.py:"), err
    assert says == "not finite" or not [*Path().rglob("*.png")], "it must be said before the work"


def test_evaluation_without_a_run(capsys):
    assert evaluation.main(["--device", "cpu"]) == 2 and "makes one" in capsys.readouterr().err


# ---- Video ----------------------------------------------------------------------------------------------------------

MOTION = dict(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=2,
              motion_max_seq_length=8, use_motion_mid_block=False)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A tiny AnimateDiff motion adapter, saved by diffusers, for the tiny Stable Diffusion."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-motion")
    MotionAdapter(**MOTION).save_pretrained(folder)
    return folder


@pytest.fixture
def clips(tmp_path):
    """Captioned clips of 9 frames in every form, and some of no use: too short, of two sizes, broken."""
    folder = tmp_path / "clips"
    for name in ("frames", "short", "sizes"):
        folder.joinpath(name).mkdir(parents=True)
    film = [Image.open(io.BytesIO(jpeg(i, 80))) for i in range(9)]
    for i, frame in enumerate(film):
        frame.save(folder / "frames" / f"{i:03d}.png")
        frame.resize((80 + 16 * (i == 5),) * 2).save(folder / "sizes" / f"{i:03d}.jpg")
    film[0].save(folder / "short" / "0.png")
    film[0].save(folder / "gif.gif", save_all=True, append_images=film[1:])
    film[0].save(folder / "webp.webp", save_all=True, append_images=film[1:], lossless=True)
    folder.joinpath("broken.gif").write_bytes(b"GIF89a nothing")
    for name in ("frames", "short", "sizes", "gif", "webp", "broken"):
        folder.joinpath(f"{name}.txt").write_text(f"a {name}")
    return folder


def film(pipeline, adapter, data, *more):
    return run(pipeline, data, "--motion-adapter", adapter, "--frames", 4, *more)


def test_clips_of_every_form(clips, monkeypatch):
    chosen = lambda at, n=4: [int(p.filename[-7:-4]) for p in seppo.read_clip(clips / "frames", n, at)]
    pixels = lambda name, n=9, **more: seppo.to_pixels(clips / name, 64, frames=n, **more)
    assert chosen(0) == [0, 2, 5, 8], "9 frames are less than 4 at a stride of 4: they are spread over the clip"
    assert chosen(0, 2) == [0, 4] and chosen(0.999, 2) == [4, 8] and chosen(0, 9) == [*range(9)]
    straight = pixels("frames")
    assert straight.shape == (3, 9, 64, 64) and torch.equal(pixels("webp.webp"), straight)
    assert (pixels("gif.gif") - straight).abs().mean() < 0.1
    assert torch.equal(pixels("frames", flip=True), straight.flip(-1))
    for i in range(9):  # numbers without zeros in front, and what a Mac leaves behind
        (clips / "frames" / f"{i:03d}.png").rename(clips / "frames" / f"frame{i + 7}.png")
        (clips / "frames" / f"._frame{i}.png").write_bytes(b"Mac OS X")
    assert torch.equal(pixels("frames"), straight)
    for name in ("short", "sizes", "broken.gif"):
        with pytest.raises(Exception):
            pixels(name, 4)
    Image.new("1", (9000, 8000)).save(clips / "huge.gif", save_all=True, append_images=[Image.new("1", (9000, 8000), 1)])
    with pytest.raises(ValueError, match="9000 x 8000"):
        pixels("huge.gif", 2)
    clips.joinpath("huge.gif").unlink()
    clips.joinpath("a.b").mkdir(), clips.joinpath("frames.json").write_text("{}"), clips.joinpath(".DS_Store").write_bytes(b"")
    clips.joinpath("a.txt").write_text("of another")  # not of a.b
    data = seppo.Winners(*seppo.open_folder(clips, clips=True), resolution=64, frames=4)
    assert data.total == 7 and {data.fetch(n)[0] for n in range(70)} == {"a frames", "a gif", "a webp"}
    assert all(data.fetch(n)[1].shape == (3, 4, 64, 64) for n in range(6)) and sum(data.fetch(n)[3] for n in range(7)) >= 4
    data = seppo.Winners("x", [(0, 0, 1)], lambda *_: [("a", clips / "frames")], resolution=64, frames=2)
    assert len({data.fetch(n)[1].sum().item() for n in range(20)}) > 3, "clips start anywhere"
    monkeypatch.setitem(sys.modules, "av", None)
    clips.joinpath("film.mp4").touch()
    with pytest.raises(seppo.UserError, match="pip install av"):
        pixels("film.mp4", 4)


def test_films(clips):
    av = pytest.importorskip("av")
    for name in ("film.mp4", "film.mpeg"):
        with av.open(str(clips / name), "w") as file:
            stream = file.add_stream("mpeg4" if name == "film.mp4" else "mpeg1video", rate=25)
            stream.width = stream.height = 80
            for i in range(9):
                file.mux(stream.encode(av.VideoFrame.from_image(Image.open(clips / "frames" / f"{i:03d}.png").convert("RGB"))))
            file.mux(stream.encode())
        straight, seen = (seppo.to_pixels(clips / what, 64, frames=4) for what in ("frames", name))
        assert (seen - straight).abs().mean() < 0.15, name
        with pytest.raises(ValueError, match="9 frames"):
            seppo.to_pixels(clips / name, 64, frames=10)


def test_one_frame_equals_a_picture(pipeline, adapter):
    """5-D equals 4-D for one frame when the motion modules are identities; and frames differ from pictures when they are not."""
    unet, codec = seppo.load_unet(pipeline), seppo.load_codec(str(pipeline), "cpu", torch.float32)
    motion = UNetMotionModel.from_unet2d(unet, MotionAdapter.from_pretrained(adapter)).eval()
    t, _, eps, x, noise = seppo.draws("video", range(3), (4, 8, 8), 1000, 0)
    context, null = codec.encode_text(["a", "b", "c"]), codec.encode_text([""])
    far = lambda: (seppo.denoising_error(motion, codec.scheduler, x[:, :, None], eps[:, :, None], t, context)
                   - seppo.denoising_error(unet, codec.scheduler, x, eps, t, context)).abs().max()
    assert far() > 1e-3
    for name, p in motion.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            torch.nn.init.zeros_(p)
    assert far() < 1e-5
    torch.testing.assert_close(seppo.sample(motion, codec.scheduler, noise[:, :, None], context, null, steps=3)[:, :, 0],
                               seppo.sample(unet, codec.scheduler, noise, context, null, steps=3), rtol=1e-4, atol=1e-4)
    many = torch.stack([x, noise, eps], 2)  # (3, 4, F, 8, 8): identities leave frames apart
    pixels = codec.decode(many)
    torch.testing.assert_close(pixels[:, :, 1], codec.decode(noise))
    torch.testing.assert_close(codec.encode(pixels, many)[:, :, 2], codec.encode(codec.decode(eps), eps))


def says_how_to_load(out):
    """The run's last lines, as a program -> its `pipe`."""
    names = {}
    exec("\n".join(line.strip() for line in out[out.index("To load it:"):].splitlines()[1:]), names)
    names["pipe"].set_progress_bar_config(disable=True)
    return names["pipe"]


def test_video_end_to_end(pipeline, adapter, clips, capsys):
    """The command on clips; its errors against AnimateDiffPipeline; the checkpoint, loaded as the run's last lines say."""
    assert film(pipeline, adapter, clips, "--caption-dropout", 0, "--guidance", 3) == 0
    pipe = says_how_to_load(capsys.readouterr().out)
    lines = metrics()
    assert lines[0]["sign_zero"] == 1 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and lines[-1]["skipped_rows"] > 0
    start, end = (load_file(f"run/{name}/motion_adapter/diffusion_pytorch_model.safetensors") for name in ("checkpoint-0", "checkpoint-4"))
    assert same(start, MotionAdapter.from_pretrained(adapter).state_dict()) and not same(start, end)
    assert not Path("run/checkpoint-4/unet").exists(), "the pictures' weights did not train"
    resolved = seppo.resolve(["--model", str(pipeline), "--motion-adapter", str(adapter), "--data", str(clips), "--resolution", "64", "--device", "cpu"])
    assert (resolved.generate_batch, resolved.gradient_checkpointing, resolved.frames, resolved.train) == (1, True, 16, "motion")
    _, codec = seppo.load_models(argparse.Namespace(**vars(resolved) | {"frames": 8}))
    assert codec.vae.use_slicing and codec.scheduler.config.timestep_spacing == "linspace" and codec.scheduler.config.beta_end == .012
    assert torch.allclose(codec.scheduler.betas, torch.linspace(.00085, .012, 1000))
    assert {name: torch.equal(p, pipe.unet.state_dict()[name]) for name, p in end.items()} == dict.fromkeys(end, True)
    with Image.open("run/samples/step-4.webp") as image, Image.open("run/samples/step-0.webp") as first:
        assert image.n_frames == 4 and image.height == 2 * first.height
        far = lambda y: (torch.tensor(list(image.convert("RGB").crop((0, y, image.width, y + first.height)).getdata())).float()
                         - torch.tensor(list(first.convert("RGB").getdata()))).abs().mean()
        assert far(0) < 2 < far(first.height), "the base above"
    # update 1, by hand
    assert (pipe.scheduler.config.beta_schedule, pipe.scheduler.config.clip_sample) == ("linear", False)
    pipe.unet.load_motion_modules(MotionAdapter.from_pretrained(adapter))
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    t, _, eps, noise_w, noise_r = seppo.draws(0, range(4), (4, 4, 8, 8), 1000, 0)
    rows = seppo.open_data(argparse.Namespace(data=str(clips), frames=4, loser="generated", seed=0, resolution=64, max_winners=None))
    captions, winners, _, _ = zip(*(rows.fetch(n) for n in range(4)))
    with torch.no_grad():
        x_w = torch.stack([torch.stack([pipe.vae.encode(frame[None]).latent_dist.mean[0] + pipe.vae.encode(frame[None]).latent_dist.std[0] * n
                                        for frame, n in zip(clip.unbind(1), noise.unbind(1))], 1) for clip, noise in zip(winners, noise_w)])
        x_r = torch.cat([pipe(caption, latents=n[None], num_frames=4, num_inference_steps=2, guidance_scale=3.0, output_type="latent",
                              height=64, width=64).frames for caption, n in zip(captions, noise_r)])
        ids = pipe.tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
        context = pipe.text_encoder(ids)[0].repeat_interleave(4, 0)
        for x, key in ((x_w * pipe.vae.config.scaling_factor, "reference_w"), (x_r, "reference_r")):
            error = (pipe.unet(noising.add_noise(x, eps, t), t, context).sample - eps).square().mean()
            assert lines[0][key] == pytest.approx(error.item(), rel=1e-4), key
    assert len(pipe("a frames", num_frames=4, num_inference_steps=2, height=64, width=64).frames[0]) == 4
    # everything trains
    assert film(pipeline, adapter, clips, "--train", "all", "--out", "all") == 0
    pipe = says_how_to_load(capsys.readouterr().out)
    assert not same(weights(pipeline / "unet"), pipe.unet.state_dict()), "here they trained"
    assert len(pipe("a frames", num_frames=4, num_inference_steps=2, height=64, width=64).frames[0]) == 4


@slow
def test_slow_video_resumes(pipeline, adapter, clips, monkeypatch, capsys):
    assert film(pipeline, adapter, clips, "--out", "straight") == 0
    update = seppo.Trainer.update
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: update(self, u) if u < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    assert film(pipeline, adapter, clips) == 130
    monkeypatch.setattr(seppo.Trainer, "update", update)
    assert film(pipeline, adapter, clips) == 0
    end = "checkpoint-4/motion_adapter/diffusion_pytorch_model.safetensors"
    assert same(load_file(f"run/{end}"), load_file(f"straight/{end}"))
    assert film(pipeline, adapter, clips, "--dry-run", "--out", "dry") == 0 and not Path("dry").exists()
    dry = capsys.readouterr().out.splitlines()[-1]
    assert film(pipeline, adapter, clips, "--out", "wet", "--steps", 1) == 0 and dry[:dry.index(";")] in capsys.readouterr().out
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (seppo.load_unet(pipeline), MotionAdapter(**MOTION))]
    assert f"{sum(sizes):.1f} M parameters, {sizes[1]:.1f} M train" in dry
    # the next run starts from this one's motion, and plain pictures' weights from another
    other_unet("other/unet", pipeline)
    assert film(pipeline, adapter, clips, "--motion-adapter", "run/checkpoint-4", "--unet", "other", "--out", "next", "--steps", 1) == 0
    pipe = says_how_to_load(capsys.readouterr().out)
    first = load_file("next/checkpoint-0/unet/diffusion_pytorch_model.safetensors")  # whole, since --model alone would not do
    assert same(load_file(f"run/{end}"), first) and torch.equal(first["conv_in.weight"], weights("other/unet")["conv_in.weight"])
    assert torch.equal(pipe.unet.conv_in.weight, first["conv_in.weight"]), "pictures' weights do not train"
    for more in ((), ("--dry-run",)):
        assert film(pipeline, adapter, clips, "--unet", "next/checkpoint-1", "--out", "on", "--steps", 1, *more) == 0
    assert same(load_file("next/checkpoint-1/unet/diffusion_pytorch_model.safetensors"), load_file("on/checkpoint-0/unet/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("argv, says", [
    (["--frames", "4"], "--frames needs --motion-adapter"), (["--frames", "1", "--motion-adapter", "x"], "2 at least"),
    (["--train", "motion"], "--train is for clips"), (["--frames", "9", "--motion-adapter", "ADAPTER"], "knows 8 at most"),
    (["--motion-adapter", "nowhere"], "--motion-adapter nowhere cannot be read"), (["--motion-adapter", "ADAPTER", "--data", "pickapic"], "folders only"),
    (["--motion-adapter", "ADAPTER", "--data", "no/such"], "no/such"), (["--dry-run", "--frames", "9", "--motion-adapter", "ADAPTER"], "knows 8"),
    (["--motion-adapter", "ADAPTER", "--unet", "ADAPTER"], "holds a MotionAdapter"), (["--motion-adapter", "MODEL"], "holds a UNet2D"),
    (["--dry-run", "--motion-adapter", "nowhere"], "--motion-adapter nowhere"),
    (["--model", "mini-video", "--data", "mini-video", "--resolution", "16", "--frames", "4"], "has clips of 8 frames"),
    (["--motion-adapter", "ADAPTER", "--data", "mini-mixture"], "has no clips"),
    (["--method", "dpo", "--motion-adapter", "ADAPTER", "--frames", "4"], "no losing pictures"),
    (["--model", "mini-video", "--data", "mini", "--resolution", "16"], "has no clips"),
    (["--model", "mini", "--data", "mini-video", "--resolution", "16"], "has clips of 8 frames"),
    (["--model", "mini", "--motion-adapter", "x", "--resolution", "16"], "mini-video")])
def test_video_refusals(pipeline, adapter, clips, argv, says, capsys):
    assert run(pipeline, clips, *({"ADAPTER": str(adapter), "MODEL": str(pipeline)}.get(word, word) for word in argv)) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err


def test_evaluation_of_clips(pipeline, adapter, evaluate, scorer_weights):
    """Picture scorers give the mean over a clip's frames; motion alone, or a whole UNet, stands beside the base."""
    torch.manual_seed(2)
    MotionAdapter(**MOTION).save_pretrained("run/checkpoint-2/motion_adapter")
    UNetMotionModel.from_unet2d(seppo.load_unet(pipeline), MotionAdapter(**MOTION)).save_pretrained("whole")
    assert evaluate("--motion-adapter", adapter, "--frames", 3, "--unet", "run", "whole", "same=" + str(adapter)) == 0
    rows = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    scorer = evaluation.load_scorer("clip", scorer_weights)
    for row in rows[::4]:
        with Image.open(Path("out", row["file"])) as strip:
            assert strip.size == (3 * 64, 64)
            frames = [strip.crop((64 * i, 0, 64 * i + 64, 64)) for i in range(3)]
        assert row["clip"] == pytest.approx(scorer.score(frames, [row["prompt"]] * 3).mean().item(), abs=1e-5)
    score = {(row["model"], row["index"]): row["clip"] for row in rows}
    assert all(score["same", i] == score["base", i] and score["run", i] != score["base", i] != score["whole", i] for i in range(7))
    with Image.open("out/grid.webp") as grid:
        assert grid.n_frames == 3 and grid.width == 5 * 192
    assert "3 frames" in Path("out/table.md").read_text() and evaluation.resolve(["--model", "x", "--motion-adapter", "y", "--device", "cpu"]).batch_size == 1
    assert evaluate("--motion-adapter", adapter, "--frames", 3, "--unet", "x=nowhere") == 2


@slow
def test_slow_the_moving_miniature(monkeypatch, capsys):
    """Likes fall on the steadiest of four clips; and the whole path, at a size for tests."""
    t = torch.linspace(-.5, .5, 8)
    drift = torch.nn.functional.pad(torch.stack([t, -t], 1), (0, 3))
    clip = lambda flaws: seppo.draw_mini(["a red disc"] * 8, flaws).transpose(0, 1)[None]
    score = lambda flaws: seppo.mini_score(clip(flaws), ["a red disc"]).item()
    g, jitter = torch.Generator().manual_seed(0), torch.zeros(8, 5)
    jitter[:, :2] = .2 * torch.randn(8, 2, generator=g)
    assert 1 >= score(drift) > 0.97 > 0.94 > score(drift + jitter) > score(drift + 2 * jitter)
    assert seppo.mini_score(torch.zeros(1, 3, 8, 16, 16), ["a red disc"]).abs() < 0.05, "plain grey is no steady clip"
    caption, winner, loser = seppo.open_mini("mini-video", 128)[2](0, 0, 1)[0]
    four = torch.stack([picture for _, picture in seppo.open_mini("mini-video-mixture", 128)[2](0, 0, 4)])
    assert torch.equal(winner, four[seppo.mini_score(four, [caption] * 4).argmax()]) and winner.shape == loser.shape == (3, 8, 16, 16)
    for name, steps in (("mini-untrained", 4), ("mini-video-untrained", 2), ("mini-video", 2)):
        monkeypatch.setitem(seppo.MINI, name, seppo.MINI[name] | dict(steps=steps, save_every=steps))
    monkeypatch.setitem(evaluation.NAMED, "mini", 16)
    whole_data = seppo.open_mini
    monkeypatch.setattr(seppo, "open_mini", lambda name: whole_data(name, 128))
    assert seppo.main(["--model", "mini-video", "--device", "cpu"]) == 0
    assert evaluation.main(["--model", "mini-video", "--device", "cpu"]) == 0
    assert "| mini-video-seppo |" in capsys.readouterr().out and Path("runs/mini-video-seppo/checkpoint-2/motion_adapter").exists()


# ---- The study ------------------------------------------------------------------------------------------------------

@pytest.fixture
def small_study(monkeypatch):
    """The study's machinery at a size for tests: tiny runs in this process, a hardly trained base, two planted methods."""
    for name, change in (("mini-untrained", dict(steps=20, save_every=20)), ("mini", dict(steps=2, save_every=1, batch_size=8, micro_batch=8, generate_batch=8))):
        monkeypatch.setitem(seppo.MINI, name, seppo.MINI[name] | change)
    monkeypatch.setattr(evaluation, "VARIANTS", {v: evaluation.VARIANTS[v] for v in ("sspo", "sft")} | {
        "same as sft": ["--method", "sft"], "seppo": ["--lr", "1e-20"]})
    monkeypatch.setattr(evaluation, "STUDIES", {"small": dict(lr=(1e-3,), beta=(5,), tuning=(0,), seeds=range(10, 12))})
    monkeypatch.setitem(evaluation.NAMED, "mini", 32)
    monkeypatch.setattr(evaluation, "anchor_truth", functools.partial(evaluation.anchor_truth, n=8, many=2))
    monkeypatch.setattr(evaluation, "run_cells", lambda out, cells, keep, what: {cell: evaluation.run_cell(out, *cell, keep) for cell in cells})



def test_the_study_is_honest(small_study, capsys, monkeypatch):
    """A planted method that does nothing scores as the base does; one that is SFT under another name is no better than SFT."""
    assert evaluation.main(["--study", "small", "--out", "study"]) == 0
    rows = {cells[0]: cells for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in Path("study/study.md").read_text().splitlines() if line[:1] == "|")}
    base = re.search(r"base model: (\S+)\.", Path("study/study.md").read_text()).group(1)
    assert rows["same as sft"][4] == "+0.000 ± 0.000" and rows["sft"][4] == ""
    assert rows["seppo"][3] == f"{base} ± 0.000", "at a learning rate of nothing"
    assert rows["sspo"][3] != rows["sft"][3] and rows["sft"][7:] == [""] * 7 and rows["sspo"][-1].endswith("%")
    for name in ("heat.png", "strip.png"):
        with Image.open(Path("study", name)) as image:
            assert image.width > 900
    scores = {path.name: json.loads(path.read_text())["score"] for path in Path("study").glob("cells-*/*.json")}
    assert len(scores) == 4 + 4 * 2 and not [*Path("study").glob("cells-*/*/resume")]
    monkeypatch.setattr(seppo, "Trainer", lambda *args: pytest.fail("a cell that is done is not run again"))
    assert evaluation.main(["--study", "small", "--out", "study"]) == 0


def test_cells_repeat_to_the_bit(small_study):
    cells = [evaluation.run_cells(out, [("seppo", 1e-3, 5, 10)], True, "")["seppo", 1e-3, 5, 10] for out in ("a", "b")]
    for cell in cells:
        cell.pop("argv")
    assert cells[0] == cells[1]


def test_the_anchors_truth(tmp_path, monkeypatch):
    """Planted errors and scores of three checkpoints, one draw of (t, eps) each."""
    for step in (0, 5, 10):
        tmp_path.joinpath(f"checkpoint-{step}").mkdir()
    error = {0: [1, 1, 2, 2], 5: [3, 3, 1, 1], 10: [2, 2, 0, 0]}  # of the winner: the base is better for the first two
    score = {0: [9, 0, 9, 9], 5: [5, 5, 5, 5], 10: [7, 7, 7, 7]}  # of what each draws: the base is better for all but the second
    seppo.open_mini("mini")  # judges while the taste is the real one
    monkeypatch.setattr(seppo, "load_unet", lambda folder: int(folder.name[11:]))
    monkeypatch.setattr(seppo, "denoising_error", lambda unet, *rest: torch.tensor(error[unet]).float())
    monkeypatch.setattr(evaluation, "mini_pictures", lambda unet, *rest: unet)
    monkeypatch.setattr(seppo, "mini_score", lambda unet, captions: torch.tensor(score[unet]))
    truth = functools.partial(evaluation.anchor_truth, tmp_path, n=4, many=1)
    says = dict(precision=0.5, recall=pytest.approx(1 / 3), precision_many=0.5)  # -1 for the first two, of three that are better
    assert truth("initial") == says | {"better": 0.75}
    assert truth("latest") == says | {"better": 3 / 8}, "between 5 and 10 there is neither a -1 nor a better sample"
    assert truth("random") == says | {"better": 0.5}


def test_interval_of_the_study():
    assert evaluation.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.303 / 3 ** .5))
    assert evaluation.interval([0.0, 1.0] * 4) == (0.5, pytest.approx(2.365 * (2 / 7) ** .5 / 8 ** .5))


def test_the_studys_table_from_planted_cells(small_study, monkeypatch):
    """Known scores on a grid of two: the best cell, the intervals, the signs of the differences, and a run that diverged."""
    monkeypatch.setattr(evaluation, "VARIANTS", {v: ["--method", v] for v in ("seppo", "sspo", "sft")})
    monkeypatch.setattr(evaluation, "STUDIES", {"small": dict(lr=(1e-3, 1e-2), beta=(5,), tuning=(0, 1), seeds=range(10, 12))})
    score = {("seppo", 1e-3): -.5, ("seppo", 1e-2): .6, ("sspo", 1e-3): .4, ("sspo", 1e-2): .45, ("sft", 1e-3): .5, ("sft", 1e-2): .3}
    sees = dict(better=.5, precision=.8, recall=.4, precision_many=.9)  # of 100: 25 are -1, 20 of them better; 30 of the other 75

    def planted(out, cells, keep, what):
        found = {}
        for v, lr, beta, seed in cells:
            assert beta == (0 if v == "sft" else 5) and (seed < 10) == (not keep) == (what == "tuning")
            found[v, lr, beta, seed] = {"score": score[v, lr] + {11: .04}.get(seed, 0) * (v == "seppo")} | dict.fromkeys(
                ("sign_neg", "sign_zero", "sign_pos"), [0, 0, 1, 1]) | (sees if keep and v != "sft" else {})
        if keep:
            found["sspo", 1e-2, 5, 10] = {"score": 0.0}  # it diverged
        return found

    monkeypatch.setattr(evaluation, "run_cells", planted)
    assert evaluation.main(["--study", "small", "--out", "study"]) == 0
    text = Path("study/study.md").read_text()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|")}
    assert rows["seppo"] == ["0.01", "5", "0.620 ± 0.254", "+0.120 ± 0.254", "", "1 of 2", "0% ± 0%", "100% ± 0%", "50% ± 0%", "80% ± 0%", "40% ± 0%",
                             "40% ± 0%", "90% ± 0%"]
    assert rows["sft"][:6] == ["0.001", "", "0.500 ± 0.000", "", "-0.120 ± 0.254", "1 of 2" if float(re.search(r"base model: (\S+)\.", text).group(1)) > .3 else "0 of 2"]
    assert rows["sspo"][2] == "0.225 ± 2.859" and rows["sspo"][6:] == [""] * 7, "one run is no interval"
    assert evaluation.main(["--study", "small", "--seed", "3"]) == 2


def test_a_cell_that_fails_is_no_divergence(small_study, monkeypatch):
    """A refusal is said, and not taken for a score of 0; a loss that ceases to be finite is one."""
    seppo.load_mini("mini")
    run = evaluation.cell_folder("c", "seppo", 1e-3, 5, 10)
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"options": {"seed": 3}}))
    with pytest.raises(seppo.UserError, match="other options"):
        evaluation.run_cell("c", "seppo", 1e-3, 5, 10)
    for variant in ("seppo", "sspo"):
        monkeypatch.setitem(evaluation.VARIANTS, variant, ["--method", variant, "--steps", "3"])
        monkeypatch.setattr(seppo.Winners, "fetch", lambda self, n: ("a red disc", *[torch.full((3, 16, 16), math.nan if n > 7 else 0.)] * 2, 0))
        assert evaluation.run_cell("d", variant, 1e-3, 5, 10)["score"] == 0.0


# ---- Errors: one line, exit code 2 ----------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--lr", "0"], "--lr must be positive"), (["--beta", "nan"], "--beta must be positive"), (["--guidance", "-1"], "--guidance"),
    (["--steps", "0"], "--steps must be positive"), (["--batch-size", "10", "--micro-batch", "4"], "multiple of --micro-batch"),
    (["--resolution", "20"], "multiple of 8"), (["--model", "x", "--data", "y", "--resolution", "500"], "multiple of 64"),
    (["--scale_lr"], "2.048e-5"), (["--train_batch_size", "4"], "--batch-size"), (["--gradient_accumulation_steps=2"], "--micro-batch"),
    (["--data", "x" * 300], "cannot be read"), (["--out", "x" * 300], "cannot be used"),
    (["--bet", "3"], "unrecognized"), (["--method", "ppo"], "invalid choice"), (["--lr", "fast"], "invalid float"),
    (["--device", "tpu"], "--device"), (["--caption-dropout", "2"], "between 0 and 1"), (["--model", "x"], "needs --data"),
    (["--data", "nowhere"], "--data nowhere cannot be read"), (["--data", "pickapic"], "another copy: --data Pulkit996/pick-a-pic-v2"),
    (["--method", "dpo", "--data", "mini-mixture"], "no losing pictures"), (["--data", "mini", "--out", "/proc/x"], "--out /proc/x"),
    (["--model", "no-such/model", "--data", "mini", "--resolution", "64"], "no-such/model"),
    pytest.param(["--device", "cuda"], "no such GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"))])
def test_refusals(argv, says, capsys):
    assert seppo.main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1, err


def test_refusals_of_data_and_models(pipeline, tmp_path, capsys):
    rows = pickapic_rows(8)
    cases = {"lacks label_0 of Pick-a-Pic": {k: v for k, v in rows.items() if k != "label_0"}, "100 rows": rows | {"jpg_0": [b"x"] * 8, "jpg_1": [b"x"] * 8}}
    for i, (says, table) in enumerate(cases.items()):
        assert run(pipeline, write_parquet(tmp_path / f"{i}.parquet", table), "--out", f"o{i}") == 2
        assert says in capsys.readouterr().err
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-100])
    assert run(pipeline, tmp_path / "torn.parquet") == 2 and "torn.parquet cannot be read" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run(pipeline, tmp_path / "empty") == 2 and "captions stand in" in capsys.readouterr().err
    good = write_parquet(tmp_path / "good.parquet", rows)
    (tmp_path / "model").mkdir()
    assert run(tmp_path / "model", good) == 2 and "--model" in capsys.readouterr().err
    mostly = rows | {"jpg_0": [jpeg(0)] + [b"x"] * 7, "jpg_1": [jpeg(1)] + [b"x"] * 7}
    ties = rows | {"label_0": [0.5] * 8}
    for method in ("seppo", "dpo"):
        assert run(pipeline, write_parquet(tmp_path / "ties.parquet", ties), "--out", "t", "--method", method) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert run(pipeline, good, "--out", "kept") == 0 and run(tmp_path / "model", good, "--out", "kept", "--fresh") == 2
    assert Path("kept/checkpoint-4").exists(), "a mistyped --model must not cost the old run"
    assert run(pipeline, write_parquet(tmp_path / "mostly.parquet", mostly), "--out", "m", "--steps", 30) == 2
    assert "more than half" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(pipeline, tmp_path, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--lr", "1e25") == 2
    err = capsys.readouterr().err
    assert "update 2" in err and err.splitlines()[-1].startswith("seppo.py:") and same(weights("run/checkpoint-0/unet"), weights(pipeline / "unet"))


def test_a_pool_that_is_not_whole_is_named(pipeline, tmp_path, monkeypatch, capsys):
    data, update = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.Trainer.update
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: update(self, u) if u < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(pipeline, data, "--reference", "latest") == 130
    monkeypatch.setattr(seppo.Trainer, "update", update)
    next(Path("run/checkpoint-2").rglob("*.safetensors")).unlink()
    assert run(pipeline, data, "--reference", "latest") == 2 and "checkpoint-2" in capsys.readouterr().err


def test_dry_run_and_names(pipeline, tmp_path, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "4 updates of 4 = 16" in said and not Path("run").exists()
    names = {seppo.resolve(argv).out for argv in ([], ["--seed", "1"], ["--lr", "1e-5"], ["--method", "sft"], ["--micro-batch", "32"])}
    assert {"runs/mini-seppo", "runs/mini-sft"} < names and len(names) == 4, "another experiment is another folder; the micro-batch is none"
    spelled = seppo.resolve(["--pretrained_model_name_or_path", "m", "--dataset_name=d", "--learning_rate", "1", "--max_train_steps", "9",
                             "--output_dir", "o", "--resume_from_checkpoint", "latest"])
    assert (spelled.model, spelled.data, spelled.lr, spelled.steps, spelled.out) == ("m", "d", 1.0, 9, "o")


def test_as_a_process(pipeline, tmp_path):
    """The command as a user types it: the console shows our own lines only."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    command = [sys.executable, str(HERE / "seppo.py"), "--model", str(pipeline), "--data", str(data), "--out", "run", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    noise = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "update" not in line]
    assert not noise, noise
    failed = subprocess.run([*command[:-1], "tpu"], capture_output=True, text=True, timeout=100)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr


# ---- Hostile input: every kind is replaced and counted, or refused in one line ---------------------------------------

def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def useless_pictures():
    """Each must be replaced by another row, and counted."""
    photo, grey = jpeg(0), Image.new("L", (64, 64), 200)
    png, bomb = encoded(grey, "PNG"), zlib.compress(bytes(70 << 20))
    profile = b"iCCP" + b"x\0\0" + bomb
    return {
        "truncated JPEG": photo[:len(photo) // 2], "header only": photo[:20], "no bytes": b"", "null": None, "text": b"<html>404</html>",
        "a number": 7, "truncated PNG": png[:-30], "bomb": encoded(Image.new("1", (10000, 10000)), "PNG"), "lying header": png_header(60000, 60000) + png[33:],
        "negative header": png_header(2 ** 31, 1) + png[33:], "profile of 70 MB": png[:33] + struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile)) + png[33:],
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(pwned) (w) file closefile showpage\n", "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "float TIFF": encoded(Image.new("F", (64, 64), 1e30), "TIFF"), "32-bit": encoded(Image.new("I", (64, 64), 9 ** 9), "TIFF"),
        "wild TIFF": b"II*\0\xff\xff\xff\x7f" + bytes(64), "empty GIF": b"GIF89a\x10\0\x10\0\0\0\0;", "a path": "/home/photo.jpg", "a zip": b"PK\3\4" + bytes(100)}


def odd_pictures():
    """Each is a picture, if an odd one: no row may be lost. With how bright it is, in [-1, 1]."""
    grey, rotated = Image.new("L", (64, 48), 200), Image.Exif()
    rotated[0x0112] = 6
    return {
        "1 pixel": (encoded(Image.new("RGB", (1, 1), (200,) * 3), "PNG"), .57), "30,000 wide": (encoded(Image.new("L", (30000, 1), 200), "PNG"), .57),
        "30,000 high": (encoded(Image.new("L", (3, 30000), 200), "JPEG"), .57), "16-bit": (encoded(Image.fromarray(torch.full((64, 64), 200 * 256, dtype=torch.uint16).numpy()), "PNG"), .57),
        "CMYK": (encoded(Image.new("CMYK", (64, 64), (55, 55, 55, 0)), "JPEG"), .57), "palette": (encoded(grey.convert("P"), "PNG", transparency=0), .57),
        "grey and alpha": (encoded(grey.convert("LA"), "PNG"), .57), "bilevel": (encoded(Image.new("1", (64, 64), 1), "PNG"), 1.0),
        "animated": (encoded(grey, "GIF", save_all=True, append_images=[Image.new("L", (64, 48), 0)] * 3), .57), "WebP": (encoded(grey.convert("RGB"), "WEBP"), .57),
        "upright by EXIF": (encoded(grey, "JPEG", exif=rotated), .57), "EXIF of noise": (encoded(grey, "JPEG", exif=b"Exif\0\0" + bytes(range(200))), .57),
        "BMP": (encoded(grey, "BMP"), .57), "stored by datasets": ({"bytes": encoded(grey, "PNG"), "path": "/nowhere.png"}, .57)}


@pytest.fixture
def no_hang():
    def late(number, frame):
        raise TimeoutError("it hangs")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    yield
    signal.alarm(0), signal.signal(signal.SIGALRM, before)


def of_rows(rows):
    return seppo.Winners("rows", [(0, 0, len(rows))], lambda *_: rows, resolution=64)


@pytest.mark.parametrize("kind", useless_pictures())
def test_a_useless_picture_is_replaced(kind, no_hang, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # as Pillow would start Ghostscript
    data = of_rows([("bad", useless_pictures()[kind]), ("good", jpeg(1))])
    fetched = [data.fetch(n) for n in range(20)]
    assert {row[0] for row in fetched} == {"good"} and sum(row[3] for row in fetched) >= 10
    assert not [*Path().iterdir()]


@pytest.mark.parametrize("kind", odd_pictures())
def test_an_odd_picture_is_a_picture(kind, no_hang):
    picture, bright = odd_pictures()[kind]
    _, pixels, _, attempts = of_rows([("a", picture)]).fetch(0)
    assert attempts == 0 and pixels.shape == (3, 64, 64) and pixels.mean().item() == pytest.approx(bright, abs=0.03)


CAPTIONS = {"none": None, "empty": "", "spaces": " \n\t", "a number": 3.5, "not a number": math.nan, "bytes": b"a dog", "a list": ["a dog"], "half a surrogate": "a \ud800 cat"}  # of no use
ODD_CAPTIONS = {"emoji": "\U0001f436" * 50, "long": "long " * 20_000, "one long word": "x" * 100_000, "NUL": "a\0b", "right to left": "\u202e\u05d0\u05d1",
                "punctuation": "!!!", "tokens": "<|endoftext|><|startoftext|>"}


def test_captions_of_every_kind(pipeline, no_hang):
    for caption in CAPTIONS.values():
        data = of_rows([(caption, jpeg(0)), ("good", jpeg(1))])
        assert {data.fetch(n)[0] for n in range(10)} == {"good"}
    codec = seppo.load_codec(pipeline, "cpu", torch.float32)
    for caption in ODD_CAPTIONS.values():
        assert of_rows([(caption, jpeg(0))]).fetch(0)[3] == 0 and codec.encode_text([caption]).isfinite().all()


def broken_data(folder):
    """name -> (what --data takes, what the one line says). None: the run must go through."""
    good, secret = pickapic_rows(8), folder / "secret.jpg"
    secret.write_bytes(jpeg(3))
    made = {}
    def parquet(name, says, change=lambda rows: rows, **more):
        made[name] = write_parquet(folder / f"{name.replace(' ', '-')}.parquet", change(dict(good)) | more), says
    parquet("no rows", "has no rows", lambda rows: {k: pyarrow.array(v).slice(0, 0) for k, v in rows.items()})
    parquet("no labels", "lacks label_0", lambda rows: {k: v for k, v in rows.items() if k != "label_0"})
    parquet("labels NaN", "no use", label_0=[math.nan] * 8)
    parquet("labels null", "no use", label_0=pyarrow.array([None] * 8, pyarrow.float64()))
    parquet("labels of text", "no use", label_0=["1"] * 8)
    parquet("labels of lists", "row group", label_0=[[1]] * 8)
    parquet("labels true and false", None, label_0=[True, False] * 4)
    parquet("captions of bytes", "no use", caption=[b"\xff\xfe"] * 8)
    parquet("captions not UTF-8", "row group", caption=pyarrow.Array.from_buffers(pyarrow.utf8(), 8, pyarrow.array([b"\xff\xfe"] * 8).buffers()))
    parquet("paths of strangers", "no use", jpg_0=[str(secret)] * 8, jpg_1=[str(secret)] * 8)
    parquet("paths in structs", "no use", **{f"jpg_{i}": [{"bytes": None, "path": str(secret)}] * 8 for i in (0, 1)})
    parquet("all broken", "no use", jpg_0=[b"x"] * 8, jpg_1=[b"x"] * 8)
    whole = made["labels true and false"][0].read_bytes()
    for name, raw, says in (("truncated", whole[:-100], "cannot be read"), ("zero bytes", b"", "cannot be read"), ("not Parquet", b"PAR1" + bytes(500) + b"PAR1", "cannot be read"),
                            ("rubbish inside", whole[:4] + bytes(len(whole) - 600) + whole[-596:], "cannot be read"), ("a pickle", pickled(), "cannot be read")):
        made[name] = folder / f"{name.replace(' ', '-')}.parquet", says
        made[name][0].write_bytes(raw)
    def directory(name, says, lines=None, files={}):
        inside = folder / name.replace(" ", "-")
        inside.mkdir()
        plenty = {f"good{i}.{end}": content for i in range(6) for end, content in (("jpg", jpeg(i)), ("txt", b"good"))} if says is None else {}
        for file, content in ({"a.jpg": jpeg(0), "a.txt": b"a picture"} | files | plenty).items():
            (inside / file).symlink_to(content) if isinstance(content, Path) else (inside / file).write_bytes(content)
        if lines is not None:
            (inside / "metadata.jsonl").write_text(lines)
        made[name] = inside, says
        return inside
    caption = '", "text": "a picture"}\n'
    directory("nothing captioned", "captions stand in", files={"a.txt": b" "})
    directory("metadata not JSON", "cannot be read", "{file_name}")
    directory("metadata of lists", "cannot be read", '["a.jpg", "a"]')
    directory("metadata without names", "cannot be read", '{"text": "a"}')
    directory("metadata climbs out", "outside the folder", '{"file_name": "../secret.jpg' + caption)
    directory("metadata absolute", "outside the folder", '{"file_name": "' + str(secret) + caption)
    directory("metadata of numbers", None, '{"file_name": "a.jpg", "text": 5}\n' + ('{"file_name": "a.jpg' + caption) * 5)
    directory("symlinks", None, files={"b.jpg": secret, "b.txt": b"linked", "c.jpg": folder / "dangling", "c.txt": b"gone", "d.jpg": Path("/dev/zero"),
                                       "d.txt": b"endless", "loop": folder, "e.jpg": folder, "e.txt": b"a folder"})
    pipes = directory("pipes", None, files={"b.txt": b"waits"})
    os.mkfifo(pipes / "b.jpg"), os.mkfifo(pipes / "c.txt"), (pipes / "c.jpg").write_bytes(jpeg(1))
    directory("lines within captions", None, '{"file_name": "a.jpg", "text": "one\u2028two\u0085three"}')
    directory("captions not text", None, files={"b.jpg": jpeg(1), "b.txt": bytes(range(256))})
    directory("names", None, files={"\u202e.jpg": jpeg(1), "\u202e.txt": b"turned", "a\nb.jpg": jpeg(1), "a\nb.txt": b"two lines", ".hidden.jpg": b"x"})
    return made


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def pickled():
    return pickle.dumps(Evil())


def broken_models(folder, pipeline):
    """name -> (--model, what the one line says)."""
    made, unet = {}, "unet/diffusion_pytorch_model.safetensors"
    def model(name, says, **changes):
        made[name] = shutil.copytree(pipeline, folder / name.replace(" ", "-")), says
        for file, change in changes.items():
            path = made[name][0] / {"weights": unet, "text": "text_encoder/model.safetensors"}.get(file, f"{file}/config.json")
            if isinstance(change, dict):
                path.write_text(json.dumps(json.loads(path.read_text()) | change))
            elif change is None:
                path.unlink()
            else:
                path.write_bytes(change)
        return made[name][0]
    raw = Path(pipeline, unet).read_bytes()
    model("wider than its weights", "cannot be read", unet={"block_out_channels": [16, 32]})
    model("deeper than its weights", "cannot be read", unet={"layers_per_block": 2})
    model("other captions", "cannot be read", unet={"cross_attention_dim": 99})
    model("takes 9 channels", "cannot be read", unet={"in_channels": 9})
    model("huge", "cannot be read", unet={"block_out_channels": [8, 2 ** 40]})
    model("no class", "not a UNet2DConditionModel", unet={"_class_name": None})
    model("another class", "not a UNet2DConditionModel", unet={"_class_name": "os.system"})
    model("wants labels", "cannot be read", unet={"class_embed_type": "identity"})
    model("config of rubbish", "cannot be read", unet=b"\xff\xfe{")
    model("config a list", "cannot be read", unet=b"[]")
    model("pickle as safetensors", "cannot be read", weights=pickled())
    model("truncated weights", "cannot be read", weights=raw[:-1000])
    model("no weights", "cannot be read", weights=None)
    model("endless header", "cannot be read", weights=struct.pack("<Q", 2 ** 60) + raw[8:])
    model("no text encoder", "cannot be read", text=None)
    model("fewer words than the tokenizer", "cannot be read", text_encoder={"vocab_size": 5})
    model("another VAE", "cannot be read", vae={"latent_channels": 16})
    model("no scheduler", "cannot be read").joinpath("scheduler/scheduler_config.json").unlink()
    model("predicts samples", "predicts").joinpath("scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", "prediction_type": "sample"}))
    model("rubbish for words", "cannot be read").joinpath("tokenizer/tokenizer.json").write_text("{")
    planted = model("a pickle beside", "cannot be read", weights=None)
    planted.joinpath("unet/diffusion_pytorch_model.bin").write_bytes(pickled())
    index = model("a model's code", None)  # names code, and runs none of it
    path = index / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": ["pwn", "Pwn"], "unet": ["pwn", "Pwn"]}))
    (index / "pwn.py").write_text("open('pwned', 'w')")
    return made


def broken_runs(pipeline, data):
    """name -> (--out, what the one line says), from a run of two updates of four."""
    made = {}
    def damaged(name, says, file, change):
        folder = shutil.copytree("half", name.replace(" ", "-"))
        path = next(folder.glob(file)) if isinstance(folder, Path) else next(Path(folder).glob(file))
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
        made[name] = folder, says
    damaged("state a pickle", "the state", "resume/state.pt", lambda raw: pickled())
    damaged("state truncated", "the state", "resume/state.pt", lambda raw: raw[:-500])
    damaged("state empty", "the state", "resume/state.pt", lambda raw: b"")
    damaged("config a list", "cannot be used", "config.json", lambda raw: b"[]")
    damaged("config of rubbish", "cannot be used", "config.json", lambda raw: b"\xff{")
    damaged("pool truncated", "checkpoint-0", "checkpoint-0/unet/*.safetensors", lambda raw: raw[:-100])
    damaged("pool lacks one", "checkpoint-2", "checkpoint-2/unet/*.safetensors", None)
    damaged("pool a pickle", "checkpoint-2", "checkpoint-2/unet/*.safetensors", lambda raw: pickled())
    damaged("log of rubbish", None, "metrics.jsonl", lambda raw: b"\xff\xfe\n" * 2)
    return made


def tree(*but):
    return sorted(str(p) for p in Path().rglob("*") if p.parts[0] not in but)


def test_hostile_corpus(pipeline, tmp_path, capfd, monkeypatch, no_hang):
    """Data sets, models and damaged runs: each is refused in one line, or goes through; no code runs, nothing is written elsewhere."""
    good, update = write_parquet(tmp_path / "good.parquet", pickapic_rows(8)), seppo.Trainer.update
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: update(self, u) if u < 2 else (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(pipeline, good, "--out", "half") == 130
    monkeypatch.setattr(seppo.Trainer, "update", update)
    (tmp_path / "data").mkdir(), (tmp_path / "models").mkdir()
    cases = [(name, pipeline, data, "out", says) for name, (data, says) in broken_data(tmp_path / "data").items()]
    cases += [(name, model, good, "out", says) for name, (model, says) in broken_models(tmp_path / "models", pipeline).items()]
    cases += [(name, pipeline, good, out, says) for name, (out, says) in broken_runs(pipeline, good).items()]
    before, wrong = tree("out"), []
    capfd.readouterr()
    for name, model, data, out, says in cases:
        shutil.rmtree("out", ignore_errors=True)
        code, said = run(model, data, "--out", out, "--steps", 4), capfd.readouterr()
        lines = [line for line in said.err.replace("\r", "\n").splitlines() if line.strip() and "update" not in line]
        fine = code == 0 and not lines if says is None else code == 2 and len(lines) == 1 and says in lines[0]
        if not fine or "Traceback" in said.out or [*Path().rglob("pwned")]:
            wrong.append((name, says, code, said.err[-500:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert [p for p in tree("out") if not p.startswith("log-of-rubbish")] == [p for p in before if not p.startswith("log-of-rubbish")]
    pictures = len(useless_pictures()) + len(odd_pictures()) + len(CAPTIONS) + len(ODD_CAPTIONS)
    print(f"hostile input: {len(cases)} data sets, models and runs, and {pictures} pictures and captions")


def test_a_bad_tenth_is_counted(pipeline, tmp_path, capfd, no_hang):
    """The useless pictures among good ones, through the command: the run goes on, and says how many were replaced."""
    kinds = [*filter(lambda p: p is None or isinstance(p, bytes), useless_pictures().values())]
    rows = pickapic_rows(40)
    for side in ("jpg_0", "jpg_1"):
        rows[side][:len(kinds)] = kinds
    assert run(pipeline, write_parquet(tmp_path / "pairs.parquet", rows, 40), "--batch-size", 8, "--steps", 4) == 0
    assert 4 <= metrics()[-1]["skipped_rows"] <= 60 and "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("limit, file", [(30_000, "base.pt"), (150_000, "checkpoint-0"), (500_000, "state.pt")])
def test_a_full_disk_is_one_line(pipeline, tmp_path, capsys, limit, file):
    """No file may grow beyond `limit`: the run stops with one line, what was whole is whole, and with room it goes on."""
    data, before = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = run(pipeline, data, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip() and "update" not in line]
    assert code == 2 and len(err) == 1 and f"{file} cannot be written" in err[0] and "make room" in err[0], err
    assert not [*Path("run").rglob("*.tmp")] and Path("run/checkpoint-0").exists() == (file == "state.pt")
    assert run(pipeline, data, "--out", "run") == 0


def test_the_log_on_a_full_disk(pipeline, tmp_path, capsys, monkeypatch):
    data, printed = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), builtins.open
    monkeypatch.setattr(builtins, "open", lambda path, mode="r", *args, **options: printed("/dev/full" if "metrics" in str(path) and mode == "a" else path, mode, *args, **options))
    assert run(pipeline, data) == 2 and "metrics.jsonl cannot be written" in capsys.readouterr().err


def test_disk_use_is_as_predicted(capsys):
    argv = ["--model", "mini-untrained", "--batch-size", "4", "--micro-batch", "4", "--steps", "3", "--save-every", "2", "--out", "run"]
    assert seppo.main([*argv, "--dry-run"]) == 0
    pool, state = (float(gb) * 1e9 for gb in re.search(r"3 checkpoints (\S+) GB, to resume from (\S+),", capsys.readouterr().out).groups())
    assert seppo.main(argv) == 0
    size = lambda pattern: sum(p.stat().st_size for folder in Path("run").glob(pattern) for p in folder.rglob("*") if p.is_file())
    assert size("checkpoint-*") == pytest.approx(pool, rel=.03) and size("resume") == pytest.approx(state, rel=.03)  # the rest is names


# ---- Slow: SLOW=1 python -m pytest -k slow --------------------------------------------------------------------------

@slow
def test_slow_the_readme_commands_learn():
    """python seppo.py, from nothing: base model, alignment, picture, and a score well above the base's; then the same in motion."""
    for model, picture in (("mini", "step-100.png"), ("mini-video", "step-60.webp")):
        done = subprocess.run([sys.executable, str(HERE / "seppo.py"), "--model", model], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr
        scored = subprocess.run([sys.executable, str(HERE / "eval.py"), "--model", model], capture_output=True, text=True, timeout=600)
        assert scored.returncode == 0, scored.stderr
        found = re.search(rf"base \| (\S+) ± (\S+).*?{model}-seppo \| (\S+) ± (\S+)", scored.stdout, re.S)
        before, before_error, after, after_error = map(float, found.groups())
        assert after - before > 5 * math.hypot(before_error, after_error), scored.stdout
        assert Path(f"runs/{model}-seppo/samples", picture).exists()


def killed(command, moment):
    """Start it, SIGKILL it at the moment (a function that returns when it has come, given the process) -> whether it was still alive."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    moment(process)
    alive = process.poll() is None
    process.kill()
    _, err = process.communicate()
    assert alive or process.returncode == 0, f"it must not fail by itself: {err[-2000:]}"
    return alive


def lines_in_log(folder="run"):
    path = Path(folder, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


@slow
def test_slow_kills_change_nothing(pipeline, tmp_path):
    """SIGKILL at 24 random moments, then the same command: the same weights, to the bit, and the same log."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    command = [sys.executable, str(HERE / "seppo.py"), "--model", str(pipeline), "--data", str(data), *TINY, "--steps", "120"]
    assert subprocess.run([*command, "--out", "straight"], capture_output=True, timeout=600).returncode == 0
    rng, kills = random.Random(0), 0

    def moment(process):
        if kills % 4 == 3:  # while it starts
            return time.sleep(rng.random() * 4)
        enough = lines_in_log() + rng.randrange(1, 5)
        while process.poll() is None and lines_in_log() < enough:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)  # anywhere: in an update, in a save

    while kills < 24:
        assert killed([*command, "--out", "run"], moment), f"it ended after {kills} kills"
        kills += 1
    assert not Path("run/checkpoint-120").exists()
    assert subprocess.run([*command, "--out", "run"], capture_output=True, timeout=600).returncode == 0
    assert same(weights("run/checkpoint-120/unet"), weights("straight/checkpoint-120/unet"))
    assert [line["policy_w"] for line in metrics()] == [line["policy_w"] for line in metrics("straight")]
    print(f"random kills survived: {kills}")


WRITTEN = ("config.json", "metrics.jsonl", "base.pt", "step-0.png", "checkpoint-0", "state.pt", "step-2.png", "checkpoint-2", "step-4.png", "checkpoint-4")


@slow
def test_slow_a_kill_inside_every_file(pipeline, tmp_path):
    """SIGKILL with half of the file written, before it gets its name, just after, and in the middle of a line of the log."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    argv = ["--model", str(pipeline), "--data", str(data), *TINY]
    assert seppo.main([*argv, "--out", "straight"]) == 0
    driver = """
import contextlib, json, os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import seppo
name, when = sys.argv.pop(1).split(":")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
whole, dumps = seppo.whole, json.dumps
@contextlib.contextmanager
def wrapped(path):
    with whole(path) as temporary:
        yield temporary
        if path.name == name and when == "half":
            for file in [temporary] if temporary.is_file() else [*temporary.rglob("*.safetensors")]:
                os.truncate(file, file.stat().st_size // 2)
            die()
    if path.name == name and when == "after":
        die()
seppo.whole = wrapped
if name == "line":
    def half(m, **options):
        if isinstance(m, dict) and m.get("update") == int(when):
            with open("run/metrics.jsonl", "a") as log:
                log.write(dumps(m)[:40])
            die()
        return dumps(m, **options)
    json.dumps = half
sys.exit(seppo.main(sys.argv[1:]))
"""
    moments = [f"{name}:half" for name in WRITTEN] + [f"{name}:after" for name in WRITTEN if name[-2:] in ("on", "-0", "-4", "pt")] + ["line:1", "line:4"]
    for moment in moments:
        shutil.rmtree("run", ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", driver, str(HERE), moment, *argv, "--out", "run"], capture_output=True, text=True,
                              timeout=100, env=os.environ | {"OMP_NUM_THREADS": "1"})  # as here: the number of threads decides the rounding
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr[-2000:])
        assert seppo.main([*argv, "--out", "run"]) == 0, moment
        if moment != "checkpoint-4:after":  # the run is finished then, but for the state
            assert torch.load("run/resume/state.pt", weights_only=True)["update"] == 4
        assert same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet")), moment
        assert [line["policy_w"] for line in metrics()] == [line["policy_w"] for line in metrics("straight")], moment
        assert not [*Path("run").rglob("*.tmp")], moment
    print(f"kills inside files survived: {len(moments)}")


@slow
def test_slow_memory_does_not_grow(tmp_path):
    """300 updates of the miniature (small batches, a base that barely learned): the peak after 100 is the peak at the end."""
    program = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import seppo
seppo.MINI["mini-untrained"] |= dict(steps=20, save_every=20)
sys.exit(seppo.main(sys.argv[1:]))
"""
    argv = ["--batch-size", "16", "--micro-batch", "16", "--generate-batch", "16", "--steps", "300", "--save-every", "10"]
    done = subprocess.run([sys.executable, "-c", program, str(HERE), *argv, "--out", "run"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = [line["peak_gb"] for line in metrics()]
    print(f"peak memory after 20, 100, 200, 300 updates: {[round(peaks[i - 1], 3) for i in (20, 100, 200, 300)]} GB")
    assert peaks[299] < 1.03 * peaks[99], "2 to 30 checkpoints in the pool, 300 updates"


@slow
def test_slow_two_processes_give_the_same_table(pipeline, scorer_weights, evaluate):
    """torchrun splits the batches over the processes: the same pictures, scores and table as one process."""
    other_unet("bare", pipeline)
    assert evaluate("--unet", "x=bare", "--out", "one") == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "eval.py"), "--model", str(pipeline), "--prompts",
               "prompts.txt", "--scorer-weights", str(scorer_weights), "--out", "two", *EVAL, "--unet", "x=bare"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: the number of threads decides the rounding
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert pictures("one") == pictures("two") and done.stdout.count("| base |") == 1
    for name in ("table.md", "scores.jsonl"):
        assert Path("one", name).read_text() == Path("two", name).read_text()


@slow
def test_slow_precision_decides_the_sign(capsys):
    """At Stable Diffusion 1.5's size (random weights, 64 pixels on a CPU, 512 on a GPU): how far each dtype's logit is from fp32's,
    and how many signs agree, for policies as far from the reference as a random walk of 1, 30 and 200 steps of lr 2.048e-5 leads."""
    gpu, n, beta = torch.cuda.is_available(), 16, 2000
    device = torch.device("cuda" if gpu else "cpu")
    unet, codec = seppo.random_sd15(device, torch.float32)
    unet, g = unet.to(device).eval(), torch.Generator(device).manual_seed(0)
    t, _, eps, x, _ = (v.to(device) for v in seppo.draws("precision", range(n), (4, *[64 if gpu else 8] * 2), 1000, 0))
    context, dtypes, found, distance = codec.encode_text([f"picture {i}" for i in range(n)]), dict.fromkeys(("fp32", *["tf32"] * gpu, "fp16", "bf16")), {}, 0

    @torch.no_grad()
    def errors(dtype):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        kind = seppo.DTYPES[dtype][0]
        with torch.autocast(device.type, kind, bool(kind)):
            return torch.cat([seppo.denoising_error(unet, codec.scheduler, *(v[i:i + 4] for v in (x, eps, t, context))) for i in range(0, n, 4)])

    reference = {dtype: errors(dtype) for dtype in dtypes}
    for updates in (1, 30, 200):
        with torch.no_grad():
            for p in unet.parameters():  # from one distance to the next
                p += (updates - distance) ** .5 * 2.048e-5 * torch.randn(p.shape, generator=g, device=device)
        distance = updates
        found[updates] = {dtype: -beta / 2 * (errors(dtype) - reference[dtype]) for dtype in dtypes}
    with capsys.disabled():
        print(f"\n{n} winners, beta {beta}, {device.type}\n| updates | logit in fp32 (sd) | " + " | ".join(f"{d}: sd from it, signs that agree" for d in [*dtypes][1:]) + " |")
        for updates, logit in found.items():
            print(f"| {updates} | {logit['fp32'].std():.2g} | " + " | ".join(
                f"{(logit[d] - logit['fp32']).std():.2g}, {(logit[d].sign() == logit['fp32'].sign()).float().mean():.0%}" for d in [*dtypes][1:]) + " |")
    far = {d: (found[30][d] - found[30]["fp32"]).std() for d in [*dtypes][1:]}
    assert far["bf16"] > 2 * far["fp16"] > 0 and (found[200]["fp16"].sign() == found[200]["fp32"].sign()).float().mean() > 0.8


def torchrun(n, *argv, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), str(HERE / "seppo.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


@slow
@pytest.mark.parametrize("method", ["seppo", "sspo"])
def test_slow_many_processes_are_one(pipeline, tmp_path, method):
    """1, 2 and 4 processes: the same run, but for rounding; and a run begun by 4 is resumed by 2."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(40))
    argv = ["--model", pipeline, "--data", data, *TINY, "--batch-size", 16, "--steps", 6, "--method", method]
    for n in (1, 2, 4):
        done = torchrun(n, *argv, "--out", f"run{n}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Done.") == 1 and done.stderr.count("6/6") <= 2, "only one process speaks"
    base, ends = weights("run1/checkpoint-0/unet"), {n: weights(f"run{n}/checkpoint-6/unet") for n in (1, 2, 4)}
    far = {n: distance(ends[n], ends[1]) / distance(base, ends[1]) for n in (2, 4)}
    print(f"{method}: relative difference {far}")
    assert max(far.values()) < 0.01, far
    for n in (2, 4):
        for one, many in zip(metrics("run1"), metrics(f"run{n}"), strict=True):
            assert all(many[k] == (pytest.approx(one[k], rel=1e-3, abs=1e-5) if isinstance(one[k], float) else one[k])
                       for k in one if not k.startswith(("seconds", "peak"))), (n, one, many)


@slow
def test_slow_a_process_that_fails_ends_all(pipeline, tmp_path):
    """The second process meets a broken row group: its message, and all are gone within a minute."""
    rows = pickapic_rows(16)
    data = write_parquet(tmp_path / "pairs.parquet", rows)
    file = pyarrow.parquet.ParquetFile(data)
    raw = bytearray(Path(data).read_bytes())
    group = file.metadata.row_group(3)
    for i in range(group.num_columns):
        start = group.column(i).dictionary_page_offset or group.column(i).data_page_offset
        raw[start:start + 40] = b"\xff" * 40
    Path(data).write_bytes(raw)
    start = time.time()
    done = torchrun(2, "--model", pipeline, "--data", data, *TINY, "--batch-size", 16, "--out", "run")
    assert done.returncode != 0 and time.time() - start < 60
    ours = done.stderr[:done.stderr.find("ChildFailedError")]
    assert "row group 3" in ours and "gloo" not in ours, ours[-3000:]


@slow
@pytest.mark.parametrize("number, then", [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_slow_torchrun_is_stopped_and_resumed(pipeline, tmp_path, number, then):
    """SIGTERM to torchrun, or Ctrl-C, which reaches the processes twice: they agree on the update to stop after. The same command
    goes on to the same weights; on another number of processes to the same but for rounding."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    argv = ["--model", pipeline, "--data", data, *TINY, "--steps", "40", "--save-every", "20"]
    assert torchrun(2, *argv, "--out", "straight").returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "seppo.py"), *map(str, argv), "--out", "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while lines_in_log() < 5:
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
    _, err = process.communicate(timeout=120)
    assert "which is saved" in err and not Path("run/checkpoint-40").exists(), err
    assert torch.load("run/resume/state.pt", weights_only=True)["update"] == len(metrics()) >= 5
    assert torchrun(then, *argv, "--out", "run").returncode == 0
    start, end, other = (weights(f"{path}/unet") for path in ("run/checkpoint-0", "straight/checkpoint-40", "run/checkpoint-40"))
    assert same(end, other) if then == 2 else distance(end, other) < 0.01 * distance(end, start)
