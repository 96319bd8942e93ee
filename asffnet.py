"""ASFFNet: blind face restoration with the best of several sharp pictures of the same person.

Li, Li, Ren, Zhang, Wang, Zuo: "Enhanced Blind Face Restoration with Multi-Exemplar Images and Adaptive
Spatial Feature Fusion", CVPR 2020.

Of several sharp pictures of a person, one is nearest to the degraded one in pose and expression: landmarks
find it, weighted by what has been learned to matter. Its features are aligned by moving least squares on
the landmarks (nothing to train), brought to the light of the degraded face by AdaIN, and fused in four
blocks, each with a mask that says where to trust the guide (eyes, beard) and where not (background).

Equation → name
    (1) ASFFNet                (7) adain                (13) style_loss
    (2) affine_distance        (8) ASFFBlock            (14) discriminator_loss
    (3) fit_affine             (9) Reconstruction       (15) adversarial_loss
    (4) ranking_loss          (10) pixel_loss           (16) the sum in train
    (5) moving_least_squares  (11) perceptual_loss      (17) the sum in train
    (6) warp_features         (12) the sum in train     (18) common.degrade, "asffnet"

    python asffnet.py --train                                    # rendered faces, minutes on two CPU cores
    python asffnet.py --evaluate                                 # on people it has never seen
    python asffnet.py --restore photo.jpg --reference album/     # your picture, sharp ones of that person

Open in the paper, chosen here: the layers (those of the released network where they fit); landmarks are
in pixels of a 256×256 image in Eq. (2); their weights stay positive as exponentials; Eq. (4) looks at one
picture of a batch, every few steps in TINY; all blocks see the same aligned guide and landmark features.
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
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import InputError

SCRIPT = "asffnet"
STRIDE = 4                                     # pixels a feature


# -----------------------------------------------------------------------------------------------------------
# 2. Config
# -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                          # pixels, height = width
    seed: int = 0

    encoder: str = "recogniser"              # Ψ of Eq. (11) and (13); "vgg" is VGG-Face, or VGG-19
    exemplars: int = 5                       # K, at most; 3 to 10 in the paper
    per_identity: int = 6                    # rendered pictures a person
    identities: int = 288
    blocks: int = 4                          # ASFF blocks
    fusion: str = "asff"                     # or "concat", or "none": without attention mask
    adain: bool = True                       # Eq. (7)
    mls: bool = True                         # Eq. (5)
    train_guide: bool = True                 # the guide's feature extractor is trained; else it is Ψ
    strides: tuple = (2, 2, 1)               # of the extractors' stages; (1, 2, 2) in the paper
    residual_blocks: int = 1                 # in each of them
    channels: int = 48                       # C of the features
    width: int = 16                          # channels at full size
    residual: bool = True                    # added to I^d: a short training need not learn to copy
    released: bool = False                   # the network of the published weights, see the last chapter

    weight_pixel: float = 300.0              # λ_MSE
    weight_perceptual: float = 0.5           # λ_perc; 5 in the paper, with another encoder
    weight_style: float = 1e-6               # λ_style; 1 in the paper
    weight_adversarial: float = 0.02         # λ_adv; 2 in the paper
    discriminator_width: int = 16
    learning_rate: float = 1e-3              # 5 times the paper's: the network is small
    weights_rate: float = 2e-2               # of the logarithms of the landmark weights
    betas: tuple = (0.5, 0.999)              # β1, β2 of Adam
    clip: float = 1.0                        # longest gradient; the paper clips none
    cooldown: float = 0.3                    # last part of the steps: the rate falls to 0; none in the paper
    patience: int = 1                        # validations without a better loss before the rate is halved
    rank_every: int = 4                      # steps between two uses of Eq. (4)
    crop: float = 0.05                       # largest random change of scale and place, parts of the size
    jitter: float = 0.1                      # of brightness and contrast
    steps: int = 700
    batch: int = 4                           # faces a process and step
    validate_every: int = 50                 # steps; also when a checkpoint is written
    degradation: str = "asffnet"             # Eq. (18)


TINY = Config()
PAPER = replace(TINY, preset="paper", size=256, encoder="vgg", exemplars=10, strides=(1, 2, 2),
                residual_blocks=2, channels=128, width=64, residual=False, weight_perceptual=5.0,
                weight_style=1.0, weight_adversarial=2.0, discriminator_width=64, learning_rate=2e-4,
                weights_rate=2e-4, clip=math.inf, cooldown=0, patience=0, rank_every=1, steps=1_000_000,
                batch=8, validate_every=5_000)       # the paper gives 3 days on one GPU, not steps
RELEASED = replace(PAPER, preset="released", size=512, released=True, batch=2)
PRESETS = {"tiny": TINY, "paper": PAPER, "released": RELEASED}
VARIANTS = {   # Tables 1 and 2. Ten exemplars need 11 pictures a person, which all rows of Table 1 then have
    "full": {},
    **{f"exemplars-{k}": {"exemplars": k, "per_identity": 11, "identities": 157} for k in (1, 3, 5, 10)},
    "1-concat": {"blocks": 1, "fusion": "concat"}, "4-concat": {"fusion": "concat"},
    "no-attention-1": {"blocks": 1, "fusion": "none"}, "no-attention-4": {"fusion": "none"},
    "1-asff": {"blocks": 1}, "2-asff": {"blocks": 2}, "8-asff": {"blocks": 8}, "no-adain": {"adain": False},
    "no-mls": {"mls": False}, "untrained-guide-features": {"train_guide": False}}


# -----------------------------------------------------------------------------------------------------------
# 3. Network
# -----------------------------------------------------------------------------------------------------------

def homogeneous(points):
    """[x, y] → [x, y, 1]: (…,2) → (…,3)."""
    return torch.cat([points, torch.ones_like(points[..., :1])], -1)


def fit_affine(landmarks, exemplar_landmarks, weights):
    """Eq. (3): A = L^d W L̃^gᵀ (L̃^g W L̃^gᵀ)⁻¹, the affine map from an exemplar's landmarks to the others.

    landmarks (B,68,2), exemplar_landmarks (B,K,68,2), weights (68,) → A (B,K,2,3), float64. A hair is added
    to the matrix's diagonal, so that landmarks on one line have a map too.
    """
    source, weights = homogeneous(exemplar_landmarks.double()), weights.double()[:, None]
    moments = source.transpose(-1, -2) @ (weights * source)                             # (B,K,3,3)
    ridge = 1e-12 * moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    products = source.transpose(-1, -2) @ (weights * landmarks.double()[:, None])       # (B,K,3,2)
    return torch.linalg.solve(moments + ridge * torch.eye(3).to(moments), products).transpose(-1, -2)


def affine_distance(landmarks, exemplar_landmarks, weights):
    """Eq. (2): D_a² = min_A Σ_m w_m ‖A L̃^g_m − L^d_m‖² of each exemplar, (B,K). Shapes as for fit_affine."""
    moved = homogeneous(exemplar_landmarks.double()) @ fit_affine(
        landmarks, exemplar_landmarks, weights).transpose(-1, -2)
    return ((moved - landmarks.double()[:, None]).square().sum(-1) * weights.double()).sum(-1)


class GuidanceSelection(nn.Module):
    """The choice of the guide, with the landmark weights w: learned by Eq. (4), then fixed.

    They begin at 1 for jaw and nose, which only move with the head, and at 0.1 for brows, eyes and mouth.
    """

    def __init__(self):
        super().__init__()
        weights = torch.full((68,), 0.1)
        weights[common.JAW] = weights[common.NOSE_BRIDGE] = weights[common.NOSE_BASE] = 1
        self.log_weights = nn.Parameter(weights.log())

    def forward(self, landmarks, exemplar_landmarks, size):
        """D_a² of each exemplar, (B,K), of landmarks in pixels of a size×size image."""
        return affine_distance(landmarks * (256 / size), exemplar_landmarks * (256 / size),
                               self.log_weights.exp())


def moving_least_squares(landmarks, guide_landmarks, size, stride):
    """Eq. (5): for each position p of the degraded image, p̂ = M_p p̃ in the guide.

    M_p is the affine map from L^d to L^g that fits best near p: weights W_p = 1 / ‖p − L^d_m‖².
    landmarks, guide_landmarks (B,68,2) in pixels of size×size images → (B,h,w,2) x,y in pixels, float64,
    for the centres of features of `stride` pixels, h = w = size / stride.

    With everything measured from p, p̂ is the value of the fitted map at the origin: no 3×3 inverse, and no
    cancellation where p comes close to a landmark and its weight to infinity (distances are taken as at
    least 1e-6 pixels). All 68 weights at all positions of all samples are one tensor. Where the landmarks
    lie on a line or in a point, a similarity or a shift takes the affine map's place.
    """
    goal, source = guide_landmarks.double()[:, None], landmarks.double()[:, None]            # (B,1,68,2)
    line = torch.arange(size // stride, device=goal.device, dtype=goal.dtype) * stride + (stride - 1) / 2
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 1, 2)    # (1,P,1,2)
    source = source - points                                                                 # (B,P,68,2)
    weights = 1 / source.square().sum(-1, keepdim=True).clamp(min=1e-12)
    weights = weights / weights.sum(2, keepdim=True)
    centre, goal_centre = (weights * source).sum(2), (weights * goal).sum(2)                 # (B,P,2)
    source, goal = source - centre[:, :, None], goal - goal_centre[:, :, None]
    spread = (weights * source).transpose(-1, -2) @ source                                   # (B,P,2,2)
    product = (weights * goal).transpose(-1, -2) @ source
    a, b, c = spread[..., 0, 0], spread[..., 0, 1], spread[..., 1, 1]
    determinant, trace = a * c - b * b, a + c
    flat = determinant <= 1e-9 * trace**2
    inverse = torch.stack([torch.stack([c, -b], -1), torch.stack([-b, a], -1)], -2) / torch.where(
        flat, torch.ones_like(trace), determinant)[..., None, None]
    nothing = trace <= 1e-16                        # all landmarks in one point: the similarity is a shift
    cosine = product[..., 0, 0] + product[..., 1, 1]
    sine = product[..., 1, 0] - product[..., 0, 1]
    cosine, sine = (torch.where(nothing, torch.full_like(trace, value), part / torch.where(
        nothing, torch.ones_like(trace), trace)) for part, value in ((cosine, 1.0), (sine, 0.0)))
    similarity = torch.stack([torch.stack([cosine, -sine], -1), torch.stack([sine, cosine], -1)], -2)
    matrix = torch.where(flat[..., None, None], similarity, product @ inverse)
    moved = goal_centre - (matrix @ centre[..., None])[..., 0]
    return moved.view(len(landmarks), len(line), len(line), 2)


def warp_features(features, positions, stride):
    """Eq. (6): F^g,w(x,y) = Σ over p̂'s 4 neighbours of F^g(x',y') max(0, 1−|x̂−x'|) max(0, 1−|ŷ−y'|).

    features (B,C,h,w) of `stride` pixels, positions (B,h',w',2) in pixels → (B,C,h',w') float32. What falls
    outside the map is taken from its border.
    """
    extent = torch.tensor([features.shape[3], features.shape[2]], device=positions.device) * stride
    grid = (2 * positions + 1) / extent - 1
    return F.grid_sample(features.float(), grid.float(), padding_mode="border", align_corners=False)


def adain(guide_features, features):
    """Eq. (7): σ(F^d) (F^g,w − μ(F^g,w)) / σ(F^g,w) + μ(F^d), over the positions of each channel; (B,C,h,w).
    (The text below Eq. (7) swaps the words for σ and μ: σ is the standard deviation.)"""
    (deviation, mean), (guide_deviation, guide_mean) = (
        ((part.var((2, 3), keepdim=True) + 1e-5).sqrt(), part.mean((2, 3), keepdim=True))
        for part in (features.float(), guide_features.float()))
    return deviation * (guide_features.float() - guide_mean) / guide_deviation + mean


def convolution(before, after, kernel=3, stride=1, dilation=1):
    """A convolution, zero-padded to the same size, with He's initialisation."""
    layer = nn.Conv2d(before, after, kernel, stride, dilation * (kernel - 1) // 2, dilation)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


class Residual(nn.Module):
    """x + two 3×3 convolutions, a LeakyReLU between. It begins close to x."""

    def __init__(self, channels, first=1, second=1):
        super().__init__()
        self.body = nn.Sequential(convolution(channels, channels, dilation=first), nn.LeakyReLU(0.2),
                                  convolution(channels, channels, dilation=second))
        with torch.no_grad():
            self.body[-1].weight *= 0.1

    def forward(self, x):
        return x + self.body(x)


def feature_extractor(cfg):
    """The features of a picture at a quarter of its size: (B,3,H,W) → (B,C,H/4,W/4). Three stages of ever
    smaller dilations, then a convolution to C channels."""
    layers, before = [], 3
    for level, (stride, dilations) in enumerate(zip(cfg.strides, ((7, 5), (5, 3), (3, 1)))):
        after = cfg.width * 2**level
        layers += [convolution(before, after, stride=stride), nn.LeakyReLU(0.2),
                   *(Residual(after, *dilations) for _ in range(cfg.residual_blocks))]
        before = after
    return nn.Sequential(*layers, convolution(before, cfg.channels), nn.LeakyReLU(0.2))


class UntrainedFeatures(nn.Module):
    """Row "untrain F_g" of Table 2: the recognition network's maps at a quarter of the size, as they are;
    only a 1×1 convolution brings them to C channels."""

    def __init__(self, encoder, channels):
        super().__init__()
        self.encoder = encoder
        self.channels = convolution(encoder.widths[1], channels, 1)

    def forward(self, guide):
        with torch.no_grad():
            features = self.encoder.features(guide)[1]
        return self.channels(features)


def landmark_features(channels):
    """F^l from a mask of landmarks: (B,1,H,W) → (B,C,H/4,W/4)."""
    layers, before = [], 1
    for after, kernel, stride in ((channels // 8, 9, 2), (channels // 4, 7, 1), (channels // 2, 5, 2),
                                  (channels, 3, 1)):
        layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.LeakyReLU(0.2)]
        before = after
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Sigmoid())


class ASFFBlock(nn.Module):
    """Eq. (8): (1 − F^m) ∘ F_d(F^d) + F^m ∘ F_g(F^g,w,a) → the fused features and the attention mask F^m.

    features, guide_features, landmark_features (B,C,h,w). The gating module sees all three, each reduced to
    half its channels by a 1×1 convolution. fusion "concat" fuses by a convolution of both instead (the mask
    is None), "none" has a constant mask of 1/2.
    """

    def __init__(self, channels, fusion="asff"):
        super().__init__()
        self.fusion = fusion
        self.refine, self.refine_guide = Residual(channels), Residual(channels)
        if fusion == "concat":
            self.fuse = convolution(2 * channels, channels)
        if fusion == "asff":
            self.reduce = nn.ModuleList(convolution(channels, channels // 2, 1) for _ in range(3))
            self.gate = nn.Sequential(convolution(channels // 2 * 3, channels), nn.LeakyReLU(0.2),
                                      nn.Conv2d(channels, channels, 3, padding=1), nn.Sigmoid())
            nn.init.constant_(self.gate[-2].bias, -2.0)            # begins by trusting the degraded face

    def forward(self, features, guide_features, landmark_features):
        own, guided = self.refine(features), self.refine_guide(guide_features)
        if self.fusion == "concat":
            return self.fuse(torch.cat([own, guided], 1)), None
        mask = torch.full_like(own, 0.5)
        if self.fusion == "asff":
            mask = self.gate(torch.cat([reduce(x) for reduce, x in zip(
                self.reduce, (landmark_features, own, guided))], 1))
        return own + mask * (guided - own), mask


class Reconstruction(nn.Sequential):
    """Eq. (9): Î = F_R(F^c), (B,C,h,w) → (B,3,4h,4w): two pixel-shuffles, two residual blocks after each."""

    def __init__(self, cfg):
        layers, before = [], cfg.channels
        for after in (2 * cfg.width, cfg.width):
            layers += [convolution(before, 4 * after), nn.PixelShuffle(2), nn.LeakyReLU(0.2),
                       Residual(after), Residual(after)]
            before = after
        super().__init__(*layers, nn.LeakyReLU(0.2), nn.Conv2d(before, 3, 3, padding=1))


class ASFFNet(nn.Module):
    """Eq. (1), once the guide is chosen: degraded, guide (B,3,H,W) in [-1,1], landmarks, guide_landmarks
    (B,68,2) in pixels → restored. `masks` of the last call's blocks are kept for pictures. The encoder is
    needed for untrained guide features only."""

    def __init__(self, cfg, encoder=None):
        super().__init__()
        self.cfg, self.attention = cfg, []
        self.selection = GuidanceSelection()
        self.extract = feature_extractor(cfg)
        self.extract_guide = (feature_extractor(cfg) if cfg.train_guide
                              else UntrainedFeatures(encoder, cfg.channels))
        self.extract_landmarks = landmark_features(cfg.channels) if cfg.fusion == "asff" else None
        self.blocks = nn.ModuleList(ASFFBlock(cfg.channels, cfg.fusion) for _ in range(cfg.blocks))
        self.reconstruct = Reconstruction(cfg)
        if cfg.residual:
            nn.init.zeros_(self.reconstruct[-1].weight)

    def select(self, landmarks, exemplar_landmarks):
        """k* of Eq. (2): landmarks (B,68,2), exemplar_landmarks (B,K,68,2) → (B,)."""
        with torch.no_grad():
            return self.selection(landmarks, exemplar_landmarks, self.cfg.size).argmin(1)

    def forward(self, degraded, guide, landmarks, guide_landmarks):
        features, guide_features = self.extract(degraded), self.extract_guide(guide)
        if self.cfg.mls:
            positions = moving_least_squares(landmarks, guide_landmarks, self.cfg.size, STRIDE)
            guide_features = warp_features(guide_features, positions, STRIDE)
        if self.cfg.adain:
            guide_features = adain(guide_features, features)
        marks = None
        if self.extract_landmarks is not None:
            marks = self.extract_landmarks(common.landmark_mask(landmarks, self.cfg.size))
        self.attention = []
        for block in self.blocks:
            features, mask = block(features, guide_features, marks)
            self.attention.append(mask if mask is None else mask.detach())
        image = self.reconstruct(features).float()
        return degraded + image if self.cfg.residual else torch.tanh(image)


class Discriminator(nn.Module):
    """An SN-GAN patch discriminator, all under spectral norm: (B,3,H,W) → scores (B,1,h,w)."""

    def __init__(self, width):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        self.layers = nn.Sequential(
            *[nn.Sequential(spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2))
              for a, b in zip(widths, widths[1:])],
            spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))

    def forward(self, image):
        return self.layers(image)


# -----------------------------------------------------------------------------------------------------------
# 4. Losses
# -----------------------------------------------------------------------------------------------------------

def ranking_loss(distances, best):
    """Eq. (4): Σ_{k≠k*} max(0, 1 − (D_a²(L^d, L_k^g) − D_a²(L^d, L_k*^g))), a mean over the batch.

    distances (B,K), best (B,): k*, the exemplar that restores best.
    """
    margin = F.relu(1 - (distances - distances.gather(1, best[:, None])))
    return margin.scatter(1, best[:, None], 0).sum(1).mean()


def pixel_loss(restored, target):
    """Eq. (10): ‖Î^h − I‖² / (C H W), a mean over the batch."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (11): Σ_u ‖Ψ_u(Î^h) − Ψ_u(I)‖² / (C_u H_u W_u) of four lists of maps, a mean over the batch."""
    return sum(F.mse_loss(a.float(), b.float()) for a, b in zip(features, target_features))


def style_loss(features, target_features):
    """Eq. (13): Σ_u ‖Ψ_uᵀ Ψ_u − Ψ_u'ᵀ Ψ_u'‖² / (C_u H_u W_u), a mean over the batch.

    Ψ_u is taken as a matrix of H_u W_u rows, so that the Gram matrix has C_u × C_u entries. They are sums
    over all positions, as printed: the loss grows with the area and the fourth power of the features.
    """
    def gram(maps):
        with torch.autocast(maps.device.type, enabled=False):     # small differences of large sums follow
            flat = maps.float().flatten(2)
            return flat @ flat.transpose(1, 2)

    return sum((gram(a) - gram(b)).square().sum((1, 2)).mean() / a[0].numel()
               for a, b in zip(features, target_features))


def discriminator_loss(real, fake):
    """Eq. (14): −E[min(0, −1 + D(I))] − E[min(0, −1 − D(Î^h))]. The paper's ℓ is what D maximises; this is
    its negative, to be minimised."""
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def adversarial_loss(fake):
    """Eq. (15): −E[D(Î^h)]."""
    return -fake.float().mean()


# -----------------------------------------------------------------------------------------------------------
# 5. Data
# -----------------------------------------------------------------------------------------------------------

def load_faces(cfg, args):
    """The faces of --data, or rendered ones."""
    if args.data is None:
        return common.RenderedFaces(cfg.size, cfg.identities, cfg.per_identity)
    return common.FaceFolder(args.data, cfg.size, args.landmarks, args.aligned)


def with_others(faces, indices):
    """Those of the pictures whose person has another one, which can guide."""
    _, person, count = faces.identity.unique(return_inverse=True, return_counts=True)
    chosen = [i for i in indices if count[person[i]] > 1]
    if not chosen:
        raise InputError("no person has two pictures; --data wants one folder per identity, each with "
                         "several pictures: one to restore, others to guide")
    return chosen


def choose_exemplars(faces, i, count, generator):
    """`count` other pictures of the person on picture i, at random; repeated where there are fewer."""
    others = faces.others(i)
    order = torch.randperm(len(others), generator=generator).tolist()
    return [others[order[k % len(order)]] for k in range(count)]


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`: (degraded, target, landmarks, exemplars (B,K,3,H,W), exemplar_landmarks
    (B,K,68,2)), a pure function of (seed, rank, step), so that a resumed run sees what an unbroken one
    would have seen."""

    def __init__(self, faces, indices, cfg, rank=0):
        self.faces, self.indices, self.cfg, self.rank = faces, with_others(faces, indices), cfg, rank

    def __len__(self):
        return self.cfg.steps

    def __getitem__(self, step):
        generator, cfg, samples = common.seeded(self.cfg.seed, 1, self.rank, step), self.cfg, []
        for i in torch.randint(len(self.indices), (cfg.batch,), generator=generator).tolist():
            chosen = self.indices[i]
            images, landmarks = common.stack_person(
                self.faces, [chosen, *choose_exemplars(self.faces, chosen, cfg.exemplars, generator)])
            samples.append(common.augment(images, landmarks, generator, cfg.crop, cfg.jitter))
        images, landmarks = (torch.stack(part) for part in zip(*samples))
        target = images[:, 0].contiguous()
        degraded = common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator)
        return degraded, target, landmarks[:, 0], images[:, 1:], landmarks[:, 1:]


def load_encoder(cfg, args, faces, device):
    """Ψ of Eq. (11), frozen: the recogniser of these faces, or VGG-Face."""
    encoder = common.load_vgg(args.vggface) if cfg.encoder == "vgg" else common.recogniser(faces)
    return encoder.to(device, memory_format=torch.channels_last)


def pick(exemplars, index):
    """exemplars (B,K,…), index (B,) → the chosen ones (B,…)."""
    return exemplars[torch.arange(len(index), device=index.device), index]


# -----------------------------------------------------------------------------------------------------------
# 6. Training
# -----------------------------------------------------------------------------------------------------------

def build(cfg, encoder=None):
    """The network of a Config; the encoder is needed for --variant untrained-guide-features only."""
    return ReleasedASFFNet(cfg) if cfg.released else ASFFNet(cfg, encoder)


def train(cfg, args):
    """Train on args.data, write the run into args.out; see Config for every number."""
    begin, device, out = time.monotonic(), common.choose_device(args.device), Path(args.out)
    with common.process_group() as (rank, world):
        if rank == 0:
            common.write_json(out / "config.json", asdict(cfg))
        faces = load_faces(cfg, args)
        train_indices, validation, test = common.split_identities(faces)
        data = Batches(faces, train_indices, cfg, rank)
        encoder = load_encoder(cfg, args, faces, device) if rank == 0 else None   # one process trains it,
        if torch.distributed.is_initialized():                                    # others find it cached
            torch.distributed.barrier()
        encoder = encoder or load_encoder(cfg, args, faces, device)
        torch.manual_seed(cfg.seed)
        net = build(cfg, encoder).to(device, memory_format=torch.channels_last)
        discriminator = Discriminator(cfg.discriminator_width).to(device, memory_format=torch.channels_last)
        learned = [weight for name, weight in net.named_parameters()
                   if weight.requires_grad and not name.startswith("selection")]
        optimizer = torch.optim.Adam(learned, cfg.learning_rate, cfg.betas)
        optimizer_d = torch.optim.Adam(discriminator.parameters(), cfg.learning_rate, cfg.betas)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.patience)
        parts = {"net": net, "discriminator": discriminator, "optimizer": optimizer,
                 "optimizer_d": optimizer_d, "schedule": schedule}
        if not cfg.released:
            parts["optimizer_w"] = torch.optim.Adam(net.selection.parameters(), cfg.weights_rate, cfg.betas)
        start, rows = 0, []
        if args.resume:
            state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
            start, rows = state["step"], state["rows"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        forward, forward_d = net, discriminator
        if world > 1:                              # the landmark weights are not in the network's forward
            forward = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False,
                                                          find_unused_parameters=True)
            forward_d = nn.parallel.DistributedDataParallel(discriminator, broadcast_buffers=False)
        batches = torch.utils.data.DataLoader(data, batch_size=None, sampler=range(start, cfg.steps),
                                              num_workers=args.workers, pin_memory=device.type == "cuda")
        progress = common.Progress(f"{SCRIPT} {cfg.variant}", cfg.steps, start, quiet=rank > 0)
        for step, batch in enumerate(batches, start + 1):
            degraded, target = (x.to(device, non_blocking=True, memory_format=torch.channels_last)
                                for x in batch[:2])
            landmarks, exemplars, exemplar_landmarks = (x.to(device, non_blocking=True) for x in batch[2:])
            chosen = net.select(landmarks, exemplar_landmarks)
            guide = pick(exemplars, chosen).contiguous(memory_format=torch.channels_last)
            with common.autocast(device):                                       # generator
                restored = forward(degraded, guide, landmarks, pick(exemplar_landmarks, chosen))
                with torch.no_grad():
                    target_features = encoder.features(target)
                features = encoder.features(restored)
                discriminator.requires_grad_(False)
                losses = {"pixel": cfg.weight_pixel * pixel_loss(restored, target),             # Eq. (12)
                          "perceptual": cfg.weight_perceptual * perceptual_loss(features, target_features),
                          "style": cfg.weight_style * style_loss(features, target_features),    # Eq. (16)
                          "adversarial": cfg.weight_adversarial * adversarial_loss(discriminator(restored))}
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()                                     # Eq. (17)
            nn.utils.clip_grad_norm_(learned, cfg.clip)
            group = optimizer.param_groups[0]
            left = min((cfg.steps - step + 1) / max(cfg.cooldown * cfg.steps, 1), 1)
            rate, group["lr"] = group["lr"], group["lr"] * left
            optimizer.step()
            group["lr"] = rate
            discriminator.requires_grad_(True)
            with common.autocast(device):                                       # discriminator
                losses["discriminator"] = discriminator_loss(
                    *forward_d(torch.cat([target, restored.detach()])).chunk(2))
            optimizer_d.zero_grad(set_to_none=True)
            losses["discriminator"].backward()
            optimizer_d.step()
            if not cfg.released and step % cfg.rank_every == 0:                 # landmark weights
                one = slice(step // cfg.rank_every % cfg.batch, None, cfg.batch)
                losses["ranking"] = rank_exemplars(net, parts["optimizer_w"], world, *(x[one] for x in (
                    degraded, target, landmarks, exemplars, exemplar_landmarks)))
            last = step == cfg.steps or step % cfg.validate_every == 0
            if last or step % 10 == 0:                                # the only place that waits for the GPU
                values = {name: loss.item() for name, loss in losses.items()}
                if bad := [name for name, value in values.items() if not math.isfinite(value)]:
                    raise InputError(f"step {step}: the {', '.join(bad)} loss is not finite; the last good "
                                     f"state is in {args.checkpoint}; try a lower learning rate")
                rows.append({"step": step, **values})
                progress.update(step, "  ".join(f"{name} {value:.3f}" for name, value in values.items()))
            if last:
                reconstruction, quality = validate(net, encoder, faces, common.spread(validation, 32), cfg,
                                                   device)
                if not math.isfinite(reconstruction):
                    raise InputError(f"step {step}: the validation loss is not finite; the last good state "
                                     f"is in {args.checkpoint}")
                schedule.step(reconstruction)
                optimizer_d.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
                rows[-1] |= {"validation": reconstruction, "validation_psnr": quality,
                             "rate": rate * left}
                if rank == 0:
                    progress.line(f"step {step}: validation reconstruction {reconstruction:.3f}, "
                                  f"PSNR {quality:.2f} dB")
                    kept = {} if cfg.train_guide else {"arguments": (
                        encoder.arguments if cfg.encoder == "vgg" else {"widths": encoder.widths})}
                    common.save_checkpoint(args.checkpoint, {
                        "script": SCRIPT, "config": asdict(cfg), "step": step, "rows": rows, **kept,
                        **{name: part.state_dict() for name, part in parts.items()}})
                    common.write_log(out, rows)
        if rank == 0:
            progress.close()
            finish(net, faces, test, cfg, args, device, time.monotonic() - begin)


def rank_exemplars(net, optimizer, world, degraded, target, landmarks, exemplars, exemplar_landmarks):
    """One step on the landmark weights: find which exemplar restores one picture (1,…) best by trying all K,
    then Eq. (4). With several processes their gradients are averaged."""
    count = exemplars.shape[1]
    with torch.no_grad(), common.autocast(degraded.device):
        restored = net(degraded.expand(count, -1, -1, -1), exemplars[0], landmarks.expand(count, -1, -1),
                       exemplar_landmarks[0])
        best = (restored - target).square().mean((1, 2, 3)).argmin()[None]
    loss = ranking_loss(net.selection(landmarks, exemplar_landmarks, degraded.shape[-1]), best)
    weights = net.selection.log_weights
    weights.grad, = torch.autograd.grad(loss, weights)
    if world > 1:
        torch.distributed.all_reduce(weights.grad)
        weights.grad /= world
    optimizer.step()
    return loss


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg, device):
    """Reconstruction loss (Eq. 12) and PSNR in dB on held-out faces, always degraded alike."""
    totals, count = torch.zeros(2), 0
    for batch in restored_batches(net, faces, indices, cfg, device, None):
        with common.autocast(device):
            a, b = (encoder.features(batch[name].to(device)) for name in ("restored", "target"))
        loss = (cfg.weight_pixel * pixel_loss(batch["restored"], batch["target"])
                + cfg.weight_perceptual * perceptual_loss(a, b).cpu())
        size = len(batch["target"])
        totals += torch.stack([loss * size, common.psnr(batch["restored"], batch["target"]).sum()])
        count += size
    return (totals / count).tolist()


def finish(net, faces, test, cfg, args, device, seconds):
    """Measure on held-out people; write result.json, samples.png (at ×4) and attention.png; print the table
    and what was written."""
    out, net = Path(args.out), net.eval()
    result = {"script": SCRIPT, "variant": cfg.variant, "preset": cfg.preset,
              "data": str(args.data or "rendered"), "size": cfg.size,
              "steps": cfg.steps, "seconds": round(seconds, 1),
              "test": evaluate(net, faces, common.spread(test, 128), cfg, device, args.precision)}
    common.write_json(out / "result.json", result)
    batch = next(restored_batches(net, faces, common.spread(test, 6), cfg, device, 4,
                                  precision=args.precision))
    positions = moving_least_squares(batch["landmarks"], batch["guide_landmarks"], cfg.size, 1)
    batch["aligned guide"] = warp_features(batch["guide"], positions, 1)
    common.write_image(out / "samples.png", common.comparison_grid({name: batch[name] for name in (
        "degraded", "guide", "aligned guide", "restored", "target")}))
    draw_attention(out / "attention.png", net, batch)
    common.print_table(result["test"])
    written = [name for name in ("checkpoint.pt", "config.json", "log.csv", "curves.png", "samples.png",
                                 "attention.png", "result.json") if (out / name).is_file()]
    print(f"\n{out}: {', '.join(written)}")


def draw_attention(path, net, batch):
    """attention.png, a row a face: degraded, aligned guide, and each block's F^m, the mean of its channels:
    bright is where the guide is used."""
    masks = [mask.float().mean(1).cpu() for mask in net.attention if mask is not None]
    if not masks:
        return
    count, last = len(batch["target"]), [mask[-len(batch["target"]):] for mask in masks]
    figure = matplotlib.figure.Figure(figsize=(1.8 * (2 + len(last)), 1.85 * count), layout="constrained")
    axes = figure.subplots(count, 2 + len(last), squeeze=False)
    for index, row in enumerate(axes):
        for axis, name in zip(row, ("degraded", "aligned guide")):
            axis.imshow(common.to_uint8(batch[name][index]).permute(1, 2, 0).numpy())
        for axis, mask in zip(row[2:], last):
            low, high = mask.min(), mask.max()
            axis.imshow(mask[index].numpy(), vmin=low.item(), vmax=high.item(), cmap="magma")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    ranges = (f"block {k}: {mask.min():.2f}–{mask.max():.2f}" for k, mask in enumerate(last, 1))
    for axis, title in zip(axes[0], ("degraded", "aligned guide", *ranges)):
        axis.set_title(title, fontsize=9)
    with common.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


# -----------------------------------------------------------------------------------------------------------
# 7. Restoration
# -----------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def restore(net, degraded, landmarks, exemplars, exemplar_landmarks, batch=8, precision="auto"):
    """Restore faces, each guided by the best of its exemplars: degraded (N,3,size,size) in [-1,1], landmarks
    (N,68,2), exemplars (N,K,3,size,size), exemplar_landmarks (N,K,68,2) → restored (N,3,size,size) in [-1,1]
    and the chosen k (N,), on the CPU. Out of GPU memory, the batch is halved, with a line that says so."""
    device, results, start = next(net.parameters()).device, [], 0
    chosen = net.select(landmarks.to(device), exemplar_landmarks.to(device)).cpu()
    guides, guide_landmarks = pick(exemplars, chosen), pick(exemplar_landmarks, chosen)
    training = net.training
    net.eval()
    while start < len(degraded):
        part = slice(start, start + batch)
        try:
            with common.autocast(device, precision):
                images, guide = (x[part].to(device, memory_format=torch.channels_last)
                                 for x in (degraded, guides))
                restored = net(images, guide, landmarks[part].to(device), guide_landmarks[part].to(device))
                results.append(restored.float().clamp(-1, 1).cpu())
            start += batch
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise InputError("not enough GPU memory for one face; use --device cpu or a smaller "
                                 "--size") from None
            batch //= 2
            print(f"out of GPU memory: going on with {batch} faces at a time", file=sys.stderr)
    net.train(training)
    return torch.cat(results), chosen


def restored_batches(net, faces, indices, cfg, device, scale, batch=16, precision="auto"):
    """Held-out faces in batches, by name: degraded, guide, restored, target, landmarks, guide_landmarks.
    Degraded, and given exemplars, by (seed, scale, place) alone."""
    indices = with_others(faces, indices)
    for start in range(0, len(indices), batch):
        part = indices[start:start + batch]
        sets = [common.stack_person(faces, [i, *choose_exemplars(
            faces, i, cfg.exemplars, common.seeded(cfg.seed, 5, i))]) for i in part]
        images, points = (torch.stack(x) for x in zip(*sets))
        target, landmarks, exemplars, exemplar_landmarks = (
            images[:, 0].contiguous(), points[:, 0], images[:, 1:], points[:, 1:])
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        degraded = common.degrade(target, common.DEGRADATIONS[cfg.degradation], generator, scale)
        restored, chosen = restore(net, degraded, landmarks, exemplars, exemplar_landmarks, batch, precision)
        yield {"degraded": degraded, "guide": pick(exemplars, chosen), "restored": restored,
               "target": target, "landmarks": landmarks,
               "guide_landmarks": pick(exemplar_landmarks, chosen)}


def evaluate(net, faces, indices, cfg, device, precision="auto"):
    """The paper's ×4, ×8 on held-out faces → "test" of result.json: PSNR dB, SSIM, identity in degrees."""
    judge = common.recogniser(faces, "metric")
    table = {}
    for scale in (4, 8):
        columns = {"input": [], "restored": []}
        for batch in restored_batches(net, faces, indices, cfg, device, scale, precision=precision):
            target = batch["target"]
            for name, image in (("input", batch["degraded"]), ("restored", batch["restored"])):
                columns[name].append(torch.stack([common.psnr(image, target), common.ssim(image, target),
                                                  common.identity_distance(judge, image, target)]))
        values = {name: torch.cat(column, 1) for name, column in columns.items()}
        table[f"x{scale}"] = {"faces": values["input"].shape[1], **{
            name: dict(zip(("psnr", "ssim", "identity"), value.mean(1).tolist()))
            for name, value in values.items()},
            "paired_psnr_gain": common.paired_gain(values["restored"][0], values["input"][0], cfg.seed)}
    return table


def benchmark(net, cfg, args, device):
    """Time restore() on --batch faces of noise, a guide each: what a picture shows does not change the
    speed."""
    count = args.batch or 1
    degraded, guides = torch.rand(2, count, 3, cfg.size, cfg.size,
                                  generator=common.seeded(args.seed or 0, 7)) * 2 - 1
    points = common.mean_landmarks(cfg.size).expand(count, -1, -1)
    return common.benchmark(lambda: restore(net, degraded, points, guides[:, None], points[:, None], count,
                                            args.precision), count, device, args.precision)


def load_network(args, device):
    """The network of --checkpoint, and its Config. Spectral norm is folded in."""
    state = common.load_checkpoint(args.checkpoint, SCRIPT, device)
    cfg = Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in state["config"].items()})
    if args.preset and args.preset != cfg.preset:
        raise InputError(f"{args.checkpoint}: a checkpoint of --preset {cfg.preset}, not {args.preset}")
    encoder = None
    if not cfg.train_guide:
        encoder = (common.VGG(**state["arguments"]) if cfg.encoder == "vgg"
                   else common.Recogniser(**state["arguments"]).folded())
    net = build(cfg, encoder).to(device, memory_format=torch.channels_last)
    net.load_state_dict(state["net"])
    return common.fold(net.eval()), cfg


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
                        help="for --restore: a folder of sharp pictures of the same person, or one")
    parser.add_argument("--data", metavar="DIR",
                        help="a folder of one folder per identity (default: rendered faces)")
    parser.add_argument("--preset", choices=PRESETS,
                        help="tiny (default): minutes on a CPU; paper: the paper's sizes and schedule")
    parser.add_argument("--variant", choices=VARIANTS, help="an ablation row of the paper's Tables 1 and 2")
    parser.add_argument("--resume", action="store_true",
                        help="go on exactly where the last checkpoint stopped")
    parser.add_argument("--size", type=positive, help="pixels, a multiple of 16")
    parser.add_argument("--steps", type=positive, help="training steps")
    parser.add_argument("--batch", type=positive, help="faces a step and process")
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
                        help="for --restore: the authors' ASFFNet512.pth, a file or its address (https://…)")
    parser.add_argument("--vggface", metavar="FILE", help="VGG-Face weights, for --preset paper's losses")
    parser.add_argument("--landmarks", metavar="DIR",
                        help="a parallel folder of landmark files photo.jpg.txt")
    parser.add_argument("--aligned", action="store_true",
                        help="pictures are FFHQ-aligned crops; their landmarks are needed all the same")
    parser.add_argument("--overwrite", action="store_true", help="restore pictures again that have a result")
    parser.add_argument("--check", action="store_true",
                        help="also write the input with its landmarks and component boxes")
    args = parser.parse_args(argv)
    run = Path("runs") / (SCRIPT if args.variant in (None, "full") else f"{SCRIPT}-{args.variant}")
    if args.restore is None:
        run = Path(args.out or run)
    args.out = args.out or ("restored" if args.restore is not None else run)
    if args.weights is not None:
        for name in ("train", "evaluate", "checkpoint", "preset", "variant", "resume", "size"):
            if getattr(args, name):
                raise InputError(f"--weights and --{name} do not go together: --weights is the authors' "
                                 "network, to restore with")
    fresh = args.benchmark and args.checkpoint is None and args.weights is None
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
            if preset == "released" and variant != "full":
                raise InputError("--variant: the paper's ablations are of its own network, not of "
                                 "--preset released")
            cfg = replace(PRESETS[preset], variant=variant, **VARIANTS[variant], **chosen)
        if cfg.size % 16 or cfg.size < 64:
            raise InputError(f"--size {cfg.size}: must be a multiple of 16, at least 64")
    if args.train:
        train(cfg, args)
        return 0
    if fresh:
        torch.manual_seed(cfg.seed)
        net = build(cfg, None if cfg.train_guide else common.Recogniser())
    elif args.weights is not None:
        net, cfg = load_official(args.weights), RELEASED
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
    if args.reference is None:
        raise InputError("--restore wants --reference: a folder of sharp pictures of the same person")
    options = {"aligned": args.aligned, "landmarks": args.landmarks, "need_landmarks": True,
               "device": device}
    exemplars, exemplar_landmarks, names = common.read_references(args.reference, cfg.size, **options)

    def restore_crops(crops, landmarks, file):
        restored, chosen = restore(net, crops, landmarks, exemplars.expand(len(crops), *exemplars.shape),
                                   exemplar_landmarks.expand(len(crops), *exemplar_landmarks.shape),
                                   precision=args.precision)
        print(f"{file}: guided by {', '.join(sorted({str(names[k]) for k in chosen.tolist()}))}")
        return restored

    failures = common.restore_files(args.restore, args.out, cfg.size, restore_crops,
                                    overwrite=args.overwrite, check=args.check, **options)
    return 1 if failures else 0


# -----------------------------------------------------------------------------------------------------------
# 9. Released network
# -----------------------------------------------------------------------------------------------------------

# What the authors' published weights were trained as differs from the paper: two fixed groups of landmarks
# choose the guide; AdaIN comes before the warp; the warp inverts a fit around the guide's landmarks, leaves
# the jaw out, and is half a feature off; the attention is bounded by nothing; a block fuses twice; bilinear
# doublings paint the picture. All of it under spectral norm.

def normed(*sizes, bias=True, **options):
    """`convolution` under spectral norm."""
    layer = convolution(*sizes, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return spectral_norm(layer)


class Skip(nn.Module):
    """x + the layers."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


def released_pair(channels, first=1, second=1, last=nn.LeakyReLU(0.2)):
    """Two convolutions of these dilations, a LeakyReLU after each."""
    return [normed(channels, channels, dilation=first), nn.LeakyReLU(0.2),
            normed(channels, channels, dilation=second), last]


def released_extractor(width):
    """(B,3,H,W) → (B,2·width,H/4,W/4), the first stage at full size."""
    layers, before = [], 3
    for level, dilations in enumerate(((7, 5), (5, 3), (3, 1))):
        after = width * 2**level
        layers += [normed(before, after, stride=2 if level else 1), nn.LeakyReLU(0.2),
                   *(Skip(*released_pair(after, *dilations, nn.Identity())) for _ in range(2))]
        before = after
    return nn.Sequential(*layers, normed(before, 2 * width), nn.LeakyReLU(0.2))


def released_distance(landmarks, exemplar_landmarks):
    """Distance of each exemplar, (B,K): 1.01 · eyes and brows + 1.49 · mouth, each the root of an unweighted
    D_a² of Eq. (2). landmarks (B,68,2), exemplar_landmarks (B,K,68,2)."""
    eyes, mouth = torch.zeros(2, 68, device=landmarks.device)
    eyes[17:27] = eyes[36:48] = mouth[48:] = 1
    return sum(share * affine_distance(landmarks, exemplar_landmarks, group).sqrt()
               for share, group in ((1.01, eyes), (1.49, mouth)))


def released_mask(landmarks, size):
    """Squares of about 7 pixels at landmarks 17-67, none within 3 pixels of the top and left edges or 2 of
    the others: (B,68,2) → (B,1,size,size), 0 or 1."""
    points = landmarks[:, 17:, :, None]
    inside = ((points >= 3) & (points < size - 2)).all(2, keepdim=True)
    pixels = torch.arange(size, device=landmarks.device)
    x, y = (inside & (pixels >= points.floor() - 3) & (pixels <= points.ceil() + 2)).float().unbind(2)
    return (y.transpose(1, 2) @ x).clamp(max=1)[:, None]


def released_warp(features, landmarks, guide_landmarks, stride):
    """Moving least squares, inverted: at each position v an affine map of the guide's landmarks
    p to the degraded face's q is fitted, weights 1 / ‖p − v‖², and inverted: t = (v − q*) Q⁻¹ P + p*.

    features (B,C,n,n), landmarks in pixels → (B,C,n,n). Positions beyond the map's ends become 0.
    """
    goal, source = (points[:, None, 17:].double() / stride for points in (guide_landmarks, landmarks))
    size = features.shape[-1]
    line = torch.arange(size, device=features.device, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 1, 2)
    weights = 1 / ((goal - points).square().sum(-1, keepdim=True) + 2e-8)                # (B,n·n,51,1)
    goal_centre, centre = ((weights * x).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
                           for x in (goal, source))
    weighted = (weights * (goal - goal_centre)).transpose(-1, -2)
    inverse, singular = torch.linalg.inv_ex(weighted @ (source - centre))      # Q: singular only at a point
    position = (points - centre) @ inverse @ (weighted @ (goal - goal_centre)) + goal_centre
    position = torch.where(singular[..., None, None] > 0, points + centre - goal_centre, position)
    position = torch.where((position < 0) | (position > size - 1), 0.0, position)
    grid = (position.view(-1, size, size, 2) / (size / 2) - 1).float()
    return F.grid_sample(features.float(), grid, align_corners=False)


class ReleasedFusion(nn.Module):
    """Eq. (8) with an attention that no sigmoid bounds; the last of nine is all under spectral norm."""

    def __init__(self, channels, last=False):
        super().__init__()
        self.refine, self.refine_guide = (nn.Sequential(*released_pair(channels, last=nn.Identity()))
                                          for _ in range(2))
        self.reduce = nn.ModuleList(normed(channels, channels // 2, 1) for _ in range(3))
        gate = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.gate = nn.Sequential(normed(channels // 2 * 3, channels, bias=False), nn.LeakyReLU(0.2),
                                  spectral_norm(gate) if last else gate)

    def forward(self, features, guide_features, landmark_features):
        own, guided = self.refine(features), self.refine_guide(guide_features)
        mask = self.gate(torch.cat([reduce(x) for reduce, x in zip(
            self.reduce, (landmark_features, own, guided))], 1))
        return own + (guided - own) * mask, mask


class ReleasedBlock(nn.Module):
    """x + two fusions, each followed by two convolutions."""

    def __init__(self, channels):
        super().__init__()
        self.fusions = nn.ModuleList(ReleasedFusion(channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Sequential(
            normed(channels, channels, 5), nn.LeakyReLU(0.2), normed(channels, channels), nn.LeakyReLU(0.2))
            for _ in range(2))

    def forward(self, features, guide_features, landmark_features):
        x = features
        for fusion, layers in zip(self.fusions, self.convolutions):
            x, mask = fusion(x, guide_features, landmark_features)
            x = layers(x)
        return features + x, mask


class ReleasedContext(nn.Module):
    """MSDilate: x + four convolutions of dilations 4, 3, 2, 1, fused."""

    def __init__(self, channels):
        super().__init__()
        self.branches = nn.ModuleList(normed(channels, channels // 2, dilation=d) for d in (4, 3, 2, 1))
        self.fuse = nn.Sequential(normed(2 * channels, channels), nn.LeakyReLU(0.2),
                                  normed(channels, channels))

    def forward(self, x):
        return x + self.fuse(torch.cat([F.leaky_relu(branch(x), 0.2) for branch in self.branches], 1))


class ReleasedASFFNet(nn.Module):
    """The network of ASFFNet512.pth; interface and shapes of ASFFNet."""

    def __init__(self, cfg):
        super().__init__()
        channels, width = cfg.channels, cfg.channels // 2
        self.cfg, self.attention = cfg, []
        self.extract, self.extract_guide = released_extractor(width), released_extractor(width)
        self.extract_landmarks = landmark_features(channels)
        self.refine_guide = nn.Sequential(
            normed(channels, channels, 1), nn.LeakyReLU(0.2), Skip(*released_pair(channels)),
            normed(channels, channels, 1), nn.LeakyReLU(0.2), Skip(*released_pair(channels)),
            normed(channels, channels, 1), nn.LeakyReLU(0.2))
        self.blocks = nn.ModuleList([*(ReleasedBlock(channels) for _ in range(4)),
                                     ReleasedFusion(channels, last=True)])
        self.context = ReleasedContext(channels)

        def double():
            return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)

        def group(channels, dilation):
            return nn.Sequential(Skip(*released_pair(channels)),
                                 Skip(*released_pair(channels, dilation, dilation)))

        self.reconstruct = nn.Sequential(
            double(), normed(channels, channels), nn.LeakyReLU(0.2), group(channels, 2),
            normed(channels, width), nn.LeakyReLU(0.2), group(width, 2),
            double(), group(width, 1), normed(width, 3), nn.Tanh())

    def select(self, landmarks, exemplar_landmarks):
        return released_distance(landmarks, exemplar_landmarks).argmin(1)

    def forward(self, degraded, guide, landmarks, guide_landmarks):
        features, self.attention = self.extract(degraded), []
        guided = adain(self.extract_guide(guide), features)
        guided = self.refine_guide(released_warp(guided, landmarks, guide_landmarks, STRIDE))
        marks, x = self.extract_landmarks(released_mask(landmarks, degraded.shape[-1])), features
        for block in self.blocks:
            x, mask = block(x, guided, marks)
            self.attention.append(mask.detach())
        return self.reconstruct(self.context(x) + features).float()


def released_name(name):
    """A name in the official checkpoint → the name here; one to one."""
    path = name.split(".")
    path[-1] = {"weight_orig": "parametrizations.weight.original",
                "weight_u": "parametrizations.weight.0._u",
                "weight_v": "parametrizations.weight.0._v"}.get(path[-1], path[-1])
    models = {"LQ_Model": "extract", "Ref_Model": "extract_guide", "Mask_CModel": "extract_landmarks",
              "Component_CModel": "refine_guide", "UpModel": "reconstruct", "MSDilate": "context"}
    gates = {"MaskConcat": ("reduce", "0"), "DegradedConcat": ("reduce", "1"), "RefConcat": ("reduce", "2"),
             "MaskModel": ("gate",), "DegradedModel": ("refine",), "RefModel": ("refine_guide",)}
    model, *rest = path
    if model == "sff_branch":
        number, *rest = rest
        inner = ()
        if number != "4":
            inner = ("fusions" if rest[0][:3] == "sff" else "convolutions", rest[0][-1])
            rest = rest[1:]
        if rest[0] in gates:
            kind = gates[rest[0]]
            rest = [*kind, *rest[2 if kind[0] == "reduce" else 1:]]
        return ".".join(["blocks", number, *inner, *rest])
    if model in ("LQ_Model", "Ref_Model"):
        stage, *rest = rest                                      # conv1 … conv4, or stem1_1 … stem3_2
        place = 4 * (int(stage[4]) - 1) + (1 + int(stage[6]) if stage.startswith("stem") else 0)
        rest = [str(place), *(["body", *rest[1:]] if stage.startswith("stem") else rest[1:])]
    elif model == "MSDilate":
        rest = (["fuse", *rest[1:]] if rest[0] == "convi"
                else ["branches", str(int(rest[0][-1]) - 1), *rest[2:]])
    else:
        inner = {"model": (), "Model": ("body",), "Model0": ("0", "body"), "Model1": ("1", "body")}
        rest = [word for part in rest for word in inner.get(part, (part,))]
    return ".".join([models[model], *rest])


def load_official(source):
    """ASFFNet512.pth as its authors released it, a file, its address or its state dict → the network,
    frozen: degraded, guide (B,3,512,512) in [-1,1], landmarks, guide_landmarks (B,68,2) in pixels → restored
    (B,3,512,512). InputError for what does not fit."""
    return common.load_named(ReleasedASFFNet(RELEASED), source, released_name, "ASFFNet's weights")


if __name__ == "__main__":
    common.run_script(main)
