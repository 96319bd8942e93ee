"""--variant all: every row of a paper's table, and what the table claims."""
import csv
import importlib
import json

import pytest
import torch
from conftest import KILLED, TINY

import common
from common import Claim

SCRIPTS = list(TINY)
ROWS = {        # a few rows of each: what rows share, and one that is only tested otherwise
    "restoreformer": ["full", "exp1", "recognition-dictionary"],
    "asffnet": ["full", "exemplars-3", "no-adain"],
    "dfdnet": ["full", "no-cadain", "k64"]}


def few_rows(script):
    rows = ROWS[script]
    same = 'script.VARIANTS["k64"] = {"entries": 8}' if script == "dfdnet" else ""     # TINY's
    return f"""
common._write_log = lambda *a: None
{same}
script.VARIANTS = {{name: script.VARIANTS[name] for name in {rows}}}
script.CLAIMS = [common.Claim("full", name) for name in {rows[1:]}]
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_claims_name_rows_that_the_paper_gives_in_the_claims_order(name):
    script = importlib.import_module(name)
    assert script.PAPER_FIGURES.keys() == script.VARIANTS.keys() or name == "restoreformer"
    for claim in script.CLAIMS:
        assert claim.better in script.VARIANTS and claim.worse in script.VARIANTS
        better, worse = (script.PAPER_FIGURES.get(row, {}) for row in (claim.better, claim.worse))
        for column in set(better) & set(worse) - {"random_fid"}:
            if column.endswith("_psnr"):
                assert better[column] >= worse[column], (claim, column)
            if column.endswith("_idd"):
                assert better[column] < worse[column], (claim, column)


def write_faces(folder, values):
    """faces.csv of one column from {(task, metric): [a value a face]}."""
    folder.mkdir()
    table = {}
    for (task, metric), numbers in values.items():
        table.setdefault(task, {"restored": {}})["restored"][metric] = torch.tensor(numbers)
    for columns in table.values():
        columns["input"] = {metric: 0 * numbers for metric, numbers in columns["restored"].items()}
    table = {task: {"indices": range(len(columns["restored"]["psnr"])), "each": columns}
             for task, columns in table.items()}
    common._write_faces(folder / "faces.csv", table)


def test_a_claim_is_judged_by_paired_differences_over_both_tasks_and_all_seeds(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folders = {"good": [], "bad": []}
    expected = []
    for seed in range(2):
        base = torch.randn(40, generator=generator) * 3 + 25          # faces differ far more than rows do
        gain = torch.randn(40, generator=generator) * 0.1 + 0.3
        expected.append(gain)
        for row, extra in (("good", gain), ("bad", torch.zeros(40))):
            folder = tmp_path / f"{row}{seed}"
            write_faces(folder, {
                ("x4", "psnr"): (base + 2 * extra).tolist(), ("x8", "psnr"): base.tolist(),
                ("random", "psnr"): (base - 9 * extra).tolist(),
                ("x4", "identity"): (base - extra).tolist(), ("x8", "identity"): (base - extra).tolist(),
                ("random", "identity"): base.tolist()})
            folders[row].append(folder)
    mean = torch.cat(expected).mean().item()
    figures = {"good": {"x4_psnr": 28.0, "x8_psnr": 24.0, "x4_ssim": 0.9},
               "bad": {"x4_psnr": 27.0, "x8_psnr": 23.5, "x4_ssim": 0.8}}

    for metric in ("psnr", "identity"):                      # less identity distance is better
        found = common._judge_claim(Claim("good", "bad", metric), folders, figures)
        assert found["difference"] == pytest.approx(mean, abs=1e-3)
        low, high = found["ci95"]
        spread = torch.cat(expected).std().item() / 80 ** 0.5
        assert low == pytest.approx(mean - 1.96 * spread, abs=0.5 * spread)
        assert high == pytest.approx(mean + 1.96 * spread, abs=0.5 * spread)
        assert found["verdict"] == "seen" and found["paper"] == pytest.approx(0.75)
    assert common._judge_claim(Claim("bad", "good"), folders, figures)["verdict"] == "reversed"
    assert common._judge_claim(Claim("good", "good"), folders, {})["verdict"] == "not seen"
    assert common._judge_claim(Claim("good", "bad", equal=True), folders, {})["verdict"] == "not seen"
    assert common._judge_claim(Claim("good", "good", equal=True), folders, {})["verdict"] == "seen"


@pytest.fixture
def train_rows(run, people, tmp_path):
    def train_rows(script, folder, death="", status=0):
        return run(script, "--train", "--variant", "all", "--data", people, "--out", folder, cwd=tmp_path,
                   changes=few_rows(script) + death, status=status)
    return train_rows


@pytest.mark.slow
def test_rows_killed_at_any_point_and_started_again_equal_an_unbroken_run(train_rows, tmp_path):
    for place in (("full", 5), ("recognition-dictionary", 1)):           # with and without a checkpoint
        death = KILLED.format(f"(run.cfg.variant, step) == {place}")
        train_rows("restoreformer", "killed/one", death, status=-9)
    assert not (tmp_path / "killed" / "one" / "ablation.json").exists()
    for folder in ("killed", "whole"):
        train_rows("restoreformer", f"{folder}/one")
    texts = [(tmp_path / folder / "one" / "ablation.json").read_text() for folder in ("killed", "whole")]
    assert texts[0] == texts[1]

    rows = [tmp_path / "whole" / name for name in ("one", "one-exp1", "one-recognition-dictionary")]
    full, exp1, recognition = (common.load_weights(row / "dictionary.pt")["net"]["dictionary.codes"]
                               for row in rows)
    assert torch.equal(full, exp1) and not torch.equal(full, recognition)     # stage 1, once a kind


@pytest.mark.slow
@pytest.mark.parametrize("script", ["asffnet", "dfdnet"])
def test_rows_are_trained_once_and_finished_ones_are_left_alone(script, train_rows, tmp_path):
    done = train_rows(script, "runs/one")
    runs = tmp_path / "runs"
    folders = sorted(path.name for path in runs.iterdir())
    if script == "asffnet":                          # the same network, tested with three exemplars
        assert folders == ["one", "one-exemplars-3", "one-no-adain"]
        assert not (runs / "one-exemplars-3" / "checkpoint.pt").exists()
    else:                                            # k64 is the same run as full
        assert folders == ["one", "one-no-cadain"]
        assert done.stdout.count("dictionaries: ") == 1

    found = json.loads((runs / "one" / "ablation.json").read_text())
    assert list(found["rows"]) == ROWS[script] and len(found["claims"]) == 2
    with open(runs / "one" / "faces.csv", newline="") as file:
        ours = [float(line["psnr"]) for line in csv.DictReader(file)
                if (line["task"], line["column"]) == ("x8", "restored")]
    assert found["rows"]["full"]["x8"]["psnr"] == pytest.approx(sum(ours) / len(ours), abs=1e-4)

    times = {file: file.stat().st_mtime_ns for file in runs.rglob("result.json")}
    train_rows(script, "runs/one", KILLED.format("(run.cfg.variant, step) == ('full', 1)"))
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


@pytest.mark.slow
def test_seeds_are_pooled_and_each_has_its_folder(run, people, tmp_path):
    rows = 'script.VARIANTS = {"full": {}, "no-guide": script.VARIANTS["no-guide"]}\n' \
           'script.CLAIMS = [common.Claim("full", "no-guide", "identity")]'
    command = ["gfrnet", "--train", "--variant", "all", "--data", people]
    done = run(*command, "--seeds", 2, cwd=tmp_path, changes=rows)
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == [
        "gfrnet", "gfrnet-no-guide", "gfrnet-no-guide-seed1", "gfrnet-seed1"]
    found = json.loads((runs / "gfrnet" / "ablation.json").read_text())
    psnr = [json.loads((runs / name / "result.json").read_text())["test"]["x4"]["restored"]["psnr"]
            for name in ("gfrnet", "gfrnet-seed1")]
    assert psnr[0] != psnr[1] and found["seeds"] == 2
    assert found["rows"]["full"]["x4"]["psnr"] == pytest.approx(sum(psnr) / 2)
    claim, = found["claims"]
    assert claim["metric"] == "identity" and claim["verdict"] in ("seen", "not seen", "reversed")
    assert "claims are seen" in done.stdout

    (runs / "gfrnet-seed1" / "faces.csv").unlink()              # of a version that wrote none: measured again
    run(*command, "--seeds", 2, cwd=tmp_path, changes=rows)
    assert json.loads((runs / "gfrnet" / "ablation.json").read_text()) == found

    other = run(*command, "--steps", 8, cwd=tmp_path, changes=rows, status=2)
    assert "holds a run of another steps" in other.stderr
    assert json.loads((runs / "gfrnet" / "result.json").read_text())["steps"] == 6
