"""`fed-learn describe`: every kind of file that it reads, what it says of the others, and its exit codes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fed_learn.cli import main
from fed_learn.weights import BFLOAT16

pytestmark = pytest.mark.quick


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["describe", *map(str, arguments)])
    printed = capsys.readouterr()
    return int(left.value.code or 0), printed.out, printed.err


def rows(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What `--json` tells of each variable: shape, dtype, role and policy."""
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)["variables"]
    return {v["name"]: (v["shape"], v["dtype"], v["role"], v["policy"]) for v in told}


def test_safetensors_are_told_by_their_header_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "w": np.zeros((3, 2), np.float32),
            "bn.running_mean": np.zeros(2),
            "n": np.array(1),
            "h": np.zeros(2, BFLOAT16),
        },
        path,
        metadata={"format": "pt"},
    )
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:length])  # the values are gone
    assert rows(capsys, path, "--policy", "bn=local") == {
        "w": ([3, 2], "float32", None, "mean"),
        "bn.running_mean": ([2], "float64", "statistic", "local"),
        "n": ([], "int64", "counter", "mean"),
        "h": ([2], "bfloat16", None, "mean"),
    }


@pytest.mark.not_quick
def test_files_of_one_model_tell_the_same_roles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    weights: dict[str, Any] = {"0.weight": np.zeros((2, 2), np.float32), "1.running_mean": np.zeros(2, np.float32)}
    weights |= {"1.num_batches_tracked": np.array(3), "ids": np.arange(3)}
    np.savez(tmp_path / "m.npz", **weights)
    save_file(weights, tmp_path / "m.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, tmp_path / "m.pt")
    for kind in ("npz", "safetensors", "pt"):
        told = {name: row[2] for name, row in rows(capsys, tmp_path / f"m.{kind}").items()}
        roles = {"0.weight": None, "1.running_mean": "statistic", "1.num_batches_tracked": "counter", "ids": "constant"}
        assert told == roles


def test_a_dtype_that_cannot_be_averaged_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xx")
    code, out, _ = run(capsys, path)
    assert code == 0
    assert "'w' has dtype F8_E4M3, which cannot be averaged" in out


def test_files_of_numpy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", w=np.zeros((2, 2), np.float32), half=np.zeros(2, BFLOAT16))
    np.save(tmp_path / "single.npy", np.zeros(3))
    assert rows(capsys, tmp_path / "a.npz") == {
        "w": ([2, 2], "float32", None, "mean"),
        "half": ([2], "bfloat16", None, "mean"),
    }
    assert rows(capsys, tmp_path / "single.npy") == {"single": ([3], "float64", None, "mean")}
    assert "'half': two-byte values without a dtype, taken for bfloat16" in run(capsys, tmp_path / "a.npz")[1]


def test_the_table_is_that_of_the_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", w=np.zeros(2, np.float32), b=np.zeros(1))
    code, out, err = run(capsys, tmp_path / "a.npz", "--only", "w")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "name  shape  dtype    role  policy  trained  bytes",
        "w     2      float32  ?     mean    ?        8 B",
        "",
        "1 variable, 8 B, 2 numbers; mean: 1 variable, 8 B",
    ]


@pytest.mark.parametrize(
    ("name", "content", "options", "code", "said"),
    [
        ("none.npz", None, [], 2, "does not exist"),
        ("model.onnx", b"", [], 2, r"model.onnx: no such file is known; known are .safetensors, .npz"),
        ("a.npz", b"damaged", [], 1, "a.npz is no .npz file of arrays, or holds Python objects"),
        ("a.npy", b"damaged", [], 1, "a.npy is no .npy file of arrays"),
        ("a.safetensors", b"damaged damaged", [], 1, "is no .safetensors file: its header would have"),
        ("a.safetensors", b"\x02" + bytes(7) + b"[]", [], 1, "is no .safetensors file"),
        ("ok.npz", np.zeros(1), ["--key", "model"], 2, "--key is for checkpoints of torch"),
        ("ok.npz", np.zeros(1), ["--only", "conv"], 2, "--only: only='conv' fits none"),
        ("ok.npz", np.zeros(1), ["--policy", "w"], 2, "'w' is not REGEX=POLICY, as in bn=local"),
        ("ok.npz", np.zeros(1), ["--policy", "bn=local"], 2, "policies: 'bn' fits none of the 1 variables"),
        ("ok.npz", np.zeros(1), ["--policy", "w=lokal"], 2, "has the policy 'lokal'"),
        ("object.npz", np.array([object()]), [], 1, "holds Python objects, which would have to be unpickled"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    name: str,
    content: Any,
    options: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, w=content)
    left, out, err = run(capsys, path, *options)
    assert (left, out) == (code, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_names_that_the_output_cannot_write_are_escaped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", größe=np.zeros(2))
    command = [sys.executable, "-c", "import fed_learn.cli as c; c.main()", "describe", str(tmp_path / "a.npz")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe" in done.stdout


@pytest.mark.not_quick
def test_files_of_torch_and_the_state_dict_in_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.BatchNorm1d(2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 2)).square().sum().backward()
    optimizer.step()
    state = {
        "weight": ([2], "float32", None, "mean"),
        "bias": ([2], "float32", None, "mean"),
        "running_mean": ([2], "float32", "statistic", "mean"),
        "running_var": ([2], "float32", "statistic", "mean"),
        "num_batches_tracked": ([], "int64", "counter", "mean"),
    }
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    checkpoint = {"epoch": 3, "net": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, tmp_path / "nested.pth")
    torch.save({"net": model.state_dict(), "ema": {"shadow": model.state_dict()}}, tmp_path / "two.bin")
    assert rows(capsys, tmp_path / "plain.pt") == rows(capsys, tmp_path / "nested.pth") == state
    said = "Entry 'net' of the checkpoint, which has 'epoch', 'net', 'optimizer'."
    assert run(capsys, tmp_path / "nested.pth")[1].splitlines()[0] == said
    code, _, err = run(capsys, tmp_path / "two.bin")
    assert (code, "several entries: 'net', 'ema.shadow'; choose one with --key" in err) == (2, True)
    assert rows(capsys, tmp_path / "two.bin", "--key", "ema.shadow") == state
    code, _, err = run(capsys, tmp_path / "two.bin", "--key", "nope")
    assert (code, "--key nope: two.bin has weights in 'net', 'ema.shadow'" in err) == (2, True)


@pytest.mark.not_quick
def test_no_program_in_a_file_of_torch_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    code, _, err = run(capsys, tmp_path / "whole.pt")
    assert (code, "is not unpickled" in err, "save model.state_dict() instead" in err) == (1, True, True)
    code, _, err = run(capsys, tmp_path / "list.pt")
    assert (code, "list.pt holds no state_dict: it is a list" in err) == (1, True)


@pytest.mark.not_quick
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras, as it saves
def test_files_of_keras(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keras = pytest.importorskip("keras")
    layers = [keras.layers.Dense(2, name="d"), keras.layers.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    model.save(tmp_path / "whole.keras")
    model.save_weights(tmp_path / "only.weights.h5")
    found = rows(capsys, tmp_path / "whole.keras")
    assert len(found) == 6
    assert found["bn/moving_mean"] == ([2], "float32", "statistic", "mean")
    assert found["d/kernel"] == ([3, 2], "float32", "trained", "mean")
    assert rows(capsys, tmp_path / "only.weights.h5")["layers/dense/vars/0"] == ([3, 2], "float32", None, "mean")
    assert "Names are those in the file." in run(capsys, tmp_path / "only.weights.h5")[1]
    for bad in ("bad.keras", "bad.h5"):
        (tmp_path / bad).write_bytes(b"damaged")
        code, _, err = run(capsys, tmp_path / bad)
        assert (code, f"{bad} cannot be read" in err) == (1, True)


@pytest.mark.not_quick
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras, as it saves
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_whole_model_in_hdf5_is_read_without_running_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keras = pytest.importorskip("keras")
    trace = tmp_path / "ran"

    def run_by_loading(x: Any) -> Any:
        import pathlib

        pathlib.Path(trace).touch()
        return x

    layers = [keras.layers.Lambda(run_by_loading), keras.layers.Dense(2, name="d")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="net")
    model.compile("adam", "mse")
    model.save(tmp_path / "whole.h5")
    trace.unlink()
    found = rows(capsys, tmp_path / "whole.h5")
    assert list(found.values()) == [([2], "float32", None, "mean"), ([3, 2], "float32", None, "mean")]
    assert all(name.startswith("d/net/d/") for name in found)
    assert "Names are those in the file." in run(capsys, tmp_path / "whole.h5")[1]
    assert not trace.exists()


@pytest.mark.not_quick
def test_an_old_keras_whose_safe_mode_runs_programs_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = pytest.importorskip("keras")
    monkeypatch.setattr(keras, "__version__", "3.11.2")
    monkeypatch.setattr(keras.saving, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "whole.keras").write_bytes(b"a program")
    code, _, err = run(capsys, tmp_path / "whole.keras")
    assert (code, "is not loaded by Keras 3.11.2" in err, "install Keras 3.11.3 or later" in err) == (2, True, True)


@pytest.mark.not_quick
def test_the_state_of_an_optimizer_and_checkpoints_of_lightning_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    assert rows(capsys, tmp_path / "optimizer.pt")["state.0.exp_avg"] == ([1, 2], "float32", "statistic", "mean")
    assert list(rows(capsys, tmp_path / "last.ckpt")) == ["weight", "bias"]


@pytest.mark.not_quick
@pytest.mark.parametrize("cut", [0, 100, 400])
def test_a_file_of_torch_that_is_cut_off_is_said_to_be(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:cut])
    code, _, err = run(capsys, tmp_path / "w.pt")
    assert code == 1
    assert "w.pt is damaged" in err or "w.pt is cut off, or empty" in err
