"""Checkpoints: read without executing code, and compared with the run before they are restored.

The checksums of the file cover all bytes that are loaded. Whatever training restores is compared
with a new run of the same configuration: names, types, shapes and strides of all tensors, settings
of the optimizer, and the step in every place that stores it. So a damaged or forged file is
rejected in one line instead of changing the weights or the memory of the process.
"""

import math
import zipfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ndm.errors import UserError, describe_value, one_line
from ndm.serialize import is_finite

if TYPE_CHECKING:  # importing Lightning takes seconds
    from lightning.pytorch import Trainer

    from ndm.train.module import TrainingModule

_TYPES: Mapping[str, type] = {
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}
"""Entries that every checkpoint has."""
_MACHINE = ("lr", "fused", "foreach", "capturable", "differentiable", "step", "params")
"""Entries of an optimizer's group that are compared in another way, or depend on the machine."""


def damaged(path: Path, reason: str) -> UserError:
    """Return the error for a checkpoint that cannot be used."""
    short = one_line(reason)
    short = short if len(short) <= 140 else short[:137] + "..."
    return UserError(
        f"the checkpoint {path} is truncated or damaged ({short}); restore it, or delete it to"
        " restart the run"
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, memory-mapped, without executing code from it.

    Raises:
        UserError: the file is truncated, damaged or not a checkpoint of a run.
    """
    try:
        _verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_entries(content)
    except Exception as error:
        raise damaged(path, str(error) or type(error).__name__) from error
    return dict(content)


def _verify(path: Path) -> None:
    """Compare all bytes with the checksums of the file, which torch.load does not.

    Raises:
        ValueError: they differ.
    """
    with zipfile.ZipFile(path) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
            raise ValueError("it is not a checkpoint of a run")
        wrong = file.testzip()
    if wrong is not None:
        raise ValueError(f"wrong checksum of {wrong.partition('/')[2]}")


def _check_entries(content: object) -> None:
    """Check the entries that every checkpoint has.

    Raises:
        ValueError: an entry is missing or has another type.
    """
    if not isinstance(content, dict) or not {"global_step", "state_dict"} <= set(content):
        raise ValueError("it is not a checkpoint of a run")
    for name, kind in _TYPES.items():
        if not isinstance(content.get(name), kind) or isinstance(content[name], bool):
            raise ValueError(f"{name} is missing or not {kind.__name__}")
    if content["global_step"] < 1:
        raise ValueError(f"global_step is {content['global_step']}")
    seconds = content.get("seconds", 0.0)
    if not (isinstance(seconds, float | int) and 0 <= seconds < math.inf):
        raise ValueError(f"seconds is {describe_value(seconds)}")
    for name, value in content["state_dict"].items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ValueError(f"state_dict has an entry {describe_value(name)} that is no tensor")


def check_finite(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that weights are finite where those of a new model, of the same names, are.

    Raises:
        UserError: they are not.
    """
    for name, value in weights.items():
        if not is_finite(value) and is_finite(own[name]):
            raise damaged(path, f"{name} has values that are not finite")


def check_resumable(
    path: Path, content: Mapping[str, Any], module: "TrainingModule", trainer: "Trainer"
) -> None:
    """Compare a checkpoint with the new run that is about to restore it.

    Args:
        path: the file, for messages.
        content: the checkpoint, from :func:`read_checkpoint`.
        module: the training module on the CPU, with its initial weights.
        trainer: the trainer, before it starts.

    Raises:
        UserError: an entry is missing, or does not fit the model, the settings or the step.
    """
    try:
        settings, step = module.settings, content["global_step"]
        if step > settings.steps:
            raise ValueError(f"global_step is {step}, but the run has {settings.steps} steps")
        if settings.ema:
            _check_average(content, module)
        own, current = module.state_dict(), content["state_dict"]
        _check_weights(own, current, "state_dict")
        if settings.ema:
            current = content["current_model_state"]
            _check_weights(own, current, "current_model_state")
        _check_loops(content, trainer, settings.steps * settings.accumulate)
        if settings.precision == "16-mixed":
            _check_scaler(content)
        if "fsdp" not in settings.strategy:  # optimizer states are sharded there
            _check_optimizer(content, module, current)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise damaged(path, reason) from error


def _check_average(content: Mapping[str, Any], module: "TrainingModule") -> None:
    """Check the state of :class:`ndm.train.callbacks.EMA`."""
    _compare(content["callbacks"]["EMA"], {"latest_update_step": 0}, "callbacks.EMA")
    _same_step(content, content["callbacks"]["EMA"]["latest_update_step"], "callbacks.EMA")
    averaging = {"n_averaged": torch.tensor(0)}
    _compare(content["averaging_state"], averaging, "averaging_state")
    if not isinstance(content["current_model_state"], dict):
        raise ValueError("current_model_state is not a dict")


def _check_weights(own: Mapping[str, Tensor], found: Mapping[str, Any], where: str) -> None:
    """Compare names, types and shapes of weights with the module's, and check that they are finite.

    Strides may differ: the values are copied.
    """
    _same_keys(found, own, where)
    for name, expected in own.items():
        value = _same_kind(found[name], expected, f"{where}.{name}")
        if not is_finite(value) and is_finite(expected):
            raise ValueError(f"{where}.{name} has values that are not finite")


def _check_loops(content: Mapping[str, Any], trainer: "Trainer", most: int) -> None:
    """Compare the progress of the trainer's loops with the step; no counter exceeds ``most``."""
    found, expected = content["loops"]["fit_loop"], trainer.fit_loop.state_dict()
    _compare(found, expected, "loops.fit_loop")
    for name, part in found.items():
        for count in [] if ".val_loop." in name else _integers(part):
            if not 0 <= count <= most:
                raise ValueError(f"loops.fit_loop.{name} has the count {count}")
    steps = found["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for span, counts in steps.items():
        for name, count in counts.items():
            _same_step(content, count, f"loops.fit_loop...optimizer.step.{span}.{name}")


def _integers(node: Any) -> list[int]:
    if isinstance(node, Mapping):
        return [count for part in node.values() for count in _integers(part)]
    return [node] if type(node) is int else []


def _check_scaler(content: Mapping[str, Any]) -> None:
    """Check the state of the gradient scaler of 16-mixed."""
    scaler = content["MixedPrecision"]
    for name in ("scale", "growth_factor", "backoff_factor", "growth_interval"):
        if not (type(scaler[name]) in (float, int) and 0 < scaler[name] < math.inf):
            raise ValueError(f"MixedPrecision.{name} is {describe_value(scaler[name])}")
    if type(scaler["_growth_tracker"]) is not int:
        raise ValueError("MixedPrecision._growth_tracker is not int")


def _check_optimizer(
    content: Mapping[str, Any], module: "TrainingModule", current: Mapping[str, Tensor]
) -> None:
    """Compare the states of optimizer and learning rate with those of a new run."""
    configured: Any = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    if len(content["optimizer_states"]) != 1 or len(content["lr_schedulers"]) != 1:
        raise ValueError("optimizer_states and lr_schedulers need one entry each")
    found, rates = content["optimizer_states"][0], content["lr_schedulers"][0]
    _compare(rates, schedule.state_dict(), "lr_schedulers[0]")
    _same_step(content, rates["last_epoch"], "lr_schedulers[0].last_epoch")
    _equal(rates["base_lrs"], schedule.base_lrs, "lr_schedulers[0].base_lrs")
    step = content["global_step"]
    expected_rates = [
        base * rate(step) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    _compare(found, {"state": {}, "param_groups": []}, "optimizer_states[0]")
    groups, new_groups = found["param_groups"], optimizer.state_dict()["param_groups"]
    if len(groups) != len(new_groups):
        raise ValueError(f"optimizer_states[0] has {len(groups)} groups, not {len(new_groups)}")
    for number, (group, new) in enumerate(zip(groups, new_groups, strict=True)):
        where = f"optimizer_states[0].param_groups[{number}]"
        _check_group(group, new, step, where)
        for name, rate in (("lr", group["lr"]), ("_last_lr", rates["_last_lr"][number])):
            expected = expected_rates[number]
            if not math.isclose(rate, expected, rel_tol=1e-6, abs_tol=1e-12 * new["initial_lr"]):
                raise ValueError(f"{where}.{name} is {rate} instead of {expected}")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    started = module.settings.start_from is not None
    templates = _new_states(optimizer)
    if not set(found["state"]) <= set(templates):
        raise ValueError("optimizer_states[0].state has entries of no parameter")
    for number, parameter in enumerate(trained):
        where = f"optimizer_states[0].state[{number}]"
        if number not in found["state"]:
            # Parameters that never had a gradient have no state, and their initial values.
            if not started and not torch.equal(current[names[id(parameter)]], parameter):
                raise ValueError(f"{where} is missing")
            continue
        _check_state(found["state"][number], templates[number], parameter, step, where)


def _check_group(group: Any, new: Mapping[str, Any], step: int, where: str) -> None:
    """Compare a parameter group of the optimizer, without its learning rate."""
    _same_keys(group, new, where, more=True)
    if list(group["params"]) != list(new["params"]):
        raise ValueError(f"{where} has other parameters")
    for name, expected in new.items():
        if name not in _MACHINE:
            _equal(group[name], expected, f"{where}.{name}")
    count = group.get("step", 1)
    if type(count) is not int or not 0 <= count <= step:
        raise ValueError(f"{where}.step is {describe_value(count)} after {step} steps")
    for name in ("fused", "foreach", "capturable", "differentiable"):
        if type(group.get(name)) not in (bool, type(None)):
            raise ValueError(f"{where}.{name} is {describe_value(group[name])}")


def _new_states(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Return the states of an optimizer after one step, as tensors without values.

    The optimizer then holds copies without values instead of its parameters' states.
    """
    copies: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parameters = [
            nn.Parameter(torch.empty_like(parameter, device="meta"))
            for parameter in group["params"]
        ]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        copies.append({**group, "params": parameters, "fused": False, "foreach": False})
    originals = optimizer.param_groups
    optimizer.param_groups = copies
    try:
        optimizer.step()
        return dict(optimizer.state_dict()["state"])
    finally:
        optimizer.param_groups = originals


def _check_state(found: Any, new: Any, parameter: Tensor, step: int, where: str) -> None:
    """Compare the optimizer's state of one parameter with a new one.

    Tensors of the parameter's shape have its strides, since kernels go through both in the order of
    memory. Others have no gaps and no repeated values.
    """
    if isinstance(new, Mapping):
        _same_keys(found, new, where)
        for name in new:
            _check_state(found[name], new[name], parameter, step, f"{where}.{name}")
        return
    if isinstance(new, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(new):
            raise ValueError(f"{where} is not a list of {len(new)}")
        for number, (part, new_part) in enumerate(zip(found, new, strict=True)):
            _check_state(part, new_part, parameter, step, f"{where}[{number}]")
        return
    if not isinstance(new, Tensor):
        _equal(found, new, where)
        return
    found = _same_kind(found, new, where)
    dense = _strides(torch.empty_like(found, device="meta")) == _strides(found)
    if not dense or (new.shape == parameter.shape and _strides(found) != _strides(new)):
        raise ValueError(f"{where} has other strides than its parameter: {found.stride()}")
    if not is_finite(found):
        raise ValueError(f"{where} has values that are not finite")
    if where.endswith(".step") and not 0 < float(found) <= step:
        raise ValueError(f"{where} is {float(found):g} after {step} steps")


def _same_kind(found: Any, expected: Tensor, where: str) -> Tensor:
    """Return a value that must be a tensor of the expected type and shape."""
    if not isinstance(found, Tensor) or found.layout != torch.strided:
        raise ValueError(f"{where} is not a tensor")
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"{where} is {found.dtype} {tuple(found.shape)} instead of {expected.dtype}"
            f" {tuple(expected.shape)}"
        )
    return found


def _strides(tensor: Tensor) -> list[int]:
    """Return the strides of the dimensions that have more than one position."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def _same_step(content: Mapping[str, Any], count: object, where: str) -> None:
    if count != content["global_step"]:
        raise ValueError(f"{where} is {describe_value(count)}, but global_step is not")


def _same_keys(found: Any, expected: Mapping[Any, Any], where: str, more: bool = False) -> None:
    """Check that a mapping has the expected keys; with ``more`` it may have others."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{where} is not a dict")
    for key in expected:
        if key not in found:
            raise ValueError(f"{where}.{key} is missing")
    for key in found:
        if key not in expected and not more:
            raise ValueError(f"{where}.{describe_value(key)} is unexpected")


def _compare(found: Any, expected: Any, where: str) -> None:
    """Compare types, recursively; mappings may have further keys, and lists other lengths."""
    if isinstance(expected, Mapping):
        _same_keys(found, expected, where, more=True)
        for key, value in expected.items():
            _compare(found[key], value, f"{where}.{key}")
    elif isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            raise ValueError(f"{where} is not a tensor")
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{where} has another shape or dtype")
    elif isinstance(found, bool) != isinstance(expected, bool) or not isinstance(
        found, type(expected)
    ):
        raise ValueError(f"{where} is {type(found).__name__} instead of {type(expected).__name__}")


def _equal(found: Any, expected: Any, where: str) -> None:
    """Compare values, with lists equal to tuples."""
    if _plain(found) != _plain(expected):
        raise ValueError(
            f"{where} is {describe_value(found)} instead of {describe_value(expected)}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return deepcopy(value)
