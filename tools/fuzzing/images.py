"""Damaged inversions, recipes, data sets and settings, and how they are read and used."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import shutil
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from latentdiff.checkpoints.inspection import inspect
from latentdiff.cli.command_line import command_line
from latentdiff.errors import LatentDiffError
from latentdiff.image import open_image, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.reading.yaml import read_yaml
from latentdiff.recipe import Recipe, read_account, read_recipe
from latentdiff.tasks.inversion import Inversion
from latentdiff.training.data.folders import list_folder
from latentdiff.training.data.images import read_image
from latentdiff.training.data.shards import list_shards
from latentdiff.training.data.stream import ShardStream
from tools.fuzzing import mutations as damage
from tools.fuzzing.readers import Mutant, Reader, digest, tiny_model, used


class Inversions(Reader):
    name = "inversion"

    def make(self, folder: Path) -> list[Path]:
        levels = tuple(Pipeline.load(tiny_model(folder), device="cpu").schedule.levels(2))
        found = Inversion(
            latents=torch.randn(3, 4, 8, 8), levels=levels, embeddings=torch.randn(1, 16, 16), prompt="a cat", method="ddim",
            model="m", model_hash="0" * 64, size=(16, 16), settings={"a": 1.5}, nulls=torch.randn(2, 16, 16),
            reconstruction_db=float("inf"), floor_db=30.0, source={"file": "a.png", "sha256": "0" * 64},
        )  # fmt: skip
        found.save(folder / "a.inversion")
        return [folder / "a.inversion"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)

        def change(header: dict[str, Any]) -> Any:
            if rng.random() < 0.7:
                own = damage.value_of(rng, json.loads(header["__metadata__"]["inversion"]))
                header["__metadata__"]["inversion"] = damage.text_of(rng, own).decode("utf-8", "replace")
                return header
            return damage.value_of(rng, header)

        make = damage.bytes_of if rng.random() < 0.2 else lambda rng, data: damage.header_of(rng, data, change)
        path.write_bytes(make(rng, source.read_bytes()))
        return Mutant(path, "bytes or header", number)

    def read(self, path: Path) -> Any:
        found = Inversion.load(path)
        used(lambda: (found.noise_statistics(), found.at(found.levels[0]), found.check_model(found.model_hash)))
        used(lambda: found.thinned(1))
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return digest(tensors), str({name: value for name, value in fields.items() if name not in tensors})


class Recipes(Reader):
    """Recipes in PNG and GIF files; the checksums of a PNG's chunks can tell."""

    name = "recipe"

    def make(self, folder: Path) -> list[Path]:
        recipe = Recipe(
            prompt="a cat, red: \"x\"", negative_prompt="dog", seed=7, steps=3, sampler="ddim", guidance_scale=5.0, width=16,
            height=16, model="m", model_hash="0" * 64, loras=[{"file": "a", "sha256": "0", "scale": 1.0}],
        )  # fmt: skip
        self.chunks = recipe.to_chunks()
        image = Image.new("RGB", (16, 16), "red")
        image.info = dict(self.chunks)
        save_png(image, folder / "a.png")
        Image.new("P", (16, 16)).save(folder / "a.gif", comment=self.chunks["latentdiff"].encode())
        return [folder / "a.png", folder / "a.gif"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        if rng.random() < 0.4:
            path.write_bytes(damage.bytes_of(rng, source.read_bytes()))
            return Mutant(path, "bytes", number, can_tell=path.suffix == ".png")
        own = damage.text_of(rng, damage.value_of(rng, json.loads(self.chunks["latentdiff"])))
        if path.suffix == ".gif":
            Image.new("P", (16, 16)).save(path, comment=own[:60_000])
            return Mutant(path, "comment", number)
        info = PngImagePlugin.PngInfo()
        if rng.random() < 0.6:
            info.add_text("latentdiff", own.decode("utf-8", "replace"))
        text = damage.bytes_of(rng, self.chunks["parameters"].encode()) * rng.choice((1, 1, 1, 300))
        info.add_text("parameters", text.decode("utf-8", "replace"))
        Image.new("RGB", (16, 16), "red").save(path, pnginfo=info)
        return Mutant(path, "chunks", number)

    def read(self, path: Path) -> Any:
        image = open_image(path)
        str(inspect(path))
        recipe = read_recipe(image.info)
        used(lambda: (recipe.to_json(), recipe.to_parameters(), recipe.sampling()))
        return str(recipe), hashlib.sha1(image.convert("RGB").tobytes()).hexdigest()


class Foreign(Reader):
    """The texts of other programs, as JSON files of name and text; how they are accounted for, and the command."""

    name = "foreign"

    def make(self, folder: Path) -> list[Path]:
        line = 'a "cat": (red:1.2)\nNegative prompt: x\nSteps: 2, Sampler: Euler a, CFG scale: 3, Seed: 5, Size: 64x48'
        sampler = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        links = {"model": ["2", 0], "positive": ["3", 0], "negative": ["3", 0], "latent_image": ["4", 0]}
        lora = {"lora_name": "a", "strength_model": 1.0, "strength_clip": 0.5, "model": ["5", 0], "clip": ["5", 1]}
        graph = {
            "1": {"class_type": "KSampler", "inputs": {**sampler, **links}},
            "2": {"class_type": "LoraLoader", "inputs": lora},
            "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["2", 1]}},
            "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 2}},
            "5": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m"}},
            "6": {"class_type": "VAEDecode", "inputs": {"samples": ["1", 0], "vae": ["5", 2]}},
            "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0]}},
        }
        common = {"seed": 1, "steps": 2, "cfg_scale": 3.0, "scheduler": "euler_k", "width": 64, "height": 48}
        invoke = {**common, "positive_prompt": "a cat+", "loras": [{"model": {"name": "a"}, "weight": 1}]}
        fooocus = {"base_model": "m", "resolution": "(64, 48)", "sampler": "euler", "lora_combined_1": "a : 1", **common}
        old = {"app_version": "2", "image": {"prompt": [{"prompt": "a [b]", "weight": 1}], "sampler": "k_lms", **common}}
        self.texts: dict[str, Any] = {
            "parameters": line, "prompt": graph, "invokeai_metadata": invoke, "sd-metadata": old, "fooocus": fooocus,
        }  # fmt: skip
        for name, value in self.texts.items():
            self._write(folder / f"{name}.json", name, value if isinstance(value, str) else json.dumps(value))
        return [folder / f"{name}.json" for name in self.texts]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, _, path = self.pick(rng, folder)
        name, value = list(self.texts.items())[number]
        if isinstance(value, str):
            text = damage.bytes_of(rng, value.encode()) * rng.choice((1, 1, 1, 300))
        else:
            text = damage.text_of(rng, damage.value_of(rng, value))
        self._write(path, name, text.decode("utf-8", "replace"))
        return Mutant(path, "text", number)

    def read(self, path: Path) -> Any:
        account = read_account(json.loads(path.read_text()))
        line = used(lambda: command_line(account))
        return str(account), line

    def _write(self, path: Path, name: str, text: str) -> None:
        path.write_text(json.dumps({"parameters" if name == "fooocus" else name: text}))


class Data(Reader):
    """Folders of captioned images, by metadata and by text files, and shards."""

    name = "data"

    def make(self, folder: Path) -> list[Path]:
        for name in ("table", "csv", "texts", "shards"):
            (folder / name).mkdir(exist_ok=True)
        for number, suffix in enumerate(("png", "jpg", "webp", "gif", "bmp", "tiff")):
            image = Image.new("RGB", (8, 8), (number * 40, 9, 200))
            for name in ("table", "csv", "texts"):
                image.save(folder / name / f"{number}.{suffix}")
            (folder / "texts" / f"{number}.txt").write_text(f"caption {number}")
        rows = [{"file_name": path.name, "text": "a cat"} for path in sorted((folder / "table").iterdir())]
        (folder / "table/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "csv/metadata.csv").write_text(
            "file_name,text\n" + "\n".join(f"{row['file_name']},a cat" for row in rows)
        )
        with tarfile.open(folder / "shards/0.tar", "w") as tar:
            for path in sorted((folder / "texts").iterdir()):
                tar.add(path, path.name)
            row = json.dumps({"caption": "a dog"}).encode()
            for name, content in (("x.json", row), ("x.png", (folder / "texts/0.png").read_bytes())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        return [folder / name for name in ("table", "csv", "texts", "shards")]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        shutil.copytree(source, path)
        files = sorted(path.iterdir())
        file = rng.choice([each for each in files if each.name.startswith("metadata")] * 6 + files)
        if rng.random() < 0.05:
            return Mutant(path, damage.unlike_file(rng, file), number)
        if file.suffix == ".jsonl" and rng.random() < 0.6:
            lines = file.read_text().splitlines()
            place = rng.randrange(len(lines))
            lines[place] = damage.text_of(rng, damage.value_of(rng, json.loads(lines[place]))).decode(
                "utf-8", "replace"
            )
            file.write_text("\n".join(lines), encoding="utf-8")
        else:
            file.write_bytes(damage.bytes_of(rng, file.read_bytes()))
        return Mutant(path, file.name, number)

    def read(self, path: Path) -> Any:
        tars = sorted(path.glob("*.tar"))
        listing = list_shards(tars, None) if tars else list_folder(path, None)
        found = []
        for entry in listing.entries:
            try:
                image = read_image(used(entry.origin.source), entry.name)
                found.append((entry.name, entry.captions, hashlib.sha1(image.tobytes()).hexdigest()))
            except LatentDiffError as error:
                found.append((entry.name, entry.captions, str(error)))
        if tars:
            stream = ShardStream(tuple(tars), 1, 0, buffer=4)
            samples = stream.batches(lambda sample, step, row: (sample.name, sample.captions(allow_missing=True)))
            found += [next(samples).items for _ in range(3)]
        return found


class Settings(Reader):
    """YAML."""

    name = "yaml"

    def make(self, folder: Path) -> list[Path]:
        configs = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
        for path in configs:
            shutil.copy(path, folder / path.name)
        return [folder / path.name for path in configs]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        more = rng.choice(
            (
                b"",
                b"",
                b"\na: &a [*a]",
                b"\nb: 2024-13-45",
                b"\n? [1]\n: 2",
                b"\n!!python/name:os.system x",
                b"\n- [" * 50,
            )
        )
        path.write_bytes(damage.bytes_of(rng, source.read_bytes()) + more)
        return Mutant(path, "bytes", number)

    def read(self, path: Path) -> Any:
        return str(read_yaml(path))
