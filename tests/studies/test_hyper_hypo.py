"""The study of hyper and hypo units, on words made of tones."""

from __future__ import annotations

import dataclasses
import io
import json
import wave

import numpy as np
import pytest
import torch

from liveweight.runs.recipe import RecipeError, build
from liveweight.runs.sound.audio import read_recordings
from liveweight.studies import STUDIES, hyper_hypo
from liveweight.studies.grid import run_study
from liveweight.studies.hyper_hypo import HyperHypoOptions, SpeechData, disturb, make_fold
from liveweight.studies.hyper_hypo_page import CLEAN, SEEN, verdicts, write

SPEAKERS = ("ada", "bea", "cid", "dan")
RATE = 8000


def tone(digit: int, speaker: int, take: int) -> bytes:
    rng = np.random.default_rng([digit, speaker, take])
    time = np.arange(2400 + 160 * take) / RATE
    share = np.linspace(0, 1, len(time))
    path = (share, 1 - share, np.sin(np.pi * share))[digit]  # pitch goes up, down, up and down
    pitch = (600 + 2000 * path) * (1 + 0.06 * speaker)
    heard = np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    heard = 0.6 * heard + 0.02 * rng.standard_normal(len(time))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.round(16000 * heard).clip(-32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    for digit in range(3):
        for s, speaker in enumerate(SPEAKERS):
            for take in range(12):
                path = folder / f"{digit}_{speaker}_{take}.wav"
                path.write_bytes(tone(digit, s, take))
    return folder


def options_of(words, **more) -> HyperHypoOptions:
    values = {
        "seeds": [0],
        "folds": [1],
        "noises": ["white"],
        "snrs": [5],
        "epochs": 8,
        "batch_size": 14,
        "adapt_epochs": [1, 1],
        "lr": 3e-3,
    }
    return HyperHypoOptions(data=SpeechData(str(words)), **(values | more))


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "hyper-hypo"
    return run_study(hyper_hypo.STUDY, options_of(words), out), out


def rows_of(folder) -> dict[str, dict]:
    return {e["cell"]["condition"]: e["cell"] | e["row"] for e in folder.entries()}


# -- data


def test_folds_hold_two_speakers_back_and_takes_below_five_of_the_others(words):
    fold = make_fold(read_recordings(words), 1)
    assert fold.targets == ("cid", "dan") and set(fold.unseen.speakers) == {"cid", "dan"}
    assert set(fold.train.speakers) == set(fold.seen.speakers) == {"ada", "bea"}
    assert fold.train.takes.min() == 5 and fold.seen.takes.max() == 4
    assert [len(fold.train), len(fold.seen), len(fold.unseen)] == [42, 30, 72]
    with pytest.raises(RecipeError, match="fold 2 needs two of 4 speakers"):
        make_fold(read_recordings(words), 2)


@pytest.mark.parametrize("noise", ["white", "babble"])
def test_noise_is_the_same_at_every_ratio(words, noise):
    fold = make_fold(read_recordings(words), 0)
    loud, soft = (disturb(fold, noise, snr, seed=7) for snr in (0, 20))
    assert disturb(fold, "", 0, seed=7) is fold.unseen
    for a, b, quiet in zip(loud.waves[:5], soft.waves[:5], fold.unseen.waves, strict=False):
        torch.testing.assert_close(a - quiet, 10 * (b - quiet), atol=1e-5, rtol=1e-3)
        assert float((a - quiet).norm() / quiet.norm()) == pytest.approx(1, rel=1e-4)
    assert loud.speakers == fold.unseen.speakers and torch.equal(loud.takes, fold.unseen.takes)


# -- cells and rows


def test_cells_are_every_seed_pair_and_condition():
    cells = hyper_hypo.cells(HyperHypoOptions())
    assert len(cells) == 3 * 3 * (2 + 2 * 4)
    assert cells[0] == {"seed": 0, "fold": 0, "condition": SEEN}
    assert [c["condition"] for c in cells[1:7]] == [
        CLEAN, "white 20 dB", "white 10 dB", "white 5 dB", "white 0 dB", "babble 20 dB",
    ]  # fmt: skip
    assert STUDIES["hyper-hypo"] is hyper_hypo.STUDY


@pytest.mark.parametrize(
    ("values", "words_"),
    [
        ({"noises": ["pink"]}, "some of white, babble, got 'pink'"),
        ({"layers": "conv"}, "linear or all, got 'conv'"),
        ({"folds": []}, "folds must be"),
        ({"adapt_epochs": [3]}, "adapt_epochs must be two"),
    ],
)
def test_options_that_cannot_be_are_named(values, words_):
    with pytest.raises(RecipeError, match=words_):
        hyper_hypo.cells(build(values, HyperHypoOptions))


def test_data_must_be_given(tmp_path):
    with pytest.raises(RecipeError, match="data.path must be given"):
        run_study(hyper_hypo.STUDY, HyperHypoOptions(seeds=[0]), tmp_path / "x")


def test_the_net_learns_and_every_treatment_is_measured(done):
    rows = rows_of(done[0])
    assert list(rows[SEEN]["errors"]) == [
        "before", "without hypo", "without hyper", "without both", "without random",
    ]  # fmt: skip
    assert rows[SEEN]["errors"]["before"] < 0.1 and rows[SEEN]["train_error"] < 0.1
    assert rows[SEEN]["samples"] == 30 and rows[SEEN]["targets"] == ["cid", "dan"]
    for condition in (CLEAN, "white 5 dB"):
        row = rows[condition]
        assert list(row["errors"])[-3:] == ["blind", "selective", "selective, random"]
        assert row["samples"] == 36 and 0 < row["sure"] <= 1
        assert all(0 <= e <= 1 for e in row["errors"].values())
    units = rows[SEEN]["units"]
    assert units["layer"] == ["classifier.1", "classifier.4"] and units["units"] == [128, 128]
    assert min(units["hypo"]) >= 13 and min(units["hyper"]) >= 13  # a tenth of 128
    assert rows[CLEAN]["units"] == units


def test_a_repetition_gives_the_same_rows_whichever_cell_comes_first(done, words, tmp_path):
    options = options_of(words)
    only = run_study(
        hyper_hypo.STUDY, options, tmp_path / "b", only=lambda c: c["condition"] == "white 5 dB"
    )
    (entry,) = only.entries()
    assert entry["cell"] | entry["row"] == rows_of(done[0])["white 5 dB"]


def test_all_layers_may_be_searched(words, done):
    options = dataclasses.replace(options_of(words), layers="all")
    fold = make_fold(read_recordings(words), 1)
    net = hyper_hypo.new_net(3, 0, "cpu")
    found = hyper_hypo.find(net, fold, options)
    assert list(found) == ["features.0", "features.3", "features.6", "classifier.1", "classifier.4"]
    drawn = hyper_hypo.at_random(found.units(), 3)
    assert {n: int(d.sum()) for n, d in drawn.items()} == {
        n: int(u.sum()) for n, u in found.units().items()
    }


# -- page


def test_the_page_shows_claims_errors_units_and_a_plot(done):
    folder, out = done
    text = (out / "README.md").read_text()
    assert "| the paper's claim" in text and "Selective adaptation is better than blind" in text
    assert "white 5 dB" in text and "classifier.4" in text and "one pair of speakers" in text
    assert "![Error against the signal-to-noise ratio](error.png)" in text
    assert (out / "error.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((out / "rows.json").read_text())) == 3
    assert all(claim.holds is None for claim in verdicts(list(rows_of(folder).values())))


def made_up(gain: dict[str, float]) -> list[dict]:
    """Rows of four nets; a treatment's error is 0.4 minus its gain, give or take by net."""
    names = ("without hypo", "without hyper", "without both", "without random")
    rows = []
    for net in range(4):
        for condition, noise in ((CLEAN, ""), ("white 5 dB", "white"), ("white 0 dB", "white")):
            errors = {"before": 0.4 + 0.02 * net}
            for name in (*names, "blind", "selective", "selective, random"):
                errors[name] = errors["before"] - gain.get(name, 0.0) + 0.001 * (-1) ** net
            row = {"seed": net // 2, "fold": net % 2, "condition": condition, "noise": noise}
            units = {"layer": ["fc"], "units": [4], "hypo": [net], "hyper": [1]}
            rows.append(row | {"snr": 5, "errors": errors, "units": units})
    return rows


def test_claims_are_decided_by_paired_differences():
    gain = {"without hyper": 0.03, "without both": -0.05, "blind": 0.02, "selective": 0.1}
    found = {claim.text: claim for claim in verdicts(made_up(gain))}
    assert len(found) == 8
    holds = {
        "Removing hypo units improves": None,  # as much up as down
        "Removing hyper units improves": True,
        "Removing hyper and hypo units improves": False,
        "Selective adaptation is better": True,
    }
    for text, claim in found.items():
        (expected,) = [value for words_, value in holds.items() if text.startswith(words_)]
        assert claim.holds is expected, text
    seen = next(c.seen for t, c in found.items() if t.startswith("Selective"))
    assert seen == "41.00 % blind, 33.00 % selective: 8.00 points less (± 0.00, 4 nets)"


def test_the_page_is_written_while_noise_is_missing(tmp_path):
    from liveweight.studies.grid import StudyFolder

    rows = [row for row in made_up({}) if row["condition"] == CLEAN]
    text = write(rows, HyperHypoOptions(), StudyFolder(tmp_path))
    assert "error.png" not in text and "in noise |" not in text and "| fc" in text
    rows = [row | {"condition": SEEN} for row in rows]
    assert "training speakers" in write(rows, HyperHypoOptions(), StudyFolder(tmp_path))
