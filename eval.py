"""Evaluate checkpoints: pictures from equal noise, scored as the field scores them, in one table with error bars.

    python eval.py                                      # the miniature's last run against its base
    python eval.py --model runwayml/stable-diffusion-v1-5 --unet runs/x/checkpoint-210 --prompts pickapic
    python eval.py --model DIR --unet sft=runs/a seppo=runs/b dpo=mhdang/dpo-sd1.5-text2image-v1 --prompts prompts.txt
    torchrun --nproc-per-node 8 eval.py ...             # the prompts split over the GPUs: the same table
    python eval.py --runs runs/a runs/b                 # curves of what the runs logged
    python eval.py --study full                         # all methods on the miniature, with intervals

A prompt's noise has a seed of its own, the same for every model and in every list of prompts: a model is compared with the
base picture by picture. `--protocol paper` evaluates as SePPO's authors did. There is no safety checker: it would blacken
pictures and poison the means.
"""
import argparse, contextlib, copy, csv, datetime, functools, hashlib, html, io, itertools, json
import math, multiprocessing, os, re, sys, textwrap, unicodedata
from collections import Counter, OrderedDict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import diffusers, huggingface_hub, torch, transformers
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers.models.blip.modeling_blip_text import BlipTextModel

import seppo
from seppo import UserError, need, reading, whole

# ---- The numbers ----------------------------------------------------------------------------------------------------

SCORERS = {  # name in the table, and what the table multiplies a score by: cosines are shown as papers print them
    "pickscore": ("PickScore", 100), "hpsv2": ("HPSv2", 100), "hpsv2.1": ("HPSv2.1", 100), "imagereward": ("ImageReward", 1),
    "aesthetic": ("Aesthetic", 1), "clip": ("CLIPScore", 100), "mini": ("Score", 1)}
PAPER = {"pickscore": 21.57, "hpsv2": 27.20, "imagereward": 0.615}  # SePPO on Pick-a-Pic's validation_unique, a single run

def win_rate(scores, base, z=1.959964):
    """Share of prompts where a picture scores above the base's, and its 95 % interval: (rate, low, high), all in [0, 1].

    scores, base: (N,) scores for the same prompts. A tie is half a win. The interval is Wilson's, which keeps its coverage
    for few prompts and near 0 and 1, where rate +- 1.96 standard errors does not; with ties it is conservative.
    """
    n, rate = len(scores), ((1 + torch.sign(scores - base)) / 2).double().mean().item()
    middle, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))

def table(scores, paper=False):
    """Markdown: a row for each model, for each scorer the mean with its standard error and the win rate against the base.

    scores: {model: {scorer: (N,) tensor, or None where the scorer is missing}}, the base first; scorers are keys of SCORERS.
    paper: whether the paper's own figures stand below, as its own.
    """
    base = next(iter(scores.values()))
    rows = [["model"] + [cell for n in base for cell in (SCORERS[n][0] + (" x100" if SCORERS[n][1] == 100 else ""), "wins vs base")]]
    rows.append(["---"] * len(rows[0]))
    for model, values in scores.items():
        rows.append([model])
        for name, x in values.items():
            scale, digits = SCORERS[name][1], 2 if SCORERS[name][1] == 100 else 3
            if x is None:
                rows[-1] += ["missing", ""]
                continue
            rate, low, high = (100 * v for v in win_rate(x, base[name]))
            rows[-1] += [f"{scale * x.mean():.{digits}f}" + (f" ± {scale * x.std() / len(x) ** .5:.{digits}f}" if len(x) > 1 else ""),
                         "" if values is base else f"{rate:.1f} % [{low:.1f}, {high:.1f}]"]
    if paper and {*base} & {*PAPER}:
        rows.append(["*SePPO, the paper's own figures*"] + [cell for n in base for cell in (f"{PAPER.get(n, '')}", "")])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)

# ---- The scorers ----------------------------------------------------------------------------------------------------
# Each computes what its original code computes, in fp32 and with transformers alone: the original packages no longer
# install beside current ones. test_seppo.py compares them.

H14, L14, BERT = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14", "google-bert/bert-base-uncased"
AESTHETIC, AESTHETIC_FILE = "christophschuhmann/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth"  # on GitHub
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((.48145466, .4578275, .40821073), (.26862954, .26130258, .27577711)))

def to_tensor(image):  # RGB -> (3, h, w) in [0, 1]
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1) / 255

def crop_pixels(image, side, half=round):
    """CLIP's preprocessing: a PIL image -> (3, side, side), the shorter side to `side` (bicubic), centre crop, normalised.
    half: what becomes of half a pixel: torchvision rounds, transformers (PickScore) takes the floor."""
    w, h = image.size
    w, h = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    left, top = half((w - side) / 2), half((h - side) / 2)
    image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + side, top + side)).convert("RGB")
    return (to_tensor(image) - MEAN) / STD

def pad_pixels(image, side, antialias=True):
    """HPSv2's: the longest side to `side`, as floats, then black around it. torchvision antialiases this since 0.17; the
    authors' version did not, which moves the scores: never compare across."""
    x = to_tensor(image.convert("RGB"))
    scale = side / max(x.shape[1:])
    if scale != 1:
        x = F.interpolate(x[None], [round(v * scale) for v in x.shape[1:]], mode="bicubic", antialias=antialias)[0]
    h, w = side - x.shape[1], side - x.shape[2]
    return (F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)) - MEAN) / STD

def clean(prompt):
    """What OpenAI's and open_clip's tokenizers do before they split: ftfy's most frequent mends, html entities, white space."""
    plain = dict.fromkeys((0x2018, 0x2019, 0x201A, 0x201B, 0x02BC), "'") | dict.fromkeys((0x201C, 0x201D, 0x201E, 0x201F), '"')
    plain |= {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0xFEFF: None}  # full-width characters; byte order mark
    return " ".join(unicodedata.normalize("NFC", html.unescape(html.unescape(prompt)).translate(plain)).split())

class Scorer(torch.nn.Module):
    """score(images, prompts): PIL images and as many strings -> (N,) fp32 on the CPU, in the units of the original code.
    score_tensors(pixels, input_ids, attention_mask): (N, 3, S, S) normalised pixels, (N, L) tokens and mask -> (N,)."""

    def __init__(self, pixels, tokenizer, length, tidy=str):
        super().__init__()
        self.pixels, self.tokenizer, self.length, self.tidy = pixels, tokenizer, length, tidy

    @torch.no_grad()
    def score(self, images, prompts):
        tokens = self.tokenizer([self.tidy(prompt) for prompt in prompts], padding="max_length", truncation=True,
                                max_length=self.length, return_tensors="pt")
        inputs = torch.stack([self.pixels(image) for image in images]), tokens.input_ids, tokens.attention_mask
        return self.score_tensors(*(v.to(next(self.parameters()).device) for v in inputs)).float().cpu()

class ClipScorer(Scorer):
    """PickScore, HPSv2, CLIPScore: the cosine of a CLIP's picture and text vectors. With a head, LAION's aesthetic predictor:
    linear layers on the unit picture vector, whatever the prompt."""

    def __init__(self, clip, *args, head=None):
        super().__init__(*args)
        self.clip, self.head = clip, head

    def score_tensors(self, pixels, input_ids=None, attention_mask=None):
        unit = lambda out: F.normalize(getattr(out, "pooler_output", out))  # an object since transformers 5
        picture = unit(self.clip.get_image_features(pixel_values=pixels))
        if self.head:
            return self.head(picture).squeeze(-1)
        return (picture * unit(self.clip.get_text_features(input_ids=input_ids, attention_mask=attention_mask))).sum(-1)

class ImageReward(Scorer):
    """BLIP's text encoder looks at the picture through cross attention; linear layers read its first token."""

    def __init__(self, state, text, *args):
        super().__init__(*args)
        vision, (_, tokens, width) = part(state, "blip.visual_encoder."), state["blip.visual_encoder.pos_embed"].shape
        patch, depth = vision["patch_embed.proj.weight"].shape[-1], sum(key.endswith("qkv.weight") for key in vision)
        self.vision = transformers.BlipVisionModel(transformers.BlipVisionConfig(
            hidden_size=width, intermediate_size=len(vision["blocks.0.mlp.fc1.bias"]), num_hidden_layers=depth, patch_size=patch,
            num_attention_heads=16, image_size=math.isqrt(tokens - 1) * patch, layer_norm_eps=1e-6))  # timm's; the default is 1e-5
        self.text = BlipTextModel(transformers.BlipTextConfig(**text | {"encoder_hidden_size": width}), add_pooling_layer=False)
        self.vision.load_state_dict(renamed(vision, IMAGEREWARD_KEYS))
        self.text.load_state_dict({k: v for k, v in part(state, "blip.text_encoder.").items() if "position_ids" not in k})
        self.head = linear_chain(part(state, "mlp.layers."))

    def score_tensors(self, pixels, input_ids, attention_mask):
        seen = self.vision(pixels).last_hidden_state  # (N, patches + 1, width)
        read = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=seen, is_decoder=False).last_hidden_state
        return (self.head(read[:, 0]).squeeze(-1) - 0.16717362830052426) / 1.0333394966054072  # standardised by its authors

def part(state, prefix):
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    need(found, f"there are no weights {prefix}*")
    return found

def linear_chain(state):
    """Linear layers in a row, numbered with gaps where dropout was. Neither original has a non-linearity between them."""
    layers = {key.split(".")[0]: torch.nn.Linear(*reversed(w.shape)) for key, w in sorted(state.items()) if w.ndim == 2}
    chain = torch.nn.Sequential(OrderedDict(layers))
    chain.load_state_dict(state)
    return chain

IMAGEREWARD_KEYS = {  # timm's names -> transformers'
    r"^cls_token": "embeddings.class_embedding", r"^pos_embed": "embeddings.position_embedding", r"^norm\.": "post_layernorm.",
    r"^patch_embed\.proj": "embeddings.patch_embedding", r"^blocks": "encoder.layers", r"\.norm(\d)": r".layer_norm\1",
    r"attn\.qkv": "self_attn.qkv", r"attn\.proj": "self_attn.projection"}
CLIP_KEYS = {  # OpenAI's names, which open_clip and HPSv2 keep -> transformers'
    r"^visual\.proj$": "visual_projection.weight", r"^text_projection$": "text_projection.weight", r"^visual\.": "vision_model.",
    r"^(?=transformer|token_|positional_|ln_final)": "text_model.", r"transformer\.resblocks": "encoder.layers",
    r"\.attn\.": ".self_attn.", r"\.ln_(\d)": r".layer_norm\1", r"mlp\.c_fc": "mlp.fc1", r"mlp\.c_proj": "mlp.fc2",
    r"\.(class_embedding|token_embedding)": r".embeddings.\1", r"\.positional_embedding": ".embeddings.position_embedding.weight",
    r"\.conv1": ".embeddings.patch_embedding", r"\.ln_pre": ".pre_layrnorm", r"\.ln_post": ".post_layernorm",
    r"\.ln_final": ".final_layer_norm"}

def renamed(state, rules):
    return {functools.reduce(lambda key, rule: re.sub(*rule, key), rules.items(), key): tensor for key, tensor in state.items()}

def from_open_clip(state):
    """A state dict under OpenAI's and open_clip's names -> the same weights for transformers' CLIPModel."""
    state = {key: tensor.T if key in ("visual.proj", "text_projection") else tensor for key, tensor in state.items()}
    split = {}
    for key, tensor in renamed(state, CLIP_KEYS).items():  # q, k and v are one tensor there
        split |= {key.replace("in_proj_", f"{p}_proj."): t for p, t in zip("qkv", tensor.chunk(3))} if "in_proj_" in key else {key: tensor}
    return split

def place(folder, repository, file=""):
    """Where a repository, or a file of it, is: on the hub, or in FOLDER/OWNER/NAME, FOLDER/NAME or FOLDER itself."""
    if folder is None:
        return huggingface_hub.hf_hub_download(repository, file) if file else repository
    places = Path(folder, repository), Path(folder, repository.split("/")[1]), Path(folder)
    return str(Path(next((p for p in places if p.is_dir()), folder), file))

def load_scorer(name, folder=None, device="cpu", antialias=True):
    """A scorer, by a key of SCORERS, in fp32, with `score` and `score_tensors` (see Scorer).

    folder: where the hub's own files lie, as FOLDER/OWNER/NAME, FOLDER/NAME or all in FOLDER; None: the hub (for the aesthetic
    predictor's head, GitHub). antialias: of HPSv2's resize. Raises UserError if the name is unknown or weights can't be had.
    """
    need(name in SCORERS, f"{name} is no scorer: there are {', '.join(SCORERS)}")
    if name == "mini":  # the miniature's own taste
        def pixels(images):  # (N, 3, 16, 16); filmstrips: (N, 3, F, 16, 16)
            x = torch.stack([to_tensor(image.convert("RGB")) for image in images]) * 2 - 1
            return x if x.shape[2] == x.shape[3] else x.unflatten(3, (-1, x.shape[2])).movedim(3, 2)
        return argparse.Namespace(score=lambda images, prompts: seppo.mini_score(pixels(images), prompts), score_tensors=seppo.mini_score)
    load = functools.partial(torch.load, map_location="cpu", weights_only=True)
    with reading(f"the weights of {SCORERS[name][0]}", "--scorer-weights takes a folder with the hub's files"):
        pixels, tidy, head = functools.partial(crop_pixels, side=224), clean, None
        if name == "imagereward":
            text, weights = (place(folder, "zai-org/ImageReward", file) for file in ("med_config.json", "ImageReward.pt"))
            tokenizer = seppo.load_tokenizer(transformers.BertTokenizer, place(folder, BERT))
            scorer = ImageReward(load(weights), json.loads(Path(text).read_text()), pixels, tokenizer, 35)
        else:
            home = place(folder, {"pickscore": "yuvalkirstain/PickScore_v1", "aesthetic": L14, "clip": L14}.get(name, H14))
            if name.startswith("hpsv2"):  # the laion model with other weights, in fp16 and under open_clip's names
                clip = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(home))
                clip.load_state_dict(from_open_clip(load(place(folder, "xswu/HPSv2", f"HPS_{name[3:]}_compressed.pt"))["state_dict"]))
                pixels = functools.partial(pad_pixels, side=224, antialias=antialias)
            else:
                clip = seppo.load_whole(transformers.CLIPModel, home, dtype=torch.float32)
            if name == "pickscore":  # as transformers does it all
                pixels, tidy = functools.partial(pixels, half=math.floor), str
            if name == "aesthetic":
                url = f"https://github.com/{AESTHETIC}/raw/main/{AESTHETIC_FILE.replace('+', '%2B')}"
                fetch = functools.partial(torch.hub.load_state_dict_from_url, map_location="cpu", weights_only=True, progress=False)
                with contextlib.redirect_stdout(sys.stderr):
                    state = load(place(folder, AESTHETIC, AESTHETIC_FILE)) if folder else fetch(url, file_name=AESTHETIC_FILE)
                head = linear_chain(part(state, "layers."))
            scorer = ClipScorer(clip, pixels, seppo.load_tokenizer(transformers.CLIPTokenizer, home), 77, tidy, head=head)
        scorer = scorer.to(device).eval()
        scorer.score([Image.new("RGB", (224, 224))], ["a"])  # what does not fit together is said now
        return scorer

# ---- The prompts and their noise ------------------------------------------------------------------------------------

PICKAPIC, PARTI, HPD = ("yuvalkirstain/pickapic_v2_no_images", seppo.PICKAPIC[0]), "nateraw/parti-prompts", "zhwang/HPDv2"
NAMED = {"mini": 480, "pickapic": 500, "parti": 1632, "hpsv2": 3200}  # how many prompts each has

def read_prompts(name):
    """--prompts: a key of NAMED, or a file: JSON (a list, as the authors' of {"prompt": ...}), JSONL, or lines of text -> the
    prompts in order, without blank ones. Raises UserError."""
    hub, path = functools.partial(huggingface_hub.hf_hub_download, repo_type="dataset"), Path(name)
    with reading(f"--prompts {name}", f"it takes {', '.join(NAMED)}, or a file: text, JSON or JSONL"):
        if name == "mini":
            rows = [seppo.CAPTIONS[i % len(seppo.CAPTIONS)] for i in range(NAMED["mini"])]
        elif name == "pickapic":
            rows = pickapic_captions()
        elif name == "parti":  # `datasets` reads it so too
            rows = csv.DictReader(Path(hub(PARTI, "PartiPrompts.tsv")).read_text("utf-8").split("\n"), delimiter="\t")
        elif name == "hpsv2":
            styles = (hub(HPD, f"benchmark/{style}.json") for style in ("anime", "concept-art", "paintings", "photo"))
            rows = [prompt for style in styles for prompt in json.loads(Path(style).read_text("utf-8"))]
        else:
            text = path.read_text("utf-8-sig")
            rows = json.loads(text) if path.suffix == ".json" else [
                json.loads(line) if path.suffix == ".jsonl" else line for line in text.split("\n") if line.strip()]
        need(not isinstance(rows, (dict, str)), f"--prompts {name} holds no list")
        keys = ("prompt", "Prompt", "caption", "text")
        rows = [row if isinstance(row, str) else next(row[key] for key in keys if row.get(key)) for row in rows]
        prompts = [row.strip() for row in rows if row.strip()]
        "".join(prompts).encode()  # no tokenizer takes half a surrogate pair
    need(prompts, f"--prompts {name} holds no prompt")
    need(len(prompts) == NAMED.get(name, len(prompts)), f"--prompts {name}: {len(prompts)} prompts came, not {NAMED.get(name)}")
    return prompts

def pickapic_captions():
    """Pick-a-Pic's validation_unique, the file with this split only: it stays in the hub's cache."""
    from pyarrow.parquet import read_table
    for repository in PICKAPIC:  # the same captions in both; the first may be gone, the second has 171 MB of pictures beside them
        with contextlib.suppress(*(Exception,) * (repository != PICKAPIC[-1])):
            home = huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns="*/validation_unique-*.parquet")
            tables = [read_table(file, columns=["caption"]) for file in sorted(Path(home).rglob("*.parquet"))]
            print(f"prompts: validation_unique of {repository}")
            return [caption for table in tables for caption in table["caption"].to_pylist()]

def start_noise(prompts, shape, seed=0, protocol="paired", device="cpu", dtype=torch.float32):
    """The (C, h, w) fp32 noise that each prompt's picture starts from: a list, on the CPU.

    paired: drawn from (seed, prompt, how often the prompt came before): the same for a prompt in any list of prompts.
    paper: from one generator, on the device and in the dtype of the pipeline, prompt after prompt, as a loop over diffusers'
    pipeline draws it (PNDM draws nothing more). It is all drawn up front, so resuming or splitting changes nothing.
    """
    if protocol == "paper":
        g = torch.Generator(device).manual_seed(seed)
        return [torch.randn((1, *shape), generator=g, device=device, dtype=dtype)[0].float().cpu() for _ in prompts]
    seen, noises = Counter(), []
    for prompt in prompts:
        noises.append(torch.randn(shape, generator=torch.Generator().manual_seed(seppo.key(seed, "prompt", prompt, seen[prompt]))))
        seen[prompt] += 1
    return noises

# ---- The pictures ---------------------------------------------------------------------------------------------------

def find_unets(o):
    """--unet -> {name: folder or hub id}, the base (None) first. Of a run it is the last checkpoint."""
    specs, found = o.unet, {"base": None}
    if o.model in seppo.MINI and not specs:
        runs = []
        for path in Path("runs").glob("*/config.json"):
            with contextlib.suppress(ValueError, LookupError, TypeError):  # whatever else lies there
                runs += [path] * (json.loads(path.read_text())["options"]["model"] == o.model)
        need(runs, f"runs/ holds no run of {o.model}: python seppo.py --model {o.model} makes one")
        specs = [str(max(runs, key=lambda path: path.stat().st_mtime).parent)]
    for spec in specs or ():
        with reading(f"--unet {spec}", "it takes NAME=WHERE or WHERE"):
            name, equals, where = spec.partition("=")
            name, where = (name, where) if equals and not Path(spec).exists() else (None, spec)
            need(where, f"--unet {spec} does not say where: NAME=WHERE")
            steps = [int(p.name[11:]) for p in Path(where).glob("checkpoint-*") if p.name[11:].isdigit()]
            parts = [p for p in Path(where).resolve().parts if p != "unet"][-2:]
        name = name or "-".join(parts[-2 if parts[-1].startswith("checkpoint-") else -1:])
        need(re.fullmatch(r"\w[\w.+-]*", name) and name not in found, f"--unet {spec} needs a name of its own: NAME={where}")
        found[name] = str(Path(where, f"checkpoint-{max(steps)}")) if steps else where
    return found

def load_checked(name, where, base):
    """The UNet that stands beside the base, of the same shape; of clips it may have only motion modules of its own. Raises
    UserError."""
    with reading(f"--unet {name}={where}", "it takes a run, a checkpoint, a UNet's folder as diffusers saves it, or a hub id"):
        unet = seppo.load_unet(where, type(base), *[diffusers.MotionAdapter] * isinstance(base, diffusers.UNetMotionModel))
        if isinstance(unet, diffusers.MotionAdapter):
            adapter, unet = unet, copy.deepcopy(base)
            unet.load_motion_modules(adapter)
    shapes = lambda net: {key: tensor.shape for key, tensor in net.state_dict().items()}
    need(shapes(unet) == shapes(base), f"--unet {name}={where} has another shape than the UNet of --model")
    return unet

def digest(*parts):
    """A short hash of modules (weights and configuration), tensors, and whatever else prints alike when it is alike."""
    h = hashlib.blake2b(digest_size=6)
    for item in parts:
        if isinstance(item, torch.nn.Module):
            config = item.config if isinstance(item.config, dict) else item.config.to_dict()
            settings = sorted((k, v) for k, v in config.items() if k[0] != "_" and k != "transformers_version")
            item = digest(settings, *item.state_dict().values())
        h.update(item.cpu().contiguous().flatten().view(torch.uint8).numpy() if torch.is_tensor(item) else repr(item).encode())
    return h.hexdigest()

@torch.no_grad()
def generate(o, unets, base, codec, prompts, batches):
    """Make the pictures that are missing -> {model: their files}. A file's name has a hash of weights, prompt, noise
    and settings: what changed is made anew. A picture's rounding depends on its batch too, so the batches depend on neither the
    processes nor what is there already."""
    base, side, dtype = base.cpu(), o.resolution // codec.factor, seppo.DTYPES[o.dtype][1]
    noises = start_noise(prompts, (codec.channels, *[o.frames] * bool(o.frames), side, side), o.seed, o.protocol, o.device, dtype)
    marks = digest(*(v for v in vars(codec).values() if isinstance(v, torch.nn.Module)),
                   sorted(item for item in codec.scheduler.config.items() if item[0][0] != "_"),  # those are in random order
                   (o.solver, o.sampler_steps, o.guidance, o.dtype, o.device[:4]))  # which kind of device, not which one
    marks = {name: digest(load_checked(name, where, base) if where else base, marks) for name, where in unets.items()}  # all, at once
    null, files = codec.encode_text([""]), {}
    for name, where in unets.items():
        files[name] = [Path(o.out, "pictures", name, f"{i:05d}-{digest(marks[name], prompt, noise)}.png")
                       for i, (prompt, noise) in enumerate(zip(prompts, noises))]
        missing = [part for part in batches if not all(file.exists() for file in files[name][part])]
        unet = (load_checked(name, where, base) if where else base).to(o.device, dtype).eval() if missing else None
        for part in progress(o, missing, prompts, f"{name}: pictures"):
            noise, context = torch.stack(noises[part]).to(o.device), codec.encode_text(prompts[part])
            latents = seppo.sample(unet, codec.scheduler, noise, context, null, o.solver, o.sampler_steps, o.guidance)
            need(latents.isfinite().all(), f"{name} draws what is not finite: --dtype fp32 may help, or leave it out")
            pixels = ((codec.decode(latents) + 1) * 127.5).round().byte().cpu()  # (B, 3, [F,] R, R)
            if o.frames:  # a clip is kept as a filmstrip
                pixels = pixels.transpose(2, 3).flatten(3)  # (B, 3, R, F R)
            with ThreadPoolExecutor() as pool:
                list(pool.map(save_png, map(Image.fromarray, pixels.permute(0, 2, 3, 1).numpy()), files[name][part]))
    return files

def save_png(image, path):
    with whole(path) as file:
        image.save(file, "PNG")

def progress(o, batches, prompts, what):
    """The batches, under a bar that counts pictures; of many processes only the first shows its own."""
    with tqdm(total=sum(len(prompts[part]) for part in batches), desc=what, unit="picture", disable=o.rank > 0 or not batches) as bar:
        for part in batches:
            yield part
            bar.update(len(prompts[part]))

def score_pictures(o, files, prompts, batches):
    """-> {(model, i): {scorer: score}} for this process's prompts, {scorer: why it is missing}. Scores are not kept for the
    next time: generating takes far longer."""
    scores, missing = {}, {}
    for name in o.scorers:
        try:
            o.rank or print(f"loading {SCORERS[name][0]}")
            scorer = load_scorer(name, o.scorer_weights, o.device, antialias=o.protocol != "paper")
        except UserError as error:
            missing[name] = str(error)
            continue
        for model, paths in files.items():
            for part in progress(o, batches, prompts, f"{model}: {SCORERS[name][0]}"):
                with ThreadPoolExecutor() as pool, reading(f"a picture in {Path(o.out, 'pictures', model)}", "delete it; it is made again"):
                    images = list(pool.map(lambda path: Image.open(path).convert("RGB"), paths[part]))
                captions, frames = prompts[part], 1 if name == "mini" else o.frames or 1  # the miniature's taste is for whole clips
                if frames > 1:
                    images = [image.crop((i * image.height, 0, (i + 1) * image.height, image.height)) for image in images for i in range(frames)]
                    captions = [caption for caption in captions for _ in range(frames)]
                for i, score in zip(range(len(prompts))[part], scorer.score(images, captions).view(-1, frames).mean(1).tolist()):
                    scores.setdefault((model, i), {})[name] = score
    return scores, missing

# ---- The output -----------------------------------------------------------------------------------------------------

def report(o, files, prompts, scores, missing):
    """table.md and the same on the terminal, scores.jsonl, grid.png."""
    out, several = Path(o.out), range(len(prompts))
    columns = {model: {name: None if name in missing else torch.tensor([scores[model, i][name] for i in several], dtype=torch.float64)
                       for name in o.scorers} for model in files}
    rows = table(columns, o.prompts == "pickapic" and len(prompts) == NAMED["pickapic"])
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers"))
    hps = f"HPSv2 resizes with{'out' * (o.protocol == 'paper')} antialiasing; " * any("hps" in name for name in o.scorers)
    what, frames = ("clip", f"{o.frames} frames (picture scorers: their mean), ") if o.frames else ("picture", "")
    text = [rows, f"{len(prompts)} prompts ({o.prompts}), one {what} each. ± is the standard error over prompts; wins: the share of prompts "
            f"where the model's {what} scores above the base's, with its 95 % interval; x100: scores are multiplied.",
            f"Model {o.model}; {o.resolution} pixels, {frames}{o.solver}, {o.sampler_steps} steps, guidance {o.guidance:g}, {o.dtype}, {o.device}, "
            f"seed {o.seed}, protocol {o.protocol}, no safety checker; {hps}{versions}.",
            *["The paper's figures are of its own protocol (--protocol paper): another solver, another resize in HPSv2."] * (
                "paper's own" in rows and o.protocol != "paper"),
            *(f"{SCORERS[name][0]} is missing: {why}." for name, why in missing.items())]
    grid = f"grid.{'webp' if o.frames else 'png'}"
    rows = ({"model": model, "index": i, "prompt": prompts[i], "file": str(files[model][i].relative_to(out))} | scores.get((model, i), {})
            for model in files for i in several)
    print("\n" + "\n\n".join(text) + f"\n\nIn {out}: table.md, scores.jsonl, {grid}, pictures/")
    for name, content in (("table.md", "\n\n".join(text) + "\n"), ("scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))):
        with whole(out / name) as file:
            file.write_text(content, "utf-8")
    draw_grid(files, prompts, out / grid, o.frames)

def draw_grid(files, prompts, path, frames=None, rows=6, tile=192, head=28):
    """grid.png: the first prompts down, with their captions, models across; of clips an animated grid.webp."""
    font, sheet = ImageFont.load_default(16), Image.new("RGB", (tile * (1 + len(files)), head + tile * min(rows, len(prompts))), "white")
    draw, sheets = ImageDraw.Draw(sheet), []
    for x, model in enumerate(files, 1):
        draw.text((tile * (x + .5), head / 2), model[:22], "black", font, "mm")
    for y, prompt in enumerate(prompts[:rows]):
        caption = "\n".join(textwrap.wrap(prompt, 21, max_lines=9, placeholder=" ..."))
        draw.multiline_text((8, head + tile * (y + .5)), caption, "black", font, "lm")
    for frame in range(frames or 1):
        sheets.append(sheet.copy())
        for x, paths in enumerate(files.values(), 1):
            for y, file in enumerate(paths[:rows]):
                with Image.open(file) as image:  # a filmstrip, or a picture
                    side, kind = image.height, Image.NEAREST if image.height < tile else Image.LANCZOS
                    picture = image.crop((frame * side, 0, (frame + 1) * side, side)).resize((tile - 4, tile - 4), kind)
                sheets[-1].paste(picture, (tile * x + 2, head + tile * y + 2))
    with whole(path) as file:
        seppo.save_pictures(sheets, file)

def subplots(*args, **options):
    import matplotlib  # only where something is drawn
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot.subplots(*args, layout="constrained", **options)

def draw_curves(runs, path, window=10):
    """curves.png: what the runs logged (metrics.jsonl), as means over the last `window` updates."""
    figure, axes = subplots(2, 2, figsize=(11, 7), sharex=True)
    panels = {"winner's error": ("policy_w", "reference_w"), "reference sample's error": ("policy_r", "reference_r"),
              "share of signs": ("sign_pos", "sign_neg", "sign_zero"), "implicit accuracy": ("implicit_acc",)}
    for i, run in enumerate(runs):
        with reading(f"--runs {run}", "it takes the folders of runs"):
            lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
            need(lines, f"--runs {run} has logged nothing yet")
            for axis, (title, keys) in zip(axes.flat, panels.items()):
                axis.set(title=f"{title}, mean of {window} updates", xlabel="update")
                for key, style in zip(keys, ("-", "--", ":")):
                    points = [(line["update"], line[key]) for line in lines if line[key] is not None]  # SFT has no reference
                    if points:
                        updates, values = zip(*points)
                        smooth = [sum(values[max(0, n - window):n]) / min(n, window) for n in range(1, len(values) + 1)]
                        axis.plot(updates, smooth, style, color=f"C{i}", label=f"{Path(run).name}: {key}")
                        axis.legend(fontsize=7)
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"curves: {path}")

# ---- The study ------------------------------------------------------------------------------------------------------
# The paper's comparisons on the miniature, with what the paper lacks: one budget for all, each method at its own learning
# rate and beta (one grid, on seeds of its own), and intervals over other seeds. A cell is an ordinary run of seppo.py.

VARIANTS = {name: ["--method", name] for name in seppo.METHODS} | {  # the presets, and single switches from seppo
    "random, no flip": ["--flip", "none"], "latest, sign": ["--reference", "latest"], "initial, sign": ["--reference", "initial"]}
STUDIES = {"full": dict(lr=(1e-5, 3e-5, 1e-4, 3e-4, 9e-4), beta=(5, 25, 125), tuning=(0, 1), seeds=range(10, 18)),
           "small": dict(lr=(1e-4,), beta=(5,), tuning=(0,), seeds=range(10, 12))}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # Student's t, by the number of seeds

@torch.no_grad()
def mini_pictures(unet, captions, noise):
    codec = seppo.Miniature("cpu")
    return codec.decode(seppo.sample(unet, codec.scheduler, noise, codec.encode_text(captions), codec.encode_text([""]), "dpm++",
                                     seppo.SMALL["sampler_steps"], seppo.SMALL["guidance"]))

def mini_mean(unet):
    """The mean score of a UNet's pictures for `mini`'s prompts."""
    prompts = read_prompts("mini")
    return seppo.mini_score(mini_pictures(unet, prompts, torch.stack(start_noise(prompts, (12, 8, 8)))), prompts).mean().item()

@torch.no_grad()
def anchor_truth(run, rule, n=256, many=16):
    """What the anchor's sign is worth, where the truth is known: over the pairs of a run's checkpoints, the later one as policy,
    the earlier one as a reference that the rule allows, on n winners each. -> rates: "better": x^r scores above what the policy
    draws from the same noise; of those where the sign is -1 ("take x^r for a winner") the "precision" and "recall" for that;
    "precision_many", as if the anchor's two errors were means over many draws of (t, eps) instead of one."""
    captions, winners, _ = zip(*seppo.open_mini("mini")[2](0, 0, n))
    codec, x, errors, scores = seppo.Miniature("cpu"), F.pixel_unshuffle(torch.stack(winners), 2), [], []
    chance = [seppo.draws(f"truth {i}", range(n), x.shape[1:], 1000, 0) for i in range(many)]
    for step in sorted(int(p.name[11:]) for p in run.glob("checkpoint-*")):
        unet, context = seppo.load_unet(run / f"checkpoint-{step}"), codec.encode_text(captions)
        errors.append(torch.stack([seppo.denoising_error(unet, codec.scheduler, x, eps, t, context) for t, _, eps, *_ in chance]))
        scores.append(seppo.mini_score(mini_pictures(unet, captions, chance[0][-1]), captions))
    pairs = [(r, p) for p in range(1, len(scores)) for r in {"random": range(p), "latest": [p - 1], "initial": [0]}[rule]]
    better = torch.cat([scores[r] > scores[p] for r, p in pairs])
    minus = torch.cat([errors[r][0] < errors[p][0] for r, p in pairs])
    minus_many = torch.cat([errors[r].mean(0) < errors[p].mean(0) for r, p in pairs])
    share = lambda mask, of: (mask & of).sum().item() / max(1, of.sum().item())
    return {"better": better.float().mean().item(), "precision": share(better, minus), "recall": share(minus, better),
            "precision_many": share(better, minus_many)}

def cell_folder(out, variant, lr, beta, seed):
    return Path(out, re.sub(r"\W+", "-", variant) + f"-lr{lr:g}-beta{beta:g}-seed{seed}")

def run_cell(out, variant, lr, beta, seed, keep=False):
    """One cell -> {"score": the mean of 480 pictures (0, as plain grey, if the loss ceased to be finite), ...}; from the disk
    if it was done before. keep: its final UNet stays, and the anchor's sign is held against the truth."""
    run = cell_folder(out, variant, lr, beta, seed)
    path = run.with_name(run.name + ".json")
    argv = ["--lr", f"{lr:g}", *(["--beta", f"{beta:g}"] if beta else []), "--seed", f"{seed}", "--device", "cpu", "--out", str(run)]
    argv += VARIANTS[variant]
    if not path.exists():
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code, o = seppo.main(argv), seppo.resolve(argv)
        reason = said.getvalue().strip().rpartition("\n")[2]
        need(code == 0 or "gradient norm" in reason, f"a cell of the study failed: python seppo.py {' '.join(argv)}: {reason}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        cell = {"argv": argv, "score": 0.0 if code else mini_mean(seppo.load_unet(run / f"checkpoint-{o.steps}"))}
        if o.loser == "generated":
            cell |= {sign: [line[sign] for line in lines] for sign in ("sign_neg", "sign_zero", "sign_pos")}
            cell |= anchor_truth(run, o.reference) if keep and o.flip != "none" and code == 0 else {}
        with whole(path) as file:
            file.write_text(json.dumps(cell))
        for old in (run / "resume", *run.glob("checkpoint-*")):  # hundreds of runs
            if not keep or old.name != f"checkpoint-{o.steps}":
                seppo.remove(old)
    return json.loads(path.read_text())

def run_cells(out, cells, keep, what):
    """-> {cell: its result}, on all cores. What is done already is only read."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(run_cell, out, *cell, keep=keep) for cell in cells]
        for _ in tqdm(as_completed(jobs), desc=what, total=len(jobs), unit="run"):
            pass
        return {cell: job.result() for cell, job in zip(cells, jobs)}

def interval(values):
    """Mean and half the 95 % interval (Student's t) of what the seeds gave."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), T95[len(values)] * values.std().item() / len(values) ** .5

def anchor_cells(variant, runs):
    """Of the runs that have an anchor and did not diverge: how often its sign is -1, and what that is worth."""
    runs = [run for run in runs if "precision" in run]
    if len(runs) < 2:
        return [""] * 7
    signs = [run["sign_zero" if variant == "sspo" else "sign_neg"] for run in runs]  # the indicator makes 0 of -1
    halves = [[sum(half) / len(half) for half in (sign[:len(sign) // 2], sign[len(sign) // 2:])] for sign in signs]
    both = [run["better"] * run["recall"] for run in runs]  # better, and the sign is -1
    plus = [(run["better"] - b) / max(1e-9, 1 - b / max(1e-9, run["precision"])) for run, b in zip(runs, both)]
    rates = [*zip(*halves), *([run[key] for run in runs] for key in ("better", "precision")), plus,
             *([run[key] for run in runs] for key in ("recall", "precision_many"))]
    return ["{:.0%} ± {:.0%}".format(*interval(rate)) for rate in rates]

def study(o):
    """study.md: the comparison; heat.png: every method over the grid; strip.png: samples at equal noise."""
    plan, out = argparse.Namespace(**STUDIES[o.study]), Path(o.out)
    base = seppo.load_mini("mini")  # trained here, once, before many processes need it
    home = out / f"cells-{digest(base, seppo.MINI, VARIANTS)}"  # another base model or other settings: other cells
    grids = {v: list(itertools.product(plan.lr, plan.beta if v != "sft" else (0,))) for v in VARIANTS}  # SFT has no beta
    tuning = run_cells(home, [(v, *at, seed) for v in VARIANTS for at in grids[v] for seed in plan.tuning], False, "tuning")
    mean = {(v, *at): sum(tuning[v, *at, seed]["score"] for seed in plan.tuning) / len(plan.tuning) for v in VARIANTS for at in grids[v]}
    best = {v: max(grids[v], key=lambda at: mean[v, *at]) for v in VARIANTS}
    final = run_cells(home, [(v, *best[v], seed) for v in VARIANTS for seed in plan.seeds], True, "comparison")
    at_base, cells = mini_mean(base), {v: [final[v, *best[v], seed] for seed in plan.seeds] for v in VARIANTS}
    heads = ("method", "lr", "beta", "score", "minus sft", "minus seppo", "grid cells below the base", "sign -1: first half", "second half",
             "x^r better", "where the sign is -1", "where it is +1", "recall of -1", "where 16 draws say -1")
    rows = [heads, ["---"] * len(heads)]
    for v, runs in cells.items():
        score = "{:.3f} ± {:.3f}".format(*interval([run["score"] for run in runs]))
        minus = ["{:+.3f} ± {:.3f}".format(*interval([a["score"] - b["score"] for a, b in zip(runs, cells[other])])) if v != other else ""
                 for other in ("sft", "seppo")]
        rows.append([v, f"{best[v][0]:g}", f"{best[v][1]:g}" if v != "sft" else "", score, *minus,
                     f"{sum(mean[v, *at] < at_base for at in grids[v])} of {len(grids[v])}", *anchor_cells(v, runs)])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows) + (
        f"\n\nThe miniature's base model: {at_base:.3f}. Score: mean over {len(plan.seeds)} seeds ({min(plan.seeds)} to {max(plan.seeds)}) of "
        "the mean of 480 pictures, with its 95 % interval (Student's t); differences: paired by seed. lr and beta: the best of the grid on "
        f"seeds {', '.join(map(str, plan.tuning))}. {len(tuning) + len(final)} runs of 100 updates of 64 winners.")
    print("\n" + text)
    with whole(out / "study.md") as file:
        file.write_text(text + "\n", "utf-8")
    draw_heat(mean, grids, plan, at_base, out / "heat.png")
    last, captions = f"checkpoint-{seppo.MINI['mini']['steps']}", seppo.CAPTIONS[:12]
    ends = {v: cell_folder(home, v, *best[v], plan.seeds[0]) / last for v in ("sft", "spin", "seppo") if v in VARIANTS}
    nets = {"base": base} | {v: seppo.load_unet(end) for v, end in ends.items() if end.is_dir()}  # what diverged has none
    noise = torch.stack(start_noise(captions, (12, 8, 8)))
    pictures = torch.cat([mini_pictures(net, captions, noise) for net in nets.values()])  # (nets x 12, 3, 16, 16)
    tiles = [Image.fromarray(p).resize((80, 80), Image.NEAREST) for p in ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()]
    save_png(diffusers.utils.make_image_grid(tiles, len(nets), 12), out / "strip.png")
    print(f"\nIn {out}: study.md, heat.png, strip.png ({', '.join(nets)}, seed {plan.seeds[0]}), {home.name}/")

def draw_heat(mean, grids, plan, at_base, path):
    """heat.png: the mean score of every cell of the grid; white is the base, red below it."""
    figure, axes = subplots(3, 3, figsize=(11, 8))
    reach = max(max(mean.values()) - at_base, 1e-3)  # what diverged is far below: it has the darkest red
    for axis, (v, grid) in zip(axes.flat, grids.items()):
        betas = sorted({beta for _, beta in grid})
        values = [[mean[v, lr, beta] for lr in plan.lr] for beta in betas]
        axis.imshow(values, cmap="RdBu", vmin=at_base - reach, vmax=at_base + reach, aspect="auto")
        axis.set(title=v, xticks=range(len(plan.lr)), xticklabels=[f"{lr:g}" for lr in plan.lr], xlabel="lr", yticks=range(len(betas)),
                 yticklabels=[f"{beta:g}" if beta else "" for beta in betas], ylabel="beta")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(value - at_base) > .6 * reach else "black")
    figure.suptitle(f"mean score on the tuning seeds; the base model has {at_base:.2f}")
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=100)

# ---- The command line -----------------------------------------------------------------------------------------------

OPTIONS = (  # name, default (or a type where there is none), what it is, choices
    ("model", "mini", "the base: mini, a folder saved by diffusers, or a hub id"),
    ("unet", list, "UNets to compare, as NAME=WHERE or WHERE: a run (its last checkpoint), a checkpoint, a UNet, a hub id"),
    ("motion-adapter", str, "makes a text-to-video model of it: a folder or hub id; --unet then takes motion adapters too"),
    ("frames", int, "of a clip [16 with --motion-adapter]"),
    ("prompts", "pickapic", f"{', '.join(NAMED)}, or a file: text, JSONL, or a JSON list"),
    ("max-prompts", int, "the first N prompts only"),
    ("scorers", "pickscore,hpsv2,hpsv2.1,imagereward,aesthetic,clip", "comma-separated; for --model mini there is mini"),
    ("scorer-weights", str, "a folder with the hub's own files, instead of the hub"),
    ("protocol", "paired", "paired: a seed for each prompt; paper: one generator, PNDM, 50 steps, no antialiasing in HPSv2",
     ("paired", "paper")),
    ("solver", "dpm++", "a diffusers scheduler", seppo.SOLVERS),
    ("sampler-steps", 20, "its steps"),
    ("guidance", 7.5, "classifier-free guidance scale, 1 for none"),
    ("resolution", 512, "pixels"),
    ("seed", 0, "of the noise"),
    ("batch-size", 16, "pictures (clips: 1) at a time; another size changes pictures by rounding"),
    ("device", "auto", "auto, cpu, cuda, cuda:1"),
    ("dtype", str, "of the UNet, VAE and text encoder [fp16 on a GPU, fp32 on a CPU]", ("fp16", "bf16", "fp32")),
    ("out", str, "where the table and pictures go; pictures that are there are not made again [runs/eval-MODEL]"),
    ("study", str, "compare all methods on the miniature, 322 runs (full) or 27 (small), and do nothing else", STUDIES),
    ("runs", list, "draw curves.png of what these runs logged; given alone, only that"),
)
TINY = dict(prompts="mini", scorers="mini", sampler_steps=8, guidance=1.0, resolution=16)
PRESETS = {"mini": TINY | dict(batch_size=240), "mini-video": TINY | dict(batch_size=60, frames=seppo.SMALL_CLIPS["frames"]),
           "motion adapter": dict(frames=16, batch_size=1),
           "paper": dict(solver="pndm", sampler_steps=50)}

def resolve(argv=None):
    """A command line -> all options, defaults filled in; of rank and world too. Raises UserError."""
    given = seppo.parse(OPTIONS, argv, "Evaluate checkpoints. Defaults in brackets are for Stable Diffusion; --model mini has its own.")
    defaults = {name.replace("-", "_"): None if isinstance(default, type) else default for name, default, *_ in OPTIONS}
    o = argparse.Namespace(**defaults | PRESETS.get(given.get("model", "mini"), {}) | PRESETS.get(
        given.get("motion_adapter") and "motion adapter", {}) | PRESETS.get(given.get("protocol"), {}) | given)
    seppo.join(o)
    o.dtype = o.dtype or ("fp32" if o.device == "cpu" else "fp16")
    o.out = o.out or f"runs/study-{o.study}" * bool(o.study) or f"runs/eval-{Path(o.model).resolve().name}"
    seppo.check(o)
    o.scorers = [name.strip() for name in o.scorers.split(",")]
    unknown = {*o.scorers} - {*SCORERS}
    need(not unknown, f"--scorers {', '.join(unknown)}: there are {', '.join(SCORERS)}")
    need("mini" not in o.scorers or o.model in seppo.MINI and o.resolution == 16, "--scorers mini is for --model mini at 16 pixels")
    weights = Path(o.scorer_weights or ".")
    need(weights.is_dir(), f"--scorer-weights {weights} is no folder")
    need(not o.scorer_weights or len(o.scorers) == 1 or not (weights / "config.json").exists(),
         f"--scorer-weights {weights}: several scorers need a folder for each repository in it, OWNER/NAME or NAME")
    need(not o.study or given.keys() <= {"study", "out"} and o.world == 1, "--study takes --out only, and one process: it uses all cores")
    if o.world > 1:  # a day, since another process may have far more left to do
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    o.curves_only = given.keys() - {"out"} == {"runs"}
    return o

def evaluate(argv):
    o = resolve(argv)
    with reading(f"--out {o.out}", "choose another"):
        Path(o.out, "" if o.study else "pictures").mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.allow_tf32 = False  # which convolutions would use on a GPU where fp32 is meant
    if o.study:
        return study(o)
    if o.runs and o.rank == 0:
        draw_curves(o.runs, Path(o.out, "curves.png"))
    if o.curves_only:
        return
    if o.model in seppo.MOVED and not Path(o.model).is_dir() and o.rank == 0:
        print(f"{o.model} is gone from the hub: this takes its copy {seppo.MOVED[o.model]}")
    prompts = [read_prompts(o.prompts)[:o.max_prompts] if o.rank == 0 else None]
    if o.world > 1:  # from one process, lest two find different copies of a data set
        torch.distributed.broadcast_object_list(prompts)
    prompts, = prompts
    need("mini" not in o.scorers or {*prompts} <= {*seppo.CAPTIONS}, f"--prompts {o.prompts}: the miniature knows its own captions only")
    unets = find_unets(o)
    base, codec = seppo.load_models(argparse.Namespace(**vars(o) | {"unet": None, "train": None}))
    batches = [slice(i, i + o.batch_size) for i in range(0, len(prompts), o.batch_size)][o.rank::o.world]
    files = generate(o, unets, base, codec, prompts, batches)
    del base, codec
    scores, missing = score_pictures(o, files, prompts, batches)
    if o.world > 1:
        shares = [None] * o.world
        torch.distributed.all_gather_object(shares, (scores, missing))
        scores, missing = ({k: v for share in shares for k, v in share[i].items()} for i in (0, 1))
        torch.distributed.destroy_process_group()
    if o.rank == 0:
        report(o, files, prompts, scores, missing)
    need(len(missing) < len(o.scorers), "no scorer could be loaded")

def main(argv=None):
    """The command. Returns the exit code: 0, or 2 after one line that says what to do."""
    return seppo.main(argv, evaluate, "eval.py", "--batch-size")

if __name__ == "__main__":
    sys.exit(main())
