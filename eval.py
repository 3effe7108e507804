"""Evaluate checkpoints: pictures from equal noise, scored as the field scores them, in one table with error bars.

    python eval.py                                      # the miniature's last run against its base
    python eval.py --model runwayml/stable-diffusion-v1-5 --unet runs/x/checkpoint-210 --prompts pickapic
    python eval.py --model DIR --unet sft=runs/a seppo=runs/b dpo=mhdang/dpo-sd1.5-text2image-v1 --prompts prompts.txt

A prompt's noise has a seed of its own, the same for every model and in every list of prompts: a model is compared with
the base picture by picture. `--protocol paper` evaluates as SePPO's authors did. Pictures that are there are not made
again. There is no safety checker: it would blacken pictures and poison the means.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import html
import json
import math
import pickle
import re
import sys
import textwrap
import unicodedata
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import torch
import torch.nn.functional as F
import transformers
from diffusers import MotionAdapter, UNetMotionModel
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers.models.blip.modeling_blip_text import BlipTextModel

import seppo
from seppo import UserError, explained, need, whole

# ---- 1. The numbers -------------------------------------------------------------------------------------------------

SCORERS = {  # name in the table, and what the table multiplies a score by: cosines are shown as papers print them
    "pickscore": ("PickScore", 100),
    "hpsv2": ("HPSv2", 100),
    "hpsv2.1": ("HPSv2.1", 100),
    "imagereward": ("ImageReward", 1),
    "aesthetic": ("Aesthetic", 1),
    "clip": ("CLIPScore", 100),
    "mini": ("Score", 1),
}
PAPER = {"pickscore": 21.57, "hpsv2": 27.20, "imagereward": 0.615}  # SePPO on validation_unique, a single run


def win_rate(scores, base, z=1.959964):
    """Share of prompts where a picture scores above the base's, and its 95 % interval: (rate, low, high) in [0, 1].

    scores, base: (N,) scores for the same prompts. A tie is half a win. The interval is Wilson's, which keeps its
    coverage for few prompts and near 0 and 1, where rate +- 1.96 standard errors does not; with ties it is
    conservative.
    """
    n, rate = len(scores), ((1 + torch.sign(scores - base)) / 2).double().mean().item()
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def table(scores, paper=False):
    """Markdown: a row for each model, for each scorer its mean with standard error, and the win rate against the base.

    scores: {model: {scorer: (N,) tensor, or None where the scorer is missing}}, the base first; scorers are keys of
    SCORERS. paper: whether the paper's own figures stand below, as its own.
    """
    base = next(iter(scores.values()))
    head, paper_row = ["model"], ["*SePPO, the paper's own figures*"]
    for name in base:
        title, scale = SCORERS[name]
        head += [title + " x100" * (scale == 100), "wins vs base"]
        paper_row += [f"{PAPER.get(name, '')}", ""]
    rows = [head, ["---"] * len(head)]
    for model, values in scores.items():
        row = [model]
        for name, x in values.items():
            scale, digits = SCORERS[name][1], 2 if SCORERS[name][1] == 100 else 3
            if x is None:
                row += ["missing", ""]
                continue
            mean = f"{scale * x.mean():.{digits}f}"
            if len(x) > 1:
                mean += f" ± {scale * x.std() / len(x) ** 0.5:.{digits}f}"
            rate, low, high = (100 * v for v in win_rate(x, base[name]))
            row += [mean, "" if values is base else f"{rate:.1f} % [{low:.1f}, {high:.1f}]"]
        rows.append(row)
    if paper and {*base} & {*PAPER}:
        rows.append(paper_row)
    return markdown(rows)


def markdown(rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---- 2. The scorers -------------------------------------------------------------------------------------------------
# Each computes what its original code computes, in fp32 and with transformers alone: the original packages no longer
# install beside current ones.

H14, L14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
BERT = "google-bert/bert-base-uncased"
AESTHETIC, AESTHETIC_FILE = "christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
CLIPS = {"pickscore": "yuvalkirstain/PickScore_v1", "hpsv2": H14, "hpsv2.1": H14, "clip": L14, "aesthetic": L14}
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def to_tensor(image):
    """A picture -> (3, h, w) in [0, 1]."""
    values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def crop_pixels(image, half=round, side=224):
    """CLIP's preprocessing: shorter side to `side` (bicubic), centre crop, normalised -> (3, side, side).
    half: what becomes of half a pixel: torchvision rounds, transformers (PickScore) takes the floor."""
    w, h = image.size
    w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    left, top = half((w - side) / 2), half((h - side) / 2)
    image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + side, top + side))
    return (to_tensor(image) - MEAN) / STD


def pad_pixels(image, antialias=True, side=224):
    """HPSv2's: the longest side to `side`, as floats, then black around it. torchvision antialiases this since 0.17;
    the authors' version did not, which moves the scores: never compare across."""
    x = to_tensor(image)
    scale = side / max(x.shape[1:])
    if scale != 1:
        size = [round(v * scale) for v in x.shape[1:]]
        x = F.interpolate(x[None], size, mode="bicubic", antialias=antialias)[0]
    h, w = side - x.shape[1], side - x.shape[2]
    return (F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)) - MEAN) / STD


QUOTES = dict.fromkeys((0x2018, 0x2019, 0x201A, 0x201B, 0x02BC), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width characters
MENDS = QUOTES | WIDE | {0xFEFF: None}  # the last: a byte order mark


def clean(prompt):
    """What OpenAI's and open_clip's tokenizers do before they split: ftfy's most frequent mends, html, white space."""
    text = html.unescape(html.unescape(prompt)).translate(MENDS)
    return " ".join(unicodedata.normalize("NFC", text).split())


class Scorer(torch.nn.Module):
    """Pictures and prompts -> scores in the units of the original code."""

    def __init__(self, pixels, tokenizer, length, tidy):
        super().__init__()
        self.pixels, self.tokenizer, self.length, self.tidy = pixels, tokenizer, length, tidy

    @torch.no_grad()
    def score(self, images, prompts):
        """N PIL pictures and N strings -> (N,) fp32 on the CPU."""
        device, texts = next(self.parameters()).device, [self.tidy(prompt) for prompt in prompts]
        settings = dict(padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        tokens = self.tokenizer(texts, **settings).to(device)
        pixels = torch.stack([self.pixels(image) for image in images]).to(device)
        return self.score_tensors(pixels, tokens.input_ids, tokens.attention_mask).float().cpu()

    def score_tensors(self, pixels, input_ids, attention_mask):
        """(N, 3, 224, 224) normalised pixels, (N, L) tokens and their mask -> (N,), with gradients."""
        raise NotImplementedError


class ClipScorer(Scorer):
    """PickScore, HPSv2, CLIPScore: the cosine of a CLIP's picture and text vectors. With a head, LAION's aesthetic
    predictor: linear layers on the unit picture vector, whatever the prompt."""

    def __init__(self, clip, *args, head=None):
        super().__init__(*args)
        self.clip, self.head = clip, head

    def score_tensors(self, pixels, input_ids=None, attention_mask=None):
        picture = F.normalize(self.clip.get_image_features(pixel_values=pixels).pooler_output)
        if self.head:
            return self.head(picture).squeeze(-1)
        text = self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return (picture * F.normalize(text)).sum(-1)


class ImageReward(Scorer):
    """BLIP's text encoder looks at the picture through cross attention; linear layers read its first token."""

    def __init__(self, state, text, *args):
        super().__init__(*args)
        vision = part(state, "blip.visual_encoder.")
        _, tokens, width = vision["pos_embed"].shape
        patch = vision["patch_embed.proj.weight"].shape[-1]
        config = transformers.BlipVisionConfig(
            hidden_size=width,
            intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=sum(key.endswith("qkv.weight") for key in vision),
            num_attention_heads=16,
            patch_size=patch,
            image_size=math.isqrt(tokens - 1) * patch,
            layer_norm_eps=1e-6,  # timm's; transformers has 1e-5
        )
        self.vision = transformers.BlipVisionModel(config)
        self.vision.load_state_dict(renamed(vision, IMAGEREWARD_KEYS))
        config = transformers.BlipTextConfig(**text | {"encoder_hidden_size": width})
        self.text = BlipTextModel(config, add_pooling_layer=False)
        state_of_text = part(state, "blip.text_encoder.")
        self.text.load_state_dict({k: v for k, v in state_of_text.items() if "position_ids" not in k})
        self.head = linear_chain(part(state, "mlp.layers."))

    def score_tensors(self, pixels, input_ids, attention_mask):
        seen = self.vision(pixels).last_hidden_state  # (N, patches + 1, width)
        settings = dict(attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False)
        first = self.text(input_ids, **settings).last_hidden_state[:, 0]
        return (self.head(first).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072  # standardised by its authors


class MiniScorer:
    """The miniature's own taste."""

    def score(self, images, prompts):
        return self.score_tensors(torch.stack([to_tensor(image) for image in images]) * 2 - 1, prompts)

    def score_tensors(self, pixels, prompts):
        return seppo.mini_score(pixels, prompts)


def part(state, prefix):
    """The weights whose names begin with a prefix, without it."""
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    need(found, f"there are no weights {prefix}*")
    return found


def linear_chain(state):
    """Linear layers in a row, numbered with gaps where dropout was. Neither original has more between them."""
    matrices = {key.split(".")[0]: w for key, w in sorted(state.items()) if w.ndim == 2}
    layers = {name: torch.nn.Linear(*reversed(w.shape)) for name, w in matrices.items()}
    chain = torch.nn.Sequential(OrderedDict(layers))
    chain.load_state_dict(state)
    return chain


IMAGEREWARD_KEYS = {  # timm's names -> transformers'
    r"^cls_token": "embeddings.class_embedding",
    r"^pos_embed": "embeddings.position_embedding",
    r"^patch_embed\.proj": "embeddings.patch_embedding",
    r"^norm\.": "post_layernorm.",
    r"^blocks": "encoder.layers",
    r"\.norm(\d)": r".layer_norm\1",
    r"attn\.qkv": "self_attn.qkv",
    r"attn\.proj": "self_attn.projection",
}
CLIP_KEYS = {  # OpenAI's names, which open_clip and HPSv2 keep -> transformers'
    r"^visual\.proj$": "visual_projection.weight",
    r"^text_projection$": "text_projection.weight",
    r"^visual\.": "vision_model.",
    r"^(?=transformer|token_|positional_|ln_final)": "text_model.",
    r"transformer\.resblocks": "encoder.layers",
    r"\.attn\.": ".self_attn.",
    r"\.ln_(\d)": r".layer_norm\1",
    r"mlp\.c_fc": "mlp.fc1",
    r"mlp\.c_proj": "mlp.fc2",
    r"\.(class_embedding|token_embedding)": r".embeddings.\1",
    r"\.positional_embedding": ".embeddings.position_embedding.weight",
    r"\.conv1": ".embeddings.patch_embedding",
    r"\.ln_pre": ".pre_layrnorm",
    r"\.ln_post": ".post_layernorm",
    r"\.ln_final": ".final_layer_norm",
}


def renamed(state, rules):
    """Every rule, in order, on every name."""
    return {functools.reduce(lambda name, rule: re.sub(*rule, name), rules.items(), key): state[key] for key in state}


def from_open_clip(state):
    """A state dict under OpenAI's and open_clip's names -> the same weights for transformers' CLIPModel."""
    state = {key: tensor.T if key in ("visual.proj", "text_projection") else tensor for key, tensor in state.items()}
    split = {}
    for key, tensor in renamed(state, CLIP_KEYS).items():
        if "in_proj_" in key:  # q, k and v are one tensor there
            split |= {key.replace("in_proj_", f"{p}_proj."): third for p, third in zip("qkv", tensor.chunk(3))}
        else:
            split[key] = tensor
    return split


def load_scorer(name, folder=None, device="cpu", antialias=True):
    """A scorer, by a key of SCORERS, in fp32, with `score` and `score_tensors` (see Scorer).

    folder: where the hub's own files lie, as FOLDER/OWNER/NAME, FOLDER/NAME or all in FOLDER; None: the hub (for the
    aesthetic predictor's head, GitHub). antialias: of HPSv2's resize. Raises UserError if the name is unknown or
    weights can't be had.
    """
    need(name in SCORERS, f"{name} is no scorer: there are {', '.join(SCORERS)}")
    if name == "mini":
        return MiniScorer()
    advice = "--scorer-weights takes a folder with the hub's files"
    with explained(f"the weights of {SCORERS[name][0]} cannot be read", advice):
        scorer = load_imagereward(folder) if name == "imagereward" else load_clip(name, folder, antialias)
        scorer = scorer.to(device).eval()
        scorer.score([Image.new("RGB", (224, 224))], ["a"])  # what does not fit together is said now
    return scorer


def load_imagereward(folder):
    repository = "zai-org/ImageReward"
    weights = load_weights(place(folder, repository, "ImageReward.pt"))
    text = json.loads(Path(place(folder, repository, "med_config.json")).read_text())
    tokenizer = load_tokenizer(transformers.BertTokenizer, place(folder, BERT))
    return ImageReward(weights, text, crop_pixels, tokenizer, 35, str)


def load_clip(name, folder, antialias):
    home, pixels, tidy, head = place(folder, CLIPS[name]), crop_pixels, clean, None
    if name.startswith("hpsv2"):  # the laion model with other weights, in fp16 and under open_clip's names
        weights = load_weights(place(folder, "xswu/HPSv2", f"HPS_{name[3:]}_compressed.pt"))
        clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(home))
        clip.load_state_dict(from_open_clip(weights["state_dict"]))
        pixels = functools.partial(pad_pixels, antialias=antialias)
    else:
        clip = seppo.load_whole(transformers.CLIPModel, home, dtype=torch.float32)
    if name == "pickscore":  # as transformers does it all
        pixels, tidy = functools.partial(crop_pixels, half=math.floor), str
    if name == "aesthetic":
        head = linear_chain(part(load_aesthetic(folder), "layers."))
    tokenizer = load_tokenizer(transformers.CLIPTokenizer, home)
    return ClipScorer(clip, pixels, tokenizer, 77, tidy, head=head)


def load_aesthetic(folder):
    """The head's weights: from GitHub, where there is no folder."""
    if folder:
        return load_weights(place(folder, AESTHETIC, AESTHETIC_FILE))
    url = f"https://github.com/{AESTHETIC}/raw/main/{AESTHETIC_FILE.replace('+', '%2B')}"
    settings = dict(map_location="cpu", weights_only=True, progress=False, file_name=AESTHETIC_FILE)
    with contextlib.redirect_stdout(sys.stderr):
        return torch.hub.load_state_dict_from_url(url, **settings)


def load_weights(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError):
        raise ValueError(f"{path} is no file of weights") from None


def load_tokenizer(kind, name):
    """kind.from_pretrained, which of itself makes an empty vocabulary out of a folder without one."""
    tokenizer = kind.from_pretrained(name)
    need(len(tokenizer) > 9, f"{name} lacks its tokenizer's files")
    return tokenizer


def place(folder, repository, file=""):
    """Where a repository, or a file of it, is: on the hub, or in FOLDER/OWNER/NAME, FOLDER/NAME or FOLDER itself."""
    if folder is None:
        return huggingface_hub.hf_hub_download(repository, file) if file else repository
    places = Path(folder, repository), Path(folder, repository.split("/")[1])
    return str(Path(next((p for p in places if p.is_dir()), folder), file))


# ---- 3. The prompts and their noise ---------------------------------------------------------------------------------

NAMED = {"mini": 480, "pickapic": 500, "parti": 1632, "hpsv2": 3200}  # how many prompts each has
PICKAPIC = ("yuvalkirstain/pickapic_v2_no_images", seppo.PICKAPIC[0])  # the first may be gone; the second has pictures
PARTI, HPD = "nateraw/parti-prompts", "zhwang/HPDv2"
HPD_STYLES = ("anime", "concept-art", "paintings", "photo")


def read_prompts(name):
    """--prompts: a key of NAMED, or a file: JSON (a list, as the authors' of {"prompt": ...}), JSONL, or lines of text
    -> the prompts in order, without blank ones. Raises UserError."""
    with explained(f"--prompts {name} cannot be read", f"it takes {', '.join(NAMED)}, or a file: text, JSON or JSONL"):
        rows = named_prompts(name) if name in NAMED else file_prompts(Path(name))
        need(isinstance(rows, list), f"--prompts {name} holds no list")
        prompts = [prompt for prompt in map(prompt_of, rows) if prompt]
        "".join(prompts).encode()  # no tokenizer takes half a surrogate pair
    need(prompts, f"--prompts {name} holds no prompt")
    expected = NAMED.get(name, len(prompts))
    need(len(prompts) == expected, f"--prompts {name}: {len(prompts)} prompts came, not {expected}")
    return prompts


def named_prompts(name):
    hub = functools.partial(huggingface_hub.hf_hub_download, repo_type="dataset")
    if name == "mini":
        return [seppo.CAPTIONS[i % len(seppo.CAPTIONS)] for i in range(NAMED[name])]
    if name == "pickapic":
        return pickapic_captions()
    if name == "parti":  # `datasets` reads it so too
        lines = Path(hub(PARTI, "PartiPrompts.tsv")).read_text("utf-8").split("\n")
        return list(csv.DictReader(lines, delimiter="\t"))
    files = [hub(HPD, f"benchmark/{style}.json") for style in HPD_STYLES]
    return [prompt for file in files for prompt in json.loads(Path(file).read_text("utf-8"))]


def pickapic_captions():
    """Pick-a-Pic's validation_unique, the file with this split only: it stays in the hub's cache."""
    from pyarrow.parquet import read_table

    fetch, repository = huggingface_hub.snapshot_download, PICKAPIC[0]
    wanted = dict(repo_type="dataset", allow_patterns="*/validation_unique-*.parquet")
    try:
        home = fetch(repository, **wanted)
    except OSError:
        repository = PICKAPIC[1]  # the same captions
        home = fetch(repository, **wanted)
    tables = [read_table(file, columns=["caption"]) for file in sorted(Path(home).rglob("*.parquet"))]
    print(f"prompts: validation_unique of {repository}")
    return [caption for table in tables for caption in table["caption"].to_pylist()]


def file_prompts(path):
    text = path.read_text("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    lines = [line for line in text.split("\n") if line.strip()]
    return [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines


def prompt_of(row):
    """A string, or an object that has one."""
    if isinstance(row, dict):
        row = next((row[key] for key in ("prompt", "Prompt", "caption", "text") if row.get(key)), None)
    if not isinstance(row, str):
        raise ValueError("a row has no prompt")
    return row.strip()


def start_noise(prompts, shape, seed=0, protocol="paired", device="cpu", dtype=torch.float32):
    """The (C, h, w) fp32 noise that each prompt's picture starts from: a list, on the CPU.

    paired: drawn from (seed, prompt, how often the prompt came before): the same for a prompt in any list of prompts.
    paper: from one generator, on the device and in the dtype of the pipeline, prompt after prompt, as a loop over
    diffusers' pipeline draws it (PNDM draws nothing more). It is all drawn up front: resuming changes nothing.
    """
    if protocol == "paper":
        g = torch.Generator(device).manual_seed(seed)
        return [torch.randn((1, *shape), generator=g, device=device, dtype=dtype)[0].float().cpu() for _ in prompts]
    seen, noises = Counter(), []
    for prompt in prompts:
        g = torch.Generator().manual_seed(seppo.key(seed, "prompt", prompt, seen[prompt]))
        noises.append(torch.randn(shape, generator=g))
        seen[prompt] += 1
    return noises


# ---- 4. The pictures ------------------------------------------------------------------------------------------------


def find_unets(o):
    """--unet -> {name: folder or hub id}, the base (None) first."""
    found = {"base": None}
    for spec in o.unet or ([last_run(o.model)] if o.model in seppo.MINI else []):
        with explained(f"--unet {spec} cannot be read", "it takes NAME=WHERE or WHERE"):
            name, equals, where = spec.partition("=")
            if not equals or Path(spec).exists():
                name, where = "", spec
            need(where, f"--unet {spec} does not say where: NAME=WHERE")
            words = [word for word in Path(where).resolve().parts if word != "unet"]
        if not name:
            name = "-".join(words[-2:] if words[-1].startswith("checkpoint-") else words[-1:])
        fits = re.fullmatch(r"\w[\w.+-]*", name) and name not in found
        need(fits, f"--unet {spec} needs a name of its own: NAME={where}")
        found[name] = where
    return found


def last_run(model):
    """The folder in runs/ where this model was trained last."""
    runs = []
    for path in Path("runs").glob("*/config.json"):
        with contextlib.suppress(ValueError, LookupError, TypeError):  # whatever else lies there
            if json.loads(path.read_text())["options"]["model"] == model:
                runs.append(path)
    need(runs, f"runs/ holds no run of {model}: python seppo.py --model {model} makes one")
    return str(max(runs, key=lambda path: path.stat().st_mtime).parent)


def load_checked(name, where, base):
    """The UNet that stands beside the base, of the same shape; of clips it may have only motion modules of its own.
    Where there is no `where` it is the base. Raises UserError."""
    if where is None:
        return base
    spec, advice = f"--unet {name}={where}", "it takes a run, a checkpoint, a UNet as diffusers saves it, or a hub id"
    with explained(f"{spec} cannot be read", advice):
        unet = seppo.load_unet(where, type(base).__name__, *["MotionAdapter"] * isinstance(base, UNetMotionModel))
        if isinstance(unet, MotionAdapter):
            adapter, unet = unet, copy.deepcopy(base)
            unet.load_motion_modules(adapter)
    ours, theirs = ({key: t.shape for key, t in net.state_dict().items()} for net in (unet, base))
    need(ours == theirs, f"{spec} has another shape than the UNet of --model")
    return unet


def digest(*parts):
    """A short hash of modules (weights and configuration), tensors, and whatever prints alike when it is alike."""
    h = hashlib.blake2b(digest_size=6)
    for item in parts:
        if isinstance(item, torch.nn.Module):
            config = item.config if isinstance(item.config, dict) else item.config.to_dict()
            settings = sorted((k, v) for k, v in config.items() if k[0] != "_" and k != "transformers_version")
            item = digest(settings, *item.state_dict().values())
        if torch.is_tensor(item):
            h.update(item.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            h.update(repr(item).encode())
    return h.hexdigest()


@torch.no_grad()
def generate(o, unets, base, codec, prompts, batches):
    """Makes the pictures that are missing -> {model: their files}. A file's name has a hash of weights, prompt, noise
    and settings: what changed is made anew. A picture's rounding depends on its batch too, so a batch is made again
    as it was, whichever of its pictures are there."""
    side = o.resolution // codec.factor
    shape = (codec.channels, o.frames, side, side) if o.frames else (codec.channels, side, side)
    noises = start_noise(prompts, shape, o.seed, o.protocol, o.device, o.half)
    modules = [v for v in vars(codec).values() if isinstance(v, torch.nn.Module)]
    levels = sorted(item for item in codec.scheduler.config.items() if item[0][0] != "_")
    common = digest(*modules, levels, (o.solver, o.sampler_steps, o.guidance, o.dtype, o.device.type))
    base = base.cpu()
    marks = {name: digest(load_checked(name, where, base), common) for name, where in unets.items()}  # all, at once
    empty, files = codec.encode_text([""]), {}
    for name, where in unets.items():
        folder, pairs = o.out / "pictures" / name, enumerate(zip(prompts, noises))
        files[name] = [folder / f"{i:05d}-{digest(marks[name], *pair)}.png" for i, pair in pairs]
        missing = [batch for batch in batches if not all(file.exists() for file in files[name][batch])]
        unet = load_checked(name, where, base).to(o.device, o.half).eval() if missing else None
        for batch in progress(missing, prompts, f"{name}: pictures"):
            noise, context = torch.stack(noises[batch]).to(o.device), codec.encode_text(prompts[batch])
            settings = (o.solver, o.sampler_steps, o.guidance)
            latents = seppo.sample(unet, codec.scheduler, noise, context, empty, *settings)
            finite = latents.isfinite().all()
            need(finite, f"{name} draws what is not finite: --dtype fp32 may help, or leave it out")
            pixels = ((codec.decode(latents) + 1) * 127.5).round().byte().cpu()  # (B, 3, [F,] R, R)
            if o.frames:  # a clip is kept as a filmstrip
                pixels = pixels.transpose(2, 3).flatten(3)  # (B, 3, R, F R)
            images = map(Image.fromarray, pixels.permute(0, 2, 3, 1).numpy())
            with ThreadPoolExecutor() as pool:
                list(pool.map(save_png, images, files[name][batch]))
    return files


def save_png(image, path):
    with whole(path) as file:
        image.save(file, "PNG")


def progress(batches, prompts, what):
    """The batches, under a bar that counts pictures."""
    total = sum(len(prompts[batch]) for batch in batches)
    with tqdm(total=total, desc=what, unit="picture", disable=not batches) as bar:
        for batch in batches:
            yield batch
            bar.update(len(prompts[batch]))


def score_pictures(o, files, prompts, batches):
    """-> {model: {scorer: (N,) scores, or None}}, {scorer: why it is missing}. Scores are not kept for the next time:
    generating takes far longer."""
    scores, missing = {model: dict.fromkeys(o.scorers) for model in files}, {}
    for name in o.scorers:
        title = SCORERS[name][0]
        print(f"loading {title}")
        try:
            scorer = load_scorer(name, o.scorer_weights, o.device, antialias=o.protocol != "paper")
        except UserError as error:
            missing[name] = str(error)
            continue
        for model, paths in files.items():
            parts = []
            for batch in progress(batches, prompts, f"{model}: {title}"):
                folder = o.out / "pictures" / model
                with explained(f"a picture in {folder} cannot be read", "delete it; it is made again"):
                    with ThreadPoolExecutor() as pool:
                        strips = list(pool.map(read_frames, paths[batch]))
                captions = [caption for caption, frames in zip(prompts[batch], strips) for _ in frames]
                frames = [frame for frames in strips for frame in frames]
                parts.append(scorer.score(frames, captions).view(len(strips), -1).mean(1))
            scores[model][name] = torch.cat(parts).double()
    return scores, missing


def read_frames(path):
    """A filmstrip -> its frames; a picture -> itself, alone."""
    with Image.open(path) as strip:
        side = strip.height
        return [strip.crop((x, 0, x + side, side)).convert("RGB") for x in range(0, strip.width, side)]


# ---- 5. The output --------------------------------------------------------------------------------------------------


def report(o, files, prompts, scores, missing):
    """table.md and the same on the terminal, scores.jsonl, grid.png."""
    what, n = "clip" if o.frames else "picture", len(prompts)
    frames = f"{o.frames} frames (picture scorers: their mean), " if o.frames else ""
    paper = o.prompts == "pickapic" and n == NAMED["pickapic"]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers"))
    hps = ""
    if any("hps" in name for name in o.scorers):
        hps = f"HPSv2 resizes with{'out' * (o.protocol == 'paper')} antialiasing; "
    text = [
        table(scores, paper),
        f"{n} prompts ({o.prompts}), one {what} each. ± is the standard error over prompts; wins: the share of those "
        f"where the model's {what} scores above the base's, with its 95 % interval; x100: scores are multiplied.",
        f"Model {o.model}; {o.resolution} pixels, {frames}{o.solver}, {o.sampler_steps} steps, guidance "
        f"{o.guidance:g}, {o.dtype}, {o.device}, seed {o.seed}, protocol {o.protocol}, no safety checker; "
        f"{hps}{versions}.",
    ]
    if paper and {*o.scorers} & {*PAPER} and o.protocol != "paper":
        own = "The paper's figures are of its own protocol (--protocol paper)"
        text.append(f"{own}: another solver, another resize in HPSv2.")
    text += [f"{SCORERS[name][0]} is missing: {why}." for name, why in missing.items()]
    text = "\n\n".join(text)
    rows = []
    for model, paths in files.items():
        for i, path in enumerate(paths):
            row = {"model": model, "index": i, "prompt": prompts[i], "file": str(path.relative_to(o.out))}
            there = {name: values[i].item() for name, values in scores[model].items() if values is not None}
            rows.append(json.dumps(row | there) + "\n")
    print(f"\n{text}\n\nIn {o.out}: table.md, scores.jsonl, grid.png, pictures/")
    for name, content in (("table.md", text + "\n"), ("scores.jsonl", "".join(rows))):
        with whole(o.out / name) as file:
            file.write_text(content, "utf-8")
    save_png(draw_grid(files, prompts), o.out / "grid.png")


def draw_grid(files, prompts, rows=6, tile=192, head=28):
    """The first prompts down, with their captions, models across; of a clip its middle frame."""
    font, size = ImageFont.load_default(16), (tile * (1 + len(files)), head + tile * min(rows, len(prompts)))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for y, prompt in enumerate(prompts[:rows]):
        caption = "\n".join(textwrap.wrap(prompt, 21, max_lines=9, placeholder=" ..."))
        draw.multiline_text((8, head + tile * (y + 0.5)), caption, "black", font, "lm")
    for x, (model, paths) in enumerate(files.items(), 1):
        draw.text((tile * (x + 0.5), head / 2), model[:22], "black", font, "mm")
        for y, path in enumerate(paths[:rows]):
            frames = read_frames(path)
            picture = frames[len(frames) // 2]
            kind = Image.NEAREST if picture.height < tile else Image.LANCZOS
            sheet.paste(picture.resize((tile - 4, tile - 4), kind), (tile * x + 2, head + tile * y + 2))
    return sheet


# ---- 6. The command line --------------------------------------------------------------------------------------------

MINI = dict(prompts="mini", scorers="mini", resolution=16, batch_size=240)  # what the miniature changes
MINI |= {name: seppo.SMALL[name] for name in ("sampler_steps", "guidance")}


def parse_args(argv=None):
    """A command line -> all options. Raises UserError."""
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists the options)")
    add = parser.add_argument
    # what is compared
    add(
        "--model",
        "--pretrained_model_name_or_path",
        type=seppo.spelled,
        default="mini",
        help="the base: mini, a diffusers folder, a hub id",
    )
    add("--unet", nargs="+", help="NAME=WHERE or WHERE: runs (the last checkpoint), checkpoints, UNets, hub ids")
    add(
        "--motion-adapter",
        type=seppo.spelled,
        help="makes a text-to-video model of it; --unet then takes motion adapters too",
    )
    add("--frames", "--num_frames", type=int, help="of a clip [16]")
    # how it is judged
    add("--prompts", default="pickapic", help=f"{', '.join(NAMED)}, or a file: text, JSONL, or a JSON list")
    add("--max-prompts", type=int, help="the first N prompts only")
    add("--scorers", default=",".join([*SCORERS][:-1]), help=f"comma-separated, of {', '.join(SCORERS)}")
    add("--scorer-weights", help="a folder with the hub's own files, instead of the hub")
    add("--protocol", default="paired", choices=("paired", "paper"), help="paper: one generator, PNDM, 50 steps")
    # the sampler
    add("--solver", default="dpm++", choices=seppo.SOLVERS, help="the diffusers scheduler")
    add("--sampler-steps", "--num_inference_steps", type=int, default=20, help="its steps")
    add("--guidance", "--guidance_scale", type=float, default=7.5, help="classifier-free guidance scale, 1: none")
    add("--resolution", type=int, default=512, help="pixels")
    add("--seed", type=int, default=0, help="of the noise")
    # the machine
    add("--batch-size", type=int, default=16, help="pictures (clips: 1) at a time; changes pictures by rounding")
    add("--device", help="cpu, cuda or cuda:1 [what there is]")
    add("--dtype", "--mixed_precision", choices=("fp16", "fp32"), help="of what generates [fp16 on a GPU]")
    add("--out", "--output_dir", help="where table and pictures go [runs/eval-MODEL]")
    given, _ = parser.parse_known_args(argv)
    if given.model in seppo.MINI:
        parser.set_defaults(**MINI)
    if given.motion_adapter:
        parser.set_defaults(frames=16, batch_size=1)
    if given.protocol == "paper":
        parser.set_defaults(solver="pndm", sampler_steps=50)
    o = parser.parse_args(argv)
    seppo.join_devices(o)
    o.scorers = [name.strip() for name in o.scorers.split(",")]
    o.out = Path(o.out or Path("runs", f"eval-{Path(o.model).resolve().name}"))
    check(o)
    return o


def check(o):
    """Refuses what cannot be."""
    need(o.world == 1, "eval.py is one process: start it with python, not with torchrun")
    for name, value in vars(o).items():
        if type(value) in (int, float) and name not in ("seed", "rank"):
            need(0 < value < math.inf, f"--{name.replace('_', '-')} must be positive and finite")
    need(o.sampler_steps <= 1000, "--sampler-steps can be 1000 at most")
    mini = o.model in seppo.MINI
    need(mini or o.resolution % 64 == 0, "--resolution must be a multiple of 64")
    need(not mini or o.resolution == 16 and not o.motion_adapter, f"--model {o.model} draws 16 pixels, and no clips")
    need(o.motion_adapter or not o.frames, "--frames is for clips: add --motion-adapter")
    need(o.frames != 1, "--frames must be 2 at least")
    unknown = {*o.scorers} - {*SCORERS}
    need(not unknown, f"--scorers {', '.join(sorted(unknown))}: there are {', '.join(SCORERS)}")
    need(mini or "mini" not in o.scorers, "--scorers mini is for --model mini")
    if o.scorer_weights:
        weights = Path(o.scorer_weights)
        need(weights.is_dir(), f"--scorer-weights {weights} is no folder")
        apart = len(o.scorers) == 1 or not (weights / "config.json").exists()
        need(
            apart, f"--scorer-weights {weights}: several scorers need a folder for each repository, OWNER/NAME or NAME"
        )


def run(argv=None):
    """The command's whole work."""
    o = parse_args(argv)
    with explained(f"--out {o.out} cannot be written", "choose another"):
        (o.out / "pictures").mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # which convolutions would use on a GPU where fp32 is meant
    prompts = read_prompts(o.prompts)[: o.max_prompts]
    known = o.model not in seppo.MINI or {*prompts} <= {*seppo.CAPTIONS}
    need(known, f"--prompts {o.prompts}: the miniature knows its own captions only")
    base, codec = seppo.load_models(argparse.Namespace(**vars(o) | {"unet": None, "train": None}))
    unets = find_unets(o)
    batches = [slice(i, i + o.batch_size) for i in range(0, len(prompts), o.batch_size)]
    files = generate(o, unets, base, codec, prompts, batches)
    del base, codec
    scores, missing = score_pictures(o, files, prompts, batches)
    report(o, files, prompts, scores, missing)
    need(len(missing) < len(o.scorers), "no scorer could be loaded")


def main(argv=None):
    """The command. Returns the exit code: 0, or 2 after one line that says what to do."""
    return seppo.main(argv, run, "eval.py", "--batch-size")


if __name__ == "__main__":
    sys.exit(main())
