"""benchmark.py: the plain dictionary transfer, the measuring, what both forms paint."""
import types

import benchmark
import official
import pytest
import torch
from torch import nn

import gfrnet

CPU = torch.device("cpu")


def test_adain_gives_every_entry_the_statistics_of_the_component():
    entries = torch.randn(3, 2, 5, 5)
    component = 4 * torch.randn(1, 2, 5, 5) + 7
    restyled = benchmark.adain(entries, component)
    for entry in restyled:
        for channel in range(2):
            own, wanted = entry[channel], component[0, channel]
            torch.testing.assert_close(own.mean(), wanted.mean(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(own.std(), wanted.std(), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(restyled[0], restyled[1])


def test_the_plain_transfer_pastes_the_entry_that_a_component_was_made_of():
    files = official.dictionary(3)
    block = types.SimpleNamespace(stride=16, sizes=(5, 5, 3, 6),
                                  confidence=[lambda part, matched: matched] * 4)
    transfer = benchmark.PlainTransfer(block, files)
    features = 0.1 * torch.randn(1, 512, 32, 32)
    boxes = [[0, 0, 5, 5], [10, 0, 15, 5], [0, 10, 3, 13], [10, 10, 16, 16]]
    wanted = []
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        entry = getattr(transfer, official.PARTS[k])[2 - k % 3]
        features[0, :, y1:y2, x1:x2] = 2 * entry + 1
        wanted.append(2 * entry + 1)
    enriched = transfer(features, 16.0 * torch.tensor([boxes]))
    outside = features.clone()
    for (x1, y1, x2, y2), entry in zip(boxes, wanted):
        inside = enriched[0, :, y1:y2, x1:x2]
        torch.testing.assert_close(inside, entry, atol=1e-3, rtol=1e-3)
        outside[0, :, y1:y2, x1:x2] = inside
    assert torch.equal(outside, enriched)


@torch.inference_mode()
def test_work_and_memory_of_a_call_are_those_of_its_layers():
    def build():
        layer = nn.Conv2d(3, 8, 3, padding=1)

        def call():
            torch.ones(50, 1000, 1000).add_(1)                     # 0.2 GB, for a moment
            return layer(torch.zeros(1, 3, 64, 64))
        return call

    _, painted, work, needed = benchmark.measured(build, CPU)
    assert painted.shape == (1, 8, 64, 64)
    assert work == pytest.approx(2 * 8 * 64 * 64 * 27 / 1e12)
    assert needed != needed or 0.19 < needed < 0.25


def test_both_forms_of_a_small_network_paint_the_same_picture(capsys, monkeypatch):
    monkeypatch.setattr(gfrnet, "PAPER", gfrnet.TINY)
    monkeypatch.setitem(benchmark.PRODUCTS, "cpu", 1)
    figures = benchmark.compare("gfrnet", 64, 1, CPU, "float32", 1, 4)
    assert figures["psnr"] > 90 and len(figures["ratios"]) == 1 and min(figures["seconds"]) > 0
    benchmark.print_table(figures)
    assert "times faster, by pair" in capsys.readouterr().out
