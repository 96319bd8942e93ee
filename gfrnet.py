"""GFRNet: blind face restoration guided by one sharp picture of the same person.

Li, Liu, Ye, Zuo, Lin, Yang: "Learning Warped Guidance for Blind Face Restoration",
ECCV 2018.

A sharp picture of the same person shows the details that a degraded one has lost, but in
another pose and with another expression. So a first network (WarpNet) predicts a flow
field that bends the guide into the pose of the degraded face. A second one (RecNet, a
U-Net) restores the face from both. Nobody knows the true flow: WarpNet learns from facial
landmarks, which must land on each other, and from smoothness in between.

Equation → name
    (1) WarpNet           (5) perceptual_loss         (9) landmark_loss
    (2) warp              (6) reconstruction_losses  (10) tv_loss
    (3) RecNet            (7) discriminator_loss     (11) flow_loss
    (4) common.degrade    (8) adversarial_loss       (12) the sum in train

    python gfrnet.py --train                    # rendered faces, minutes on two CPU cores
    python gfrnet.py --evaluate                 # on people it has never seen
    python gfrnet.py --restore photo.jpg --reference sharp.jpg --aligned   # your pictures

Open in the paper, chosen here: widths and activations are those of pix2pix, which the
paper follows; the squares of Eq. (9) and (10) are sums over points and pixels, that of
Eq. (6) a mean; the generator's side of Eq. (7) is the non-saturating −log D; WarpNet's
last layer starts at 0, so that the flow starts as the identity, all others as He's
(pix2pix's normal of 0.02 in the discriminators); the landmark box is resized to half the
image for the local discriminator. All pictures of a person are used; the authors picked
at most five good ones. Ours(R) of Table 1 is guided by a picture of somebody else; whether
it was also trained so the paper does not say. The variant `random-guide` is trained and
measured so. What the other guided variants make of a stranger's guide stands in the column
`stranger`.
TINY differs from the paper in size, and in what Config says beside it.
"""
import math
from dataclasses import dataclass, replace

import matplotlib.figure
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

import common
from common import Claim, InputError

SCRIPT = "gfrnet"


# 2. Config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                  # pixels, height = width, a power of two
    people: int = 288                # rendered ones, without --data
    seed: int = 0

    guided: bool = True              # RecNet sees the guide
    warped: bool = True              # bent by WarpNet
    stranger: bool = False           # the guide is somebody else's
    width: int = 16                  # channels of the first layer; inside up to 8 times
    rec_width: int = 1               # RecNet's factor on it
    residual: bool = True            # Î is added to I^d: nothing learns to copy
    discriminator_width: int = 8

    encoder: str = "recogniser"      # ψ; "vgg": VGG-Face, or VGG-19 without a file
    weight_pixel: float = 100.0      # λ_r,0
    weight_perceptual: float = 0.3   # λ_r,l; 0.001 in the paper, with another encoder
    weight_adversarial: tuple = (0.03, 0.015)    # λ_a,g, λ_a,l; a 33rd of the paper's
    weight_landmark: float = 10.0    # λ_lm
    weight_tv: float = 0.05          # λ_TV; 1 in the paper
    smooth: float = 0.9              # label of a true picture for the discriminators

    learning_rate: float = 2e-3      # 10 times the paper's: the network is small
    betas: tuple = (0.5, 0.999)      # β1, β2 of Adam
    cooldown: float = 0.3            # last part of the steps: the rate falls to 0
    patience: int | None = None      # so many validations may be no better: after one
    plateau: float = 0.1             # more the rate is multiplied by this
    warp_share: float = 0.625        # first part of the steps: WarpNet alone
    steps: int = 1600                # in all; without a flow loss WarpNet's own are skipped
    batch: int = 8                   # pairs a process and step
    shift: float = 0.02              # largest random change of place, a part of the size
    validate_every: int = 100        # steps; also when a checkpoint is written
    validated: int = 32              # pairs
    tested: int | None = 128         # held-out pairs measured in the end, at most
    degradation: str = "gfrnet"      # Eq. (4)

    def rate(self, step):
        """The learning rate of a step from 1 on: constant, then falling to 0."""
        left = (self.steps - step + 1) / max(self.cooldown * self.steps, 1)
        return self.learning_rate * min(left, 1)

    @property
    def learns_flow(self):
        """Whether WarpNet learns from landmarks."""
        return self.warped and self.weight_landmark > 0


TINY = Config()
HOUR = replace(TINY, preset="hour", people=1500, steps=30_000, validate_every=1_000)
EPOCH = 20_273                       # pairs in the paper's training set
PAPER = replace(
    TINY, preset="paper", size=256, width=64, residual=False, discriminator_width=64,
    encoder="vgg", weight_perceptual=0.001, weight_adversarial=(1.0, 0.5), weight_tv=1.0,
    learning_rate=2e-4, cooldown=0, patience=3, warp_share=5 / 105, steps=105 * EPOCH,
    batch=1, validate_every=EPOCH, validated=200, tested=None)
PRESETS = {"tiny": TINY, "hour": HOUR, "paper": PAPER}

VARIANTS = {                         # Table 1: Full, -F, -W, -W2, -WG, -WG2, R
    "full": {},
    "no-flow-loss": {"weight_landmark": 0.0, "weight_tv": 0.0},
    "no-warp": {"warped": False},
    "no-warp-2x": {"warped": False, "rec_width": 2},
    "no-guide": {"guided": False, "warped": False},
    "no-guide-2x": {"guided": False, "warped": False, "rec_width": 2},
    "random-guide": {"stranger": True},
}
COLUMNS = ("x4_psnr", "x4_ssim", "x8_psnr", "x8_ssim")
PAPER_FIGURES = {name: dict(zip(COLUMNS, row)) for name, row in {       # there, VggFace2
    "full": (28.55, 0.947, 24.10, 0.898),
    "no-flow-loss": (26.61, 0.927, 23.17, 0.863),
    "no-warp": (26.03, 0.923, 23.29, 0.843),
    "no-warp-2x": (27.25, 0.933, 23.24, 0.864),
    "no-guide": (25.97, 0.915, 22.91, 0.838),
    "no-guide-2x": (27.20, 0.932, 23.22, 0.863),
    "random-guide": (27.90, 0.943, 24.05, 0.890),
}.items()}
CLAIMS = [                           # of Table 1; against rows without a guide: identity
    Claim("full", "random-guide"), Claim("full", "no-flow-loss"), Claim("full", "no-warp"),
    Claim("full", "no-warp-2x"), Claim("full", "no-guide", "identity"),
    Claim("full", "no-guide-2x", "identity")]


# 3. Network ---------------------------------------------------------------------------

def normalise(points, size):
    """Pixels (…,2) of a size×size image → [-1,1], where ±1 are the image's edges."""
    return (2 * points + 1) / size - 1


def identity_flow(size, device="cpu"):
    """The flow that changes nothing: every pixel's own coordinates, (1,2,size,size)."""
    line = normalise(torch.arange(size, device=device), size)
    x, y = torch.meshgrid(line, line, indexing="xy")
    return torch.stack([x, y])[None]


def warp(image, flow):
    """Eq. (2): I^w_ij = Σ I^g_hw max(0, 1 − |Φ^y_ij − h|) max(0, 1 − |Φ^x_ij − w|).

    The sum is over the four neighbours (h,w) of Φ_ij; those outside the image count as 0.
    image (B,C,H,W), flow (B,2,H,W) in [-1,1] → (B,C,H,W).
    """
    grid = flow.float().permute(0, 2, 3, 1)
    return F.grid_sample(image.float(), grid, padding_mode="zeros", align_corners=False)


class EncoderDecoder(nn.Module):
    """Figure 3: log2(size) convolutions 4×4 of stride 2 down to 1×1, as many up again.

    Convolution, BatchNorm, LeakyReLU in the encoder, ReLU in the decoder. There is no
    BatchNorm in the encoder's first and the decoder's last layer, nor at 1×1, where there
    is nothing to normalise. With `skips`, layer i is concatenated to layer L−i as its
    LeakyReLU leaves it (pix2pix rectifies it again). At batch 1, the paper's, BatchNorm
    takes each image's own statistics, when restoring as well: it is InstanceNorm. The
    decoder starts as bilinear doublings and random 1×1 convolutions, (B,C,h,w) →
    (B,C',2h,2w): random kernels of stride 2 leave a lattice.
    """

    def __init__(self, channels_in, channels_out, width, cfg, skips):
        super().__init__()
        self.skips = skips
        levels = int(math.log2(cfg.size))
        widths = [width * min(2**level, 8) for level in range(levels)]

        def norm(channels):
            if cfg.batch == 1:
                return nn.InstanceNorm2d(channels, affine=True)
            return nn.BatchNorm2d(channels)

        self.down = nn.ModuleList()
        before = channels_in
        for level, after in enumerate(widths):
            inner = 0 < level < levels - 1
            convolution = nn.Conv2d(before, after, 4, 2, 1, bias=not inner)
            statistics = norm(after) if inner else nn.Identity()
            self.down.append(nn.Sequential(convolution, statistics, nn.LeakyReLU(0.2)))
            before = after
        self.up = nn.ModuleList()
        for after in reversed(widths[:-1]):
            convolution = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False)
            self.up.append(nn.Sequential(convolution, norm(after), nn.ReLU()))
            before = 2 * after if skips else after
        self.up.append(nn.ConvTranspose2d(before, channels_out, 4, 2, 1))
        bilinear = torch.tensor([0.25, 0.75, 0.75, 0.25])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, 0.2, "fan_in")
            elif isinstance(module, nn.ConvTranspose2d):      # its weight: (in,out,4,4)
                mix = module.weight.new_empty(*module.weight.shape[:2], 1, 1)
                mix.normal_(0, math.sqrt(2 / len(mix)))
                module.weight.data = mix * bilinear[:, None] * bilinear

    def forward(self, x):
        maps = []
        for layer in self.down:
            x = layer(x)
            maps.append(x)
        x = self.up[0](maps.pop())
        for layer in self.up[1:]:
            skip = maps.pop()
            x = layer(torch.cat([x, skip], 1) if self.skips else x)
        return x.float()


class WarpNet(nn.Module):
    """Eq. (1): Φ = F_w(I^d, I^g). degraded, guide (B,3,H,W) → flow (B,2,H,W)."""

    def __init__(self, cfg):
        super().__init__()
        self.body = EncoderDecoder(6, 2, cfg.width, cfg, skips=False)
        nn.init.zeros_(self.body.up[-1].weight)
        nn.init.zeros_(self.body.up[-1].bias)

    def forward(self, degraded, guide):
        change = self.body(torch.cat([degraded, guide], 1))
        start = identity_flow(degraded.shape[-1], degraded.device)
        return torch.tanh(torch.atanh(start) + change)


class RecNet(nn.Module):
    """Eq. (3): Î = F_r(I^d, I^w), a U-Net. degraded, warped (B,3,H,W) → restored."""

    def __init__(self, cfg):
        super().__init__()
        self.residual = cfg.residual
        seen = 6 if cfg.guided else 3
        self.body = EncoderDecoder(seen, 3, cfg.width * cfg.rec_width, cfg, skips=True)
        if cfg.residual:
            nn.init.zeros_(self.body.up[-1].weight)

    def forward(self, degraded, warped):
        seen = degraded if warped is None else torch.cat([degraded, warped], 1)
        image = self.body(seen)
        return degraded + image if self.residual else torch.tanh(image)


class GFRNet(nn.Module):
    """Both networks: degraded, guide (B,3,H,W) in [-1,1] → restored, warped, flow.

    Without a WarpNet warped is the guide and flow None; without a guide both are None.
    With `flow_only` there is only the flow.
    """

    def __init__(self, cfg):
        super().__init__()
        self.guided = cfg.guided
        self.warp_net = WarpNet(cfg) if cfg.warped else None
        self.rec_net = RecNet(cfg)

    def forward(self, degraded, guide, flow_only=False):
        if not self.guided:
            return self.rec_net(degraded, None), None, None
        if self.warp_net is None:
            return self.rec_net(degraded, guide), guide, None
        flow = self.warp_net(degraded, guide)
        if flow_only:
            return flow
        warped = warp(guide, flow)
        return self.rec_net(degraded, warped), warped, flow


class Discriminator(nn.Module):
    """The conditional 70×70 patch discriminator of pix2pix: images → logits (B,1,h,w)."""

    def __init__(self, width):
        super().__init__()
        layers = [nn.Conv2d(9, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers.append(nn.Conv2d(before, 2 * before, 4, stride, 1, bias=False))
            layers.append(nn.BatchNorm2d(2 * before))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)

    def forward(self, degraded, guide, image):
        return self.layers(torch.cat([degraded, guide, image], 1))


def landmark_box(landmarks, size):
    """The smallest box around all landmarks: (B,68,2) → (B,4) x1,y1,x2,y2 as edges,
    inside the image and at least size/16 wide and high."""
    least = size / 16
    low = landmarks.amin(1).clamp(0, size - least)
    high = (landmarks.amax(1) + 1).clamp(max=size)
    return torch.cat([low, torch.maximum(high, low + least)], 1)


def crop_local(image, boxes, side):
    """The boxes (B,4) of image (B,C,H,W), resized to side×side by RoIAlign."""
    boxes = list(boxes[:, None])                              # one (1,4) an image
    image = image.float().contiguous()
    return roi_align(image, boxes, side, sampling_ratio=2, aligned=True)


class Discriminators(nn.Module):
    """The global one, and the local one of the box around all landmarks → two maps."""

    def __init__(self, width):
        super().__init__()
        self.whole = Discriminator(width)
        self.local = Discriminator(width)

    def forward(self, degraded, guide, image, boxes):
        stack = torch.cat([degraded, guide, image], 1)
        parts = crop_local(stack, boxes, image.shape[-1] // 2).chunk(3, 1)
        return [self.whole(degraded, guide, image), self.local(*parts)]


# 4. Losses ----------------------------------------------------------------------------

def pixel_loss(restored, target):
    """Eq. (6), first term: ‖I − Î‖², as a mean over pixels."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (5): ‖ψ_l(Î) − ψ_l(I)‖² / (C_l H_l W_l) of maps (B,C,h,w), the batch's mean."""
    return F.mse_loss(features.float(), target_features.float())


def conv4(encoder, image):
    """ψ_l of Eq. (5): the encoder's maps at an eighth of the size, VGG's fourth block."""
    return encoder.features(image)[2]


def reconstruction_losses(restored, target, encoder, cfg):
    """Eq. (6): λ_r,0 ℓ_r,0 and λ_r,l ℓ_p, by name."""
    perceptual = perceptual_loss(conv4(encoder, restored), conv4(encoder, target))
    return {"pixel": cfg.weight_pixel * pixel_loss(restored, target),
            "perceptual": cfg.weight_perceptual * perceptual}


def discriminator_loss(real, fake, smooth=0.9):
    """Eq. (7), what D maximises, negated: −E[log D(I)] − E[log(1 − D(Î))].

    The labels are `smooth` and 0. real, fake: the logit maps, global and local.
    """
    def cross_entropy(logits, label):
        label = torch.full_like(logits, label, dtype=torch.float32)
        return F.binary_cross_entropy_with_logits(logits.float(), label)

    return (sum(cross_entropy(logits, smooth) for logits in real)
            + sum(cross_entropy(logits, 0.0) for logits in fake))


def adversarial_loss(fake, weights):
    """Eq. (8): λ_a,g ℓ_a,g + λ_a,l ℓ_a,l, with ℓ = −E[log D(Î)]: while D wins, log(1 − D)
    has next to no gradient."""
    return sum(w * F.softplus(-f.float()).mean() for w, f in zip(weights, fake))


def sample_flow(flow, landmarks):
    """(Φ_x, Φ_y) at landmarks (B,68,2) in pixels: flow (B,2,H,W) → (B,68,2)."""
    grid = normalise(landmarks, flow.shape[-1])[:, :, None].to(flow.dtype)
    values = F.grid_sample(flow, grid, padding_mode="border", align_corners=False)
    return values[..., 0].transpose(1, 2)


def landmark_loss(flow, landmarks, guide_landmarks):
    """Eq. (9): Σ_i (Φ_x(x_i,y_i) − x_i^g)² + (Φ_y(x_i,y_i) − y_i^g)², the batch's mean.

    flow (B,2,H,W) in [-1,1]; landmarks of the target, guide_landmarks (B,68,2) in pixels.
    """
    gap = sample_flow(flow, landmarks) - normalise(guide_landmarks, flow.shape[-1])
    return gap.square().sum((1, 2)).mean()


def tv_loss(flow):
    """Eq. (10): ‖∇_x Φ_x‖² + ‖∇_y Φ_x‖² + ‖∇_x Φ_y‖² + ‖∇_y Φ_y‖², the batch's mean.

    Each is a sum over pixels. In [-1,1] it does not depend on the image's size: it is
    about 8 for the identity.
    """
    across = flow.diff(dim=3).square().sum((1, 2, 3))
    down = flow.diff(dim=2).square().sum((1, 2, 3))
    return (across + down).mean()


def flow_loss(flow, landmarks, guide_landmarks, cfg):
    """Eq. (11): λ_lm ℓ_lm and λ_TV ℓ_TV, by name."""
    return {
        "landmark": cfg.weight_landmark * landmark_loss(flow, landmarks, guide_landmarks),
        "tv": cfg.weight_tv * tv_loss(flow)}


# 5. Data ------------------------------------------------------------------------------

def guide_score(landmarks):
    """How far a face is from frontal with open eyes: (N,68,2) → (N,), 0 is best.

    Frontal: the nose's tip is as far from one end of the jaw as from the other. Open:
    each eye is at least a seventh as high as it is wide; a closed one adds 1.
    """
    left = (landmarks[:, 30] - landmarks[:, 0]).norm(dim=1)
    right = (landmarks[:, 30] - landmarks[:, 16]).norm(dim=1)
    turned = (left - right).abs() / (left + right)
    eyes = landmarks[:, 36:48].unflatten(1, (2, 6))
    width = (eyes[:, :, 0] - eyes[:, :, 3]).norm(dim=2)                     # (N,2)
    height = (eyes[:, :, [1, 2]] - eyes[:, :, [5, 4]]).norm(dim=3).mean(2)
    closed = (height / width).amin(1) < 1 / 7
    return turned + closed.float()


def choose_guides(faces, indices):
    """The guide of each picture, {i: j}: the person's best picture by `guide_score`.

    As in the paper a guide is not restored itself: it is no key. Nor is the picture of a
    person who has only one.
    """
    best = {}
    for who in faces.identity[list(indices)].unique().tolist():
        pictures = torch.nonzero(faces.identity == who)[:, 0].tolist()
        scores = guide_score(torch.stack([faces.landmarks(i) for i in pictures]))
        best[who] = pictures[int(scores.argmin())]
    guides = {i: best[int(faces.identity[i])] for i in indices}
    guides = {i: j for i, j in guides.items() if i != j}
    if not guides:
        raise InputError("no person has two pictures, one to restore and one to guide; "
                         "--data wants one folder per identity, with several pictures")
    return guides


def draw_stranger(faces, guides, i, generator):
    """Ours(R) of Table 1: a guide of somebody else for picture i, drawn at random. Where
    all guides show one person: any picture of somebody else."""
    people = torch.tensor(sorted(set(guides.values())))
    strangers = people[faces.identity[people] != faces.identity[i]]
    if len(strangers) == 0:
        strangers = torch.nonzero(faces.identity != faces.identity[i])[:, 0]
    return int(strangers[torch.randint(len(strangers), (), generator=generator)])


def load_pair(faces, i, guides, cfg, generator):
    """Picture i and its guide, or a stranger's: images (2,3,H,W), landmarks (2,68,2)."""
    if cfg.stranger:
        return common.stack_faces(faces, [i, draw_stranger(faces, guides, i, generator)])
    return common.stack_person(faces, [i, guides[i]])


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: (degraded, target, guide, landmarks,
    guide_landmarks).

    Every pair draws from a random stream of its own, (seed, step, place in the whole batch):
    resuming, or more processes of smaller batches, changes nothing.
    """

    def __init__(self, faces, indices, cfg):
        self.faces = faces
        self.cfg = cfg
        self.guides = choose_guides(faces, indices)
        self.targets = list(self.guides)
        self.first = common.rank() * cfg.batch

    def sample(self, step, place):
        """One pair, flipped together: images (3,H,W), landmarks (68,2)."""
        cfg = self.cfg
        generator = common.seeded(cfg.seed, 1, step, place)
        i = self.targets[torch.randint(len(self.targets), (), generator=generator)]
        images, landmarks = load_pair(self.faces, i, self.guides, cfg, generator)
        images, landmarks = common.augment(images, landmarks, generator, cfg.shift)
        target, guide = images
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade(images[:1], degradation, generator)           # Eq. (4)
        return degraded[0], target, guide, landmarks[0], landmarks[1]

    def __getitem__(self, step):
        samples = [self.sample(step, self.first + k) for k in range(self.cfg.batch)]
        return [torch.stack(part) for part in zip(*samples)]


# 6. Training --------------------------------------------------------------------------

def train(cfg, args):
    """Train on args.data, write the run into args.folder; see Config for every number."""
    faces = common.load_faces(args, cfg, need_landmarks=True)
    people, validation, test = common.split_identities(faces)
    validation = common.spread(list(choose_guides(faces, validation)), cfg.validated)
    test = common.spread(list(choose_guides(faces, test)), cfg.tested)
    encoder = common.load_encoder(cfg.encoder, args, faces)

    torch.manual_seed(cfg.seed)
    net = GFRNet(cfg).to(args.device, memory_format=torch.channels_last)
    discriminators = Discriminators(cfg.discriminator_width)
    discriminators.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), betas=cfg.betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=cfg.betas, fused=True)
    # WarpNet's own steps, fixed when the run began. Without a flow loss they are skipped.
    warp_steps = (args.state or {}).get("warp_steps", round(cfg.warp_share * cfg.steps))
    skipped = 0 if cfg.learns_flow else warp_steps
    run = common.Run(SCRIPT, cfg, args, faces, steps=cfg.steps - skipped, net=net,
                     frozen={"encoder": encoder}, discriminators=discriminators,
                     optimizer=optimizer, optimizer_d=optimizer_d, warp_steps=warp_steps)
    forward, = common.parallel(net, find_unused=cfg.learns_flow)
    forward_d, = common.parallel(discriminators)

    for step, batch in run.batches(Batches(faces, people, cfg)):
        degraded, target, guide, landmarks, guide_landmarks = batch
        common.set_rate(cfg.rate(step + skipped) * run.factor, optimizer, optimizer_d)
        alone = step + skipped <= warp_steps

        # Generator
        losses = {}
        discriminators.requires_grad_(False)
        with common.autocast(args.device, args.precision):
            if alone:
                flow = forward(degraded, guide, flow_only=True)
            else:
                restored, _, flow = forward(degraded, guide)
                boxes = landmark_box(landmarks, cfg.size)
                losses = reconstruction_losses(restored, target, encoder, cfg)
                fake = discriminators(degraded, guide, restored, boxes)
                losses["adversarial"] = adversarial_loss(fake, cfg.weight_adversarial)
            if cfg.learns_flow:
                losses |= flow_loss(flow, landmarks, guide_landmarks, cfg)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()                                         # Eq. (12)
        optimizer.step()

        # Discriminators
        if not alone:
            discriminators.requires_grad_(True)
            with common.autocast(args.device, args.precision):
                real = forward_d(degraded, guide, target, boxes)
                fake = forward_d(degraded, guide, restored.detach(), boxes)
                losses["discriminator"] = discriminator_loss(real, fake, cfg.smooth)
            optimizer_d.zero_grad(set_to_none=True)
            losses["discriminator"].backward()
            optimizer_d.step()

        run.log(step, losses)
        if run.due(step):
            if step + skipped - cfg.validate_every <= warp_steps:
                run.forget_best()                  # that loss is from before RecNet learned
            run.save(step, validate(net, encoder, faces, validation, cfg))

    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg):
    """Reconstruction loss, Eq. (6), PSNR in dB and landmark error in pixels on held-out
    faces, always degraded alike."""
    device = next(net.parameters()).device
    loss, quality, error = 0.0, 0.0, 0.0
    for batch in restored_batches(net, faces, indices, cfg, None):
        restored, target = batch["restored"].to(device), batch["target"].to(device)
        with common.autocast(device):
            losses = reconstruction_losses(restored, target, encoder, cfg)
        loss += sum(losses.values()).item() * len(target)
        quality += common.psnr(restored, target).sum().item()
        if cfg.warped:
            points = batch["landmarks"], batch["guide_landmarks"]
            error += landmark_error(batch["flow"], *points).sum().item()
    count = len(indices)
    means = {"validation": loss / count, "validation_psnr": quality / count}
    return means | ({"landmark_error": error / count} if cfg.warped else {})


def samples(net, faces, indices, cfg, precision="auto"):
    """Pictures of six held-out faces, degraded ×4, and of the flows for them."""
    six = common.spread(indices, 6)
    batch = next(restored_batches(net, faces, six, cfg, 4, precision=precision))
    names = ["degraded", "guide", "warped", "restored", "target"]
    if not cfg.warped:
        names.remove("warped")
    if not cfg.guided:
        names.remove("guide")
    columns = {name: batch[name] for name in names}
    pictures = {"samples.png": common.comparison_grid(columns)}
    if cfg.warped:
        pictures["flow.png"] = draw_flow(batch)
    return pictures


def draw_flow(batch):
    """A column a face. Above: the guide under a grid, bent to where the flow reads it.
    Below: the warped guide under the grid, now straight, and the target's landmarks."""
    count, _, size, _ = batch["guide"].shape
    figure = matplotlib.figure.Figure(figsize=(2.5 * count, 5), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False)
    straight = identity_flow(size)[0]
    for k in range(count):
        upper, lower = axes[:, k]
        draw_grid(upper, batch["guide"][k], batch["flow"][k])
        draw_grid(lower, batch["warped"][k], straight)
        lower.plot(*batch["landmarks"][k].T, "c.", markersize=2)
    axes[0, 0].set_ylabel("guide, where it is read")
    axes[1, 0].set_ylabel("warped guide, target's landmarks")
    return figure


def draw_grid(axis, image, flow):
    """An image (3,H,W) under lines: the places that a flow (2,H,W) reads for eight rows
    and eight columns."""
    size = image.shape[-1]
    x, y = ((flow + 1) * size - 1) / 2                        # in pixels
    axis.imshow(common.to_uint8(image).permute(1, 2, 0).numpy())
    for k in range(size // 16, size, size // 8):
        axis.plot(x[k], y[k], "w-", linewidth=0.7)
        axis.plot(x[:, k], y[:, k], "w-", linewidth=0.7)
    axis.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])


# 7. Restoration -----------------------------------------------------------------------

def restore(net, degraded, guides, batch=8, precision="auto"):
    """Restore faces: degraded, guides (N,3,size,size) in [-1,1] → restored, warped, flow,
    on the CPU; the last two None where the network has none."""
    with common.inference(net, precision) as device:

        def some(part):
            images = degraded[part].to(device, memory_format=torch.channels_last)
            guide = guides[part].to(device, memory_format=torch.channels_last)
            results = net(images, guide)
            return [x if x is None else x.float().clamp(-1, 1).cpu() for x in results]

        return common.in_batches(some, len(degraded), batch)


def restored_batches(net, faces, indices, cfg, scale, batch=16, precision="auto"):
    """Held-out faces in batches, by name; "faces" are their indices in the data."""
    guides = choose_guides(faces, indices)
    targets = list(guides)
    for start in range(0, len(targets), batch):
        some = targets[start:start + batch]
        pairs = [load_pair(faces, i, guides, cfg, common.seeded(cfg.seed, 5, i))
                 for i in some]
        target, guide = torch.stack([images for images, _ in pairs], 1)
        landmarks, guide_landmarks = torch.stack([points for _, points in pairs], 1)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade_each(target, degradation, scale, cfg.seed, some)
        restored, warped, flow = restore(net, degraded, guide, batch, precision)
        yield {"faces": torch.tensor(some), "degraded": degraded, "guide": guide,
               "warped": warped, "flow": flow, "restored": restored, "target": target,
               "landmarks": landmarks, "guide_landmarks": guide_landmarks}


def landmark_error(flow, landmarks, guide_landmarks):
    """How far, in pixels, the flow at the landmarks is from those of the guide: (B,)."""
    gap = sample_flow(flow, landmarks) - normalise(guide_landmarks, flow.shape[-1])
    return gap.norm(dim=2).mean(1) * flow.shape[-1] / 2


def evaluate(net, faces, indices, cfg, args):
    """The paper's ×4 and ×8 and random scales on held-out faces → "test" of result.json.

    The column `stranger` is what a guided network makes of somebody else's guide.
    """
    metrics = common.metrics(faces, args)
    ways = {"restored": cfg}
    if cfg.guided and not cfg.stranger and len(faces.identity.unique()) > 1:
        ways["stranger"] = replace(cfg, stranger=True)
    table = {}
    for task, scale in common.TASKS.items():
        batches = {way: restored_batches(net, faces, indices, one, scale,
                                         precision=args.precision)
                   for way, one in ways.items()}
        table[task] = common.measure(batches, metrics)
    return table


def load_network(args):
    """The network of the checkpoint, and its Config."""
    cfg = common.recorded_config(args, Config)
    net = GFRNet(cfg)
    common.load_part(net, args.state, "net")
    return net, cfg


# 8. Command line ----------------------------------------------------------------------

def main(argv=None):
    parser = common.arguments(__doc__, PRESETS, VARIANTS)
    parser.add_argument("--reference", metavar="PATH",
                        help="for --restore: a sharp picture of the same person, frontal, "
                             "eyes open; of a folder the best is taken")
    args = common.parse(parser, argv, SCRIPT)
    if args.weights is not None:
        raise InputError(f"--weights {args.weights}: GFRNet's authors released none that "
                         "PyTorch reads; train it (--train), and name the result with "
                         "--checkpoint")
    if args.train:
        for run in common.planned_runs(args, SCRIPT, PRESETS, VARIANTS, CLAIMS, PAPER_FIGURES):
            cfg = common.chosen_config(run, PRESETS, VARIANTS)
            if cfg.size < 64 or cfg.size & (cfg.size - 1):
                raise InputError(f"--size {cfg.size}: must be a power of two, at least 64")
            train(cfg, run)
        return 0

    net, cfg = load_network(args)
    net = common.for_inference(net, args.device, args.precision)
    if args.evaluate:
        faces = common.load_faces(args, cfg, need_landmarks=True)
        test = common.test_faces(faces, args, cfg.tested,
                                 lambda some: list(choose_guides(faces, some)))
        run = common.Run(SCRIPT, cfg, args, faces)
        common.report(run, evaluate(net, faces, test, cfg, args),
                      samples(net, faces, test, cfg, args.precision))
        return 0

    guide = torch.zeros(1, 3, cfg.size, cfg.size)             # without a guide nobody looks at it
    if cfg.guided:
        if args.reference is None:
            raise InputError("--restore wants --reference: a sharp picture of the same "
                             "person")
        images, landmarks, files = common.read_references(args.reference, cfg.size, args)
        best = int(guide_score(landmarks).argmin())
        guide = images[best:best + 1]
        print(f"guide: {files[best]}")

    def restore_crops(crops, landmarks, files):
        guides = guide.expand_as(crops)
        restored, warped, _ = restore(net, crops, guides, precision=args.precision)
        shown = {"guide": guides, "warped": warped}                   # what --check shows
        return restored, {name: x for name, x in shown.items() if cfg.guided and x is not None}

    return 1 if common.restore_files(args, cfg.size, restore_crops) else 0


if __name__ == "__main__":
    common.run_script(main)
