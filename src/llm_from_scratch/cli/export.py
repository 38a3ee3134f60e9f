"""llm-export: writes a checkpoint for nanoGPT (ckpt.pt), transformers (a folder) or llama.cpp (GGUF)."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import UserError
from ..interop import is_peft
from ..presets import parse
from .common import command

if TYPE_CHECKING:
    from ..checkpoint.adapter import Base
    from ..checkpoint.contents import Checkpoint

HELP = """Writes a checkpoint for transformers, llama.cpp or nanoGPT.

  llm-export --out_dir=out --output=hf-model
  llm-export --out_dir=out --format=gguf --gguf_type=q8_0 --output=model.gguf
  llm-export --out_dir=out --format=nanogpt --output=nanogpt/ckpt.pt
  llm-export --out_dir=out-lora --format=peft --output=adapter
  llm-export --out_dir=out --output=hf-model --push=me/my-model"""


@dataclass
class Export:
    """Source and target."""

    out_dir: str | None = None
    """A run's folder, a step folder or a ckpt.pt."""
    checkpoint: str | None = None
    """The same as out_dir."""
    which: str | None = None
    """best, last or a step. None: best if the run saved only improvements, else last."""
    format: Literal["nanogpt", "hf", "gguf", "peft"] = "hf"
    """nanogpt: a ckpt.pt for nanoGPT's train.py and sample.py. hf: a folder for transformers. gguf: a file for
    llama.cpp and programs built on it (extra: gguf). peft: a folder with only the adapter of a run with --lora_rank."""
    gguf_type: Literal["f32", "f16", "q8_0"] = "f16"
    """Precision of the matrices in a GGUF file."""
    output: str | None = None
    """The file (nanogpt, gguf) or the new folder (hf, peft) to write."""
    push: str | None = None
    """Also upload the result to this model on the Hugging Face hub, such as me/my-model (hf, gguf, peft; extra: hf). A
    new model is private."""
    title: str | None = None
    """The model's name in its card and in a GGUF file. None: the name of the output."""
    author: str | None = None
    """Author in the card and in a GGUF file."""
    license: str | None = None
    """License in the card and in a GGUF file, such as mit or apache-2.0."""
    dataset: str | None = None
    """Name or folder of the data with the tokenizer, if the checkpoint does not have one (nanoGPT's)."""
    overwrite: bool = False
    """Replace a ckpt.pt that was not written by this program."""
    accept_erf_gelu: bool = False
    """Export a model with tanh GELU (OpenAI's GPT-2) to nanoGPT, which runs it with exact GELU."""


@command
def main(argv: list[str]) -> None:
    parsed = parse(Export, argv, prog="llm-export", description=HELP, presets=False)
    options, to_nanogpt = parsed.tree, parsed.tree.format == "nanogpt"
    if parsed.positionals:
        raise UserError(f"unexpected {parsed.positionals[0]!r}: settings are written as --key=value; see --help")
    if (options.out_dir is None) == (options.checkpoint is None):
        raise UserError("nothing to export: give either --out_dir=FOLDER or --checkpoint=PATH")
    if not options.output:
        examples = {"nanogpt": "--output=FOLDER/ckpt.pt", "gguf": "--output=model.gguf"}
        example = examples.get(options.format, "--output=FOLDER")
        raise UserError(f"--output is missing: give a path, for example {example}")
    from ..checkpoint.load import load
    from ..checkpoint.store import write_nanogpt

    if options.push is not None:
        from ..interop.hf_files import check_push, push

        if to_nanogpt:
            raise UserError("--push uploads models in the formats hf, gguf and peft, not nanogpt")
        check_push(options.push)
    output, location = Path(options.output), options.checkpoint or options.out_dir or ""
    loaded = load(
        location, options.which, options.dataset, weights_only=not to_nanogpt, need_tokenizer=False,
        merge=options.format != "peft",
    )  # fmt: skip
    if not to_nanogpt:
        _export(options, loaded, output)
        if options.push is not None:
            push(output, options.push)
        return
    if output.is_dir():
        output = output / "ckpt.pt"
    write_nanogpt(output, loaded, options.overwrite, options.accept_erf_gelu)
    print(f"wrote {output}: step {loaded.step} of {loaded.path}")
    if output.name == "ckpt.pt":
        command = shlex.join(["python", "sample.py", f"--out_dir={output.parent.resolve()}", "--device=cpu"])
        print(f"next, in a checkout of nanoGPT: {command}")


def _export(options: Export, loaded: Checkpoint, output: Path) -> None:
    from ..interop.gguf import export_gguf
    from ..interop.hf import export_hf
    from ..interop.model_card import Facts, model_card

    if options.format == "peft":
        if loaded.base is None:
            raise UserError(f"{loaded.path} holds all weights, not an adapter: remove --format=peft")
        if unused := [name for name in ("title", "author", "license") if getattr(options, name) is not None]:
            raise UserError(f"{unused[0]} has no effect with --format=peft: remove it")
        return _export_adapter(loaded, loaded.base, output)
    about = {name: value for name in ("author", "license") if (value := getattr(options, name)) is not None}
    title, tokenizer = options.title or output.resolve().stem, loaded.tokenizer
    facts = Facts(title, loaded.model_config, loaded.config, loaded.step, loaded.manifest.get("val_loss"), about)
    if options.format == "gguf":
        export_gguf(loaded.model_config, loaded.model, tokenizer, output, options.gguf_type, facts.entries(), free=True)
    else:
        export_hf(
            loaded.model_config, loaded.model, tokenizer, output, model_card(facts, tokenizer), facts.sampling(),
            free=True,
        )  # fmt: skip


def _export_adapter(loaded: Checkpoint, base: Base, output: Path) -> None:
    from ..checkpoint.load import is_pretrained
    from ..interop.peft import export_peft

    assert loaded.path is not None
    place = next((p for p in base.places(loaded.path.parent) if os.path.lexists(p)), base.path)
    export_peft(
        loaded.model_config, loaded.model, loaded.adapter, base.rank, base.scale, place, loaded.tokenizer, output
    )
    if place.endswith(".gguf") or is_peft(Path(place)) or not is_pretrained(place):
        again = shlex.join(["llm-export", f"--checkpoint={place}", "--output=FOLDER"])
        print(f"peft needs the base model in Hugging Face's format: {again}")
        print(f"then name FOLDER in {output / 'adapter_config.json'} (base_model_name_or_path)")


if __name__ == "__main__":
    sys.exit(main())
