"""ASFFNet: blind face restoration with the best of several sharp pictures of the person.

Li, Li, Ren, Zhang, Wang, Zuo: "Enhanced Blind Face Restoration with Multi-Exemplar Images
and Adaptive Spatial Feature Fusion", CVPR 2020.

Of several sharp pictures of a person, one is nearest to the degraded one in pose and
expression. Landmarks find it, weighted by what has been learned to matter. Its features
are aligned by moving least squares on the landmarks, with nothing to train, and AdaIN
gives them the light of the degraded face. Four blocks fuse both. Each has a mask that
says where to trust the guide (eyes, beard) and where not (background).

Equation → name
    (1) ASFFNet                 (7) adain                  (13) style_loss
    (2) affine_distance         (8) ASFFBlock              (14) discriminator_loss
    (3) fit_affine              (9) Reconstruction         (15) adversarial_loss
    (4) ranking_loss           (10) pixel_loss             (16) photo_realistic_losses
    (5) moving_least_squares   (11) perceptual_loss        (17) the sum in train
    (6) warp_features          (12) reconstruction_losses  (18) common.degrade, "asffnet"

    python asffnet.py --train                   # rendered faces, minutes on two CPU cores
    python asffnet.py --evaluate                # on people it has never seen
    python asffnet.py --restore photo.jpg --reference album/ --aligned   # your pictures

Open in the paper, chosen here: the layers, those of the released network where they fit;
in Eq. (2) landmarks are in pixels of a 256×256 image; their weights are exponentials, so
that they stay positive; Eq. (4) is used every few steps; all blocks see the same aligned
guide and landmark features; the factor of Eq. (13) stands inside its norm; landmarks of
degraded faces are noisy in training, as a detector's are. TINY differs from the paper in
size, and in what Config says beside it.
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import common
from common import Claim, InputError

SCRIPT = "asffnet"
STRIDE = 4                           # pixels a feature


# 2. Config ----------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """Every number of the method. The defaults are TINY."""
    preset: str = "tiny"
    variant: str = "full"
    size: int = 128                  # pixels, height = width
    people: int = 288                # rendered ones, without --data
    seed: int = 0

    # Network
    exemplars: int = 5               # K of evaluation; 10 in the paper
    training_exemplars: int = 5      # K of training; 3 to 10 in the paper
    blocks: int = 4                  # ASFF blocks
    fusion: str = "asff"             # or "concat", or "none": without attention mask
    adain: bool = True               # Eq. (7)
    mls: bool = True                 # Eq. (5)
    train_guide: bool = True         # the guide's extractor is trained; else it is Ψ
    strides: tuple = (2, 2, 1)       # of the extractors' stages; (1, 2, 2) in the paper
    residual_blocks: int = 1         # in each of them
    channels: int = 48               # C of the features
    width: int = 16                  # channels at full size
    residual: bool = True            # added to I^d: a short training needs no copying
    discriminator_width: int = 16

    # Losses
    encoder: str = "recogniser"      # Ψ; "vgg" is VGG-Face, or VGG-19 without a file
    weight_pixel: float = 300.0      # λ_MSE
    weight_perceptual: float = 0.5   # λ_perc; 5 in the paper, with another encoder
    weight_style: float = 1.0        # λ_style
    weight_adversarial: float = 0.4      # λ_adv; 2 in the paper

    # Training
    learning_rate: float = 1e-3      # 5 times the paper's: the network is small
    weights_times: float = 30.0      # factor on it for the landmark weights; 1 in the paper
    rank_every: int = 10             # steps between two uses of Eq. (4)
    betas: tuple = (0.5, 0.999)      # β1, β2 of Adam
    clip: float | None = 1.0         # longest gradient; the paper clips none
    cooldown: float = 0.3            # last share of the steps: the rate falls to 0
    patience: int | None = None      # so many validations may be no better: after one
    plateau: float = 0.5             # more the rate is multiplied by this
    shift: float = 0.02              # largest random change of place, a share of the size
    jitter: float = 0.1              # of brightness and contrast
    landmark_noise: float = 0.008    # σ, a share of the size: 1 of 128 pixels
    steps: int = 620
    batch: int = 4                   # faces a process and step
    validate_every: int = 100        # steps; also when a checkpoint is written
    validated: int = 32              # validation faces
    tested: int | None = 128         # held-out faces measured at most, None: all
    degradation: str = "asffnet"     # Eq. (18)

    def rate(self, step):
        """The learning rate of a step from 1 on: constant, then falling to 0."""
        left = (self.steps - step + 1) / max(self.cooldown * self.steps, 1)
        return self.learning_rate * min(left, 1)


TINY = Config()
HOUR = replace(TINY, preset="hour", people=1500, steps=7_000, batch=8, validate_every=500)
PAPER = replace(TINY, preset="paper", size=256, exemplars=10, training_exemplars=10,
                strides=(1, 2, 2), residual_blocks=2, channels=128, width=64,
                residual=False, discriminator_width=64, encoder="vgg",
                weight_perceptual=5.0, weight_adversarial=2.0,
                learning_rate=2e-4, weights_times=1.0, clip=None, cooldown=0, patience=3,
                steps=1_000_000, batch=8, validate_every=5_000, validated=200,
                tested=None)
# The paper gives 3 days on one GPU, not steps.
RELEASED = replace(PAPER, preset="released", size=512)
PRESETS = {"tiny": TINY, "hour": HOUR, "paper": PAPER}

# Table 1 is one network, tested with K exemplars, so its rows are one training;
# --evaluate --variant exemplars-3 --checkpoint runs/asffnet/checkpoint.pt measures a row.
# Rendered people have five pictures besides the degraded one.
TABLE_1 = {f"exemplars-{k}": {"exemplars": k} for k in (1, 3, 5, 10)}
VARIANTS = {                         # the rows of Tables 1 and 2
    "full": {},
    **TABLE_1,
    "1-concat": {"blocks": 1, "fusion": "concat"},
    "4-concat": {"fusion": "concat"},
    "no-attention-1": {"blocks": 1, "fusion": "none"},
    "no-attention-4": {"fusion": "none"},
    "1-asff": {"blocks": 1},
    "2-asff": {"blocks": 2},
    "8-asff": {"blocks": 8},
    "no-adain": {"adain": False},
    "no-mls": {"mls": False},
    "untrained-guide-features": {"train_guide": False},
}
COLUMNS = ("x4_psnr", "x4_ssim", "x4_lpips", "x8_psnr", "x8_ssim", "x8_lpips")
PAPER_FIGURES = {name: dict(zip(COLUMNS, row)) for name, row in {
    "full": (28.07, 0.930, 0.103, 24.34, 0.881, 0.238),
    "exemplars-1": (27.99, 0.925, 0.107, 24.19, 0.873, 0.252),
    "exemplars-3": (28.03, 0.928, 0.104, 24.30, 0.879, 0.247),
    "exemplars-5": (28.06, 0.930, 0.103, 24.33, 0.881, 0.238),
    "exemplars-10": (28.07, 0.930, 0.103, 24.34, 0.881, 0.238),
    "1-concat": (27.56, 0.913, 0.243, 23.32, 0.863, 0.301),
    "4-concat": (27.59, 0.915, 0.212, 23.42, 0.864, 0.294),
    "no-attention-1": (27.57, 0.915, 0.167, 23.46, 0.865, 0.279),
    "no-attention-4": (27.83, 0.924, 0.139, 23.63, 0.872, 0.249),
    "1-asff": (27.59, 0.916, 0.141, 23.51, 0.865, 0.251),
    "2-asff": (27.67, 0.923, 0.124, 23.72, 0.873, 0.248),
    "8-asff": (28.07, 0.930, 0.103, 24.34, 0.881, 0.237),
    "no-adain": (28.01, 0.929, 0.112, 24.15, 0.880, 0.240),
    "no-mls": (26.45, 0.903, 0.214, 23.12, 0.854, 0.263),
    "untrained-guide-features": (27.58, 0.917, 0.155, 23.47, 0.865, 0.281),
}.items()}
CLAIMS = [                           # "full" has four ASFF blocks
    Claim("exemplars-3", "exemplars-1"), Claim("exemplars-5", "exemplars-3"),
    Claim("exemplars-10", "exemplars-1"),                                    # Table 1
    Claim("4-concat", "1-concat"), Claim("1-asff", "1-concat"), Claim("2-asff", "1-asff"),
    Claim("full", "2-asff"), Claim("full", "4-concat"), Claim("full", "no-attention-4"),
    Claim("no-attention-4", "no-attention-1"), Claim("full", "no-adain"),
    Claim("full", "no-mls"), Claim("full", "untrained-guide-features"),
    Claim("8-asff", "full", equal=True)]                                     # Table 2


# 3. Network ---------------------------------------------------------------------------

def homogeneous(points):
    """[x, y] → [x, y, 1]: (…,2) → (…,3)."""
    return torch.cat([points, torch.ones_like(points[..., :1])], -1)


def fit_affine(landmarks, exemplar_landmarks, weights):
    """Eq. (3): A = L^d W L̃^gᵀ (L̃^g W L̃^gᵀ)⁻¹, the affine map from each exemplar.

    landmarks (B,68,2), exemplar_landmarks (B,K,68,2), weights (68,) → (B,K,2,3), float64.
    """
    goal = landmarks.double()[:, None]                                      # (B,1,68,2)
    source = homogeneous(exemplar_landmarks.double())                       # (B,K,68,3)
    weighted = (weights.double()[:, None] * source).transpose(-1, -2)       # (B,K,3,68)
    moments = weighted @ source                                             # (B,K,3,3)
    # A hair on the diagonal, so that landmarks on one line have a map too.
    ridge = 1e-12 * moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    moments = moments + ridge * torch.eye(3).to(moments)
    return torch.linalg.solve(moments, weighted @ goal).transpose(-1, -2)


def affine_distance(landmarks, exemplar_landmarks, weights):
    """Eq. (2): D_a² = min_A Σ_m w_m ‖A L̃^g_m − L^d_m‖² of each exemplar, (B,K).

    Shapes as for fit_affine.
    """
    affine = fit_affine(landmarks, exemplar_landmarks, weights)
    moved = homogeneous(exemplar_landmarks.double()) @ affine.transpose(-1, -2)
    residuals = (moved - landmarks.double()[:, None]).square().sum(-1)      # (B,K,68)
    return (weights.double() * residuals).sum(-1)


class GuidanceSelection(nn.Module):
    """The landmark weights w of Eq. (2), which choose the guide.

    They begin at 1 for jaw and nose, which only move with the head, and at 0.1 for brows,
    eyes and mouth. They begin frozen: Eq. (17) does not reach them, only Eq. (4) does.
    """

    def __init__(self):
        super().__init__()
        weights = torch.full((68,), 0.1)
        for group in (common.JAW, common.NOSE_BRIDGE, common.NOSE_BASE):
            weights[group] = 1
        self.log_weights = nn.Parameter(weights.log(), requires_grad=False)

    def forward(self, landmarks, exemplar_landmarks, size):
        """D_a² of each exemplar, (B,K), of landmarks in pixels of a size×size image."""
        scale = 256 / size
        return affine_distance(scale * landmarks, scale * exemplar_landmarks,
                               self.log_weights.exp())


def feature_centres(size, stride):
    """x, y in pixels of the centres of features of `stride` pixels: (1,P,1,2) float64."""
    line = torch.arange(size // stride, dtype=torch.float64) * stride + (stride - 1) / 2
    x, y = torch.meshgrid(line, line, indexing="xy")
    return torch.stack([x, y], -1).view(1, -1, 1, 2)


def nearness(offsets):
    """W_p of Eq. (5): 1 / ‖p − L^d_m‖², scaled to the sum 1.

    offsets: L^d − p in pixels, (B,P,68,2) → (B,P,68,1). Distances are taken as at least
    1e-6 pixels: on a landmark the weight would be infinite.
    """
    weights = 1 / offsets.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return weights / weights.sum(2, keepdim=True)


def fit_matrix(source, goal, weights):
    """The 2×2 part of M_p in Eq. (5): A of the least Σ_m w_m ‖A source_m − goal_m‖².

    source, goal (B,P,68,2) around their weighted means, weights (B,P,68,1) → (B,P,2,2).
    """
    moments = (weights * source).transpose(-1, -2) @ source
    products = (weights * goal).transpose(-1, -2) @ source
    spread = moments.diagonal(dim1=-2, dim2=-1).sum(-1)                     # (B,P)
    flat = (torch.linalg.det(moments) <= 1e-9 * spread**2)[..., None, None]
    moments = torch.where(flat, torch.eye(2).to(moments), moments)
    affine = torch.linalg.solve(moments, products, left=False)
    return torch.where(flat, fit_similarity(products, spread), affine)


def fit_similarity(products, spread):
    """For landmarks on one line, which do not determine A: the best turn and scale. For
    landmarks in one point: the identity.

    products (B,P,2,2), spread (B,P) → (B,P,2,2).
    """
    point = spread <= 1e-16
    spread = torch.where(point, 1.0, spread)
    cosine = torch.where(point, 1.0, (products[..., 0, 0] + products[..., 1, 1]) / spread)
    sine = torch.where(point, 0.0, (products[..., 1, 0] - products[..., 0, 1]) / spread)
    return torch.stack([cosine, -sine, sine, cosine], -1).unflatten(-1, (2, 2))


def moving_least_squares(landmarks, guide_landmarks, size, stride):
    """Eq. (5): for each position p of the degraded image, p̂ = M_p p̃ in the guide.

    landmarks, guide_landmarks (B,68,2) in pixels of size×size images → (B,h,w,2), x and y
    in pixels, float64, for features of `stride` pixels. M_p is the affine map from L^d to
    L^g that fits best near p. All is measured from p, so p̂ is the map's value at the
    origin: there is no 3×3 inverse, and near a landmark nothing cancels.
    """
    points = feature_centres(size, stride).to(landmarks.device)
    source = landmarks.double()[:, None] - points                           # (B,P,68,2)
    goal = guide_landmarks.double()[:, None]                                # (B,1,68,2)
    weights = nearness(source)
    centre = (weights * source).sum(2, keepdim=True)                        # (B,P,1,2)
    goal_centre = (weights * goal).sum(2, keepdim=True)
    matrix = fit_matrix(source - centre, goal - goal_centre, weights)
    moved = goal_centre - centre @ matrix.transpose(-1, -2)
    return moved.view(len(landmarks), size // stride, size // stride, 2)


def warp_features(features, positions, stride):
    """Eq. (6): F^g,w(x,y) = Σ F^g(x',y') max(0, 1−|x̂−x'|) max(0, 1−|ŷ−y'|).

    The sum is over p̂'s four neighbours. features (B,C,h,w) of `stride` pixels, positions
    (B,h',w',2) in pixels → (B,C,h',w') float32. Beyond the map, its border goes on.
    """
    height, width = features.shape[2:]
    extent = torch.tensor([width, height], device=positions.device) * stride
    grid = (2 * positions + 1) / extent - 1
    return F.grid_sample(features.float(), grid.float(), padding_mode="border",
                         align_corners=False)


def statistics(features):
    """μ and σ of each channel over the positions: (B,C,h,w) → two (B,C,1,1)."""
    variance, mean = torch.var_mean(features, (2, 3), keepdim=True)
    return mean, (variance + 1e-5).sqrt()


def adain(guide_features, features):
    """Eq. (7): σ(F^d) (F^g,w − μ(F^g,w)) / σ(F^g,w) + μ(F^d); all (B,C,h,w), float32.

    The text below Eq. (7) swaps the words for σ and μ: σ is the standard deviation.
    """
    guide_features = guide_features.float()
    guide_mean, guide_deviation = statistics(guide_features)
    mean, deviation = statistics(features.float())
    return deviation * (guide_features - guide_mean) / guide_deviation + mean


def convolution(before, after, kernel=3, stride=1, dilation=1):
    """A convolution, zero-padded to the same size, with He's initialisation."""
    padding = dilation * (kernel - 1) // 2
    layer = nn.Conv2d(before, after, kernel, stride, padding, dilation)
    nn.init.kaiming_normal_(layer.weight, 0.2)
    nn.init.zeros_(layer.bias)
    return layer


def pair(channels, first=1, second=1):
    """Two 3×3 convolutions of these dilations, a LeakyReLU between."""
    return nn.Sequential(convolution(channels, channels, dilation=first),
                         nn.LeakyReLU(0.2),
                         convolution(channels, channels, dilation=second))


class Residual(nn.Module):
    """x + two 3×3 convolutions. It begins close to x."""

    def __init__(self, channels, first=1, second=1):
        super().__init__()
        self.body = pair(channels, first, second)
        with torch.no_grad():
            self.body[-1].weight *= 0.1

    def forward(self, x):
        return x + self.body(x)


def feature_extractor(cfg):
    """F^d or F^g of a picture, at a quarter of its size: (B,3,H,W) → (B,C,H/4,W/4).

    Three stages of ever smaller dilations, then a convolution to C channels.
    """
    stages = nn.Sequential()
    before = 3
    for stage, (first, second) in enumerate(((7, 5), (5, 3), (3, 1))):
        after = cfg.width * 2**stage
        stride = cfg.strides[stage]
        layers = [convolution(before, after, stride=stride), nn.LeakyReLU(0.2)]
        layers += [Residual(after, first, second) for _ in range(cfg.residual_blocks)]
        stages.add_module(f"stage{stage + 1}", nn.Sequential(*layers))
        before = after
    layers = [convolution(before, cfg.channels), nn.LeakyReLU(0.2)]
    stages.add_module("stage4", nn.Sequential(*layers))
    return stages


class UntrainedFeatures(nn.Module):
    """Row "untrain F_g" of Table 2: the recogniser's maps at a quarter of the size.

    Only a 1×1 convolution is trained, which brings them to C channels.
    """

    def __init__(self, encoder, channels):
        super().__init__()
        self.encoder = encoder
        self.channels = convolution(encoder.widths[1], channels, 1)

    def forward(self, guide):
        with torch.no_grad():
            features = self.encoder.features(guide)[1]
        return self.channels(features)


def landmark_extractor(channels):
    """F^l from a mask of landmarks: (B,1,H,W) → (B,C,H/4,W/4)."""
    layers = []
    before = 1
    for share, kernel, stride in ((8, 9, 2), (4, 7, 1), (2, 5, 2), (1, 3, 1)):
        after = channels // share
        layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
                   nn.LeakyReLU(0.2)]
        before = after
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.Sigmoid()]
    return nn.Sequential(*layers)


class ASFFBlock(nn.Module):
    """Eq. (8): (1 − F^m) ∘ F_d(F^d) + F^m ∘ F_g(F^g,w,a) → the fused features, and F^m.

    features, guide_features, landmark_features (B,C,h,w). Two rows of Table 2: "concat"
    fuses by a convolution of both and has no mask, "none" has a constant mask of 1/2.
    """

    def __init__(self, channels, fusion="asff"):
        super().__init__()
        self.fusion = fusion
        self.refine = Residual(channels)                                          # F_d
        self.refine_guide = Residual(channels)                                    # F_g
        if fusion == "concat":
            self.fuse = convolution(2 * channels, channels)
        if fusion == "asff":
            half = channels // 2
            self.reduce = convolution(channels, half, 1)
            self.reduce_guide = convolution(channels, half, 1)
            self.reduce_landmarks = convolution(channels, half, 1)
            self.gate = nn.Sequential(
                convolution(3 * half, channels), nn.LeakyReLU(0.2),
                nn.Conv2d(channels, channels, 3, padding=1), nn.Sigmoid())
            nn.init.constant_(self.gate[-2].bias, -2.0)    # begins by trusting F^d

    def mask(self, features, guide_features, landmark_features):
        """F^m of F^d, F^g,w,a and F^l, each reduced to half its channels first."""
        return self.gate(torch.cat([self.reduce_landmarks(landmark_features),
                                    self.reduce(features),
                                    self.reduce_guide(guide_features)], 1))

    def forward(self, features, guide_features, landmark_features):
        own = self.refine(features)
        guided = self.refine_guide(guide_features)
        if self.fusion == "concat":
            return self.fuse(torch.cat([own, guided], 1)), None
        mask = torch.full_like(own, 0.5)
        if self.fusion == "asff":
            mask = self.mask(features, guide_features, landmark_features)
        return own + mask * (guided - own), mask


class Reconstruction(nn.Sequential):
    """Eq. (9): Î = F_R(F^c), (B,C,h,w) → (B,3,4h,4w).

    Two pixel-shuffles, two residual blocks after each.
    """

    def __init__(self, cfg):
        layers = []
        before = cfg.channels
        for after in (2 * cfg.width, cfg.width):
            layers += [convolution(before, 4 * after), nn.PixelShuffle(2),
                       nn.LeakyReLU(0.2), Residual(after), Residual(after)]
            before = after
        super().__init__(*layers, nn.LeakyReLU(0.2), nn.Conv2d(before, 3, 3, padding=1))


class ASFFNet(nn.Module):
    """Eq. (1), once the guide is chosen: Î = F(I^d | L^d, I^g, L^g).

    degraded, guide (B,3,H,W) in [-1,1], landmarks, guide_landmarks (B,68,2) in pixels →
    restored. `attention` keeps the masks of the last call, for pictures. The encoder is
    needed for untrained guide features only.
    """

    def __init__(self, cfg, encoder=None):
        super().__init__()
        self.cfg = cfg
        self.attention = []
        self.selection = GuidanceSelection()
        self.extract = feature_extractor(cfg)
        if cfg.train_guide:
            self.extract_guide = feature_extractor(cfg)
        else:
            self.extract_guide = UntrainedFeatures(encoder, cfg.channels)
        if cfg.fusion == "asff":
            self.extract_landmarks = landmark_extractor(cfg.channels)
        self.blocks = nn.ModuleList(
            ASFFBlock(cfg.channels, cfg.fusion) for _ in range(cfg.blocks))
        self.reconstruct = Reconstruction(cfg)
        if cfg.residual:
            nn.init.zeros_(self.reconstruct[-1].weight)

    @torch.no_grad()
    def select(self, landmarks, exemplar_landmarks):
        """k* of Eq. (2): landmarks (B,68,2), exemplar_landmarks (B,K,68,2) → (B,)."""
        return self.selection(landmarks, exemplar_landmarks, self.cfg.size).argmin(1)

    def align(self, features, landmarks, guide_landmarks, stride=STRIDE):
        """Eq. (5) and (6): the guide's features where the degraded face has them."""
        if not self.cfg.mls:
            return features
        size = self.cfg.size
        positions = moving_least_squares(landmarks, guide_landmarks, size, stride)
        return warp_features(features, positions, stride)

    def forward(self, degraded, guide, landmarks, guide_landmarks, guide_features=None):
        features = self.extract(degraded)
        if guide_features is None:                          # else those of an earlier call
            guide_features = self.extract_guide(guide)
        guide_features = self.align(guide_features, landmarks, guide_landmarks)
        if self.cfg.adain:
            guide_features = adain(guide_features, features)
        landmark_features = None
        if self.cfg.fusion == "asff":
            mask = common.landmark_mask(landmarks, self.cfg.size)
            landmark_features = self.extract_landmarks(mask)
        self.attention = []
        for block in self.blocks:
            features, mask = block(features, guide_features, landmark_features)
            if mask is not None:
                self.attention.append(mask.detach())
        image = self.reconstruct(features).float()
        return degraded + image if self.cfg.residual else torch.tanh(image)


class Discriminator(nn.Module):
    """D: an SN-GAN patch discriminator, all under SN: (B,3,H,W) → scores (B,1,h,w)."""

    def __init__(self, width):
        super().__init__()
        layers = []
        for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, padding=1))
        for layer in self.layers[::2]:
            spectral_norm(layer)

    def forward(self, image):
        return self.layers(image)


# 4. Losses ----------------------------------------------------------------------------

def ranking_loss(distances, best):
    """Eq. (4): Σ_{k≠k*} max(0, 1 − (D_a²(L^d, L_k^g) − D_a²(L^d, L_k*^g))).

    distances (B,K), best (B,): k*, which restores best. A mean over the batch.
    """
    best = best[:, None]
    margin = F.relu(1 - (distances - distances.gather(1, best)))
    return margin.scatter(1, best, 0).sum(1).mean()


def pixel_loss(restored, target):
    """Eq. (10): ‖Î^h − I‖² / (C H W), a mean over the batch."""
    return F.mse_loss(restored.float(), target.float())


def perceptual_loss(features, target_features):
    """Eq. (11): Σ_u ‖Ψ_u(Î^h) − Ψ_u(I)‖² / (C_u H_u W_u), a mean over the batch.

    features, target_features: four maps (B,C_u,H_u,W_u).
    """
    pairs = zip(features, target_features)
    return sum(F.mse_loss(maps.float(), true.float()) for maps, true in pairs)


def style_loss(features, target_features):
    """Eq. (13): Σ_u ‖Ψ_u(Î^h)ᵀ Ψ_u(Î^h) − Ψ_u(I)ᵀ Ψ_u(I)‖², a mean over the batch.

    The printed factor 1 / (C_u H_u W_u) stands inside the norm, as in Johnson et al.
    (2016): see gram_matrix. Outside, the loss grows with the area, and λ_style = 1 drowns
    all others.
    """
    total = 0
    for maps, true in zip(features, target_features):
        change = (gram_matrix(maps) - gram_matrix(true)).square().sum((1, 2))
        total = total + change.mean()
    return total


def gram_matrix(maps):
    """ΨᵀΨ / (C h w), Ψ of h·w rows: (B,C,h,w) → (B,C,C), in float32."""
    with torch.autocast(maps.device.type, enabled=False):
        rows = maps.float().flatten(2)
        return rows @ rows.transpose(1, 2) / maps[0].numel()


def discriminator_loss(real, fake):
    """Eq. (14): −E[min(0, −1 + D(I))] − E[min(0, −1 − D(Î^h))].

    The paper's ℓ is what D maximises; this is its negative, to be minimised.
    """
    return F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()


def adversarial_loss(fake):
    """Eq. (15): −E[D(Î^h)]."""
    return -fake.float().mean()


def reconstruction_losses(restored, target, features, target_features, cfg):
    """Eq. (12): λ_MSE ℓ_MSE and λ_perc ℓ_perc, by name. The features are Ψ's."""
    perceptual = perceptual_loss(features, target_features)
    return {"pixel": cfg.weight_pixel * pixel_loss(restored, target),
            "perceptual": cfg.weight_perceptual * perceptual}


def photo_realistic_losses(features, target_features, fake, cfg):
    """Eq. (16): λ_style ℓ_style and λ_adv ℓ_adv,G, by name. fake: D's scores of Î^h."""
    return {"style": cfg.weight_style * style_loss(features, target_features),
            "adversarial": cfg.weight_adversarial * adversarial_loss(fake)}


# 5. Data ------------------------------------------------------------------------------

def with_others(faces, indices):
    """Those of the pictures whose person has another one, which can guide."""
    _, person, count = faces.identity.unique(return_inverse=True, return_counts=True)
    chosen = [i for i in indices if count[person[i]] > 1]
    if not chosen:
        raise InputError("no person has two pictures, one to restore and one to guide; "
                         "--data wants a folder per identity, each with several pictures")
    return chosen


def load_group(faces, i, count, generator):
    """Picture i and, behind it, `count` others of the person at random, its exemplars.

    Where there are fewer, they repeat. With a smaller `count` they are the first of those
    with a larger one.
    → images (1+K,3,H,W), landmarks (1+K,68,2).
    """
    others = faces.others(i)
    order = torch.randperm(len(others), generator=generator).tolist()
    exemplars = [others[order[k % len(order)]] for k in range(count)]
    return common.stack_person(faces, [i, *exemplars])


def pick(chosen, *sets):
    """Each face's exemplar: chosen (B,), sets (B,K,…) or for all (1,K,…) → (B,…) each."""
    rows = torch.arange(len(chosen), device=chosen.device)
    return [x.expand(len(chosen), *x.shape[1:])[rows, chosen] for x in sets]


def with_noise(landmarks, sigma, generator):
    """Landmarks (…,68,2) as a detector finds them in a degraded face, σ pixels off."""
    return landmarks + sigma * torch.randn(landmarks.shape, generator=generator)


class Batches(torch.utils.data.Dataset):
    """Training batch number `step`, from 0: see `sample`.

    Every face draws from a random stream of its own, (seed, step, place in the whole batch):
    resuming, or more processes of smaller batches, changes nothing.
    """
    def __init__(self, faces, indices, cfg):
        self.faces = faces
        self.indices = with_others(faces, indices)
        self.cfg = cfg
        self.first = common.rank() * cfg.batch

    def sample(self, step, place):
        """One face: degraded, target, its landmarks, exemplars, their landmarks.

        (3,H,W) twice, (68,2), (K,3,H,W), (K,68,2).
        """
        cfg = self.cfg
        generator = common.seeded(cfg.seed, 1, step, place)
        i = self.indices[torch.randint(len(self.indices), (), generator=generator)]
        images, landmarks = load_group(self.faces, i, cfg.training_exemplars, generator)
        images, landmarks = common.augment(images, landmarks, generator, cfg.shift,
                                           cfg.jitter)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade(images[:1], degradation, generator)           # Eq. (18)
        found = with_noise(landmarks[0], cfg.landmark_noise * cfg.size, generator)
        return degraded[0], images[0], found, images[1:], landmarks[1:]

    def __getitem__(self, step):
        samples = [self.sample(step, self.first + k) for k in range(self.cfg.batch)]
        return [torch.stack(part) for part in zip(*samples)]


# 6. Training --------------------------------------------------------------------------

def train(cfg, args):
    """Train on args.data, write the run into args.folder; see Config for every number."""
    faces = common.load_faces(args, cfg, need_landmarks=True)
    people, validation, test = common.split_identities(faces)
    validation = common.spread(with_others(faces, validation), cfg.validated)
    test = common.spread(with_others(faces, test), cfg.tested)
    encoder = common.load_encoder(cfg.encoder, args, faces)

    torch.manual_seed(cfg.seed)
    net = ASFFNet(cfg, encoder).to(args.device, memory_format=torch.channels_last)
    discriminator = Discriminator(cfg.discriminator_width).to(args.device)
    learned = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(learned, betas=cfg.betas, fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=cfg.betas, fused=True)
    group = {"params": net.selection.parameters(), "times": cfg.weights_times}
    optimizer_w = torch.optim.Adam([group], betas=cfg.betas, fused=True)
    run = common.Run(SCRIPT, cfg, args, faces, frozen={"encoder": encoder}, net=net,
                     discriminator=discriminator, optimizer=optimizer,
                     optimizer_d=optimizer_d, optimizer_w=optimizer_w)
    forward, forward_d = common.parallel(net, discriminator)
    distances, = common.parallel(net.selection.requires_grad_(True))   # a step of its own

    for step, batch in run.batches(Batches(faces, people, cfg)):
        degraded, target, landmarks, exemplars, exemplar_landmarks = batch
        common.set_rate(cfg.rate(step) * run.factor, optimizer, optimizer_d, optimizer_w)

        # Generator
        chosen = net.select(landmarks, exemplar_landmarks)                       # Eq. (2)
        guide, guide_landmarks = pick(chosen, exemplars, exemplar_landmarks)
        discriminator.requires_grad_(False)
        with common.autocast(args.device, args.precision):
            restored = forward(degraded, guide, landmarks, guide_landmarks)
            features = encoder.features(restored), encoder.features(target)
            losses = reconstruction_losses(restored, target, *features, cfg)
            losses |= photo_realistic_losses(*features, discriminator(restored), cfg)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()                                         # Eq. (17)
        if cfg.clip is not None:
            nn.utils.clip_grad_norm_(learned, cfg.clip)
        optimizer.step()

        # Discriminator
        discriminator.requires_grad_(True)
        with common.autocast(args.device, args.precision):
            real = forward_d(target)
            fake = forward_d(restored.detach())
            losses["discriminator"] = discriminator_loss(real, fake)
        optimizer_d.zero_grad(set_to_none=True)
        losses["discriminator"].backward()
        optimizer_d.step()

        # Landmark weights
        if step % cfg.rank_every == 0:
            losses["ranking"] = rank_exemplars(net, distances, optimizer_w, batch, args)

        run.log(step, losses)
        if run.due(step):
            run.save(step, validate(net, encoder, faces, validation, cfg))

    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


def rank_exemplars(net, distances, optimizer, batch, args):
    """One step on the landmark weights: try all exemplars, find the best, Eq. (4)."""
    degraded, target, landmarks, exemplars, exemplar_landmarks = batch
    errors = []
    with torch.no_grad(), common.autocast(args.device, args.precision):
        for k in range(exemplars.shape[1]):
            restored = net(degraded, exemplars[:, k], landmarks, exemplar_landmarks[:, k])
            errors.append((restored - target).square().mean((1, 2, 3)))
    best = torch.stack(errors, 1).argmin(1)                                   # k*, (B,)
    loss = ranking_loss(distances(landmarks, exemplar_landmarks, net.cfg.size), best)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss


@torch.inference_mode()
def validate(net, encoder, faces, indices, cfg):
    """Eq. (12) and PSNR in dB on held-out faces, always degraded alike."""
    device = next(net.parameters()).device
    loss, quality = 0.0, 0.0
    for batch in restored_batches(net, faces, indices, cfg, None):
        restored, target = batch["restored"].to(device), batch["target"].to(device)
        with common.autocast(device):
            features = encoder.features(restored), encoder.features(target)
            losses = reconstruction_losses(restored, target, *features, cfg)
        loss += sum(losses.values()).item() * len(target)
        quality += common.psnr(restored, target).sum().item()
    return {"validation": loss / len(indices), "validation_psnr": quality / len(indices)}


def samples(net, faces, indices, cfg, precision="auto"):
    """samples.png: six held-out faces at ×4; attention.png: where they use the guide."""
    six = common.spread(indices, 6)
    batch = next(restored_batches(net, faces, six, cfg, 4, precision=precision))
    batch["aligned guide"] = aligned_guides(net, batch["landmarks"], batch["guide"],
                                            batch["guide_landmarks"])
    names = ("degraded", "guide", "aligned guide", "restored", "target")
    columns = {name: batch[name] for name in names}
    pictures = {"samples.png": common.comparison_grid(columns)}
    if net.attention:
        pictures["attention.png"] = draw_attention(net.attention, batch)
    return pictures


def aligned_guides(net, landmarks, guides, guide_landmarks):
    """The guides (N,3,size,size) as pictures, moved like their features, Eq. (5), (6)."""
    def align(one):
        return net.align(guides[one], landmarks[one], guide_landmarks[one], 1)

    # One by one: at full size Eq. (5) has 68 weights a pixel.
    return common.in_batches(align, len(guides), 1)


def draw_attention(attention, batch):
    """A row a face, a column a block: F^m, averaged over its channels; black to white is
    the range in the title."""
    columns = {name: batch[name] for name in ("degraded", "aligned guide")}
    for number, mask in enumerate(attention, 1):
        mask = mask.float().mean(1, keepdim=True).cpu()
        low, high = mask.min().item(), mask.max().item()
        grey = 2 * (mask - low) / max(high - low, 1e-6) - 1
        picture = F.interpolate(grey, batch["target"].shape[2:]).expand(-1, 3, -1, -1)
        columns[f"{number}: {low:.2f}-{high:.2f}"] = picture
    return common.comparison_grid(columns)


# 7. Restoration -----------------------------------------------------------------------

def restore(net, degraded, landmarks, exemplars, exemplar_landmarks, batch=8,
            precision="auto", known=None):
    """Restore faces, each guided by the best of its exemplars.

    degraded (N,3,size,size) in [-1,1], landmarks (N,68,2), exemplars (N,K,3,size,size) and
    their landmarks, or one set (1,K,…) for all → restored, the chosen k (N,), on the CPU.
    known: {k: features of exemplar k}, where one set serves all; missing ones are added.
    """
    with common.inference(net, precision) as device:
        chosen = net.select(landmarks.to(device), exemplar_landmarks.to(device)).cpu()
        guides, guide_landmarks = pick(chosen, exemplars, exemplar_landmarks)

        def some(part):
            images = degraded[part].to(device, memory_format=torch.channels_last)
            guide = guides[part].to(device, memory_format=torch.channels_last)
            guide_features = None
            if known is not None:
                for place, k in enumerate(chosen[part].tolist()):
                    if k not in known:
                        known[k] = net.extract_guide(guide[place:place + 1])
                guide_features = torch.cat([known[k] for k in chosen[part].tolist()])
            restored = net(images, guide, landmarks[part].to(device),
                           guide_landmarks[part].to(device), guide_features)
            return restored.float().clamp(-1, 1).cpu()

        return common.in_batches(some, len(degraded), batch), chosen


def guidance(net, degraded, landmarks, guides, guide_landmarks, precision="auto"):
    """For --check: the guide of each face, as it was aligned, and where the last block
    trusts it, F^m (white: most)."""
    masks = []
    for face in range(len(degraded)):                 # net.attention is of one call alone
        one = slice(face, face + 1)
        restore(net, degraded[one], landmarks[one], guides[one, None],
                guide_landmarks[one, None], precision=precision)
        masks += [mask.float().mean(1, keepdim=True).cpu() for mask in net.attention[-1:]]
    aligned = aligned_guides(net, landmarks, guides, guide_landmarks)
    shown = {"guide": guides, "aligned guide": aligned}
    if masks:
        mask = F.interpolate(torch.cat(masks), degraded.shape[2:])
        shown["trusted"] = 2 * mask.expand(-1, 3, -1, -1) - 1
    return shown


def restored_batches(net, faces, indices, cfg, scale, batch=16, precision="auto",
                     noise=0.0, mistaken=False):
    """Held-out faces in batches, by name; "faces" are their indices in the data.

    noise: σ in pixels, added to the degraded faces' landmarks. mistaken: somebody else's
    exemplars.
    """
    def groups(some):
        loaded = [load_group(faces, i, cfg.exemplars, common.seeded(cfg.seed, 5, i))
                  for i in some]
        return [torch.stack(part) for part in zip(*loaded)]

    for start in range(0, len(indices), batch):
        some = indices[start:start + batch]
        images, points = groups(some)
        target, landmarks = images[:, 0].contiguous(), points[:, 0]
        if mistaken:
            images, points = groups(common.stranger(faces, indices, i) for i in some)
        degradation = common.DEGRADATIONS[cfg.degradation]
        degraded = common.degrade_each(target, degradation, scale, cfg.seed, some)
        generator = common.seeded(cfg.seed, 4, scale or 0, start)
        landmarks = with_noise(landmarks, noise, generator)
        sets = images[:, 1:], points[:, 1:]
        restored, chosen = restore(net, degraded, landmarks, *sets, batch, precision)
        guide, guide_landmarks = pick(chosen, *sets)
        yield {"faces": torch.tensor(some), "degraded": degraded, "guide": guide,
               "restored": restored, "target": target, "landmarks": landmarks,
               "guide_landmarks": guide_landmarks}


def evaluate(net, faces, indices, cfg, args):
    """×4, ×8 and random scales on held-out faces → "test" of result.json.

    Landmarks are those of the sharp faces. At ×4 there is also a column with landmarks
    twice as noisy as in training.
    The column `stranger` is what the network makes of somebody else's exemplars.
    """
    metrics = common.metrics(faces, args)
    ways = {"restored": False}                             # are the exemplars mistaken?
    if len(faces.identity[indices].unique()) > 1:
        ways["stranger"] = True
    table = {}
    for task, scale in common.TASKS.items():
        batches = {way: restored_batches(net, faces, indices, cfg, scale,
                                         precision=args.precision, mistaken=mistaken)
                   for way, mistaken in ways.items()}
        table[task] = common.measure(batches, metrics)
    noisy = restored_batches(net, faces, indices, cfg, 4, precision=args.precision,
                             noise=2 * cfg.landmark_noise * cfg.size)
    table["x4"]["noisy_landmarks"] = common.measure({"restored": noisy}, metrics)["restored"]
    return table


def evaluate_network(net, cfg, args):
    """--evaluate: measure a network on held-out faces and write what was found."""
    faces = common.load_faces(args, cfg, need_landmarks=True)
    test = common.test_faces(faces, args, cfg.tested, lambda some: with_others(faces, some))
    run = common.Run(SCRIPT, cfg, args, faces)
    common.report(run, evaluate(net, faces, test, cfg, args),
                  samples(net, faces, test, cfg, args.precision))


def load_network(args):
    """The network of the checkpoint, and its Config."""
    cfg = common.recorded_config(args, Config)
    if args.variant in TABLE_1:
        cfg = replace(cfg, variant=args.variant, **TABLE_1[args.variant])
    encoder = None if cfg.train_guide else common.load_encoder(cfg.encoder, args, None)
    net = ASFFNet(cfg, encoder)
    common.load_part(net, args.state, "net")
    return net, cfg


# 8. Command line ----------------------------------------------------------------------

def main(argv=None):
    parser = common.arguments(__doc__, PRESETS, VARIANTS)
    parser.add_argument("--reference", metavar="PATH",
                        help="for --restore: a folder of sharp pictures of the same "
                             "person, or one")
    args = common.parse(parser, argv, SCRIPT)
    if args.train:
        for run in common.planned_runs(args, SCRIPT, PRESETS, VARIANTS, CLAIMS, PAPER_FIGURES,
                                       tested="exemplars"):
            if run.evaluate:
                net, cfg = load_network(run)
                evaluate_network(net.to(run.device), cfg, run)
                continue
            cfg = common.chosen_config(run, PRESETS, VARIANTS)
            common.check_size(cfg.size, 16)
            train(cfg, run)
        return 0

    if args.weights:
        net, cfg = load_official(args.weights), RELEASED
    else:
        net, cfg = load_network(args)
    net = common.for_inference(net, args.device, args.precision)
    if args.evaluate:
        evaluate_network(net, cfg, args)
        return 0

    if args.reference is None:
        raise InputError("--restore wants --reference: a folder of sharp pictures of the "
                         "same person")
    exemplars, exemplar_landmarks, exemplar_files = common.read_references(
        args.reference, cfg.size, args, need_landmarks=True)
    known = {}                                  # features of exemplars, made when chosen

    def restore_crops(crops, landmarks, files):
        restored, chosen = restore(net, crops, landmarks, exemplars[None],
                                   exemplar_landmarks[None], precision=args.precision,
                                   known=known)
        for file, k in zip(files, chosen.tolist()):
            print(f"{file}: guided by {exemplar_files[k]}")
        if not args.check:
            return restored, {}
        guides = exemplars[chosen], exemplar_landmarks[chosen]
        return restored, guidance(net, crops, landmarks, *guides, args.precision)

    failures = common.restore_files(args, cfg.size, restore_crops, need_landmarks=True)
    return 1 if failures else 0


# 9. Released network ------------------------------------------------------------------
# What the authors' published weights were trained as differs from the paper: two fixed
# groups of landmarks choose the guide; AdaIN comes before the warp; the warp inverts a
# fit around the guide's landmarks, leaves the jaw out, and is half a feature off; the
# gate sees refined features, and nothing bounds the attention; a block fuses twice;
# bilinear doublings paint the picture. All but the masks are under spectral norm.

def released_distance(landmarks, exemplar_landmarks):
    """Distance of each exemplar: 1.01 · eyes and brows + 1.49 · mouth, (B,K).

    Each is the root of an unweighted D_a² of Eq. (2). Shapes as for fit_affine.
    """
    eyes, mouth = torch.zeros(2, 68, device=landmarks.device)
    eyes[[*range(17, 27), *range(36, 48)]] = 1
    mouth[48:] = 1
    return (1.01 * affine_distance(landmarks, exemplar_landmarks, eyes).sqrt()
            + 1.49 * affine_distance(landmarks, exemplar_landmarks, mouth).sqrt())


def released_mask(landmarks, size):
    """Squares of about 7 pixels at landmarks 17-67: (B,68,2) → (B,1,size,size), 0 or 1.

    A landmark within 3 pixels of the top or left edge, or 2 of the others, has none.
    """
    points = landmarks[:, 17:, :, None]
    inside = ((points >= 3) & (points < size - 2)).all(2, keepdim=True)
    pixels = torch.arange(size, device=landmarks.device)
    near = (pixels >= points.floor() - 3) & (pixels <= points.ceil() + 2)
    x, y = (inside & near).float().unbind(2)                                # (B,51,size)
    return (y.transpose(1, 2) @ x).clamp(max=1)[:, None]


def released_warp(features, landmarks, guide_landmarks, stride):
    """Moving least squares, inverted: t = (v − q*) Q⁻¹ P + p* for each position v.

    An affine map of the guide's landmarks p to the degraded face's q is fitted, weights
    1 / ‖p − v‖², and inverted. features (B,C,n,n), landmarks (B,68,2) in pixels →
    (B,C,n,n). Positions beyond the map's ends become 0.
    """
    size = features.shape[-1]
    points = feature_centres(size, 1).to(features.device)                   # v
    goal = guide_landmarks[:, None, 17:].double() / stride                  # p
    source = landmarks[:, None, 17:].double() / stride                      # q
    weights = 1 / ((goal - points).square().sum(-1, keepdim=True) + 2e-8)   # (B,n·n,51,1)
    total = weights.sum(2, keepdim=True)
    goal_centre = (weights * goal).sum(2, keepdim=True) / total             # p*
    centre = (weights * source).sum(2, keepdim=True) / total                # q*
    weighted = (weights * (goal - goal_centre)).transpose(-1, -2)
    # Q is singular only where all landmarks lie in a point: there a shift is left.
    inverse, singular = torch.linalg.inv_ex(weighted @ (source - centre))
    position = (points - centre) @ inverse @ weighted @ (goal - goal_centre) + goal_centre
    shifted = points + centre - goal_centre
    position = torch.where(singular[..., None, None] > 0, shifted, position)
    position = torch.where((position < 0) | (position > size - 1), 0.0, position)
    grid = (position.view(-1, size, size, 2) / (size / 2) - 1).float()
    return F.grid_sample(features.float(), grid, align_corners=False)


class ReleasedResidual(Residual):
    """x + two convolutions, a LeakyReLU after each."""

    def forward(self, x):
        return x + F.leaky_relu(self.body(x), 0.2)


class ReleasedFusion(ASFFBlock):
    """Eq. (8), its gate behind the refined features, without a bound."""

    def __init__(self, channels):
        super().__init__(channels)
        self.refine = pair(channels)
        self.refine_guide = pair(channels)
        self.gate = nn.Sequential(
            nn.Conv2d(channels // 2 * 3, channels, 3, padding=1, bias=False),
            nn.LeakyReLU(0.2), nn.Conv2d(channels, channels, 3, padding=1, bias=False))

    def forward(self, features, guide_features, landmark_features):
        own = self.refine(features)
        guided = self.refine_guide(guide_features)
        mask = self.mask(own, guided, landmark_features)
        return own + mask * (guided - own), mask


class ReleasedBlock(nn.Module):
    """x + two fusions, each followed by two convolutions."""

    def __init__(self, channels):
        super().__init__()
        for number in (0, 1):
            self.add_module(f"sff{number}", ReleasedFusion(channels))
            self.add_module(f"conv{number}", nn.Sequential(
                convolution(channels, channels, 5), nn.LeakyReLU(0.2),
                convolution(channels, channels), nn.LeakyReLU(0.2)))

    def forward(self, features, guide_features, landmark_features):
        x, _ = self.sff0(features, guide_features, landmark_features)
        x, mask = self.sff1(self.conv0(x), guide_features, landmark_features)
        return features + self.conv1(x), mask


class MSDilate(nn.Module):
    """x + four convolutions of dilations 4, 3, 2, 1, fused."""

    def __init__(self, channels):
        super().__init__()
        for number in (1, 2, 3, 4):
            branch = convolution(channels, channels // 2, dilation=5 - number)
            self.add_module(f"conv{number}", branch)
        self.fuse = nn.Sequential(convolution(2 * channels, channels), nn.LeakyReLU(0.2),
                                  convolution(channels, channels))

    def forward(self, x):
        branches = self.conv1(x), self.conv2(x), self.conv3(x), self.conv4(x)
        return x + self.fuse(F.leaky_relu(torch.cat(branches, 1), 0.2))


class ReleasedASFFNet(ASFFNet):
    """The network of ASFFNet512.pth."""

    def __init__(self, cfg):
        super().__init__(cfg)
        del self.selection
        channels, width = cfg.channels, cfg.width

        def pointwise():
            return convolution(channels, channels, 1), nn.LeakyReLU(0.2)

        def group(width, dilation):
            return nn.Sequential(ReleasedResidual(width),
                                 ReleasedResidual(width, dilation, dilation))

        self.refine_guide = nn.Sequential(
            *pointwise(), ReleasedResidual(channels), *pointwise(),
            ReleasedResidual(channels), *pointwise())
        blocks = [ReleasedBlock(channels) for _ in range(4)]
        self.blocks = nn.ModuleList([*blocks, ReleasedFusion(channels)])
        self.context = MSDilate(channels)
        double = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.reconstruct = nn.Sequential(
            double, convolution(channels, channels), nn.LeakyReLU(0.2), group(channels, 2),
            convolution(channels, width), nn.LeakyReLU(0.2), group(width, 2),
            double, group(width, 1), convolution(width, 3), nn.Tanh())
        plain = [*self.extract_landmarks]
        for block in blocks:
            plain += [block.sff0.gate[-1], block.sff1.gate[-1]]
        for layer in [*self.modules()]:
            if isinstance(layer, nn.Conv2d) and layer not in plain:
                spectral_norm(layer)

    def select(self, landmarks, exemplar_landmarks):
        return released_distance(landmarks, exemplar_landmarks).argmin(1)

    def align(self, features, landmarks, guide_landmarks, stride=STRIDE):
        return released_warp(features, landmarks, guide_landmarks, stride)

    def forward(self, degraded, guide, landmarks, guide_landmarks, guide_features=None):
        features = self.extract(degraded)
        if guide_features is None:
            guide_features = self.extract_guide(guide)
        guide_features = adain(guide_features, features)
        guide_features = self.align(guide_features, landmarks, guide_landmarks)
        guide_features = self.refine_guide(guide_features)
        mask = released_mask(landmarks, degraded.shape[-1])
        landmark_features = self.extract_landmarks(mask)
        self.attention = []
        x = features
        for block in self.blocks:
            x, mask = block(x, guide_features, landmark_features)
            self.attention.append(mask.detach())
        return self.reconstruct(self.context(x) + features).float()


FUSION = r"sff_branch\.(\d\.sff\d|4)"
RELEASED_NAMES = [                           # pattern in the checkpoint, name here
    (r"LQ_Model\.conv(\d)\.0\.(.+)", r"extract.stage\1.0.\2"),
    (r"LQ_Model\.stem(\d)_1\.stem\.(.+)", r"extract.stage\1.2.body.\2"),
    (r"LQ_Model\.stem(\d)_2\.stem\.(.+)", r"extract.stage\1.3.body.\2"),
    (r"Ref_Model\.conv(\d)\.0\.(.+)", r"extract_guide.stage\1.0.\2"),
    (r"Ref_Model\.stem(\d)_1\.stem\.(.+)", r"extract_guide.stage\1.2.body.\2"),
    (r"Ref_Model\.stem(\d)_2\.stem\.(.+)", r"extract_guide.stage\1.3.body.\2"),
    (r"Mask_CModel\.model\.(.+)", r"extract_landmarks.\1"),
    (r"Component_CModel\.model\.(\d)\.Model\.(.+)", r"refine_guide.\1.body.\2"),
    (r"Component_CModel\.model\.(.+)", r"refine_guide.\1"),
    (r"sff_branch\.(\d\.conv\d)\.(.+)", r"blocks.\1.\2"),
    (FUSION + r"\.MaskConcat\.0\.(.+)", r"blocks.\1.reduce_landmarks.\2"),
    (FUSION + r"\.DegradedConcat\.0\.(.+)", r"blocks.\1.reduce.\2"),
    (FUSION + r"\.RefConcat\.0\.(.+)", r"blocks.\1.reduce_guide.\2"),
    (FUSION + r"\.MaskModel\.(.+)", r"blocks.\1.gate.\2"),
    (FUSION + r"\.DegradedModel\.(.+)", r"blocks.\1.refine.\2"),
    (FUSION + r"\.RefModel\.(.+)", r"blocks.\1.refine_guide.\2"),
    (r"MSDilate\.(conv\d)\.0\.(.+)", r"context.\1.\2"),
    (r"MSDilate\.convi\.(.+)", r"context.fuse.\1"),
    (r"UpModel\.(\d)\.Model(\d)\.(.+)", r"reconstruct.\1.\2.body.\3"),
    (r"UpModel\.(.+)", r"reconstruct.\1"),
]


def load_official(source):
    """ASFFNet512.pth as its authors released it → the network, frozen.

    source: a file, its address or its state dict. InputError for what does not fit.
    """
    return common.load_named(ReleasedASFFNet(RELEASED), source, RELEASED_NAMES,
                             "ASFFNet's weights")


if __name__ == "__main__":
    common.run_script(main)
