"""GFRNet: blind face restoration guided by one sharp picture of the same person.

Li, Liu, Ye, Zuo, Lin, Yang: "Learning Warped Guidance for Blind Face Restoration", ECCV 2018.

A sharp picture of the same person shows the details that a degraded one has lost, but in another pose and
with another expression. So a first network (WarpNet) predicts a flow field that bends the guide into the
pose of the degraded face; a second one (RecNet, a U-Net) restores the face from both. Nobody knows the true
flow: WarpNet learns from facial landmarks, which must land on each other, and from smoothness in between.

Equation → name
    (1) WarpNet           (5) perceptual_loss                     (9) landmark_loss
    (2) warp              (6) pixel_loss, the sum in train       (10) tv_loss
    (3) RecNet            (7) discriminator_loss                 (11) flow_loss
    (4) common.degrade    (8) adversarial_loss, Discriminators   (12) the sum in train

    python gfrnet.py --train                                            # minutes on two CPU cores
    python gfrnet.py --evaluate                                         # on people it has never seen
    python gfrnet.py --restore photo.jpg --reference sharp.jpg --aligned    # your pictures

Open in the paper, chosen here: widths and activations are those of pix2pix, which the paper follows; the
squares of Eq. (9) and (10) are sums over points and pixels, that of Eq. (6) a mean; the generator's side of
Eq. (7) is the non-saturating −log D; WarpNet's last layer starts at 0, so that the flow starts as the
identity, all others with He's initialisation (pix2pix's normal of 0.02 in the discriminators); the landmark
box is resized to half the image for the local discriminator.
TINY differs from the paper in size, and in what Config says beside it.
"""
import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

import common
from common import InputError

SCRIPT = "gfrnet"


# -----------------------------------------------------------------------------------------------------------
# 2. Config
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                          # pixels, height = width, a power of two: 128 is seven levels
    seed: int = 0

    encoder: str = "recogniser"              # ψ of Eq. (5); "vgg" is VGG-Face, or VGG-19 without a file
    guided: bool = True                      # RecNet sees the guide
    warped: bool = True                      # bent by WarpNet
    stranger: bool = False                   # the guide is somebody else
    width: int = 16                          # channels of the first layer; the deepest have eight times more
    rec_width: int = 1                       # RecNet's factor on it
    residual: bool = True                    # added to I^d: a short training need not learn to copy

    weight_pixel: float = 100.0              # λ_r,0
    weight_perceptual: float = 0.3           # λ_r,l; 0.001 in the paper, with another encoder
    weight_adversarial: tuple = (0.01, 0.005)    # λ_a,g, λ_a,l; the paper's / 100
    weight_landmark: float = 10.0            # λ_lm
    weight_tv: float = 0.05                  # λ_TV; 1 in the paper
    smooth: float = 0.9                      # label of a true picture for the discriminators
    discriminator_width: int = 8
    learning_rate: float = 2e-3              # 10 times the paper's; then a tenth, then a hundredth of it
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0; none in the paper
    patience: int = 3                        # validations without a better loss before the rate is cut
    warp_steps: int = 1000                   # of the steps: WarpNet alone, on the flow loss
    steps: int = 1600
    crop: float = 0.05                       # largest random change of scale and place, parts of the size
    batch: int = 8                           # pairs a process and step
    validate_every: int = 100                # steps; also when a checkpoint is written
    degradation: str = "gfrnet"              # Eq. (4)


TINY = Config()
PAPER = replace(TINY, preset="paper", size=256, encoder="vgg", width=64, residual=False,
                weight_perceptual=0.001, weight_adversarial=(1.0, 0.5), weight_tv=1.0,
                discriminator_width=64, learning_rate=2e-4, cooldown=0, patience=0,
                warp_steps=5 * 20_273, steps=105 * 20_273, batch=1,
                validate_every=20_273)       # 20,273 pairs are an epoch
PRESETS = {"tiny": TINY, "paper": PAPER}
VARIANTS = {                                 # Table 1: Full, -F, -W, -W2, -WG, -WG2, R
    "full": {}, "no-flow-loss": {"weight_landmark": 0.0, "weight_tv": 0.0},
    "no-warp": {"warped": False}, "no-warp-2x": {"warped": False, "rec_width": 2},
    "no-guide": {"guided": False, "warped": False},
    "no-guide-2x": {"guided": False, "warped": False, "rec_width": 2}, "random-guide": {"stranger": True}}


# -----------------------------------------------------------------------------------------------------------
# 3. Network
# -----------------------------------------------------------------------------------------------------------

def normalise(points, size):
    """Pixels (…,2) of a size×size image → coordinates in [-1,1], where ±1 are the image's outer edges."""
    return (2 * points + 1) / size - 1


def identity_flow(size, device="cpu"):
    """The flow that changes nothing: every pixel's own coordinates, (1,2,size,size)."""
    line = normalise(torch.arange(size, device=device), size)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]


def warp(image, flow):
    """Eq. (2): I^w_ij = Σ over the 4 neighbours (h,w) of I^g_hw max(0, 1−|Φ^y_ij−h|) max(0, 1−|Φ^x_ij−w|).

    image (B,C,H,W), flow (B,2,H,W) in [-1,1] → (B,C,H,W). Neighbours outside the image count as 0.
    """
    return F.grid_sample(image.float(), flow.float().permute(0, 2, 3, 1), mode="bilinear",
                         padding_mode="zeros", align_corners=False)


class EncoderDecoder(nn.Module):
    """Figure 3: log2(size) convolutions 4×4 of stride 2 down to 1×1, as many deconvolutions up again.

    Convolution, BatchNorm, ReLU; no BatchNorm in the encoder's first and the decoder's last layer, nor at
    1×1, where there is nothing to normalise. With `skips`, layer i is concatenated to layer L−i. At batch 1
    (the paper's) BatchNorm is each image's own statistics, also when it restores: that is InstanceNorm.
    """
    def __init__(self, channels_in, channels_out, width, cfg, skips):
        super().__init__()
        norm = nn.BatchNorm2d if cfg.batch > 1 else lambda n: nn.InstanceNorm2d(n, affine=True)
        levels, self.skips = int(math.log2(cfg.size)), skips
        widths = [channels_in, *(width * min(2**level, 8) for level in range(levels))]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (before, after) in enumerate(zip(widths, widths[1:])):
            inner = 0 < level < levels - 1
            self.down.append(nn.Sequential(nn.Conv2d(before, after, 4, 2, 1, bias=not inner),
                                           norm(after) if inner else nn.Identity(), nn.LeakyReLU(0.2)))
        for level in range(levels - 1, -1, -1):
            before = widths[level + 1] * (2 if skips and level < levels - 1 else 1)
            if level:
                self.up.append(nn.Sequential(nn.ConvTranspose2d(before, widths[level], 4, 2, 1, bias=False),
                                             norm(widths[level]), nn.ReLU()))
            else:
                self.up.append(nn.ConvTranspose2d(before, channels_out, 4, 2, 1))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, 0.2,
                                        "fan_in" if isinstance(module, nn.Conv2d) else "fan_out")

    def forward(self, x):
        maps = []
        for layer in self.down:
            x = layer(x)
            maps.append(x)
        for number, layer in enumerate(self.up):
            skip = maps[-1 - number]
            x = layer(torch.cat([x, skip], 1) if self.skips and number else x)
        return x.float()


class WarpNet(nn.Module):
    """Eq. (1): Φ = F_w(I^d, I^g). degraded, guide (B,3,H,W) → flow (B,2,H,W) through tanh."""

    def __init__(self, cfg):
        super().__init__()
        self.body = EncoderDecoder(6, 2, cfg.width, cfg, skips=False)
        nn.init.zeros_(self.body.up[-1].weight)
        nn.init.zeros_(self.body.up[-1].bias)

    def forward(self, degraded, guide):
        start = torch.atanh(identity_flow(degraded.shape[-1], degraded.device))
        return torch.tanh(start + self.body(torch.cat([degraded, guide], 1)))


class RecNet(nn.Module):
    """Eq. (3): Î = F_r(I^d, I^w), a U-Net. degraded, warped (B,3,H,W) → restored; None: not guided."""

    def __init__(self, cfg):
        super().__init__()
        self.residual = cfg.residual
        self.body = EncoderDecoder(6 if cfg.guided else 3, 3, cfg.width * cfg.rec_width, cfg, skips=True)
        if cfg.residual:
            nn.init.zeros_(self.body.up[-1].weight)

    def forward(self, degraded, warped):
        image = self.body(degraded if warped is None else torch.cat([degraded, warped], 1))
        return degraded + image if self.residual else torch.tanh(image)


class GFRNet(nn.Module):
    """Both networks: degraded, guide (B,3,H,W) in [-1,1] → restored, warped, flow.

    Without a WarpNet warped is the guide and flow None; without guide both are None.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.warp_net = WarpNet(cfg) if cfg.warped else None
        self.rec_net = RecNet(cfg)

    def forward(self, degraded, guide, flow_only=False):
        warped, flow = guide if self.cfg.guided else None, None
        if self.warp_net is not None:
            flow = self.warp_net(degraded, guide)
            if flow_only:
                return flow
            warped = warp(guide, flow)
        return self.rec_net(degraded, warped), warped, flow


class Discriminator(nn.Module):
    """The conditional 70×70 patch discriminator of pix2pix: degraded, guide, image → logits (B,1,h,w)."""

    def __init__(self, width):
        super().__init__()
        widths, layers = (9, width, 2 * width, 4 * width, 8 * width), []
        for level, (before, after) in enumerate(zip(widths, widths[1:])):
            layers += [nn.Conv2d(before, after, 4, 2 if level < 3 else 1, 1, bias=level == 0),
                       nn.BatchNorm2d(after) if level else nn.Identity(), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, degraded, guide, image):
        return self.layers(torch.cat([degraded, guide, image], 1))


def landmark_box(landmarks, size):
    """The smallest box around all landmarks: (B,68,2) → (B,4) x1,y1,x2,y2 as edges, inside the image and at
    least size/16 wide and high."""
    least = size / 16
    low = landmarks.amin(1).clamp(0, size - least)
    high = torch.maximum((landmarks.amax(1) + 1).clamp(max=size), low + least)
    return torch.cat([low, high], 1)


def crop_local(image, boxes, side):
    """The boxes (B,4) of image (B,C,H,W), resized to side×side by RoIAlign."""
    return roi_align(image.float().contiguous(), list(boxes[:, None]), side, sampling_ratio=2, aligned=True)


class Discriminators(nn.Module):
    """Global and local discriminator: the latter sees only the box around all landmarks → two logit maps."""

    def __init__(self, width):
        super().__init__()
        self.whole, self.local = Discriminator(width), Discriminator(width)

    def forward(self, degraded, guide, image, boxes):
        parts = crop_local(torch.cat([degraded, guide, image], 1), boxes, image.shape[-1] // 2)
        return [self.whole(degraded, guide, image), self.local(*parts.chunk(3, 1))]


# -----------------------------------------------------------------------------------------------------------
# 4. Losses
# -----------------------------------------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (6), first term: ‖I − Î‖², as a mean over pixels."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (5): ‖ψ_l(Î) − ψ_l(I)‖² / (C_l H_l W_l) of the conv-4 maps (B,C,h,w), a mean over the batch."""
    return F.mse_loss(features.float(), target_features.float())


def discriminator_loss(real, fake, smooth=0.9):
    """Eq. (7), what D maximises, negated: −E[log D(I)] − E[log(1 − D(Î))] with labels `smooth` and 0, of the
    global and the local discriminator. real, fake: lists of logit maps."""
    return sum(F.binary_cross_entropy_with_logits(r.float(), torch.full_like(r, smooth).float())
               + F.binary_cross_entropy_with_logits(f.float(), torch.zeros_like(f).float())
               for r, f in zip(real, fake))


def adversarial_loss(fake, weights):
    """Eq. (8): λ_a,g ℓ_a,g + λ_a,l ℓ_a,l, with ℓ = −E[log D(Î)], which has the gradient that log(1 − D)
    lacks while D wins."""
    return sum(w * F.softplus(-f.float()).mean() for w, f in zip(weights, fake))


def sample_flow(flow, landmarks):
    """(Φ_x, Φ_y) at the landmarks: flow (B,2,H,W), landmarks (B,68,2) in pixels → (B,68,2)."""
    grid = normalise(landmarks, flow.shape[-1])[:, :, None].to(flow.dtype)
    return F.grid_sample(flow, grid, padding_mode="border", align_corners=False)[..., 0].transpose(1, 2)


def landmark_loss(flow, landmarks, guide_landmarks):
    """Eq. (9): Σ_i (Φ_x(x_i,y_i) − x_i^g)² + (Φ_y(x_i,y_i) − y_i^g)² in [-1,1]; mean over the batch.

    flow (B,2,H,W); landmarks of the target, guide_landmarks (B,68,2) in pixels.
    """
    gap = sample_flow(flow, landmarks) - normalise(guide_landmarks, flow.shape[-1])
    return gap.square().sum((1, 2)).mean()


def tv_loss(flow):
    """Eq. (10): ‖∇_x Φ_x‖² + ‖∇_y Φ_x‖² + ‖∇_x Φ_y‖² + ‖∇_y Φ_y‖², sums over pixels, mean over the batch.

    In these coordinates such a sum does not depend on the image's size: it is about 8 for the identity."""
    return (flow.diff(dim=3).square().sum((1, 2, 3)) + flow.diff(dim=2).square().sum((1, 2, 3))).mean()


def flow_loss(flow, landmarks, guide_landmarks, cfg):
    """Eq. (11): λ_lm ℓ_lm and λ_TV ℓ_TV, by name."""
    return {"landmark": cfg.weight_landmark * landmark_loss(flow, landmarks, guide_landmarks),
            "tv": cfg.weight_tv * tv_loss(flow)}


# -----------------------------------------------------------------------------------------------------------
# 5. Data
# -----------------------------------------------------------------------------------------------------------

def load_faces(cfg, args):
    """The faces of --data, or rendered ones."""
    if args.data is None:
        return common.RenderedFaces(cfg.size)
    return common.FaceFolder(args.data, cfg.size, args.landmarks, args.aligned)


def guide_score(landmarks):
    """How far a face is from frontal with open eyes: (N,68,2) → (N,), 0 is best, closed eyes add 1.

    Frontal: the nose tip is as far from one end of the jaw as from the other. Open: each eye is at least a
    seventh as high as it is wide.
    """
    near, far = ((landmarks[:, 30] - landmarks[:, jaw]).norm(dim=1) for jaw in (0, 16))
    turned = (near - far).abs() / (near + far)
    open_ = [(landmarks[:, [eye + 1, eye + 2]] - landmarks[:, [eye + 5, eye + 4]]).norm(dim=2).mean(1)
             / (landmarks[:, eye] - landmarks[:, eye + 3]).norm(dim=1) for eye in (36, 42)]
    return turned + (torch.minimum(*open_) < 1 / 7).float()


def choose_guides(faces, indices, stranger=False):
    """The guide of each picture, {i: j}: of the same person's other pictures the best by `guide_score`.

    Who has one picture only is left out. `stranger`: another person's guide, the next of those in `indices`,
    or, where these show one person, of all.
    """
    wanted, people = set(indices), {int(faces.identity[i]): None for i in indices}
    if stranger and len(people) == 1:
        people |= {int(who): None for who in faces.identity.unique()}
    groups = [torch.nonzero(faces.identity == who)[:, 0].tolist() for who in people]
    scores = [guide_score(torch.stack([faces.landmarks(i) for i in group])) for group in groups]
    ranked = [[group[k] for k in score.argsort(stable=True)] for group, score in zip(groups, scores)]
    ranked = [pictures for pictures in ranked if len(pictures) > 1]
    others = [(k + 1) % len(ranked) for k in range(len(ranked))] if stranger else range(len(ranked))
    return {i: next(j for j in ranked[other] if j != i)
            for pictures, other in zip(ranked, others) for i in sorted(pictures) if i in wanted}


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`: (degraded, target, guide, landmarks, guide_landmarks), a pure function
    of (seed, rank, step), so that a resumed run sees what an unbroken one would have seen."""

    def __init__(self, faces, indices, cfg, rank=0):
        self.faces, self.cfg, self.rank = faces, cfg, rank
        self.guides = choose_guides(faces, indices, cfg.stranger)
        self.indices = list(self.guides)
        if not self.indices:
            raise InputError("no person has two pictures; --data wants one folder per identity, each with "
                             "several pictures: one to restore, another to guide")

    def __len__(self):
        return self.cfg.steps

    def __getitem__(self, step):
        generator = common.seeded(self.cfg.seed, 1, self.rank, step)
        chosen = [self.indices[i] for i in torch.randint(len(self.indices), (self.cfg.batch,),
                                                         generator=generator).tolist()]
        stack = common.stack_faces if self.cfg.stranger else common.stack_person
        pairs = [stack(self.faces, [i, self.guides[i]]) for i in chosen]
        pairs = [common.augment(*pair, generator, self.cfg.crop) for pair in pairs]
        (target, guide), (landmarks, guide_landmarks) = (
            torch.stack(part).unbind(1) for part in zip(*pairs))
        target = target.contiguous()
        degraded = common.degrade(target, common.DEGRADATIONS[self.cfg.degradation], generator)
        return degraded, target, guide, landmarks, guide_landmarks


def load_encoder(cfg, args, faces, device):
    """ψ of Eq. (5), frozen: the recogniser of these faces, or VGG-Face."""
    encoder = common.load_vgg(args.vggface) if cfg.encoder == "vgg" else common.recogniser(faces)
    return encoder.to(device, memory_format=torch.channels_last)


def conv4(encoder, image):
    """ψ_l of Eq. (5): the encoder's maps at an eighth of the size, in VGG those of its fourth block."""
    return encoder.features(image)[2]


# -----------------------------------------------------------------------------------------------------------
# 6. Training
# -----------------------------------------------------------------------------------------------------------

def train(cfg, args):
    """Train on args.data, write the run into args.out; see Config for every number."""
    begin, device, out = time.monotonic(), common.choose_device(args.device), Path(args.out)
    with common.process_group() as (rank, world):
        if rank == 0:
            common.write_json(out / "config.json", asdict(cfg))
        faces = load_faces(cfg, args)
        train_indices, validation, test = common.split_identities(faces)
        data = Batches(faces, train_indices, cfg, rank)
        if rank == 0:
            encoder = load_encoder(cfg, args, faces, device)          # one process trains it, the others
        if torch.distributed.is_initialized():                        # find it in the cache
            torch.distributed.barrier()
        encoder = encoder if rank == 0 else load_encoder(cfg, args, faces, device)
        torch.manual_seed(cfg.seed)
        net = GFRNet(cfg).to(device, memory_format=torch.channels_last)
        discriminators = Discriminators(cfg.discriminator_width).to(
            device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), cfg.learning_rate, cfg.betas, fused=True)
        optimizer_d = torch.optim.Adam(discriminators.parameters(), cfg.learning_rate, cfg.betas)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=cfg.patience, min_lr=cfg.learning_rate / 100, eps=0)
        parts = {"net": net, "discriminators": discriminators, "optimizer": optimizer,
                 "optimizer_d": optimizer_d, "schedule": schedule}
        start, rows = 0, []
        if args.resume:
            state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
            start, rows = state["step"], state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        forward, forward_d = net, discriminators
        if world > 1:
            forward = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False,
                                                          find_unused_parameters=cfg.warp_steps > 0)
            forward_d = nn.parallel.DistributedDataParallel(discriminators, broadcast_buffers=False)
        batches = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(start, cfg.steps),
                                              num_workers=args.workers, pin_memory=device.type == "cuda")
        align = cfg.warped and cfg.weight_landmark > 0
        progress = common.Progress(f"{SCRIPT} {cfg.variant}", cfg.steps, start, quiet=rank > 0)
        for step, batch in enumerate(batches, start + 1):
            degraded, target, guide = (x.to(device, non_blocking=True, memory_format=torch.channels_last)
                                       for x in batch[:3])
            landmarks, guide_landmarks = (x.to(device, non_blocking=True) for x in batch[3:])
            alone = align and step <= cfg.warp_steps                            # WarpNet's pre-training
            with common.autocast(device):                                       # generator
                losses = {}
                if alone:
                    flow = forward(degraded, guide, flow_only=True)
                else:
                    restored, _, flow = forward(degraded, guide)
                    boxes = landmark_box(landmarks, cfg.size)
                    discriminators.requires_grad_(False)
                    with torch.no_grad():
                        target_features = conv4(encoder, target)
                    losses = {"pixel": cfg.weight_pixel * pixel_loss(restored, target),
                              "perceptual": cfg.weight_perceptual * perceptual_loss(
                                  conv4(encoder, restored), target_features),
                              "adversarial": adversarial_loss(
                                  discriminators(degraded, guide, restored, boxes), cfg.weight_adversarial)}
                if align:
                    losses |= flow_loss(flow, landmarks, guide_landmarks, cfg)
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()                                     # Eq. (12)
            group = optimizer.param_groups[0]
            left = min((cfg.steps - step + 1) / max(cfg.cooldown * cfg.steps, 1), 1)
            rate, group["lr"] = group["lr"], group["lr"] * left
            optimizer.step()
            group["lr"] = rate
            if not alone:
                discriminators.requires_grad_(True)
                with common.autocast(device):                                   # discriminators
                    losses["discriminator"] = discriminator_loss(
                        *(forward_d(degraded, guide, image, boxes) for image in (target, restored.detach())),
                        cfg.smooth)
                optimizer_d.zero_grad(set_to_none=True)
                losses["discriminator"].backward()
                optimizer_d.step()
            last = step == cfg.steps or step % cfg.validate_every == 0
            if last or step % 10 == 0:                                # the only place that waits for the GPU
                values = {name: loss.item() for name, loss in losses.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    raise InputError(f"step {step}: the {', '.join(bad)} loss is not finite; the last good "
                                     f"state is in {args.checkpoint}; try a lower learning rate")
                rows.append({"step": step, **values})
                progress.update(step, "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if last:
                reconstruction, quality, gap = validate(net, encoder, faces, common.spread(validation, 32),
                                                        cfg, device)
                if not math.isfinite(reconstruction):
                    raise InputError(f"step {step}: the validation loss is not finite; the last good state "
                                     f"is in {args.checkpoint}")
                if not alone:
                    schedule.step(reconstruction)
                optimizer_d.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                rows[-1] |= {"validation": reconstruction, "validation_psnr": quality,
                             "landmark_error": gap, "rate": rate * left}
                if rank == 0:
                    progress.line(f"step {step}: validation reconstruction {reconstruction:.3f}, "
                                  f"PSNR {quality:.2f} dB"
                                  + (f", landmarks {gap:.2f} pixels off" if cfg.warped else ""))
                    common.save_checkpoint(args.checkpoint, {
                        "script": SCRIPT, "config": asdict(cfg), "step": step, "rows": rows,
                        **{name: part.state_dict() for name, part in parts.items()}})
                    common.write_log(out, rows)
        if rank == 0:
            progress.close()
            finish(net, faces, test, cfg, args, device, time.monotonic() - begin)


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg, device):
    """Reconstruction loss (Eq. 6), PSNR in dB and landmark error in pixels on held-out faces, always
    degraded alike."""
    totals = torch.zeros(3)
    for batch in restored_batches(net, faces, indices, cfg, device, None):
        with common.autocast(device):
            a, b = (conv4(encoder, batch[name].to(device)) for name in ("restored", "target"))
        loss = (cfg.weight_pixel * pixel_loss(batch["restored"], batch["target"])
                + cfg.weight_perceptual * perceptual_loss(a, b).cpu()) * len(a)
        gap = landmark_error(batch["flow"], batch["landmarks"], batch["guide_landmarks"]).sum()
        totals += torch.stack([loss, common.psnr(batch["restored"], batch["target"]).sum(), gap])
    return (totals / len(choose_guides(faces, indices))).tolist()


def finish(net, faces, test, cfg, args, device, seconds):
    """Measure on held-out people; write result.json, samples.png (at ×4) and flow.png; print the table and
    what was written."""
    out, net = Path(args.out), net.eval()
    result = {"script": SCRIPT, "variant": cfg.variant, "preset": cfg.preset,
              "data": str(args.data or "rendered"), "size": cfg.size,
              "steps": cfg.steps, "seconds": round(seconds, 1),
              "test": evaluate(net, faces, common.spread(test, 128), cfg, device, args.precision)}
    common.write_json(out / "result.json", result)
    batch = next(restored_batches(net, faces, common.spread(test, 6), cfg, device, 4,
                                  precision=args.precision))
    shown = [name for name in ("degraded", "guide", "warped", "restored", "target")
             if (name != "warped" or cfg.warped) and (name != "guide" or cfg.guided)]
    common.write_image(out / "samples.png", common.comparison_grid({name: batch[name] for name in shown}))
    if cfg.warped:
        draw_flow(out / "flow.png", batch)
    common.print_table(result["test"])
    for task, row in result["test"].items():
        if cfg.warped:
            print(f"{task}: landmarks of the warped guide {row['landmark_error']['warped']:.2f} pixels off, "
                  f"of the guide as it is {row['landmark_error']['guide']:.2f}")
    written = [name for name in ("checkpoint.pt", "config.json", "log.csv", "curves.png", "samples.png",
                                 "flow.png", "result.json") if (out / name).is_file()]
    print(f"\n{out}: {', '.join(written)}")


def draw_flow(path, batch, faces=4):
    """flow.png, a row a face: the guide with the curves that become straight lines, the warped guide with
    that grid and the target's landmarks, and how far every pixel is moved."""
    size, count = batch["guide"].shape[-1], min(faces, len(batch["guide"]))
    figure = matplotlib.figure.Figure(figsize=(10, 3.1 * count), layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False)
    lines = torch.arange(size // 16, size, size // 8)
    for row, guide, warped, flow, marks in zip(axes, batch["guide"], batch["warped"], batch["flow"],
                                               batch["landmarks"]):
        x, y = ((flow + 1) * size - 1) / 2
        straight = torch.arange(size)
        for axis, image in zip(row, (guide, warped)):
            axis.imshow(common.to_uint8(image).permute(1, 2, 0).numpy())
        for k in lines:
            row[0].plot(x[k], y[k], "w-", x[:, k], y[:, k], "w-", linewidth=0.7)
            row[1].plot(straight, straight * 0 + k, "w-", straight * 0 + k, straight, "w-", linewidth=0.7)
        row[1].plot(*marks.T, "c.", markersize=3)
        move = torch.stack([x, y]) - ((identity_flow(size)[0] + 1) * size - 1) / 2
        picture = row[2].imshow(move.norm(dim=0).numpy(), cmap="viridis")
        figure.colorbar(picture, ax=row[2], label="pixels")
        for axis in row:
            axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])
    for axis, title in zip(axes[0], ("guide, where the grid is read", "warped guide, target landmarks",
                                     "length of the flow")):
        axis.set_title(title)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)


# -----------------------------------------------------------------------------------------------------------
# 7. Restoration
# -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def restore(net, degraded, guides, batch=8, precision="auto"):
    """Restore faces: degraded, guides (N,3,size,size) in [-1,1] → restored, the same, warped,
    flow (N,2,size,size), the last two None where the network has none; all on the CPU. Out of GPU memory,
    the batch is halved, with a line that says so."""
    device, results, start = next(net.parameters()).device, [], 0
    training = net.training
    net.eval()
    while start < len(degraded):
        part = slice(start, start + batch)
        try:
            with common.autocast(device, precision):
                images, guide = (x[part].to(device, memory_format=torch.channels_last)
                                 for x in (degraded, guides))
                restored, warped, flow = net(images, guide)
                results.append([x if x is None else x.float().clamp(-1, 1).cpu()
                                for x in (restored, warped, flow)])
            start += batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise InputError("not enough GPU memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            print(f"out of GPU memory: going on with {batch} faces at a time", file=sys.stderr)
    net.train(training)
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*results)]


def restored_batches(net, faces, indices, cfg, device, scale, batch=16, precision="auto"):
    """Held-out faces in batches, by name: degraded, guide, warped, flow, restored, target, landmarks,
    guide_landmarks. Degraded by (seed, scale, place) alone. Without WarpNet the flow is the identity."""
    guides = choose_guides(faces, indices, cfg.stranger)
    if not guides:
        raise InputError("no held-out person has two pictures, one to restore and one to guide; "
                         "--data wants one folder per identity, each with several pictures")
    chosen, stack = list(guides), common.stack_faces if cfg.stranger else common.stack_person
    for start in range(0, len(chosen), batch):
        part = chosen[start:start + batch]
        pairs = [stack(faces, [i, guides[i]]) for i in part]
        (target, guide), (landmarks, guide_landmarks) = (torch.stack(x).unbind(1) for x in zip(*pairs))
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        degraded = common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator, scale)
        restored, warped, flow = restore(net, degraded, guide, batch, precision)
        yield {"degraded": degraded, "guide": guide, "warped": warped, "restored": restored,
               "target": target,
               "flow": identity_flow(cfg.size).expand(len(part), -1, -1, -1) if flow is None else flow,
               "landmarks": landmarks, "guide_landmarks": guide_landmarks}


def landmark_error(flow, landmarks, guide_landmarks):
    """How far, in pixels, the flow at the target's landmarks lies from the guide's: (B,), means over 68."""
    gap = sample_flow(flow, landmarks) - normalise(guide_landmarks, flow.shape[-1])
    return gap.norm(dim=2).mean(1) * flow.shape[-1] / 2


def evaluate(net, faces, indices, cfg, device, precision="auto"):
    """The paper's ×4, ×8 on held-out faces → "test" of result.json: PSNR dB, SSIM, identity in degrees; with
    a WarpNet also the landmark error in pixels, of the warped guide and of the guide as it is."""
    judge = common.recogniser(faces, "metric")
    table = {}
    for scale in (4, 8):
        columns, gaps = {"input": [], "restored": []}, []
        for batch in restored_batches(net, faces, indices, cfg, device, scale, precision=precision):
            target = batch["target"]
            for name, image in (("input", batch["degraded"]), ("restored", batch["restored"])):
                columns[name].append(torch.stack([common.psnr(image, target), common.ssim(image, target),
                                                  common.identity_distance(judge, image, target)]))
            flows = batch["flow"], identity_flow(cfg.size).expand_as(batch["flow"])
            gaps.append(torch.stack([landmark_error(flow, batch["landmarks"], batch["guide_landmarks"])
                                     for flow in flows]))
        values = {name: torch.cat(column, 1) for name, column in columns.items()}
        table[f"x{scale}"] = {"faces": values["input"].shape[1], **{
            name: dict(zip(("psnr", "ssim", "identity"), value.mean(1).tolist()))
            for name, value in values.items()},
            "paired_psnr_gain": common.paired_gain(values["restored"][0], values["input"][0], cfg.seed)}
        if cfg.warped:
            table[f"x{scale}"]["landmark_error"] = dict(zip(("warped", "guide"),
                                                            torch.cat(gaps, 1).mean(1).tolist()))
    return table


def benchmark(net, cfg, args, device):
    """Time restore() on --batch pairs of noise: what a picture shows does not change the speed."""
    count = args.batch or 1
    degraded, guides = torch.rand(2, count, 3, cfg.size, cfg.size,
                                  generator=common.seeded(args.seed or 0, 7)) * 2 - 1
    return common.benchmark(lambda: restore(net, degraded, guides, count, args.precision), count, device,
                            args.precision)


def load_network(args, device):
    """The network of --checkpoint, and its Config."""
    state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()})
    if args.preset and args.preset != cfg.preset:
        raise InputError(f"{args.checkpoint}: a checkpoint of --preset {cfg.preset}, not {args.preset}")
    net = GFRNet(cfg).to(device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    return net.eval(), cfg


# -----------------------------------------------------------------------------------------------------------
# 8. Command line
# -----------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)

    def refuse(message):
        raise InputError(f"{message}; --help lists the options")

    def positive(text):
        if not text.isdecimal() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
        return int(text)

    def natural(text):
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
        return int(text)

    parser.error = refuse
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--train", action="store_true", help="train, then measure on held-out identities")
    action.add_argument("--evaluate", action="store_true",
                        help="measure a trained network on held-out identities")
    action.add_argument("--restore", metavar="PATH", help="restore a picture, or every picture of a folder")
    action.add_argument("--benchmark", action="store_true", help="time restoration: images/s, peak memory, "
                                                                 "share of a matrix product's speed")
    parser.add_argument("--reference", metavar="PATH",
                        help="for --restore: a sharp picture of the same person, frontal, eyes open; of a "
                             "folder the most frontal one is taken")
    parser.add_argument("--data", metavar="DIR",
                        help="a folder of one folder per identity (default: rendered faces)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="tiny (default): minutes on a CPU; paper: the paper's sizes and schedule")
    parser.add_argument("--variant", choices=VARIANTS, help="an ablation row of the paper's Table 1")
    parser.add_argument("--resume", action="store_true",
                        help="go on exactly where the last checkpoint stopped")
    parser.add_argument("--size", type=positive, help="pixels, a power of two")
    parser.add_argument("--steps", type=positive, help="training steps, WarpNet's own included "
                                                          "(which variants without them leave out)")
    parser.add_argument("--batch", type=positive, help="pairs a step and process")
    parser.add_argument("--seed", type=natural, help="fixes data, initialisation and order (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of restoration: auto is bfloat16 where the processor gains and the result "
                             "stays the same to the eye")
    parser.add_argument("--workers", type=natural, default=0,
                        help="processes that read and degrade images (default 0)")
    parser.add_argument("--out", metavar="DIR", help=f"the run's folder (default runs/{SCRIPT}), or where "
                                                     "restored pictures go (restored)")
    parser.add_argument("--checkpoint", metavar="FILE", help="default: the run's own")
    parser.add_argument("--weights", metavar="FILE",
                        help="the authors released none that PyTorch reads: use --checkpoint")
    parser.add_argument("--vggface", metavar="FILE", help="VGG-Face weights, for the loss of --preset paper")
    parser.add_argument("--landmarks", metavar="DIR",
                        help="a parallel folder of landmark files photo.jpg.txt")
    parser.add_argument("--aligned", action="store_true",
                        help="pictures are FFHQ-aligned crops; no landmarks needed")
    parser.add_argument("--overwrite", action="store_true", help="restore pictures again that have a result")
    parser.add_argument("--check", action="store_true",
                        help="also write the input with its landmarks and component boxes")
    args = parser.parse_args(argv)
    run = Path("runs") / (SCRIPT if args.variant in (None, "full") else f"{SCRIPT}-{args.variant}")
    if args.restore is None:
        run = Path(args.out or run)
    args.out = args.out or ("restored" if args.restore is not None else run)
    if args.weights is not None:
        raise InputError(f"--weights {args.weights}: GFRNet's authors released none that PyTorch reads; "
                         "train it (--train), and name the result with --checkpoint")
    fresh = args.benchmark and args.checkpoint is None
    if args.train and args.precision != "auto":
        raise InputError("--precision and --train do not go together: it is of restoration; training takes "
                         "bfloat16 where the processor gains")
    if args.benchmark and args.size and not fresh:
        raise InputError("--size and --checkpoint do not go together in --benchmark: a trained network has "
                         "its size")
    args.checkpoint = args.checkpoint or run / "checkpoint.pt"
    device = common.choose_device(args.device)

    if args.train or fresh:
        chosen = {name: getattr(args, name) for name in ("size", "steps", "batch", "seed")
                  if getattr(args, name) is not None}
        if args.train and args.resume:
            _, cfg = load_network(args, torch.device("cpu"))
            if (args.variant or cfg.variant) != cfg.variant:
                raise InputError(f"{args.checkpoint}: a checkpoint of --variant {cfg.variant}, "
                                 f"not {args.variant}")
            if fixed := [name for name, value in chosen.items()
                         if name != "steps" and value != getattr(cfg, name)]:
                raise InputError(f"--resume goes on with the run as it began; --{fixed[0]} cannot change")
            cfg = replace(cfg, steps=chosen.get("steps", cfg.steps))
        else:
            preset, variant = args.preset or "tiny", args.variant or "full"
            cfg = replace(PRESETS[preset], variant=variant, **VARIANTS[variant], **chosen)
            if "steps" in chosen:                                  # as large a part of them as before
                cfg = replace(cfg, warp_steps=cfg.warp_steps * cfg.steps // PRESETS[preset].steps)
            if not (cfg.warped and cfg.weight_landmark):           # as many end-to-end steps as `full`
                cfg = replace(cfg, steps=cfg.steps - cfg.warp_steps, warp_steps=0)
        if cfg.size < 64 or cfg.size & (cfg.size - 1):
            raise InputError(f"--size {cfg.size}: must be a power of two, at least 64")
    if args.train:
        train(cfg, args)
        return 0
    if fresh:
        torch.manual_seed(cfg.seed)
        net = GFRNet(cfg)
    else:
        net, cfg = load_network(args, device)
    net = common.for_inference(net, device, args.precision)
    if args.benchmark:
        benchmark(net, cfg, args, device)
        return 0
    if args.evaluate:
        faces = load_faces(cfg, args)
        test = common.split_identities(faces)[2]
        finish(net, faces, test, cfg, args, device, 0.0)
        return 0
    options = {"aligned": args.aligned, "landmarks": args.landmarks, "device": device}
    guide = torch.zeros(1, 3, cfg.size, cfg.size)
    if cfg.guided:
        if args.reference is None:
            raise InputError("--restore wants --reference: a sharp picture of the same person")
        images, landmarks, files = common.read_references(args.reference, cfg.size, **options)
        best = int(guide_score(landmarks).argmin())
        guide = images[best:best + 1]
        print(f"guide: {files[best]}")
    failures = common.restore_files(
        args.restore, args.out, cfg.size,
        lambda crops, landmarks, file: restore(net, crops, guide.expand_as(crops),
                                               precision=args.precision)[0],
        overwrite=args.overwrite, check=args.check, **options)
    return 1 if failures else 0


if __name__ == "__main__":
    common.run_script(main)
