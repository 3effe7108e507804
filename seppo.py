"""SePPO, Semi-Policy Preference Optimization (Zhang et al., arXiv 2410.05255), in one file.

Align a diffusion model with what people like, from liked pictures alone: no losing pictures, no reward model. Earlier
checkpoints of the run are its references. A reference generates the sample that stands where DPO has the loser, and an
anchor criterion decides for each sample whether to push away from it or to learn from it too.

    python seppo.py                                                            # a miniature: two CPU cores, minutes
    python seppo.py --model runwayml/stable-diffusion-v1-5 --data pickapic     # the paper
    python seppo.py --model DIR_OR_ID --data DIR_OR_PARQUET_OR_ID --out runs/mine
    python seppo.py --model DIR_OR_ID --motion-adapter guoyww/animatediff-motion-adapter-v1-5-2 --data DIR_OF_CLIPS --frames 16

The same command again resumes. From top to bottom: the objective, the reference rule, the sampler, the data, the models,
the miniature, the loop, the command line. Left out on purpose: LoRA, SDXL, weight averaging, trackers (metrics.jsonl has
one JSON object per update) and the safety checker (it judges pictures; training never leaves latent space).
"""
import argparse, bisect, contextlib, copy, datetime, functools, hashlib, io, itertools, json, math
import os, random, re, shutil, signal, sys, tempfile, threading, time, warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
try:
    import resource
except ImportError:  # Windows
    resource = None

import diffusers, huggingface_hub, torch, transformers
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.utils import make_image_grid
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- The objective --------------------------------------------------------------------------------------------------
# Winner first, reference sample second, everywhere. m(x; net) is the mean squared error of a net's prediction on a noised
# x (denoising_error, below); one (t, eps) is shared by the winner x^w and its reference sample x^r, and by both nets:
#
#     s_w  = m(x^w; theta) - m(x^w; ref)                     winner, policy minus reference
#     s_r  = m(x^r; theta) - m(x^r; ref)                     reference sample, policy minus reference
#     sign = sgn( m(x^w; ref) - m(x^w; theta) )              the anchor criterion, on the winner; no gradient
#     L    = -log sigmoid( -beta/2 (s_w - sign * s_r) )      beta/2 holds T w(lambda_t), as in Diffusion-DPO's code
#
# +1: the policy predicts the winner better than the reference does, so x^r is the loser of a DPO pair. -1: the reference
# is the better model here, so its sample counts as a second winner. 0: equal (the first update): only the winner speaks.

FLIPS = {  # what becomes of the sign
    "sign": lambda sign: sign,                    # the paper: the Anchor-based Adaptive Flipper
    "indicator": lambda sign: sign.clamp(min=0),  # its ablation 1(x > 0): a likely winner is dropped, not learned from
    "none": torch.ones_like,                      # x^r always loses: Diffusion-DPO, SPIN-Diffusion
}

def seppo_loss(policy_w, reference_w, policy_r, reference_r, beta=2000.0, flip="sign", sign=None):
    """SePPO's loss (arXiv 2410.05255, with Diffusion-DPO's constants), one value per sample.

    policy_w, reference_w, policy_r, reference_r: (B,) mean squared errors >= 0 of winner and reference sample under
    policy and reference, all four computed on one numeric path. Pass fp32: beta multiplies their rounding.
    beta: > 0. flip: a key of FLIPS. sign: (B,) in {-1, 0, 1}, where the anchor was evaluated earlier.
    Returns the (B,) losses (the log-sigmoid is per sample: average afterwards) and a dict of detached (B,) tensors: the
    `sign` used, the `logit`, the implicit rewards `reward_w` and `reward_r`. Raises ValueError for an unknown flip.
    """
    if flip not in FLIPS:
        raise ValueError(f"flip is one of {', '.join(FLIPS)}, not {flip!r}")
    s_w, s_r = policy_w - reference_w, policy_r - reference_r
    sign = FLIPS[flip](torch.sign(-s_w) if sign is None else sign).detach()
    logit = -0.5 * beta * (s_w - sign * s_r)
    details = {"sign": sign, "logit": logit, "reward_w": -0.5 * beta * s_w, "reward_r": -0.5 * beta * s_r}
    return -F.logsigmoid(logit), {name: value.detach() for name, value in details.items()}

def choose_reference(k, rule, generator=None):
    """The reference-selection rule: which of the k checkpoints so far, 0 (the base model) .. k-1, is the reference.

    rule: `random` is uniform (SePPO) and draws from `generator` (a torch.Generator), `latest` is k-1 (SPIN-Diffusion),
    `initial` is 0 (Diffusion-DPO). Returns an int. Raises ValueError for k < 1 or an unknown rule.
    """
    if k < 1 or rule not in ("random", "latest", "initial"):
        raise ValueError(f"needs k >= 1 and a rule among random, latest, initial, not {k}, {rule!r}")
    return {"random": int(torch.randint(k, (), generator=generator)), "latest": k - 1, "initial": 0}[rule]

def denoising_error(unet, scheduler, x_0, eps, t, context):
    """m(x_0; unet): (B,) fp32 mean squared errors of the net's prediction of eps (of v, for a v-prediction model).

    x_0, eps: (B, C, h, w), or of clips (B, C, F, h, w), fp32 latents and noise. t: (B,) integer timesteps.
    context: (B, tokens, width) captions.
    scheduler: a diffusers scheduler that knows abar and what the net predicts.
    """
    x_t = scheduler.add_noise(x_0, eps, t)  # sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    target = scheduler.get_velocity(x_0, eps, t) if scheduler.config.prediction_type == "v_prediction" else eps
    return (predict(unet, x_t, t, context) - target).square().flatten(1).mean(1)

def predict(unet, x_t, t, context):
    """What the net says, in fp32. A clip's frames share its caption: diffusers' UNetMotionModel leaves that to its caller."""
    context = context.repeat_interleave(x_t.shape[2], 0) if x_t.ndim == 5 else context
    return unet(x_t, t, encoder_hidden_states=context).sample.float()

# ---- The sampler ----------------------------------------------------------------------------------------------------
# Reference samples are born as latents and stay latents (the paper does not say): a round trip through the VAE costs 4.5
# UNet forwards and adds the VAE's own error.

SOLVERS = {  # all deterministic, and none clips latents as if they were pixels, whatever the model's own configuration says
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}), "unipc": ("UniPCMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}), "pndm": ("PNDMScheduler", {})}

@torch.no_grad()
def sample(unet, scheduler, noise, context, null, solver="dpm++", steps=20, guidance=7.5):
    """(B, C, h, w) or (B, C, F, h, w) fp32 noise -> clean fp32 latents, by classifier-free guidance (1.0: none).

    context: (B, tokens, width), the captions; null: (1, tokens, width), the empty caption. scheduler: the training
    scheduler, whose betas and kind of prediction the solver (a key of SOLVERS) takes over.
    """
    solver = make_solver(scheduler, solver, steps)
    x, dtype, halves = noise * solver.init_noise_sigma, next(unet.parameters()).dtype, 1 if guidance == 1.0 else 2
    context = torch.cat([null.expand_as(context), context][-halves:]).to(dtype)  # both halves in one call
    for t, t_there in zip(solver.timesteps, put(solver.timesteps, noise.device)):  # the solver's own arithmetic stays on the CPU: no waiting
        x_in = solver.scale_model_input(torch.cat([x] * halves), t).to(dtype)
        out = predict(unet, x_in, t_there, context).chunk(halves)
        x = solver.step(out[0] + guidance * (out[-1] - out[0]) if halves == 2 else out[0], t, x).prev_sample
    return x

def make_solver(scheduler, name, steps):
    kind, fixed = SOLVERS[name]
    solver = getattr(diffusers, kind).from_config(scheduler.config, **fixed)
    with reading(f"--solver {name}, --sampler-steps {steps}", "take more steps"):  # PNDM has a least number
        solver.set_timesteps(steps)
    return solver

def put(tensor, device):
    """A CPU's tensor on the device. The CPU does not wait for the GPU, which it would do with memory that is not pinned."""
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)

# ---- Randomness -----------------------------------------------------------------------------------------------------
# Every draw is keyed by what it is for and by the sample's position in the run, never taken from a generator that runs
# along: so neither the micro-batch, nor the number of devices, nor a resume changes it.

def key(*parts):
    """A 63-bit seed from any printable values, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1

def draws(seed, positions, shape, timesteps, dropout):
    """What chance gives to B samples, drawn on the CPU: t (B,), whether the caption is dropped (B,), and three (B, *shape)
    noises: eps of the loss, the winner's VAE posterior, and the start of the reference sample (or the loser's posterior)."""
    columns = []
    for position in positions:
        g = torch.Generator().manual_seed(key(seed, "sample", position))
        columns.append((torch.randint(timesteps, (), generator=g), torch.rand((), generator=g) < dropout,
                        *(torch.randn(shape, generator=g) for _ in range(3))))
    return [torch.stack(column) for column in zip(*columns)]

# ---- The data -------------------------------------------------------------------------------------------------------

PICKAPIC = ("liuhuohuo2/pick-a-pic-v2", "Pulkit996/pick-a-pic-v2", "yuvalkirstain/pickapic_v2")  # the last: the paper's, gone
COLUMNS = {"caption", "jpg_0", "jpg_1", "label_0"}  # label_0: 1 = jpg_0 wins, 0 = jpg_1 wins, 0.5 = a tie

class UserError(Exception):
    """Something the user can mend: printed as one line, exit code 2."""
    code = 2

class Stopped(UserError):
    """By SIGTERM or Ctrl-C, with nothing lost."""
    code = 130

def need(condition, message):
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def reading(what, advice):
    """Whatever goes wrong while the user's input is read becomes one line that names it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        chain = [error]
        while following := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(following)  # diffusers and transformers hide what the hub answered
        cause = next((e for e in chain if isinstance(e, huggingface_hub.errors.HfHubHTTPError)), error)
        cause = error.__cause__ if cause is error and "root cause" in str(error) else cause
        reason = (" ".join(str(cause).split()) or type(cause).__name__)[:200]
        raise UserError(f"{what} cannot be read: {reason} ({advice})") from error

class Winners:
    """The winners by position in the run: position n always means the same row and the same pixels.

    Rows come in groups that are read whole (a Parquet row group). Per epoch the shards, the groups in a shard and the rows
    in a group are shuffled, by (seed, epoch) alone. A tie's place is taken by another row of its group. A row of no use
    (no caption, no picture) is replaced by one that (seed, position, attempt) determines, and counted.
    groups: (shard, group, rows) of each. read(shard, group, rows) -> the first `rows` rows, less the ties: (caption, winner)
    or (caption, winner, loser), a picture being bytes, a path or pixels. losers: whether the losers are wanted. frames: of a clip.
    """

    def __init__(self, source, groups, read, losers=False, seed=0, resolution=512, max_winners=None, frames=None):
        self.source, self.read, self.losers, self.seed, self.resolution, self.frames = source, read, losers, seed, resolution, frames
        self.groups, self.total, self.lock, self.pool = [], 0, threading.Lock(), ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        for shard, group, rows in groups:
            rows = min(rows, math.inf if max_winners is None else max_winners - self.total)
            self.groups += [(shard, group, rows)] * (rows > 0)
            self.total += rows
        need(self.total, f"--data {source} has no rows")
        need(not losers or any(len(self.row(0, attempt)) > 2 for attempt in range(20)),
             f"--data {source} has no losing pictures, which --loser data (--method dpo) needs")

    @functools.lru_cache(2)
    def epoch(self, epoch):
        """The groups in this epoch's order, and the place in the epoch where each ends."""
        order = sorted(self.groups, key=lambda group: (key(self.seed, epoch, group[0]), key(self.seed, epoch, group)))
        return order, list(itertools.accumulate(rows for _, _, rows in order))

    @functools.lru_cache(4)
    def group(self, group, epoch):
        """The rows of one group in this epoch's order."""
        with reading(f"--data {self.source}, shard {group[0]}, row group {group[1]}", "mend it; the run resumes"):
            rows = self.read(*group)
        return random.Random(key(self.seed, "rows", epoch, group)).sample(rows, len(rows))

    def row(self, position, attempt=0):
        """(caption, winner, loser) at this position of the run, or its stand-in number `attempt`."""
        if attempt:
            position = random.Random(key(self.seed, "row", position, attempt)).randrange(self.total)
        epoch, place = divmod(position, self.total)
        order, ends = self.epoch(epoch)
        g = bisect.bisect_right(ends, place)
        with self.lock:  # several threads fetch, one reads
            rows = self.group(order[g], epoch)
        return rows[(place - ends[g]) % len(rows)] if rows else ()  # modulo: some rows come again in the place of ties

    def fetch(self, position):
        """-> caption, pixels of the winner, pixels of the loser (if wanted), how many rows were replaced."""
        chance = random.Random(key(self.seed, "flip", position))
        flip, start = chance.random() < 0.5, chance.random()
        for attempt in range(100):
            try:
                caption, *pictures = self.row(position, attempt)
                if not isinstance(caption, str) or not caption.strip():
                    raise ValueError("no caption")
                caption.encode()  # half a surrogate pair raises a ValueError here, or anything in a tokenizer
                pixels = [to_pixels(picture, self.resolution, flip, self.frames, start) for picture in pictures[:1 + self.losers]]
                return caption, pixels[0], pixels[-1], attempt
            except UserError:
                raise
            except Exception as error:  # whatever a stranger's bytes make a decoder raise
                reason = error
        raise UserError(f"--data {self.source}: 100 rows in a row are of no use (the last: {reason})")

def to_pixels(picture, resolution, flip=False, frames=None, start=0.0):
    """Bytes, a path or an open picture -> (3, R, R) in [-1, 1]: upright, shorter side to R (bilinear), centre crop. Pixels stay.
    A clip's path, if `frames` is given (see read_clip) -> (3, F, R, R)."""
    if isinstance(picture, torch.Tensor):
        if picture.shape[-1] != resolution:  # the miniature's, for another model
            picture = F.interpolate(picture[None], resolution)[0]
        return picture.flip(-1) if flip else picture
    if frames:
        sizes, pixels = zip(*((frame.size, to_pixels(frame, resolution, flip)) for frame in read_clip(Path(picture), frames, start)))
        if len(pixels) < frames or len({*sizes}) > 1:
            raise ValueError("frames are missing, or differ in size")
        return torch.stack(pixels, 1)
    picture = picture["bytes"] if isinstance(picture, dict) else picture  # as `datasets` stores its Image columns
    with contextlib.nullcontext(picture) if isinstance(picture, Image.Image) else Image.open(
            io.BytesIO(picture) if isinstance(picture, bytes) else regular(picture), formats=[*FORMATS]) as image:
        if image.width * image.height > 64e6:  # a few kilobytes can ask for gigabytes
            raise ValueError(f"{image.width} x {image.height} pixels")
        if image.mode.startswith("I;16"):  # Pillow would make white of it
            image = image.point(lambda value: value / 256).convert("L")
        elif image.mode in ("I", "F"):
            raise ValueError(f"numbers of unknown scale (mode {image.mode})")
        image = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (resolution, resolution), Image.BILINEAR)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(resolution, resolution, 3)
    return to_pixels(pixels.permute(2, 0, 1) / 127.5 - 1, resolution, flip)

STRIDE = 4  # AnimateDiff's
FILMS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg")
CLOSED = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v"}  # no playlists
FORMATS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",), "GIF": (".gif",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff")}
is_picture = lambda path: path.suffix.lower() in itertools.chain(*FORMATS.values()) and path.name[0] != "."

def regular(path):
    """A file's path, if it is one: pipes and devices would be waited for, and a path in somebody's Parquet is not followed."""
    if not isinstance(path, Path) or not path.is_file():
        raise ValueError("no picture" if path is None else f"{str(path)[:100]} is no regular file")
    return path

def read_clip(clip, frames, start):
    """Yields `frames` pictures of a clip: a folder of frames, an animated GIF or WebP, or a film. Every STRIDE-th frame, the
    first at a share `start` in [0, 1) of the possible ones; closer together in a shorter clip, as AnimateDiff takes them."""
    def choose(n):
        if n < frames:
            raise ValueError(f"{n} frames")
        length = min(n, (frames - 1) * STRIDE + 1)
        return [int(start * (n - length + 1)) + i * (length - 1) // (frames - 1) for i in range(frames)]

    if clip.is_dir():  # frame10 comes after frame9
        files = sorted(filter(is_picture, clip.iterdir()), key=lambda p: [part.zfill(20) for part in re.split(r"(\d+)", p.name)])
        for i in choose(len(files)):
            with Image.open(regular(files[i]), formats=[*FORMATS]) as picture:
                yield picture
    elif is_picture(regular(clip)):
        with Image.open(clip, formats=[*FORMATS]) as film:
            for i in choose(getattr(film, "n_frames", 1)):
                film.seek(i)
                yield film
    else:
        try:
            import av
        except ImportError as error:
            raise UserError(f"{clip}: films need PyAV: pip install av, or make folders of frames") from error
        opened = functools.partial(av.open, str(clip), options=CLOSED)
        with opened() as film:  # what was cut off without encoding again is still there, to be discarded
            wanted = choose(sum(packet.size > 0 and not packet.is_discard for packet in film.demux(video=0)))
        with opened() as film:
            for i, frame in enumerate(itertools.islice(film.decode(video=0), wanted[-1] + 1)):
                if i in wanted:
                    yield frame.to_image().rotate(frame.rotation, expand=True)

def open_data(o):
    """--data: a miniature, a folder of captioned pictures or clips, or Parquet (file, folder or hub id) with Pick-a-Pic's columns."""
    folder = os.path.isdir(o.data) and not any(Path(o.data).rglob("*.parquet"))
    source = open_mini if o.data in MINI_DATA else functools.partial(open_folder, clips=bool(o.frames)) if folder else open_parquet
    need(folder or not o.frames or o.data in MINI_DATA, f"--data {o.data} is no folder: clips are read from folders only")
    return Winners(*source(o.data), o.loser == "data", o.seed, o.resolution, o.max_winners, o.frames)

def open_folder(name, clips=False):
    """A folder with metadata.jsonl ({"file_name": ..., "text": ...} a line), or with name.txt beside name.jpg, or beside the
    clip: name.gif, name.webp, name.mp4, or name/ with a file for each frame."""
    table, advice = Path(name, "metadata.jsonl"), "captions stand in metadata.jsonl as file_name and text, or in name.txt beside name.jpg"
    with reading(f"--data {name}", advice):
        if table.exists():
            lines = [json.loads(line) for line in table.read_text("utf-8-sig").split("\n") if line.strip()]
            rows = [(line.get("text"), Path(name, line["file_name"])) for line in lines]
            outside = [str(p) for _, p in rows if ".." in p.parts or not p.is_relative_to(name)]
            need(not outside, f"--data {name}: metadata.jsonl names a file outside the folder: {outside and outside[0][:100]}")
        else:
            is_clip = lambda p: p.name[0] != "." and (p.is_dir() or is_picture(p) or p.suffix.lower() in FILMS)
            pictures = sorted(filter(is_clip, Path(name).iterdir()) if clips else filter(is_picture, Path(name).rglob("*")))
            rows = [(c.read_text("utf-8", "replace") if (c := p.with_name((p.name if p.is_dir() else p.stem) + ".txt")).is_file() else None, p)
                    for p in pictures]
        if not any(isinstance(caption, str) and caption.strip() for caption, _ in rows):
            raise ValueError(f"no captioned {'clips' if clips else 'pictures'}")
    return name, [(0, 0, len(rows))], lambda shard, group, n: rows[:n]

def open_parquet(name):
    """Parquet files with COLUMNS, read by row groups, over the network too: Pick-a-Pic's 335 GB never land on a disk."""
    import fsspec
    from datasets import disable_progress_bars, load_dataset_builder  # resolves folders, hub ids and splits to files
    from pyarrow.parquet import ParquetFile
    disable_progress_bars()
    source = PICKAPIC[0] if name == "pickapic" and not Path(name).exists() else name
    advice = f"another copy: --data {PICKAPIC[1]}; the paper's own, {PICKAPIC[2]}, is gone" if source != name else (
        "--data takes pickapic, a folder of captioned pictures, or a Parquet file, folder or hub id with Pick-a-Pic's columns")

    def opened(file, **known):  # no read-ahead: it would fetch 5 MB more at every read
        system, path = fsspec.url_to_fs(file)
        return ParquetFile(system.open(path, cache_type="none"), **known)

    with reading(f"--data {source}", advice):
        (source, _, pinned), revision = (source, "", "") if Path(source).exists() else source.partition("@"), None
        if not Path(source).exists():
            revision = huggingface_hub.HfApi().dataset_info(source, revision=pinned or None, timeout=30).sha
        files = {"train": [source]} if Path(source).is_file() else load_dataset_builder(source, revision=revision).config.data_files
        need("train" in files, f"--data {source} has no split named train")
        files = sorted(files["train"])
        need(all(file.endswith(".parquet") for file in files), f"--data {source} has files that are not Parquet ({advice})")
        with ThreadPoolExecutor(16) as pool:  # the footers of 645 shards
            footers = list(pool.map(lambda file: opened(file).metadata, files))
    for file, names in ((file, footer.schema.to_arrow_schema().names) for file, footer in zip(files, footers)):
        need(COLUMNS <= {*names}, f"--data {file} lacks {', '.join(COLUMNS - {*names})} of Pick-a-Pic's columns; it has {', '.join(names)}")

    def read(i, group, n):
        table = opened(files[i], metadata=footers[i]).read_row_group(group, columns=sorted(COLUMNS)).slice(0, n)
        sides = {1: ("jpg_0", "jpg_1"), 0: ("jpg_1", "jpg_0")}  # a label that is none of these leaves no picture
        return [(row["caption"], *map(row.get, sides.get(row["label_0"], "??"))) for row in table.to_pylist() if row["label_0"] != 0.5]

    source += f"@{revision}" if revision else ""
    print(f"data: {source}" + (", read over the network" if revision else ""))
    return source, [(i, g, f.row_group(g).num_rows) for i, f in enumerate(footers) for g in range(f.num_row_groups)], read

# ---- The models -----------------------------------------------------------------------------------------------------

ANIMATEDIFF = dict(beta_schedule="linear", beta_start=.00085, beta_end=.012, trained_betas=None, clip_sample=False,
                   timestep_spacing="linspace", rescale_betas_zero_snr=False)  # its noise schedule, not the base model's
MOVED = {"runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}  # gone from the hub since 2024

def framewise(method):
    """For a codec's method that maps pictures, (B, C, h, w): clips, (B, C, F, h, w), go through it frame by frame."""
    @functools.wraps(method)
    def both(self, *xs):
        if xs[0].ndim == 4:
            return method(self, *xs)
        return method(self, *(x.transpose(1, 2).flatten(0, 1) for x in xs)).unflatten(0, (len(xs[0]), -1)).transpose(1, 2)
    return both

class StableDiffusion:
    """What stands between pictures, captions and a Stable Diffusion UNet: VAE, CLIP text encoder, noise schedule."""

    def __init__(self, tokenizer, text, vae, scheduler, device):
        self.tokenizer, self.text, self.vae, self.scheduler = tokenizer, text.to(device), vae.to(device), scheduler
        self.text.requires_grad_(False), self.vae.requires_grad_(False)
        self.vae.enable_slicing()  # one picture at a time: its activations are larger than the UNet's
        self.channels, self.width = self.vae.config.latent_channels, self.text.config.hidden_size
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent: 8

    def encode_text(self, captions):  # -> (B, 77, 768)
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                             max_length=self.text.config.max_position_embeddings).input_ids
        return self.text(put(ids, self.text.device))[0].float()

    @framewise
    def encode(self, pixels, noise):  # (B, 3, 8 h, 8 w) in [-1, 1] -> (B, 4, h, w), drawn from the VAE's posterior
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * self.vae.config.scaling_factor

    @framewise
    def decode(self, latents):  # back, clamped to [-1, 1]
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample.float().clamp(-1, 1)

def load_codec(folder, device, dtype):
    tokenizer = load_tokenizer(transformers.CLIPTokenizer, folder, subfolder="tokenizer")
    text = load_whole(transformers.CLIPTextModel, folder, subfolder="text_encoder", dtype=dtype)
    need(len(tokenizer) <= text.config.vocab_size, f"{folder}: its tokenizer has more words than its text encoder")
    return StableDiffusion(
        tokenizer, text,
        load_whole(AutoencoderKL, folder, subfolder="vae", torch_dtype=dtype, low_cpu_mem_usage=False),
        DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), device)

def random_sd15(device, dtype):
    """--model random-sd15: Stable Diffusion 1.5's architecture with random weights. It costs what the real one costs, and needs
    no download: for --time, and to try things out."""
    torch.manual_seed(0)
    tokenizer = lambda captions, **_: argparse.Namespace(input_ids=torch.stack(  # no words either
        [torch.randint(49408, (77,), generator=torch.Generator().manual_seed(key(caption))) for caption in captions]))
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12))
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768), StableDiffusion(
        tokenizer, text.to(dtype), vae.to(dtype), scheduler, device)

def load_whole(kind, *args, **options):
    """kind.from_pretrained, which of itself leaves weights that a file lacks at random, and says nothing."""
    model, info = kind.from_pretrained(*args, output_loading_info=True, **options)
    missing = sorted({*info["missing_keys"]} & {name for name, _ in model.named_parameters()})  # buffers are constants
    need(not missing, f"{args[0]} lacks weights of a {kind.__name__}: {', '.join(missing[:2])}, ...")
    return model

def load_tokenizer(kind, *args, **options):
    """kind.from_pretrained, which of itself makes an empty vocabulary out of a folder without one."""
    tokenizer = kind.from_pretrained(*args, **options)
    need(len(tokenizer) > 9, f"{args[0]} lacks the files of its tokenizer")
    return tokenizer

def load_unet(name, *kinds, weights=True):
    """A UNet, or a net of other kinds (classes), as diffusers saves it: at NAME/unet, NAME/motion_adapter or NAME itself; in fp32,
    the master weights. weights=False: untrained, for its shape alone."""
    for part in ("unet", "motion_adapter", None):
        try:
            config = UNet2DConditionModel.load_config(name, subfolder=part)
            break
        except OSError as error:
            reason = error
    else:
        raise reason
    kinds = {kind.__name__: kind for kind in kinds or (UNet2DConditionModel,)}
    need(config["_class_name"] in kinds, f"{name} holds a {config['_class_name']}, not a {' or '.join(kinds)}")
    kind = kinds[config["_class_name"]]
    return load_whole(kind, name, subfolder=part, torch_dtype=torch.float32, low_cpu_mem_usage=False) if weights else kind.from_config(config)

def load_models(o, weights=True):
    """-> the policy's UNet, and what stands between it and pictures and captions. Raises UserError. weights=False: the shapes."""
    if o.model in MINI:
        unet, codec = load_mini(o.model, o.device, weights), Miniature(o.device)
    elif o.model == "random-sd15":
        unet, codec = random_sd15(o.device, DTYPES[o.dtype][1])
    else:
        with reading(f"--model {o.model}", "--model takes a folder saved by diffusers, a hub id, or mini"):
            folder = o.model if Path(o.model).is_dir() else MOVED.get(o.model, o.model)
            if weights and not Path(folder).is_dir():
                folder = diffusers.DiffusionPipeline.download(folder, safety_checker=None, feature_extractor=None)
            unet, codec = load_unet(folder, weights=weights), weights and load_codec(folder, o.device, DTYPES[o.dtype][1])
    other = None
    if o.unet:
        with reading(f"--unet {o.unet}", "it takes a folder or hub id with a UNet as diffusers saves it"):
            other = load_unet(o.unet, UNet2DConditionModel, UNetMotionModel, weights=weights)
        need(o.motion_adapter or type(other) is type(unet), f"--unet {o.unet} has another kind of UNet than --model {o.model}")
        unet = exchange(unet, other, o)
    if o.motion_adapter:
        with reading(f"--motion-adapter {o.motion_adapter}", "it takes a folder or hub id with a MotionAdapter as diffusers saves it"):
            unet = exchange(UNetMotionModel.from_unet2d(unet, load_unet(o.motion_adapter, MotionAdapter, weights=weights)), other, o)
        need(unet.config.temporal_transformer_layers_per_block == 1, f"--motion-adapter {o.motion_adapter} has several layers a block, which "
             "diffusers does not save")
        if codec:
            codec.scheduler = DDPMScheduler.from_config(codec.scheduler.config, **ANIMATEDIFF)
    if o.frames:
        longest = unet.config.motion_max_seq_length
        need(o.frames <= longest, f"--frames {o.frames}: this motion adapter knows {longest} at most")
    if o.train == "motion":
        unet.freeze_unet2d_params()
    takes, gives = (unet.config.in_channels, unet.config.cross_attention_dim), (codec.channels, codec.width) if codec else None
    need(not codec or codec.scheduler.config.prediction_type != "sample", f"--model {o.model} predicts samples: only epsilon and v are known here")
    need(not codec or takes == gives and not unet.config.addition_embed_type,
         f"--model {o.model} is no text-to-image Stable Diffusion 1.x: latents and captions have {gives} channels, its UNet takes {takes}")
    layout = torch.preserve_format if o.device == "cpu" else torch.channels_last  # what a GPU's convolutions work in
    return unet.to(o.device, memory_format=layout).eval(), codec  # eval: dropout would part policy and reference

def exchange(unet, other, o):
    """--unet's net, where it is of the same kind."""
    if type(other) is not type(unet):
        return unet
    need([p.shape for p in unet.parameters()] == [p.shape for p in other.parameters()],
         f"--unet {o.unet} has another shape than the UNet of --model {o.model}")
    return other

def checkpoint_part(o):
    """What a checkpoint holds: the motion adapter, if --model and it are all that is needed, or the UNet."""
    return "motion_adapter" if o.train == "motion" and not o.unet else "unet"

POOL = "the pool is not whole: restore it, or start over with --fresh"

@torch.no_grad()
def load_weights(unet, folder):
    """A checkpoint of the pool into a net, in place and one tensor at a time: no second copy in memory."""
    path, file = checkpoint_file(folder)
    with file, reading(f"checkpoint {folder}", POOL):
        for name, tensor in unet.state_dict().items():
            if path.parent.name == "unet" or "motion_modules" in name:
                tensor.copy_(file.get_tensor(name))

def checkpoint_file(folder):
    """-> a checkpoint's path, and the open file, whose length is checked."""
    with reading(f"checkpoint {folder}", POOL):
        path = next(Path(folder).glob("*/diffusion_pytorch_model.safetensors"), None)
        need(path, f"checkpoint {folder} is missing: {POOL}")
        return path, safe_open(path, "pt")

# ---- The miniature --------------------------------------------------------------------------------------------------
# A text-to-image world for two cores, on the same path as Stable Diffusion. Pictures (16 x 16) of captioned shapes, each
# with its own dose of four flaws: off-centre, foggy, blurred, small. Of four pictures for a caption people like the one
# with the highest `mini_score`. The base model learned from all of them, so there is room above it; and as the taste is
# known, what alignment did can be measured. It predicts v: few steps suffice where so small a net's eps would be noise.
# In its clips flawless shapes drift, and each clip has its own dose of one flaw: jitter.

COLOURS = {"red": (1, -.8, -.8), "green": (-.8, .7, -.8), "blue": (-.8, -.6, 1), "yellow": (1, .9, -.8)}
SHAPES = {"square": lambda x, y: torch.maximum(x.abs(), y.abs()), "disc": lambda x, y: (x.square() + y.square()).sqrt(),
          "diamond": lambda x, y: .7 * (x.abs() + y.abs()),
          "cross": lambda x, y: torch.minimum(torch.maximum(x.abs(), 2.5 * y.abs()), torch.maximum(2.5 * x.abs(), y.abs()))}
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
MINI_BASE = "runs/{}-base-1"  # where the base models stay: count up with any change to this section
MINI_DATA = ("mini", "mini-mixture", "mini-video", "mini-video-mixture")

def draw_mini(captions, flaws):
    """B captions and (B, 5) flaws (x, y in [-0.6, 0.6]; fog, blur, smallness in [0, 1]) -> (B, 3, 16, 16) in [-1, 1].
    A clip has flaws for each frame: (B, F, 5) -> (B, 3, F, 16, 16)."""
    if flaws.ndim == 3:
        return torch.stack([draw_mini(captions, frame) for frame in flaws.unbind(1)], 2)
    axis, words = (torch.arange(16) - 7.5) / 5.5, [caption.split() for caption in captions]
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    colour = torch.tensor([COLOURS[w[1]] for w in words])[:, :, None, None]  # (B, 3, 1, 1)
    dx, dy, fog, blur, small = flaws[:, :, None, None].unbind(1)             # (B, 1, 1) each
    edge = torch.stack([SHAPES[w[2]](x - a, y - b) for w, a, b in zip(words, dx, dy)]) / (1 - .4 * small)  # (B, 16, 16)
    ink = torch.sigmoid((1 - edge) * (12 - 10 * blur))[:, None]
    return (ink * colour - (1 - ink) * .9) * (1 - .8 * fog[:, None])

def mini_score(pixels, captions):
    """The miniature's taste: (B,) scores of (B, 3, 16, 16) pictures or (B, 3, F, 16, 16) clips in [-1, 1]: 1 is flawless, 0 no
    better than plain grey. In a flawless picture the shape is in the middle, in a clip it drifts steadily."""
    flaws = torch.zeros(len(captions), 5) if pixels.ndim == 4 else F.pad(steady(pixels.cpu()), (0, 3))
    ideal = draw_mini(captions, flaws).to(pixels.device)
    return 1 - (pixels - ideal).abs().flatten(1).mean(1) / ideal.abs().flatten(1).mean(1)

def steady(clips):
    """(B, F, 2): where the shape of (B, 3, F, 16, 16) clips would be on the straight line that fits best where it is."""
    ink, axis = ((clips + .9).abs().sum(1) - .6).clamp(min=1e-6), (torch.arange(16) - 7.5) / 5.5  # (B, F, 16, 16), (16,)
    place = torch.stack([ink.sum(2) @ axis, ink.sum(3) @ axis], 2) / ink.sum((2, 3))[..., None]   # (B, F, 2)
    t = torch.linspace(-1, 1, clips.shape[2])[:, None]
    return place.mean(1, keepdim=True) + t * (place * t).sum(1, keepdim=True) / t.square().sum()

@functools.lru_cache(4)
def open_mini(name, n=2048):
    """The miniature's data, of n captions: `mini` has the liked picture of four and another, `mini-mixture` all, unjudged;
    `mini-video` and `mini-video-mixture` are of clips, a quarter as many."""
    g, n = torch.Generator().manual_seed(0), n // 4 if "video" in name else n
    captions = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (n,), generator=g)]
    if "video" in name:  # from one place to another, with more or less jitter
        start, end = (torch.rand(4, n, 1, 2, generator=g) * 1.2 - .6 for _ in "se")
        jitter = torch.randn(4, n, SMALL_CLIPS["frames"], 2, generator=g) * torch.rand(4, n, 1, 1, generator=g) * .4
        flaws = F.pad(start + (end - start) * torch.linspace(0, 1, SMALL_CLIPS["frames"])[:, None] + jitter, (0, 3))  # (4, n, F, 5)
    else:
        flaws = torch.rand(4, n, 5, generator=g) * torch.tensor([1.2, 1.2, 1, 1, 1]) - torch.tensor([.6, .6, 0, 0, 0])
    pictures = torch.stack([draw_mini(captions, f) for f in flaws], 1)  # (n, 4, 3, [F,] 16, 16)
    best = torch.stack([mini_score(p, captions) for p in pictures.unbind(1)], 1).argmax(1).tolist()
    rows = [(c, picture) for c, four in zip(captions, pictures) for picture in four] if "mixture" in name else [
        (c, four[i], four[i - 1]) for c, four, i in zip(captions, pictures, best)]
    return name, [(0, 0, len(rows))], lambda shard, group, n: rows[:n]

class Miniature:
    """In the place of VAE, text encoder and noise schedule: latents are rearranged pixels, captions four word vectors."""

    channels, width, factor = 12, 32, 2

    def __init__(self, device):
        self.device, self.words = device, functools.lru_cache(None)(
            lambda word: torch.randn(self.width, generator=torch.Generator().manual_seed(key(word))))
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=.00085, beta_end=.012, clip_sample=False,
                                       prediction_type="v_prediction", timestep_spacing="trailing")

    def encode_text(self, captions):  # -> (B, 4, 32)
        words = [(caption.split() + [""] * 4)[:4] for caption in captions]
        vectors = torch.stack([torch.stack([self.words(word) for word in four]) for four in words])
        return put(vectors, self.device)

    @framewise
    def encode(self, pixels, noise):  # (B, 3, 16, 16) -> (B, 12, 8, 8)
        return F.pixel_unshuffle(pixels, self.factor)

    @framewise
    def decode(self, latents):
        return F.pixel_shuffle(latents, self.factor).clamp(-1, 1)

def load_mini(name, device="cpu", weights=True):
    """A miniature's UNet: untrained, or the base model, which this very script trains, once."""
    if weights and not name.endswith("-untrained"):
        o = resolve(["--model", f"{name}-untrained", "--out", MINI_BASE.format(name), "--device", device, "--dtype", "fp32"])
        if not Path(o.out, f"checkpoint-{o.steps}").is_dir():
            print(f"The miniature's base model comes first: it is trained once and stays in {o.out}.")
        train(o)
        return load_unet(f"{o.out}/checkpoint-{o.steps}", UNetMotionModel if o.frames else UNet2DConditionModel)
    base = load_mini("mini", device, weights) if "video" in name else None
    torch.manual_seed(0)
    if not base:
        return UNet2DConditionModel(
            sample_size=8, in_channels=12, out_channels=12, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, cross_attention_dim=32, attention_head_dim=8)
    adapter = MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
                            motion_num_attention_heads=4, motion_max_seq_length=16, use_motion_mid_block=False)
    for name, parameter in adapter.named_parameters():  # as AnimateDiff begins: a clip of independent pictures
        torch.nn.init.zeros_(parameter) if "proj_out" in name else None
    return UNetMotionModel.from_unet2d(base, adapter)

# ---- The loop -------------------------------------------------------------------------------------------------------

ADAMW, CLIP, WARMUP = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2), 1.0, 0.25  # WARMUP: share of the updates
SAVE_SECONDS = 600  # the state to resume from is never older, but for the update that is under way
# dtype of the error passes under autocast (beta amplifies rounding, and bf16's is larger than the signal; fp16 needs loss scaling), and
# of what only generates, encodes and decodes (rounding is harmless there, so a half-precision copy of the reference generates)
DTYPES = {"fp32": (None, torch.float32), "tf32": (None, torch.float16), "fp16": (torch.float16,) * 2, "bf16": (torch.bfloat16,) * 2}
STATISTICS = ("loss", "logit", "policy_w", "reference_w", "sign_neg", "sign_zero", "sign_pos",
              "implicit_acc", "policy_r", "reference_r")  # the last three of pairs only
PHASES = ("data", "encode", "generate", "train")

class Trainer:
    """A run: the policy, its reference, the optimizer, and the pool on disk (checkpoint-0 is the base model)."""

    def __init__(self, o, data):
        self.o, self.data, self.out, self.device = o, data, Path(o.out), torch.device(o.device)
        self.policy, self.codec = load_models(o)  # for the miniature this may train its base, in fp32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = o.dtype != "fp32"
        self.index, self.skipped = None, 0  # which checkpoint the reference holds; rows replaced so far
        self.reference = self.generator = None if o.loser == "none" else copy.deepcopy(self.policy).requires_grad_(False)
        if o.gradient_checkpointing:
            self.policy.enable_gradient_checkpointing()
            for module in self.policy.modules():
                if isinstance(module, AnimateDiffTransformer3D):  # which diffusers leaves out
                    module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        self.net = self.policy if o.world == 1 else torch.nn.parallel.DistributedDataParallel(  # what the errors go through
            self.policy, None if o.device == "cpu" else [self.device], broadcast_buffers=False, gradient_as_bucket_view=True)
        autocast, half = DTYPES[o.dtype]
        if o.loser == "generated" and half != torch.float32:
            self.generator = copy.deepcopy(self.reference).to(half)
        side = o.resolution // self.codec.factor
        self.shape = (self.codec.channels, *[o.frames] * bool(o.frames), side, side)  # of one sample's latents
        self.T, self.null = self.codec.scheduler.config.num_train_timesteps, self.codec.encode_text([""])  # null: (1, tokens, width)
        # compiled graphs with and without gradients round differently: the error passes must not be compiled
        self.draws_with = torch.compile(self.generator) if o.compile and self.generator else self.generator
        self.sample = functools.partial(sample, scheduler=self.codec.scheduler, null=self.null, solver=o.solver,
                                        steps=o.sampler_steps, guidance=o.guidance)
        self.autocast = functools.partial(torch.autocast, self.device.type, autocast, bool(autocast))
        with reading(f"--model {o.model}", "it is no text-to-image Stable Diffusion 1.x"), torch.no_grad():
            x = torch.zeros(1, *self.shape, device=self.device)
            got = predict(self.policy, x, torch.zeros(1, dtype=torch.long, device=self.device), self.null).shape
            need(got == x.shape, f"--model {o.model}: its UNet makes {list(got)} of {list(x.shape)}")
        self.prompts = [data.fetch(i)[0] for i in range(12 if o.model in MINI else 4)]  # of the sample pictures
        self.trained = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}  # all, or the motion modules
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=o.lr, fused=True, **ADAMW)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=o.dtype == "fp16")

    def set_reference(self, update):
        """Redraw the reference, once per interval of save_every updates, from the checkpoints there are by then."""
        k = update // self.o.save_every + 1
        index = choose_reference(k, self.o.reference, torch.Generator().manual_seed(key(self.o.seed, "reference", k)))
        if index != self.index:
            load_weights(self.reference, self.out / f"checkpoint-{index * self.o.save_every}")
            if self.generator is not self.reference:
                self.generator.load_state_dict(self.reference.state_dict())
            self.index = index

    def errors(self, x, eps, t, context):
        """-> (n B,) errors of policy and reference (None without one) on one numeric path: function, dtype, kernels, batch shape.
        x: (n B, *shape), the winners and, if n is 2, what stands for the losers. eps, t, context: (B, ...), shared."""
        n = len(x) // len(t)
        args = (self.codec.scheduler, x, *(v.repeat(n, *[1] * (v.ndim - 1)) for v in (eps, t, context)))
        with self.autocast():
            policy = denoising_error(self.net if torch.is_grad_enabled() else self.policy, *args)
            with torch.no_grad():
                return policy, self.reference and denoising_error(self.reference, *args)

    def losses(self, x, eps, t, context):
        """-> (B,) losses, and a dict of (B,) STATISTICS; arguments as above. Winners alone speak as where the sign is 0, or,
        without a reference (SFT), their error itself is the loss."""
        policy, reference = self.errors(x, eps, t, context)
        if reference is None:
            return policy, {"loss": policy, "policy_w": policy}
        paired, zeros = len(x) > len(t), torch.zeros(len(t), device=x.device)
        (policy_w, policy_r), (reference_w, reference_r) = ((*m.split(len(t)), zeros)[:2] for m in (policy, reference))
        loss, d = seppo_loss(policy_w, reference_w, policy_r, reference_r, self.o.beta, self.o.flip, sign=None if paired else zeros)
        accuracy = (1 + torch.sign(d["reward_w"] - d["reward_r"])) / 2  # a draw counts half
        found = dict(zip(STATISTICS, (loss, d["logit"], policy_w, reference_w, d["sign"] < 0, d["sign"] == 0, d["sign"] > 0,
                                      accuracy, policy_r, reference_r)))
        return loss, found if paired else {k: found[k] for k in STATISTICS[:7]}

    @torch.no_grad()
    def pairs_first(self, x_w, eps, t, context):
        """What the anchor says, evaluated before anything is generated: indices of the winners whose sign is +1, then of those
        that need no reference sample under --flip indicator. The former's share of the generation is all there is to do."""
        parts = zip(*(v.split(self.o.micro_batch) for v in (x_w, eps, t, context)))
        policy, reference = (torch.cat(m) for m in zip(*(self.errors(*part) for part in parts)))
        plus = policy < reference  # what is not a number goes on among the others, and stops the run
        return plus.nonzero()[:, 0], (~plus).nonzero()[:, 0]

    def check_numeric_path(self):
        """With equal weights s_w and s_r must be exactly 0, or beta makes preferences out of rounding."""
        self.reference.load_state_dict(self.policy.state_dict())
        t, _, eps, x_w, x_r = (v.to(self.device) for v in draws("check", range(self.o.micro_batch), self.shape, self.T, 0))
        with contextlib.nullcontext() if self.o.world == 1 else self.net.no_sync():
            _, s = self.losses(torch.cat([x_w, x_r]), eps, t, self.null.expand(len(t), -1, -1))
        need(torch.equal(s["policy_w"], s["reference_w"]) and torch.equal(s["policy_r"], s["reference_r"]),
             f"self-check: s_w and s_r must be exactly 0 at equal weights, and logits reach {s['logit'].abs().max():.1e}: the errors of "
             "policy and reference were not computed on one numeric path")

    def gradients(self, update):
        """Accumulate the gradient of one update's mean loss -> statistics (means), rows replaced, seconds by phase."""
        o, sums, counts, skipped, marks = self.o, Counter(), Counter(), 0, [mark(self.device)]
        share = o.batch_size // o.world  # of each process, of the batch's positions
        everything = range(update * o.batch_size + o.rank * share, update * o.batch_size + (o.rank + 1) * share)
        G, batches = o.generate_batch, lambda i, n: i.split(n) if len(i) else ()
        size = max(G * (4 if o.flip == "indicator" else 1), o.micro_batch)  # where the anchor spares samples, full batches are left
        chunks = [everything[i:i + size] for i in range(0, share, size)]
        fetch = lambda chunk: [self.data.pool.submit(self.data.fetch, position) for position in chunk]
        ahead = fetch(chunks[0])
        for positions, following in zip(chunks, [*chunks[1:], ()]):
            captions, winners, losers, attempts = zip(*(row.result() for row in ahead))
            skipped, ahead = skipped + sum(attempts), fetch(following)  # while this chunk is worked on
            t, dropped, eps, noise_w, noise_r = (
                put(v, self.device) for v in draws(o.seed, positions, self.shape, self.T, o.caption_dropout))
            marks.append(mark(self.device))
            asked = self.codec.encode_text(list(captions))
            context = torch.where(dropped[:, None, None], self.null, asked)  # dropout is alike for all four errors
            x_w = self.codec.encode(put(torch.stack(winners), self.device), noise_w)  # (B, C, h, w)
            pairs, alone = torch.arange(len(t), device=self.device), []
            if o.loser == "data":
                x_r = self.codec.encode(put(torch.stack(losers), self.device), noise_r)
            marks.append(mark(self.device))
            if o.loser == "generated":  # for the real caption
                if o.flip == "indicator":
                    pairs, alone = self.pairs_first(x_w, eps, t, context)
                x_r = torch.zeros_like(x_w)
                for i in batches(pairs, G):
                    x_r[i] = self.sample(self.draws_with, noise=noise_r[i], context=asked[i])
            marks.append(mark(self.device))
            parts = [(i, o.loser != "none") for i in batches(pairs, o.micro_batch)] + [(i, False) for i in batches(alone, o.micro_batch)]
            for n, (i, paired) in enumerate(parts, 1):
                last = not following and n == len(parts)
                with contextlib.nullcontext() if last or o.world == 1 else self.net.no_sync():  # one all-reduce an update, of means
                    losses, statistics = self.losses(torch.cat([x_w[i], x_r[i]]) if paired else x_w[i], eps[i], t[i], context[i])
                    self.scaler.scale(losses.sum() / share).backward()
                sums.update({k: v.detach().sum() for k, v in statistics.items()})
                counts.update({k: len(i) for k in statistics})
            marks.append(mark(self.device))
        totals = torch.tensor([[float(sums[k]), counts[k]] for k in STATISTICS] + [[skipped, 1]], dtype=torch.float64)  # waits for the GPU
        if o.world > 1:
            dist.all_reduce(totals)
        *means, (skipped, _) = totals.tolist()
        statistics = {k: total / count for k, (total, count) in zip(STATISTICS, means) if count}
        seconds = {f"seconds_{name}": sum(map(elapsed, marks[i::4], marks[i + 1::4])) for i, name in enumerate(PHASES)}
        return statistics, int(skipped), seconds

    def update(self, update):
        """One update -> its metrics. An overflow of the loss scaling lowers the scale and redoes it, with the same draws."""
        if self.reference:
            self.set_reference(update)
        lr = self.o.lr * min(1.0, (update + 1) / max(1, round(WARMUP * self.o.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        while True:
            self.optimizer.zero_grad()
            statistics, skipped, seconds = self.gradients(update)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP).item()
            if math.isfinite(statistics["loss"]) and math.isfinite(norm):
                break
            need(math.isfinite(statistics["loss"]) and self.scaler.get_scale() > 1,
                 f"update {update + 1}: loss {statistics['loss']}, gradient norm {norm}; the last checkpoint in "
                 f"{self.out} is whole: take a lower --lr, or --dtype fp32, in another --out")
            self.scaler.update(self.scaler.get_scale() / 2)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()  # before anything is saved: it frees a third of the memory
        self.skipped += skipped
        need(self.skipped <= max(16, (update + 1) * self.o.batch_size),
             f"--data {self.data.source}: more than half of the rows tried lack a caption or a readable picture")
        return {"update": update + 1} | dict.fromkeys(STATISTICS) | statistics | {
            "reference": self.index, "grad_norm": norm, "lr": lr, **seconds,
            "peak_gb": peak_gb(self.device), "skipped_rows": self.skipped}

    def save(self, update):
        """The picture, the pool's checkpoint, last the state to resume from: a kill in between repeats work, loses none."""
        if not self.o.rank:
            self.grid(update)
            with whole(self.out / f"checkpoint-{update}") as folder:
                save = self.policy.save_pretrained if checkpoint_part(self.o) == "unet" else self.policy.save_motion_modules
                save(folder / checkpoint_part(self.o))
            self.save_state(update)
        if self.o.world > 1:
            dist.barrier()

    def save_state(self, update):
        with whole(self.out / "resume" / "state.pt") as file:
            torch.save({"update": update, "skipped": self.skipped, "policy": self.trained,
                        "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}, file)

    def resume(self):
        """-> how many updates are done, everything being as it was then."""
        path, metrics, done = self.out / "resume" / "state.pt", self.out / "metrics.jsonl", 0
        if path.exists():
            with reading(f"the state {path}", "restore it, or start over with --fresh"):
                state = torch.load(path, weights_only=True, map_location="cpu")
                for part in ("optimizer", "scaler"):
                    getattr(self, part).load_state_dict(state.pop(part))
                for name, parameter in self.trained.items():
                    parameter.data.copy_(state["policy"][name])
                self.skipped, done = state["skipped"], state["update"]
        if not self.o.rank:
            lines = metrics.read_bytes().splitlines(keepends=True)[:done] if metrics.exists() else []
            with whole(metrics) as file:  # without the lines of updates that are done again
                file.write_bytes(b"".join(lines))
        for k in {"random": range(done // self.o.save_every + 1), "latest": [done // self.o.save_every], "initial": [0]}[self.o.reference]:
            if done and self.reference:  # a checkpoint that is not whole is found now, not when it is drawn
                checkpoint_file(self.out / f"checkpoint-{k * self.o.save_every}")
        return done

    @torch.no_grad()
    def grid(self, update):
        """samples/step-N.png (of clips .webp): the first captions of the data from fixed noise; base model above, current policy
        below."""
        noise = draws("grid", range(len(self.prompts)), self.shape, 1, 0)[-1].to(self.device)
        with self.autocast():
            context, G = self.codec.encode_text(self.prompts), self.o.generate_batch
            pixels = self.codec.decode(torch.cat([self.sample(self.policy, noise=n, context=c)
                                                  for n, c in zip(noise.split(G), context.split(G))]))
        pixels = ((pixels + 1) * 127.5).round().byte().cpu()  # (n, 3, [F,] R, R)
        base = self.out / "samples" / "base.pt"
        if update == 0:
            with whole(base) as file:
                torch.save(pixels, file)
        pixels = torch.cat([torch.load(base, weights_only=True), pixels] if update and base.exists() else [pixels])
        frames = pixels.movedim(1, -1).unsqueeze(1) if pixels.ndim == 4 else pixels.movedim(1, -1)  # (n or 2 n, F, R, R, 3)
        tile, n = [max(96, self.o.resolution)] * 2, len(self.prompts)
        grids = [make_image_grid([Image.fromarray(p).resize(tile, Image.NEAREST) for p in frame.numpy()], len(frame) // n, n)
                 for frame in frames.unbind(1)]
        with whole(self.out / "samples" / f"step-{update}.{'webp' if self.o.frames else 'png'}") as file:
            save_pictures(grids, file)

def save_pictures(frames, path):
    """One picture as PNG, more as an animated WebP."""
    several = dict(save_all=True, append_images=frames[1:], duration=125, loop=0)  # milliseconds a frame; for ever
    frames[0].save(path, **{"format": "WEBP"} | several if len(frames) > 1 else {"format": "PNG"})

def train(o):
    """A run from its resolved options: begin it, resume it, or say that it is finished. Raises Stopped after SIGTERM or Ctrl-C."""
    if os.path.isdir(f"{o.out}/checkpoint-{o.steps}") and not o.fresh:
        claim(o)
        return o.model.endswith("-untrained") or print(f"{o.out} is finished: {o.steps} updates." + how_to_load(o))
    if o.world > 1 and not dist.is_initialized():  # a day: another process may have far more to do
        with reading("torchrun's MASTER_ADDR and MASTER_PORT", "start it with torchrun"):
            dist.init_process_group("gloo" if o.device == "cpu" else "cpu:gloo,cuda:nccl", timeout=datetime.timedelta(days=1))
    data = open_data(o)
    facts = {"source": data.source, "rows": data.total}
    claim(o, facts)  # before the slow part, and for good after it: a mistyped --model must not cost an old run
    trainer, smooth = Trainer(o, data), {}
    claim(o, facts, begin=True)
    print(plan(o, data, trainer.policy))
    done = trainer.resume()
    if trainer.reference:
        trainer.check_numeric_path()
    if not done:
        trainer.save(0)
    bar = tqdm(range(done, o.steps), initial=done, total=o.steps, unit="update", dynamic_ncols=True, disable=o.rank > 0)
    with interruptions() as stop:
        saved, log = time.monotonic(), os.devnull if o.rank else Path(o.out) / "metrics.jsonl"
        for update in bar:
            m = trainer.update(update)
            with writing(log), open(log, "a") as file:
                print(json.dumps(m), file=file)
            if (update + 1) % o.save_every == 0 or update + 1 == o.steps:
                trainer.save(update + 1)
                saved = time.monotonic()
            stopped, late = agreed(bool(stop), time.monotonic() - saved > SAVE_SECONDS, o=o)
            if stopped or late:
                if not o.rank:
                    trainer.save_state(update + 1)
                saved = time.monotonic()
            if stopped and update + 1 < o.steps:
                raise Stopped(f"stopped after update {update + 1}, which is saved: the same command continues" + ", without --fresh" * o.fresh)
            # Is it learning? The winners' error and what it is against the reference's, who is preferred, the share of flips.
            shown = {"winner": m["policy_w"]} | ({} if not trainer.reference else {
                "-ref": m["policy_w"] - m["reference_w"], "acc": m["implicit_acc"], "flipped": m["sign_neg"]})
            smooth |= {k: .9 * smooth.get(k, v) + .1 * v for k, v in shown.items() if v is not None}
            bar.set_postfix({k: f"{v:.3g}" for k, v in smooth.items()} | {k: m[k] for k in ("reference", "skipped_rows") if m[k]})
    if not o.model.endswith("-untrained"):
        print(f"Done. {o.out}/samples/step-{o.steps}.{'webp' if o.frames else 'png'} shows the base model above, the policy below."
              + f" python eval.py --model {o.model} scores both." * (o.model in MINI) + how_to_load(o))

@contextlib.contextmanager
def interruptions():
    """-> a list that SIGTERM and Ctrl-C are noted in, so that the update is finished first; another one stops it at once."""
    seen, before = [], {}
    def note(number, frame):
        if seen and time.monotonic() - seen[0] > 2:  # not when torchrun repeats what the terminal sent already
            raise KeyboardInterrupt
        seen.append(time.monotonic())
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def agreed(*flags, o):
    """Each flag, true on all processes if it is on one."""
    flags = torch.tensor(flags, dtype=torch.uint8)
    if o.world > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()

def mark(device):
    """A point in time: on a GPU in its queue, which nothing has to wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

def elapsed(a, b):
    """Seconds between two marks."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1000

def peak_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

@contextlib.contextmanager
def whole(path):
    """For a file or folder that is there whole or not at all: written under a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            yield temporary
        except Exception:
            remove(temporary)
            raise
        if path.is_dir():
            remove(path)
        os.replace(temporary, path)

@contextlib.contextmanager
def writing(path):
    """A full disk is one line: what was whole before is whole still."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer hides the reason in a RuntimeError
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" in str(error):
            raise
        free = shutil.disk_usage(next(p for p in Path(path).absolute().parents if p.is_dir())).free / 1e9
        raise UserError(f"{path} cannot be written: {' '.join(str(error).split())[:200]} ({free:.1f} GB are free there without it: make "
                        "room, and the same command continues from what was whole before)") from error

def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

def claim(o, data={}, begin=False):
    """Refuse an --out that cannot be written or holds another experiment; `begin`: clear it if --fresh, write config.json."""
    if o.rank:  # the first process has the folder to itself
        return begin and dist.barrier()
    out, path, now = Path(o.out), Path(o.out, "config.json"), {k: v for k, v in vars(o).items() if k not in MAY_CHANGE} | data
    try:
        out.mkdir(parents=True, exist_ok=True)
        then = json.loads(path.read_text()).get("options") if path.exists() else now
        need(then, f"--out {out} holds something else than a run: choose another")
        changed = ", ".join(f"{k} was {then.get(k)}, is {now[k]}" for k in now if then.get(k) != now[k] and (k != "data" or not data))
        need(o.fresh or not changed, f"{out} holds a run with other options ({changed}): choose another --out, or --fresh")
        if begin:
            for old in [out / "resume", *out.glob("checkpoint-*"), out / "metrics.jsonl", out / "samples"] * o.fresh:  # the config last, by whole()
                remove(old)
            versions = {"python": sys.version.split()[0], **{p: version(p) for p in ("torch", "diffusers", "transformers")}}
            with whole(path) as file:
                file.write_text(json.dumps({"options": now, "versions": versions}, indent=1))
            if o.world > 1:
                dist.barrier()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--out {out} cannot be used: {error}") from error

def measure(whole_run):
    """--time: what a run as configured would take on this machine, from its first micro-batches; the first of two warms up."""
    need(whole_run.world == 1, "--time measures one device: start it with plain python")
    o, checkpoints = copy.copy(whole_run), len({*range(0, whole_run.steps, whole_run.save_every), whole_run.steps})
    chunk = lambda n: min(o.batch_size, max(o.generate_batch * n, o.micro_batch))  # the first of an update is not fetched ahead
    first, o.batch_size, o.sampler_steps = chunk(4 if o.flip == "indicator" else 1), chunk(1), min(5, o.sampler_steps)  # a solver's steps are all alike
    o.flip = "none" if o.flip == "indicator" else o.flip  # at equal weights it would generate nothing: this is its upper bound
    with writing(Path(o.out)):
        room = tempfile.TemporaryDirectory(dir=next(p for p in Path(o.out).absolute().parents if p.is_dir()))
    with room as o.out:
        trainer = Trainer(o, open_data(o))
        evaluations, taken = (len(make_solver(trainer.codec.scheduler, o.solver, run.sampler_steps).timesteps) for run in (whole_run, o))
        point = functools.partial(mark, trainer.device)
        for _ in range(2):
            trainer.optimizer.zero_grad()
            seconds, start = trainer.gradients(0)[2], point()
            trainer.optimizer.step()
            optimizer = elapsed(start, point())
        moments = [time.perf_counter()]
        for work in (lambda: trainer.data.read(*trainer.data.groups[0]), lambda: trainer.save(1), lambda: trainer.grid(1)):
            work()
            moments.append(time.perf_counter())
    read, save, grid = (b - a for a, b in itertools.pairwise(moments))
    save += grid * (evaluations / taken - 1)
    seconds = {phase: seconds[f"seconds_{phase}"] / o.batch_size for phase in PHASES}
    seconds["generate"] *= evaluations / taken
    seconds["data"] += read / trainer.data.groups[0][2]  # the rows were in memory by then
    dtypes = dict(zip(("train", "generate"), (kind or torch.float32 for kind in DTYPES[o.dtype])))
    peaks, flop = {kind: matrix_product(kind, trainer.device) for kind in {*dtypes.values()}}, count_flop(trainer, evaluations)
    print(plan(whole_run, trainer.data, trainer.policy) + f"\nOn {torch.cuda.get_device_name(trainer.device) if trainer.device.type == 'cuda' else 'this CPU'}, for a winner:")
    for phase, each in seconds.items():
        speed = flop.get(phase, 0) / max(each, 1e-9)
        print(f"  {phase:9} {each:9.4f} s" + (f", {speed:.3g} TFLOP/s, {speed / peaks[dtypes[phase]]:.0%} of a matrix product's" if each > 1e-6 and speed else ""))
    computing = sum(each for phase, each in seconds.items() if phase != "data")
    winner, hidden = max(computing, seconds["data"]), min(computing, seconds["data"])
    total = whole_run.steps * (whole_run.batch_size * winner + first * hidden + optimizer) + checkpoints * save
    print(f"an update's optimizer step {optimizer:.3f} s, a checkpoint {save:.2f} s, peak memory {peak_gb(trainer.device) or 0:.2f} GB; a matrix product: "
          + ", ".join(f"{str(kind)[6:]} {peak:.3g} TFLOP/s" for kind, peak in peaks.items())
          + f"\nthe whole run on this device alone: {total / 3600:.3g} hours; rows are fetched meanwhile, but for an update's first"
          + ", and the anchor spares a part: this counts a reference sample for every winner" * (whole_run.flip == "indicator"))

def count_flop(trainer, evaluations):
    """TFLOP of a winner's generation and training, counted on a net without weights: what the mathematics takes, so activations
    that are computed again count once, and attention as matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    o, n, count = trainer.o, 2 - (trainer.o.loser == "none"), FlopCounterMode(display=False)
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), count:
        unet, _ = load_models(argparse.Namespace(**vars(o) | {"device": "meta"}), weights=False)
        out = predict(unet, torch.empty(n, *trainer.shape), torch.zeros(n, dtype=torch.long), torch.empty(n, *trainer.null.shape[1:]))
        forward = count.get_total_flops() / 1e12
        out.sum().backward()
    return {"generate": forward / n * evaluations * (1 + (o.guidance != 1)) * (o.loser == "generated"),
            "train": count.get_total_flops() / 1e12 + forward * (o.loser != "none")}

def matrix_product(dtype, device):
    """TFLOP/s of the best of five."""
    n, times = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(5):
        start = mark(device)
        a @ a
        times.append(elapsed(start, mark(device)))
    return 2e-12 * n ** 3 / min(times)

def plan(o, data, unet):
    """The resolved options and what follows from them, in words."""
    gb, trained = (4e-9 * sum(p.numel() for p in unet.parameters() if p.requires_grad or whole) for whole in (True, False))
    nets = 1 + (o.loser != "none") + (o.loser == "generated" and o.dtype != "fp32") / 2
    winners, checkpoints = o.steps * o.batch_size, len({*range(0, o.steps, o.save_every), o.steps})
    return (", ".join(f"{k.replace('_', '-')} {v}" for k, v in vars(o).items()
                      if v is not None and v is not False and k not in ("rank", "world"))
            + f"\n{o.steps} updates of {o.batch_size} = {winners:,} winners, {winners / data.total:.2g} epochs of {data.total:,} rows; an "
            f"update accumulates {o.batch_size // o.micro_batch // o.world} micro-batches of {o.micro_batch}"
            + f" on each of {o.world} devices" * (o.world > 1) + f"\n{gb * 250:.1f} M parameters, "
            f"{trained * 250:.1f} M train: memory for weights {nets * gb:.3g} GB, gradients {trained:.3g}, optimizer {2 * trained:.3g}, and "
            f"activations; disk for {checkpoints} checkpoints {checkpoints * (gb if checkpoint_part(o) == 'unet' else trained):.3g} GB, "
            f"to resume from {3 * trained:.3g}, twice that while it is written")

def how_to_load(o):
    name, part, pipe, more = MOVED.get(o.model, o.model), checkpoint_part(o), "StableDiffusionPipeline", ""
    net = "MotionAdapter" if part == "motion_adapter" else "UNetMotionModel" if o.frames else "UNet2DConditionModel"
    if o.frames:
        pipe, more = "AnimateDiffPipeline", ", motion_adapter=None" * (part == "unet") + (
            f', scheduler=DDIMScheduler.from_pretrained(\n      "{name}", subfolder="scheduler", beta_schedule="linear", clip_sample=False, '
            'timestep_spacing="linspace")')
    return (f"\nTo load it:\n  from diffusers import {net}" + f', {pipe}{", DDIMScheduler" * bool(o.frames)}' * (o.model not in MINI)
            + f'\n  {part} = {net}.from_pretrained("{o.out}", subfolder="checkpoint-{o.steps}/{part}")'
            + f'\n  pipe = {pipe}.from_pretrained("{name}", {part}={part}{more})' * (o.model not in MINI))

# ---- The command line -----------------------------------------------------------------------------------------------

METHODS = {  # one loss, six methods: what stands where the loser is, which checkpoint is the reference, what becomes of the sign
    "seppo": dict(loser="generated", reference="random", flip="sign"),
    "sspo": dict(loser="generated", reference="random", flip="indicator"),
    "spin": dict(loser="generated", reference="latest", flip="none"),
    "ditto": dict(loser="generated", reference="initial", flip="none"),
    "dpo": dict(loser="data", reference="initial", flip="none"),
    "sft": dict(loser="none", reference="initial", flip="none"),  # without a loser the other two say nothing
}
OPTIONS = (  # name, default (the paper's, or a type where there is none), what it is: unit and reason, choices
    ("method", "seppo", "a preset for the next three", METHODS),
    ("loser", str, "where DPO has the loser: a reference sample, the data's losing picture, nothing", ("generated", "data", "none")),
    ("reference", str, "which checkpoint so far is an interval's reference", ("random", "latest", "initial")),
    ("flip", str, "what becomes of the anchor criterion's sign", FLIPS),
    ("beta", 2000.0, "how strongly the reference holds; the first thing to tune, with --lr"),
    ("model", "mini", "mini, a folder saved by diffusers, or a hub id: a Stable Diffusion 1.x"),
    ("unet", str, "start from this UNet of the same shape: a folder or hub id"),
    ("motion-adapter", str, "makes a text-to-video model of it: AnimateDiff's motion modules, a folder or hub id"),
    ("frames", int, "of a clip [16 with --motion-adapter]"),
    ("train", str, "which weights of a text-to-video model learn [motion: the motion modules]", ("motion", "all")),
    ("data", "mini", "mini, pickapic, a folder of captioned pictures or clips, or Parquet (file, folder, hub id) with Pick-a-Pic's columns"),
    ("max-winners", int, "use the first N rows of the data only, ties included: the row groups behind are never read"),
    ("resolution", 512, "pixels of the shorter side, then of the centre crop"),
    ("caption-dropout", 0.2, "share of captions replaced by the empty one, alike in all four errors"),
    ("out", str, "the run's folder [runs/MODEL-METHOD, and a hash of whatever else was changed]"),
    ("fresh", False, "delete the run that --out holds, and start over"),
    ("steps", 210, "updates"),
    ("save-every", 30, "updates per interval: then a checkpoint joins the pool and the reference is redrawn"),
    ("batch-size", 2048, "winners per update, over all devices"),
    ("micro-batch", 1, "winners per forward pass: lower it when memory runs out, the result stays"),
    ("generate-batch", 16, "reference samples generated at a time [1 with --motion-adapter]"),
    ("compile", False, "generate with a compiled UNet: faster after some minutes"),
    ("gradient-checkpointing", False, "compute activations again in the backward pass: less memory, more time [on with --motion-adapter]"),
    ("lr", 2.048e-5, "learning rate after the warm-up; nothing scales it"),
    ("solver", "dpm++", "the diffusers scheduler that makes reference samples", SOLVERS),
    ("sampler-steps", 20, "its steps: most of a run's cost"),
    ("guidance", 7.5, "its classifier-free guidance scale, 1 for none"),
    ("seed", 0, "of everything drawn"),
    ("device", "auto", "auto, cpu, cuda, cuda:1"),
    ("dtype", str, "of the error passes [fp16 with loss scaling on a GPU, fp32 on a CPU]", DTYPES),
    ("time", False, "measure what a run as configured would take on this machine, then stop"),
    ("dry-run", False, "print the resolved options and what follows from them, then stop"),
    ("resume-from-checkpoint", str, "of no effect: the same command resumes anyway"),
)
PAPER = {name.replace("-", "_"): None if isinstance(default, type) else default for name, default, *_ in OPTIONS}
SMALL = dict(resolution=16, caption_dropout=0.1, batch_size=64, micro_batch=64, generate_batch=64, sampler_steps=8, guidance=1.0)
CLIPS = dict(frames=16, train="motion", generate_batch=1, gradient_checkpointing=True)  # what --motion-adapter changes: AnimateDiff's practice
SMALL_CLIPS = SMALL | dict(frames=8, train="motion", batch_size=16, micro_batch=16, generate_batch=16)
MINI = {  # what the miniature changes: it is small, and its errors are far larger, so beta and lr are its own
    "mini": SMALL | dict(steps=100, save_every=20, lr=2e-4, beta=5.0),
    "mini-untrained": SMALL | dict(steps=1500, save_every=500, lr=1e-3, data="mini-mixture", method="sft"),
    "mini-video": SMALL_CLIPS | dict(steps=60, save_every=12, lr=3e-4, beta=5.0, data="mini-video"),
    "mini-video-untrained": SMALL_CLIPS | dict(steps=300, save_every=300, lr=1e-3, data="mini-video-mixture", method="sft", train="all"),
}
MAY_CHANGE = ("out", "fresh", "dry_run", "micro_batch", "generate_batch", "gradient_checkpointing", "compile", "time",
              "device", "rank", "world", "resume_from_checkpoint")  # when resuming
ALIASES = {"--pretrained-model-name-or-path": "--model", "--dataset-name": "--data", "--max-train-samples": "--max-winners",
           "--num-frames": "--frames", "--output-dir": "--out", "--max-train-steps": "--steps", "--checkpointing-steps": "--save-every",
           "--learning-rate": "--lr", "--guidance-scale": "--guidance", "--mixed-precision": "--dtype"}
INSTEAD = {  # options of other trainers that would mislead here
    "--scale-lr": "--lr is the rate that is used (Diffusion-DPO's 1e-8 with --scale_lr at 2048 winners is --lr 2.048e-5)",
    "--train-batch-size": "--batch-size is winners per update over all devices, --micro-batch what one device takes at a time",
    "--gradient-accumulation-steps": "it follows from --batch-size and --micro-batch",
    "--beta-dpo": "--beta multiplies 1/2, as in Diffusion-DPO; diffusers' research script leaves the 1/2 out, so its 2500 is 5000 here",
}

def parse(options, argv, about):
    """A command line -> {option: value} of what was given. options: a table like OPTIONS. Raises UserError."""
    parser, words = argparse.ArgumentParser(description=about, allow_abbrev=False), []
    parser.error = lambda message: need(False, f"{message} (--help lists the options)")
    for name, default, text, *choices in options:
        kind = default if isinstance(default, type) else type(default)
        parser.add_argument(f"--{name}", help=text if kind is default or default is False else f"{text} [{default}]", **(
            {"action": "store_true", "default": None} if kind is bool else {"nargs": "+"} if kind is list else
            {"type": kind, "choices": choices[0] if choices else None}))
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name  # diffusers spells --learning_rate
        need(name not in INSTEAD, f"{name} is not an option here: {INSTEAD.get(name)}")
        words.append(ALIASES.get(name, name) + equals + value)
    return {k: v for k, v in vars(parser.parse_args(words)).items() if v is not None}

def resolve(argv=None):
    """A command line -> all options (argparse.Namespace), defaults filled in. Raises UserError for what cannot be."""
    given = parse(OPTIONS, argv, "SePPO: align a diffusion model with liked pictures.")
    model = given.get("model", PAPER["model"])
    defaults = PAPER | MINI.get(model, {}) | (CLIPS if given.get("motion_adapter") else {})
    defaults |= METHODS[given.get("method", defaults["method"])]
    o = argparse.Namespace(**defaults | given)
    join(o)
    o.dtype = o.dtype or ("fp32" if o.device == "cpu" else "fp16")
    if o.model in MINI and "micro_batch" not in given:
        o.micro_batch = max(1, o.batch_size // o.world)
    if not o.out:
        named = MAY_CHANGE + ("method",) + ("model",) * (model in MOVED or model in MINI)
        changed = sorted((k, v) for k, v in given.items() if k not in named and v != defaults[k])
        digest = "-" + hashlib.blake2b(repr(changed).encode(), digest_size=3).hexdigest() if changed else ""
        o.out = str(Path("runs") / f"{Path(model).resolve().name}-{o.method}{digest}")
    check(o)
    check_training(o)
    return o

def join(o):
    """This process's device, rank and world: as torchrun says (RANK, WORLD_SIZE, LOCAL_RANK), or alone."""
    with reading("torchrun's WORLD_SIZE and RANK", "start it with torchrun, or unset them"):
        o.world = int(os.environ.get("WORLD_SIZE", 1))
        o.rank = int(os.environ["RANK"]) if o.world > 1 else 0
        if o.device in ("auto", "cuda"):
            o.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() or o.device == "cuda" else "cpu"

def check(o):
    """What training and evaluation have in common."""
    need(bool(o.frames) == bool(o.motion_adapter or "frames" in MINI.get(o.model, {})), "--frames needs --motion-adapter, or --model mini-video")
    need(o.frames != 1, "--frames must be 2 at least")
    need(not o.motion_adapter or o.model not in MINI, "--motion-adapter is not for the miniature: take --model mini-video")
    for name, value in vars(o).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("seed", "caption_dropout", "rank"):
            need(0 < value < math.inf, f"--{name.replace('_', '-')} must be positive and finite")
    multiple = 8 if o.model in MINI else 64
    need(o.resolution % multiple == 0, f"--resolution must be a multiple of {multiple}")
    need(o.sampler_steps <= 1000, "--sampler-steps can be 1000 at most")
    need(re.fullmatch(r"cpu|cuda(:\d+)?", o.device), f"--device {o.device} must be auto, cpu, cuda or cuda:1")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    need(o.device == "cpu" or o.world == 1 or here <= torch.cuda.device_count(), f"{here} processes here, and torch finds {torch.cuda.device_count()} GPUs")
    need(o.device == "cpu" or int(o.device[5:] or 0) < torch.cuda.device_count(), f"--device {o.device}: torch finds no such GPU here; "
         "--device cpu works")

def check_training(o):
    need(not o.train or o.frames, "--train is for clips: it needs --motion-adapter")
    need(o.model in (*MINI, "random-sd15") or o.data != PAPER["data"], f"--model {o.model} needs --data: pickapic, or pictures of your own")
    frames = SMALL_CLIPS["frames"] if "video" in o.data else None
    need(o.data not in MINI_DATA or o.frames == frames, f"--data {o.data} has {'clips of 8 frames' if frames else 'no clips'}")
    need(0 <= o.caption_dropout <= 1, "--caption-dropout must be between 0 and 1")
    need(o.batch_size % (o.micro_batch * o.world) == 0, f"--batch-size {o.batch_size} must be a multiple of --micro-batch {o.micro_batch}"
         + f" times {o.world} processes" * (o.world > 1))
    need(o.device != "cpu" or o.dtype != "tf32", "--dtype tf32 needs a GPU: take fp32")

def begin(argv):
    o = resolve(argv)
    if o.rank:
        sys.stdout = open(os.devnull, "w")
    if o.model in MOVED and not Path(o.model).is_dir():
        print(f"{o.model} is gone from the hub: this takes its copy {MOVED[o.model]}")
    if not o.dry_run:
        return measure(o) if o.time else train(o)
    with torch.device("meta"):
        unet, _ = load_models(argparse.Namespace(**vars(o) | {"device": "meta"}), weights=False)
    print(plan(o, open_data(o), unet))

def main(argv=None, begin=begin, program="seppo.py", less="--micro-batch or --generate-batch, or add --gradient-checkpointing"):
    """The command. Returns the exit code: 0, or 2 after one line that says what to do."""
    for library in (diffusers.utils, transformers.utils, huggingface_hub):
        library.logging.set_verbosity(50)  # critical: what goes wrong is said once, below
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*local_dir_use_symlinks")  # diffusers' own use of huggingface_hub
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # to_pixels has its own limit
    try:
        begin(argv)
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized() and error.code == 2:  # what all find at once is said by one
            print(f"{program}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command continues", file=sys.stderr)
        return Stopped.code
    except torch.OutOfMemoryError:
        print(f"{program}: out of GPU memory: lower {less}", file=sys.stderr)
    except RuntimeError as error:
        if not (dist.is_initialized() and re.search("closed by peer|[Cc]onnection re|recvValue|NCCL", str(error))):
            raise
        print(f"{program}: another process has failed: its own line says why", file=sys.stderr)
    return 2

if __name__ == "__main__":
    sys.exit(main())
