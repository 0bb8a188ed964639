"""Interrupted trainings: the same weights as without an interruption, and no checkpoint taken for another's."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowverify.errors import InvalidInputError, ModelFileError
from flowverify.training import RECIPES, EpochReport, Recipe, train, train_and_save

LOSSES = {
    "certified": {"radius": 0.3, "warm_up": 0.5, "refresh": 3},
    "adversarial": {"iterations": 2, "every": 1},
    "cross-entropy": {},
    "wasserstein-noise": {"sigma": 0.01},
}


def recipe(loss: str, epochs: int = 4) -> Recipe:
    return Recipe(
        "mine", "digits", "mlp", hidden=(16,), epochs=epochs, batch_size=100, loss=loss, loss_options=LOSSES[loss]
    )


class StopHereError(Exception):
    pass


def interrupt_after(epoch: int):
    def stop(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise StopHereError

    return stop


@pytest.mark.parametrize("loss", LOSSES)
def test_goes_on_to_the_same_bits(loss: str, tmp_path: Path) -> None:
    whole = train(recipe(loss))
    file, metrics = tmp_path / "state.pt", tmp_path / "metrics.jsonl"
    for epoch in (1, 3):
        with pytest.raises(StopHereError):
            train(recipe(loss), on_epoch=interrupt_after(epoch), checkpoint=file, metrics=metrics)
    seen: list[EpochReport] = []
    rest = train(recipe(loss), on_epoch=seen.append, checkpoint=file, metrics=metrics)
    assert [report.epoch for report in seen] == [4] and [report.epoch for report in rest.history] == [1, 2, 3, 4]
    assert [report.loss for report in rest.history] == [report.loss for report in whole.history]
    for ours, theirs in zip(rest.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[3]["loss"] == whole.history[3].loss


KILLED = """
import signal, sys
from flowverify.training import train_and_save

def here(epoch, step, steps):
    if (epoch, step) == (4, 2):
        print("here", flush=True)
        signal.pause()

train_and_save(*sys.argv[1:], on_step=here)
"""


def test_killed_process_resumes_to_the_same_file(tmp_path: Path) -> None:
    source = tmp_path / "mine.json"
    source.write_text(json.dumps(recipe("certified", epochs=6).to_dict()))
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    checkpoint, metrics = killed / "mine.checkpoint.pt", killed / "mine.metrics.jsonl"
    command = [sys.executable, "-c", KILLED, str(source), str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL and checkpoint.exists()
    assert len(metrics.read_text().splitlines()) == 3 and not (killed / "mine.onnx").exists()
    for folder in (killed, whole):
        train_and_save(source, folder)
    assert (killed / "mine.onnx").read_bytes() == (whole / "mine.onnx").read_bytes()
    assert len(metrics.read_text().splitlines()) == 6
    assert not checkpoint.exists()


class TestForeignCheckpoints:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        with pytest.raises(StopHereError):
            train(recipe("cross-entropy"), on_epoch=interrupt_after(1), checkpoint=tmp_path / "state.pt")
        return tmp_path / "state.pt"

    def test_other_recipe_is_refused(self, checkpoint: Path) -> None:
        other = replace(recipe("cross-entropy"), seed=3)
        with pytest.raises(InvalidInputError, match=r"state\.pt: saved with seed 0, given 3, expected a checkpoint of"):
            train(other, checkpoint=checkpoint)

    def test_other_images_are_refused(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("flowverify.training.loop.training_digest", lambda data: "another")
        with pytest.raises(InvalidInputError, match="saved with other training images"):
            train(recipe("cross-entropy"), checkpoint=checkpoint)

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00."], ids=["empty", "text", "pickle"])
    def test_broken_file_is_refused(self, checkpoint: Path, content: bytes) -> None:
        checkpoint.write_bytes(content)
        with pytest.raises(ModelFileError, match=r"state\.pt: (cannot be read|another format)"):
            train(recipe("cross-entropy"), checkpoint=checkpoint)

    def test_cut_file_is_refused(self, checkpoint: Path) -> None:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
        with pytest.raises(ModelFileError, match=r"state\.pt: cannot be read"):
            train(recipe("cross-entropy"), checkpoint=checkpoint)

    def test_unwritable_folder_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("a file")
        with pytest.raises(ModelFileError, match="cannot be written"):
            train(recipe("cross-entropy"), checkpoint=tmp_path / "taken" / "state.pt")


def test_model_is_written_once_and_its_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "digits-fc3", replace(RECIPES["digits-fc3"], epochs=1))
    train_and_save("digits-fc3", tmp_path)
    expected = ["digits-fc3.json", "digits-fc3.metrics.jsonl", "digits-fc3.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
