"""A factored adaptation in one safetensors file, and back.

The file has the factors of every step, so that what is loaded can be rewound too, the coefficients,
the settings, and a checksum of every parameter of the model: deltas mean nothing beside other
weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ttt_fast import ops
from ttt_fast.batch import Batch
from ttt_fast.config import TTTConfig
from ttt_fast.engines import deltas
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.engines.factors import Inputs, MatrixFactors, Track, VectorFactors
from ttt_fast.engines.rows import Rows
from ttt_fast.scope import select_parameters
from ttt_fast.selection import RowSlice, Selection

_FORMAT = 1
_KEY = "ttt_fast"

Fingerprint = dict[str, tuple[str, list[int], int]]  # name -> dtype, shape, checksum


def fingerprint(params: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Dtype, shape and checksum of each tensor by its name."""
    return {
        name: (_dtype(param), list(param.shape), ops.checksum([param.detach()]))
        for name, param in params
    }


def difference(expected: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Any]]) -> str:
    """What the first parameter that is not as expected is like, in words; "" if all are."""
    for name, (dtype, shape, checksum) in expected.items():
        if name not in found:
            return f"it has no parameter {name}"
        its_dtype, its_shape, its_checksum = found[name]
        if (its_dtype, list(its_shape)) != (dtype, list(shape)):
            return f"its {name} is {its_dtype} {tuple(its_shape)}, not {dtype} {tuple(shape)}"
        if its_checksum != checksum:
            return f"its {name} has other values"
    extra = [name for name in found if name not in expected]
    return f"it has a parameter {extra[0]} more" if extra else ""


def write(
    path: str | os.PathLike[str],
    model: nn.Module,
    engine: FactoredEngine,
    results: Mapping[str, Any],
    prompt: Batch | None,
) -> None:
    """Write an adaptation.

    Args:
        path: the file; replaced at once when everything is written.
        model: with its own weights.
        engine: holds the factors; its tracks' coefficients are trajectories.
        results: tensors and JSON values that come back as they are.
        prompt: what was adapted to, if it is known; a cache in front of it is not kept.
    """
    contents = _Contents()
    tables = contents.describe_rows(engine.factors)
    tensors = {name: v for name, v in results.items() if isinstance(v, Tensor)}
    about = {
        "format": _FORMAT,
        "n_deltas": engine.n_deltas,
        "n_steps": engine.steps,
        "base": fingerprint(model.named_parameters()),
        "config": config_fields(engine.config, model),
        "factors": [contents.factors(i, each, tables) for i, each in enumerate(engine.factors)],
        "inputs": contents.n_inputs,
        "tracks": [contents.track(each, engine.factors) for each in engine.tracks],
        "results": {name: v for name, v in results.items() if name not in tensors},
    }
    for name, tensor in tensors.items():
        contents.tensors[f"results/{name}"] = tensor
    if prompt is not None and prompt.past_key_values is None:
        for field in fields(Batch):
            value = getattr(prompt, field.name)
            if value is not None:
                contents.tensors[f"prompt/{field.name}"] = value.clone()
    whole = {name: t.detach().cpu().contiguous() for name, t in contents.tensors.items()}
    # An interrupted write must not leave half a file under the name.
    partial = f"{os.fspath(path)}.partial"
    save_file(whole, partial, metadata={_KEY: json.dumps(about)})
    os.replace(partial, path)


class _Contents:
    """Collects the tensors of a file under their names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.n_inputs = 0
        self._inputs: dict[int, int] = {}

    def describe_rows(self, factors: Sequence[MatrixFactors | VectorFactors]) -> dict[int, int]:
        """Store which step each row belongs to, once for all buffers that were written alike."""
        tables: dict[int, int] = {}
        for each in factors:
            for rows in deltas.rows_of(each):
                if id(rows) not in tables:
                    tables[id(rows)] = number = len(tables)
                    self.tensors[f"rows/{number}"] = rows.columns(torch.device("cpu"))
        return tables

    def factors(
        self, number: int, factors: MatrixFactors | VectorFactors, tables: dict[int, int]
    ) -> dict[str, Any]:
        """Store the factors of a parameter; return what they belong to."""
        selection, name = factors.selection, f"factors/{number}"
        about: dict[str, Any] = {
            "name": selection.name,
            "slice": None if selection.rows is None else vars(selection.rows),
        }
        if isinstance(factors, VectorFactors):
            self._store(f"{name}/grads", factors.grads, factors.rows)
            return about | {"rows": tables[id(factors.rows)]}
        if factors.inputs is not None:
            rows = factors.inputs.rows
            self._store(f"{name}/dy", factors.dy, rows)
            about |= {"inputs": self._input(factors.inputs), "rows": tables[id(rows)]}
        if factors.lookups is not None:
            lookups = factors.lookups
            self._store(f"{name}/ids", lookups.ids, lookups.rows)
            self._store(f"{name}/lookup_dy", lookups.dy, lookups.rows)
            about |= {"lookup_rows": tables[id(lookups.rows)]}
        return about

    def track(self, track: Track, factors: Sequence[Any]) -> dict[str, Any]:
        """Store the coefficients of a track; return who shares them."""
        members = [i for i, each in enumerate(factors) if each.track is track]
        self.tensors[f"trajectory/{members[0]}"] = track.coefficients.weights
        return {"group": track.group, "decays": track.decays, "members": members}

    def _input(self, inputs: Inputs) -> int:
        if id(inputs) not in self._inputs:
            self._inputs[id(inputs)] = self.n_inputs
            self._store(f"inputs/{self.n_inputs}", inputs.buffer, inputs.rows)
            self.n_inputs += 1
        return self._inputs[id(inputs)]

    def _store(self, name: str, buffer: Any, rows: Rows) -> None:
        everyone = slice(0, len(rows.lengths))
        self.tensors[name] = buffer.first(everyone, rows.longest(everyone))


def read(
    path: str | os.PathLike[str], model: nn.Module
) -> tuple[FactoredEngine, dict[str, Any], Batch | None]:
    """An engine with the factors of a file, attached to the model; results; prompt.

    Raises:
        ValueError: not such a file, or other weights.
    """
    about, tensors = _open(path)
    different = difference(about["base"], fingerprint(model.named_parameters()))
    if different:
        raise ValueError(
            f"load: {os.fspath(path)} was made for another model: {different}. Load the model that"
            " was adapted, with the same dtype."
        )
    params = dict(model.named_parameters())
    selections = [
        Selection(each["name"], params[each["name"]], each["slice"] and RowSlice(**each["slice"]))
        for each in about["factors"]
    ]
    config = _config_from(about["config"])
    # The coefficients are in the file, so groups that made them no longer matter to the engine.
    engine = FactoredEngine(model, selections, replace(config, param_groups=()))
    tables = [_rows_from(tensors[f"rows/{i}"]) for i in range(_count(tensors, "rows/"))]
    capacity = max([rows.longest(slice(None)) for rows in tables], default=0)
    engine.begin(about["n_deltas"], max(1, capacity))
    try:
        engine.config, engine.steps = config, about["n_steps"]
        _fill(engine, about, tensors, tables)
        results = dict(about["results"])
        results |= _under(tensors, "results/")
        prompt = {name: t.to(engine.device) for name, t in _under(tensors, "prompt/").items()}
        engine.show(slice(0, engine.n_deltas))
    except BaseException:
        engine.restore()
        raise
    return engine, results, Batch(**prompt) if prompt else None


def _fill(
    engine: FactoredEngine, about: dict[str, Any], tensors: dict[str, Tensor], tables: list[Rows]
) -> None:
    """Put factors and coefficients where a session would have left them."""
    everyone = slice(0, engine.n_deltas)
    shared: dict[int, Inputs] = {}
    for i, (each, where) in enumerate(zip(engine.factors, about["factors"], strict=True)):
        name = f"factors/{i}"
        if isinstance(each, VectorFactors):
            each.grads.write(everyone, 0, tensors[f"{name}/grads"])
            each.rows = each.pending = tables[where["rows"]]
            continue
        if "inputs" in where:
            number = where["inputs"]
            if number not in shared:
                x = tensors[f"inputs/{number}"].to(engine.device)
                shared[number] = inputs = engine.desk.new_inputs(x)
                inputs.buffer.write(everyone, 0, x)
                inputs.rows = inputs.pending = tables[where["rows"]]
            each.inputs = shared[number]
            each.dy.write(everyone, 0, tensors[f"{name}/dy"])
        if "lookup_rows" in where:
            each.lookups.ids.write(everyone, 0, tensors[f"{name}/ids"])
            each.lookups.dy.write(everyone, 0, tensors[f"{name}/lookup_dy"])
            each.lookups.rows = each.lookups.pending = tables[where["lookup_rows"]]
    engine.tracks = []
    for where in about["tracks"]:
        weights = tensors[f"trajectory/{where['members'][0]}"].to(engine.device)
        track = Track(where["group"], deltas.Trajectory(weights), where["decays"])
        for i in where["members"]:
            engine.factors[i].track = track
        engine.tracks.append(track)


def _open(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
            names = [] if about is None else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"load: {os.fspath(path)} is not a safetensors file ({error}).") from error
    if about is None:
        raise ValueError(
            f"load: {os.fspath(path)} is not an adaptation; write one with adapted.save(path)."
        )
    about = json.loads(about)
    if about["format"] != _FORMAT:
        raise ValueError(
            f"load: {os.fspath(path)} has format {about['format']}, this version reads {_FORMAT}."
            " Update ttt_fast."
        )
    return about, tensors


def _rows_from(columns: Tensor) -> Rows:
    """Rows whose steps are those of a stored table (D, longest), -1 behind the shorter deltas."""
    rows = Rows(columns.shape[0])
    for delta, steps in enumerate(columns):
        values, counts = steps[steps >= 0].unique_consecutive(return_counts=True)
        for step, count in zip(values.tolist(), counts.tolist(), strict=True):
            rows = rows.append(step, slice(delta, delta + 1), count)
    return rows


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len(_under(tensors, prefix))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------- settings


def config_fields(config: TTTConfig, model: nn.Module) -> dict[str, Any]:
    """The settings as JSON values; what is a function becomes what it gave."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    values["param_groups"] = [
        {**group, "params": _scope(group["params"], model)} for group in config.param_groups
    ]
    for each in (values, *values["param_groups"]):
        if callable(each.get("lr")):
            each["lr"] = [float(each["lr"](step)) for step in range(config.steps)]
        elif isinstance(each.get("lr"), Sequence):
            each["lr"] = [float(lr) for lr in each["lr"]]
    values["scope"] = _scope(config.scope, model)
    layers = config.layers
    if isinstance(layers, slice):
        ends = ["" if end is None else str(end) for end in (layers.start, layers.stop)]
        step = [] if layers.step is None else [str(layers.step)]
        values["layers"] = ":".join([*ends, *step])
    elif layers is not None and not isinstance(layers, int | str):
        values["layers"] = list(layers)
    return values


def _scope(scope: Any, model: nn.Module) -> Any:
    """A scope as JSON: text and lists as they are, others as the names that they select."""
    if isinstance(scope, str):
        return scope
    if isinstance(scope, Sequence):
        return list(scope)
    return [selection.name for selection in select_parameters(model, scope)]


def _config_from(values: dict[str, Any]) -> TTTConfig:
    values = dict(values)
    values["betas"] = tuple(values["betas"])
    values["param_groups"] = tuple(values["param_groups"])
    return TTTConfig(**values)
