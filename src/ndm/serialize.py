"""Models as plain files: ``config.json`` has the parts, ``model.safetensors`` the weights.

No pickles. Every part of a model stores each argument of its constructor as an attribute of the
same name (:class:`ndm.parts.Part`). So a part is described by ``{"class_path": ..., "init_args":
{...}}``, as in YAML configurations, and rebuilt by calling the constructor. A class path is the
public name, ``ndm.NDM`` or ``ndm.nn.UNet``.

Loading a model folder imports only public classes of this library; users pass their own networks
in. The ``config.yaml`` of a run, however, may name any class, and using the run imports it: only
use runs from people whose code you would run.
"""

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ndm.errors import ForeignModuleError, UserError, describe_value, one_line
from ndm.parts import Part
from ndm.readers import building_bounded_by, check_arguments, parse_json, read_text
from ndm.writing import write_atomically

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FORMAT = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights."""
# What a constructor raises for arguments from a damaged file, such as 10**18 channels.
_CONSTRUCTOR_ERRORS = (
    *(TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RuntimeError, MemoryError),
)
NAMESPACES = ("ndm", "ndm.nn", "ndm.variants", "ndm.quality")
"""Modules that export the public classes of models."""


def class_path(cls: type) -> str:
    """Return the public name of a class of this library, or the full dotted name of any other."""
    for namespace in NAMESPACES:
        inside = f"{cls.__module__}.".startswith(f"{namespace}.")
        if inside and getattr(_public(namespace), cls.__name__, None) is cls:
            return f"{namespace}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def to_config(part: object, defaults: bool = True) -> object:
    """Describe a part of a model, or a plain value, as JSON-ready data.

    The ``init_args`` of modules from outside this library are None.

    Args:
        part: the part.
        defaults: include arguments that have their default value.
    """
    if isinstance(part, (list, tuple, nn.ModuleList)):
        return [to_config(item, defaults) for item in part]
    if not isinstance(part, nn.Module):
        return part
    path = class_path(type(part))
    if not isinstance(part, Part) or not _is_public(path):
        return {"class_path": path, "init_args": None}
    arguments = part.arguments()
    if not defaults:
        parameters = inspect.signature(type(part).__init__).parameters
        arguments = {
            name: value
            for name, value in arguments.items()
            if not _same(value, parameters[name].default)
        }
    return {
        "class_path": path,
        "init_args": {name: to_config(value, defaults) for name, value in arguments.items()},
    }


def _same(value: object, default: object) -> bool:
    """Whether an argument has its default value, with lists equal to tuples."""
    value = list(value) if isinstance(value, tuple) else value
    default = list(default) if isinstance(default, tuple) else default
    return type(value) is type(default) and value == default


def _public(namespace: str) -> SimpleNamespace:
    """Return the public names of a namespace and their objects."""
    module = importlib.import_module(namespace)
    return SimpleNamespace(**{name: getattr(module, name) for name in module.__all__})


def _is_public(path: str) -> bool:
    namespace, _, name = path.rpartition(".")
    return namespace in NAMESPACES and hasattr(_public(namespace), name)


def from_config(
    config: object, where: str = "model", replace: Mapping[str, nn.Module] | None = None
) -> object:
    """Rebuild a part or a plain value from its description by :func:`to_config`.

    Args:
        config: the description.
        where: the place in the whole description, such as ``model.predictor.network``.
        replace: modules to use at some places, instead of those described there.

    Raises:
        ForeignModuleError: the description names a class from outside this library, and ``replace``
            has no module for it.
        UserError: the description cannot be rebuilt.
    """
    if replace and where in replace:
        return replace[where]
    if isinstance(config, list):
        return [
            from_config(item, f"{where}[{index}]", replace) for index, item in enumerate(config)
        ]
    if not isinstance(config, Mapping):
        return config
    path, arguments = config.get("class_path"), config.get("init_args")
    shown = describe_value(path).strip("'\"")
    if not isinstance(path, str) or not path.startswith("ndm.") or arguments is None:
        raise ForeignModuleError(
            f"{where} is a {shown}, which is not part of ndm and not imported from a model folder;"
            f" build it and pass modules={{'{where}': network}}"
        )
    if not _is_public(path):
        raise UserError(
            f"{where} names {shown}, which this version of ndm does not have; update ndm"
        )
    namespace, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(namespace), name)
    if not (isinstance(cls, type) and issubclass(cls, Part)):
        raise UserError(f"{where} names {path}, which is not a part of a model")
    if not isinstance(arguments, Mapping):
        raise UserError(
            f"{where}: the init_args of {path} are {describe_value(arguments)}; give an object with"
            " its arguments"
        )
    check_arguments(where, cls, arguments)
    built = {key: from_config(value, f"{where}.{key}", replace) for key, value in arguments.items()}
    try:
        return cls(**built)
    except UserError as error:
        if type(error) is not UserError or str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from error
    except _CONSTRUCTOR_ERRORS as error:
        raise UserError(
            f"{where}: {path} does not take the arguments of this file ({one_line(error, 100)});"
            " load it with the version of ndm that wrote it"
        ) from error


def write_json(path: Path, data: object) -> None:
    """Write JSON with two-space indentation, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, not a JSON object, or exceeds a bound of
            :mod:`ndm.readers`.
    """
    try:
        data = parse_json(read_text(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({one_line(error, 100)}); it is damaged, or not a file"
            " of ndm"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path} has a JSON {type(data).__name__} instead of an object; it is not a file of ndm"
        )
    return data


def save_model(
    path: str | os.PathLike[str], model: nn.Module, extra: Mapping[str, object] | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``path``.

    Args:
        path: the folder; it is created if needed.
        model: the model.
        extra: JSON-ready information to add to ``config.json``, such as that of the data.
    """
    folder = Path(path)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    config = {**(extra or {}), "format": FORMAT, "model": to_config(model)}
    try:
        json.dumps(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"info has a value that JSON cannot store: {error}") from error
    write_atomically(folder / WEIGHTS_NAME, lambda temporary: save_file(tensors, temporary))
    write_json(folder / CONFIG_NAME, config)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's description and weights, 64 hexadecimal digits.

    A saved and loaded copy has the same fingerprint, on any device. Arguments with their default
    value are left out, so that new arguments in later versions do not change it.
    """
    digest = hashlib.sha256(json.dumps(to_config(model, defaults=False), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_model(
    path: str | os.PathLike[str], replace: Mapping[str, nn.Module] | None = None
) -> tuple[nn.Module, dict[str, object]]:
    """Read a model written by :func:`save_model`.

    Returns:
        The model, and the rest of ``config.json``.

    Raises:
        UserError: a file is missing, damaged, from a later version, or does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {folder}; the model of a finished run is in RUN/model"
        )
    config = read_json(folder / CONFIG_NAME)
    version = config.pop("format", None)
    if version != FORMAT:
        raise UserError(
            f"{folder / CONFIG_NAME} has format {str(version)[:80]}, but this version of ndm reads"
            f" format {FORMAT}; update ndm"
        )
    weights = _load_tensors(folder / WEIGHTS_NAME)
    model = _build(config.pop("model", None), weights, folder / CONFIG_NAME, replace)
    _check_tensors(folder / WEIGHTS_NAME, weights, model.state_dict())
    dtypes = {weights[name].dtype for name, _ in model.named_parameters()}
    if len(dtypes) == 1:
        model.to(dtype=dtypes.pop())
    model.load_state_dict(weights)
    return model, config


def _build(
    config: object,
    weights: Mapping[str, Tensor],
    path: Path,
    replace: Mapping[str, nn.Module] | None,
) -> nn.Module:
    """Build the model of a description, no larger than its weights allow.

    Raises:
        UserError: the description is damaged.
    """
    with building_bounded_by(weights, str(path)):
        model = from_config(config, "model", replace)
    if not isinstance(model, nn.Module):
        raise UserError(f"{path} does not describe a model; it is damaged, or not a file of ndm")
    return model


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Args:
        path: the file.
        expected: tensors with the names and shapes that the file must have.

    Raises:
        UserError: the file is missing, damaged or does not fit, or weights are not finite.
    """
    tensors = _load_tensors(path)
    _check_tensors(path, tensors, expected)
    return tensors


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a file")
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({one_line(error, 100)}); it is truncated or damaged: copy it"
            " or train again"
        ) from error


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Check names, shapes, kinds of numbers, and that numbers are finite where they should be."""
    for name in {**expected, **tensors}:
        in_both = name in tensors and name in expected
        if not in_both or tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{path} does not fit its {CONFIG_NAME}: the tensor {describe_value(name)} is"
                " missing, unexpected or has another shape"
            )
        found, wanted = tensors[name], expected[name]
        is_float = wanted.is_floating_point()
        if found.dtype not in (FLOATS if is_float else (wanted.dtype,)):
            raise UserError(
                f"{path} does not fit its {CONFIG_NAME}: the tensor {describe_value(name)} has"
                f" dtype {found.dtype} instead of {wanted.dtype}"
            )
        if not is_finite(found) and is_finite(wanted):
            raise UserError(
                f"{path}: the tensor {describe_value(name)} has values that are not finite; it is"
                " damaged: copy it or train again"
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; integers are."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())
