"""Train the latent models: an autoencoder on photographs, then two denoisers on its latents.

Photographs under free licenses come from Python and Debian packages (budgie-backgrounds: trixie
or later):

    pip install scikit-image scikit-learn pillow-jxl-plugin
    apt-get download budgie-backgrounds lomiri-wallpapers-16.04
    for package in *.deb; do dpkg -x $package photographs; done

    train() { OMP_NUM_THREADS=1 python examples/train_latent.py "$@" --out checkpoints --bf16; }
    train autoencoder --data photographs
    train latents --data photographs
    train denoiser latent-sdxl --minutes 90
    train denoiser latent-flux --minutes 90
    python examples/train_latent.py sheet latent-sdxl --out checkpoints --sheet sheet.png
    python examples/train_latent.py export latent-sdxl --out checkpoints

Minutes are of processor time. Each command keeps a checkpoint in --out; `--resume` takes it up, and
`--resume --new-schedule --minutes 30` trains for 30 more. Rectified flow: x_t = (1 - t) * latents +
t * noise, target velocity noise - latents. Training goes from a quarter of the resolution, where
the layout of a picture is learned cheaply, to all of it. Authors and licenses of the
photographs: photographs.md.

No weights are shipped: after 105 minutes of latent-flux and 64 of latent-sdxl on two cores,
subjects and colors of latent-flux can be told, held-out combinations too, but edges are rough. What
latent-sdxl learns below full size is lost to it (it has no positions): `--shares 0 0 1`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from toma_fx.models import captions, latent, tiny

BUNDLED = {"skimage": "data", "sklearn": "datasets/images"}
"""Where Python packages keep their pictures."""
BUDGIE, LOMIRI = "backgrounds/budgie/", "backgrounds/"
PHOTOS: dict[str, tuple[str, float, float, float]] = {
    "an astronaut": ("skimage/astronaut.png", 0.45, 0.35, 0.68),
    "a cat": ("skimage/chelsea.png", 0.48, 0.5, 1.0),
    "a cup of coffee": ("skimage/coffee.png", 0.48, 0.5, 1.0),
    "a rocket": ("skimage/rocket.jpg", 0.5, 0.5, 0.9),
    "a pagoda": ("sklearn/china.jpg", 0.38, 0.5, 1.0),
    "a dahlia": ("sklearn/flower.jpg", 0.48, 0.47, 0.9),
    "a desert": (BUDGIE + "extreme-desert-hike.jxl", 0.4, 0.55, 0.9),
    "a lake": (BUDGIE + "lake-sherburne.jxl", 0.4, 0.42, 0.8),
    "an otter": (BUDGIE + "oakland-zoo-otters.jxl", 0.62, 0.5, 0.8),
    "ocean waves": (BUDGIE + "ocean-waves.jxl", 0.7, 0.5, 1.0),
    "an osprey": (BUDGIE + "perched-osprey.jxl", 0.45, 0.4, 0.75),
    "the colosseum": (BUDGIE + "roman-colosseum.jxl", 0.3, 0.5, 1.0),
    "a planet": (BUDGIE + "saturnian-profile.jxl", 0.43, 0.5, 1.0),
    "a city": (BUDGIE + "singaporean-cityscape.jxl", 0.5, 0.5, 0.95),
    "spices": (BUDGIE + "the-spices-of-life.jxl", 0.45, 0.65, 0.7),
    "a fig": (LOMIRI + "Picture_0B_by_freespace.jpg", 0.55, 0.48, 1.0),
    "paintbrushes": (LOMIRI + "Picture_1A_by_freespace.jpg", 0.45, 0.5, 0.95),
    "a dandelion": (LOMIRI + "seeding_by_Clements_Engelhardt.jpg", 0.37, 0.45, 0.8),
    "blue flowers": (BUDGIE + "blue-periwinkle.jxl", 0.55, 0.4, 0.7),
    "green hills": (BUDGIE + "tea-gardens.jxl", 0.55, 0.45, 0.85),
}
"""File, and the square of the picture: center (x, y) and side, as shares of the photograph."""
OTHERS = (
    *(f"skimage/{n}" for n in ("camera.png", "brick.png", "grass.png", "gravel.png", "coins.png")),
    *(f"skimage/{n}" for n in ("hubble_deep_field.jpg", "retina.jpg")),
    *(
        f"{BUDGIE}{n}.jxl"
        for n in (
            "abstract-spiral", "beacon-street-sunset", "canyon-wren", "high-trestle-trail",
            "perched-shrike", "piazza-gae-aulenti", "pondering-heron", "sunning-anhinga",
        )
    ),
    *(
        f"{LOMIRI}{n}.jpg"
        for n in (
            "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
            "friends_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi",
            "sunset_by_Aitzol_Berasategi", "Wine_by_Jakkub_Mede",
        )
    ),
)  # fmt: skip
"""Further photographs, of which only the autoencoder learns."""
GRIDS = (latent.GRID // 4, latent.GRID // 2, latent.GRID)
"""Latents a side of the stages of training, from coarse to fine."""
UNSEEN = (BUDGIE + "casa-mila.jxl", LOMIRI + "life_by_Aitzol_Berasategi.jpg")
"""Photographs on which the autoencoder is judged."""


def open_photo(name: str, data: Path) -> Tensor:
    """[3, H, W] uint8, the shorter side at most 1,024 pixels."""
    from PIL import Image

    package, _, file = name.partition("/")
    if package in BUNDLED:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{name}: {package} is not installed"
        path = Path(spec.submodule_search_locations[0]) / BUNDLED[package] / file
    else:
        path = next(data.rglob(name))
    if path.suffix == ".jxl":
        import pillow_jxl  # noqa: F401  # registers the format
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        share = 1024 / min(picture.size)
        if share < 1:
            size = (round(picture.width * share), round(picture.height * share))
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def relight(images: Tensor, light: str) -> Tensor:
    """Pictures [..., 3, H, W] in [0, 1] in one of `captions.LIGHTS`."""
    color = images.new_tensor
    if light == "black and white":
        gray = (images * color([0.299, 0.587, 0.114])[:, None, None]).sum(-3, keepdim=True)
        return gray.expand_as(images)
    if light == "at night":
        gray = images.mean(-3, keepdim=True)
        dim = (0.5 * images + 0.5 * gray).clamp(0, 1) ** 1.3
        return (
            dim * color([0.34, 0.46, 0.74])[:, None, None] + color([0, 0.01, 0.05])[:, None, None]
        )
    if light == "at sunset":
        glow = torch.linspace(0.16, 0.02, images.shape[-2])[:, None]
        warm = images * color([0.95, 0.62, 0.38])[:, None, None]
        return (warm + glow * color([1.2, 0.5, 0.1])[:, None, None]).clamp(0, 1)
    if light == "in fog":
        gray = images.mean(-3, keepdim=True)
        return 0.5 * (0.5 * images + 0.5 * gray) + 0.44
    return images


def resize(images: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] to a square."""
    return F.interpolate(
        images, (side, side), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)


def autoencoder_crops(photos: list[Tensor], count: int, side: int, seed: int) -> Tensor:
    """`count` random crops at random scales and lights, [count, 3, side, side] uint8."""
    rng = np.random.default_rng(seed)
    out = torch.empty(count, 3, side, side, dtype=torch.uint8)
    for i in range(count):
        photo = photos[rng.integers(len(photos))]
        height, width = photo.shape[1:]
        # from a crop in full detail to one that shows half of the photograph
        least, most = side, max(side + 1, 0.5 * min(height, width))
        s = int(np.exp(rng.uniform(np.log(least), np.log(most))))
        y, x = rng.integers(0, height - s + 1), rng.integers(0, width - s + 1)
        crop = photo[None, :, y : y + s, x : x + s].float() / 255
        light = captions.LIGHTS[rng.integers(5)] if rng.random() < 0.4 else ""
        crop = relight(resize(crop, side), light)[0]
        if rng.random() < 0.5:
            crop = crop.flip(-1)
        out[i] = (crop * 255).round().to(torch.uint8)
    return out


def write(path: Path, content: Any) -> None:
    """Save a checkpoint so that a reader or a crash never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def set_components(model: latent.Autoencoder, images: Tensor) -> None:
    """Start the linear maps as principal components, with unit variance over all channels.

    With noise on the latents the least squared error needs gains in proportion to the fourth root
    of the variances (water-filling), hence the powers.
    """
    x = F.pixel_unshuffle(images, latent.FACTOR).permute(1, 0, 2, 3).flatten(1)
    mean = x.mean(1)
    values, vectors = torch.linalg.eigh((x - mean[:, None]) @ (x - mean[:, None]).T / x.shape[1])
    values, vectors = values[-latent.CHANNELS :], vectors[:, -latent.CHANNELS :].T
    gain = values**-0.25 / (values**0.5).mean().sqrt()
    with torch.no_grad():
        model.linear_encoder.weight.copy_((gain[:, None] * vectors)[..., None, None])
        model.linear_encoder.bias.copy_(-(gain[:, None] * vectors) @ mean)
        model.linear_decoder.weight.copy_((vectors.T / gain)[..., None, None])
        model.linear_decoder.bias.copy_(mean)
        for last in (model.encoder[-1], model.decoder[-2]):
            last.weight.mul_(0.1)
            last.bias.zero_()


def sharpness_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """L1 of the pictures, of their gradients, and of two coarser levels."""
    loss = decoded.new_zeros(())
    for level in range(3):
        difference = decoded - images
        loss = loss + difference.abs().mean()
        if level < 2:
            loss = (
                loss + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
            )
        decoded, images = F.avg_pool2d(decoded, 2), F.avg_pool2d(images, 2)
    return loss


def train_autoencoder(args: argparse.Namespace) -> None:
    """Train for `args.minutes` of processor time; with `--decoder-only` the latents stay."""
    torch.manual_seed(0)
    names = [file for file, *_ in PHOTOS.values()] + list(OTHERS)
    photos = [open_photo(name, args.data) for name in names]
    unseen = [open_photo(name, args.data) for name in UNSEEN]
    print(f"{len(photos)} photographs, {clock(args.device):.0f} s", flush=True)
    crops = autoencoder_crops(photos, args.crops, args.side, seed=args.seed)
    test = autoencoder_crops(unseen, 24, 128, seed=1).to(args.device).float() / 127.5 - 1
    print(f"{len(crops)} crops, {clock(args.device):.0f} s", flush=True)
    model = latent.Autoencoder().to(args.device, memory_format=torch.channels_last)
    path = args.out / "autoencoder.pt"
    if args.resume:
        model.load_state_dict(torch.load(path)["model"])
    else:
        set_components(model, crops[:1000].float() / 127.5 - 1)
    trained = [p for n, p in model.named_parameters() if not args.decoder_only or "decoder" in n]
    optimizer = torch.optim.AdamW(trained, lr=args.rate, weight_decay=1e-4, betas=(0.9, 0.98))
    start, step, last_save = clock(args.device), 0, 0.0
    while (progress := (clock(args.device) - start) / (60 * args.minutes)) < 1:
        lr = (
            args.rate
            * max(0.02, 0.5 * (1 + math.cos(math.pi * progress)))
            * min(1, (step + 1) / 50)
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = crops[torch.randint(len(crops), (args.batch,))].to(args.device).float() / 127.5 - 1
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            with torch.set_grad_enabled(not args.decoder_only):
                latents = model.encode(images)
            noise = 0.2 * torch.rand_like(latents[:, :1, :1, :1]) * torch.randn_like(latents)
            decoded = model.decode(latents + noise)
        loss = sharpness_loss(decoded.float(), images)
        power = latents.float().square().mean()
        optimizer.zero_grad()
        (loss + 0.1 * (power - 1).square()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0 or step == 1:
            with torch.no_grad():
                error = model.decode(model.encode(test)).clamp(-1, 1) - test
            psnr = -10 * torch.log10(error.square().mean((1, 2, 3)) / 4).mean()
            print(
                f"{progress:6.1%} step {step} lr {lr:.1e} loss {loss.item():.4f}"
                f" power {power.item():.3f} unseen {psnr:.2f} dB",
                flush=True,
            )
        if clock(args.device) - last_save > 120:
            write(path, {"model": model.state_dict(), "step": step})
            last_save = clock(args.device)
    if not args.decoder_only:
        normalize(model, crops)
    write(path, {"model": model.state_dict(), "step": step})
    print(f"done: {step} steps, {(clock(args.device) - start) / 60:.1f} minutes", flush=True)


@torch.no_grad()
def normalize(model: latent.Autoencoder, crops: Tensor) -> None:
    """Shift and scale the latents to zero mean a channel and unit variance over all."""
    latents = torch.cat(
        [model.encode(x.to(model.shift.device).float() / 127.5 - 1) for x in crops[:1024].split(64)]
    )
    mean = latents.mean((0, 2, 3))
    model.shift.copy_(mean[:, None, None])
    model.scale.copy_(1 / (latents - model.shift).square().mean().sqrt())
    print("standard deviations", (latents.std((0, 2, 3)) * model.scale).tolist())


def pictures(
    photo: Tensor,
    square: tuple[float, float, float],
    closeness: float,
    count: int,
    side: int,
    rng: np.random.Generator,
) -> Tensor:
    """`count` jittered views of the square, [count, 3, side, side] in [0, 1]."""
    height, width = photo.shape[1:]
    x, y, share = square
    views = []
    for _ in range(count):
        s = int(share * closeness * min(height, width) * rng.uniform(0.94, 1.0))
        shift = 0.03 * s
        top = y * height - s / 2 + rng.uniform(-shift, shift)
        left = x * width - s / 2 + rng.uniform(-shift, shift)
        top, left = int(np.clip(top, 0, height - s)), int(np.clip(left, 0, width - s))
        crop = photo[None, :, top : top + s, left : left + s].float() / 255
        views.append(resize(crop, side))
    return torch.cat(views)


@torch.no_grad()
def write_latents(args: argparse.Namespace) -> None:
    """Latents of `args.variants` views for each prompt at each size, float16; kept if there."""
    model = latent.Autoencoder()
    model.load_state_dict(torch.load(args.out / "autoencoder.pt")["model"])
    model.to(args.device)
    photos = {name: open_photo(file, args.data) for name, (file, *_) in PHOTOS.items()}
    parts = [
        (subject, light, side, distance)
        for subject in captions.SUBJECTS
        for light in captions.LIGHTS
        for side in captions.SIDES
        for distance in captions.DISTANCES
    ]
    assert tuple(captions.caption(*p) for p in parts) == captions.PROMPTS
    for grid in GRIDS:
        side, path = grid * latent.FACTOR, args.out / f"latents-{grid}.npy"
        if path.exists():
            continue
        rng = np.random.default_rng(grid)
        out = torch.empty(len(parts), args.variants, latent.CHANNELS, grid, grid).half()
        for i, (subject, light, mirrored, distance) in enumerate(parts):
            closeness = 0.58 if distance else 1.0
            views = pictures(
                photos[subject], PHOTOS[subject][1:], closeness, args.variants, side, rng
            )
            views = relight(views, light)
            if mirrored:
                views = views.flip(-1)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
                out[i] = model.encode(views.to(args.device) * 2 - 1).half().cpu()
        np.save(path, out.numpy())
        print(f"{side} pixels: mean {out.float().mean():.3f} deviation {out.float().std():.3f}")


def clock(device: str) -> float:
    """Seconds of this process: of the processor, or with a GPU of the wall."""
    return time.process_time() if device == "cpu" else time.monotonic()


class Run:
    """One training of a denoiser and its text encoder: state, schedule, checkpoints."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.name, self.device = args, args.model, args.device
        self.path = args.out / f"{self.name}.pt"
        parts = {"denoiser": latent.build(self.name), "text": latent.TextEncoder()}
        self.model = nn.ModuleDict(parts).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.rate, weight_decay=0.01, betas=(0.9, 0.99)
        )
        self.step, self.before, self.begun = 0, 0.0, 0.0
        if args.resume and self.path.exists():
            self.restore()
        self.start, self.first = clock(self.device), self.step
        self.ids = captions.token_ids([*captions.PROMPTS, ""]).to(self.device)
        seen = torch.tensor([prompt not in captions.HELD_OUT for prompt in captions.PROMPTS])
        self.known, self.unknown = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
        self.data = {
            grid: torch.from_numpy(np.load(args.out / f"latents-{grid}.npy")).to(self.device)
            for grid, share in zip(GRIDS, args.shares, strict=True)
            if share
        }
        denoiser = self.model["denoiser"]
        self.denoiser = torch.compile(denoiser, dynamic=False) if args.compile else denoiser

    @property
    def minutes(self) -> float:
        """Trained in total, those of earlier processes included."""
        return self.before + (clock(self.device) - self.start) / 60

    def restore(self) -> None:
        """Take up the checkpoint."""
        saved = torch.load(self.path, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.before = saved["step"], saved["minutes"]
        self.begun = self.before if self.args.new_schedule else saved["begun"]
        torch.manual_seed(self.args.seed + self.step)

    def save(self) -> None:
        """Write the checkpoint."""
        state = {part: getattr(self, part).state_dict() for part in ("model", "average")}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step}
        write(self.path, {**state, "minutes": self.minutes, "begun": self.begun})

    def stage(self, progress: float) -> tuple[int, int, float]:
        """(latents a side, batch, learning rate) at a share of the minutes.

        Each stage has a cosine of its own, so that it ends on small steps.
        """
        ends = np.cumsum(self.args.shares)
        i = min(int(np.searchsorted(ends, progress, side="right")), len(GRIDS) - 1)
        share = self.args.shares[i]
        phase = min(1.0, (progress - float(ends[i]) + share) / share)
        peak = self.args.rate * (0.6 if GRIDS[i] == latent.GRID else 1.0)
        warm = min(1, (self.step - self.first + 1) / 100)
        rate = peak * max(0.03, 0.5 * (1 + math.cos(math.pi * phase))) * warm
        return GRIDS[i], self.args.batches[i], rate

    def loss(self, denoiser: Any, text: nn.Module, prompts: Tensor, grid: int) -> Tensor:
        """Mean squared error of the velocity for pictures of `prompts`, indices of captions."""
        count, data = len(prompts), self.data[grid]
        clean = data[prompts, torch.randint(data.shape[1], (count,))].float()
        # larger pictures show more at the same noise, so they need more of it; and what a
        # caption shows is decided near pure noise, which this distribution draws seldom
        t = torch.sigmoid(torch.randn(count) + (0.4 if grid == latent.GRID else 0.0))
        high = torch.rand(count) < self.args.high_noise
        t = torch.where(high, 1 - 0.25 * torch.rand(count), t).to(self.device)
        noise = torch.randn_like(clean)
        noisy = torch.lerp(clean, noise, t[:, None, None, None])
        if torch.is_grad_enabled():
            dropped = torch.rand(count) < 0.1
            prompts = torch.where(dropped, len(captions.PROMPTS), prompts)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.args.bf16):
            tokens, pooled = text(self.ids[prompts.to(self.device)])
            v = latent.FLOW.velocity(self.name, denoiser, noisy, t, tokens, pooled)
        return (v.float() - (noise - clean)).square().mean()

    def advance(self, grid: int, batch: int, rate: float) -> Tensor:
        """One step of the optimizer and of the average; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        prompts = self.known[torch.randint(len(self.known), (batch,))]
        loss = self.loss(self.denoiser, self.model["text"], prompts, grid)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # averages over the last tenth of the steps
        weight = max(0.0005, 10 / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.model.parameters()), weight
            )
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self, grid: int, batch: int) -> float:
        """Of the average on captions that training leaves out."""
        prompts = self.unknown[torch.randint(len(self.unknown), (batch,))]
        return self.loss(self.average["denoiser"], self.average["text"], prompts, grid).item()


def train_denoiser(args: argparse.Namespace) -> None:
    """Train until `args.minutes` of the schedule are over."""
    torch.manual_seed(args.seed)
    run, losses, last_save = Run(args), [], clock(args.device)
    while (progress := (run.minutes - run.begun) / args.minutes) < 1:
        grid, batch, rate = run.stage(progress)
        losses.append(run.advance(grid, batch, rate))
        if run.step % args.every == 0:
            print(
                f"{progress:6.1%} {run.minutes:6.1f} min step {run.step} grid {grid} lr {rate:.1e}"
                f" loss {torch.stack(losses[-args.every :]).mean():.4f}"
                f" held out {run.held_out_loss(grid, batch):.4f}",
                flush=True,
            )
        if clock(args.device) - last_save > args.save_seconds:
            run.save()
            last_save = clock(args.device)
    run.save()
    print(f"done: {run.step} steps, {run.minutes:.1f} minutes")


def loaded(args: argparse.Namespace) -> latent.LatentModel:
    """The averaged weights of a checkpoint."""
    auto = latent.Autoencoder()
    auto.load_state_dict(torch.load(args.out / "autoencoder.pt", map_location="cpu")["model"])
    denoiser, text = latent.build(args.model), latent.TextEncoder()
    saved = torch.load(args.out / f"{args.model}.pt", map_location="cpu")
    print(f"step {saved['step']}, {saved['minutes']:.1f} minutes")
    average = nn.ModuleDict({"denoiser": denoiser, "text": text})
    average.load_state_dict(saved["average"])
    average.eval().requires_grad_(False)
    return latent.LatentModel(args.model, denoiser, text, auto.requires_grad_(False))


def draw_sheet(args: argparse.Namespace) -> None:
    """Write pictures of trained (first half) and held-out prompts."""
    from PIL import Image, ImageDraw

    model = loaded(args)
    half = args.count // 2
    trained = [p for p in captions.PROMPTS if p not in captions.HELD_OUT]
    prompts = trained[:: len(trained) // half][:half]
    prompts += list(captions.HELD_OUT[:: len(captions.HELD_OUT) // half][:half])
    columns = 8
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * 260, rows * 280), "white")
    pen = ImageDraw.Draw(sheet)
    for i, prompt in enumerate(prompts):
        picture = model.generate([prompt], seed=i, steps=args.steps, guidance=args.guidance)[0]
        pixels = ((picture + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        x, y = i % columns * 260, i // columns * 280
        sheet.paste(Image.fromarray(pixels), (x, y))
        known = "" if i < half else "HELD OUT "
        pen.text((x, y + 260), known + prompt.removeprefix("a photo of "), fill="black")
    sheet.save(args.sheet)


def export(args: argparse.Namespace) -> None:
    """Write the three modules as float16 safetensors."""
    model = loaded(args)
    parts = {"denoiser": model.denoiser, "text": model.text, "autoencoder": model.autoencoder}
    for part, module in parts.items():
        folder = args.weights / ("latent-autoencoder" if part == "autoencoder" else args.model)
        folder.mkdir(parents=True, exist_ok=True)
        half = {k: v.half().contiguous() for k, v in module.state_dict().items()}
        save_file(half, folder / f"{part}.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    auto = commands.add_parser("autoencoder", help="train the autoencoder")
    auto.add_argument("--crops", type=int, default=6000)
    auto.add_argument("--side", type=int, default=96)
    auto.add_argument("--decoder-only", action="store_true", help="keep the latents")
    auto.add_argument("--rate", type=float, default=2e-3)
    auto.add_argument("--batch", type=int, default=8)
    auto.add_argument("--minutes", type=float, default=4.5)
    auto.set_defaults(run=train_autoencoder)
    encode = commands.add_parser("latents", help="encode the pictures of all captions, once")
    encode.add_argument("--variants", type=int, default=6)
    encode.set_defaults(run=write_latents)
    denoiser = commands.add_parser("denoiser", help="train a denoiser")
    denoiser.add_argument("model", choices=latent.NAMES)
    denoiser.add_argument("--rate", type=float, default=1e-3)
    three: dict[str, Any] = {"nargs": 3, "metavar": ("COARSE", "HALF", "FULL")}
    denoiser.add_argument("--batches", type=int, default=(64, 16, 4), **three)
    denoiser.add_argument(
        "--shares", type=float, default=(0.2, 0.4, 0.4), help="of the minutes", **three
    )
    denoiser.add_argument("--minutes", type=float, default=90)
    denoiser.add_argument(
        "--high-noise", type=float, default=0.5, help="share of the noise levels in 0.75 to 1"
    )
    denoiser.add_argument(
        "--new-schedule", action="store_true", help="with --resume: --minutes more, from the top"
    )
    denoiser.add_argument("--compile", action="store_true")
    denoiser.add_argument("--every", type=int, default=50, help="steps between two lines")
    denoiser.add_argument("--save-seconds", type=float, default=300)
    denoiser.set_defaults(run=train_denoiser)
    sheet = commands.add_parser("sheet", help="draw pictures of a checkpoint")
    sheet.add_argument("model", choices=latent.NAMES)
    sheet.add_argument("--sheet", type=Path, required=True)
    sheet.add_argument("--count", type=int, default=32)
    sheet.add_argument("--steps", type=int, default=24)
    sheet.add_argument("--guidance", type=float, default=2.0)
    sheet.set_defaults(run=draw_sheet)
    weights = commands.add_parser("export", help="write a checkpoint as float16 files")
    weights.add_argument("model", choices=latent.NAMES)
    weights.add_argument("--weights", type=Path, default=tiny.weights_dir("x").parent)
    weights.set_defaults(run=export)
    for command in (auto, encode):
        command.add_argument("--data", type=Path, required=True, help="unpacked packages")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
        command.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
        command.add_argument("--bf16", action="store_true")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
