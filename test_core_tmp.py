"""python -m pytest: offline, on a CPU, in under two minutes. SLOW=1 adds kills and many processes."""

import argparse
import ast
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: nothing here may look for a hub

import av
import diffusers
import fsspec
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    MotionAdapter,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import seppo

HERE = Path(__file__).parent
slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="minutes: SLOW=1 runs it")
torch.set_num_threads(1)  # the nets are tiny: more threads wait for each other
LEVELS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


# ---- Small things in the real layouts -------------------------------------------------------------------------------


def jpeg(seed, side=64):
    """A small photograph-like JPEG: smooth colour noise."""
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise[None], (side, side), mode="bicubic")[0].clamp(0, 1)
    return encoded(Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()), "JPEG")


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pickapic_rows(n, first=0):
    """Rows with Pick-a-Pic's columns: every fifth is a tie, labels alternate otherwise."""
    several = range(first, first + n)
    labels = [0.5 if i % 5 == 4 else float(i % 2) for i in several]
    pictures = {f"jpg_{side}": [jpeg(2 * i + side) for i in several] for side in (0, 1)}
    labels = {"label_0": labels, "label_1": [1 - x for x in labels], "has_label": [True] * n}
    return {"caption": [f"picture {i}" for i in several]} | pictures | labels


def write_parquet(path, rows, group=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=group)
    return path


def save_pipeline(folder, **unet):
    """A tiny Stable Diffusion 1.x, saved by diffusers: the layout of the real one, 64-pixel pictures, 0.2 M weights."""
    torch.manual_seed(0)
    letters = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789,." for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    folder.joinpath("vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    folder.joinpath("merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    size |= dict(vocab_size=len(words), max_position_embeddings=77, bos_token_id=0, eos_token_id=1)
    blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=4)
    blocks |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, layers_per_block=1)
    vae = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae |= dict(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, sample_size=64)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**size)),
        tokenizer=CLIPTokenizer(*files, unk_token="<|endoftext|>", model_max_length=77),
        unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), **blocks, **unet),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **LEVELS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("tiny-sd"))


MOTION = dict(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4)
MOTION |= dict(motion_num_attention_heads=2, motion_max_seq_length=8, use_motion_mid_block=False)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """A tiny AnimateDiff motion adapter, saved by diffusers, for the tiny Stable Diffusion."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny-motion")
    MotionAdapter(**MOTION).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ goes there


@pytest.fixture
def pairs(tmp_path):
    return write_parquet(tmp_path / "pairs.parquet", pickapic_rows(10))


TINY = "--resolution 64 --batch-size 4 --micro-batch 2 --generate-batch 4 --steps 4 --save-every 2 --sampler-steps 2"
TINY = [*TINY.split(), "--lr", "1e-3", "--device", "cpu"]


def run(pipeline, data, *more):
    return seppo.main(["--model", str(pipeline), "--data", str(data), "--out", "run", *TINY, *map(str, more)])


def options(data, *more):
    """The options of a run on this data, for what reads it."""
    return seppo.parse_args(["--model", "x", "--data", str(data), "--resolution", "64", *map(str, more)])


def rows_of(data, n, *more):
    """The first n rows: (position, caption, winner, loser, replaced) each."""
    winners = seppo.open_data(options(data, *more))
    return [winners[i] for i in range(n)]


def metrics(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def without_clocks(lines):
    clocks = {"seconds", "winners_per_second", "peak_gb"}
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def load(folder):
    return UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)


def weights(folder):
    return load(folder).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


def stopped_after(updates, monkeypatch):
    """Ctrl-C within the update that follows."""
    step = seppo.Trainer.step
    monkeypatch.setattr(seppo.Trainer, "step", lambda self, u: step(self, u) if u < updates else interrupt())


def interrupt():
    raise KeyboardInterrupt


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


@pytest.mark.parametrize("flip", ["sign", "indicator", "none"])
def test_objective_equals_a_plain_rewrite(flip):
    errors = four_errors()
    losses, _ = seppo.seppo_loss(*errors, 2000.0, flip)
    torch.testing.assert_close(losses, by_hand(*errors, 2000.0, flip), rtol=1e-12, atol=1e-15)
    single = seppo.seppo_loss(*(e.float() for e in errors), 2000.0, flip)[0]
    assert single.dtype == torch.float32, "the loss must stay in the dtype of the errors"
    with pytest.raises(ValueError, match="flip"):
        seppo.seppo_loss(*errors, flip="flop")


def test_sign_table():
    policy_w, reference_w = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])  # better, equal, worse
    for flip, signs in {"sign": [1, 0, -1], "indicator": [1, 0, 0], "none": [1, 1, 1]}.items():
        _, details = seppo.seppo_loss(policy_w, reference_w, policy_w, reference_w, flip=flip)
        assert details["sign"].tolist() == signs, flip
    given = torch.tensor([0.0, 1.0, 0.0])
    _, details = seppo.seppo_loss(policy_w, reference_w, policy_w, reference_w, flip="indicator", sign=given)
    assert torch.equal(details["sign"], given), "what the anchor said earlier counts"
    assert details["reward_w"].tolist() == [1000, 0, -1000]


@pytest.mark.parametrize("sign, pull_w, pull_r", [(1, 1, -1), (-1, 1, 1), (0, 1, 0)])
def test_gradient_directions(sign, pull_w, pull_r):
    """Whatever the sign, the winner's error falls; the reference sample's rises (+1), falls (-1) or stays (0)."""
    policy = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2 + 0.01 * sign, 0.25], dtype=torch.float64)
    loss, details = seppo.seppo_loss(policy[:1], reference[:1], policy[1:], reference[1:], beta=3.0)
    loss.sum().backward()
    assert details["sign"].item() == sign and policy.grad.sign().tolist() == [pull_w, pull_r]
    assert loss.item() == pytest.approx(math.log(2), abs=0.1)
    assert not any(value.requires_grad for value in details.values())


def test_presets():
    """The rows of the table, and that no option of its own is needed to turn one switch."""
    rows = {name: tuple(row.values()) for name, row in seppo.METHODS.items()}
    assert rows == {
        "seppo": ("generated", "random", "sign"),
        "sspo": ("generated", "random", "indicator"),
        "spin": ("generated", "latest", "none"),
        "ditto": ("generated", "initial", "none"),
        "dpo": ("data", "initial", "none"),
        "sft": ("none", "initial", "none"),
    }
    o = seppo.parse_args(["--method", "spin", "--flip", "sign"])
    assert (o.loser, o.reference, o.flip) == ("generated", "latest", "sign")


def test_reference_rule():
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 7):
        drawn = torch.tensor([seppo.choose_reference(k, "random", g) for _ in range(7000)]).bincount(minlength=k)
        assert len(drawn) == k, "an index outside 0..k-1 is a checkpoint of the future"
        chi2 = ((drawn - 7000 / k).square() / (7000 / k)).sum()
        assert chi2 < 30, f"not uniform over {k}: {drawn.tolist()}"  # 99.99 % quantile for 6 degrees of freedom: 27.9
        assert seppo.choose_reference(k, "latest") == k - 1 and seppo.choose_reference(k, "initial") == 0
    for k, rule in ((0, "random"), (3, "newest")):
        with pytest.raises(ValueError):
            seppo.choose_reference(k, rule)


# ---- Noising, errors, the sampler, draws ----------------------------------------------------------------------------


class Net(torch.nn.Module):
    """Predicts what a function of (x_t, t, context) says."""

    def __init__(self, says):
        super().__init__()
        self.says, self.one = says, torch.nn.Parameter(torch.ones(()))

    def forward(self, x, t, encoder_hidden_states):
        return type("Output", (), {"sample": self.says(x, t, encoder_hidden_states)})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_error(kind):
    scheduler, g, seen = DDPMScheduler(prediction_type=kind, **LEVELS), torch.Generator().manual_seed(0), []
    x, eps = torch.randn(2, 5, 4, 8, 8, generator=g)
    t = torch.tensor([0, 1, 500, 998, 999])
    net = Net(lambda x_t, *_: seen.append(x_t) or torch.full_like(x_t, 0.5))
    m = seppo.denoising_error(net, scheduler, x, eps, t, torch.zeros(5, 1, 1))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)[t][:, None, None, None]
    torch.testing.assert_close(seen[0].double(), abar.sqrt() * x + (1 - abar).sqrt() * eps, rtol=1e-4, atol=1e-5)
    target = eps if kind == "epsilon" else abar.sqrt() * eps - (1 - abar).sqrt() * x
    torch.testing.assert_close(m.double(), (0.5 - target.double()).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", seppo.SOLVERS)
def test_sampler_reaches_the_point_that_guidance_asks_for(solver):
    """The exact net for data that is one point a caption: eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)."""
    scheduler = DDPMScheduler(**LEVELS)  # which would clip
    abar = scheduler.alphas_cumprod
    point = lambda context: context.mean((1, 2))[:, None, None, None]
    net = Net(lambda x, t, context: (x - abar[t].sqrt() * point(context)) / (1 - abar[t]).sqrt())
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    points, empty = torch.tensor([2.5, -0.5, 0.2]), torch.full((1, 2, 6), 0.1)
    for guidance in (1.0, 3.0):
        context = points[:, None, None].expand(3, 2, 6)
        x = seppo.sample(net, scheduler, noise, context, empty, solver, 30, guidance)
        wanted = 0.1 + guidance * (points - 0.1)
        assert (x.mean((1, 2, 3)) - wanted).abs().max() < 0.05, f"{solver} with guidance {guidance}"
        assert x.dtype == torch.float32


def test_draws_depend_on_the_position_alone():
    drawn = seppo.draws(0, range(8), (4, 8, 8), 1000, 0.5)
    halves = seppo.draws(0, range(3), (4, 8, 8), 1000, 0.5), seppo.draws(0, range(3, 8), (4, 8, 8), 1000, 0.5)
    assert all(torch.equal(a, torch.cat(pair)) for a, pair in zip(drawn, zip(*halves)))
    assert not torch.equal(drawn[2], seppo.draws(1, range(8), (4, 8, 8), 1000, 0.5)[2]), "the seed must matter"
    t, dropped, eps, *_ = seppo.draws(0, range(4000), (1,), 1000, 0.2)
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 20
    assert abs(dropped.float().mean() - 0.2) < 0.03 and abs(eps.std() - 1) < 0.05


# ---- The data -------------------------------------------------------------------------------------------------------


def test_parquet_order_ties_and_broken_rows(tmp_path):
    rows = pickapic_rows(20)
    rows["jpg_0"][0] = rows["jpg_1"][0] = b"not a picture"
    rows["jpg_0"][2], rows["jpg_1"][2] = rows["jpg_0"][2][:200], rows["jpg_1"][2][:200]
    rows["caption"][3] = None
    rows["label_0"][6] = float("nan")
    for i, part in enumerate((slice(0, 12), slice(12, 20))):
        write_parquet(tmp_path / "data" / f"train-{i}.parquet", {k: v[part] for k, v in rows.items()})
    write_parquet(tmp_path / "data" / "validation-0.parquet", pickapic_rows(4, 100))
    fetched = rows_of(tmp_path / "data", 40, "--method", "dpo")
    captions = [caption for _, caption, *_ in fetched]
    usable = {f"picture {i}" for i in range(20) if i % 5 != 4} - {f"picture {i}" for i in (0, 2, 3, 6)}
    assert {*captions} == usable, "ties, broken rows and other splits never come, all others come"
    assert {*captions[:20]} == usable and captions[:20] != captions[20:], "each epoch has its own order"
    assert sum(replaced for *_, replaced in fetched) >= 8, "four broken rows an epoch are replaced and counted"
    o = options("y")
    for _, caption, winner, loser, _ in fetched:  # the winner is the picture with label 1
        i = int(caption.split()[1])
        sides = (0, 1) if rows["label_0"][i] == 1 else (1, 0)
        liked, other = (seppo.to_pixels(rows[f"jpg_{side}"][i], o) for side in sides)
        alike = [torch.equal(winner, turn(liked)) and torch.equal(loser, turn(other)) for turn in (same_way, mirrored)]
        assert any(alike), "both are turned, or none"
    turned = [seppo.to_pixels(rows["jpg_1"][1], o, flip) for flip in (False, True)]
    assert torch.equal(turned[1], mirrored(turned[0]))
    again = rows_of(tmp_path / "data", 8, "--method", "dpo")
    assert again[7][1] == captions[7] and torch.equal(again[7][2], fetched[7][2]), "position n is always the same row"
    assert [row[1] for row in rows_of(tmp_path / "data", 20, "--seed", "1")] != captions[:20]


def same_way(pixels):
    return pixels


def mirrored(pixels):
    return pixels.flip(-1)


def test_only_the_row_groups_asked_for_are_read():
    read = []
    groups = [(10, lambda g=g: read.append(g) or [(f"{g} {i}", None, None) for i in range(10)]) for g in range(12)]
    data = seppo.Winners(options("y"), "y", groups)
    first = [data.row(n)[0] for n in range(10)]
    assert len(read) == 1 and len({*first}) == 10
    assert sorted(data.row(n)[0] for n in range(120)) == sorted(f"{g} {i}" for g in range(12) for i in range(10))
    few = seppo.Winners(options("y", "--max-winners", 25), "y", groups)
    taken = {few.row(n)[0] for n in range(100)}
    assert few.total == 25 and taken == {f"{g} {i}" for g in range(3) for i in range(10) if 10 * g + i < 25}


class Remote(fsspec.AbstractFileSystem):
    """In the place of HfFileSystem: datasets/ID@REVISION/FILE, read in ranges, which are counted."""

    read, cachable = 0, False

    def local(self, path):
        assert path.startswith("datasets/me/pairs@abc/")
        return Path("hub", path.removeprefix("datasets/me/pairs@abc/"))

    def info(self, path, **_):
        return {"name": path, "type": "file", "size": self.local(path).stat().st_size}

    def _open(self, path, mode="rb", **options):
        return RemoteFile(self, path, mode, block_size=self.storage_options["block_size"])


class RemoteFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        Remote.read += end - start
        return self.fs.local(self.path).read_bytes()[start:end]


def test_the_hub_is_read_by_row_groups(tmp_path, monkeypatch):
    rows = pickapic_rows(40)
    rows |= {f"jpg_{side}": [encoded(Image.effect_noise((256, 256), 99), "PNG") for _ in range(40)] for side in (0, 1)}
    for split in ("train", "test"):
        write_parquet(tmp_path / "hub" / "data" / f"{split}-0.parquet", rows)
    files = [argparse.Namespace(rfilename=f"data/{split}-0.parquet") for split in ("test", "train")]
    info = argparse.Namespace(sha="abc", siblings=[*files, argparse.Namespace(rfilename="README.md")])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: argparse.Namespace(dataset_info=lambda *_, **__: info))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Remote)
    data = seppo.open_data(options("me/pairs"))
    assert data.total == 40 and data.source == "me/pairs@abc"
    assert len({data[n][1] for n in range(4)}) > 1
    size = (tmp_path / "hub" / "data" / "train-0.parquet").stat().st_size
    assert 0.1 * size < Remote.read < 0.3 * size, "a row group of ten, and the footer"
    info.siblings = files[:1] * 2
    with pytest.raises(seppo.UserError, match="no split named train"):
        seppo.open_data(options("me/pairs"))


def test_picture_folders(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, 80 + i))
        (tmp_path / f"{i}.txt").write_text(f"caption {i}\n", "utf-8")
    (tmp_path / "uncaptioned.jpg").write_bytes(jpeg(9))
    (tmp_path / "._0.jpg").write_bytes(b"Mac OS X")
    assert {row[1].strip() for row in rows_of(tmp_path, 8)} == {f"caption {i}" for i in range(3)}
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": f"line {i}"}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert {row[1] for row in rows_of(tmp_path, 3)} == {f"line {i}" for i in range(3)}


def useless_pictures():
    """Each must be replaced by another row, and counted."""
    photo, png = jpeg(0), encoded(Image.new("L", (64, 64), 200), "PNG")
    return {
        "truncated JPEG": photo[: len(photo) // 2],
        "no bytes": b"",
        "null": None,
        "text": b"<html>404</html>",
        "a number": 7,
        "truncated PNG": png[:-30],
        "bomb": encoded(Image.new("1", (10000, 10000)), "PNG"),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(pwned) (w) file closefile showpage\n",
        "float TIFF": encoded(Image.new("F", (64, 64), 1e30), "TIFF"),
        "a path": str(HERE / "assets" / "mini.png"),
        "a pipe": Path("pipe"),
        "half a JPEG's header": photo[:20],
    }


def odd_pictures():
    """Each is a picture, if an odd one: no row may be lost. With how bright it is, in [-1, 1]."""
    grey, rotated = Image.new("L", (64, 48), 200), Image.Exif()
    rotated[0x0112] = 6
    deep = Image.fromarray(torch.full((64, 64), 200 * 256, dtype=torch.uint16).numpy())
    return {
        "1 pixel": (encoded(Image.new("RGB", (1, 1), (200,) * 3), "PNG"), 0.57),
        "30,000 wide": (encoded(Image.new("L", (30000, 1), 200), "PNG"), 0.57),
        "16-bit": (encoded(deep, "PNG"), 0.57),
        "CMYK": (encoded(Image.new("CMYK", (64, 64), (55, 55, 55, 0)), "JPEG"), 0.57),
        "bilevel": (encoded(Image.new("1", (64, 64), 1), "PNG"), 1.0),
        "animated": (encoded(grey, "GIF", save_all=True, append_images=[Image.new("L", (64, 48), 0)] * 3), 0.57),
        "WebP": (encoded(grey.convert("RGB"), "WEBP"), 0.57),
        "upright by EXIF": (encoded(grey, "JPEG", exif=rotated), 0.57),
        "stored by datasets": ({"bytes": encoded(grey, "PNG"), "path": "/nowhere.png"}, 0.57),
    }


def winners_of(*rows):
    return seppo.Winners(options("y"), "y", [(len(rows), lambda: rows)])


@pytest.mark.parametrize("kind", useless_pictures())
def test_a_useless_picture_is_replaced(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # as Pillow would start Ghostscript
    os.mkfifo("pipe")
    data = winners_of(("bad", useless_pictures()[kind], None), ("good", jpeg(1), None))
    fetched = [data[n] for n in range(20)]
    assert {row[1] for row in fetched} == {"good"} and sum(row[-1] for row in fetched) >= 10


@pytest.mark.parametrize("kind", odd_pictures())
def test_an_odd_picture_is_a_picture(kind):
    picture, bright = odd_pictures()[kind]
    _, _, pixels, _, replaced = winners_of(("a", picture, None))[0]
    assert replaced == 0 and pixels.shape == (3, 64, 64) and pixels.mean().item() == pytest.approx(bright, abs=0.03)


def test_pixels_and_captions(pipeline):
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    wide.paste((0, 0, 255), (50, 0, 150, 100))  # the centre square is blue
    pixels = seppo.to_pixels(encoded(wide, "PNG"), options("y"))
    assert pixels.shape == (3, 64, 64) and pixels[2].mean() > 0.95 and pixels[0].mean() < -0.95
    for caption in (None, "", " \n\t", 3.5, math.nan, b"a dog", ["a dog"], "a \ud800 cat"):
        data = winners_of((caption, jpeg(0), None), ("good", jpeg(1), None))
        assert {data[n][1] for n in range(10)} == {"good"}, f"{caption!r} is of no use"
    _, codec = seppo.load_models(seppo.parse_args(["--model", str(pipeline), "--data", "y", "--device", "cpu"]))
    for caption in ("\U0001f436" * 50, "long " * 20_000, "a\0b", "\u202e\u05d0\u05d1", "!!!", "<|endoftext|>"):
        assert winners_of((caption, jpeg(0), None))[0][-1] == 0 and codec.encode_text([caption]).isfinite().all()


# ---- The command on a tiny Stable Diffusion -------------------------------------------------------------------------

LOGGED = """update loss logit policy_w reference_w policy_r reference_r sign_pos sign_neg sign_zero implicit_acc reference
    grad_norm lr seconds winners_per_second peak_gb skipped_rows skipped_updates""".split()


def test_command_end_to_end(pipeline, tmp_path, capsys):
    rows = pickapic_rows(10)
    rows["jpg_0"][1] = rows["jpg_1"][1] = b"broken"
    data = write_parquet(tmp_path / "pairs.parquet", rows)
    assert run(pipeline, data) == 0
    said, out, lines = capsys.readouterr(), Path("run"), metrics()
    assert "16 winners: 1.6 epochs of 10 rows" in said.out and "lr 0.001" in said.out, "the plan"
    assert "16/16" in said.err and "winner/s" in said.err, "the bar counts winners"
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert {*LOGGED} == {*lines[0]} and None not in lines[0].values()
    assert lines[0]["sign_zero"] == 1.0 and lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[1]["sign_zero"] == 0 and lines[-1]["skipped_rows"] > 0 == lines[-1]["skipped_updates"]
    files = {"config.json", "metrics.jsonl", "samples", "resume.safetensors"}
    assert {p.name for p in out.iterdir()} == files | {f"checkpoint-{n}" for n in (0, 2, 4)}
    base, last = (Image.open(out / "samples" / f"step-{n}.png") for n in (0, 4))
    assert last.height == 2 * base.height and last.crop((0, 0, *base.size)).tobytes() == base.tobytes()
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["lr"] == 1e-3 and config["versions"]["torch"] == torch.__version__
    assert same(weights(out / "checkpoint-0" / "unet"), weights(pipeline / "unet"))
    pipe = says_how_to_load(said.out)
    assert same(pipe.unet.state_dict(), weights("run/checkpoint-4/unet"))
    assert not same(pipe.unet.state_dict(), weights(pipeline / "unet")), "it must have learned something"
    assert pipe("a picture", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert run(pipeline, data) == 0 and without_clocks(metrics()) == without_clocks(lines), "finished stays finished"
    assert run(pipeline, data, "--seed", 1) == 2 and "seed was 0, is 1" in capsys.readouterr().err


def says_how_to_load(out):
    """The run's last lines, as a program -> its `pipe`."""
    names = {}
    exec("\n".join(line.strip() for line in out[out.index("To load it:") :].splitlines()[1:]), names)
    names["pipe"].set_progress_bar_config(disable=True)
    return names["pipe"]


def cut_out(*names):
    """These functions and constants alone, cut out of the file, as a notebook would have them."""
    tree = ast.parse((HERE / "seppo.py").read_text())
    named = lambda n: [n.name] if hasattr(n, "name") else [t.id for t in getattr(n, "targets", []) if hasattr(t, "id")]
    found = [node for node in tree.body if {*named(node)} & {*names}]
    assert len(found) == len(names) and found[0].lineno < 80 and found[-1].end_lineno < 400
    space = {"torch": torch, "F": torch.nn.functional, "diffusers": diffusers}
    exec(compile(ast.Module(found, []), "seppo.py", "exec"), space)
    return argparse.Namespace(**space)


CUT = "seppo_loss choose_reference predict denoising_error batch_loss SOLVERS sample".split()


@pytest.mark.parametrize(
    "argv",
    [
        "--method seppo --solver ddim --guidance 1",
        "--method seppo --reference latest --beta 300",
        "--method sspo --beta 300 --generate-batch 1",
        "--method spin --guidance 3",
        "--method dpo --caption-dropout 0.6",
        "--method sft",
    ],
)
def test_updates_equal_a_plain_rewrite(pipeline, pairs, argv):
    """Every update anew, from the checkpoints: its pairs as diffusers' pipeline draws them, its loss as written in
    plain Python, its gradient by the functions that a student would copy."""
    o = seppo.parse_args(["--model", str(pipeline), "--data", str(pairs), "--device", "cpu", *argv.split()])
    assert run(pipeline, pairs, *argv.split(), "--save-every", 1, "--steps", 4) == 0
    cut, pipe = cut_out(*CUT), StableDiffusionPipeline.from_pretrained(str(pipeline), low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    settings = {"clip_sample": False} if o.solver == "ddim" else {}  # of itself it clips: latents are no pixels
    solver = DDIMScheduler if o.solver == "ddim" else DPMSolverMultistepScheduler
    pipe.scheduler = solver.from_config(pipe.scheduler.config, **settings)
    fetched, encode = rows_of(pairs, 16, "--method", o.method), pipe.vae.encode
    for u, line in enumerate(metrics()):
        chance = torch.Generator().manual_seed(seppo.key(0, "reference", u + 1))
        chosen = cut.choose_reference(u + 1, o.reference, chance)
        assert line["reference"] == (chosen if o.loser != "none" else None)
        assert line["lr"] == pytest.approx(1e-3), "warm-up over a quarter of the updates is over with the first"
        policy, reference = load(f"run/checkpoint-{u}/unet"), load(f"run/checkpoint-{chosen}/unet")
        rows = fetched[4 * u : 4 * u + 4]
        t, dropped, eps, noise_w, noise_r = seppo.draws(0, range(4 * u, 4 * u + 4), (4, 8, 8), 1000, o.caption_dropout)
        with torch.no_grad():
            draw = lambda side, noise: (
                encode(torch.stack([row[side] for row in rows])).latent_dist.mean
                + encode(torch.stack([row[side] for row in rows])).latent_dist.std * noise
            )
            x_w, x_r = draw(2, noise_w) * pipe.vae.config.scaling_factor, None
            said = ["" if d else row[1] for d, row in zip(dropped, rows)]
            ids = pipe.tokenizer(said, padding="max_length", return_tensors="pt").input_ids
            context = pipe.text_encoder(ids)[0]
            if o.loser == "data":
                x_r = draw(3, noise_r) * pipe.vae.config.scaling_factor
            elif o.loser == "generated":
                pipe.unet = reference
                settings = dict(num_inference_steps=2, guidance_scale=o.guidance, height=64, width=64)
                x_r = pipe([row[1] for row in rows], latents=noise_r, output_type="latent", **settings).images
        loss, _ = cut.batch_loss(
            policy, reference if o.loser != "none" else None, noising, x_w, eps, t, context, x_r, None, o.beta, o.flip
        )
        (loss / 4).backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), f"update {u}"

        def m(x, net):
            with torch.no_grad():
                said = net(noising.add_noise(x, eps, t), t, context).sample
            return (said - eps).double().square().mean((1, 2, 3))

        pw = m(x_w, policy)
        assert line["policy_w"] == pytest.approx(pw.mean().item(), rel=1e-4)
        if o.loser != "none":
            rw, pr, rr = m(x_w, reference), m(x_r, policy), m(x_r, reference)
            mean = by_hand(pw, rw, pr, rr, o.beta, o.flip).mean().item()
            assert line["loss"] == pytest.approx(mean, rel=1e-3), f"update {u}"
            taken = pw < rw if o.flip == "indicator" else torch.ones(4, dtype=torch.bool)
            means = {"reference_w": rw, "policy_r": pr[taken], "reference_r": rr[taken]}
            for name, values in means.items():
                wanted = values.mean().item() if len(values) else None
                assert line[name] == (pytest.approx(wanted, rel=1e-4) if len(values) else None), f"{name}, update {u}"


def test_schedule_clipping_and_intervals(pipeline, pairs):
    """Linear warm-up over a quarter; an interval has one reference; a clipped step has norm 1 (AdamW's first is lr)."""
    drawn = [
        seppo.choose_reference(k, "random", torch.Generator().manual_seed(seppo.key(3, "reference", k)))
        for k in (1, 2, 3)
    ]
    assert run(pipeline, pairs, "--steps", 8, "--save-every", 3, "--seed", 3) == 0
    lines = metrics()
    assert [line["reference"] for line in lines] == [drawn[u // 3] for u in range(8)]
    assert [line["lr"] for line in lines] == pytest.approx([0.5e-3] + [1e-3] * 7)
    assert run(pipeline, pairs, "--beta", 1e5, "--steps", 1, "--out", "steep") == 0
    moments = load_file("steep/resume.safetensors")
    clipped = math.sqrt(sum(v.square().sum() for name, v in moments.items() if name.endswith("exp_avg")))
    assert metrics("steep")[0]["grad_norm"] > 10 and clipped == pytest.approx(0.1, rel=1e-3), "0.1 of a norm of 1"
    assert moments["conv_in.weight step"] == 1


def test_what_saves_memory_does_not_change_an_update(pipeline, pairs):
    """Micro-batch, generate-batch, checkpointing and compiling change rounding only; so does the order of indicator."""
    cases = {"a": (4, 4), "b": (1, 4), "c": (2, 3), "d": (4, 4, "--gradient-checkpointing")}
    for method in ("seppo", "sspo"):
        ends = []
        for name, (micro, generate, *more) in cases.items():
            argv = ["--micro-batch", micro, "--generate-batch", generate, "--method", method, "--out", method + name]
            assert run(pipeline, pairs, *argv, *more) == 0
            ends.append(weights(f"{method}{name}/checkpoint-4/unet"))
        change = distance(ends[0], weights(pipeline / "unet"))
        apart = [distance(ends[0], other) / change for other in ends[1:]]
        assert max(apart) < 0.01, (method, apart)


def test_the_indicator_generates_only_what_it_uses(pipeline, tmp_path, monkeypatch):
    data, sizes, sample = write_parquet(tmp_path / "p.parquet", pickapic_rows(16)), [], seppo.sample
    record = lambda net, scheduler, noise, *args, **options: (
        sizes.append(len(noise)) or sample(net, scheduler, noise, *args, **options)
    )
    monkeypatch.setattr(seppo, "sample", record)
    argv = ["--method", "sspo", "--batch-size", 16, "--generate-batch", 5, "--steps", 3]
    assert run(pipeline, data, *argv) == 0
    lines = metrics()
    of_pictures = 3 * [4]  # the sample pictures, at 0, 2 and 3
    assert sum(sizes) == sum(of_pictures) + round(16 * sum(line["sign_pos"] for line in lines)) and max(sizes) == 5
    assert lines[0]["sign_zero"] == 1 and lines[0]["policy_r"] is None, "at first the reference is the policy"
    assert all(line["sign_neg"] == 0 and line["sign_pos"] + line["sign_zero"] == 1 for line in lines)


def test_only_generation_is_compiled(pipeline, pairs, monkeypatch):
    compiled = []

    def compile(net):
        return lambda *args, **options: compiled.append(torch.is_grad_enabled()) or net(*args, **options)

    class Compiled(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, *args, **options):
            compiled.append(torch.is_grad_enabled())
            return self.net(*args, **options)

    assert run(pipeline, pairs) == 0
    monkeypatch.setattr(torch, "compile", Compiled)
    assert run(pipeline, pairs, "--compile", "--out", "fast") == 0
    assert compiled == [False] * 4 * 2, "4 updates of one generate-batch, 2 steps"
    assert same(weights("run/checkpoint-4/unet"), weights("fast/checkpoint-4/unet"))


def test_half_precision(pipeline, pairs, monkeypatch):
    """fp16 autocast on a CPU: exact at equal weights, near fp32, the generator follows its reference."""
    seen, gradient = [], seppo.Trainer.gradient

    def checked(self, rows):
        halves = {name: p.half() for name, p in self.reference.state_dict().items()}
        seen.append(same(halves, self.generator.state_dict()))
        gradient(self, rows)

    argv = ["--reference", "latest", "--save-every", 1, "--steps", 3, "--beta", 20]
    assert run(pipeline, pairs, *argv, "--out", "full") == 0
    monkeypatch.setattr(seppo.Trainer, "gradient", checked)
    assert run(pipeline, pairs, *argv, "--dtype", "fp16") == 0
    half, full = metrics(), metrics("full")
    assert [line["sign_zero"] for line in half] == [1, 1, 1] and seen == [True] * 3
    assert all(line["loss"] == pytest.approx(math.log(2), abs=1e-6) for line in half), "the reference is the policy"
    for a, b in zip(half, full):
        assert a["policy_w"] == pytest.approx(b["policy_w"], rel=0.01)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05), "the scale is divided out"


@pytest.mark.parametrize("call", [0, 1])
def test_a_gradient_that_is_not_finite_skips_the_update(pipeline, pairs, monkeypatch, capsys, call):
    """In the first chunk of update 2, or in its last: nothing is learned from it, all else goes on; three stop a run."""
    argv = ["--micro-batch", 2, "--generate-batch", 2, "--save-every", 1, "--dtype", "fp16"]
    loss, calls, drawn, sample = seppo.batch_loss, [], [], seppo.sample

    def infinite(*args, **options):
        calls.append(1)
        summed, found = loss(*args, **options)
        at = len(calls) - 2  # the self-check's call comes first
        return (summed * math.inf if bad(at) else summed), found

    monkeypatch.setattr(seppo, "batch_loss", infinite)
    monkeypatch.setattr(seppo, "sample", lambda *args, **options: drawn.append(1) or sample(*args, **options))
    bad = lambda at: at == 2 + call
    assert run(pipeline, pairs, *argv) == 0
    lines = metrics()
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["loss"] is None and lines[2]["loss"] > 0
    ends = [weights(f"run/checkpoint-{n}/unet") for n in range(4)]
    assert same(ends[1], ends[2]) and not same(ends[2], ends[3])
    assert len(drawn) == 5 * 2 + 8 - (call == 0), "what is generated after the first chunk is spared"
    bad, calls[:] = lambda at: at >= 2, []
    assert run(pipeline, pairs, *argv, "--out", "bad") == 2
    assert "three updates in a row" in capsys.readouterr().err and len(metrics("bad")) == 3


def test_numeric_path_is_checked(pipeline, pairs, monkeypatch, capsys):
    error, apart = seppo.denoising_error, 1e-3
    worse = lambda unet, *args: error(unet, *args) + apart * (not torch.is_grad_enabled())
    monkeypatch.setattr(seppo, "denoising_error", worse)
    assert run(pipeline, pairs) == 2 and "one numeric path" in capsys.readouterr().err
    apart = 1e-4
    assert run(pipeline, pairs) == 0 and "0.1 of a logit apart instead of 0" in capsys.readouterr().out


def test_resume_is_bit_equal(pipeline, pairs, monkeypatch, capsys):
    """Ctrl-C in an update, at a checkpoint or between two; a state that is never older than SAVE_SECONDS."""
    assert run(pipeline, pairs, "--out", "straight") == 0
    for out, seconds, redone in (("run", 600, 2), ("young", 0, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(seppo, "SAVE_SECONDS", seconds)
            stopped_after(3, patch)
            capsys.readouterr()
            assert run(pipeline, pairs, "--out", out) == 130
            assert capsys.readouterr().err.splitlines()[-1] == "seppo.py: interrupted; the same command continues"
            assert len(metrics(out)) == 3 and not Path(out, "checkpoint-4").exists()
            updates, step = [], seppo.Trainer.step
        with monkeypatch.context() as patch:
            patch.setattr(seppo.Trainer, "step", lambda self, u: updates.append(u) or step_now(self, u))
            step_now = seppo_step
            assert run(pipeline, pairs, "--out", out) == 0
        assert updates == [*range(redone, 4)], "no more is done again than must be"
        assert same(weights(f"{out}/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
        assert without_clocks(metrics(out)) == without_clocks(metrics("straight")), "as if nothing had happened"


seppo_step = seppo.Trainer.step


def test_a_pool_that_is_not_whole_is_named(pipeline, pairs, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stopped_after(2, patch)
        assert run(pipeline, pairs, "--reference", "latest") == 130
    file = Path("run/checkpoint-2/unet/diffusion_pytorch_model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert run(pipeline, pairs, "--reference", "latest") == 2 and "checkpoint-2" in capsys.readouterr().err


def test_a_full_disk_is_one_line(pipeline, pairs, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    assert run(pipeline, pairs, "--out", "straight") == 0
    for target, name in ((seppo, "save_file"), (Image.Image, "save"), (UNet2DConditionModel, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            assert run(pipeline, pairs) == 2
            assert "cannot be written: [Errno 28]" in capsys.readouterr().err.splitlines()[-1]
    assert run(pipeline, pairs) == 0 and same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
    assert not [*Path("run").rglob("*.tmp")]
