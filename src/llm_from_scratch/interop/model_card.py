"""The description in an exported model: the README.md of a folder for the hub, the entries general.* of a GGUF
file, and the defaults of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config import Config, GPTConfig
from ..core.sizes import count_params
from ..core.tokenizer import Tokenizer
from ..errors import one_line
from ..settings import to_dict

SHOWN = ("model", "optimizer", "scheduler")  # sections of the settings; the others name files and machines
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}  # ours: llama.cpp's


@dataclass
class Facts:
    """settings: of the run, {section: {leaf: value}}; empty if it is not known. about: author, license."""

    title: str
    config: GPTConfig
    settings: dict[str, Any]
    step: int
    val_loss: float | None
    about: dict[str, str]

    def section(self, name: str) -> dict[str, Any]:
        found = self.settings.get(name)
        return found if isinstance(found, dict) else {}

    def training(self) -> list[str]:
        """How the model was made, a line each."""
        data, training, lines = self.section("data"), self.section("training"), []
        origin, loss = training.get("init_from"), self.val_loss
        if isinstance(data.get("dataset"), str):
            lines.append(f"data: {one_line(Path(data['dataset']).name)}")
        if isinstance(origin, str) and origin not in ("scratch", "resume", "auto"):
            lines.append(f"finetuned from: {one_line(Path(origin).name)}")
        if self.step:
            lines.append(
                f"training: {self.step:,} steps" + (f", validation loss {loss:.4f}" if loss is not None else "")
            )
        return lines

    def changed(self) -> str:
        """The settings that differ from the defaults, as YAML; empty if there are none."""
        plain = to_dict(Config())
        found = {name: {k: v for k, v in self.section(name).items() if plain[name].get(k) != v} for name in SHOWN}
        found = {name: values for name, values in found.items() if values}
        return _yaml(found) if found else ""

    def sampling(self) -> dict[str, Any]:
        """The run's settings for sampling; empty if they are not known."""
        known = self.section("generation")
        found = {name: known.get(name) or 0 for name in SAMPLING if name in known}  # None: no limit
        return {name: value for name, value in found.items() if type(value) in (int, float)}

    def entries(self) -> dict[str, str | float]:
        """The entries of a GGUF file."""
        found: dict[str, str | float] = {"general.name": self.title}
        found |= {f"general.{name}": value for name, value in self.about.items()}
        if made := self.training():
            found["general.description"] = "; ".join(made)
        if changed := self.changed():
            found["gptsmith.settings"] = changed
        return found | {f"general.sampling.{SAMPLING[name]}": value for name, value in self.sampling().items()}


def model_card(facts: Facts, tokenizer: Tokenizer | None) -> str:
    config, about = facts.config, facts.about
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gptsmith"]}
    header |= {"license": about["license"]} if "license" in about else {}
    heads = f"{config.n_head} heads" + (f" ({config.n_kv_head} for keys and values)" if config.n_kv_head else "")
    lines = [
        f"model: {count_params(config):,} parameters, {config.n_layer} layers, {heads}, width {config.n_embd}, "
        f"context {config.block_size:,}, vocabulary {config.vocab_size:,}",
        f"tokenizer: {tokenizer.name if tokenizer is not None else 'none'}",
        *facts.training(),
        *([f"author: {about['author']}"] if "author" in about else []),
    ]
    parts = ["---", _yaml(header), "---", "", f"# {facts.title}", "", *(f"- {line}" for line in lines), ""]
    parts += ["```python", *_usage(tokenizer), "```", ""]
    if changed := facts.changed():
        parts += ["Settings that differ from the defaults of gptsmith:", "", "```yaml", changed, "```", ""]
    return "\n".join(parts)


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()


def _usage(tokenizer: Tokenizer | None) -> list[str]:
    inputs = 'tokenizer("The", return_tensors="pt")'
    if tokenizer is not None and tokenizer.chat is not None:
        inputs = (
            'tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, '
            'return_tensors="pt", return_dict=True)'
        )
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")',
        f"inputs = {inputs}",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
    ]
