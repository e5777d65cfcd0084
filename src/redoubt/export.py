"""What ``export`` does: a run's net as a file for use elsewhere, read back and compared before it is left there."""

from __future__ import annotations

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from redoubt.beforehand import the_target
from redoubt.build import make
from redoubt.defenses import RobustModule
from redoubt.errors import UserError
from redoubt.runs.files import atomic
from redoubt.runs.loading import load, portable_state
from redoubt.runs.store import Run, Store
from redoubt.units import height_width

Logits = Callable[[Tensor], Tensor]


def export(
    source: str | Path,
    to: str | Path,
    *,
    checkpoint: str = "last",
    weights: str | None = None,
    outputs: str | Path = "outputs",
) -> str:
    """Writes the net of a finished run that is to be deployed (`RobustModule.deployed`).

    Args:
        source: The run's folder or name.
        to: The file; its suffix names the format.
        checkpoint: ``last`` or ``best``.
        weights: One of the defense's ``weight_sets``; what the run's config evaluates where None.
        outputs: The store in which names are looked up.

    Returns:
        One line: the file, its size and what it holds.

    Raises:
        UserError: No such run, an unfinished one, a file that exists or that cannot be written, or one that does not
            give the run's logits when it is read back; nothing is left then.
    """
    file = Path(to).expanduser()
    the_target(str(to))
    form = FORMATS[file.suffix]
    for package in form.packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(f"to={to} needs the package {package}: pip install redoubt[onnx]") from None
    run = Store(outputs).find(source)
    run.must_be_finished()
    module = load(run, checkpoint=checkpoint, weights=weights)
    net = module.deployed().to(memory_format=torch.contiguous_format)
    facts = {**origin(run, net), "weights": module.weights, "checkpoint": checkpoint}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, *height_width(module.image_size), generator=generator) for n in (1, 5)]
    with one_line(to):
        data = form.encode(net, batches[-1], facts)
    with atomic(file) as temporary:
        temporary.write_bytes(data)
        with one_line(to):
            difference, largest = compare(form.read(temporary), module, batches)
        if not difference <= form.tolerance * largest:  # NaN is no agreement
            raise UserError(
                f"to={to}: not written: read back, logits differ from the run's by {difference:.2g} of {largest:.3g}"
            )
    kind = type(net).__name__
    return (
        f"{file}: {len(data) / 1e6:.1f} MB, "
        f"{f'plain {kind}' if facts['defense'] is None else f'{kind} with {type(module).__name__}'}, "
        f"{sum(p.numel() for p in net.parameters()):,} parameters, "
        f"largest logit difference {difference:.0e} of {largest:.3g}"
    )


@contextmanager
def one_line(to: str | Path) -> Iterator[None]:
    """Inside, exporters and readers do not talk (about themselves), and what they raise becomes one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # whatever a net's code leads a tracer to
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"to={to}: this net cannot be written so ({reason}): take another format") from error
    finally:
        logging.disable(disabled)


def origin(run: Run, net: nn.Module) -> dict[str, Any]:
    """Where a net comes from, and the sections of the run's config that rebuild it.

    ``defense`` is None where the net is the plain backbone.
    """
    cfg = run.config()
    model = cfg["model"] | ({"pretrained": False} if "pretrained" in cfg["model"] else {})  # nothing is downloaded
    with torch.random.fork_rng(devices=[]):
        bare = make(model, "model")
    plain = [[(name, type(m)) for name, m in one.named_modules()] for one in (bare, net)]
    # What a defense starts from is no part of its net, and may be a path of this machine.
    defense = {key: value for key, value in cfg["defense"].items() if key not in ("pretrained", "replace_head")}
    return {
        "run": run.name,
        "classes": run.classes(),
        "model": model,
        "defense": None if plain[0] == plain[1] else defense,
        "data": {key: cfg["data"][key] for key in ("num_classes", "image_size")},
        "threat": {key: cfg["threat"][key] for key in ("norm", "eps")},
    }


@torch.no_grad()
def compare(logits: Logits, module: RobustModule, batches: list[Tensor]) -> tuple[float, float]:
    """The largest difference of a file's logits from the module's, and the module's largest logit."""
    with torch.compiler.set_stance("force_eager"):  # a compiled module's too, without compiling for two batches
        wanted = torch.cat([module.logits(x) for x in batches])
    found = torch.cat([logits(x) for x in batches])
    return (found - wanted).abs().max().item(), wanted.abs().max().item()


# ---- formats ------------------------------------------------------------------------------------------------------


def _safetensors(net: nn.Module, x: Tensor, facts: dict[str, Any]) -> bytes:
    tensors = {key: t.detach().contiguous().clone() for key, t in portable_state(net).items()}  # none shares memory
    return safetensors.torch.save(tensors, {"format": "pt", "redoubt": json.dumps(facts)})


def _traced(net: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """The net as a program for any number of images like ``x``."""
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders
    return program


def _program(net: nn.Module, x: Tensor, facts: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_traced(net, x), buffer, extra_files={"classes.json": json.dumps(facts["classes"])})
    return buffer.getvalue()


def _onnx(net: nn.Module, x: Tensor, facts: dict[str, Any]) -> bytes:
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    made = torch.onnx.export(_traced(net, x), (), verbose=False, **names)  # verbose prints to stdout
    assert made is not None
    made.model_proto.metadata_props.add(key="classes", value=json.dumps(facts["classes"]))
    return made.model_proto.SerializeToString()


def _read_onnx(file: Path) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"pixels": x.numpy()})[0])


class Format(NamedTuple):
    """How a net becomes a file's bytes and a file logits; ``tolerance`` is a share of the largest logit."""

    encode: Callable[[nn.Module, Tensor, dict[str, Any]], bytes]
    read: Callable[[Path], Logits]
    tolerance: float = 1e-5
    packages: tuple[str, ...] = ()


FORMATS = {
    ".safetensors": Format(_safetensors, lambda file: load(file).logits),
    ".pt2": Format(_program, lambda file: torch.export.load(file).module()),
    ".onnx": Format(_onnx, _read_onnx, 1e-4, ("onnx", "onnxscript", "onnxruntime")),
}
