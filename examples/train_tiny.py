"""Train the two embedded models on twelve photographs that scikit-image and scikit-learn ship.

    pip install toma-fx scikit-image scikit-learn
    python examples/train_tiny.py tiny-sdxl --minutes 90
    python examples/train_tiny.py tiny-flux --minutes 90

Rectified flow: x_t = (1 - t) * picture + t * noise, target velocity noise - picture. Training
starts at 32 pixels, where a step is about six times cheaper, and ends at 64. The exponential moving
average of the weights is written in float16. The shipped weights had 85 minutes on one core each:
3,408 steps (tiny-sdxl, final loss 0.055) and 3,052 (tiny-flux, 0.066). Licenses of the photographs:
toma_fx/weights/LICENSES.md.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from toma_fx.models import tiny

VARIANTS = 64
"""Random crops prepared per photograph."""


def photographs() -> list[np.ndarray]:
    """The pictures of `tiny.CLASSES`, in order, [H, W, 3] uint8."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    loaders = {"hubble": "hubble_deep_field"}
    pictures = []
    for name in tiny.CLASSES:
        if name in ("china", "flower"):
            picture = load_sample_image(f"{name}.jpg")
        else:
            picture = getattr(data, loaders.get(name, name))()
        if picture.ndim == 2:
            picture = np.stack([picture] * 3, -1)
        pictures.append(picture[..., :3])
    return pictures


def crops(seed: int) -> Tensor:
    """[classes, VARIANTS, 3, 64, 64] in [-1, 1]: the center square, jittered by up to a tenth."""
    rng = np.random.default_rng(seed)
    out = torch.empty(len(tiny.CLASSES), VARIANTS, 3, tiny.SIZE, tiny.SIZE)
    for c, picture in enumerate(photographs()):
        height, width = picture.shape[:2]
        side = min(height, width)
        whole = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        for v in range(VARIANTS):
            s = int(side * rng.uniform(0.9, 1.0))
            y = (height - side) // 2 + rng.integers(0, side - s + 1)
            x = (width - side) // 2 + rng.integers(0, side - s + 1)
            crop = whole[..., y : y + s, x : x + s]
            out[c, v] = nn.functional.interpolate(
                crop, (tiny.SIZE, tiny.SIZE), mode="bilinear", antialias=True
            )[0].clamp(-1, 1)
    return out


def save(folder: Path, denoiser: nn.Module, conditioning: nn.Module) -> None:
    """Write both modules as float16 safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in (("denoiser", denoiser), ("conditioning", conditioning)):
        half = {k: v.half().contiguous() for k, v in module.state_dict().items()}
        save_file(half, folder / f"{name}.safetensors")


def train(name: str, minutes: float, batch: int, rate: float, coarse: float, out: Path) -> None:
    """Train `name` for `minutes` of wall time, the first `coarse` share of them at 32 pixels."""
    torch.manual_seed(0)
    data = crops(seed=0)
    model = nn.ModuleDict({"denoiser": tiny.build(name), "conditioning": tiny.ClassConditioning()})
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    start, step, losses, last_save = time.monotonic(), 0, [], 0.0
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        # one cosine per resolution: each ends on a small step
        low = progress < coarse
        phase = progress / coarse if low else (progress - coarse) / (1 - coarse)
        peak = rate if low else 0.6 * rate
        lr = peak * max(0.03, 0.5 * (1 + np.cos(np.pi * phase))) * min(1, (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = lr
        labels = torch.randint(len(tiny.CLASSES), (batch,))
        pictures = data[labels, torch.randint(VARIANTS, (batch,))]
        if low:
            pictures = nn.functional.avg_pool2d(pictures, 2)
        labels[torch.rand(batch) < 0.1] = len(tiny.CLASSES)
        t = torch.sigmoid(torch.randn(batch))
        noise = torch.randn_like(pictures)
        noisy = torch.lerp(pictures, noise, t[:, None, None, None])
        tokens, pooled = model["conditioning"](labels)
        v = tiny.FLOW.velocity(name, model["denoiser"], noisy, t, tokens, pooled)
        loss = (v - (noise - pictures)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        losses.append(loss.item())
        if step % 50 == 0:
            size = 32 if low else 64
            mean = np.mean(losses[-50:])
            print(f"{progress:6.1%} step {step} {size} px lr {lr:.1e} loss {mean:.4f}", flush=True)
        if time.monotonic() - last_save > 300:
            save(out, average["denoiser"], average["conditioning"])
            last_save = time.monotonic()
    save(out, average["denoiser"], average["conditioning"])
    print(f"done: {step} steps, loss of the last 200 {np.mean(losses[-200:]):.4f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=tiny.NAMES)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--coarse", type=float, default=0.5, help="share of the time spent at 32 pixels"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder for the weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = args.out or tiny.weights_dir(args.model)
    train(args.model, args.minutes, args.batch, args.rate, args.coarse, out)


if __name__ == "__main__":
    main()
