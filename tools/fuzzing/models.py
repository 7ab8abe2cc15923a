"""Damaged weights, models and adapters, and how they are read and used."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.checkpoints.components import Components, load_components
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.inspection import inspect
from latentdiff.pipeline import Pipeline
from tools.fuzzing import mutations as damage
from tools.fuzzing.readers import Mutant, Reader, digest, tiny_model, used


class Safetensors(Reader):
    name = "safetensors"

    def make(self, folder: Path) -> list[Path]:
        tensors = {
            "a.weight": torch.randn(4, 3),
            "b": torch.arange(5),
            "c": torch.zeros(0, 2),
            "d": torch.ones(3).half(),
        }
        save_file(tensors, folder / "a.safetensors", metadata={"format": "pt", "modelspec.title": "x"})
        return [folder / "a.safetensors"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        if rng.random() < 0.05:
            return Mutant(path, damage.unlike_file(rng, path), number)
        content = source.read_bytes()
        if rng.random() < 0.5:
            path.write_bytes(damage.bytes_of(rng, content))
            return Mutant(path, "bytes", number)
        path.write_bytes(damage.header_of(rng, content, lambda header: damage.value_of(rng, header)))
        return Mutant(path, "header", number)

    def read(self, path: Path) -> Any:
        found = digest(read_tensors(path).tensors)
        str(inspect(path))
        return found


class Archive(Reader):
    name = "archive"

    def make(self, folder: Path) -> list[Path]:
        state = {"a.weight": torch.randn(4, 3), "b": torch.arange(5), "half": torch.ones(2).half()}
        content = {"state_dict": state, "global_step": 3, "epoch": 1, "lr": 0.5, "name": "x", "list": [1, (2, None)]}
        torch.save(content, folder / "plain.ckpt")
        torch.save(content, folder / "old.ckpt", _use_new_zipfile_serialization=False)
        damage.archive_of(
            random.Random(1), folder / "plain.ckpt", folder / "packed.ckpt", lambda name, data: data, packed=True
        )
        return [folder / name for name in ("plain.ckpt", "old.ckpt", "packed.ckpt")]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        if source.name == "old.ckpt" or rng.random() < 0.35:
            raw = damage.program_of if source.name == "old.ckpt" and rng.random() < 0.6 else damage.bytes_of
            path.write_bytes(raw(rng, source.read_bytes()))
            return Mutant(path, "bytes", number, can_tell=source.name != "old.ckpt")
        change = damage.program_of if rng.random() < 0.8 else damage.bytes_of

        def changed(name: str, data: bytes) -> bytes:
            return change(rng, data) if name.endswith("data.pkl") or rng.random() < 0.1 else data

        damage.archive_of(rng, source, path, changed, packed=rng.random() < 0.3)
        return Mutant(path, "records", number)

    def read(self, path: Path) -> Any:
        file = read_tensors(path)
        str(file.others)
        return digest(file.tensors)


class Folder(Reader):
    """A model folder; every eighth is drawn with."""

    name = "folder"

    def make(self, folder: Path) -> list[Path]:
        model = tiny_model(folder)
        weights = model / "vae/diffusion_pytorch_model.safetensors"
        shutil.copytree(model, folder / "sharded")
        (folder / "sharded/vae/diffusion_pytorch_model.safetensors").rename(folder / "sharded/vae/one.safetensors")
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(read_tensors(weights).tensors, "one.safetensors"),
        }
        (folder / "sharded/vae/diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        return [model, folder / "sharded"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        shutil.copytree(source, path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        texts = [file for file in files if file.suffix in (".json", ".txt")]
        if rng.random() < 0.06:
            file = rng.choice(files)
            return Mutant(path, f"{file.name} is {damage.unlike_file(rng, file)}", number)
        file = rng.choice(texts if rng.random() < 0.9 else files)
        if file.suffix == ".json" and rng.random() < 0.8:
            file.write_bytes(damage.text_of(rng, damage.value_of(rng, json.loads(file.read_text()))))
        else:
            file.write_bytes(damage.bytes_of(rng, file.read_bytes()))
        return Mutant(path, str(file.relative_to(path)), number)

    def read(self, path: Path) -> Any:
        inspect(path)
        parts = load_components(path)
        return used(lambda: self._use(parts))

    def _use(self, parts: Components) -> Any:
        pipe = Pipeline.from_components(parts)
        pipe.schedule.levels(2)
        embedded = pipe.text_encoder(_ids(pipe))
        if zlib.crc32(str(digest({"": embedded})).encode()) % 8 == 0:  # a share of them, by chance
            pipe("a cat", steps=1, seed=0, progress=False, height=16, width=16)
        return (
            digest(dict(parts.unet.state_dict()) | dict(parts.vae.state_dict())),
            str(parts.unet.config),
            digest({"": embedded}),
        )


def _ids(pipe: Pipeline) -> torch.Tensor:
    longest = pipe.tokenizer.model_max_length
    rows = pipe.tokenizer(["a photo of the cat ~#"], padding="max_length", truncation=True, max_length=longest)
    return torch.tensor(rows["input_ids"])


class SingleFile(Folder):
    """A model in one file, with the configuration that `convert` keeps in its metadata."""

    name = "single file"

    def make(self, folder: Path) -> list[Path]:
        convert(tiny_model(folder), folder / "model.safetensors")
        return [folder / "model.safetensors"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)

        def change(header: dict[str, Any]) -> Any:
            own = json.loads(header["__metadata__"]["latentdiff"])
            if rng.random() < 0.5:
                part = rng.choice(list(own))
                own[part] = damage.value_of(rng, own[part])
                header["__metadata__"]["latentdiff"] = damage.text_of(rng, own).decode("utf-8", "replace")
                return header
            return damage.value_of(rng, header)

        path.write_bytes(damage.header_of(rng, source.read_bytes(), change))
        return Mutant(path, "header", number)


class Adapter(Reader):
    """LoRA files of two dialects, one with PEFT's configuration, and the embedding of a word."""

    name = "lora"

    def make(self, folder: Path) -> list[Path]:
        self.pipe = Pipeline.load(tiny_model(folder), device="cpu", precision="fp32")
        lora = LoRA.create(self.pipe.unet, self.pipe.text_encoder, LoRASpec(rank=2))
        save_lora(lora, folder / "kohya.safetensors")
        save_lora(lora, folder / "peft.safetensors", dialect="peft")
        tensors = read_tensors(folder / "peft.safetensors").tensors
        config = {
            "r": 2,
            "lora_alpha": 4,
            "alpha_pattern": {"attn1.to_q": 1, "to_k": 8},
            "rank_pattern": {},
            "use_rslora": False,
        }
        entry = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, folder / "diffusers.safetensors", metadata=entry
        )
        save_file({"<x>": torch.randn(16)}, folder / "word.safetensors")
        return [folder / f"{name}.safetensors" for name in ("kohya", "peft", "diffusers", "word")]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)

        def change(header: dict[str, Any]) -> Any:
            texts = header.get("__metadata__", {})
            if "lora_adapter_metadata" in texts and rng.random() < 0.7:
                value = damage.value_of(rng, json.loads(texts["lora_adapter_metadata"]))
                texts["lora_adapter_metadata"] = damage.text_of(rng, value).decode("utf-8", "replace")
                return header
            return damage.value_of(rng, header)

        make = damage.bytes_of if rng.random() < 0.3 else lambda rng, data: damage.header_of(rng, data, change)
        path.write_bytes(make(rng, source.read_bytes()))
        return Mutant(path, "bytes or header", number)

    def read(self, path: Path) -> Any:
        str(inspect(path))
        report = self.pipe.load_lora(path, 0.5, "x")
        try:
            used(lambda: self.pipe.text_encoder(_ids(self.pipe)))
            found = used(lambda: self.pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 16, 16)))
        finally:
            self.pipe.unload_lora()
        return str(report).replace(str(path), ""), digest({"": found})
