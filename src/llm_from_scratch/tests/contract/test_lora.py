"""A run with an adapter as a user meets it: every command loads the base and the adapter by itself."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.store import find_checkpoint, load_checkpoint
from llm_from_scratch.cli import evaluate, export, generate, serve
from llm_from_scratch.cli import train as train_command
from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving.options import ServeOptions
from llm_from_scratch.serving.service import Service, open_service

from ..edited import Edit, EditedCopy
from ..tiny import arguments, write_data

SHAPE = {"n_layer": 2, "pos_embedding": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
LORA = ["--init_from=base", "--lora_rank=4", "--learning_rate=0.05", "--max_iters=30"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, a run `base`, and its adapters `poet` and `coder`."""
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = arguments(dataset="data", dropout=0.0, progress="none", **SHAPE)
        assert train_command.main([*words, "--out_dir=base"]) == 0
        assert train_command.main([*words, *LORA, "--out_dir=poet"]) == 0
        assert train_command.main([*words, *LORA, "--out_dir=coder", "--lora_targets=mlp.c_fc,attn", "--seed=5"]) == 0
    return folder


@pytest.fixture
def runs(trained: Path, here: Path) -> Path:
    shutil.copytree(trained, here, dirs_exist_ok=True)
    return here


def served(service: Service, name: str, **options: Any) -> Service:
    serve.add_adapters(service, name, serve.SourceOptions(out_dir=name), "recompute", None)
    return service


def base_service(**options: Any) -> Service:
    settings = ServeOptions(port=0, max_concurrent=2, **options)
    settings.validate()
    generator = Generator.from_checkpoint("base", device="cpu", dtype="float32")
    return open_service(generator, settings, "base", None, "recompute", 0)


def test_served_adapters_share_unchanged_weights(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    service = served(base_service(adapters={"poet": "poet", "c": "coder"}), "base")
    try:
        assert [one.name for one in service.all] == ["base", "poet", "c"]
        assert service.named("c") is service.others["c"] and service.named(None) is service
        base = service.generator.model.state_dict()
        for name, folder in (("poet", "poet"), ("c", "coder")):
            own, alone = service.named(name).generator.model.state_dict(), load(folder).model
            assert all(torch.equal(own[key], alone[key]) for key in alone)
            touched = {key.rpartition(".")[0] + ".weight" for key in load_checkpoint(find_checkpoint(folder)).adapter}
            shared = {key for key in own if own[key].data_ptr() == base[key].data_ptr()}
            assert shared == set(own) - touched and len(touched) < len(own)
    finally:
        for one in service.all:
            one.supervisor.engine.close()


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"poet": "base"}, "base is not an adapter of base"),
        ({"poet": "nowhere"}, "no checkpoint nowhere|nowhere"),
        ({"base": "poet"}, "two models are named base"),
        ({"a b": "poet"}, "the name 'a b' may only contain"),
    ],
)
def test_models_that_cannot_be_served_are_refused(runs: Path, adapters: dict[str, str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        service = base_service(adapters=adapters)
        try:
            served(service, "base")
        finally:
            for one in service.all:
                one.supervisor.engine.close()


@pytest.mark.slow
def test_every_command_loads_the_base_and_the_adapter(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out: dict[str, str] = {}
    for name in ("base", "poet"):
        words = [f"--out_dir={name}", "--start=bo", "--num_samples=1", "--max_new_tokens=20", "--temperature=0"]
        assert not generate.main([*words, "--device=cpu", "--dtype=float32"])
        out[name] = capsys.readouterr().out
        assert not evaluate.main([f"--out_dir={name}", "--dataset=data", "--json=True", "--device=cpu"])
        out[f"{name} loss"] = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert out["base"] != out["poet"] and out["poet loss"] < out["base loss"]
    expected = load("poet").model
    export.main(["--out_dir=poet", "--output=poet-hf"])
    export.main(["--out_dir=poet", "--format=gguf", "--gguf_type=f32", "--output=poet.gguf"])
    merged = load("poet.gguf").model
    assert all(torch.equal(merged[name], expected[name].float()) for name in expected)
    assert "adapter" not in " ".join(path.name for path in Path("poet-hf").iterdir())
    again = load("poet-hf", dataset="data", need_tokenizer=False)
    assert all(torch.equal(again.model[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_adapter_in_pefts_format_is_served(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.main(["--out_dir=poet", "--format=peft", "--output=poet-peft"])
    assert "in Hugging Face's format: llm-export --checkpoint=" in capsys.readouterr().out
    service = served(base_service(adapters={"poet": "poet", "same": "poet-peft"}), "base")
    try:
        mine, theirs = (service.named(name).generator.model.state_dict() for name in ("poet", "same"))
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6)
    finally:
        for one in service.all:
            one.supervisor.engine.close()


@pytest.mark.slow
def test_adapters_answer_by_name(runs: Path) -> None:
    from .test_llm_serve import running

    with running("--out_dir=base", "--adapters={poet: poet, coder: coder}") as (_, url):
        names = [one["id"] for one in json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"]]
        assert names == ["base", "poet", "coder"]
        for name in names:
            body = {"model": name, "prompt": "bo", "max_tokens": 20, "temperature": 0}
            headers = {"content-type": "application/json"}
            request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
            found = json.load(urllib.request.urlopen(request))
            generator = Generator.from_checkpoint(name, device="cpu", dtype="float32")
            params = GenerationConfig(num_samples=1, max_new_tokens=20, temperature=0.0)
            assert found["choices"][0]["text"] == generator.generate(["bo"], params)[0].text and found["model"] == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "use", "refused"),
    [
        (
            "self.gate = Linear(config.n_embd, config.n_embd)",
            "x = x + self.gate(self.ln_2(x)).sigmoid() * self.mlp(self.ln_2(x))",
            "",
        ),
        (
            'self.register_buffer("calls", torch.zeros(2))',
            "x = x + self.mlp(self.ln_2(x)) + self.calls.sum() * 0",
            "lora_rank does not support transformer.h.0.calls",
        ),
    ],
)
def test_an_edited_model_trains_adapters_or_is_refused_by_name(
    tmp_path: Path, line: str, use: str, refused: str
) -> None:
    before = "self.ln_2 = make_norm(config)\n"
    edits = [
        Edit("core/model.py", before, f"{before}        {line}\n"),
        Edit("core/model.py", "x = x + self.mlp(self.ln_2(x))\n", f"{use}\n"),
    ]
    copy = EditedCopy(tmp_path / "copy", edits)
    write_data(copy.folder / "data" / "d")
    words = arguments(dataset="data/d", dropout=0.0)
    copy.run("cli.train", *words, "--out_dir=base")
    told = copy.run("cli.train", *words, *LORA, "--out_dir=run", code=2 if refused else 0)
    assert refused in told
    if not refused:
        assert "transformer.h.0.gate.lora_A" in load_file_names(copy.folder / "run")
        text = copy.run("cli.generate", "--out_dir=run", "--start=bo", "--device=cpu", "--max_new_tokens=8")
        assert "bo" in text


def load_file_names(run: Path) -> str:
    return (find_checkpoint(run, "last", verify=False) / "adapter.safetensors").read_bytes()[:4000].decode("latin-1")
