"""Evaluate checkpoints: images from identical noise, scored with the usual metrics, in one table with error bars.

    python eval.py                                      # the toy task's last run against its base
    python eval.py --model runwayml/stable-diffusion-v1-5 --unet runs/x/checkpoint-210 --prompts pickapic
    python eval.py --model DIR --unet sft=runs/a seppo=runs/b dpo=mhdang/dpo-sd1.5-text2image-v1 --prompts prompts.txt

Each prompt has its own noise seed, so models are compared image by image. `--protocol paper` evaluates as SePPO's
authors did. Existing images are reused. There is no safety checker, because it would black out images and distort the
means.
"""

import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import html
import itertools
import json
import math
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
from diffusers import DDPMScheduler, MotionAdapter, StableDiffusionPipeline, UNetMotionModel
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.models.blip.modeling_blip_text import BlipTextModel

import seppo
from seppo import UserError, atomic, explained, need

# ---- 1. The numbers -------------------------------------------------------------------------------------------------

# name in the table, and the factor for display: papers print cosines times 100
SCORERS = {"pickscore": ("PickScore", 100), "hpsv2": ("HPSv2", 100), "hpsv2.1": ("HPSv2.1", 100)}
SCORERS |= {"imagereward": ("ImageReward", 1), "aesthetic": ("Aesthetic", 1), "clip": ("CLIPScore", 100)}
SCORERS |= {"mini": ("Score", 1)}
PAPER = {"pickscore": 21.57, "hpsv2": 27.20, "imagereward": 0.615}  # SePPO on --prompts pickapic, one run


def win_rate(scores, base, z=1.959964):
    """Share of prompts where a picture scores above the base's, and its 95 % interval: (rate, low, high) in [0, 1].
    scores, base: (N,) scores for the same prompts. A tie is half a win. The interval is Wilson's, which keeps its
    coverage for few prompts and near 0 and 1; with ties it is conservative."""
    n, rate = len(scores), ((1 + torch.sign(scores - base)) / 2).double().mean().item()
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def table(scores, paper=False):
    """Markdown: one row per model, with each scorer's mean, its standard error, and the win rate against the base.
    scores: {model: {scorer: (N,) tensor, or None where the scorer is missing}}, the base first; scorers are keys of
    SCORERS. paper: whether to add the paper's own figures as a last row."""
    base = next(iter(scores.values()))
    head, paper_row = ["model"], ["*SePPO, the paper's own figures*"]
    for name in base:
        title, scale = SCORERS[name]
        head += [title + " x100" * (scale == 100), "wins vs base"]
        paper_row += [f"{PAPER.get(name, '')}", ""]
    rows = [head]
    for model, values in scores.items():
        row = [model]
        for name, x in values.items():
            scale, digits = SCORERS[name][1], 2 if SCORERS[name][1] == 100 else 3
            if x is None:
                row += ["missing", ""]
                continue
            error = f" ± {scale * x.std() / len(x) ** 0.5:.{digits}f}" if len(x) > 1 else ""
            rate, low, high = (100 * v for v in win_rate(x, base[name]))
            wins = "" if values is base else f"{rate:.1f} % [{low:.1f}, {high:.1f}]"
            row += [f"{scale * x.mean():.{digits}f}{error}", wins]
        rows.append(row)
    if paper and {*base} & {*PAPER}:
        rows.append(paper_row)
    return markdown(*rows)


def markdown(head, *rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# ---- 2. The scorers -------------------------------------------------------------------------------------------------
# Each scorer reproduces its original code in fp32 with transformers only, because the original packages no longer
# install beside current ones.

H14, L14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
BERT, REWARD = "google-bert/bert-base-uncased", "zai-org/ImageReward"
AESTHETIC, AESTHETIC_FILE = "christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"
CLIPS = {"pickscore": "yuvalkirstain/PickScore_v1", "hpsv2": H14, "hpsv2.1": H14, "clip": L14, "aesthetic": L14}
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))[:, None, None]
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))[:, None, None]


def to_tensor(image):  # a picture -> (3, h, w) in [0, 1]
    values = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def crop_pixels(image, half=round, side=224):
    """CLIP's preprocessing: shorter side to `side` (bicubic), centre crop, normalised -> (3, side, side).
    half: how half pixels are rounded: torchvision rounds, transformers (PickScore) takes the floor."""
    w, h = image.size
    w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    left, top = half((w - side) / 2), half((h - side) / 2)
    image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + side, top + side))
    return (to_tensor(image) - MEAN) / STD


def pad_pixels(image, antialias=True, side=224):
    """HPSv2's preprocessing: the longer side resized to `side`, then padded with black. torchvision antialiases since
    0.17; the authors' version did not. This changes the scores, so never mix the two."""
    x = to_tensor(image)
    scale = side / max(x.shape[1:])
    if scale != 1:
        size = [round(v * scale) for v in x.shape[1:]]
        x = F.interpolate(x[None], size, mode="bicubic", antialias=antialias)[0]
    h, w = side - x.shape[1], side - x.shape[2]
    return (F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)) - MEAN) / STD


QUOTES = dict.fromkeys((0x2018, 0x2019, 0x201A, 0x201B, 0x02BC), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width characters
FIXES = QUOTES | WIDE | {0xFEFF: None}  # the last: a byte order mark


def clean(prompt):
    """The clean-up in OpenAI's and open_clip's tokenizers: ftfy's most common fixes, HTML, white space."""
    text = html.unescape(html.unescape(prompt)).translate(FIXES)
    return " ".join(unicodedata.normalize("NFC", text).split())


class Scorer(torch.nn.Module):
    """Pictures and prompts -> scores in the units of the original code."""

    def __init__(self, pixels, tokenizer, length, tidy):
        super().__init__()
        self.pixels, self.tokenizer, self.length, self.tidy = pixels, tokenizer, length, tidy

    @torch.no_grad()
    def score(self, images, prompts):
        """N PIL pictures and N strings -> (N,) fp32 on the CPU. Raises ValueError if the lengths differ.
        score_tensors: (N, 3, 224, 224) normalised pixels, (N, L) tokens and mask -> (N,), with gradients."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures, {len(prompts)} prompts")
        device, texts = next(self.parameters()).device, [self.tidy(prompt) for prompt in prompts]
        settings = dict(padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        tokens = self.tokenizer(texts, **settings).to(device)
        pixels = torch.stack([self.pixels(image) for image in images]).to(device)
        return self.score_tensors(pixels, tokens.input_ids, tokens.attention_mask).float().cpu()


class ClipScorer(Scorer):
    """PickScore, HPSv2, CLIPScore: the cosine of a CLIP's picture and text vectors. With a head, LAION's aesthetic
    predictor: linear layers on the unit picture vector; the prompt is ignored."""

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
        sizes = dict(hidden_size=width, intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]), num_attention_heads=16)
        sizes |= dict(num_hidden_layers=sum(key.endswith("qkv.weight") for key in vision), patch_size=patch)
        sizes |= dict(image_size=math.isqrt(tokens - 1) * patch, layer_norm_eps=1e-6)  # timm's; transformers has 1e-5
        config = transformers.BlipVisionConfig(**sizes)
        self.vision = transformers.BlipVisionModel(config)
        self.vision.load_state_dict(renamed(vision, IMAGEREWARD_KEYS))
        config = transformers.BlipTextConfig(**text | {"encoder_hidden_size": width})
        self.text = BlipTextModel(config, add_pooling_layer=False)
        state_of_text = part(state, "blip.text_encoder.")
        self.text.load_state_dict({k: v for k, v in state_of_text.items() if "position_ids" not in k})
        self.head = linear_chain(part(state, "mlp.layers."))

    def score_tensors(self, pixels, input_ids, attention_mask):
        image_tokens = self.vision(pixels).last_hidden_state  # (N, patches + 1, width)
        settings = dict(attention_mask=attention_mask, encoder_hidden_states=image_tokens, is_decoder=False)
        first = self.text(input_ids, **settings).last_hidden_state[:, 0]
        return (self.head(first).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072  # standardised by its authors


class MiniScorer:
    """The toy task's own score."""

    score_tensors = staticmethod(seppo.mini_score)

    def score(self, images, prompts):
        return seppo.mini_score(torch.stack([to_tensor(image) for image in images]) * 2 - 1, prompts)


def part(state, prefix):  # the weights whose names begin with the prefix, which is removed
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    need(found, f"there are no weights {prefix}*")
    return found


def linear_chain(state):
    """Linear layers in a row, numbered with gaps where dropout was. The originals have no activations in between."""
    matrices = {key.split(".")[0]: w for key, w in sorted(state.items()) if w.ndim == 2}
    layers = {name: torch.nn.Linear(*reversed(w.shape)) for name, w in matrices.items()}
    chain = torch.nn.Sequential(OrderedDict(layers))
    chain.load_state_dict(state)
    return chain


# regular expressions: timm's names -> transformers'
IMAGEREWARD_KEYS = {r"^cls_token": "embeddings.class_embedding", r"^pos_embed": "embeddings.position_embedding"}
IMAGEREWARD_KEYS |= {r"^patch_embed\.proj": "embeddings.patch_embedding", r"^norm\.": "post_layernorm."}
IMAGEREWARD_KEYS |= {r"^blocks": "encoder.layers", r"\.norm(\d)": r".layer_norm\1"}
IMAGEREWARD_KEYS |= {r"attn\.qkv": "self_attn.qkv", r"attn\.proj": "self_attn.projection"}
# OpenAI's names, which open_clip and HPSv2 keep -> transformers'
CLIP_KEYS = {r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight"}
CLIP_KEYS |= {r"^visual\.": "vision_model.", r"^(?=transformer|token_|positional_|ln_final)": "text_model."}
CLIP_KEYS |= {r"transformer\.resblocks": "encoder.layers", r"\.attn\.": ".self_attn.", r"\.ln_(\d)": r".layer_norm\1"}
CLIP_KEYS |= {r"mlp\.c_fc": "mlp.fc1", r"mlp\.c_proj": "mlp.fc2", r"\.conv1": ".embeddings.patch_embedding"}
CLIP_KEYS |= {r"\.(class_embedding|token_embedding)": r".embeddings.\1", r"\.ln_pre": ".pre_layrnorm"}
CLIP_KEYS |= {r"\.positional_embedding": ".embeddings.position_embedding.weight"}
CLIP_KEYS |= {r"\.ln_post": ".post_layernorm", r"\.ln_final": ".final_layer_norm"}


def renamed(state, rules):  # every rule, in order, on every name
    return {functools.reduce(lambda name, rule: re.sub(*rule, name), rules.items(), key): state[key] for key in state}


def from_open_clip(state):
    """A state dict under OpenAI's and open_clip's names -> the same weights for transformers' CLIPModel."""
    state = {key: tensor.T if key in ("visual.proj", "text_projection") else tensor for key, tensor in state.items()}
    split = {}
    for key, tensor in renamed(state, CLIP_KEYS).items():
        if "in_proj_" in key:  # the original fuses q, k and v
            split |= {key.replace("in_proj_", f"{p}_proj."): third for p, third in zip("qkv", tensor.chunk(3))}
        else:
            split[key] = tensor
    return split


TOKENIZER = ("tokenizer.json", "vocab.json", "vocab.txt")  # any of them
NEEDED = [("config.json",), ("model.safetensors",), TOKENIZER]
FILES = {name: [(home, *files) for files in NEEDED] for name, home in CLIPS.items()}
for hps in ("v2", "v2.1"):  # the laion model with other weights, in fp16 and under open_clip's names
    FILES[f"hps{hps}"][1] = ("xswu/HPSv2", f"HPS_{hps}_compressed.pt")
FILES["imagereward"] = [(REWARD, "med_config.json"), (REWARD, "ImageReward.pt"), (BERT, *TOKENIZER)]
FILES["aesthetic"] += [(AESTHETIC, AESTHETIC_FILE)]


def is_online():  # asked first: offline, hf_hub_download tries for 20 seconds per file
    with contextlib.suppress(Exception):
        return bool(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT))


def find_files(name, folder=None):
    """The paths of FILES[name]: FOLDER/OWNER/NAME/FILE, FOLDER/NAME/FILE or FOLDER/FILE; if folder is None, the hub's
    cache (the aesthetic predictor's head comes from GitHub). Raises UserError for a missing file. Loads nothing."""
    found = []
    for repository, *files in FILES.get(name, ()):
        for file in files:
            home = next((p for p in (repository, repository.split("/")[1]) if Path(folder or "", p).is_dir()), "")
            path = Path(folder or torch.hub.get_dir(), home if folder else "", file)
            with contextlib.suppress(OSError, ValueError):
                if folder is None and repository != AESTHETIC:
                    path = Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=not is_online()))
                elif folder is None and not path.exists():
                    url = f"https://github.com/{AESTHETIC}/raw/main/{file.replace('+', '%2B')}"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    torch.hub.download_url_to_file(url, str(path), progress=False)
            if path.is_file():
                found.append(path)
                break
        else:
            where = folder or "the hub (offline: its cache)"
            raise UserError(f"{where} lacks {repository}/{files[0]}, which {SCORERS[name][0]} needs")
    return found


def load_scorer(name, folder=None, device="cpu", antialias=True):
    """A scorer, by a key of SCORERS, in fp32, with `score` and `score_tensors` (see Scorer). folder: see find_files.
    antialias: whether HPSv2's resize antialiases. Raises UserError for an unknown name or missing weights."""
    need(name in SCORERS, f"{name} is not a scorer: choose from {', '.join(SCORERS)}")
    if name == "mini":
        return MiniScorer()
    with explained(f"the weights of {SCORERS[name][0]} cannot be read", "download them again, unchanged"):
        config, weights, tokenizer, *head = find_files(name, folder)
        kind = transformers.BertTokenizer if name == "imagereward" else transformers.CLIPTokenizer
        tokenizer = kind.from_pretrained(tokenizer.parent)
        need(len(tokenizer) > 9, "its tokenizer's vocabulary is empty")  # transformers silently makes an empty one
        if name == "imagereward":
            text = json.loads(config.read_text())
            scorer = ImageReward(load_weights(weights), text, crop_pixels, tokenizer, 35, str)
        elif name.startswith("hps"):
            clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(config.parent))
            clip.load_state_dict(from_open_clip(load_weights(weights)["state_dict"]))
            scorer = ClipScorer(clip, functools.partial(pad_pixels, antialias=antialias), tokenizer, 77, clean)
        else:
            clip = seppo.load_complete(transformers.CLIPModel, config.parent, dtype=torch.float32)
            head = linear_chain(part(load_weights(*head), "layers.")) if head else None
            floored = functools.partial(crop_pixels, half=math.floor)  # PickScore follows transformers throughout
            crop, tidy = (floored, str) if name == "pickscore" else (crop_pixels, clean)
            scorer = ClipScorer(clip, crop, tokenizer, 77, tidy, head=head)
        scorer = scorer.to(device).eval()
        scorer.score([Image.new("RGB", (224, 224))], ["a"])  # fail now if the parts do not fit
    return scorer


def load_weights(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} is not a weights file: {error}") from error


# ---- 3. The prompts and their noise ---------------------------------------------------------------------------------

NAMED = {"mini": 480, "pickapic": 500, "parti": 1632, "hpsv2": 3200}  # how many prompts each has
PICKAPIC = ("yuvalkirstain/pickapic_v2_no_images", seppo.PICKAPIC[0])  # the second is a fallback, with images
PARTI, HPD = "nateraw/parti-prompts", "zhwang/HPDv2"


def read_prompts(name):
    """--prompts: a key of NAMED, or a file: JSON (a list of strings or {"prompt": ...}), JSONL, or lines of text
    -> the prompts in order, without blank ones. Raises UserError."""
    with explained(f"--prompts {name} cannot be read", f"it takes {', '.join(NAMED)}, or a .txt, .json or .jsonl"):
        rows = named_prompts(name) if name in NAMED else file_prompts(Path(name))
        prompts = [prompt for prompt in itertools.starmap(prompt_of, enumerate(rows, 1)) if prompt]
        "".join(prompts).encode()  # tokenizers reject lone surrogates
    need(prompts, f"--prompts {name} holds no prompt")
    wanted = NAMED.get(name, len(prompts))
    need(len(prompts) == wanted, f"--prompts {name}: expected {wanted} prompts, got {len(prompts)}")
    return prompts


def named_prompts(name):
    hub = functools.partial(huggingface_hub.hf_hub_download, repo_type="dataset")
    if name == "mini":
        return [seppo.CAPTIONS[i % len(seppo.CAPTIONS)] for i in range(NAMED[name])]
    if name == "parti":  # the way `datasets` reads it
        lines = Path(hub(PARTI, "PartiPrompts.tsv")).read_text("utf-8").split("\n")
        return list(csv.DictReader(lines, delimiter="\t"))
    if name == "hpsv2":
        files = [hub(HPD, f"benchmark/{style}.json") for style in ("anime", "concept-art", "paintings", "photo")]
        return [prompt for file in files for prompt in json.loads(Path(file).read_text("utf-8"))]
    from pyarrow.parquet import read_table

    wanted = dict(repo_type="dataset", allow_patterns="*/validation_unique-*.parquet")  # this split only
    try:
        home = huggingface_hub.snapshot_download(PICKAPIC[0], **wanted)
    except OSError:
        home = huggingface_hub.snapshot_download(PICKAPIC[1], **wanted)  # the same captions
    tables = [read_table(file, columns=["caption"]) for file in sorted(Path(home).rglob("*.parquet"))]
    return [caption for table in tables for caption in table["caption"].to_pylist()]


def file_prompts(path):  # a JSON list, JSONL, or lines of text, by the file's ending
    need(path.suffix in (".json", ".jsonl", ".txt"), f"--prompts {path} must be .txt, .jsonl or .json")
    text = path.read_text("utf-8-sig")
    return list(filter(str.strip, text.split("\n")) if path.suffix == ".txt" else seppo.json_lines(path, text))


def prompt_of(number, row):  # a string, or an object that holds one; spaces at its ends are removed
    if isinstance(row, dict):
        row = next((row[key] for key in ("prompt", "Prompt", "caption", "text") if row.get(key)), None)
    if not isinstance(row, str):
        raise ValueError(f"entry {number} has no prompt")
    return row.strip()


def start_noise(prompts, shape, seed=0, protocol="paired", device="cpu", dtype=torch.float32):
    """The (C, h, w) fp32 noise that each prompt's picture starts from: a list, on the CPU.
    paired: seeded by (seed, prompt, earlier occurrences of it), so a prompt's noise is the same in any list.
    paper: from one generator, on the device and in the dtype of the pipeline, in prompt order, as a loop with
    diffusers' pipeline draws it (PNDM draws nothing else). It is drawn up front, so resuming changes nothing."""
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


def find_unets(o):  # --unet -> {name: folder or hub id}, base first (toy task: the run's own checkpoint-0)
    found = {"base": None}
    for spec in dict.fromkeys(o.unet or ([last_run(o.model)] if o.model in seppo.MINI else [])):
        name, equals, where = spec.partition("=")
        if not equals or Path(spec).exists():
            name, where = "", spec
        need(where, f"--unet {spec} has no path: use NAME=WHERE")
        words = [word for word in Path(where).resolve().parts if word != "unet"]
        name = name or "-".join(words[-2:] if words[-1].startswith("checkpoint-") else words[-1:])
        fits = re.fullmatch(r"\w[\w.+-]*", name) and name not in found
        need(fits, f"--unet {spec} needs a name of its own: NAME={where}")
        found[name] = seppo.spelled(where)
        run, model, _ = run_of(found[name])
        if model not in (None, o.model):
            print(f"--unet {spec} was trained from {model}, but --model is {o.model}")
    if o.model in seppo.MINI:
        first = run / "checkpoint-0" if run else None  # a LoRA run starts from the model's own UNet
        found["base"] = str(first) if first and not (first / seppo.LORA_FILE).exists() else None
    return found


def run_of(where):  # the run that a folder belongs to, its base model, and its prediction type
    for run in (Path(where), *Path(where).parents):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            config = json.loads((run / "config.json").read_text())
            return run, config["options"]["model"], config["sampler"]["prediction_type"]
    return None, None, None


def last_run(model):  # the newest run of this model in runs/
    runs = [path for path in Path("runs").glob("*/config.json") if f'"model": "{model}"' in path.read_text()]
    need(runs, f"runs/ holds no run of {model}: python seppo.py --model {model} makes one")
    return str(max(runs, key=lambda path: path.stat().st_mtime).parent)


def fuse_lora(base, file):
    """A copy of the base with a LoRA fused in, at the strength that pipe.load_lora_weights gives it. A LoRA with
    weights that the UNet does not take is refused: scored without them, it would be another model."""
    names = {name for name in load_file(file) if not name.endswith(".alpha")}
    unet, read = copy.deepcopy(base), StableDiffusionPipeline.lora_state_dict
    state, alphas, metadata = read(file, use_safetensors=True, return_lora_metadata=True)
    alphas = (alphas or {}) | {name: state.pop(name).item() for name in [*state] if name.endswith(".alpha")}
    try:
        unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=metadata)
    except TypeError as error:  # the file's header has options that this version of peft lacks
        raise ValueError(str(error.__cause__ or error)) from None
    taken = {f"unet.{name.replace('.default_0.', '.')}" for name, _ in unet.named_parameters() if ".lora_" in name}
    left = f"{file}: the UNet takes {len(taken)} of {len(names)} weights, e.g. not {min(names - taken, default=file)}"
    need(len(taken) == len(names), f"{left}: a LoRA must train only the UNet, with diffusers' or kohya-ss names")
    unet.fuse_lora()
    unet.unload_lora()
    return unet


def load_checked(name, where, base, kind):
    """Loads a UNet and checks that it has the base's shape and prediction type. A video model may be motion
    modules only. `where` None: the base. Raises UserError."""
    if where is None:
        return copy.deepcopy(base)
    spec, advice = f"--unet {name}={where}", "it takes runs, checkpoints, UNets, LoRAs and hub ids"
    with explained(f"{spec} cannot be read", advice, Exception):
        classes = [type(base).__name__, *["MotionAdapter"] * isinstance(base, UNetMotionModel)]
        unet = seppo.load_unet(where, *classes, fuse=functools.partial(fuse_lora, base))
    if isinstance(unet, MotionAdapter):
        adapter, unet = unet, copy.deepcopy(base)
        unet.load_motion_modules(adapter)
    ours, theirs = ({key: t.shape for key, t in net.state_dict().items()} for net in (unet, base))
    need(ours == theirs, f"{spec} differs in shape from the UNet of --model")
    with contextlib.suppress(OSError, ValueError, KeyError):  # a run or a full pipeline states it
        *_, own = run_of(where)
        own = own or DDPMScheduler.load_config(where, subfolder="scheduler", local_files_only=True)["prediction_type"]
        need(own == kind, f"{spec} predicts {own}, but --model predicts {kind}")
    return unet


def digest(*parts):
    """A short hash of modules (weights and configuration), tensors, and other values' reprs."""
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
    and settings. Rounding depends on the batch, so incomplete batches are redone completely."""
    side = o.resolution // codec.factor
    shape = (codec.channels, o.frames, side, side) if o.frames else (codec.channels, side, side)
    noises = start_noise(prompts, shape, o.seed, o.protocol, o.device, o.half)
    nets = [v for v in vars(codec).values() if isinstance(v, torch.nn.Module)]
    tokenizer = codec.tokenizer.backend_tokenizer.to_str() if o.model not in seppo.MINI else ""
    settings = (tokenizer, o.solver, o.sampler_steps, o.guidance, o.dtype, o.device.type)
    common = digest(*nets, solver_settings(o, codec), settings)
    base = base.cpu()
    kind = codec.scheduler.config.prediction_type
    marks = {name: digest(load_checked(name, where, base, kind), common) for name, where in unets.items()}  # check all
    empty, files = codec.encode_text([""]), {}
    for name, where in unets.items():
        folder, pairs = o.out / "pictures" / name, enumerate(zip(prompts, noises))
        files[name] = [folder / f"{i:05d}-{digest(marks[name], *pair)}.png" for i, pair in pairs]
        missing = [batch for batch in batches if not all(file.exists() for file in files[name][batch])]
        unet = load_checked(name, where, base, kind).to(o.device, o.half).eval() if missing else None
        for batch in tqdm(missing, f"{name}: pictures", unit="batch", disable=not missing):
            noise, context = torch.stack(noises[batch]).to(o.device), codec.encode_text(prompts[batch])
            settings = (o.solver, o.sampler_steps, o.guidance)
            pixels = codec.decode(seppo.sample(unet, codec.scheduler, noise, context, empty, *settings))
            for prompt, picture in zip(prompts[batch], pixels):
                need(picture.isfinite().all(), f"{name}: {prompt[:60]!r} gives non-finite pixels: try --dtype fp32")
            pixels = ((pixels + 1) * 127.5).round().byte().cpu()  # (B, 3, [F,] R, R)
            if o.frames:  # a clip is kept as a filmstrip
                pixels = pixels.transpose(2, 3).flatten(3)  # (B, 3, R, F R)
            images = map(Image.fromarray, pixels.permute(0, 2, 3, 1).numpy())
            with ThreadPoolExecutor() as pool:
                list(pool.map(save_png, images, files[name][batch]))
    return files


def solver_settings(o, codec):  # as text for the report
    config = seppo.make_solver(codec.scheduler, o.solver).config
    names = {*seppo.SCHEDULE_KEYS, *seppo.SOLVERS[o.solver][1], "prediction_type", "timestep_spacing", "solver_order"}
    return ", ".join(f"{name} {config[name]}" for name in sorted(names) if config.get(name) is not None)


def save_png(image, path):
    with atomic(path) as file:
        image.save(file, "PNG")


def score_pictures(o, files, prompts, batches, missing):
    """-> {model: {scorer: (N,) scores, or None for a missing one}}."""
    scores = {model: dict.fromkeys(o.scorers) for model in files}
    for name in [name for name in o.scorers if name not in missing]:
        scorer = None  # free the previous scorer before loading the next one
        scorer = load_scorer(name, o.scorer_weights, o.device, antialias=o.protocol != "paper")
        for model, paths in files.items():
            parts = []
            for batch in tqdm(batches, f"{model}: {SCORERS[name][0]}", unit="batch"):
                with ThreadPoolExecutor() as pool:
                    strips = list(pool.map(read_frames, paths[batch]))
                captions = [caption for caption, frames in zip(prompts[batch], strips) for _ in frames]
                frames = [frame for frames in strips for frame in frames]
                parts.append(scorer.score(frames, captions).view(len(strips), -1).mean(1))
            scores[model][name] = torch.cat(parts).double()
    return scores


def read_frames(path):  # a filmstrip -> its frames; a picture -> itself, in a list
    with explained(f"{path} cannot be read", "delete it and rerun"), Image.open(path) as strip:
        side = strip.height
        return [strip.crop((x, 0, x + side, side)).convert("RGB") for x in range(0, strip.width, side)]


# ---- 5. The output --------------------------------------------------------------------------------------------------


def report(o, files, prompts, scores, missing, settings):  # table.md, also on the terminal; scores.jsonl, grid.png
    what, n, frames = ("clip", len(prompts), f"{o.frames} frames, ") if o.frames else ("picture", len(prompts), "")
    paper = o.prompts == "pickapic" and n == NAMED["pickapic"]
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers"))
    text = [
        table(scores, paper),
        f"{n} prompts ({o.prompts}), one {what} each. ± is the standard error over prompts; wins: the share of "
        f"prompts where the model's {what} beats the base's, with its 95 % interval; x100: scores times 100.",
        f"Model {o.model}; {o.resolution} pixels, {frames}{o.solver} ({settings}), {o.sampler_steps} steps, guidance "
        f"{o.guidance:g}, {o.dtype}, {o.device}, seed {o.seed}, protocol {o.protocol}, no safety checker; HPSv2 "
        f"resizes with{'out' * (o.protocol == 'paper')} antialiasing; {versions}.",
    ]
    own = "The paper's figures use its own protocol (--protocol paper): PNDM, a different resize in HPSv2."
    text += [own] * (paper and o.protocol != "paper")
    text = "\n\n".join(text + [f"{SCORERS[name][0]} is missing: {why}." for name, why in missing.items()])
    rows = []
    for model, paths in files.items():
        found = {name: values.tolist() for name, values in scores[model].items() if values is not None}
        for i, path in enumerate(paths):
            row = {"model": model, "index": i, "prompt": prompts[i], "file": str(path.relative_to(o.out))}
            rows.append(json.dumps(row | {name: values[i] for name, values in found.items()}) + "\n")
    print(f"\n{text}\n\nIn {o.out}: table.md, scores.jsonl, grid.png, pictures/")
    for name, content in (("table.md", text + "\n"), ("scores.jsonl", "".join(rows))):
        with atomic(o.out / name) as file:
            file.write_text(content, "utf-8")
    save_png(draw_grid(files, prompts), o.out / "grid.png")


def draw_grid(files, prompts, rows=6, tile=192, head=28):
    """One row per prompt (the first six), one column per model. A clip is shown by its middle frame."""
    font = ImageFont.load_default(16)  # Latin only
    with contextlib.suppress(ImportError, OSError):  # DejaVu Sans has more scripts
        import matplotlib

        font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), 14)
    sheet = Image.new("RGB", (tile * (1 + len(files)), head + tile * min(rows, len(prompts))), "white")
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

MINI = dict(prompts="mini", scorers="mini", resolution=16, batch_size=240)  # overrides for the toy task
MINI |= {name: seppo.SMALL[name] for name in ("sampler_steps", "guidance")}


def parse_args(argv=None):  # a command line -> all options; raises UserError
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: need(False, f"{message} (--help lists the options)")
    add = lambda *names, help, **o: parser.add_argument(*names, help=help + " [%(default)s]" * ("default" in o), **o)
    add("--model", "--pretrained_model_name_or_path", type=seppo.spelled, default="mini", help="the base model")
    add("--unet", nargs="+", help="compare with --model: runs, checkpoints, UNets, LoRAs, hub ids; or NAME=WHERE")
    add("--motion-adapter", type=seppo.spelled, help="makes --model text-to-video; --unet also takes adapters")
    add("--frames", "--num_frames", type=int, help="frames per clip [16]")
    add("--prompts", default="pickapic", help=f"{', '.join(NAMED)}, or a file: text, JSONL, or a JSON list")
    add("--max-prompts", type=int, help="the first N prompts only")
    add("--scorers", default=",".join([*SCORERS][:-1]), help=f"comma-separated list of {', '.join(SCORERS)}; or none")
    add("--scorer-weights", help="a folder with the hub's own files, instead of the hub")
    add("--protocol", default="paired", choices=("paired", "paper"), help="paper: one generator, PNDM, 50 steps")
    add("--solver", default="dpm++", choices=seppo.SOLVERS, help="the diffusers scheduler")
    add("--sampler-steps", "--num_inference_steps", type=int, default=20, help="sampler steps")
    add("--guidance", "--guidance_scale", type=float, default=7.5, help="classifier-free guidance scale, 1: none")
    add("--resolution", type=int, default=512, help="pixels")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--batch-size", type=int, default=16, help="pictures at a time (clips: [1]); rounding alters images slightly")
    add("--device", help="cpu, cuda or cuda:1 [auto]")
    add("--dtype", "--mixed_precision", choices=("fp16", "fp32", "no"), help="precision for sampling [fp16 on a GPU]")
    add("--out", "--output_dir", help="where table and pictures go [runs/eval-MODEL]")
    given, _ = parser.parse_known_args(argv)
    changed = MINI if given.model in seppo.MINI else dict(frames=16, batch_size=1) if given.motion_adapter else {}
    parser.set_defaults(**changed | (dict(solver="pndm", sampler_steps=50) if given.protocol == "paper" else {}))
    o = parser.parse_args(argv)
    seppo.join_devices(o)
    o.scorers = [*dict.fromkeys(name.strip() for name in o.scorers.split(",") if o.scorers != "none")]
    o.out = Path(o.out or Path("runs", f"eval-{Path(o.model).resolve().name}"))
    need(o.world == 1, "eval.py is one process: start it with python, not with torchrun")
    for name, value in vars(o).items():
        if type(value) in (int, float) and name not in ("seed", "rank"):
            need(0 < value < math.inf, f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    need(-(2**63) <= o.seed < 2**63, f"--seed must fit in 64 bits, got {o.seed}")
    mini = o.model in seppo.MINI
    need(o.resolution == 16 if mini else o.resolution % 64 == 0, "--resolution must be a multiple of 64 (mini: 16)")
    clips = not mini and o.motion_adapter and o.frames > 1
    need(clips or not (o.motion_adapter or o.frames), "clips need --motion-adapter, and --frames 2 or more")
    unknown = {*o.scorers} - {*SCORERS}
    need(not unknown, f"--scorers {', '.join(sorted(unknown))}: choose from {', '.join(SCORERS)}")
    need(mini or "mini" not in o.scorers, "--scorers mini is for --model mini")
    need(not o.scorer_weights or Path(o.scorer_weights).is_dir(), f"--scorer-weights {o.scorer_weights}: not a folder")
    apart = len(o.scorers) == 1 or not Path(o.scorer_weights or "", "config.json").exists()
    need(apart or not o.scorer_weights, "with several scorers, --scorer-weights needs a folder for each repository")
    return o


def run(argv=None):
    o = parse_args(argv)
    with explained(f"--out {o.out} cannot be written", "choose another"):
        (o.out / "pictures").mkdir(parents=True, exist_ok=True)
    prompts, missing = read_prompts(o.prompts)[: o.max_prompts], {}
    known = o.model not in seppo.MINI or {*prompts} <= {*seppo.CAPTIONS}
    need(known, f"--prompts {o.prompts}: the toy task accepts only its own captions")
    unets = find_unets(o)
    fixed = {"unet": unets["base"], "train": None, "lora_rank": 0}
    base, codec = seppo.load_models(argparse.Namespace(**vars(o) | fixed))
    for name in o.scorers:  # check before hours of sampling
        print(f"loading {SCORERS[name][0]}")
        try:
            load_scorer(name, o.scorer_weights)
        except UserError as error:
            missing[name] = f"{error}"
    message = "no scorer can be loaded (--scorers none makes the pictures only): " + "; ".join(missing.values())
    need(len(missing) < len(o.scorers) or not o.scorers, message)
    settings = solver_settings(o, codec)
    batches = [slice(i, i + o.batch_size) for i in range(0, len(prompts), o.batch_size)]
    files = generate(o, unets | {"base": None}, base, codec, prompts, batches)
    del base, codec
    scores = score_pictures(o, files, prompts, batches, missing)
    report(o, files, prompts, scores, missing, settings)


def main(argv=None):
    return seppo.main(argv, run, "eval.py", "a lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
