"""How much faster is restoring here than with the authors' form of the same network?

    python tests/benchmark.py dfdnet        # or asffnet, dmdnet, restoreformer, gfrnet

Both forms get the same random weights and the same pictures, and restore in turn, in one
process. The plain form is the released network as its authors wrote it, in eval mode:
- every spectral norm is computed in every call; float32; NCHW
- DFDNet brings all entries to the statistics of every component, one face at a time
- DMDNet paints the result without references before the one with them
Ours is what --restore uses: `load_official`, then `for_restoration`, under autocast.
GFRNet's authors released no network: its plain form is the one of the paper, as trained.

Loading is not timed, nor is making DMDNet's specific memory: both forms have it stored.
Where the authors' scripts do more than the network needs, the plain form does not: it
makes no power iteration, and DFDNet's dictionary is on the device before the first call.

Printed for each form: the median of the seconds, memory (weights, dictionary and what is
needed while it restores), the work of convolutions and matrix products in TFLOP, and
its speed as a share of that of 2048³ matrix products in the same precision, timed in turn
with it.
"""
import argparse
import ctypes
import gc
import importlib
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import official  # noqa: E402

import common  # noqa: E402

METHODS = ("gfrnet", "asffnet", "dfdnet", "dmdnet", "restoreformer")
PRODUCTS = {"cpu": 4, "cuda": 100}      # matrix products timed at once, by device


# 1. The two forms: calls without arguments that return the restored faces (B,3,H,W) ---

def network(method, size, state, files):
    """The released network filled with `state`; GFRNet's of the paper with seed 0."""
    script = importlib.import_module(method)
    if method == "gfrnet":
        torch.manual_seed(0)
        return script.GFRNet(replace(script.PAPER, size=size)).eval()
    if method == "dfdnet":
        return script.load_official(state, dictionary=files)
    return script.load_official(state)


def unfolded(make, *args):
    """make(*args), but spectral norms stay as in the file: W / (uᵀWv) in every call."""
    with mock.patch("torch.nn.utils.parametrize.remove_parametrizations"):
        return make(*args)


def plain_form(method, size, state, files, given, device):
    """The network as its authors wrote it. files: DFDNet's dictionary, {name: array}."""
    few = {name: array[:1] for name, array in files.items()}      # PlainTransfer has all
    net = unfolded(network, method, size, state, few).to(device)
    given = [x.to(device) for x in given]
    if method == "dfdnet":
        net.encoder.to(device)
        for name, block in net.blocks.items():
            net.blocks[name] = PlainTransfer(block, files).to(device)
        faces = list(zip(given[0].split(1), given[1].split(1)))
        return lambda: torch.cat([net(*face) for face in faces])
    if method == "dmdnet":
        degraded, boxes, references, their_boxes = given
        specific = net.extract_specific(references[0], their_boxes[0])
        return lambda: two_passes(net, degraded, boxes, specific)[1]
    if method == "gfrnet":
        return lambda: net(*given)[0]
    return lambda: net(*given)


def our_form(method, size, state, files, given, device, precision):
    """The network as --restore uses it."""
    script = importlib.import_module(method)
    prepare = getattr(script, "for_restoration", common.for_inference)
    net = prepare(network(method, size, state, files), device, precision)
    given = [x.to(device) for x in given]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    forward = net
    if method == "dmdnet":
        degraded, boxes, references, their_boxes = given
        given = [degraded, boxes, net.extract_specific(references[0], their_boxes[0])]
        forward = net.read_and_paint

    def call():
        with common.autocast(device, precision):
            restored = forward(*given)
        return restored[0] if method == "gfrnet" else restored
    return call


class PlainTransfer(nn.Module):
    """DFDNet's dictionary transfer with nothing computed in advance, for one face."""

    def __init__(self, block, files):
        super().__init__()
        self.stride = block.stride
        self.confidence = block.confidence
        for part, side in zip(official.PARTS, block.sizes):
            entries = torch.from_numpy(files[f"{part}_{512 // block.stride}_center.npy"])
            self.register_buffer(part, entries.view(len(entries), -1, side, side))

    def forward(self, features, boxes):
        enriched = features.clone()
        corners = (boxes[0].long() // self.stride).tolist()
        for index, (x1, y1, x2, y2) in enumerate(corners):
            part = features[:, :, y1:y2, x1:x2]
            entries = getattr(self, official.PARTS[index])
            query = F.interpolate(part, entries.shape[2:], mode="bilinear")
            restyled = adain(entries, query)                               # all K entries
            best = (restyled.flatten(1) @ query.flatten()).argmax()
            matched = F.interpolate(restyled[best][None], part.shape[2:])
            enriched[:, :, y1:y2, x1:x2] = self.confidence[index](part, matched)
        return enriched


def adain(content, style):
    """content (K,C,h,w) with each channel's mean and deviation in style (1,C,h,w)."""
    def statistics(x):
        return x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()

    mean, deviation = statistics(content)
    style_mean, style_deviation = statistics(style)
    return (content - mean) / deviation * style_deviation + style_mean


def two_passes(net, degraded, boxes, specific):
    """DMDNet's results without and with references. The encoder works once for both."""
    features = net.extract(degraded)
    with mock.patch.object(net.extract, "forward", lambda image: features):
        generic = net.read_and_paint(degraded, boxes)
        return generic, net.read_and_paint(degraded, boxes, specific)


# 2. Measuring -------------------------------------------------------------------------

def memory(device, peak=False):
    """GB in use now, of the GPU or of the process; `peak`: the most since the last call
    without it. NaN where the system does not tell."""
    if device.type == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated(device) / 1e9
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e9
    try:
        if not peak:
            gc.collect()
            ctypes.CDLL("libc.so.6").malloc_trim(0)    # give back what is free
            Path("/proc/self/clear_refs").write_text("5")             # 5: forget the peak
        field = "VmHWM:" if peak else "VmRSS:"
        status = Path("/proc/self/status").read_text()
        return int(status.split(field)[1].split()[0]) * 1024 / 1e9
    except OSError:
        return float("nan")


def measured(build, device):
    """Make a form → its call, what it paints, TFLOP of a call, GB it holds and needs."""
    before = memory(device)
    call = build()
    with FlopCounterMode(display=False) as counter:
        call()
    memory(device)
    painted = call().float().clamp(-1, 1).cpu()
    needed = memory(device, peak=True) - before
    return call, painted, counter.get_total_flops() / 1e12, needed


def seconds(call, device):
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def in_turn(calls, device, rounds):
    """Seconds of each call, a list a call. In turn: other load then slows all alike."""
    rows = [[seconds(call, device) for call in calls] for _ in range(rounds)]
    return [list(column) for column in zip(*rows)]


def matrix_product(device, dtype):
    """A call of so many 2048³ matrix products, and their TFLOP."""
    count = PRODUCTS[device.type]
    factor = torch.randn(2048, 2048, device=device).to(dtype)
    flags = torch.backends.cuda.matmul

    def call():
        exact = flags.allow_tf32
        flags.allow_tf32 = torch.backends.cudnn.allow_tf32       # as convolutions have it
        for _ in range(count):
            torch.mm(factor, factor)
        flags.allow_tf32 = exact
    return call, count * 2 * 2048**3 / 1e12


def precision_of(device, precision):
    """The type that convolutions run in under this --precision."""
    with common.autocast(device, precision):
        low = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if low else torch.float32


# 3. Command line ----------------------------------------------------------------------

@torch.inference_mode()
def compare(method, size, batch, device, precision, rounds, entries):
    """Measure both forms of a method → figures by name, most of them [plain, ours]."""
    if method == "gfrnet":
        state = {}
        given = [official.picture(name, size) for name in ("degraded", "guide")]
    else:
        state = official.weights(method)
        *_, given = official.inputs(method, size).values()
    given = [x.repeat(batch, *[1] * (x.ndim - 1)) for x in given]
    files = {}

    def make_plain():
        if method == "dfdnet":
            files.update(official.dictionary(entries))
        return plain_form(method, size, state, files, given, device)

    def make_ours():
        return our_form(method, size, state, files, given, device, precision)

    plain, their_picture, *their_needs = measured(make_plain, device)
    ours, our_picture, *our_needs = measured(make_ours, device)
    state.clear()
    common.keep_freed_memory()
    dtypes = [torch.float32, precision_of(device, precision)]
    products = [matrix_product(device, dtype) for dtype in dtypes]
    calls = [plain, ours, products[0][0], products[1][0]]
    in_turn(calls, device, 1)                                            # to warm up
    times = in_turn(calls, device, rounds)

    work, needed = zip(their_needs, our_needs)
    shares = []
    for k, (_, product_work) in enumerate(products):
        pairs = zip(times[k], times[2 + k])
        each = [work[k] / taken / (product_work / product) for taken, product in pairs]
        shares.append(statistics.median(each))
    return {"precision": [str(dtype).removeprefix("torch.") for dtype in dtypes],
            "seconds": [statistics.median(column) for column in times[:2]],
            "memory": needed, "work": work, "share": shares,
            "ratios": [theirs / own for theirs, own in zip(times[0], times[1])],
            "psnr": common.psnr(our_picture, their_picture).min().item()}


def print_table(figures):
    """The figures, a column a form."""
    def row(name, values, form=""):
        print(f"{name:24}" + "".join(f"{format(value, form):>10}" for value in values))

    row("", ["plain", "ours"])
    row("precision", figures["precision"])
    row("seconds, median", figures["seconds"], ".3f")
    row("memory, GB", figures["memory"], ".2f")
    row("work, TFLOP", figures["work"], ".3f")
    row("of a matrix product", figures["share"], ".0%")
    ratios = figures["ratios"]
    spread = f"  ({min(ratios):.2f} to {max(ratios):.2f})"
    row("times faster, by pair", [f"{statistics.median(ratios):.2f}", spread])
    row("PSNR between both, dB", [figures["psnr"]], ".1f")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--size", type=int, help="pixels (512; GFRNet 256)")
    parser.add_argument("--batch", type=int, default=1, help="faces a call (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"),
                        default="auto", help="of ours; plain is float32")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of calls (5)")
    parser.add_argument("--entries", type=int, default=512,
                        help="of DFDNet's dictionary (512, which need 10 GB)")
    args = parser.parse_args(argv)
    size = args.size or (256 if args.method == "gfrnet" else 512)
    device = torch.device(args.device)
    where = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{args.method}, {size}×{size}, batch {args.batch}, {where}")
    if args.method == "dfdnet":
        print(f"{args.entries} entries")
    if args.method == "gfrnet":
        print("no network was released: plain is the paper's, as trained, float32, NCHW")
    figures = compare(args.method, size, args.batch, device, args.precision, args.rounds,
                      args.entries)
    print_table(figures)


if __name__ == "__main__":
    main()
