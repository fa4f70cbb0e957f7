"""The embedded example up to the compression, which ``.ci/run`` and the pipeline's tests do in full."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("onnxscript")

from hap_onnx import cli, example


@pytest.fixture(scope="module")
def trained():
    train, test = example.load_digits()
    return example.train_network(train, epochs=3), train, test


def test_digits_are_split_without_overlap():
    train, test = example.load_digits()
    assert len(train.labels) + len(test.labels) == 1797
    rows = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in rows for image in test.images)
    assert train.images.dtype == np.float32
    assert (train.images.min(), train.images.max()) == (0.0, 1.0)


def test_a_few_epochs_learn_digits(trained):
    network, _, test = trained
    assert example.measure_accuracy(network, test) > 0.85


def test_training_leaves_the_random_state_and_threads_alone():
    train, _ = example.load_digits()
    state, n_threads = torch.random.get_rng_state(), torch.get_num_threads()
    example.train_network(train, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads


@pytest.mark.filterwarnings("ignore")  # deprecations inside torch's exporter, at import
def test_the_exported_model_is_the_network_at_any_batch_size(trained, tmp_path):
    network, _, test = trained
    path = tmp_path / "digits.onnx"
    example.export_network(network, path)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 7):
        (scores,) = session.run(["scores"], {"image": test.images[:n]})
        with torch.no_grad():
            expected = network(torch.from_numpy(test.images[:n])).numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_example_ends_in_the_exit_code_of_compress(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(cli, "main", lambda command: calls.append(command) or 3)
    assert example.run(tmp_path / "example", epochs=1) == 3
    model, data, val = (tmp_path / "example" / name for name in ("digits.onnx", "calib.npz", "test.npz"))
    assert calls == [["compress", str(model), "--data", str(data), "--val", str(val), "--keep-macs", "0.5"]]
    assert set(np.load(val).files) == {"image", "labels"}
    assert "Training on 1258 images" in capsys.readouterr().out
