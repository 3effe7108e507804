"""python -m pytest: offline, on a CPU, in under two minutes. SLOW=1 adds the long ones."""
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import (AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline,
                       UNet2DConditionModel)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import seppo

HERE = Path(__file__).parent


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
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(pipeline, data, *more):
    return seppo.main(["--model", str(pipeline), "--data", str(data), "--out", "run", *TINY, *map(str, more)])


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


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
    assert {"sspo": last["sign_neg"] == 0, "spin": last["sign_pos"] == 1 and last["reference"] == 1,
            "dpo": last["sign_pos"] == 1 and last["reference"] == 0, "sft": last["loss"] == last["policy_w"] and last["policy_r"] is None}[method]


def test_micro_batch_does_not_change_an_update(pipeline, tmp_path):
    data, results = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), []
    for i, (micro, generate) in enumerate(((4, 4), (1, 4), (2, 3))):
        assert run(pipeline, data, "--micro-batch", micro, "--generate-batch", generate, "--steps", 2, "--out", f"run{i}") == 0
        results.append(weights(f"run{i}/checkpoint-2/unet"))
    base = weights("run0/checkpoint-0/unet")
    norm = lambda a, b: math.sqrt(sum((a[k] - b[k]).square().sum().item() for k in a))
    for other in results[1:]:
        assert norm(results[0], other) < 0.01 * norm(results[0], base), "the gradient depends on the micro-batch"


def test_resume_is_bit_equal(pipeline, tmp_path, monkeypatch):
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--out", "straight") == 0
    update = seppo.Trainer.update
    monkeypatch.setattr(seppo.Trainer, "update", lambda self, u: update(self, u) if u < 3 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, data)
    assert len(metrics()) == 3 and not Path("run/checkpoint-4").exists()
    monkeypatch.setattr(seppo.Trainer, "update", update)
    assert run(pipeline, data) == 0
    assert same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
    drop = lambda lines: [{k: v for k, v in line.items() if not k.startswith(("seconds", "peak"))} for line in lines]
    assert drop(metrics()) == drop(metrics("straight")), "the resumed log must read as if nothing had happened"


def test_fp16_overflow_is_redone(pipeline, tmp_path, monkeypatch):
    """fp16 autocast with loss scaling: an overflowing scale is lowered and the update redone, with the same draws."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    assert run(pipeline, data, "--dtype", "fp16") == 0
    scaler, calls, gradients = torch.amp.GradScaler, [], seppo.Trainer.gradients
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0 ** 40, enabled=enabled))
    monkeypatch.setattr(seppo.Trainer, "gradients", lambda self, u: calls.append(u) or gradients(self, u))
    assert run(pipeline, data, "--dtype", "fp16", "--out", "high") == 0
    assert calls.count(0) > 1 and metrics("high")[0]["loss"] == metrics("run")[0]["loss"]
    assert metrics("high")[-1]["policy_w"] == pytest.approx(metrics("run")[-1]["policy_w"], rel=0.05)


def test_numeric_path_is_checked(pipeline, tmp_path, monkeypatch, capsys):
    data, error = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8)), seppo.denoising_error
    monkeypatch.setattr(seppo, "denoising_error", lambda unet, *args: error(unet, *args) * (1 + 1e-6 * (not torch.is_grad_enabled())))
    assert run(pipeline, data) == 2 and "one numeric path" in capsys.readouterr().err


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


# ---- Errors: one line, exit code 2 ----------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, says", [
    (["--lr", "0"], "--lr must be positive"), (["--beta", "nan"], "--beta must be positive"), (["--guidance", "-1"], "--guidance"),
    (["--steps", "0"], "--steps must be positive"), (["--batch-size", "10", "--micro-batch", "4"], "multiple of --micro-batch"),
    (["--resolution", "20"], "multiple of 8"), (["--model", "x", "--data", "y", "--resolution", "500"], "multiple of 64"),
    (["--scale_lr"], "2.048e-5"), (["--train_batch_size", "4"], "--batch-size"), (["--gradient_accumulation_steps=2"], "--micro-batch"),
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
    with pytest.raises(KeyboardInterrupt):
        run(pipeline, data, "--reference", "latest")
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


# ---- Slow: SLOW=1 python -m pytest -k slow --------------------------------------------------------------------------

slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="minutes: SLOW=1 runs it")


@slow
def test_slow_the_readme_command_learns():
    """python seppo.py, from nothing: base model, alignment, picture, and a score well above the base's."""
    done = subprocess.run([sys.executable, str(HERE / "seppo.py")], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    before, before_error, after, after_error = map(float, re.search(r"Score (\S+) \+- (\S+) before, (\S+) \+- (\S+) after", done.stdout).groups())
    assert after - before > 5 * math.hypot(before_error, after_error), done.stdout
    assert Path("runs/mini-seppo/samples/step-100.png").exists()


@slow
def test_slow_kills_change_nothing(pipeline, tmp_path):
    """SIGKILL at random moments, then the same command: the same weights, to the bit, and the same log."""
    data = write_parquet(tmp_path / "pairs.parquet", pickapic_rows(8))
    command = [sys.executable, str(HERE / "seppo.py"), "--model", str(pipeline), "--data", str(data), *TINY, "--steps", "60"]
    assert subprocess.run([*command, "--out", "straight"], capture_output=True, timeout=600).returncode == 0
    rng, kills = random.Random(0), 0
    while not Path("run/checkpoint-60").exists() and kills < 20:
        process = subprocess.Popen([*command, "--out", "run"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        start = len(metrics()) if Path("run/metrics.jsonl").exists() else 0
        enough = start + rng.randrange(5, 25)
        while process.poll() is None and (not Path("run/metrics.jsonl").exists() or len(Path("run/metrics.jsonl").read_text().splitlines()) < enough):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)  # anywhere: in an update, in a save
        assert process.poll() in (None, 0), "it must not fail by itself"
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert subprocess.run([*command, "--out", "run"], capture_output=True, timeout=600).returncode == 0
    assert kills >= 2 and same(weights("run/checkpoint-60/unet"), weights("straight/checkpoint-60/unet")), f"{kills} kills"
    assert [line["policy_w"] for line in metrics()] == [line["policy_w"] for line in metrics("straight")]
