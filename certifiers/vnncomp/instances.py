"""Writing a network and its inputs as a benchmark of the competition: ONNX, VNN-LIB, ``instances.csv``."""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import check_model, count_classes, device_of
from ..errors import InputError
from ..files import write_bytes
from ..threat import Threat, check_images, check_labels
from .extras import need
from .robustness import robustness_text
from .runtime import Runtime

#: Old enough for every verifier of the competition, new enough for what is exported.
OPSET = 13


def export_onnx(model: nn.Module, x: Tensor, path: str | Path) -> None:
    """Write ``model`` as ONNX (opset :data:`OPSET`, a batch of 1), checked with onnxruntime on the inputs ``x``.

    Args:
        model: plain, in eval mode, float32: a network with masks applied on the fly is refused. x: (n, ...).

    Raises InputError if the model cannot be exported, or onnxruntime computes other values than torch (more than
    rounding apart: 1e-4 of the largest logit); nothing is written then.
    """
    write_bytes(Path(path), _onnx_bytes(model, x))


def _onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    onnx = need("onnx")
    check_model(model)
    count_classes(model, x)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "model.onnx"
        try:
            _export(model, x[:1].to(device_of(model)), draft)
        except Exception as error:  # the exporter raises many kinds
            raise InputError(
                f"{type(model).__name__} cannot be written as ONNX: {str(error).splitlines()[0]}. Replace that "
                "operation by one that torch.onnx knows."
            ) from error
        onnx.checker.check_model(str(draft))
        _check_same(model, x, Runtime(draft))
        return draft.read_bytes()


def _export(model: nn.Module, x: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        # The exporter that needs no further package is called legacy, and says so.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, opset_version=OPSET, input_names=["X"], output_names=["Y"]
        )


@torch.no_grad()
def _check_same(model: nn.Module, x: Tensor, runtime: Runtime) -> None:
    ours = torch.cat([model(part.to(device_of(model))).cpu() for part in x.split(256)])
    theirs = runtime(x.flatten(1))
    gap = ((ours - theirs).abs().amax() / ours.abs().amax().clamp(min=1)).item()
    if not gap <= 1e-4:
        raise InputError(
            f"The exported {type(model).__name__} computes other values in onnxruntime than in torch: logits differ by "
            f"{gap:.2g} of the largest. Nothing was written. Please report this with the model."
        )


def write_instances(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    folder: str | Path,
    *,
    name: str = "network",
    timeout: float = 60.0,
    indices: Sequence[int] | None = None,
) -> list[tuple[str, str, float]]:
    """Write one instance for each input that is predicted right; returns the lines of ``instances.csv``.

    ``onnx/NAME.onnx``, ``vnnlib/NAME-eps-EPS-INDEX.vnnlib`` and ``instances.csv`` in ``folder``; lines of other
    networks or radii that stand in the file already are kept. Inputs predicted wrong have nothing to prove. EPS has all
    the digits it needs: no two eps share a file.

    Args:
        x, y: (n, ...) in [0, 1] and (n,) labels. threat: linf; its box is cut to [0, 1]. timeout: seconds an instance.
        indices: the inputs' numbers in their data set; 0 to n - 1 if None.

    Raises:
        InputError: an l2 threat, which VNN-LIB cannot say; inputs or a model that do not fit; a folder that has
            properties of another network of that name, whose clean input this one may predict wrong. Nothing is
            written then.
    """
    if threat.norm != "linf":
        raise InputError(f"VNN-LIB can state boxes of inputs only, so the norm must be linf, not {threat.norm}.")
    check_images(x)
    classes = count_classes(model, x)
    check_labels(y, len(x), classes)
    folder, numbers = Path(folder), list(range(len(x))) if indices is None else list(indices)
    content = _onnx_bytes(model, x)
    _check_free(folder, name, content)
    write_bytes(folder / "onnx" / f"{name}.onnx", content)
    lines = []
    with torch.no_grad():
        right = torch.cat([model(part.to(device_of(model))).argmax(1).cpu() for part in x.split(256)]) == y.cpu()
    lower, upper = threat.box(x.cpu())
    for row in right.nonzero().flatten().tolist():
        place = f"vnnlib/{name}-eps-{eps_text(threat.eps)}-{numbers[row]}.vnnlib"
        about = f"input {numbers[row]}, label {int(y[row])}, linf {eps_text(threat.eps)} cut to [0, 1]; unsat: robust"
        text = robustness_text(lower[row], upper[row], int(y[row]), classes, about)
        write_bytes(folder / place, text.encode())
        lines.append((f"onnx/{name}.onnx", place, timeout))
    _write_list(folder / "instances.csv", lines)
    return lines


def eps_text(eps: float) -> str:
    """``eps`` for the name of a file, short where that is exact: "0.05", and "0.00784313725490196" for 2/255."""
    short = f"{eps:g}"
    return short if float(short) == eps else repr(float(eps))


def _check_free(folder: Path, name: str, content: bytes) -> None:
    """Raise InputError unless ``folder`` has nothing of this name, or what it has is of this very network."""
    path = folder / "onnx" / f"{name}.onnx"
    if path.exists():
        if _same_network(path.read_bytes(), content):
            return
        found = f"{path} is another network"
    elif any(line[0] == f"onnx/{name}.onnx" for line in _listed(folder / "instances.csv")):
        found = f"{folder / 'instances.csv'} lists properties of {path}, which is missing, so its network is not known"
    else:
        return
    raise InputError(
        f"{found}, and its properties would be asked about the network that is to be written under its name. Nothing "
        f"was written. Give another folder than {folder}; or, to start anew with this name, delete {path}, its "
        f"properties {folder / 'vnnlib' / f'{name}-eps-*.vnnlib'} and its lines in {folder / 'instances.csv'}."
    )


def _same_network(one: bytes, other: bytes) -> bool:
    """Whether two ONNX files are of one network; which torch wrote them makes no difference."""
    if one == other:
        return True
    onnx = need("onnx")
    try:
        return onnx.load_from_string(one).graph == onnx.load_from_string(other).graph
    except Exception:  # whatever it is, it is no ONNX file
        return False


def _listed(path: Path) -> list[list[str]]:
    return [line for line in csv.reader(path.read_text().splitlines()) if line] if path.exists() else []


def _write_list(path: Path, lines: list[tuple[str, str, float]]) -> None:
    """``instances.csv``: the new lines in place of those about the same properties, the others kept."""
    known = {line[1]: tuple(line) for line in _listed(path)}
    known.update({line[1]: (line[0], line[1], f"{line[2]:g}") for line in lines})
    write_bytes(path, "".join(f"{','.join(line)}\n" for line in known.values()).encode())
