"""Opens what the user named, files or folders, and finds each network's tensors in them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltxlite.checkpoint.config import LONGEST, embedded_config, parse_json
from ltxlite.checkpoint.diffusers import is_diffusers, official_config, official_name
from ltxlite.checkpoint.flavours import fold
from ltxlite.checkpoint.recognise import BY_NAME, components_in, foreign
from ltxlite.checkpoint.stored import StoredTensor
from ltxlite.errors import CheckpointError
from ltxlite_quant.containers import Container, open_container

SUFFIXES = (".safetensors", ".gguf")
# Of transformers, and of diffusers.
INDEXES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_SEARCH_DEPTH = 2  # a folder, its components' folders, Gemma's folder


@dataclass(frozen=True, slots=True)
class OpenModel:
    """One model as its packager published it: a file, or the shards of an index."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any]
    components: tuple[str, ...]
    was_diffusers: bool = False

    def named(self, component: str) -> dict[str, StoredTensor]:
        """Return a component's tensors by the names its network knows."""
        strip = BY_NAME[component].strip
        return {
            short: stored
            for name, stored in self.tensors.items()
            if (short := strip(name)) is not None
        }

    def config(self) -> dict[str, Any] | None:
        """Return the JSON configuration of all parts: embedded, or a sidecar."""
        embedded = embedded_config(self.metadata, str(self.path))
        if embedded is not None:
            return embedded
        sidecar = self.path.with_suffix(self.path.suffix + ".config.json")
        return read_json(sidecar) if sidecar.is_file() else None

    def own_config(self) -> dict[str, Any] | None:
        """Return the configuration, or else what diffusers keeps beside this part alone."""
        found = self.config()
        if found is not None or not self.was_diffusers:
            return found
        file = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return official_config(read_json(file), str(file)) if file.is_file() else None


def open_models(path: Path) -> list[OpenModel]:
    """Open a file, a sharded model's folder, or every model of a folder that is searched.

    Raises CheckpointError for a path that is not there or holds no model.
    """
    if path.is_file():
        return [_from_containers(path, [open_container(path)])]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder")
    models = list(_search(path, _SEARCH_DEPTH))
    if not models:
        raise CheckpointError(
            f"{path}: the folder holds no part of LTX-2 ({', '.join(SUFFIXES)} or {INDEXES[0]})"
        )
    return models


def _search(folder: Path, depth: int) -> Iterable[OpenModel]:
    for index in INDEXES:
        if (folder / index).is_file():
            yield _open_shards(folder / index)
            return
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in SUFFIXES:
            model = _opened(path, [open_container(path)])
            if model.components:  # a mmproj, a preview autoencoder, what other programs keep here
                yield model
        elif path.is_dir() and depth and not path.name.startswith("."):
            yield from _search(path, depth - 1)


def _open_shards(index: Path) -> OpenModel:
    folder, table = index.parent, read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(
            f"{index}: no weight_map of tensor names to shards; download it again"
        )
    shards = []
    for name in sorted(set(table.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: the shard name {name!r} leaves its folder")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: this shard is missing; download it")
        shards.append(open_container(folder / name))
    present = {name for shard in shards for name in shard.tensors}
    if lost := sorted(table.keys() - present):
        raise CheckpointError(
            f"{index}: {len(lost)} tensors are in no shard ({lost[0]}, ...); download them again"
        )
    return _from_containers(folder, shards)


def _from_containers(path: Path, containers: Sequence[Container]) -> OpenModel:
    model = _opened(path, containers)
    if not model.components:
        kind = foreign(model.tensors) or "no part of LTX-2 that ltxlite knows"
        raise CheckpointError(f"{path}: this is {kind}; see README, 'Files', for what to download")
    return model


def _opened(path: Path, containers: Sequence[Container]) -> OpenModel:
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    for container in containers:
        for name, entry in container.tensors.items():
            tensors[name] = StoredTensor(container, entry)
        metadata.update(container.metadata)
    tensors = fold(tensors, metadata, str(path))
    renamed = is_diffusers(tensors)
    if renamed:
        tensors = {official_name(name): stored for name, stored in tensors.items()}
    return OpenModel(path, tensors, metadata, tuple(components_in(tensors)), renamed)


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise CheckpointError(f"{path}: more than {LONGEST} bytes, too many for a JSON file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not a text file; download it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object from a file; CheckpointError names the file on any defect."""
    return parse_json(_read_text(path), str(path))


class ModelFiles:
    """Everything the user named; of several models with a part, the first one serves it."""

    def __init__(self, models: Sequence[OpenModel]) -> None:
        self.models = tuple(models)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "ModelFiles":
        """Open files and folders, most specific first."""
        models: list[OpenModel] = []
        for path in paths:
            opened = open_models(path)
            _refuse_ambiguous(path, opened)
            models.extend(opened)
        return cls(models)

    def find(self, component: str) -> OpenModel | None:
        """Return the model that serves a component, or None."""
        for model in self.models:
            if component in model.components:
                return model
        return None

    def all(self, component: str) -> list[OpenModel]:
        """Return every model that holds a component (upscalers come in several kinds)."""
        return [model for model in self.models if component in model.components]

    def config_of(self, component: str) -> tuple[dict[str, Any] | None, str]:
        """Return the configuration that describes a component, and where it was found.

        The component's own file decides; a file without any (a GGUF, a split part) may be
        described by another file of the set.
        """
        own = self.find(component)
        if own is not None and (config := own.own_config()) is not None:
            return config, str(own.path)
        for model in self.models:
            if (config := model.config()) is not None:
                return config, str(model.path)
        return None, "no file has a configuration"


def _refuse_ambiguous(path: Path, models: Sequence[OpenModel]) -> None:
    several = ("upscaler", "lora")
    seen: dict[str, OpenModel] = {}
    for model in models:
        for component in model.components:
            if component in several:
                continue
            if component in seen:
                raise CheckpointError(
                    f"{path}: both {seen[component].path.name} and {model.path.name} hold a "
                    f"{component}; name the one you mean instead of the folder"
                )
            seen[component] = model
