r"""A model as plain files: ``config.json`` says what it is made of, ``model.safetensors`` holds its
numbers. No pickles.

Every part of a model keeps each argument of its constructor as an attribute of the same name
(:class:`ndm.parts.Part`), so a part is described by ``{"class_path": ..., "init_args": {...}}``,
the form that YAML configurations use too, and rebuilt by calling the constructor. A class is named
as users import it, ``ndm.NDM`` or ``ndm.nn.UNet``, wherever its code is. Only public classes of
this library are ever looked up for a model folder; a network of the user's own is passed in by the
user. (The ``config.yaml`` of a run may name classes of the user's, which are imported where the run
is used: take runs from people whose code you would run.)
"""

import errno
import hashlib
import importlib
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ndm.errors import ForeignModuleError, UserError
from ndm.parts import Part

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FORMAT = 1
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of the errors by which a system says that there is no place for a file."""
_TORCH_SAVE = (
    "PytorchStreamWriter",
    "inline_container",
)  # of the RuntimeError by which torch.save says that a disk is full


NAMESPACES = ("ndm", "ndm.nn", "ndm.variants", "ndm.quality")
"""Where the public classes of models are."""


def class_path(cls: type) -> str:
    """The public name of a class of this library, ``ndm.NDM``; the full dotted name of any other."""
    for namespace in NAMESPACES:
        if (
            f"{cls.__module__}.".startswith(f"{namespace}.")
            and getattr(_public(namespace), cls.__name__, None) is cls
        ):
            return f"{namespace}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def to_config(part: object, defaults: bool = True) -> object:
    """Describe a part of a model, or a plain value, as JSON-ready data. Foreign modules get
    ``init_args`` None.

    Args:
        part: the part.
        defaults: list arguments that have their default value, too.
    """
    if isinstance(part, (list, tuple)):
        return [to_config(item, defaults) for item in part]
    if not isinstance(part, nn.Module):
        return part
    path = class_path(type(part))
    if not isinstance(part, Part) or not _is_public(path):
        return {"class_path": path, "init_args": None}
    arguments = part.arguments()
    if not defaults:
        usual = {
            name: one.default
            for name, one in inspect.signature(type(part).__init__).parameters.items()
        }
        arguments = {
            name: value for name, value in arguments.items() if not _same(value, usual[name])
        }
    return {
        "class_path": path,
        "init_args": {name: to_config(value, defaults) for name, value in arguments.items()},
    }


def _same(value: object, default: object) -> bool:
    """Whether an argument has its default value; a list for a tuple counts."""
    plain = (list(one) if isinstance(one, (list, tuple)) else one for one in (value, default))
    value, default = plain
    return type(value) is type(default) and value == default


def _public(namespace: str) -> SimpleNamespace:
    """The public names of a namespace."""
    module = importlib.import_module(namespace)
    return SimpleNamespace(**{name: getattr(module, name) for name in module.__all__})


def _is_public(path: str) -> bool:
    namespace, _, name = path.rpartition(".")
    return namespace in NAMESPACES and hasattr(_public(namespace), name)


def from_config(
    config: object, where: str = "model", replace: Mapping[str, nn.Module] | None = None
) -> object:
    """Rebuild what :func:`to_config` described.

    Args:
        config: the description.
        where: the place in the description, for messages: ``model.predictor.network``.
        replace: modules of the user for given places, instead of what the description says there.

    Raises:
        ForeignModuleError: the description names a class that is not part of this library and no
            module was given for it.
        UserError: it cannot be rebuilt.
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
    if not isinstance(path, str) or not path.startswith("ndm.") or arguments is None:
        raise ForeignModuleError(
            f"{where} is a {path}, which is not part of ndm and is never imported from a model"
            f" folder; build it yourself and pass modules={{'{where}': network}}"
        )
    if not _is_public(path):
        raise UserError(
            f"{where} names {path}, which this version of ndm does not have; update ndm"
        )
    namespace, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(namespace), name)
    if not (isinstance(cls, type) and issubclass(cls, Part)):
        raise UserError(f"{where} names {path}, which is not a part of a model")
    try:
        return cls(
            **{
                key: from_config(value, f"{where}.{key}", replace)
                for key, value in arguments.items()
            }
        )
    except TypeError as error:
        raise UserError(
            f"{where}: {path} does not take the arguments of this file ({error}): another version"
            " of ndm wrote it"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, then rename it: the file is whole or not
    there, after a power cut, too.

    Raises:
        UserError: the folder cannot be made or written to, or is full.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix
        )
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose a folder that you can write to"
        ) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _TORCH_SAVE):
            raise
        known = isinstance(error, OSError) and error.errno not in FULL
        mend = (
            "choose another name, or a folder that you can write to"
            if known
            else "is the disk full?"
        )
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or _one_line(error)}; {mend}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def write_json(path: Path, data: object) -> None:
    """Write JSON with two-space indentation, atomically."""
    write_atomically(
        path,
        lambda temporary: temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8"),
    )


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({error}); it is damaged, or not a file of ndm"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            f"{path} holds a JSON {type(data).__name__} where an object is needed; it is not a file"
            " of ndm"
        )
    return data


def save_model(
    path: str | os.PathLike[str], model: nn.Module, extra: Mapping[str, object] | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into the folder ``path``.

    Args:
        path: the folder, made if need be.
        model: the model.
        extra: JSON-ready information to keep beside the description, such as that of the data.
    """
    folder = Path(path)
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
    }
    write_atomically(folder / WEIGHTS_NAME, lambda temporary: save_file(tensors, temporary))
    write_json(folder / CONFIG_NAME, {**(extra or {}), "format": FORMAT, "model": to_config(model)})


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's description and weights, 64 hexadecimal digits: the same for a saved and
    loaded copy, on any device.

    Arguments that have their default value are left out, so that a later version with a new
    argument gives the same digits.
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
        The model, and everything else that ``config.json`` holds.

    Raises:
        UserError: a file is missing, damaged, from a later version, or does not fit.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"there is no model folder {folder}; a finished run keeps its model in RUN/model"
        )
    config = read_json(folder / CONFIG_NAME)
    version = config.pop("format", None)
    if version != FORMAT:
        raise UserError(
            f"{folder / CONFIG_NAME} has format {version}, this version of ndm reads format"
            f" {FORMAT}; update ndm"
        )
    model = from_config(config.pop("model", None), "model", replace)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{folder / CONFIG_NAME} describes no model; it is damaged, or not a file of ndm"
        )
    model.load_state_dict(read_weights(folder / WEIGHTS_NAME, model.state_dict()))
    return model, config


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a safetensors file, by name.

    Args:
        path: the file.
        expected: tensors of the names and shapes that it must have.

    Raises:
        UserError: it is missing, damaged or does not fit.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); it is truncated or damaged: copy it again or train"
            " again"
        ) from error
    for name in {**expected, **tensors}:
        if (
            name not in tensors
            or name not in expected
            or tensors[name].shape != expected[name].shape
        ):
            raise UserError(
                f"{path} does not fit its {CONFIG_NAME}: the tensor {name!r} is missing, unknown or"
                " of another shape"
            )
    return tensors
