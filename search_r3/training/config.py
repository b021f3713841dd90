"""Training's configuration as dataclasses, and the YAML loader that fills any dataclass and refuses unknown keys.

One recipe is one YAML file; `--set loop.steps=10` overrides a key of it. A wrong key or value stops the run before
anything is loaded, with the file, the key, what was expected and the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from search_r3.data.io.yaml_file import parse_yaml, read_yaml, where_recipes_are
from search_r3.errors import InputError

Config = TypeVar("Config")

RENAMED_KEYS: dict[str, dict[str, str]] = {
    "SFTConfig": {
        "start_from": "init_adapter",
        "pairs_per_step": "global_batch_size",
        "batch_of": "batch_sampler",
        "max_analysis_tokens": "max_reasoning_tokens",
        "reasoning_share": "reasoning_ratio",
        "sample_share": "self_reasoning_ratio",
        "samples_from": "self_reasoning_start_step",
        "samples_every": "self_reasoning_refresh_steps",
        "sample_temperature": "self_reasoning_temperature",
        "memory": "cross_batch_memory_size",
        "gradient_cache": "activation_checkpointing",
        "rows_per_chunk": "mini_batch_size",
    },
    "LossWeights": {"distil": "distillation"},
    "GRPOConfig": {
        "group_size": "num_generations",
        "epochs": "num_iterations",
        "minibatches": "num_mini_batches",
        "from_rank": "min_positive_rank",
        "to_rank": "max_positive_rank",
        "rollouts_per_batch": "generation_batch_size",
        "resamples": "max_resample_rounds",
        "gauge_every": "staleness_eval_every",
        "gauge_queries": "staleness_eval_queries",
        "gauge_rows": "staleness_eval_rows",
        "samples": "num_completions_to_log",
        "samples_every": "log_completions_every",
        "gradient_cache": "activation_checkpointing",
        "rows_per_chunk": "mini_batch_size",
    },
}
"""What a key was called before: by the dataclass that has it, the old name and the present one."""
SPLIT_KEYS: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "GRPOConfig": {
        "advantage": {
            "standard": {"advantage_estimator": "grpo", "scale_rewards": "group"},
            "dr_grpo": {"advantage_estimator": "grpo", "scale_rewards": "none"},
            "leave_one_out": {"advantage_estimator": "rloo", "scale_rewards": "none"},
        },
    },
}
"""Keys that are several today: by dataclass and old name, what each old value is written as."""


@dataclass
class LoopConfig:
    """How the training loop runs: length, optimizer, schedule, checkpoints, log."""

    steps: int = 1000
    """Optimiser steps in the whole run."""
    learning_rate: float = 3e-4
    """AdamW's peak learning rate."""
    warmup_steps: int = 10
    """Steps over which the rate rises linearly to its peak; from `steps` on, the whole run is warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, over the rest of `steps`."""
    min_lr_ratio: float = 0.1
    """The final rate as a fraction of the peak, in [0, 1]; "constant" ignores it."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on every trainable parameter."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moments, each in [0, 1)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off (the norm is still logged)."""
    seed: int = 0
    """Everything random in step s is a function of (seed, s, process)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """"auto" is bf16 where the hardware is fast at it (a GPU with bf16, a CPU with AMX), else no."""
    gradient_accumulation: int = 1
    """Batches whose gradients are averaged before one optimizer step."""
    checkpoint_every: int = 100
    """Steps between checkpoints; 0 writes one only at the end and when stopped."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints kept, at least 1; the second newest is used if the newest is damaged."""
    evaluate_every: int = 100
    """Steps between evaluations on the dev set, the first before training; 0 never evaluates."""
    evaluate_first: bool = True
    """Also evaluate before any training."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better figure than the best before; 0 never stops."""
    log_every: int = 1
    """Steps between lines in log.jsonl."""
    time_limit_minutes: float | None = None
    """Stop this start of the run after this many minutes, with a checkpoint to resume from; the schedule stays."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "steps", self.steps, "1 or more")
        _require(_finite(self.learning_rate) and self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        schedules = ("cosine", "linear", "constant")
        _require(self.schedule in schedules, "schedule", self.schedule, "one of " + ", ".join(schedules))
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        _require(_finite(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        self.betas = (self.betas[0], self.betas[1])
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")
        _require(_finite(self.max_grad_norm) and self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, ">= 0")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        precisions = ("auto", "no", "bf16")
        _require(self.mixed_precision in precisions, "mixed_precision", self.mixed_precision, "auto, no or bf16")
        _require(self.gradient_accumulation >= 1, "gradient_accumulation", self.gradient_accumulation, "1 or more")
        _require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        _require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "1 or more")
        _require(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "0 or more")
        _require(self.patience >= 0, "patience", self.patience, "0 or more")
        _require(
            not self.patience or self.evaluate_every > 0,
            "evaluate_every",
            self.evaluate_every,
            "1 or more where patience is above 0, as patience counts evaluations",
        )
        _require(self.log_every >= 1, "log_every", self.log_every, "1 or more")
        limit = self.time_limit_minutes
        _require(limit is None or limit > 0, "time_limit_minutes", limit, "above 0, or null for no limit")


@dataclass
class LoraSettings:
    """The LoRA adapter that is trained on top of the frozen base (arXiv 2106.09685)."""

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1); 0 keeps the first GRPO ratio at 1."""
    target_modules: str | list[str] = "all-linear"
    """PEFT's target_modules: "all-linear", a regular expression that matches full module names, or the last parts of
    names as a list (or separated by commas: q_proj,v_proj)."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", self.rank, "1 or more")
        _require(_finite(self.alpha) and self.alpha > 0, "alpha", self.alpha, "above 0")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        _require(bool(self.target_modules), "target_modules", self.target_modules, '"all-linear" or module names')


def load_config(path: str | Path, cls: type[Config], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file into the dataclass `cls`, checking every key and type.

    Args:
        path: a YAML file with a mapping on top (an empty file is all defaults).
        cls: a dataclass; its fields may be dataclasses, str, int, float, bool, Path, Literal, list, tuple, dict, and
            unions of these. An int is accepted for a float and so is "3e-4" (which YAML 1.1 reads as a string); a
            bool is never a number.
        overrides: "section.key=value" strings, values read as YAML, applied over the file in their order.

    Raises:
        InputError: the file is missing, unreadable, not YAML (with the line) or no mapping; a key is unknown,
            missing or given twice; a value has the wrong type or fails the dataclass's own checks.
    """
    path = Path(path)
    raw = _read_mapping(path)
    overridden: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator or not all(key.split(".")):
            raise InputError(f"--set {override}: expected section.key=value, such as loop.steps=10")
        try:
            value = parse_yaml(text, _UniqueKeys)
        except yaml.YAMLError as error:
            raise InputError(f"--set {override}: the value is not valid YAML: {_yaml_problem(error)}") from error
        section = raw
        *parents, last = key.split(".")
        for parent in parents:
            below = section.get(parent)
            section[parent] = below = {} if below is None else below
            if not isinstance(below, dict):
                raise InputError(f"--set {override}: {parent} is {below!r}, not a section with keys of its own")
            section = below
        section[last] = value
        overridden[key] = f"--set {override}"
    return _Builder(str(path), overridden).build(cls, raw, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain dicts, lists and scalars, ready for JSON or YAML (a Path becomes its string)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def with_present_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The flat settings of an older run ("section.key" -> value) with the names that the settings of `now` have."""
    found: dict[str, Any] = {}
    for key, value in before.items():
        section, dot, name = key.rpartition(".")
        written = [{new: value} for table in RENAMED_KEYS.values() if (new := table.get(name))]
        written += [choices.get(str(value), {}) for table in SPLIT_KEYS.values() if (choices := table.get(name))]
        settings = ({f"{section}{dot}{new}": item for new, item in words.items()} for words in written)
        present = next((words for words in settings if words and words.keys() <= now.keys()), None)
        found |= {key: value} if key in now or present is None else present
    return found


def _replaced(cls: str, prefix: str, name: str, value: Any) -> str | None:
    """What to write for a key of an earlier version; None if there was none of that name."""
    if new := RENAMED_KEYS.get(cls, {}).get(name):
        return f'the key "{prefix}{name}" is called {prefix}{new} now; rename it'
    if choices := SPLIT_KEYS.get(cls, {}).get(name):
        words = choices.get(str(value)) or next(iter(choices.values()))
        written = ", ".join(f"{prefix}{new}: {item}" for new, item in words.items())
        return (
            f'the key "{prefix}{name}" is split into {" and ".join(prefix + new for new in words)} now; write {written}'
        )
    return None


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise InputError(f"{key} must be {expected}, got {value!r}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key_node.value} is given twice", problem_mark=key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path, _UniqueKeys)
    except FileNotFoundError:
        raise InputError(f"no configuration file at {path}; {where_recipes_are(path)}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {_yaml_problem(error)}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping (key: value), but holds a {type(raw).__name__}")
    return raw


class _Mismatch(Exception):
    """A value that is not what its field's type wants; the message says what was expected."""


@dataclass
class _Builder:
    file: str
    overridden: dict[str, str]

    def where(self, key: str) -> str:
        return self.overridden.get(key, self.file)

    def build(self, cls: type[Config], raw: dict[str, Any], prefix: str, default: Config | None = None) -> Config:
        """`cls` filled from `raw`. Keys that `raw` lacks keep the value of `default`, the section's own default in its
        recipe, where there is one: setting one key changes one key.
        """
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        types_of = typing.get_type_hints(cls)
        values = {} if default is None else {name: getattr(default, name) for name in fields}
        for name, value in raw.items():
            key = f"{prefix}{name}"
            if name not in fields:
                if replaced := _replaced(cls.__name__, prefix, name, value):
                    raise InputError(f"{self.where(key)}: {replaced}")
                near = difflib.get_close_matches(str(name), fields, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys are {', '.join(fields)}"
                raise InputError(f"{self.where(key)}: unknown key {key}; {hint}")
            try:
                section = _default_section(fields[name]) if default is None else values[name]
                values[name] = self.convert(types_of[name], value, key, section)
            except _Mismatch as mismatch:
                raise InputError(f"{self.where(key)}: {key} must be {mismatch}, got {value!r}") from None
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in values:
                raise InputError(f"{self.file}: {prefix}{name} is missing; it has no default")
        try:
            return cls(**values)
        except InputError as error:
            sources = [f"{source}: " for key, source in self.overridden.items() if key.startswith(prefix)]
            place = f"in {prefix[:-1]}, " if prefix else ""
            raise InputError(
                f"{self.file}: {place}{error}{' (after ' + sources[-1][:-2] + ')' if sources else ''}"
            ) from error

    def convert(self, kind: Any, value: Any, key: str, default: Any = None) -> Any:
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            if value is None:  # an empty section: all defaults
                value = {}
            if not isinstance(value, dict):
                raise _Mismatch("a section with keys of its own")
            section = typing.cast(type, kind)
            return self.build(section, value, f"{key}.", default if isinstance(default, section) else None)
        if origin in (typing.Union, types.UnionType):
            return self._convert_union(arguments, value, key, default)
        if origin is Literal:
            return _convert_literal(arguments, value)
        if origin in (list, tuple) or kind in (list, tuple):
            return self._convert_sequence(origin or kind, arguments, value, key)
        if origin is dict or kind is dict:
            if not isinstance(value, dict):
                raise _Mismatch("a mapping")
            item = arguments[1] if arguments else Any
            return {name: self.convert(item, below, f"{key}.{name}") for name, below in value.items()}
        return _convert_scalar(kind, value)

    def _convert_union(self, members: tuple[Any, ...], value: Any, key: str, default: Any = None) -> Any:
        if value is None and type(None) in members:
            return None
        members = tuple(member for member in members if member is not type(None))
        for member in members:  # an exact match first, so that 3 stays an int in int | float
            if isinstance(member, type) and type(value) is member:
                return value
        expected = []
        for member in members:
            try:
                return self.convert(member, value, key, default)
            except _Mismatch as mismatch:
                expected.append(str(mismatch))
        raise _Mismatch(" or ".join(expected))

    def _convert_sequence(self, kind: Any, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _Mismatch("a list")
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(value) != len(arguments):
                raise _Mismatch(f"a list of {len(arguments)} values")
            return tuple(self.convert(item, below, key) for item, below in zip(arguments, value, strict=True))
        item = arguments[0] if arguments else Any
        return kind(self.convert(item, below, key) for below in value)


def _default_section(field: dataclasses.Field[Any]) -> Any:
    """A nested section as its recipe has it when the file says nothing of it; None for other fields."""
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return value if dataclasses.is_dataclass(value) and not isinstance(value, type) else None


def _convert_literal(choices: tuple[Any, ...], value: Any) -> Any:
    if isinstance(value, bool):  # YAML 1.1 reads an unquoted no, off, yes, on as a bool
        words = ("yes", "on", "true") if value else ("no", "off", "false")
        value = next((word for word in words if word in choices), value)
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise _Mismatch(f"one of {', '.join(str(choice) for choice in choices)}{hint}")


def _convert_float(value: Any) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _Mismatch("a number") from None
        if math.isfinite(number):
            return number
    raise _Mismatch("a finite number" if isinstance(value, float) else "a number")


def _convert_scalar(kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise _Mismatch("true or false")
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise _Mismatch("a whole number")
    if kind is float:
        return _convert_float(value)
    if kind is str:
        if isinstance(value, str):
            return value
        raise _Mismatch("text (quote it if it looks like a number or yes/no)")
    if kind is Path:
        if isinstance(value, str) and value:
            return Path(value)
        raise _Mismatch("a path")
    raise TypeError(f"load_config cannot fill a field of type {kind}")
