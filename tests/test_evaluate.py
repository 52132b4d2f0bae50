"""evaluate.py: the classifier tells real samples from mislabelled ones, is cached, and bad input is named."""
import json

import numpy as np
import pytest

import evaluate
import train_tokenizer as trainer
from common import UserError
from data import Shapes
from test_train_tokenizer import TINY


def shapes(count, start=0):
    source = Shapes("test", 16, 1)
    return (np.stack([np.array(source[i][0]) for i in range(start, start + count)]),
            np.arange(start, start + count) % 10)


def run(tmp_path, *options):
    evaluate.main(["generation", str(tmp_path / "s.npz"), "--data", "shapes", "--classifier-steps", "150",
                   "--test-images", "200", "--cache", str(tmp_path / "cache"), "--device", "cpu",
                   *map(str, options)])
    return json.loads((tmp_path / "s.npz.json").read_text())


def test_share_of_the_requested_class(tmp_path, capsys):
    images, labels = shapes(200)
    np.savez(tmp_path / "s.npz", images, labels)
    trainer.main([*TINY, "--out", str(tmp_path / "tokenizer")])
    right = run(tmp_path, "--tokenizer", tmp_path / "tokenizer")
    assert right["reconstructions_assigned_to_their_class"] < 0.4                # six steps of training: mush
    assert right["assigned_to_requested_class"] > 0.5 and right["classifier_test_accuracy"] > 0.5
    assert "protocol" in capsys.readouterr().out
    np.savez(tmp_path / "s.npz", images, (labels + 1) % 10)
    before = [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()]
    wrong = run(tmp_path)
    assert wrong["assigned_to_requested_class"] < 0.2
    assert wrong["classifier_test_accuracy"] == right["classifier_test_accuracy"]
    assert before == [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()]          # trained once


def test_bad_input_is_named(tmp_path):
    images, labels = shapes(4)
    for message, arrays, options in [("has no labels", (images,), []),
                                     ("has class 11", (images, labels + 8), []),
                                     ("should be square", (images[:, :8], labels), []),
                                     ("no such folder", (images, labels), ["--data", tmp_path / "nowhere"])]:
        np.savez(tmp_path / "s.npz", *arrays)
        with pytest.raises(UserError, match=message):
            run(tmp_path, *options)
