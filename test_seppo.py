"""python -m pytest: offline, on a CPU, in under two minutes. SLOW=1 adds tests with kills and several processes."""

import argparse
import contextlib
import copy
import fcntl
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}  # read at import: no hub, no window

import av
import diffusers
import huggingface_hub
import peft
import pyarrow.parquet
import pytest
import torch
import transformers
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import convert_state_dict_to_kohya
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import seppo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "assets"))
import study  # noqa: E402

slow = pytest.mark.skipif(os.environ.get("SLOW") != "1", reason="takes minutes: SLOW=1 runs it")
torch.set_num_threads(1)  # the nets are tiny: more threads wait for each other
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # for other processes: the number of threads decides the rounding
LEVELS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ADAPTERS = "pytorch_lora_weights.safetensors"


# ---- Small things in the real layouts -------------------------------------------------------------------------------


def encoded(image, kind, **settings):
    image.save(buffer := io.BytesIO(), kind, **settings)
    return buffer.getvalue()


def jpeg(seed, side=64):  # smooth colour noise
    noise = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(noise[None], (side, side), mode="bicubic")[0].clamp(0, 1)
    return encoded(Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy()), "JPEG")


def pickapic_rows(n, first=0):
    """Rows with Pick-a-Pic's columns: every fifth is a tie, labels alternate otherwise."""
    several = range(first, first + n)
    labels = [0.5 if i % 5 == 4 else float(i % 2) for i in several]
    pictures = {f"jpg_{side}": [jpeg(2 * i + side) for i in several] for side in (0, 1)}
    labels = {"label_0": labels, "label_1": [1 - x for x in labels], "has_label": [True] * n}
    return {"caption": [f"picture {i}" for i in several]} | pictures | labels


def put(path, data):  # a file with these bytes, this text, or these rows as Parquet in groups of four
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, dict):
        pyarrow.parquet.write_table(pyarrow.table(data), path, row_group_size=4)
    else:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
WORDS = [c + end for c in LETTERS for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
TOKENIZER = transformers.CLIPTokenizer(VOCABULARY, [], unk_token="<|endoftext|>", model_max_length=77)


def save_pipeline(folder, **unet):
    """A tiny Stable Diffusion 1.x, saved by diffusers: the real layout, 64-pixel pictures, 0.2 M weights."""
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    size |= dict(vocab_size=78, max_position_embeddings=77, bos_token_id=76, eos_token_id=77)
    blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4, norm_num_groups=4)
    blocks |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, layers_per_block=1)
    vae = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    vae |= dict(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, sample_size=64)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**size))
    parts = dict(vae=diffusers.AutoencoderKL(**vae), text_encoder=text, tokenizer=TOKENIZER)
    parts |= dict(unet=UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), **blocks, **unet))
    parts |= dict(scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **LEVELS))
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    StableDiffusionPipeline(**parts, **none).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("tiny-sd"))


def altered(pipeline, folder, part, change):  # a copy of the model, where a function changes the weights of one part
    file = next((shutil.copytree(pipeline, Path(folder)) / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    torch.manual_seed(1)
    size = dict(block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4)
    size |= dict(motion_num_attention_heads=2, motion_max_seq_length=8, use_motion_mid_block=False)
    diffusers.MotionAdapter(**size).save_pretrained(folder := tmp_path_factory.mktemp("tiny-motion"))
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs/ goes there


@pytest.fixture
def pairs(tmp_path):
    return put(tmp_path / "pairs.parquet", pickapic_rows(10))


SIZES = "--resolution 64 --batch-size 4 --micro-batch 2 --generate-batch 4 --steps 4 --save-every 2 --sampler-steps 2"
TINY = [*SIZES.split(), "--lr", "1e-3", "--out", "run", "--device", "cpu"]
run = lambda pipeline, data, *more: seppo.main([*map(str, ("--model", pipeline, "--data", data, *TINY, *more))])
options = lambda *more: seppo.parse_args([*map(str, ("--model", "x", "--resolution", 64, "--data", *more))])
rows_of = lambda data, n, *more: [*map(seppo.open_data(options(data, *more)).__getitem__, range(n))]  # the first n
captions_of = lambda folder: {row[1].strip() for row in rows_of(folder, 20)}
metrics = lambda folder="run": [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
progress = lambda folder="run": json.loads(safe_open(f"{folder}/resume.safetensors", "pt").metadata()["progress"])
CLOCKS = {"seconds", "winners_per_second", "peak_gb"}
without_clocks = lambda lines: [{name: line[name] for name in line if name not in CLOCKS} for line in lines]
load = lambda folder: UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=False)
weights = lambda folder: load(folder).state_dict()
same = lambda a, b: all(torch.equal(a[name], b[name]) for name in a)
distance = lambda a, b: math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))
plain = lambda picture: VaeImageProcessor().preprocess(Image.open(io.BytesIO(picture)))[0]  # as diffusers reads it
close = lambda a, b, within=1e-5: (a - b).abs().max() < within


def interrupted(updates, *argv):  # a run stopped by Ctrl-C in the update after `updates` -> its exit code
    step, ctrl_c = seppo.Trainer.step, Mock(side_effect=KeyboardInterrupt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seppo.Trainer, "step", lambda self, u: step(self, u) if u < updates else ctrl_c())
        return run(*argv)


# ---- The objective --------------------------------------------------------------------------------------------------


def by_hand(pw, rw, pr, rr, beta, flip):
    """The paper's formula, one sample at a time, in plain Python floats -> what is logged of it, by name."""
    found = []
    for a, b, c, d in zip(pw.tolist(), rw.tolist(), pr.tolist(), rr.tolist()):
        sign = {"sign": (b > a) - (b < a), "indicator": int(b > a), "none": 1}[flip]
        z = -beta / 2 * ((a - b) - sign * (c - d))
        right = 0.5 if a - b == c - d else float(a - b < c - d)  # does the winner gain more than the other picture?
        found.append((math.log1p(math.exp(-z)) if z > -30 else -z, z, sign, right))
    return dict(zip(("loss", "logit", "sign", "implicit_acc"), torch.tensor(found, dtype=torch.float64).unbind(1)))


@pytest.mark.parametrize("flip", ["sign", "indicator", "none"])
def test_objective_equals_a_plain_rewrite(flip):
    g = torch.Generator().manual_seed(0)
    errors = [torch.rand(64, generator=g, dtype=torch.float64) * 1e-3 for _ in range(4)]
    errors[0][:8] = errors[1][:8]  # neither is better
    errors[0].requires_grad_()
    named = lambda errors: dict(zip(("policy_w", "reference_w", "policy_r", "reference_r"), errors))
    losses, details = seppo.seppo_loss(**named(errors), beta=2000.0, flip=flip)
    wanted = by_hand(*errors, 2000.0, flip)
    wanted |= {"reward_w": 1000 * (errors[1] - errors[0]), "reward_r": 1000 * (errors[3] - errors[2])}
    for name, value in details.items() | {"loss": losses.detach()}.items():
        torch.testing.assert_close(value, wanted[name].detach(), rtol=1e-12, atol=1e-15)
    assert not any(value.requires_grad for value in details.values())
    single, details = seppo.seppo_loss(**named([e.float() for e in errors]), flip=flip, sign=torch.zeros(64))
    assert single.dtype == torch.float32 and details["sign"].sum() == (64 if flip == "none" else 0), "the given sign"
    pytest.raises(ValueError, seppo.seppo_loss, **named(errors), flip="flop")
    pytest.raises(TypeError, seppo.seppo_loss, *errors)  # diffusers orders them differently


def test_reference_rule():
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 7):
        drawn = torch.tensor([seppo.choose_reference(k, "random", g) for _ in range(7000)]).bincount(minlength=k)
        chi2 = ((drawn - 7000 / k).square() / (7000 / k)).sum()  # 99.99 % quantile for 6 degrees of freedom: 27.9
        assert len(drawn) == k and chi2 < 30, f"not uniform over the {k} checkpoints so far: {drawn.tolist()}"
        assert seppo.choose_reference(k, "latest") == k - 1 and seppo.choose_reference(k, "initial") == 0
    [pytest.raises(ValueError, seppo.choose_reference, *wrong) for wrong in ((0, "random"), (3, "newest"))]


def test_draws_depend_only_on_seed_and_position():
    drawn = seppo.draws(0, range(8), (4, 8, 8), 1000, 0.5)
    assert all(torch.equal(a[3:], b) for a, b in zip(drawn, seppo.draws(0, range(3, 8), (4, 8, 8), 1000, 0.5)))
    assert not torch.equal(drawn[2], seppo.draws(1, range(8), (4, 8, 8), 1000, 0.5)[2]), "the seed must matter"
    t, dropped, eps, *_ = seppo.draws(0, range(4000), (1,), 1000, 0.2)
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean() - 499.5) < 20
    assert abs(dropped.float().mean() - 0.2) < 0.03 and abs(eps.std() - 1) < 0.05


def test_the_calls_of_a_net(pipeline):
    """Each frame of a clip has its own clip's caption. A step is one call without gradient: B rows if unguided."""
    echo = Mock(side_effect=lambda x, t, encoder_hidden_states: argparse.Namespace(sample=encoder_hidden_states))
    words, net = torch.randn(2, 5, 16), load(pipeline / "unet")
    predicted = seppo.predict(echo, torch.zeros(2, 4, 3, 8, 8), torch.tensor([1, 2]), words)
    assert torch.equal(predicted, words[[0, 0, 0, 1, 1, 1]])
    net.forward = Mock(wraps=net.forward)
    for guidance, rows in ((1, 2), (3, 4)):
        net.forward.reset_mock()
        x = seppo.sample(net, DDPMScheduler(**LEVELS), torch.randn(2, 4, 8, 8), words, words[:1], "ddim", 3, guidance)
        assert [len(call.args[0]) for call in net.forward.call_args_list] == [rows] * 3 and not x.requires_grad


# ---- The data -------------------------------------------------------------------------------------------------------


def test_parquet_order_ties_and_broken_rows(tmp_path, pairs):
    rows = pickapic_rows(20)
    rows["jpg_0"][0] = rows["jpg_1"][0] = b"not a picture"
    rows["jpg_0"][2], rows["jpg_1"][2] = rows["jpg_0"][2][:200], rows["jpg_1"][2][:200]
    rows["caption"][3], rows["label_0"][6] = None, math.nan
    for i, part in enumerate((slice(0, 12), slice(12, 20))):
        put(tmp_path / "data" / f"train-{i}.parquet", {k: v[part] for k, v in rows.items()})
    put(tmp_path / "data" / "validation-0.parquet", pickapic_rows(4, 100))
    fetched = rows_of(tmp_path / "data", 40, "--method", "dpo")
    captions = [caption for _, caption, *_ in fetched]
    usable = {f"picture {i}" for i in range(20) if i % 5 != 4} - {f"picture {i}" for i in (0, 2, 3, 6)}
    assert {*captions} == {*captions[:20]} == usable, "no ties, broken rows and other splits; all other rows"
    assert captions[:20] != captions[20:], "each epoch has its own order"
    assert not any(replaced for *_, replaced in rows_of(pairs, 20)), "ties are not broken rows"

    def mirrors(fetched):  # whether each pair is mirrored
        for _, caption, winner, loser, _ in fetched:  # the winner is the picture with label 1
            i = int(caption.split()[1])
            sides = (0, 1) if rows["label_0"][i] == 1 else (1, 0)
            found, pair = torch.stack([winner, loser]), torch.stack([plain(rows[f"jpg_{side}"][i]) for side in sides])
            yield close(found, pair.flip(-1))
            assert close(found, pair) or close(found, pair.flip(-1)), "both are mirrored, or neither"

    mirrored, other = [*mirrors(fetched)], rows_of(tmp_path / "data", 40, "--method", "dpo", "--seed", "1")
    assert 12 <= sum(mirrored) <= 28, "half of 40, within 2.5 standard deviations"
    assert [row[1] for row in other] != captions and [*mirrors(other)] != mirrored, "the seed draws order and mirrors"


def test_a_row_group_is_read_once_and_ahead_of_its_use():
    read = []

    def winners(groups, n, *more):
        rows = lambda g: [(f"{g} {i}", jpeg(0) if i else None, None) for i in range(n)]  # the first has no picture
        read_slowly = lambda g: (time.sleep(0.03), read.append(g), rows(g))[-1]  # lets another thread ask for g
        read.clear()
        return seppo.Winners(options("y", *more), "y", [(n, lambda g=g: read_slowly(g)) for g in range(groups)])

    data = winners(12, 10)
    names = [data.row(n)[0] for n in range(240)]
    assert sorted(names[:120]) == sorted(names[120:]) == sorted(f"{g} {i}" for g in range(12) for i in range(10))
    assert sorted(read[:12]) == [*range(12)] and read[:12] != read[12:], "an epoch reads each group once, shuffled"
    first, second = ([name for name in part if name[:2] == "7 "] for part in (names[:120], names[120:]))
    assert first != second, "and its own order within a group"
    assert [winners(12, 10, "--seed", 1).row(n)[0] for n in range(9)] != names[:9], "the seed draws the order"
    assert len([*winners(4, 4).fetch(range(64), 8)]) == 64 and sorted(read) == [0, 1, 2, 3], "by several threads"
    rows = winners(20, 4).fetch(range(80), 1)
    next(rows), time.sleep(0.3)
    assert len(read) == 2, "the group of the next rows is there before they are asked for"
    few = winners(3, 10, "--max-winners", 25)
    assert few.total == 25 and {few.row(n)[0] for n in range(99)} == {f"{i // 10} {i % 10}" for i in range(25)}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub's data set me/pairs, of revision abc, with a file of another split."""
    rows, folder = pickapic_rows(40), Path("hub/datasets/me/pairs@abc/data")
    rows |= {f"jpg_{side}": [encoded(Image.effect_noise((256, 256), 99), "PNG") for _ in range(40)] for side in (0, 1)}
    put(folder / "train-0.parquet", rows), put(folder / "test-0.parquet", rows)
    files = [argparse.Namespace(rfilename=f"data/{name}") for name in ("test-0.parquet", "train-0.parquet", "card.md")]
    info = argparse.Namespace(sha="abc", siblings=files)
    at = lambda _, revision, **__: argparse.Namespace(**vars(info) | {"sha": revision or info.sha})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: argparse.Namespace(dataset_info=at))
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda **_: DirFileSystem("hub", LocalFileSystem()))
    monkeypatch.setattr(seppo, "PAUSES", (0.01, 0.02))
    info.down, info.bytes, read = 0, 0, LocalFileOpener.read  # failures still to come; bytes read so far

    def drop(self, n=-1):
        info.down -= n > 100_000
        if n > 100_000 and info.down >= 0:
            raise type("ConnectError", (Exception,), {})("no route")  # like httpx's: no OSError
        data = read(self, n)
        info.bytes += len(data)
        return data

    monkeypatch.setattr(LocalFileOpener, "read", drop)
    return info


def test_a_run_waits_for_the_network_and_keeps_its_revision(hub, pipeline, capsys):
    data, file = seppo.open_data(options("me/pairs")), Path("hub/datasets/me/pairs@abc/data/train-0.parquet")
    assert data.total == 40 and data.source == "me/pairs@abc" and data[0][1].startswith("picture")
    assert 0.1 < hub.bytes / file.stat().st_size < 0.3, "a row group of ten, and the footer"
    assert run(pipeline, "me/pairs", "--out", "straight") == 0
    hub.down = 2
    assert interrupted(2, pipeline, "me/pairs") == 130 and "next attempt in 0.02 s" in capsys.readouterr().out
    Path("hub/datasets/me/pairs@def").symlink_to("pairs@abc")
    hub.sha, hub.down = "def", 99
    assert run(pipeline, "me/pairs") == 2 and (said := capsys.readouterr()).out.count("ConnectError: no route") == 2
    assert "ConnectError: no route" in said.err.splitlines()[-1]
    hub.down = 0
    assert run(pipeline, "me/pairs") == 0 == run(pipeline, "me/pairs@abc")
    assert same(weights("run/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
    assert run(pipeline, "me/pairs@def") == 2 and "source was me/pairs@abc, is me/pairs@def" in capsys.readouterr().err
    hub.siblings = hub.siblings[:1] * 2
    assert run(pipeline, "me/pairs") == 2 and "no split named train" in capsys.readouterr().err


def captioned(folder, names, **captions):
    """Small JPEGs and their captions: the one given under its name, else `caption NAME`."""
    for path in map(Path(folder).joinpath, names.split()):
        put(path.with_suffix(".txt"), captions.get(path.stem, f"caption {path.stem}")), put(path, jpeg(0))
    return Path(folder)


def test_picture_folders(tmp_path, capsys):
    """A captioned picture is data. Hidden files, files of a run and Parquet beside captions are not."""
    folder = captioned(tmp_path / "a [b]", "0.jpg 1.JFIF 2.jpe deep/3.png .hidden/4.jpg 6.avif old/samples/7.jpg")
    for name in ("._0.jpg", "uncaptioned.jpg", "0.json", "old/config.json"):  # 0.json: as img2dataset writes it
        (folder / name).write_bytes(jpeg(9))
    (folder / "2.txt").rename(folder / "2.TXT"), (folder / "old/checkpoint-0").mkdir()
    put(folder / "scores.parquet", {"score": [1.0]})
    assert captions_of(folder) == {"caption 0", "caption 1", "caption 2", "caption 3"}
    assert f"3 files without caption or picture: {folder}/6.avif, " in capsys.readouterr().out
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": f"line {i}"}) for i in (0, 3)]
    assert put(folder / "metadata.jsonl", "\n".join(lines)) and captions_of(folder) == {"line 0"}, "there is no 3.jpg"
    assert f"5 files without caption or picture: {folder}/3.jpg, " in capsys.readouterr().out
    (folder / "metadata.jsonl").unlink(), put(folder / "deep/train.jpg", jpeg(0))
    put(folder / "deep/metadata.jsonl", json.dumps([{"file_name": "train.jpg", "text": "a list"}]))
    assert captions_of(folder) == {"a list"}
    parquet = put(tmp_path / "pairs [1]" / "x::y.parquet", pickapic_rows(4)).parent
    put(parquet / "uncaptioned.jpg", jpeg(9))
    assert captions_of(parquet) == {f"picture {i}" for i in range(4)}


def test_no_part_of_a_folder_is_lost(tmp_path, capsys):
    """Linked folders are read once. The word `train` is a split only if other splits lie beside it."""
    captioned(tmp_path / "store", "0.jpg 1.jpg"), captioned(tmp_path / "data", "2.jpg deep/3.jpg")
    links = {"a": "store", "b": "store", "deep/loop": "data"}
    [(tmp_path / "data" / link).symlink_to(tmp_path / folder) for link, folder in links.items()]
    assert seppo.open_data(options(tmp_path / "data")).total == 4 == len(captions_of(tmp_path / "data"))
    for name in ("train", "bus"):
        put(tmp_path / "a" / f"{name}.parquet", pickapic_rows(4, 10 * len(name)))
        folder = captioned(tmp_path / "b", f"{name}/{name}.jpg") / name
        put(folder / "metadata.jsonl", json.dumps({"file_name": f"{name}.jpg", "text": f"a {name}"}))
    assert seppo.open_data(options(tmp_path / "a")).total == 8 and captions_of(tmp_path / "b") == {"a train", "a bus"}
    put(tmp_path / "a/test/0.parquet", pickapic_rows(4))
    assert not capsys.readouterr().out and seppo.open_data(options(tmp_path / "a")).total == 4
    assert "1 of 3 files are used, those of the split named train" in capsys.readouterr().out


def test_captions_are_decoded_or_skipped_never_garbage(tmp_path):
    said = dict(a=b"\xef\xbb\xbfcaf\xc3\xa9", b="caf\xe9".encode("utf-16"), c="caf\xe9".encode("cp1252"))
    said |= dict(d="\u5915".encode("sjis"), e="caf".encode("utf-16-le"), f="caf".encode("utf-32"), g=b"\xff\xfea")
    rows = rows_of(captioned(tmp_path / "p", "a.jpg b.jpg c.jpg d.jpg e.jpg f.jpg g.jpg", **said), 20)
    assert {row[1] for row in rows[:14]} == {"caf\xe9"} and sum(row[-1] > 0 for row in rows[:14]) == 2 * 5


def test_labels_are_preferences(tmp_path):
    """label_1, if present, must be the opposite of label_0; labels may be text or booleans."""
    for yes, no in (("1", "0"), (True, False)):
        labels = {"label_0": [yes, no] * 4, "label_1": [no, yes, yes, no, None, yes, no, yes]}
        fetched = rows_of(put(tmp_path / f"{yes}.parquet", pickapic_rows(8) | labels), 16)
        assert {row[1] for row in fetched} == {f"picture {i}" for i in (0, 1, 5, 6, 7)}


def test_a_folder_is_the_same_however_it_is_spelled(pipeline, tmp_path, monkeypatch, capsys):
    data = captioned(tmp_path / "mine", "0.jpg 1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = (data, f"{data}/", "mine", "./mine/../mine", "~/mine")
    assert all(run(f"{pipeline}/", spelling, "--steps", 1) == 0 for spelling in spellings)
    assert len({seppo.parse_args(["--model", str(pipeline), "--data", str(name)]).out for name in spellings}) == 1
    assert run(pipeline, captioned("other", "0.jpg 1.jpg"), "--steps", 1) == 2, "another folder is different data"
    for name, code in (("a/../../secret.jpg", 2), (data / "0.jpg", 0)):
        (data / "metadata.jsonl").write_text(json.dumps({"file_name": str(name), "text": "a"}))
        assert run(pipeline, "mine", "--steps", 1, "--out", f"{code}") == code
        assert not code or "outside the folder" in capsys.readouterr().err


# each must be replaced by another row
USELESS = {"half": jpeg(0)[:400], "header": jpeg(0)[:20], "no": b"", "null": None, "number": 7, "pipe": Path("pipe")}
USELESS |= {"html": b"<html>404</html>", "a bomb": encoded(Image.new("1", (10000, 10000)), "PNG")}
USELESS |= {"PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(pwned) (w) file closefile showpage\n"}
USELESS |= {"floats": encoded(Image.new("F", (64, 64), 1e30), "TIFF"), "a path": str(HERE / "LICENSE")}

# each is a picture, if an odd one, of the same grey: none may be skipped
GREY = Image.new("L", (64, 48), 200)
IMAGES = {"1 pixel": GREY.crop((0, 0, 1, 1)), "wide": GREY.resize((30000, 1)), "opaque": GREY.convert("LA")}
IMAGES |= {"16-bit": Image.frombytes("I;16", (64, 64), b"\0\xc8" * 4096)}
ODD = {kind: encoded(image, "PNG") for kind, image in IMAGES.items()}
ODD |= {"big-endian": encoded(Image.frombytes("I;16B", (64, 64), b"\xc8\0" * 4096), "TIFF")}
ODD |= {"CMYK": encoded(Image.new("CMYK", (64, 64), (55, 55, 55, 0)), "JPEG"), "WebP": encoded(GREY, "WEBP")}
ODD |= {"animated": encoded(GREY, "GIF", save_all=True, append_images=[Image.new("L", (64, 48), 0)] * 3)}
ODD |= {"EXIF": encoded(GREY, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "dict": {"bytes": encoded(GREY, "PNG")}}
winners_of = lambda *rows: seppo.Winners(options("y"), "y", [(len(rows), lambda: rows)])


@pytest.mark.parametrize("kind", USELESS)
def test_a_useless_picture_is_replaced(kind, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None), os.mkfifo("pipe")  # Pillow would start Ghostscript
    fetched = [*map(winners_of(("bad", USELESS[kind], None), ("good", jpeg(1), None)).__getitem__, range(20))]
    assert {row[1] for row in fetched} == {"good"} and sum(row[-1] > 0 for row in fetched) == 10


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_picture_is_a_picture(kind):
    _, _, pixels, _, replaced = winners_of(("a", ODD[kind], None))[0]
    assert replaced == 0 and pixels.shape == (3, 64, 64) and pixels.mean().item() == pytest.approx(0.57, abs=0.03)


def test_a_picture_is_upright_cropped_to_its_centre_smooth_and_on_white():
    shown, exif = Image.new("RGB", (200, 100), "red"), Image.Exif()
    shown.paste("blue", (50, 0, 100, 100)), shown.paste("black", (100, 0, 150, 100))
    exif[0x0112] = 6  # stored with its top at the left
    pixels = seppo.to_pixels(encoded(shown.rotate(90, expand=True), "PNG", exif=exif), options("y"))
    assert [pixels[:, :, x].mean(1).tolist() for x in (1, 30, 33, 62)] == [[-1, -1, 1]] * 2 + [[-1] * 3] * 2
    stripes = Image.frombytes("L", (128, 128), b"\0\xff" * 8192)
    assert seppo.to_pixels(encoded(stripes, "PNG"), options("y"))[:, :, 1:-1].abs().max() < 0.01, "stripes become grey"
    for mode in ("RGBA", "LA", "P"):
        clear = encoded(Image.new(mode, (64, 64)), "PNG", **{"transparency": 0} if mode == "P" else {})
        assert seppo.to_pixels(clear, options("y")).min() == 1


def test_any_text_is_a_caption_and_nothing_else_is(pipeline):
    for caption in (None, "", " \n\t", 3.5, math.nan, b"a dog", ["a dog"], "a \ud800 cat"):
        data = winners_of((caption, jpeg(0), None), ("good", jpeg(1), None))
        assert {data[n][1] for n in range(10)} == {"good"}, f"{caption!r} is unusable"
    _, codec = seppo.load_models(seppo.parse_args(["--model", str(pipeline), "--data", "y", "--device", "cpu"]))
    for caption in ("\U0001f436" * 50, "long " * 20_000, "a\0b", "\u202e\u05d0\u05d1", "!!!", "<|endoftext|>"):
        assert winners_of((caption, jpeg(0), None))[0][-1] == 0 and codec.encode_text([caption]).isfinite().all()


# ---- The command on a tiny Stable Diffusion -------------------------------------------------------------------------


def test_command_end_to_end(pipeline, tmp_path, capsys):
    rows = pickapic_rows(10)
    rows["jpg_0"][:4] = rows["jpg_1"][:4] = [b"broken"] * 4
    data = put(tmp_path / "pairs.parquet", rows)
    assert run(pipeline, data) == 0
    said, out, lines, fetched = capsys.readouterr(), Path("run"), metrics(), rows_of(data, 16)
    assert "on 16 preferred images (winners; repeats count): 1.6 epochs of 10 rows of" in said.out, "the plan"
    assert re.search(r"Disk: 0\.\d+ of \d\S* GB\n", said.out)
    assert re.search(r"4 unusable rows were replaced: 'picture \d': no readable picture: ", said.out)
    assert "16/16" in said.err and "winner/s" in said.err, "the bar counts winners"
    explained = re.search(r"\| key \|.*?\n\n", (HERE / "README.md").read_text(), re.S)[0]
    assert {*lines[0]} == {"update", *re.findall(r"`([a-z_]+)`(?=[^|]*\| [^|]+\|\n)", explained)}
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert [name for name, value in lines[0].items() if value is None] == ["peak_gb"]
    assert lines[0]["sign_zero"] == 1 and lines[1]["sign_zero"] == 0 == lines[-1]["skipped_updates"]
    skipped = [row[-1] for row in fetched]
    assert max(skipped) > 1 and [line["skipped_rows"] for line in lines] == [sum(skipped[:n]) for n in (4, 8, 12, 16)]
    assert json.loads((out / "config.json").read_text())["versions"]["torch"] == torch.__version__
    pipe = load_as_printed(said.out)
    assert same(pipe.unet.state_dict(), weights("run/checkpoint-4/unet"))
    assert not same(pipe.unet.state_dict(), weights(pipeline / "unet")), "it must have learned something"
    base, last, anchors = (Image.open(out / "samples" / f"{name}.png") for name in ("step-0", "step-4", "anchor-4"))
    assert last.size == (120 + 4 * 66, 40 + 2 * 66) == anchors.size
    assert last.crop((0, 0, *base.size)).tobytes() == base.tobytes(), "the base model's row stays as it was"
    edges = [anchors.getpixel((120 + 66 * x, 40 + 66)) for x in range(4)]
    assert [edges.count(c) / 4 for c in ((255, 0, 0), (0, 255, 0))] == [lines[3][f"sign_{n}"] for n in ("pos", "neg")]
    pipe.scheduler = DPMSolverMultistepScheduler(**LEVELS, timestep_spacing="trailing")
    *_, noise = seppo.draws("samples", range(4), (4, 8, 8), 1, 0)
    for n, top in ((0, 40), (4, 40 + 66)):  # the policy's pictures, always from this noise
        pipe.unet, sheet = load(out / f"checkpoint-{n}/unet"), evaluation.to_tensor(last)[:, top : top + 64]
        made = pipe([row[1] for row in fetched[:4]], latents=noise, num_inference_steps=2, height=64, width=64).images
        for left, picture in zip(range(120, last.width, 66), map(evaluation.to_tensor, made)):
            assert close(sheet[:, :, left : left + 64], picture, 1.01 / 255), f"step {n}"
    assert run(pipeline, data) == 0 and without_clocks(metrics()) == without_clocks(lines), "finished stays finished"
    assert run(pipeline, data, *"--seed 1 --beta 5 --lr 2 --guidance 3".split()) == 2
    found = re.findall(r"(\w+) was [\d.]+, is", capsys.readouterr().err)
    assert {*found} == {"seed", "beta", "lr", "guidance"}


def load_as_printed(out):  # the last run's last lines, as a program -> its `pipe` or `unet`
    names = {}
    exec("\n".join(line.strip() for line in out[out.rindex("To load it:") :].splitlines()[1:]), names)
    return names.get("pipe", names.get("unet"))


def logged_by_hand(pw, rw, pr, rr, beta, flip):  # {what an update logs: the values it averages}
    found = by_hand(pw, rw, pr, rr, beta, flip)
    sign, of_pairs = found.pop("sign"), {"policy_r": pr, "reference_r": rr, "implicit_acc": found.pop("implicit_acc")}
    found |= {"policy_w": pw, "reference_w": rw, "sign_pos": sign > 0, "sign_neg": sign < 0}
    found |= {name: values[sign > 0] if flip == "indicator" else values for name, values in of_pairs.items()}
    return {name: values.double() for name, values in found.items()}


def latents_of(pipe, pictures, noise):  # draws from the VAE's posterior
    posterior = pipe.vae.encode(torch.stack([*pictures])).latent_dist
    return (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor


def encoded_words(pipe, captions):
    return pipe.text_encoder(pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids)[0]


# options, and what they mean: where x^r comes from, which checkpoint is the reference, what becomes of the sign
RUNS = {"--solver ddim --guidance 1 --sampler-steps 6": "generated random sign", "--method sft": "none initial none"}
RUNS |= {"--method spin --guidance 3": "generated latest none", "--method ditto --model v": "generated initial none"}
RUNS |= {"--method sspo --beta 300 --generate-batch 1 --seed 5": "generated random indicator"}
RUNS |= {"--method spin --flip sign --beta 300": "generated latest sign"}
RUNS |= {"--method dpo --caption-dropout 0.6": "data initial none"}
RUNS |= {"--lora-rank 2 --reference latest --lr 1e-2": "generated latest sign"}


@pytest.mark.parametrize("argv", RUNS)
def test_updates_equal_a_plain_rewrite(pipeline, pairs, argv):
    """Recomputes every update from the checkpoints: the pairs with diffusers' pipeline, the loss in
    plain Python, the gradient with a copy of sections 1 and 2 of seppo.py."""
    loser, rule, flip = RUNS[argv].split()
    levels = shutil.copytree(pipeline, "v") / Path("scheduler/scheduler_config.json")
    levels.write_text(json.dumps(json.loads(levels.read_text()) | {"prediction_type": "v_prediction"}))
    o = seppo.parse_args(["--model", str(pipeline), "--data", str(pairs), *TINY, *argv.split()])
    assert run(pipeline, pairs, *argv.split(), "--save-every", 1, "--steps", 4) == 0
    sections_1_and_2 = re.search(r"# ---- 1\..*?(?=# ---- 3\.)", (HERE / "seppo.py").read_text(), re.S)[0]
    exec(sections_1_and_2, space := {"torch": torch, "F": torch.nn.functional, "diffusers": diffusers})
    ours, pipe = argparse.Namespace(**space), StableDiffusionPipeline.from_pretrained(o.model, low_cpu_mem_usage=False)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    settings = LEVELS | dict(timestep_spacing="trailing", prediction_type=noising.config.prediction_type)
    ddim = functools.partial(diffusers.DDIMScheduler, clip_sample=False)  # by default it clips, as pixel models need
    pipe.scheduler = (ddim if o.solver == "ddim" else DPMSolverMultistepScheduler)(**settings)
    fetched = rows_of(pairs, 16, "--method", o.method, "--seed", o.seed)

    def net(u):  # the UNet of checkpoint u
        if "lora" not in argv:
            return load(f"run/checkpoint-{u}/unet")
        unet = load(pipeline / "unet").requires_grad_(False)
        unet.load_lora_adapter(f"run/checkpoint-{u}", prefix="unet", weight_name=ADAPTERS)
        return unet

    def m(x, net):
        abar = noising.alphas_cumprod[t][:, None, None, None]
        target = abar.sqrt() * eps - (1 - abar).sqrt() * x if noising.config.prediction_type == "v_prediction" else eps
        with torch.no_grad():
            said = net(abar.sqrt() * x + (1 - abar).sqrt() * eps, t, context).sample
        return (said - target).double().square().mean((1, 2, 3))

    for u, line in enumerate(metrics()):
        chance = torch.Generator().manual_seed(seppo.key(o.seed, "reference", u + 1))
        chosen = {"random": torch.randint(u + 1, (), generator=chance).item(), "latest": u, "initial": 0}[rule]
        assert line["reference"] == (chosen if loser != "none" else None)
        policy, reference, rows = net(u), net(chosen), fetched[4 * u : 4 * u + 4]
        place = range(4 * u, 4 * u + 4), (4, 8, 8)
        t, dropped, eps, noise_w, noise_r = seppo.draws(o.seed, *place, 1000, o.caption_dropout)
        with torch.no_grad():
            captions, x_w, x_r = [row[1] for row in rows], latents_of(pipe, [row[2] for row in rows], noise_w), None
            seen = ["" if is_dropped else caption for is_dropped, caption in zip(dropped, captions)]
            context, empty, asked = encoded_words(pipe, [*seen, "", *captions]).split((4, 1, 4))
            if loser == "data":
                x_r = latents_of(pipe, [row[3] for row in rows], noise_r)
            elif loser == "generated":
                pipe.unet = reference
                settings = dict(num_inference_steps=o.sampler_steps, guidance_scale=o.guidance, height=64, width=64)
                x_r = pipe(captions, latents=noise_r, output_type="latent", **settings).images
                again = ours.sample(reference, noising, noise_r, asked, empty, o.solver, o.sampler_steps, o.guidance)
                torch.testing.assert_close(again, x_r, rtol=1e-3, atol=1e-3)
        anchor = reference if loser != "none" else None
        loss, _ = ours.batch_loss(policy, anchor, noising, x_w, eps, t, context, x_r, None, o.beta, flip)
        (loss / 4).backward()
        norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm().item()
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), f"update {u}"
        wanted = {"policy_w": m(x_w, policy)}
        if loser != "none":
            errors = wanted["policy_w"], m(x_w, reference), m(x_r, policy), m(x_r, reference)
            wanted = logged_by_hand(*errors, o.beta, flip)
        for name, values in wanted.items():
            mean = pytest.approx(values.mean().item(), rel=1e-3, abs=1e-3) if len(values) else None
            assert line[name] == mean, f"{name}, update {u}"


def test_a_solver_is_what_its_name_says(pipeline, pairs, capsys):
    own = json.loads((pipeline / "scheduler/scheduler_config.json").read_text())
    levels = dict(rescale_betas_zero_snr=True), dict(trained_betas=[1e-4] * 500 + [2e-3] * 500)
    others = {"a": {}, "b": dict(timestep_spacing="leading"), "c": dict(solver_order=3, use_karras_sigmas=True)}
    others |= {"d": dict(thresholding=True, clip_sample=True), "zero": levels[0], "trained": levels[1]}
    for name, more in others.items():
        put(Path(shutil.copytree(pipeline, name), "scheduler/scheduler_config.json"), json.dumps(own | more))
        assert run(name, pairs, "--steps", 1, "--out", f"{name}-run") == 0
    sampler = [json.loads(Path(f"{name}-run/config.json").read_text())["sampler"] for name in others]
    assert all(settings == sampler[0] for settings in sampler[:4]) and sampler[0]["solver_order"] == 2
    assert all(metrics(f"{name}-run")[0]["policy_r"] == metrics("a-run")[0]["policy_r"] for name in "bcd")
    assert all(own.items() <= settings.items() for own, settings in zip(levels, sampler[4:], strict=True))
    assert run("zero", pairs, "--solver", "pndm", "--out", "x") == 2 and "--solver pndm" in capsys.readouterr().err


def test_schedule_clipping_and_intervals(pipeline, pairs, monkeypatch):
    """Warm-up over a quarter of a run; one reference per interval; clipped gradients of norm 1; AdamW's settings."""
    chances = [torch.Generator().manual_seed(seppo.key(3, "reference", k)) for k in (1, 2, 3)]
    drawn = [seppo.choose_reference(k, "random", chance) for k, chance in zip((1, 2, 3), chances)]
    assert run(pipeline, pairs, "--steps", 8, "--save-every", 3, "--seed", 3) == 0
    assert [line["reference"] for line in metrics()] == [drawn[u // 3] for u in range(8)]
    assert [line["lr"] for line in metrics()] == pytest.approx([0.5e-3] + [1e-3] * 7)
    assert interrupted(1, pipeline, pairs, *"--beta 1e5 --steps 8 --save-every 1 --out steep".split()) == 130
    base, first = weights(pipeline / "unet"), weights("steep/checkpoint-1/unet")
    state = load_file("steep/resume.safetensors")
    gradients = {name: state[f"{name} exp_avg"] / (1 - 0.9) for name in base}
    squared_norm = sum(g.square().sum().item() for g in gradients.values())
    assert metrics("steep")[0]["grad_norm"] > 10 and squared_norm == pytest.approx(1, rel=1e-3), "clipped"
    for name, g in gradients.items():
        torch.testing.assert_close(state[f"{name} exp_avg_sq"], (1 - 0.999) * g.square())
        step = 0.01 * base[name] + g / (g.abs() + 1e-8)  # weight decay, and Adam's first step
        torch.testing.assert_close(first[name], base[name] - 0.5e-3 * step, rtol=0, atol=1e-6)


def test_what_saves_memory_or_time_does_not_change_an_update(pipeline, pairs, monkeypatch):
    """Micro-batch, generate-batch and checkpointing change rounding only; nothing but generation is compiled."""
    cases = {"a": (4, 4), "b": (1, 4), "c": (2, 3), "d": (4, 4, "--gradient-checkpointing"), "e": (4, 4, "--compile")}
    again, ends = Mock(wraps=torch.utils.checkpoint.checkpoint), []
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", again)
    monkeypatch.setattr(torch, "compile", compiled := Mock(side_effect=copy.copy))  # the copy has the same weights
    monkeypatch.setattr(seppo, "denoising_error", error := Mock(wraps=seppo.denoising_error))
    for name, (micro, generate, *more) in cases.items():
        again.reset_mock()
        argv = ["--micro-batch", micro, "--generate-batch", generate, "--out", name, *more]
        assert run(pipeline, pairs, *argv) == 0 and again.called == (name == "d")
        ends.append(weights(f"{name}/checkpoint-4/unet"))
    assert max(distance(ends[0], end) for end in ends[1:]) < 0.01 * distance(ends[0], weights(pipeline / "unet"))
    assert compiled.call_count == 1 and compiled.call_args.args[0] in [call.args[0] for call in error.mock_calls]


def test_the_indicator_generates_only_what_it_uses(pipeline, tmp_path, monkeypatch):
    data = put(tmp_path / "p.parquet", pickapic_rows(16))
    monkeypatch.setattr(seppo, "denoising_error", error := Mock(wraps=seppo.denoising_error))
    monkeypatch.setattr(seppo, "sample", sample := Mock(wraps=seppo.sample))
    argv = "--method sspo --batch-size 16 --generate-batch 5 --steps 4 --save-every 4 --caption-dropout 1 --lr 0.1"
    assert run(pipeline, data, *argv.split()) == 0
    lines, n = metrics(), round(16 * sum(line["sign_pos"] for line in metrics()))
    sizes, contexts = [len(call.args[2]) for call in sample.mock_calls], [call.args[-1] for call in error.mock_calls]
    assert n < 48 and sum(sizes) == n + 2 * 4 and max(sizes) == 5, "and the sample pictures, twice"
    assert lines[0]["sign_zero"] == 1 and all(line["sign_neg"] == 0 for line in lines), "at first they are equal"
    assert all(torch.equal(row, contexts[0][0]) for context in contexts for row in context), "captions are dropped"


def test_half_precision(pipeline, pairs, monkeypatch):
    seen, gradient = [], seppo.Trainer.gradient

    def checked(self, rows):  # half_copy is the reference in fp16; all fp16 weights are its own
        held = [p for net in (self.policy, self.reference) for p in net.parameters() if p.dtype == torch.float16]
        shared = {*map(id, held)} <= {*map(id, self.half_copy.parameters())}
        seen.append(shared and same(copy.deepcopy(self.reference).half().state_dict(), self.half_copy.state_dict()))
        gradient(self, rows)

    argv = ["--reference", "latest", "--save-every", 1, "--steps", 3, "--beta", 1e-5]
    assert run(pipeline, pairs, *argv, "--out", "full") == 0
    monkeypatch.setattr(seppo.Trainer, "gradient", checked)
    for more in ([], ["--lora-rank", 2, "--out", "lora"]):
        assert run(pipeline, pairs, *argv, "--dtype", "fp16", *more) == 0 and seen == [True] * 3 * (1 + bool(more))
    for half, full in zip(metrics(), metrics("full")):
        assert half["sign_zero"] == 1 and half["loss"] == pytest.approx(math.log(2), abs=1e-6), "reference is policy"
        assert half["policy_w"] == pytest.approx(full["policy_w"], rel=0.01)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05), "unscaled it would be 0 in fp16"


def test_a_gradient_that_is_not_finite_skips_the_update(pipeline, pairs, monkeypatch, capsys):
    """An update with a non-finite gradient in chunk 1 or 2 teaches nothing, also in a resumed run. The loss scale
    falls to a 16th, then rises by a tenth per update. Three such in a row stop a run."""
    argv = ["--micro-batch", 2, "--generate-batch", 2, "--save-every", 1, "--dtype", "fp16", "--sampler-steps", 1]
    loss, calls, bad = seppo.batch_loss, Counter(), {2: 1, 4: 2, 6: 1}  # the update, and its chunk
    monkeypatch.setattr(seppo, "sample", sample := Mock(wraps=seppo.sample))
    monkeypatch.setattr(seppo.Trainer, "sample_images", lambda self, captions: torch.zeros(len(captions), 3, 64, 64))

    def infinite(*args, **named):
        update = 1 + len(metrics()) if Path("run/metrics.jsonl").exists() else 1
        calls[update] += 1
        summed, found = loss(*args, **named)
        return summed * (math.inf if bad.get(update) == calls[update] else 1), found

    monkeypatch.setattr(seppo, "batch_loss", infinite)
    assert interrupted(4, pipeline, pairs, *argv, "--steps", 7) == 130
    calls.clear()
    assert run(pipeline, pairs, *argv, "--steps", 7) == 0
    lines, ends = metrics(), [weights(f"run/checkpoint-{n}/unet") for n in range(8)]
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, 2, 2, 3, 3]
    assert [line["loss"] is None for line in lines] == [n in bad for n in range(1, 8)]
    assert [same(a, b) for a, b in zip(ends, ends[1:])] == [n in bad for n in range(1, 8)]
    assert progress()["scale"] == pytest.approx((1.1 / 16) ** 3) and progress()["in_a_row"] == 0
    assert sample.call_count == 2 * (7 + 1) - 2, "one update is repeated; a bad first chunk spares the second"
    bad, says = dict.fromkeys(range(2, 9), 1), {7: "updates 2 to 4 had non-finite gradients", 2: "the last update was"}
    for steps in says:  # a two-update run may test a GPU: it must fail too
        calls.clear(), shutil.rmtree("run")
        assert run(pipeline, pairs, *argv, "--steps", steps) == 2 and says[steps] in capsys.readouterr().err


def test_numeric_path_is_checked(pipeline, pairs, monkeypatch, capsys):
    error = seppo.denoising_error
    for apart, code, says in ((1e-3, 2, "so signs are noise"), (1e-4, 0, "differ by 0.1 in the logit")):
        worse = lambda unet, *args: error(unet, *args) + apart * (not torch.is_grad_enabled())
        monkeypatch.setattr(seppo, "denoising_error", worse)
        assert run(pipeline, pairs) == code and says in "".join(capsys.readouterr())


def test_resume_is_bit_equal(pipeline, pairs, monkeypatch, capsys):
    assert run(pipeline, pairs, "--out", "straight") == 0
    for out, seconds, first in (("run", 600, 2), ("young", 0, 3)):
        monkeypatch.setattr(seppo, "SAVE_SECONDS", seconds)
        assert interrupted(3, pipeline, pairs, "--out", out) == 130
        assert capsys.readouterr().err.endswith("\nseppo.py: interrupted; run the same command again to continue\n")
        assert len(metrics(out)) == 3 and not Path(out, "checkpoint-4").exists()
        assert progress(out)["update"] == first, "no more updates are repeated than necessary"
        Path(out, "samples/step-0.png").write_bytes(b"torn")  # it is not read again
        assert run(pipeline, pairs, "--out", out) == 0
        assert "Resuming after update" in capsys.readouterr().out
        sheets = [Path(where, "samples/step-4.png").read_bytes() for where in (out, "straight")]
        assert sheets[0] == sheets[1], "the base model's row is drawn anew"
        assert same(weights(f"{out}/checkpoint-4/unet"), weights("straight/checkpoint-4/unet"))
        assert without_clocks(metrics(out)) == without_clocks(metrics("straight")), "as if nothing had happened"


def test_a_state_of_another_run_is_refused(pipeline, pairs, capsys):
    argv, path = ["--lora-rank", 4], Path("run/resume.safetensors")
    for out, more in (("run", argv), ("other", [*argv, "--seed", 1]), ("small", ["--lora-rank", 1])):
        assert run(pipeline, pairs, *more, "--out", out) == 0
    assert not same(*(load_file(f"{out}/checkpoint-0/{ADAPTERS}") for out in ("run", "other"))), "the seed draws them"
    lines, state, late = metrics(), load_file(path), json.dumps(progress() | {"update": 99})
    save_file(state, "late", {"progress": late}), save_file(state, "bare")
    Path("torn").write_bytes(path.read_bytes()[:10_000]), shutil.rmtree("run/checkpoint-4")
    files = {"small/resume.safetensors": "has the shape of", "other/resume.safetensors": "is of another run"}
    files |= {"late": "is of another run", "bare": "TypeError", "torn": f"{path} cannot be read", "no": "is missing"}
    for file, says in files.items():
        path.unlink() if file == "no" else shutil.copy(file, path)
        assert run(pipeline, pairs, *argv) == 2 and says in capsys.readouterr().err.splitlines()[-1], file
        assert metrics() == lines and Path("run/checkpoint-2").is_dir()
    (config := json.loads(Path("other/config.json").read_text()))["options"].pop("solver")  # an older config
    Path("other/resume.safetensors").unlink()  # a finished run needs none
    for text, code in {"[]": 2, "null": 2, '{"options": null}': 2, json.dumps(config): 0}.items():
        Path("other/config.json").write_text(text)
        assert run(pipeline, pairs, *argv, "--seed", 1, "--out", "other") == code, text
    assert "Done." in capsys.readouterr().out and len(metrics("other")) == 4


def test_the_readme():
    """Its map of lines is true, its code runs, its options exist."""
    text, lines = (HERE / "README.md").read_text(), (HERE / "seppo.py").read_text().splitlines()
    heads = [i for i, line in enumerate(lines, 1) if re.match(r"# ---- \d\.", line)]
    spans = [tuple(map(int, span)) for span in re.findall(r"\| (\d+) to (\d+) \|", text)]
    assert spans == [*((a, b - 1) for a, b in zip(heads[:4], heads[1:5])), (heads[4], len(lines))], "the map of lines"
    exec(next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "batch_loss" in block), {})
    known = "".join(file.read_text() for file in (HERE / "seppo.py", HERE / "eval.py", HERE / "assets/study.py"))
    given = {*re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)} - {"--help", "--index-url", "--nproc-per-node", "--scale"}
    assert not {word for word in given if f'"{word}"' not in known}


def test_missing_weights_are_refused(pipeline, pairs, capsys):  # from_pretrained would leave them random
    for part in ("unet", "vae", "text_encoder"):
        some = lambda state: {k: v for k, v in state.items() if "conv_in" not in k and "token_embedding" not in k}
        assert run(altered(pipeline, f"no-{part}", part, some), pairs) == 2
        assert "lacks weights" in capsys.readouterr().err, part
    shutil.rmtree(shutil.copytree(pipeline, Path("mute")) / "tokenizer")
    assert run("mute", pairs) == 2 and "tokenizer" in capsys.readouterr().err


def test_which_weights_a_path_means(pipeline, pairs, capsys):
    """WHERE/unet, else WHERE, else a run's last checkpoint; in half precision too."""
    assert run(pipeline, pairs, "--save-every", 1, "--steps", 2) == 0
    assert run(pipeline, pairs, "--unet", "run", "--out", "next", "--steps", 1) == 0
    assert same(weights("next/checkpoint-0/unet"), weights("run/checkpoint-2/unet"))
    shutil.copytree("run/checkpoint-1/unet", "out/unet"), shutil.copytree("run/checkpoint-2", "out/checkpoint-9")
    Path("run/checkpoint-3.tmp").mkdir()  # left by a kill
    taken = {"run": "run/checkpoint-2/unet", "out": "out/unet", "out/unet": "out/unet", "run/checkpoint-1": "out/unet"}
    for where, unet in taken.items():
        found = seppo.load_unet(where, "UNet2DConditionModel")
        assert same(found.state_dict(), weights(unet)) and "UNet2DConditionModel: " in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float16, low_cpu_mem_usage=False)
    pipe.save_pretrained("half", variant="fp16")
    assert run("half", pairs, "--steps", 1, "--out", "half-run") == 0
    halves = {name: p.half().float() for name, p in weights(pipeline / "unet").items()}
    assert same(weights("half-run/checkpoint-0/unet"), halves)
    assert same(seppo.load_unet("half/unet", "UNet2DConditionModel").state_dict(), halves)


def test_micro_batch_from_the_memory():
    o = seppo.parse_args(["--model", "m", "--data", "d", "--device", "cpu"])
    o.dtype = "fp16"
    room = {24: 1, 40: 4, 48: 8, 80: 16, 141: 32}  # {GB of a GPU: micro-batch}, with 15.5 GB taken and 10 % free
    assert {gb: seppo.choose_micro_batch(o, 0.9 * gb - 15.5 - 3.5) for gb in room} == room
    more = {"gradient_checkpointing": (True, 64), "resolution": (1024, 4), "batch_size": (6, 2), "dtype": ("fp32", 8)}
    for name, (value, n) in more.items():
        assert seppo.choose_micro_batch(argparse.Namespace(**vars(o) | {name: value}), 53) == n, name
    assert seppo.choose_micro_batch(o, -19) == 1, "there is no GPU"
    of_clips = argparse.Namespace(**vars(o) | dict(frames=16, gradient_checkpointing=True))
    assert seppo.choose_micro_batch(of_clips, 141) == 4, "an attention kernel takes at most 65,535 sequences"


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Captioned clips of 9 frames, and three unusable ones: too short, broken, a list of files."""
    folder, frames = tmp_path_factory.mktemp("clips"), [Image.open(io.BytesIO(jpeg(i, 80))) for i in range(9)]
    for name, codec, n in (("film.mp4", "mpeg4", 9), ("old.mpg", "mpeg1video", 9), ("short.mp4", "mpeg4", 2)):
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream(codec, rate=25, width=80, height=80, pix_fmt="yuv420p")
            for frame in frames[:n]:
                file.mux(stream.encode(av.VideoFrame.from_image(frame)))
            file.mux(stream.encode())
    frames[0].save(folder / "gif.gif", save_all=True, append_images=frames[1:])
    put(folder / "broken.mp4", "nothing of a film"), put(folder / "list.mp4", "#EXTM3U\n#EXTINF:1,\nfilm.mp4\n")
    [put(folder / f"{name}.txt", f"a {name}") for name in ("film", "old", "short", "gif", "broken", "list")]
    return folder


def test_clips(clips):
    frames = torch.stack([seppo.to_pixels(jpeg(i, 80), options("y")) for i in range(9)])
    o = lambda n: options(clips, "--motion-adapter", "y", "--frames", n)

    def chosen(name, n, start=0.0):  # which of the film's frames these n are
        clip = seppo.to_pixels(clips / name, o(n), start=start)
        assert clip.shape == (3, n, 64, 64)
        return (clip.transpose(0, 1)[:, None] - frames).abs().mean((2, 3, 4)).argmin(1).tolist()

    for name in ("film.mp4", "old.mpg", "gif.gif"):
        assert chosen(name, 4) == [0, 2, 5, 8], f"{name}: spread over 9 frames, too few for a stride of 4"
    assert chosen("gif.gif", 2) == [0, 4] and chosen("gif.gif", 2, 0.999) == [4, 8]
    film, data = seppo.to_pixels(clips / "film.mp4", o(4)), (clips / "film.mp4").read_bytes()
    assert torch.equal(seppo.to_pixels(clips / "film.mp4", o(4), mirror=True), film.flip(-1))
    turned = {(1, 0, 0, 0, -1): film.flip(-2), (0, 1, 0, 1, 0): film.mT, (-1, 0, 0, 0, 1): film.flip(-1)}
    for matrix, shown in (turned | {(0, 1, 0, -1, 0): film.mT.flip(-1)}).items():  # as players show it
        at, values = data.find(b"tkhd") + 44, b"".join((v << 16).to_bytes(4, "big", signed=True) for v in matrix)
        put(Path("turned.mp4"), data[:at] + values + data[at + len(values) :])
        assert close(seppo.to_pixels(Path("turned.mp4"), o(4)), shown, 0.02), matrix
    pytest.raises(ValueError, seppo.to_pixels, clips / "short.mp4", o(4)).match("2 frames, --frames is 4")
    fetched = rows_of(clips, 30, "--motion-adapter", "y", "--frames", 4)
    assert {row[1] for row in fetched} == {"a film", "a old", "a gif"}
    assert sum(row[-1] > 0 for row in fetched) == 15, "three of six, in each of five epochs"


@pytest.mark.parametrize("train", ["motion", pytest.param("all", marks=slow, id="slow-all")])
def test_video_end_to_end(pipeline, adapter, clips, monkeypatch, capsys, train):
    """Denoising errors are AnimateDiffPipeline's; both kinds of block recompute; the printed lines load the result."""
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", again := Mock(wraps=torch.utils.checkpoint.checkpoint))
    argv = ["--motion-adapter", adapter, "--frames", 4, "--train", train, "--caption-dropout", 0, "--guidance", 3]
    argv += ["--steps", 2, "--save-every", 2, "--generate-batch", 2]
    disturbed("other", load(pipeline / "unet"))
    assert run(pipeline, clips, *argv, "--unet", "other", "--steps", 1, "--out", "next") == 0
    found = load_as_printed(capsys.readouterr().out).unet.state_dict()
    wanted = {name: p for name, p in weights("other").items() if name in found}
    assert wanted and (train == "all" or same(wanted, found)), "its UNet is not the model's: it is saved too"
    assert run(pipeline, clips, *argv) == 0
    calls = {str(call.args[0]) for call in again.call_args_list}
    assert any("AnimateDiffTransformer3D" in call for call in calls) and len(calls) > 4
    pipe, part = load_as_printed(capsys.readouterr().out), "motion_adapter" if train == "motion" else "unet"
    start, end = (load_file(f"run/checkpoint-{n}/{part}/diffusion_pytorch_model.safetensors") for n in (0, 2))
    motion = {name for name in start if "motion_modules" in name}
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert motion & moved and (moved - motion if train == "all" else {*start} == motion)
    assert same(end, pipe.unet.state_dict())
    assert Image.open("run/samples/step-2.png").size == (120 + 4 * 66, 40 + 2 * (4 * 64 + 2)), "4 frames per clip"
    pipe.unet.load_state_dict(start, strict=train == "all")  # update 1, by hand
    assert (pipe.scheduler.config.beta_schedule, pipe.scheduler.config.clip_sample) == ("linear", False)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    t, _, eps, noise_w, noise_r = seppo.draws(0, range(4), (4, 4, 8, 8), 1000, 0)
    rows = rows_of(clips, 4, "--motion-adapter", adapter, "--frames", 4)
    with torch.no_grad():
        by_frame = lambda x: x.transpose(0, 1)
        x_w = [by_frame(latents_of(pipe, by_frame(row[2]), by_frame(n))) for row, n in zip(rows, noise_w)]
        size = dict(num_frames=4, num_inference_steps=2, guidance_scale=3.0, height=64, width=64)
        made = [pipe(row[1], latents=n[None], output_type="latent", **size).frames for row, n in zip(rows, noise_r)]
        context = encoded_words(pipe, [row[1] for row in rows]).repeat_interleave(4, 0)
        for x, name in ((torch.stack(x_w), "reference_w"), (torch.cat(made), "reference_r")):
            error = (pipe.unet(noising.add_noise(x, eps, t), t, context).sample - eps).square().mean()
            assert metrics()[0][name] == pytest.approx(error.item(), rel=1e-4), name


@pytest.mark.parametrize("method", ["seppo", "sspo --dtype fp16"])
def test_lora(pipeline, pairs, capsys, evaluate, method):
    """Only attention adapters train; checkpoints hold only them; diffusers loads them as printed."""
    argv = ["--lora-rank", 2, "--reference", "latest", "--lr", 1e-2, "--method", *method.split()]
    assert run(pipeline, pairs, *argv) == 0
    said, base, state = capsys.readouterr().out, load(pipeline / "unet"), load_file(f"run/checkpoint-4/{ADAPTERS}")
    pipe = load_as_printed(said)
    targets = [f"{name}.{kind}" for name, _ in base.named_modules() for kind in ("lora_A.weight", "lora_B.weight")]
    targets = {f"unet.{name}" for name in targets if re.search(r"attn[12]\.to_(q|k|v|out\.0)\.", name)}
    assert state.keys() == targets and {p.shape[i] for name, p in state.items() for i in ["B.w" in name]} == {2}
    n, trained = sum(p.numel() for p in base.parameters()), sum(p.numel() for p in state.values())
    held = float(re.search(r"plus (\S+) GB", said)[1]) / 4e-9
    assert "fp16" in method or held == pytest.approx(n + 5 * trained, rel=0.01), "nets share what does not train"
    assert metrics()[0]["loss"] == metrics()[2]["loss"] == pytest.approx(math.log(2), abs=1e-6), "reference is policy"
    fused = evaluation.load_checked("x", "run", base, "epsilon")
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    loaded, fused, base = (net.eval()(x, t, words).sample for net in (pipe.unet, fused, base))
    assert close(loaded, fused, 1e-4 * loaded.abs().max()) and not close(loaded, base, 0.01)
    assert evaluate("--unet", "run", f"file=run/checkpoint-2/{ADAPTERS}") == 0
    assert len({*evaluated()[1].values()}) == 21, "three models, each its own pictures"


def test_a_lora_has_the_strength_that_diffusers_gives_it_or_is_refused(pipeline, evaluate, monkeypatch, capsys):
    """Its alpha, here twice its rank, may be in the file header or in tensors. No part of a LoRA is left out."""
    for name in ("dora", "alpha"):
        unet = load(pipeline / "unet")
        torch.manual_seed(0)
        config = dict(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False, use_dora=name == "dora")
        unet.add_adapter(peft.LoraConfig(**config))
        layers = {n: p * (1 + ("magnitude" in n)) for n, p in peft.get_peft_model_state_dict(unet).items()}
        StableDiffusionPipeline.save_lora_weights(name, layers, unet_lora_adapter_metadata=config)
    state, base = load_file(f"alpha/{ADAPTERS}"), load(pipeline / "unet")
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(4.0) for name in state if "lora_A" in name}
    kohya = {name: 2 * p if "alpha" in name else p for name, p in convert_state_dict_to_kohya(state).items()}
    save_file(kohya, "kohya.safetensors"), save_file(state | alphas, "tensors.safetensors")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: {"me/lora": f"alpha/{file}"}[name])
    for names in (f"dora/{ADAPTERS}", f"alpha/{ADAPTERS} kohya.safetensors tensors.safetensors me/lora"):
        pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
        pipe.load_lora_weights(".", weight_name=names.split()[0]), pipe.fuse_lora(), pipe.unload_lora_weights()
        for where in names.split():
            fused = evaluation.load_checked("x", where, base, "epsilon").state_dict()
            assert distance(fused, pipe.unet.state_dict()) < 1e-4 * distance(fused, base.state_dict()), where
    changed = lambda a, b, state: {name.replace(a, b): p.clone() for name, p in state.items()}
    n, scales = len(state), changed("alpha", "dora_scale", {name: p for name, p in kohya.items() if "alpha" in name})
    wrong = [(n, state | changed("unet", "text_encoder", state)), (0, changed("unet.", "", state))]
    for taken, tensors in [*wrong, (n, kohya | scales), (n // 2, changed("attn1", "attn3", state))]:
        save_file(tensors, "wrong.safetensors")
        assert evaluate("--unet", "wrong.safetensors") == 2
        assert f"takes {taken} of {sum('alpha' not in k for k in tensors)} weights" in capsys.readouterr().err


def test_lora_of_motion_modules(pipeline, adapter, clips, capsys):
    argv = ["--motion-adapter", adapter, "--frames", 4, "--lora-rank", 2, "--generate-batch", 2, "--steps", 2]
    assert run(pipeline, clips, *argv) == 0
    pipe, state = load_as_printed(capsys.readouterr().out), load_file(f"run/checkpoint-2/{ADAPTERS}")
    loaded = {f"unet.{n}".replace(".default_0.", "."): p for n, p in pipe.unet.named_parameters() if "lora" in n}
    assert loaded.keys() == state.keys() and same(loaded, state) and all("motion_modules" in name for name in state)


def test_the_toy_task_starts_from_the_shipped_base(monkeypatch, capsys):
    few = dict(steps=2, save_every=2, batch_size=8, lr=0.01, sampler_steps=2)
    monkeypatch.setitem(seppo.MINI, "mini", seppo.MINI["mini"] | few)
    monkeypatch.setitem(seppo.SMALL, "sampler_steps", 2)  # of the images that are measured
    assert seppo.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    noise, captions = seppo.draws("samples", range(160), (12, 8, 8), 1, 0)[-1], seppo.CAPTIONS * 10
    nets = [load(f"runs/mini-seppo/checkpoint-{n}/unet") for n in (0, 2)]
    before, after = (seppo.mini_score(study.mini_pictures(net, captions, noise), captions) for net in nets)
    assert f"Mean score {before.mean():.2f} -> {after.mean():.2f} " in said and "python eval.py" in said
    assert f"better for {100 * (after > before).float().mean():.0f} % of 160 images" in said
    assert same(load_as_printed(said).state_dict(), nets[1].state_dict())
    assert same(weights("runs/mini-seppo/checkpoint-0/unet"), weights(seppo.MINI_BASE))
    assert metrics("runs/mini-seppo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    sheet, left, top = Image.open("runs/mini-seppo/samples/step-2.png"), 120, 40 + 2 * 66
    tile = sheet.crop((left, top, left + 64, top + 64)).resize((16, 16), Image.NEAREST)
    ideal = seppo.draw_mini(["a red square"], torch.zeros(1, 5))[0]
    assert sheet.height == 40 + 3 * 66 and (evaluation.to_tensor(tile) * 2 - 1 - ideal).abs().max() < 0.01
    assert seppo.main("--device cpu --lora-rank 2".split()) == 0
    assert "python eval.py --unet runs/mini-seppo-lora-rank-2" in capsys.readouterr().out
    assert evaluation.main("--device cpu --max-prompts 4 --out newest".split()) == 0
    assert "| mini-seppo-lora-rank-2 |" in capsys.readouterr().out, "the newest run"
    monkeypatch.setattr(seppo, "MINI_BASE", Path("elsewhere"))
    assert seppo.main([]) == 2 and "copy it from the repository" in capsys.readouterr().err
    monkeypatch.setitem(seppo.MINI, "mini-untrained", seppo.MINI["mini-untrained"] | dict(steps=12, batch_size=8))
    assert seppo.main(["--model", "mini-untrained", "--device", "cpu", "--out", "new"]) == 0
    rates = [2e-3 * min((u + 1) / 3, (12 - u) / 9) for u in range(12)]
    assert [line["lr"] for line in metrics("new")] == pytest.approx(rates)


def test_the_shipped_base_draws_what_its_captions_say():
    prompts, (captions, pictures, _) = evaluation.read_prompts("mini"), zip(*seppo.mini_rows("mini-mixture")[:480])
    noise, pictures = torch.stack(evaluation.start_noise(prompts, (12, 8, 8))), torch.stack(pictures)
    drawn = study.mini_pictures(load(seppo.MINI_BASE), prompts, noise)
    assert study.shape_accuracy(drawn, prompts) >= 0.9 and study.shape_accuracy(pictures, captions) >= 0.99
    ours, theirs = seppo.mini_score(drawn, prompts), seppo.mini_score(pictures, captions)
    assert abs(ours.mean() - theirs.mean()) < 0.05 and ours.std() > 0.7 * theirs.std()


def test_every_flaw_costs_score_and_the_preferred_picture_is_the_best_of_sixteen():
    disc, contrast = ["a red disc"] * 5, torch.tensor([0, 0.5, -0.5, 1, -1])
    score = lambda flaws: seppo.mini_score(seppo.draw_mini(disc, flaws), disc)
    wanted = torch.tensor([1, 0.7, 0.7, 0.4, 0.4])  # too much contrast costs as much as too little; plain grey has 0
    torch.testing.assert_close(score(contrast[:, None] * torch.eye(5)[2]), wanted)
    assert score(0.6 * torch.eye(5)).max() < 0.97 and close(seppo.mini_score(torch.zeros(5, 3, 16, 16), disc), 0)
    captions, preferred, others = zip(*seppo.mini_rows("mini"))
    best, other = (seppo.mini_score(torch.stack(p), captions) for p in (preferred, others))
    assert (best > other).all() and best.mean() == pytest.approx(0.775, abs=0.005), "as simulated; best of 4: 0.69"


REFUSED = """--lr 0 => --lr must be positive | --beta nan => --beta must be positive | --bet 3 => unrecognized
--batch-size 10 --micro-batch 4 => must divide --batch-size | --resolution 20 => multiple of 64
--lora-rank 2 --unet x => do not combine | --caption-dropout 2 => must be 0 to 1
--device tpu => --device tpu must be | --device cuda:99999999999 => must be cpu
--sampler-steps 1000 => must be below 1000
--frames 4 => clips need --motion-adapter | --model x => does not go with --model x
--data nowhere => does not go with --model mini: add --model | @y --motion-adapter x --frames 1 => --frames 2 or more
@pairs --model no-such/model => --model no-such/model cannot be read | @pairs --model lora => lora cannot be read
@pickapic => Pulkit996/pick-a-pic-v2 | @no/such => --data no/such cannot be read | @outside => outside the folder
@./nowhere => no such file or folder | @pairs --unet lora/run => no such file or folder | @lora --method dpo => Parquet
@pairs --unet adapter => holds a MotionAdapter | @clips --motion-adapter model => holds a UNet2DConditionModel
@clips --motion-adapter adapter --frames 9 => the limit is 8 | @pairs --out p.json/run => cannot be written
@clips --motion-adapter adapter --frames 4 --method dpo => captioned clips | @pairs --out flat => use another
@clips --motion-adapter adapter --frames 4 --unet headless => has no middle block | @pairs --out locked => another com
@pairs --model file => from_single_file | @pairs --unet file => from_single_file | @pairs --unet lora => single_file
RANK= => use torchrun | WORLD_SIZE=2 => use torchrun | @lora => beside x.jpg
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 => use torchrun | eval.py --protocol best => invalid choice
eval.py --scorers clip,beauty => choose from pickscore | eval.py --scorers mini => for --model mini
eval.py --scorer-weights no => not a folder | eval.py --scorer-weights flat => a folder for each repository
eval.py --unet x=no => --unet x=no cannot be read | eval.py --unet a= => has no path
eval.py --unet a=nan => non-finite
eval.py --unet a=bare a=wide => a name of its own | eval.py --unet a=wide => differs in shape
eval.py --unet a=old => predicts v_prediction | eval.py --unet a=v => predicts v_prediction
eval.py --prompts no.txt => cannot be read | eval.py --prompts empty.txt => holds no prompt
eval.py --prompts p.json => entry 1 has no prompt | eval.py --prompts null.jsonl => entry 2 has no prompt
eval.py --prompts torn.jsonl => torn.jsonl, line 3: Expecting ',' delimiter | eval.py --prompts p.csv => must be .txt
eval.py --model no => --model no cannot be read | eval.py --max-prompts 0 => positive | eval.py --out p.csv => written
eval.py --resolution 100 => multiple of 64 | eval.py --frames 3 => clips need --motion-adapter
eval.py --model mini --resolution 16 --prompts mini => makes one"""


@pytest.fixture(scope="session")
def refused(pipeline, adapter, clips, tmp_path_factory):  # a folder with what REFUSED names
    home = tmp_path_factory.mktemp("refused")
    files = {"torn.jsonl": '"a"\n\n{"prompt": "a 5" disc"}\n"b"', "empty.txt": " ", "p.json": "{}", "p.csv": "a"}
    files |= {"null.jsonl": '"a"\nnull', "flat/config.json": '{"_class_name": "UNet2DConditionModel"}'}
    files |= {"outside/metadata.jsonl": '{"file_name": "../secret.jpg", "text": "a"}', "prompts.txt": "picture 0"}
    files |= {"old/config.json": '{"options": {"model": "x"}, "sampler": {"prediction_type": "v_prediction"}}'}
    files |= {"pairs/pairs.parquet": pickapic_rows(4), "lora/x": "", "locked/lock": ""}
    [put(home / name, data) for name, data in files.items()]
    [(home / name).symlink_to(where) for name, where in (("model", pipeline), ("adapter", adapter), ("clips", clips))]
    [save_file({"x": torch.zeros(1)}, home / name) for name in ("file", f"lora/{ADAPTERS}")]
    for name in ("bare", "old/unet", "nan"):
        disturbed(home / name, load(pipeline / "unet"), math.nan if name == "nan" else 1)
    for name, change in (("headless", {"mid_block_type": None}), ("wide", {"cross_attention_dim": 32})):
        UNet2DConditionModel.from_config(load(pipeline / "unet").config | change).save_pretrained(home / name)
    levels = shutil.copytree(pipeline, home / "v") / "scheduler/scheduler_config.json"
    put(levels, levels.read_text().replace('"epsilon"', '"v_prediction"'))
    with open(home / "locked/lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield home


@pytest.mark.parametrize("case", re.split(r" \| |\n", REFUSED))
def test_refusals_are_one_line_and_precede_the_work(refused, evaluate, case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(refused)
    words, says = case.replace("@", "--model model --resolution 64 --data ").split(" => ")
    [monkeypatch.setenv(*pair.split("=")) for pair in re.findall(r"[A-Z_]+=\S*", words)]
    argv = [word for word in words.split() if not re.match("[A-Z_]+=", word)]
    trains = argv[:1] != ["eval.py"]
    assert (seppo.main(["--device", "cpu", *argv]) if trains else evaluate("--out", tmp_path, *argv[1:])) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "pictures:" not in line]
    assert len(err) == 1 and says in err[0] and re.match(r"(seppo|eval)\.py: ", err[0]), err
    assert says == "non-finite" or not [*tmp_path.rglob("*.png")], "it is said before the work"
    assert [path.name for path in Path("locked").iterdir()] == ["lock"]


LINE = '{"file_name": "0.jpg", "text": "a"}'
TABLES = {f"{LINE}\n\n{LINE[:-1]}": "jsonl, line 3: ", f"[\n{LINE},\n{LINE},]": "jsonl, line 3: "}
TABLES |= {LINE.replace("0", "train/0"): "/train/train/0.jpg"}
for line in ({"file_name": "0.jpg", "caption": "a"}, "0.jpg", None, {"file_name": 5, "prompt": "a"}):
    TABLES |= {json.dumps(v): f"has {line}, not the keys file_name and text" for v in ([line], line)}


@pytest.mark.parametrize("table", TABLES)
def test_broken_metadata_is_quoted(pipeline, table, capsys):
    captioned("a", "train/0.jpg").joinpath("train/metadata.jsonl").write_text(table)
    assert run(pipeline, "a") == 2 and TABLES[table] in capsys.readouterr().err.splitlines()[0]


BROKEN = {"100 tries found no": ("jpg", b"x"), "100 megapixels, the limit is 64": ("jpg", USELESS["a bomb"])}
BROKEN |= {"no readable picture": ("jpg", str(HERE / "LICENSE")), "the last: None: no caption": ("caption", None)}
BROKEN |= {"could not convert string": ("label_0", {"a": 1}), "row group holds only ties": ("label_0", 0.5)}
BROKEN |= {"has no bytes": ("jpg", {"bytes": None, "path": "a.jpg"}), "label_0 is 0.7": ("label_0", 0.7)}


@pytest.mark.parametrize("says", [*BROKEN, "lacks Pick-a-Pic's column label_0"])
def test_broken_parquet(pipeline, tmp_path, says, capsys):
    rows, (column, value) = pickapic_rows(8), BROKEN.get(says, ("", None))
    rows |= {name: [value] * 8 for name in rows if column and name.startswith(column)}
    rows = {name: values for name, values in rows.items() if column or name != "label_0"}
    assert run(pipeline, put(tmp_path / "x.parquet", rows)) == 2
    assert says in (err := capsys.readouterr().err) and "Traceback" not in err


def test_run_names_option_spellings_and_defaults():
    given = {"": "seppo", "--seed 1": "seppo-seed-1", "--lr 1e-5": "seppo-lr-1e-05", "--method sft": "sft"}
    for argv, name in (given | {"--flip none --micro-batch 32": "seppo-flip-none"}).items():
        assert str(seppo.parse_args(argv.split()).out) == f"runs/mini-{name}"
    argv = "--pretrained_model_name_or_path m --dataset_name=d --learning_rate 1 --max_train_steps 9 --output_dir o"
    o = seppo.parse_args([*argv.split(), "--mixed_precision", "no", "--num_inference_steps", "3"])
    assert (o.model, o.data, o.lr, o.steps, o.out, o.dtype) == ("m", "d", 1.0, 9, Path("o"), "fp32")
    o = seppo.parse_args(["--model", "m", "--data", "d", "--motion-adapter", "a", "--device", "cpu"])
    assert (o.beta, o.save_every, o.batch_size, o.guidance, o.caption_dropout) == (2000, 30, 2048, 7.5, 0.2)
    assert (o.lr, o.steps, o.sampler_steps, o.lr_schedule, o.solver) == (2.048e-5, 210, 20, "constant", "dpm++")
    assert (o.frames, o.train, o.generate_batch, o.gradient_checkpointing) == (16, "motion", 1, True)


# ---- Evaluation -----------------------------------------------------------------------------------------------------


def test_table_from_known_scores():
    base = {"pickscore": torch.tensor([0.20, 0.21, 0.22, 0.21]), "imagereward": None}
    better = {"pickscore": torch.tensor([0.21, 0.22, 0.22, 0.20]), "imagereward": None}  # two wins, a tie, a loss
    rows = evaluation.table({"base": base, "ours": better}, paper=True).splitlines()[2:]
    assert rows[0] == "| base | 21.00 ± 0.41 |  | missing |  |"
    assert rows[1] == "| ours | 21.25 ± 0.48 | 62.5 % [21.9, 90.8] | missing |  |"
    assert rows[2] == "| *SePPO, the paper's own figures* | 21.57 |  | 0.615 |  |"


def test_noise_belongs_to_the_prompt():
    of_four = evaluation.start_noise(["a", "b", "a", "c"], (4, 8, 8), seed=1)
    for subset, places in ((["c", "a"], [3, 0]), (["b"], [1]), (["a", "a"], [0, 2])):
        for place, noise in zip(places, evaluation.start_noise(subset, (4, 8, 8), seed=1)):
            assert torch.equal(noise, of_four[place]), "a prompt's noise depends on the other prompts"
    assert len({noise.sum().item() for noise in of_four + evaluation.start_noise(["a"], (4, 8, 8), seed=2)}) == 5


def test_prompts_of_every_form():
    wanted = ["two cats", "a dog, “quoted”"]
    files = {"p.txt": "\ufefftwo cats\n\n  a dog, “quoted”\r\n", "p.json": json.dumps([{"prompt": p} for p in wanted])}
    for name, text in (files | {"p.jsonl": "".join(json.dumps({"caption": p}) + "\n" for p in wanted)}).items():
        assert evaluation.read_prompts(put(Path(name), text)) == wanted
    assert evaluation.read_prompts("mini") == seppo.CAPTIONS * 30
    assert evaluation.clean("\ufeffa “b”\n\t‘c’ &amp;amp; d ") == "a \"b\" 'c' & d"  # as ftfy and html.unescape do
    assert evaluation.clean("Ｆｕｌｌ，width cafe\u0301") == "Full,width café"


def test_named_prompts_come_from_the_right_files_in_order(monkeypatch):
    """Pick-a-Pic's are validation_unique only, HPD's are ordered by style, Parti's are read by their column name."""
    styles = ("anime", "concept-art", "paintings", "photo")
    files = {f"{style}.json": json.dumps([f"{style} {i}" for i in range(800)]) for style in reversed(styles)}
    files["PartiPrompts.tsv"] = "Prompt\tCategory\n" + "".join(f'a "{i}\tPeople\n' for i in range(1632))
    for split in ("test", "test_unique", "train", "validation", "validation_unique"):
        files[f"all/data/{split}-0.parquet"] = {"caption": [f"{split} {i}" for i in range(500)]}
    [put(Path(name), data) for name, data in files.items()]

    def snapshot(name, repo_type, allow_patterns):
        if name == "yuvalkirstain/pickapic_v2_no_images":
            raise OSError("it has left the hub")
        left = lambda _, names: [n for n in names if n != "data" and not Path("data", n).match(allow_patterns)]
        return shutil.copytree("all", "taken", ignore=left)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, repo_type: Path(file).name)
    assert evaluation.read_prompts("pickapic") == [f"validation_unique {i}" for i in range(500)]
    assert evaluation.read_prompts("hpsv2") == [f"{style} {i}" for style in styles for i in range(800)]
    assert evaluation.read_prompts("parti") == [f'a "{i}' for i in range(1632)]


HEAD = {"2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}
head_state = lambda width: linears("layers.", **{"0": (1024, width)} | HEAD)
VISION, TEXT, DEPTH, PATCH, BERT_TEXT = 128, 64, 2, 56, 32  # widths, layers and so on of the tiny scorers
WIDTH = {evaluation.H14: 48, evaluation.CLIPS["pickscore"]: 48, evaluation.L14: 32}  # of a CLIP's vectors
PROMPTS = ["a red fox, 8k", "A  Painting of &amp; two moons " * 9, "“cat”"]
# what the scorers' original code gives for these weights, pictures and prompts (fp32, on a CPU)
EXPECTED = {"hpsv2": [-0.1995323, -0.0927444, -0.3687989], "hpsv2-aliased": [-0.1991733, -0.0924639, -0.3681261]}
EXPECTED |= {"hpsv2.1": [-0.2518828, -0.1314805, -0.356244], "imagereward": [3.4114513, 3.0269389, 3.2150545]}
EXPECTED |= {"pickscore": [-0.1993654, -0.0711491, -0.3062271], "clip": [0.1329802, 0.2335817, -0.0271757]}
EXPECTED |= {"aesthetic": [-1.1151464, -0.5988638, -0.8857701]}


def seeded(name, *shape):  # weights that depend on their name alone
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seppo.key(name)))
    return x * (0.3 if len(shape) < 2 else 1.2 / math.sqrt(math.prod(shape[1:])))


def linears(prefix, **shapes):
    """{name (__ for a dot): (out, into) of a linear layer, or (width,) of a norm} -> their weights and biases."""
    shapes = {prefix + name.replace("__", "."): shape for name, shape in shapes.items()}
    state = {f"{name}.weight": seeded(name, *shape) + (len(shape) == 1) for name, shape in shapes.items()}
    return state | {f"{name}.bias": seeded(name + "b", shape[0]) for name, shape in shapes.items()}


def openai_clip(dim):  # a CLIP's state dict under OpenAI's names, which open_clip and HPSv2 share
    s = {"visual.class_embedding": seeded("class", VISION), "positional_embedding": seeded("pos", 77, TEXT)}
    s |= {"visual.positional_embedding": seeded("vpos", (224 // PATCH) ** 2 + 1, VISION)}
    s |= {"visual.conv1.weight": seeded("conv", VISION, 3, PATCH, PATCH), "visual.proj": seeded("vproj", VISION, dim)}
    s |= {"token_embedding.weight": 8 * seeded("tokens", 78, TEXT), "text_projection": seeded("tproj", TEXT, dim)}
    s |= linears("", visual__ln_pre=(VISION,), visual__ln_post=(VISION,), ln_final=(TEXT,))
    for tower, w in (("visual.", VISION), ("", TEXT)):
        for i in range(DEPTH):
            p = f"{tower}transformer.resblocks.{i}."
            s |= {p + "attn.in_proj_weight": seeded(p, 3 * w, w), p + "attn.in_proj_bias": seeded(p + "b", 3 * w)}
            s |= linears(p, ln_1=(w,), ln_2=(w,), attn__out_proj=(w, w), mlp__c_fc=(4 * w, w), mlp__c_proj=(w, 4 * w))
    return s | {"logit_scale": torch.tensor(4.6)}


def imagereward_state(depth=DEPTH):  # ImageReward.pt: BLIP's two encoders, then linear layers
    v, t, vw, w = "blip.visual_encoder.", "blip.text_encoder.", TEXT, BERT_TEXT
    s = {v + "cls_token": seeded("cls", 1, 1, vw), v + "pos_embed": seeded("vpos", 1, (224 // PATCH) ** 2 + 1, vw)}
    s |= {v + "patch_embed.proj.weight": seeded("patch", vw, 3, PATCH, PATCH)}
    s |= {v + "patch_embed.proj.bias": seeded("patchb", vw), t + "embeddings.position_ids": torch.arange(64)[None]}
    s |= {t + "embeddings.word_embeddings.weight": seeded("words", 99, w) * 8}
    s |= {t + "embeddings.position_embeddings.weight": seeded("pos", 64, w)}
    s |= linears(v, norm=(vw,)) | linears(t, embeddings__LayerNorm=(w,))
    for i in range(depth):
        p, q = f"{v}blocks.{i}.", f"{t}encoder.layer.{i}."
        s |= linears(p, norm1=(vw,), norm2=(vw,), attn__qkv=(3 * vw, vw), attn__proj=(vw, vw))
        s |= linears(p, mlp__fc1=(4 * vw, vw), mlp__fc2=(vw, 4 * vw))
        for attention, into in (("attention.", w), ("crossattention.", vw)):
            s |= linears(q + attention, self__query=(w, w), self__key=(w, into), self__value=(w, into))
            s |= linears(q + attention, output__LayerNorm=(w,), output__dense=(w, w))
        s |= linears(q, output__LayerNorm=(w,), intermediate__dense=(2 * w, w), output__dense=(w, 2 * w))
    return s | {f"mlp.{name}": tensor for name, tensor in head_state(w).items()}


@pytest.fixture(scope="session")
def scorer_weights(tmp_path_factory):
    """All scorers' files in the layout of the hub, at small random sizes."""
    root = tmp_path_factory.mktemp("scorers")
    for repository, dim in WIDTH.items():
        act = "quick_gelu" if repository == evaluation.L14 else "gelu"
        both = dict(num_hidden_layers=DEPTH, num_attention_heads=2, hidden_act=act, projection_dim=dim)
        text = both | dict(hidden_size=TEXT, intermediate_size=4 * TEXT, vocab_size=78, eos_token_id=77)
        vision = both | dict(hidden_size=VISION, intermediate_size=4 * VISION, patch_size=PATCH)
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim)
        (clip := transformers.CLIPModel(config)).load_state_dict(evaluation.from_open_clip(openai_clip(dim)))
        clip.save_pretrained(root / repository), TOKENIZER.save_pretrained(root / repository)
    states = {f"{evaluation.AESTHETIC}/{evaluation.AESTHETIC_FILE}": head_state(WIDTH[evaluation.L14])}
    states |= {"zai-org/ImageReward/ImageReward.pt": imagereward_state()}
    for name, factor in (("v2", 1.0), ("v2.1", 0.9)):
        half = {key: tensor.half() * factor for key, tensor in openai_clip(WIDTH[evaluation.H14]).items()}
        states |= {f"xswu/HPSv2/HPS_{name}_compressed.pt": {"state_dict": half}}
    [torch.save(state, put(root / file, "")) for file, state in states.items()]
    config = dict(hidden_size=BERT_TEXT, num_hidden_layers=DEPTH, num_attention_heads=4, vocab_size=99)
    config |= dict(intermediate_size=64, max_position_embeddings=64, encoder_width=768, add_cross_attention=True)
    put(root / "zai-org/ImageReward/med_config.json", json.dumps(config))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS[:36], *(f"##{c}" for c in LETTERS[:36])]
    tokenizer = transformers.BertTokenizer(str(put(root / "vocab.txt", "\n".join(words))))
    tokenizer.save_pretrained(root / evaluation.BERT)
    return root


@pytest.mark.parametrize("name", EXPECTED)
def test_scorers_reproduce_the_original_scores(name, scorer_weights):
    sizes = ((64, 64), (300, 200), (513, 640))
    images = [Image.open(io.BytesIO(jpeg(i, 256))).resize(size) for i, size in enumerate(sizes)]
    scorer = evaluation.load_scorer(name.split("-")[0], scorer_weights, antialias="aliased" not in name)
    scores = scorer.score(images, PROMPTS)
    torch.testing.assert_close(scores, torch.tensor(EXPECTED[name]), rtol=1e-6, atol=2e-6)
    alone = torch.cat([scorer.score([image], [prompt]) for image, prompt in zip(images, PROMPTS)])
    torch.testing.assert_close(scores, alone, rtol=1e-6, atol=2e-6)
    pytest.raises(ValueError, scorer.score, images, PROMPTS[:2])


@pytest.fixture
def evaluate(pipeline, scorer_weights):
    Path("prompts.txt").write_text("\n".join(f"picture {i}" for i in range(7)))
    tiny = "--prompts prompts.txt --out out --resolution 64 --sampler-steps 2 --batch-size 3 --device cpu"
    tiny = ["--model", pipeline, "--scorer-weights", scorer_weights, "--scorers", "clip,aesthetic,clip", *tiny.split()]
    return lambda *argv: evaluation.main([str(word) for word in (*tiny, *argv)])


def disturbed(folder, net, size=0.05):  # saves the net with noise added to its weights
    torch.manual_seed(0)
    for p in net.parameters():
        p.data += size * torch.randn_like(p)
    net.save_pretrained(folder)


def evaluated(folder="out"):  # the lines of scores.jsonl, and the pictures' bytes by their names there
    rows = [json.loads(line) for line in Path(folder, "scores.jsonl").read_text().splitlines()]
    return rows, {row["file"]: Path(folder, row["file"]).read_bytes() for row in rows}


def test_evaluation_end_to_end(pipeline, scorer_weights, evaluate, capsys):
    for folder, size in (("run/checkpoint-2/unet", 0.05), ("run/checkpoint-10/unet", 0.1), ("bare", 0.2)):
        disturbed(folder, load(pipeline / "unet"), size)
    Path("run/config.json").write_text('{"options": {"model": "sd"}, "sampler": {"prediction_type": "epsilon"}}')
    assert evaluate("--unet", "ours=run", "run/checkpoint-2", "bare") == 0
    said, bars = capsys.readouterr()
    assert said.count("was trained from sd, but --model is ") == 2 and "bare: pictures: 100%" in bars and "3/3" in bars
    (rows, pictures), models = evaluated(), ["base", "ours", "run-checkpoint-2", "bare"]
    assert [(row["model"], row["index"]) for row in rows] == [(model, i) for model in models for i in range(7)]
    scores = {model: torch.tensor([row["clip"] for row in rows if row["model"] == model]) for model in models}
    assert Path("out/table.md").read_text() in said + "\n"
    for model, x in [*scores.items()][1:]:  # the table says what the scores say
        wins = 100 * (x > scores["base"]).double().mean()
        assert f"| {model} | {100 * x.mean():.2f} ± {100 * x.std() / 7**0.5:.2f} | {wins:.1f} %" in said
    opened = [Image.open(Path("out", row["file"])) for row in rows]
    scored = evaluation.load_scorer("clip", scorer_weights).score(opened, [f"picture {row['index']}" for row in rows])
    assert [row["clip"] for row in rows] == pytest.approx(scored.tolist(), abs=1e-5)
    assert len({*pictures.values()}) == 28, "every model's picture of every prompt is its own"
    cell = Image.open("out/grid.png").crop((2 * 192 + 2, 28 + 5 * 192 + 2, 3 * 192 - 2, 28 + 6 * 192 - 2))
    assert cell.tobytes() == opened[5 + 7].resize((188, 188), 0).tobytes(), "row 6, second model"


def test_missing_scorers_are_found_first_and_equal_models_tie(pipeline, evaluate, scorer_weights, monkeypatch, capsys):
    shutil.copytree(scorer_weights / evaluation.L14, Path("some", evaluation.L14))
    some = ("--scorer-weights", "some", "--scorers")
    assert evaluate(*some, "pickscore,hpsv2") == 2 and not [*Path("out/pictures").iterdir()]
    assert "some lacks yuvalkirstain/PickScore_v1/config.json, which PickScore needs; some" in capsys.readouterr().err
    shutil.copytree(scorer_weights, "torn"), put(Path("torn", evaluation.L14, "tokenizer.json"), "{}")
    torch.save(imagereward_state(depth=1), "torn/zai-org/ImageReward/ImageReward.pt")
    for name in ("clip", "imagereward"):  # never a score from an empty vocabulary or random weights
        assert evaluate("--scorer-weights", "torn", "--scorers", name) == 2 and not [*Path("out/pictures").iterdir()]
    assert evaluate("--scorers", "none", "--out", "bare") == 0 and Path("bare/grid.png").exists()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, local_files_only: {True: ""}[local_files_only])
    pytest.raises(seppo.UserError, evaluation.find_files, "clip")  # without a network it looks in the cache only
    assert evaluate(*some, "clip,pickscore", "--unet", f"same={pipeline}/unet", "--seed", -7) == 0
    said, (rows, pictures) = capsys.readouterr().out, evaluated()
    assert "PickScore is missing: some lacks" in said and "| 50.0 % [" in said and "missing |" in said
    assert "dpm++ (algorithm_type dpmsolver++, beta_end 0.012" in said and "timestep_spacing trailing" in said
    assert all(pictures[row["file"]] == pictures[rows[row["index"]]["file"]] for row in rows)
    os.truncate(torn := Path("out", rows[3]["file"]), 100)
    assert evaluate(*some, "clip", "--seed", -7) == 2 and f"{torn} cannot be read" in capsys.readouterr().err
    nan = altered(pipeline, "nan", "vae", lambda state: {name: v * math.nan for name, v in state.items()})
    assert evaluate("--model", nan) == 2 and "'picture 0' gives non-finite pixels" in capsys.readouterr().err


def test_pictures_match_diffusers_and_each_protocol_has_its_resize(pipeline, evaluate, scorer_weights):
    """The paper's protocol: PNDM, one generator for all prompts, the base's noise levels."""
    o = evaluation.parse_args(["--model", "x", "--protocol", "paper"])
    assert (o.solver, o.sampler_steps, o.guidance, o.resolution, o.seed) == ("pndm", 50, 7.5, 512, 0)
    paper, g = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None), torch.Generator().manual_seed(0)
    paper = functools.partial(paper, generator=g, num_inference_steps=4, guidance_scale=7.5, height=256, width=256)
    for protocol in ("paper", "paired"):
        argv = ["--protocol", protocol, "--max-prompts", 2, "--resolution", 256, "--scorers", "hpsv2"]
        assert evaluate(*argv, "--sampler-steps", 4) == 0
        rows = evaluated()[0]
        made, prompts = [Image.open(Path("out", row["file"])) for row in rows], [row["prompt"] for row in rows]
        for prompt, picture in zip(prompts, made) if protocol == "paper" else ():
            difference = 255 * (evaluation.to_tensor(paper(prompt).images[0]) - evaluation.to_tensor(picture))
            assert difference.abs().max() < 1.01 and difference.mean().abs() < 0.1, "rounded, not truncated"
        scorer = evaluation.load_scorer("hpsv2", scorer_weights, antialias=protocol == "paired")
        assert [row["hpsv2"] for row in rows] == pytest.approx(scorer.score(made, prompts).tolist(), abs=2e-6)
        assert "the paper's own figures" not in Path("out/table.md").read_text(), "they are for other prompts"


def test_clips_are_what_animatediff_draws(pipeline, adapter, evaluate, scorer_weights):
    """A clip is saved as a filmstrip, its score is the mean over frames; another adapter counts as another model."""
    disturbed("other", diffusers.MotionAdapter.from_pretrained(adapter), 0.5)
    argv = ["--motion-adapter", adapter, "--frames", 3, "--max-prompts", 2, "--unet", "x=other", "--guidance", 3]
    assert evaluate(*argv, "--batch-size", 2) == 0
    scorer = evaluation.load_scorer("clip", scorer_weights)
    noises = evaluation.start_noise(["picture 0", "picture 1"], (4, 3, 8, 8))
    rows = evaluated()[0]
    middle = Image.open(Path("out", rows[0]["file"])).crop((64, 0, 128, 64)).resize((188, 188), 0)
    assert Image.open("out/grid.png").crop((194, 30, 382, 218)).tobytes() == middle.tobytes()
    for row in rows:
        loaded = diffusers.MotionAdapter.from_pretrained("other" if row["model"] == "x" else adapter)
        pipe = diffusers.AnimateDiffPipeline.from_pretrained(pipeline, motion_adapter=loaded)
        levels = LEVELS | dict(beta_schedule="linear", timestep_spacing="trailing")
        pipe.scheduler = DPMSolverMultistepScheduler(**levels)
        size = dict(num_frames=3, num_inference_steps=2, guidance_scale=3.0, height=64, width=64)
        frames = pipe(row["prompt"], latents=noises[row["index"]][None], **size).frames[0]
        strip = evaluation.to_tensor(Image.open(Path("out", row["file"])))
        assert close(strip, torch.cat([*map(evaluation.to_tensor, frames)], 2), 1.01 / 255), row["model"]
        assert row["clip"] == pytest.approx(scorer.score(frames, [row["prompt"]] * 3).mean().item(), abs=1e-4)


def test_evaluation_resumes_and_reuses(pipeline, evaluate, monkeypatch):
    """Interrupted and restarted, it makes the same files; whatever changes a picture changes its name."""
    disturbed("other", load(pipeline / "unet"))
    assert evaluate("--unet", "x=other", "--out", "straight") == 0
    draw, ctrl_c = seppo.sample, Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(seppo, "sample", sample := Mock())
    sample.side_effect = lambda *args: draw(*args) if sample.call_count != 2 else ctrl_c()
    assert evaluate("--unet", "x=other") == 130
    next(Path("out/pictures/base").glob("00001-*.png")).unlink()  # its batch of three is made again, and no other
    assert evaluate("--unet", "x=other") == 0 and sample.call_count == 2 + 6 and evaluated() == evaluated("straight")

    def makes(*argv):  # how many pictures are made for one prompt
        sample.reset_mock()
        assert evaluate("--scorers", "aesthetic", "--max-prompts", 1, *argv) == 0
        return sample.call_count

    assert makes() == 0, "a subset needs no new picture"
    for setting in ("--seed 1", "--guidance 3", "--solver ddim", "--sampler-steps 3", "--protocol paper"):
        assert makes(*setting.split()) == 1, setting
    disturbed("other", load(pipeline / "unet"), 0.2)
    assert makes("--unet", "x=other") == 1, "other weights under the same name"
    more = lambda state: {name: 1.1 * p if p.is_floating_point() else p for name, p in state.items()}
    for part in ("vae", "text_encoder"):
        assert makes("--model", altered(pipeline, part, part, more)) == 1, f"another {part}"
    words = shutil.copytree(pipeline, Path("words")) / "tokenizer/tokenizer.json"
    put(words, words.read_text().replace('"p":', '"P":'))
    assert makes("--model", "words") == 1, "other tokens of the same prompt"


# ---- The study ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bases(monkeypatch):  # other base models, runs of two updates, and 32 pictures per measurement
    few = dict(steps=2, save_every=1, batch_size=8, micro_batch=8, generate_batch=8, sampler_steps=2)
    monkeypatch.setitem(seppo.MINI, "mini", seppo.MINI["mini"] | few)
    monkeypatch.setitem(seppo.SMALL, "sampler_steps", 2)  # of the images that are measured
    monkeypatch.setattr(seppo.Trainer, "sample_images", lambda self, captions: torch.zeros(len(captions), 3, 16, 16))
    monkeypatch.setattr(study, "PROMPTS", seppo.CAPTIONS * 2)
    monkeypatch.setattr(study, "BASES", {"far": Path("far").absolute(), "near": Path("near").absolute()})
    far, near = seppo.untrained_mini(), seppo.untrained_mini()
    near.conv_out.weight.data *= -1
    far.save_pretrained("far"), near.save_pretrained("near")
    return far, near


@pytest.mark.parametrize("command", ["near --method sspo", "far --method seppo --reference initial"])
def test_a_line_of_the_study_is_what_its_command_gives(bases, command):
    line = study.run_cell(*command.split(" --method "), 1e-2, 125, 3)
    assert seppo.main(f"--lr 1e-2 --beta 125 --seed 3 --device cpu --out mine --unet {command}".split()) == 0
    noise, codec = torch.stack(evaluation.start_noise(study.PROMPTS, (12, 8, 8))), seppo.Miniature("cpu")
    rest = dict(context=codec.encode_text(study.PROMPTS), empty=None, steps=2, guidance=1)
    pixels = codec.decode(seppo.sample(load("mine/checkpoint-2/unet"), codec.scheduler, noise, **rest))
    assert line["score"] == pytest.approx(seppo.mini_score(pixels, study.PROMPTS).mean().item(), abs=1e-6)
    assert line["sign_pos"] == pytest.approx(sum(update["sign_pos"] for update in metrics("mine")) / 2)


def test_what_the_study_measures():
    """Half the contrast halves the score, which the best gain restores; a wrong colour does not hide a shape."""
    ideal, words = seppo.draw_mini(study.PROMPTS, torch.zeros(480, 5)), [prompt.split() for prompt in study.PROMPTS]
    pale, preferred = study.measure(ideal / 2), study.run_cell("far", "preferred", 0, 0, 0)
    assert [pale[name] for name in ("score", "gained", "shape", "clipped")] == pytest.approx([0.5, 1, 1, 0])
    assert study.shape_accuracy(ideal, [f"a red {shape}" for *_, shape in words]) == 1
    assert study.shape_accuracy(ideal, [f"a {colour} disc" for _, colour, _ in words]) == 0.25
    assert abs(preferred["distance"]) < 0.05 < 5 < pale["distance"] and preferred["clipped"] == 0, "|pixels| <= 0.96"
    assert study.energy_distance(torch.zeros(3, 4), torch.full((5, 4), 2.0)) == 8, "twice the distance of two points"


def test_each_form_of_the_sign_equals_a_plain_rewrite(bases):
    (policy, reference), codec, texts = bases, seppo.Miniature("cpu"), seppo.CAPTIONS
    t, _, eps, x_w, noise = seppo.draws("forms", range(16), (12, 8, 8), 1000, 0)
    batch = dict(x_w=0.1 * x_w, eps=eps, t=t, context=codec.encode_text(texts))
    error = lambda net, new: seppo.denoising_error(net, codec.scheduler, *(batch | new).values()).detach()
    advantage = lambda **new: error(reference, new) - error(policy, new)
    scores = (seppo.mini_score(study.mini_pictures(net, texts, noise), texts) for net in bases)
    g, shuffled = torch.Generator().manual_seed(0), torch.randperm(16, generator=torch.Generator().manual_seed(0))
    drawn = [dict(t=torch.randint(1000, t.shape, generator=g), eps=torch.randn(eps.shape, generator=g)) for _ in t[:8]]
    mean, none = advantage().mean().expand(16), torch.zeros(16)
    wanted = {"independent draw": [advantage(**drawn[0])], "8 draws": [sum(advantage(**new) for new in drawn)]}
    wanted |= {"coin": [advantage()[shuffled]], "oracle": [torch.sub(*scores)], "batch's mean": [mean]}
    for mode, signs in (wanted | {"previous mean": [none, mean, none]}).items():  # in three updates
        trainer = study.Anchored(mode, seppo.parse_args(["--device", "cpu"]), policy, codec)
        for index, known in zip((3, 3, 4), signs):
            trainer.reference, trainer.reference_index = reference, index
            assert torch.equal(trainer.anchor_sign(batch, texts, noise), known.sign()), mode
    half = study.run_cell("far", "half", 1e-2, 5, 0)
    assert half["sign_pos"] == 1 and {*advantage().sign().tolist()} == {-1, 1}, "the loss's signs would be 0 at first"


def test_the_sign_against_a_planted_truth(tmp_path, monkeypatch):
    """x^r is better for 2 of 4 winners; signs -1 are right in 3 of 4 (single draws) and 2 of 3 (mean error)."""
    errors = [*map(iter, ([[1.0, 1, 3, 3], [1.0, 3, 3, 1]], [[2.1] * 4] * 2, [[2.1] * 4] * 2))]  # by model and draw
    scores, rows = iter([[1.0, 0, 0, 1], [0.4] * 4, [0.4] * 4]), seppo.mini_rows("mini", 4, 1000)
    [Path(f"checkpoint-{n}").mkdir() for n in range(3)]  # only checkpoint 0 as the reference has a better x^r
    monkeypatch.setattr(study, "load_net", lambda folder: int(folder.name[-1]))
    monkeypatch.setattr(study, "mini_pictures", lambda *_: None)
    monkeypatch.setattr(seppo, "mini_rows", lambda *_: rows)
    monkeypatch.setattr(seppo, "denoising_error", lambda net, *_: torch.tensor(next(errors[net])))
    monkeypatch.setattr(seppo, "mini_score", lambda *_: torch.tensor(next(scores)))
    found = study.anchor_truth(tmp_path, "initial", 0, n=4, many=2)
    assert found == pytest.approx(dict(better=0.5, minus=0.5, gain=3 / 4 - 0.5, gain_many=2 / 3 - 0.5, agrees=1))


def planted(world, variant, lr, beta, seed):
    """A score: the base model has 0.5, seppo a broad peak and a lucky cell, sft a low peak, the others no gain."""
    (best_lr, best_beta), gain = {"seppo": ((1e-4, 250), 0.2), "sft": ((3e-5, 0), 0.1)}.get(variant, ((0, 0), 0))
    steps = abs(study.LR.index(lr) - study.LR.index(best_lr)) + (beta != best_beta) if best_lr else 0
    return 0.5 + gain - 0.05 * steps + 0.12 * ((variant, lr) == ("seppo", 1e-5) and beta == 250) + 0.01 * (seed % 2)


def tables(text):  # one for each heading of study.md: {(method, world): {column: text}}
    parts = [[row[2:-2].split(" | ") for row in part.splitlines() if row[:1] == "|"] for part in text.split("## ")[1:]]
    return [{(*row[:2],): dict(zip(part[0], row)) for row in part[2:]} for part in parts]


def test_the_studys_tables_from_planted_scores(tmp_path, capsys):
    """A lucky cell is not chosen. Gains, the price of higher rates, differences and intervals are the planted ones."""
    made, rest = study.Study(tmp_path / "study.jsonl", {}), ("gained", "shape", "distance", "clipped", "sign_pos")
    for _, runs, *_ in made.stages():  # the later stages read the earlier ones
        scores = {cell: dict(zip(study.KEY, cell), base=cell[0], score=planted(*cell)) for cell in runs}
        made.update({cell: line | dict.fromkeys(rest, 0.5) for cell, line in scores.items()})

    def report(*lines):
        made.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = seppo.main(["--tables", "--out", str(tmp_path)], study.run, "study.py")
        return code, tables((tmp_path / "study.md").read_text())

    code, (untuned, tuned, less, _) = report(*made.values())
    chosen = {"lr": "0.0001", "beta": "250", "score": "0.705 ± 0.004"}  # Student's t: 2.365 x 0.0053 / sqrt(8)
    assert code == 0 and chosen.items() <= tuned["seppo", "near"].items() and ("sft, best cell", "far") not in tuned
    scores = {"seppo --flip none": "0.505 ± 0.009", "base": "0.500", "seppo, best cell": "0.725 ± 0.004"}
    assert scores == {name: tuned[name, "far"]["score"] for name in scores}
    assert less["seppo", "far"]["score minus sft"] == "**+0.100 ± 0.000**"
    wanted = {"mean gain": "+0.120", "worst run": "+0.050", "close: mean gain": "+0.138", "close: worst run": "+0.100"}
    wanted |= {"above tuned sft": "57%", "best cell": "lr 1e-05, beta 250: 0.725, distance 0.500"}
    wanted |= {"below base": "0%", "one step of lr up": "-0.050 (-0.050 to -0.050)"}
    assert wanted.items() <= untuned["seppo", "far"].items()
    assert untuned["sspo", "near"]["minus sft"] == "-0.030 (-0.100 to +0.050)"
    _, (untuned, *_) = report(*(line for line in made.values() if line["variant"] != "spin"))
    assert ("spin", "far") not in untuned and ("seppo", "far") in untuned
    assert "grid of the main methods (60 of 200)" in (tmp_path / "study.md").read_text()
    assert report(*made.values(), made["near", "base", 0, 0, 0] | {"base": "other"})[0] == 2
    assert "has a run of `near` from the base model other, not near: restore" in capsys.readouterr().err


def test_study_md_and_the_readme_match_study_jsonl():
    assert (report := study.Study(HERE / "assets/study.jsonl", {}).report()) == (HERE / "assets/study.md").read_text()
    text = re.search(r"## The study\n(.*?)\n## ", (HERE / "README.md").read_text(), re.S)[1]
    assert not [figure for figure in re.findall(r"[-+]?\d+\.\d{3}|\d+%", text) if figure not in report]
    (untuned, tuned, *_), rows = tables(report), re.findall(r"^\| `(.*?)` \| (.*) \|$", text, re.M)[1:]
    cells = lambda *at: f"{untuned[at]['mean gain']} ({untuned[at]['worst run']}) | {tuned[at]['score'].split()[0]}"
    assert rows == [(method, f"{cells(method, 'far')} | {cells(method, 'near')}") for method, _ in rows] != []


# ---- Slow: SLOW=1 python -m pytest -k slow --------------------------------------------------------------------------


def process(*argv, torchrun=1):
    program = ["-m", "torch.distributed.run", "--nproc-per-node", str(torchrun)] if torchrun > 1 else []
    command = [sys.executable, *program, str(HERE / "seppo.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=ONE_THREAD)


@slow
def test_slow_the_readme_commands_learn():
    done = process()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip() and "winner" not in line]
    assert not said and Path("runs/mini-seppo/samples/step-100.png").exists(), "the console shows our own lines only"
    before, after = map(float, re.search(r"Mean score (\S+) -> (\S+) ", done.stdout).groups())
    assert after > before + 0.05, "five standard errors, of 480 images"


@slow
def test_slow_the_readmes_loop_makes_its_table(pipeline, pairs, scorer_weights):
    loop, tiny = re.search(r"```bash\nMODEL.*?\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1], " ".join(TINY)
    put(Path("p.txt"), "a cat\na dog")
    sizes = f"--resolution 64 --sampler-steps 2 --device cpu --scorer-weights {scorer_weights} --out table"
    loop = loop.replace("seppo.py", f"{HERE}/seppo.py {tiny}").replace("eval.py", f"{HERE}/eval.py {sizes}")
    script = f"MODEL={pipeline} DATA={pairs} PROMPTS=p.txt; {loop.replace('python ', sys.executable + ' ')}"
    subprocess.run(["bash", "-ec", script], check=True, timeout=900, env=ONE_THREAD)
    rows = [line.split(" | ")[0] for line in Path("table/table.md").read_text().splitlines() if line[:8] == "| paper-"]
    assert rows == [f"| paper-{name}" for name in "indicator initial latest no-criterion seppo sft spin".split()]


@slow
def test_slow_the_lesson_shows_what_it_says(monkeypatch):
    """SePPO raises the score; without the sign a high rate ruins the policy; the sign is right as often as chance."""
    monkeypatch.chdir(HERE / "assets"), monkeypatch.setattr(sys, "path", [*sys.path])
    lesson = {}
    for cell in json.loads(Path("lesson.ipynb").read_text())["cells"]:
        exec("".join(cell["source"]) if cell["cell_type"] == "code" else "", lesson)
    before = lesson["before"]
    assert lesson["after"] > before + 0.05 and lesson["score"](lesson["policy"]) > before + 0.02
    assert lesson["sign"][lesson["chosen"]].tolist() == [1, 1, 1, -1, -1, -1]
    scores = {name: [line["score"] for line in lines if line["score"]] for name, (_, lines) in lesson["runs"].items()}
    assert min(scores["seppo"] + scores["sspo"]) > before - 0.1 and scores["--flip none"][-1] < before - 0.2
    assert all(abs(share - dealt) < 0.1 for share, _, dealt, _ in lesson["by_count"] + lesson["by_t"])


MOMENTS = """config.json:half step-0.png:half checkpoint-0:half checkpoint-0:after resume.safetensors:half
    resume.safetensors:after metrics.jsonl:half checkpoint-2:half checkpoint-2:after checkpoint-4:after"""


@slow
@pytest.mark.parametrize("moment", MOMENTS.split())
def test_slow_a_kill_inside_every_file(pipeline, pairs, moment):
    """With half of the file written, just after it is renamed, or when the log is written anew."""
    (name, when), atomic = moment.split(":"), seppo.atomic
    assert run(pipeline, pairs, "--out", "straight") == 0 == (run(pipeline, pairs) if "metrics" in moment else 0)

    @contextlib.contextmanager
    def killed(path):
        with atomic(path) as temporary:
            yield temporary
            files = [temporary] if temporary.is_file() else [*temporary.rglob("*.safetensors")]
            if path.name == name and when == "half":
                [os.truncate(file, file.stat().st_size // 2) for file in files]
                os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL if path.name == name else 0)

    if not (child := os.fork()):
        seppo.atomic = killed
        os._exit(run(pipeline, pairs))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and run(pipeline, pairs) == 0
    for file in ("resume", "checkpoint-4/unet/diffusion_pytorch_model"):
        assert same(*(load_file(f"{out}/{file}.safetensors") for out in ("run", "straight")))
    assert without_clocks(metrics()) == without_clocks(metrics("straight")) and not [*Path("run").rglob("*.tmp")]


@slow
@pytest.mark.parametrize("how", ["seppo", "sspo", "seppo --lora-rank 2", "seppo unused"])
def test_slow_two_processes_equal_one(tmp_path, how):
    model = save_pipeline(tmp_path / "model", **{"time_cond_proj_dim": 8} if "unused" in how else {})
    argv = ["--model", model, "--data", put(tmp_path / "p.parquet", pickapic_rows(40)), *TINY, "--batch-size", 16]
    argv += ["--steps", 6, "--method", *how.replace(" unused", "").split()]
    for n in (1, 2):
        done = process(*argv, "--out", f"run{n}", torchrun=n)
        assert done.stdout.count("Done.") == 1 and done.stderr.count("96/96") <= 2, f"only one prints: {done.stderr}"
    file = ADAPTERS if "lora" in how else "unet/diffusion_pytorch_model.safetensors"
    base, one, two = (load_file(f"run{who}/checkpoint-{n}/{file}") for who, n in ((1, 0), (1, 6), (2, 6)))
    assert distance(one, two) < 0.01 * distance(base, one)
    for a, b in zip(without_clocks(metrics("run1")), without_clocks(metrics("run2")), strict=True):
        assert all(b[k] == (pytest.approx(v, rel=1e-3, abs=1e-5) if isinstance(v, float) else v) for k, v in a.items())
